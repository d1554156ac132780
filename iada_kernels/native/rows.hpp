// What passes over rows of logits share: the head in the layout of its products, and softmax.
//
// Rows of logits are padded to whole tiles, and read in whole vectors. Columns past C that are read
// have logits −∞, so that they get no probability, and zeros elsewhere.

#pragma once

#include "threads.hpp"
#include "vectors.hpp"

namespace iada {
namespace {

// W with rows padded to `row`, zeros after its A elements.
template <class T>
inline void pad_rows(const T* from, int64_t rows, int64_t width, int64_t row, T* to) {
  for (int64_t j = 0; j < rows; ++j, to += row) {
    std::memcpy(to, from + j * width, width * sizeof(T));
    for (int64_t a = width; a < row; ++a) to[a] = 0;
  }
}

// Wᵀ (A, row), zeros after its C columns.
template <class T>
inline void transpose_padded(const T* weight, int64_t classes, int64_t width, int64_t row, T* to) {
  for (int64_t a = 0; a < width; ++a, to += row) {
    for (int64_t j = 0; j < classes; ++j) to[j] = weight[j * width + a];
    for (int64_t j = classes; j < row; ++j) to[j] = 0;
  }
}

// W (C, padded A), Wᵀ (A, padded C), and by column of the logits b and β log π.
template <class T>
struct PackedHead {
  int64_t classes_row, width_row;  // padded C and A
  int64_t columns;                 // of a row of logits that are read: C in whole vectors
  Buffer<T> weight, transposed, bias, prior;
  PackedHead(int64_t classes, int64_t width, const T* w, const T* b, const T* log_prior, T beta)
      : classes_row(padded<T>(classes)),
        width_row(padded<T>(width)),
        columns(whole_vectors<T>(classes)),
        weight(classes * width_row),
        transposed(width * classes_row),
        bias(classes_row),
        prior(classes_row) {
    pad_rows(w, classes, width, width_row, weight.data);
    transpose_padded(w, classes, width, classes_row, transposed.data);
    for (int64_t j = 0; j < classes_row; ++j) {
      bias.data[j] = j >= classes ? -kInfinity<T> : b == nullptr ? T(0) : b[j];
      prior.data[j] = j >= classes || log_prior == nullptr ? T(0) : beta * log_prior[j];
    }
  }
};

template <class T>
inline T row_maximum(const T* row, int64_t count) {
  Vector<T> best = load(row);
  for (int64_t j = kLanes<T>; j < count; j += kLanes<T>) {
    const Vector<T> v = load(row + j);
    best = choose<T>(v > best, v, best);
  }
  return largest<T>(best);
}

// to ← exp(row − top).
template <class T>
inline void exponentials(const T* row, T top, int64_t columns, T* to) {
  for (int64_t j = 0; j < columns; j += kLanes<T>) store(to + j, exponential(load(row + j) - top));
}

// Below as many rows as a vector has lanes are taken together, `stride` apart: what they add up or
// compare over their lanes is then done for all of them at once, in the same order as for one, and no
// row waits for the end of the one before it.

// The maximum of each of `count` rows, to kLanes numbers.
template <class T>
inline void row_maxima(const T* rows, int64_t stride, int64_t count, int64_t columns, T* to) {
  Vector<T> best[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i, rows += stride) {
    best[i] = load(rows);
    for (int64_t j = kLanes<T>; j < columns; j += kLanes<T>) {
      const Vector<T> v = load(rows + j);
      best[i] = choose<T>(v > best[i], v, best[i]);
    }
  }
  transpose<T, kLanes<T> / 2>(best);
  Vector<T> top = best[0];
  for (int64_t k = 1; k < kLanes<T>; ++k) {
    top = choose<T>((best[k] > top) | (best[k] != best[k]), best[k], top);
  }
  store(to, top);
}

// The sum of each of `count` rows, to kLanes numbers.
template <class T>
inline void row_sums(const T* rows, int64_t stride, int64_t count, int64_t columns, T* to) {
  Vector<T> total[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i, rows += stride) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) total[i] += load(rows + j);
  }
  transpose<T, kLanes<T> / 2>(total);
  Vector<T> all{};
  for (int64_t k = 0; k < kLanes<T>; ++k) all += total[k];
  store(to, all);
}

// to ← the coefficients of Σ_{j≠y} e^{z_j} (w_j − w_y) in the rows of W, for any number of rows.
template <class T>
inline void mixtures(const T* logits, int64_t stride, int64_t rows, int64_t columns,
                     const int64_t* labels, T* to) {
  constexpr int64_t n = kLanes<T>;
  for (; rows > 0; rows -= n, logits += n * stride, labels += n, to += n * stride) {
    const int64_t count = smaller(n, rows);
    T top[n], total[n];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i * stride;
      for (int64_t j = 0; j < columns; j += n) store(to + row + j, load(logits + row + j));
      to[row + labels[i]] = -kInfinity<T>;
    }
    row_maxima(to, stride, count, columns, top);
    for (int64_t i = 0; i < count; ++i) {
      exponentials(to + i * stride, top[i], columns, to + i * stride);
    }
    row_sums(to, stride, count, columns, total);
    for (int64_t i = 0; i < count; ++i) to[i * stride + labels[i]] = -total[i];
  }
}

}  // namespace
}  // namespace iada
