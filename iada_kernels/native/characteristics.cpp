// The eight characteristics that a batch shows by itself (N, 8). With p = softmax(z):
//
//     0 −log p_y    1 p_y − max_{j≠y} p_j    2 ‖onehot(y) − p‖    3 cos(h, w_y)
//     4 −Σ_j p_j log p_j    5 ‖w_y‖    6 p_y    7 share of y among the k nearest rows by cosine
//
// Scratch: the features once more, each of length 1; of a thread a row of features and two of logits,
// a tile of cosines and the nearest of its rows.

#include "passes.hpp"
#include "product.hpp"
#include "rows.hpp"
#include "threads.hpp"

namespace iada {
namespace {

// Columns 0, 1, 2, 4, 6 from one row of logits, padded with −∞; e is scratch.
template <class T>
void from_logits(const T* logits, int64_t label, int64_t row, T* e, T* columns) {
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
  columns[0] = log_all - (logits[label] - top);
  columns[1] = (own - row_maximum(e, row)) / all;
  columns[2] = static_cast<T>(__builtin_sqrt(static_cast<double>(other * other + square))) / all;
  columns[4] = log_all - sum<T>(energy) / all;
  columns[6] = own / all;
}

template <class T>
inline T length(const T* x, int64_t width) {
  return static_cast<T>(__builtin_sqrt(static_cast<double>(dot(x, x, width))));
}

// Columns 0 to 6, and features of length 1 in panels of one tile's rows: element a of row i lies at
// i / n · A n + a n + i % n.
template <class T>
void rows_by_themselves(const Characteristics<T>& p, T* unit) {
  constexpr int64_t n = kTileColumns<T>;
  const int64_t C = p.num_classes, A = p.width, row = padded<T>(C);
  const double work = double(p.count) * (3 * A + 8 * C);
  const T smallest = static_cast<T>(1e-8), shortest = static_cast<T>(1e-12);  // as in torch
  parallel_pieces<Buffer<T>>((p.count + n - 1) / n, work, 2 * row + A, [&](int64_t piece, T* own) {
    T *logits = own, *e = logits + row, *h = e + row, *panel = unit + piece * A * n;
    for (int64_t j = C; j < row; ++j) logits[j] = -kInfinity<T>;
    for (int64_t i = piece * n; i < (piece + 1) * n; ++i) {
      T* to = panel + i % n;
      if (i >= p.count) {
        for (int64_t a = 0; a < A; ++a) to[a * n] = 0;
        continue;
      }
      T* columns = p.result + i * 8;
      const T* w = p.weight + p.labels[i] * A;
      read_row(p.logits_type, p.logits, i * C, C, logits);
      from_logits(logits, p.labels[i], row, e, columns);
      read_row(p.features_type, p.features, i * A, A, h);
      const T size = length(h, A), norm = length(w, A);
      // Divided by one after the other: the product of two lengths may overflow or vanish.
      columns[3] = dot(h, w, A) / (size > smallest ? size : smallest) /
                 (norm > smallest ? norm : smallest);
      columns[5] = norm;
      const T divisor = size > shortest ? size : shortest;
      for (int64_t a = 0; a < A; ++a) to[a * n] = h[a] / divisor;
    }
  });
}

template <class T>
inline bool any(Integers<T> mask) {
  int64_t parts[sizeof(mask) / 8], bits = 0;
  std::memcpy(parts, &mask, sizeof(mask));
  for (const int64_t part : parts) bits |= part;
  return bits != 0;
}

// The k largest of a row, the largest first, among all but `self`.
template <class T>
struct Nearest {
  T similarity[kMaxNeighbours];
  int64_t row[kMaxNeighbours], k;
  void begin(int64_t neighbours) {
    k = neighbours;
    for (int64_t i = 0; i < k; ++i) {
      similarity[i] = -kInfinity<T>;
      row[i] = -1;
    }
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

// Column 7: cosines of a panel's rows with one panel after the other.
template <class T>
void same_label_fractions(const Characteristics<T>& p, const T* unit) {
  constexpr int64_t n = kTileColumns<T>;
  const int64_t A = p.width, panels = (p.count + n - 1) / n;
  const double work = double(p.count) * p.count * A;
  parallel_pieces<Buffer<T>>(panels, work, n * n, [&](int64_t piece, T* block) {
    Nearest<T> nearest[n];
    const int64_t begin = piece * n, rows = smaller(n, p.count - begin);
    for (int64_t i = 0; i < rows; ++i) nearest[i].begin(p.neighbours);
    for (int64_t panel = 0; panel < panels; ++panel) {
      product<T>(rows, n, A, unit + piece * A * n, 1, n, unit + panel * A * n, n, block, n, false);
      const int64_t columns = smaller(n, p.count - panel * n);
      for (int64_t i = 0; i < rows; ++i) {
        const T* row = block + i * n;
        const Vector<T> least = splat(nearest[i].similarity[p.neighbours - 1]);
        if (!any<T>((load(row) > least) | (load(row + kLanes<T>) > least))) continue;
        for (int64_t j = 0; j < columns; ++j) {
          if (panel * n + j != begin + i) nearest[i].offer(row[j], panel * n + j);
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      int64_t same = 0;
      for (int64_t k = 0; k < p.neighbours; ++k) {
        const int64_t row = nearest[i].row[k];
        same += row >= 0 && p.labels[row] == p.labels[begin + i];
      }
      p.result[(begin + i) * 8 + 7] = static_cast<T>(same) / static_cast<T>(p.neighbours);
    }
  });
}

template <class T>
void characteristics_of(const Characteristics<T>& p) {
  constexpr int64_t n = kTileColumns<T>;
  Buffer<T> unit((p.count + n - 1) / n * n * p.width);
  rows_by_themselves(p, unit.data);
  if (p.neighbours > 0) return same_label_fractions(p, unit.data);
  for (int64_t i = 0; i < p.count; ++i) p.result[i * 8 + 7] = 0;
}

}  // namespace

namespace IADA_SET {
void characteristics(const Characteristics<float>& p) { characteristics_of(p); }
void characteristics(const Characteristics<double>& p) { characteristics_of(p); }
}  // namespace IADA_SET

}  // namespace iada
