// The eight characteristics that a batch shows by itself (N, 8). With p = softmax(z):
//
//     0 −log p_y    1 p_y − max_{j≠y} p_j    2 ‖onehot(y) − p‖    3 cos(h, w_y)
//     4 −Σ_j p_j log p_j    5 ‖w_y‖    6 p_y    7 share of y among the k nearest rows by cosine
//
// Scratch of a thread: a row of features and two of logits.

#include "passes.hpp"
#include "product.hpp"
#include "rows.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kRows = 16;  // rows of a piece

// Columns 0, 1, 2, 4, 6 from one row of logits, padded with −∞; e is scratch.
template <class T>
void from_logits(const T* logits, int64_t label, int64_t row, T* e, T* found) {
  const T top = row_maximum(logits, row);
  exponentials(logits, top, row, e);
  int64_t best = 0;
  while (logits[best] != top && best + 1 < row) ++best;
  // Without the largest, which is 1: log1p keeps the digits of a confident row.
  e[best] = 0;
  Vector<T> total{}, energy{};
  const Vector<T> zero{};
  for (int64_t j = 0; j < row; j += kLanes<T>) {
    const Vector<T> x = load(e + j);
    total += x;
    energy += choose<T>(x > zero, x * (load(logits + j) - top), zero);
  }
  const T rest = sum<T>(total), all = 1 + rest;
  const T log_all = static_cast<T>(__builtin_log1p(static_cast<double>(rest)));
  e[best] = 1;
  const T own = e[label];
  e[label] = 0;
  Vector<T> others{}, squares{};
  for (int64_t j = 0; j < row; j += kLanes<T>) {
    const Vector<T> x = load(e + j);
    others += x;
    squares += x * x;
  }
  const T other = sum<T>(others), square = sum<T>(squares);
  found[0] = log_all - (logits[label] - top);
  found[1] = (own - row_maximum(e, row)) / all;
  found[2] = static_cast<T>(__builtin_sqrt(static_cast<double>(other * other + square))) / all;
  found[4] = log_all - sum<T>(energy) / all;
  found[6] = own / all;
}

template <class T>
inline T length(const T* x, int64_t width) {
  return static_cast<T>(__builtin_sqrt(static_cast<double>(dot(x, x, width))));
}

template <class T>
void characteristics_of(const RowCharacteristics<T>& p) {
  const int64_t C = p.num_classes, A = p.width, row = padded<T>(C);
  const double work = double(p.count) * (3 * A + 8 * C);
  const int64_t pieces = (p.count + kRows - 1) / kRows;
  const T smallest = static_cast<T>(1e-8), shortest = static_cast<T>(1e-12);  // as in torch
  parallel_pieces<Buffer<T>>(pieces, work, 2 * row + A, [&](int64_t piece, T* own) {
    T *logits = own, *e = logits + row, *h = e + row;
    for (int64_t j = C; j < row; ++j) logits[j] = -kInfinity<T>;
    for (int64_t i = piece * kRows; i < smaller(p.count, (piece + 1) * kRows); ++i) {
      T* found = p.found + i * 8;
      const T* w = p.weight + p.labels[i] * A;
      read_row(p.logits_type, p.logits, i * C, C, logits);
      from_logits(logits, p.labels[i], row, e, found);
      read_row(p.features_type, p.features, i * A, A, h);
      const T size = length(h, A), norm = length(w, A);
      // Each divided by itself: the product of two lengths may overflow or vanish.
      found[3] = dot(h, w, A) / (size > smallest ? size : smallest) /
                 (norm > smallest ? norm : smallest);
      found[5] = norm;
      found[7] = 0;
      const T divisor = size > shortest ? size : shortest;
      for (int64_t a = 0; a < A; ++a) p.unit[i * A + a] = h[a] / divisor;
    }
  });
}

template <class T>
inline bool any(Integers<T> mask) {
  int64_t parts[sizeof(mask) / 8], found = 0;
  std::memcpy(parts, &mask, sizeof(mask));
  for (const int64_t part : parts) found |= part;
  return found != 0;
}

// The k largest of a row, the largest first, among all but `self`.
template <class T>
struct Nearest {
  T similarity[kMaxNeighbours];
  int64_t row[kMaxNeighbours], k;
  explicit Nearest(int64_t neighbours) : k(neighbours) {
    for (int64_t i = 0; i < k; ++i) similarity[i] = -kInfinity<T>, row[i] = -1;
  }
  void offer(T x, int64_t j) {
    if (!(x > similarity[k - 1])) return;
    int64_t at = k - 1;
    for (; at > 0 && x > similarity[at - 1]; --at) {
      similarity[at] = similarity[at - 1];
      row[at] = row[at - 1];
    }
    similarity[at] = x;
    row[at] = j;
  }
};

template <class T>
void shares(const LabelShare<T>& p) {
  const double work = double(p.size) * p.count;
  const int64_t pieces = (p.size + kRows - 1) / kRows;
  parallel_pieces<Buffer<T>>(pieces, work, 0, [&](int64_t piece, T*) {
    for (int64_t i = piece * kRows; i < smaller(p.size, (piece + 1) * kRows); ++i) {
      const T* row = p.similarity + i * p.count;
      const int64_t self = p.begin + i;
      Nearest<T> nearest(p.neighbours);
      const auto offer = [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          if (j != self) nearest.offer(row[j], j);
        }
      };
      int64_t j = 0;
      for (; j + kLanes<T> <= p.count; j += kLanes<T>) {
        if (any<T>(load(row + j) > splat(nearest.similarity[p.neighbours - 1]))) {
          offer(j, j + kLanes<T>);
        }
      }
      offer(j, p.count);
      int64_t same = 0;
      for (int64_t k = 0; k < p.neighbours; ++k) {
        same += nearest.row[k] >= 0 && p.labels[nearest.row[k]] == p.labels[self];
      }
      p.found[self * 8 + 7] = static_cast<T>(same) / static_cast<T>(p.neighbours);
    }
  });
}

}  // namespace

namespace IADA_SET {
void row_characteristics(const RowCharacteristics<float>& p) { characteristics_of(p); }
void row_characteristics(const RowCharacteristics<double>& p) { characteristics_of(p); }
void label_share(const LabelShare<float>& p) { shares(p); }
void label_share(const LabelShare<double>& p) { shares(p); }
}  // namespace IADA_SET

}  // namespace iada
