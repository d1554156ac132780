// Small dense products C (+)= A B, for operands that fit a cache.
//
// A (M, K) with any two strides, so that a transposed operand costs nothing; B (K, N) with
// contiguous rows, N a multiple of kTileColumns (pad with zeros); C (M, N). A tile of up to 6 rows
// and two vectors stays in registers over a block of K.

#pragma once

#include "vectors.hpp"

namespace iada {
namespace {

constexpr int64_t kTileRows = 6;
constexpr int64_t kDepth = 256;  // rows of B in a block: with two vectors each, half a level-1 cache

template <class T, int M>
inline void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b,
                 int64_t b_row, T* c, int64_t c_row, bool add) {
  Vector<T> acc[M][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> b0 = load(b), b1 = load(b + kLanes<T>);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vector<T> x = splat(a[m * a_row]);
      acc[m][0] += x * b0;
      acc[m][1] += x * b1;
    }
    a += a_column;
    b += b_row;
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    T* row = c + m * c_row;
    if (add) {
      acc[m][0] += load(row);
      acc[m][1] += load(row + kLanes<T>);
    }
    store(row, acc[m][0]);
    store(row + kLanes<T>, acc[m][1]);
  }
}

template <class T>
inline void tile_of(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
                    const T* b, int64_t b_row, T* c, int64_t c_row, bool add) {
  switch (rows) {
    case 1: return tile<T, 1>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
    case 2: return tile<T, 2>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
    case 3: return tile<T, 3>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
    case 4: return tile<T, 4>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
    case 5: return tile<T, 5>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
    default: return tile<T, 6>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
  }
}

// Prefetches the elements [at, end), `step` of them at each call.
template <class T>
struct Fetch {
  const T *at, *end;
  int64_t step;
  void operator()() {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t count = smaller(step, end - at);
    for (int64_t i = 0; i < count; i += line) __builtin_prefetch(at + i, 0, 2);
    at += count;
  }
};

// What `fetch` asks for comes while tiles are multiplied.
template <class T>
inline void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row,
                    int64_t a_column, const T* b, int64_t b_row, T* c, int64_t c_row, bool add,
                    Fetch<T> fetch = {}) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t k = 0; k < larger(depth, 1); k += kDepth) {
    const int64_t deep = smaller(kDepth, depth - k);
    for (int64_t n = 0; n < columns; n += kTileColumns<T>) {
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
        tile_of<T>(end - begin, deep, a + begin * a_row + k * a_column, a_row, a_column,
                   b + k * b_row + n, b_row, c + begin * c_row + n, c_row, add || k > 0);
        fetch();
      }
    }
  }
}

template <class T>
inline T dot(const T* x, const T* y, int64_t count) {
  Vector<T> a0{}, a1{}, a2{}, a3{};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>) {
    a0 += load(x + i) * load(y + i);
    a1 += load(x + i + kLanes<T>) * load(y + i + kLanes<T>);
    a2 += load(x + i + 2 * kLanes<T>) * load(y + i + 2 * kLanes<T>);
    a3 += load(x + i + 3 * kLanes<T>) * load(y + i + 3 * kLanes<T>);
  }
  T total = sum<T>((a0 + a1) + (a2 + a3));
  for (; i < count; ++i) total += x[i] * y[i];
  return total;
}

}  // namespace
}  // namespace iada
