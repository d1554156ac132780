// Threads come from torch's own pool (torch_parallel_for), so that nothing is oversubscribed and
// torch.set_num_threads holds. Kernels see two functions only and include no torch header:
// they are compiled once for each instruction set, and an inline function of a header, compiled
// for a newer one, must not become the program's only copy.
//
// Work is always cut into the same pieces, whatever the number of threads, and partial sums are
// added in the order of the pieces: results do not depend on the number of threads.

#pragma once

#include <cstdint>

namespace iada {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls `function` on consecutive ranges that cover [0, count); defined in operators.cpp.
void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context);

// Memory on a cache line's boundary, to be given back by the thread that took it, the latest first; a
// multiple of 64 bytes. A RuntimeError that names the size if there is none. Defined in operators.cpp.
void* take_scratch(int64_t bytes);
void give_back_scratch(void* memory, int64_t bytes);

namespace {

// Multiply-adds below which waking a second thread costs more than it saves.
constexpr double kSerialWork = 400e3;

// f(piece) for each piece in [0, count). `work` counts all multiply-adds.
// `make_scratch` gives each thread's range its own scratch, passed to f.
template <class Scratch, class F>
inline void parallel_pieces(int64_t count, double work, int64_t scratch_size, const F& f) {
  struct Context {
    const F* f;
    int64_t scratch_size;
  } context{&f, scratch_size};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    const auto* c = static_cast<const Context*>(opaque);
    Scratch scratch(c->scratch_size);
    for (int64_t piece = begin; piece < end; ++piece) (*c->f)(piece, scratch.data);
  };
  if (count == 0) return;
  if (work < kSerialWork || count == 1) {
    run(0, count, &context);
  } else {
    parallel_ranges(count, 1, run, &context);
  }
}

// Uninitialised memory, for as long as the scope lasts that it stands in.
template <class T>
struct Buffer {
  T* data = nullptr;
  int64_t bytes = 0;
  explicit Buffer(int64_t size) {
    if (size <= 0) return;
    bytes = (size * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    data = static_cast<T*>(take_scratch(bytes));
  }
  ~Buffer() {
    if (data != nullptr) give_back_scratch(data, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace
}  // namespace iada
