// The class pass: quadratic forms of every class that is present, and what flows back through them.
//
//     R[u, j] = ½ α (w_j − w_c)ᵀ Σ_c (w_j − w_c)                       c = classes[u]
//     Ṙ[u, j] = α (w_j − w_c)ᵀ Σ_c (V_j − V_c)                         along a direction V of W
//     ∂L/∂W  += α Σ_u [ diag(G_u) P_u − e_c G_uᵀ P_u ]                 P_u = (W − 1w_c) Σ_c
//
// Differences are taken before any product, so that nothing cancels. A quadratic form sees the
// symmetric part of Σ_c only, so must its derivative: P_u stands for (W − 1w_c)(Σ_c + Σ_cᵀ)/2.
//
// With `rounded`, products with many rows of W are of operands rounded to bfloat16, where the
// processor has them; differences and forms are not.
//
// Scratch of a thread: kRows rows of differences (A), a panel of Σ_c (A × one tile), one block of P,
// rounded ones in half as much again; with up to kFewRows classes, P once for each kColumns rows of Σ_c.

#include "passes.hpp"
#include "product.hpp"
#include "rounded_product.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kRows = 128;     // rows of W at a time
constexpr int64_t kColumns = 128;  // columns of Σ at a time: one piece of work
constexpr int64_t kAhead = 16;     // rows of Σ asked for ahead of time
constexpr int64_t kFewRows = 3;    // up to here Σ is read along its rows, as dot products

template <class T>
inline void difference(const T* row, const T* own, int64_t width, T* to) {
  int64_t a = 0;
  for (; a + kLanes<T> <= width; a += kLanes<T>) store(to + a, load(row + a) - load(own + a));
  for (; a < width; ++a) to[a] = row[a] - own[a];
}

// The same in a row of whole tiles.
template <class T>
inline void padded_difference(const T* row, const T* own, int64_t width, T* to) {
  difference(row, own, width, to);
  for (int64_t a = width; a < padded<T>(width); ++a) to[a] = 0;
}

template <class T>
inline T tile_dot(const T* x, const T* y) {
  return sum<T>(load(x) * load(y) + load(x + kLanes<T>) * load(y + kLanes<T>));
}

inline int64_t column_pieces(int64_t width) { return (width + kColumns - 1) / kColumns; }

// panel (A, one tile) ← columns of Σ, zeros where the tile is wider than Σ.
template <class T>
void copy_panel(const T* sigma, int64_t width, int64_t n, int64_t columns, T* panel) {
  constexpr int64_t tile_columns = kTileColumns<T>;
  for (int64_t k = 0; k < width; ++k) {
    const T* from = sigma + k * width + n;
    T* to = panel + k * tile_columns;
    // Steps of a row are more than the processor foresees.
    if (k + kAhead < width) __builtin_prefetch(from + kAhead * width);
    if (columns == tile_columns) {
      store(to, load(from));
      store(to + kLanes<T>, load(from + kLanes<T>));
      continue;
    }
    for (int64_t i = 0; i < columns; ++i) to[i] = from[i];
    for (int64_t i = columns; i < tile_columns; ++i) to[i] = 0;
  }
}

// The same of (Σ + Σᵀ)/2.
template <class T>
void symmetric_panel(const T* sigma, int64_t width, int64_t n, int64_t columns, T* panel) {
  constexpr int64_t tile_columns = kTileColumns<T>, lanes = kLanes<T>;
  copy_panel(sigma, width, n, columns, panel);
  const Vector<T> half = splat(T(0.5));
  for (int64_t k = 0; k < width; k += lanes) {
    if (columns == tile_columns && k + lanes <= width) {
      for (int64_t i = 0; i < tile_columns; i += lanes) {
        Vector<T> rows[lanes];
        for (int64_t l = 0; l < lanes; ++l) rows[l] = load(sigma + (n + i + l) * width + k);
        transpose<T, lanes / 2>(rows);
        for (int64_t l = 0; l < lanes; ++l) {
          T* to = panel + (k + l) * tile_columns + i;
          store(to, half * (load(to) + rows[l]));
        }
      }
      continue;
    }
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t l = k; l < smaller(k + lanes, width); ++l) {
        T& to = panel[l * tile_columns + i];
        to = T(0.5) * (to + sigma[(n + i) * width + l]);
      }
    }
  }
}

template <class T>
bool rounds([[maybe_unused]] const ClassPass<T>& p) {
  if constexpr (kRounds<T>) return p.rounded && processor_rounds();
  return false;
}

// One piece of columns [begin, end) of Σ_c with many rows of W: tiles of products.
template <class T>
void piece_of_products(const ClassPass<T>& p, int64_t u, int64_t begin, int64_t end, T* partial,
                       T* tangent, T* scratch) {
  constexpr int64_t tile_columns = kTileColumns<T>;
  const int64_t width = p.width, c = p.classes[u], width_padded = padded<T>(width);
  const T* own = p.weight + c * width;
  const T* sigma = p.covariance + c * width * width;
  T* delta = scratch;
  T* panel = delta + kRows * width_padded;
  T* block = panel + width * tile_columns;
  T* moved = block + kRows * tile_columns;
  [[maybe_unused]] uint32_t *rounded_delta = nullptr, *rounded_panel = nullptr;
  [[maybe_unused]] const int64_t pairs = width_padded / 2;
  if constexpr (kRounds<T>) {
    if (rounds(p)) {
      rounded_delta = reinterpret_cast<uint32_t*>(moved + (p.tangent == nullptr ? 0 : kRows * width_padded));
      rounded_panel = rounded_delta + kRows * pairs;
    }
  }
  const bool symmetric = p.product != nullptr || p.tangent != nullptr;
  for (int64_t j0 = 0; j0 < p.num_classes; j0 += kRows) {
    const int64_t rows = smaller(kRows, p.num_classes - j0);
    for (int64_t j = 0; j < rows; ++j) {
      padded_difference(p.weight + (j0 + j) * width, own, width, delta + j * width_padded);
      if constexpr (kRounds<T>) {
        if (rounded_delta != nullptr) {
          round_row(delta + j * width_padded, width_padded, rounded_delta + j * pairs);
        }
      }
      if (p.tangent == nullptr) continue;
      padded_difference(p.weight_tangent + (j0 + j) * width, p.weight_tangent + c * width, width,
                        moved + j * width_padded);
    }
    for (int64_t n = begin; n < end; n += tile_columns) {
      const int64_t columns = smaller(tile_columns, end - n);
      const T* source = sigma + n;
      int64_t stride = width;
      // Copied where both halves are wanted; for odd columns; or for too many pages to walk again.
      if (symmetric || columns < tile_columns || width > 192) {
        (symmetric ? symmetric_panel<T> : copy_panel<T>)(sigma, width, n, columns, panel);
        source = panel;
        stride = tile_columns;
      }
      Fetch<T> fetch{};  // as many numbers of the next Σ as are read of this one
      if (p.next != nullptr && j0 == 0) {
        const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((width + kDepth - 1) / kDepth);
        const T* from = p.next + n * width;
        fetch = {from, from + columns * width, (columns * width + tiles - 1) / tiles};
      }
      if (rounded_delta == nullptr) {
        product<T>(rows, tile_columns, width, delta, width_padded, 1, source, stride, block,
                   tile_columns, false, fetch);
      } else if constexpr (kRounds<T>) {
        round_panel(source, stride, width, rounded_panel);
        rounded_product(rows, width, rounded_delta, pairs, rounded_panel, block, fetch);
      }
      for (int64_t j = 0; j < rows; ++j) {
        const T* made = block + j * tile_columns;
        partial[j0 + j] += tile_dot(made, delta + j * width_padded + n);
        if (p.tangent != nullptr) tangent[j0 + j] += tile_dot(made, moved + j * width_padded + n);
        if (p.product != nullptr) {
          T* to = p.product + (u * p.num_classes + j0 + j) * width + n;
          if (columns == tile_columns) {
            store(to, load(made));
            store(to + kLanes<T>, load(made + kLanes<T>));
            continue;
          }
          for (int64_t i = 0; i < columns; ++i) to[i] = made[i];
        }
      }
    }
  }
}

// The same with few rows of W: a piece is the rows [begin, end) of Σ_c, read once, for dot products
// with the differences and, where P is wanted, for their part of (W − 1w_c) Σ_c in all columns,
// which goes to `partial_products` (C, A).
template <class T>
void piece_of_dots(const ClassPass<T>& p, int64_t u, int64_t begin, int64_t end, T* partial,
                   T* tangent, T* partial_products, T* scratch) {
  const int64_t width = p.width, c = p.classes[u];
  const T* sigma = p.covariance + c * width * width;
  T* moved = scratch + p.num_classes * width;
  for (int64_t j = 0; j < p.num_classes; ++j) {
    difference(p.weight + j * width, p.weight + c * width, width, scratch + j * width);
    if (p.tangent != nullptr) {
      difference(p.weight_tangent + j * width, p.weight_tangent + c * width, width,
                 moved + j * width);
    }
    if (partial_products == nullptr) continue;
    for (int64_t k = 0; k < width; ++k) partial_products[j * width + k] = 0;
  }
  for (int64_t a = begin; a < end; ++a) {
    const T* row = sigma + a * width;
    for (int64_t j = 0; j < p.num_classes; ++j) {
      if (j == c) continue;
      const T* delta = scratch + j * width;
      const T made = dot(row, delta, width);
      partial[j] += made * delta[a];
      if (p.tangent != nullptr) {  // of the symmetric part: both orders, halved
        const T* eta = moved + j * width;
        tangent[j] += (made * eta[a] + dot(row, eta, width) * delta[a]) / 2;
      }
      if (partial_products == nullptr) continue;
      T* row_product = partial_products + j * width;
      const T x = delta[a] / 2;
      for (int64_t k = 0; k < width; ++k) row_product[k] += x * row[k];
      row_product[a] += made / 2;
    }
  }
}

// One row of a table from the sums of its pieces, in their order; 0 for the class itself.
template <class T>
void add_pieces(const T* partial, int64_t pieces, int64_t row, T factor, int64_t own, T* table) {
  for (int64_t j = 0; j < row; ++j) {
    T total = 0;
    for (int64_t k = 0; k < pieces; ++k) total += partial[k * row + j];
    table[j] = total * factor;
  }
  table[own] = 0;
}

template <class T>
void full_table(const ClassPass<T>& p) {
  const int64_t pieces = column_pieces(p.width), row = table_row(p.num_classes);
  const double work = double(p.present) * p.num_classes * p.width * p.width;
  const bool dots = p.num_classes <= kFewRows;
  const int64_t sides = p.tangent == nullptr ? 1 : 2;
  const int64_t tiles = (sides * kRows + kTileColumns<T>) * padded<T>(p.width) + kRows * kTileColumns<T>;
  const int64_t rounded = rounds(p) ? (kRows + kTileColumns<T>) * padded<T>(p.width) / 2 : 0;
  const int64_t scratch = dots ? sides * kFewRows * p.width : tiles + rounded;
  Buffer<T> partial(p.present * pieces * row), tangents(sides == 2 ? p.present * pieces * row : 0);
  const int64_t product_size = p.num_classes * p.width;
  Buffer<T> partial_products(dots && p.product != nullptr ? p.present * pieces * product_size : 0);
  parallel_pieces<Buffer<T>>(p.present * pieces, work, scratch, [&](int64_t piece, T* own) {
    const int64_t u = piece / pieces, begin = piece % pieces * kColumns;
    T* sums = partial.data + piece * row;
    T* moves = p.tangent == nullptr ? nullptr : tangents.data + piece * row;
    for (int64_t j = 0; j < row; ++j) sums[j] = 0;
    for (int64_t j = 0; moves != nullptr && j < row; ++j) moves[j] = 0;
    const int64_t end = smaller(begin + kColumns, p.width);
    if (dots) {
      T* piece_products = partial_products.data == nullptr ? nullptr : partial_products.data + piece * product_size;
      piece_of_dots(p, u, begin, end, sums, moves, piece_products, own);
    } else {
      piece_of_products(p, u, begin, end, sums, moves, own);
    }
  });
  for (int64_t u = 0; u < p.present; ++u) {
    const T* own = partial.data + u * pieces * row;
    add_pieces(own, pieces, row, p.alpha / 2, p.classes[u], p.table + u * row);
    if (p.tangent != nullptr) {
      own = tangents.data + u * pieces * row;
      add_pieces(own, pieces, row, p.alpha, p.classes[u], p.tangent + u * row);
    }
    if (partial_products.data == nullptr) continue;
    for (int64_t k = 0; k < product_size; ++k) {
      T total = 0;
      for (int64_t i = 0; i < pieces; ++i) total += partial_products.data[(u * pieces + i) * product_size + k];
      p.product[u * product_size + k] = total;
    }
  }
}

// Σ_a σ_a (x_a − x0_a) (y_a − y0_a).
template <class T>
inline T weighted_dot(const T* x, const T* x0, const T* y, const T* y0, const T* sigma,
                      int64_t width) {
  Vector<T> s0{}, s1{};
  int64_t a = 0;
  for (; a + 2 * kLanes<T> <= width; a += 2 * kLanes<T>) {
    const int64_t b = a + kLanes<T>;
    s0 += (load(x + a) - load(x0 + a)) * (load(y + a) - load(y0 + a)) * load(sigma + a);
    s1 += (load(x + b) - load(x0 + b)) * (load(y + b) - load(y0 + b)) * load(sigma + b);
  }
  T total = sum<T>(s0 + s1);
  for (; a < width; ++a) total += (x[a] - x0[a]) * (y[a] - y0[a]) * sigma[a];
  return total;
}

template <class T>
void diagonal_table(const ClassPass<T>& p) {
  const int64_t width = p.width, row = table_row(p.num_classes);
  const double work = 2.0 * p.present * p.num_classes * width;
  parallel_pieces<Buffer<T>>(p.present, work, 0, [&](int64_t u, T*) {
    const int64_t c = p.classes[u];
    const T *own = p.weight + c * width, *sigma = p.covariance + c * width;
    T* table = p.table + u * row;
    T* tangent = p.tangent == nullptr ? nullptr : p.tangent + u * row;
    for (int64_t j = 0; j < p.num_classes; ++j) {
      table[j] = p.alpha / 2 * weighted_dot(p.weight + j * width, own, p.weight + j * width, own,
                                            sigma, width);
      if (p.tangent == nullptr) continue;
      tangent[j] = p.alpha * weighted_dot(p.weight + j * width, own, p.weight_tangent + j * width,
                                          p.weight_tangent + c * width, sigma, width);
    }
    for (int64_t j = p.num_classes; j < row; ++j) {
      table[j] = 0;
      if (p.tangent != nullptr) tangent[j] = 0;
    }
  });
}

// A piece is a range of columns, which no other piece writes; classes are added in their order.
template <class T>
void weight_through_table(const TableBackward<T>& p) {
  constexpr int64_t columns = 128;
  const int64_t width = p.width, row = table_row(p.num_classes);
  const double work = 2.0 * p.present * p.num_classes * width;
  parallel_pieces<Buffer<T>>((width + columns - 1) / columns, work, columns,
                             [&](int64_t piece, T* own) {
    const int64_t begin = piece * columns, size = smaller(columns, width - begin);
    for (int64_t u = 0; u < p.present; ++u) {
      const int64_t c = p.classes[u];
      const T* w_c = p.weight + c * width + begin;
      const T* sigma = p.covariance == nullptr ? nullptr : p.covariance + c * width + begin;
      for (int64_t i = 0; i < size; ++i) own[i] = 0;
      for (int64_t j = 0; j < p.num_classes; ++j) {
        const T g = p.alpha * p.grad_table[u * row + j];
        T* to = p.grad_weight + j * width + begin;
        if (j == c || g == 0) continue;
        if (sigma == nullptr) {
          const T* made = p.product + (u * p.num_classes + j) * width + begin;
          for (int64_t i = 0; i < size; ++i) {
            const T x = g * made[i];
            to[i] += x;
            own[i] += x;
          }
        } else {
          const T* w_j = p.weight + j * width + begin;
          for (int64_t i = 0; i < size; ++i) {
            const T x = g * sigma[i] * (w_j[i] - w_c[i]);
            to[i] += x;
            own[i] += x;
          }
        }
      }
      T* to = p.grad_weight + c * width + begin;
      for (int64_t i = 0; i < size; ++i) to[i] -= own[i];
    }
  });
}

template <class T>
void sums_of_classes(const ClassSums<T>& p) {
  const int64_t row = table_row(p.num_classes);
  const double work = double(p.rows.begins[p.rows.present] - p.rows.begins[0]) * p.num_classes;
  parallel_pieces<Buffer<T>>(p.rows.present, work, 0, [&](int64_t u, T*) {
    T* total = p.sums + u * row;
    for (int64_t j = 0; j < row; ++j) total[j] = 0;
    for (int64_t k = p.rows.begins[u]; k < p.rows.begins[u + 1]; ++k) {
      const T* d = p.residual + p.rows.order[k] * p.num_classes;
      for (int64_t j = 0; j < p.num_classes; ++j) total[j] += d[j];
    }
    for (int64_t j = 0; j < p.num_classes; ++j) total[j] *= p.scale;
  });
}

}  // namespace

namespace IADA_SET {
void class_pass(const ClassPass<float>& p) { p.full ? full_table(p) : diagonal_table(p); }
void class_pass(const ClassPass<double>& p) { p.full ? full_table(p) : diagonal_table(p); }
void table_backward(const TableBackward<float>& p) { weight_through_table(p); }
void table_backward(const TableBackward<double>& p) { weight_through_table(p); }
void class_sums(const ClassSums<float>& p) { sums_of_classes(p); }
void class_sums(const ClassSums<double>& p) { sums_of_classes(p); }
}  // namespace IADA_SET

}  // namespace iada
