// Threads come from torch's own pool (torch_parallel_for), so that nothing is oversubscribed and
// torch.set_num_threads holds. Kernels see two functions only and include no torch header:
// they are compiled once for each instruction set, and an inline function of a header, compiled
// for a newer one, must not become the program's only copy.
//
// Work is always cut into the same pieces, whatever the number of threads, and partial sums are
// added in the order of the pieces: results do not depend on the number of threads.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace iada {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls `function` on consecutive ranges that cover [0, count); defined in operators.cpp.
void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context);

// Raises a RuntimeError that names the size; defined in operators.cpp.
[[noreturn]] void out_of_memory(int64_t bytes);

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

// Uninitialised memory on a cache line's boundary.
template <class T>
struct Buffer {
  T* data = nullptr;
  explicit Buffer(int64_t size) {
    if (size <= 0) return;
    const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data == nullptr) out_of_memory(static_cast<int64_t>(bytes));
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace
}  // namespace iada
