// What passes over rows of logits share: the head in the layout of its products, and softmax.
//
// Rows of logits are padded to whole tiles. Columns past C have logits −∞, so that they get no
// probability, and zeros elsewhere.

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
  Buffer<T> weight, transposed, bias, prior;
  PackedHead(int64_t classes, int64_t width, const T* w, const T* b, const T* log_prior, T beta)
      : classes_row(padded<T>(classes)),
        width_row(padded<T>(width)),
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

// row ← exp(row − top), its sum returned.
template <class T>
inline T exponentials(const T* row, T top, int64_t count, T* to) {
  Vector<T> total{};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vector<T> e = exponential(load(row + j) - top);
    store(to + j, e);
    total += e;
  }
  return sum<T>(total);
}

// to ← the coefficients of Σ_{j≠y} e^{z_j} (w_j − w_y) in the rows of W.
template <class T>
inline void mixture(const T* logits, int64_t label, int64_t count, T* to) {
  for (int64_t j = 0; j < count; j += kLanes<T>) store(to + j, load(logits + j));
  to[label] = -kInfinity<T>;
  const T total = exponentials(to, row_maximum(to, count), count, to);
  to[label] = -total;
}

}  // namespace
}  // namespace iada
