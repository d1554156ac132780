// Small dense products C (+)= A B, for operands that fit a cache.
//
// A (M, K) with any two strides, so that a transposed operand costs nothing; B (K, N) with
// contiguous rows, N of whole vectors (pad with zeros); C (M, N). A tile of up to 6 rows and two
// vectors, or of 12 and the last one, stays in registers over a block of K.

#pragma once

#include "vectors.hpp"

namespace iada {
namespace {

constexpr int64_t kTileRows = 6;
constexpr int64_t kDepth = 256;  // rows of B in a block: with two vectors each, half a level-1 cache

template <class T, int M, int V>
inline void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b,
                 int64_t b_row, T* c, int64_t c_row, bool add) {
  Vector<T> acc[M][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vector<T> x = splat(a[m * a_row]);
      for (int v = 0; v < V; ++v) acc[m][v] += x * row[v];
    }
    a += a_column;
    b += b_row;
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      T* to = c + m * c_row + v * kLanes<T>;
      if (add) acc[m][v] += load(to);
      store(to, acc[m][v]);
    }
  }
}

// `rows` from 1 to M.
template <class T, int M, int V>
inline void tile_of(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
                    const T* b, int64_t b_row, T* c, int64_t c_row, bool add) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<T, M - 1, V>(rows, depth, a, a_row, a_column, b, b_row, c, c_row, add);
  }
  tile<T, M, V>(depth, a, a_row, a_column, b, b_row, c, c_row, add);
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

// V vectors of columns, in tiles of up to M rows; what `fetch` asks for comes while they are multiplied.
template <class T, int M, int V>
inline void tiles(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
                  const T* b, int64_t b_row, T* c, int64_t c_row, bool add, Fetch<T>& fetch) {
  const int64_t count = (rows + M - 1) / M;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t begin = rows * t / count, end = rows * (t + 1) / count;
    tile_of<T, M, V>(end - begin, depth, a + begin * a_row, a_row, a_column, b, b_row,
                     c + begin * c_row, c_row, add);
    fetch();
  }
}

template <class T>
inline void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row,
                    int64_t a_column, const T* b, int64_t b_row, T* c, int64_t c_row, bool add,
                    Fetch<T> fetch = {}) {
  for (int64_t k = 0; k < larger(depth, 1); k += kDepth) {
    const int64_t deep = smaller(kDepth, depth - k);
    for (int64_t n = 0; n < columns; n += kTileColumns<T>) {
      const auto column = columns - n > kLanes<T> ? tiles<T, kTileRows, 2> : tiles<T, 2 * kTileRows, 1>;
      column(rows, deep, a + k * a_column, a_row, a_column, b + k * b_row + n, b_row, c + n, c_row,
             add || k > 0, fetch);
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
