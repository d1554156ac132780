// The class pass: quadratic forms of every class that is present, and what flows back through them.
//
//     R[u, j] = ½ α (w_j − w_c)ᵀ Σ_c (w_j − w_c)                       c = classes[u]
//     ∂L/∂W  += α Σ_u [ diag(G_u) P_u − e_c G_uᵀ P_u ]                 P_u = (W − 1w_c) Σ_c
//     ∂L/∂Σ_c = ½ α (W − 1w_c)ᵀ diag(G_u) (W − 1w_c)
//
// Differences are taken before any product, so that nothing cancels. A quadratic form sees the
// symmetric part of Σ_c only, so must its derivative: P_u stands for (W − 1w_c)(Σ_c + Σ_cᵀ)/2.
//
// Scratch of a thread: kRows rows of differences (A), a panel of Σ_c (A × one tile), one block of P;
// with up to kFewRows classes, P once for each kColumns rows of Σ_c.

#include "passes.hpp"
#include "product.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kRows = 128;     // rows of W at a time
constexpr int64_t kColumns = 128;  // columns of Σ at a time: one piece of work
constexpr int64_t kFewRows = 3;    // up to here Σ is read along its rows, as dot products

template <class T>
inline void difference(const T* row, const T* own, int64_t width, T* to) {
  int64_t a = 0;
  for (; a + kLanes<T> <= width; a += kLanes<T>) store(to + a, load(row + a) - load(own + a));
  for (; a < width; ++a) to[a] = row[a] - own[a];
}

inline int64_t column_pieces(int64_t width) { return (width + kColumns - 1) / kColumns; }

// panel (A, one tile) ← columns of Σ, zeros where the tile is wider than Σ.
template <class T>
void copy_panel(const T* sigma, int64_t width, int64_t n, int64_t columns, T* panel) {
  constexpr int64_t tile_columns = kTileColumns<T>;
  for (int64_t k = 0; k < width; ++k) {
    const T* from = sigma + k * width + n;
    T* to = panel + k * tile_columns;
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

// One piece of columns [begin, end) of Σ_c with many rows of W: tiles of products.
template <class T>
void piece_of_products(const ClassPass<T>& p, int64_t u, int64_t begin, int64_t end, T* partial,
                       T* scratch) {
  constexpr int64_t tile_columns = kTileColumns<T>;
  const int64_t width = p.width, c = p.classes[u], width_padded = padded<T>(width);
  const T* own = p.weight + c * width;
  const T* sigma = p.covariance + c * width * width;
  T* delta = scratch;
  T* panel = delta + kRows * width_padded;
  T* block = panel + width * tile_columns;
  for (int64_t j0 = 0; j0 < p.num_classes; j0 += kRows) {
    const int64_t rows = smaller(kRows, p.num_classes - j0);
    for (int64_t j = 0; j < rows; ++j) {
      difference(p.weight + (j0 + j) * width, own, width, delta + j * width_padded);
      for (int64_t a = width; a < width_padded; ++a) delta[j * width_padded + a] = 0;
    }
    for (int64_t n = begin; n < end; n += tile_columns) {
      const int64_t columns = smaller(tile_columns, end - n);
      const T* source = sigma + n;
      int64_t stride = width;
      // Copied where both halves are wanted; for odd columns; or for too many pages to walk again.
      if (p.product != nullptr || columns < tile_columns || width > 192) {
        (p.product != nullptr ? symmetric_panel<T> : copy_panel<T>)(sigma, width, n, columns, panel);
        source = panel;
        stride = tile_columns;
      }
      product<T>(rows, tile_columns, width, delta, width_padded, 1, source, stride, block,
                 tile_columns, false);
      for (int64_t j = 0; j < rows; ++j) {
        const T* made = block + j * tile_columns;
        const T* other = delta + j * width_padded + n;
        const Vector<T> s = load(made) * load(other) +
                            load(made + kLanes<T>) * load(other + kLanes<T>);
        partial[j0 + j] += sum<T>(s);
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
// with the differences and, where P is wanted, for their share of (W − 1w_c) Σ_c in all columns,
// which goes to `shares` (C, A).
template <class T>
void piece_of_dots(const ClassPass<T>& p, int64_t u, int64_t begin, int64_t end, T* partial,
                   T* shares, T* scratch) {
  const int64_t width = p.width, c = p.classes[u];
  const T* sigma = p.covariance + c * width * width;
  for (int64_t j = 0; j < p.num_classes; ++j) {
    difference(p.weight + j * width, p.weight + c * width, width, scratch + j * width);
    if (shares == nullptr) continue;
    for (int64_t k = 0; k < width; ++k) shares[j * width + k] = 0;
  }
  for (int64_t a = begin; a < end; ++a) {
    const T* row = sigma + a * width;
    for (int64_t j = 0; j < p.num_classes; ++j) {
      if (j == c) continue;
      const T* delta = scratch + j * width;
      const T made = dot(row, delta, width);
      partial[j] += made * delta[a];
      if (shares == nullptr) continue;
      T* share = shares + j * width;
      const T x = delta[a] / 2;
      for (int64_t k = 0; k < width; ++k) share[k] += x * row[k];
      share[a] += made / 2;
    }
  }
}

template <class T>
void full_table(const ClassPass<T>& p) {
  const int64_t pieces = column_pieces(p.width), row = table_row(p.num_classes);
  const double work = double(p.present) * p.num_classes * p.width * p.width;
  const bool dots = p.num_classes <= kFewRows;
  const int64_t scratch = dots ? kFewRows * p.width
                               : (kRows + kTileColumns<T>) * padded<T>(p.width) +
                                     kRows * kTileColumns<T>;
  Buffer<T> partial(p.present * pieces * row);
  const int64_t share = p.num_classes * p.width;
  Buffer<T> shares(dots && p.product != nullptr ? p.present * pieces * share : 0);
  parallel_pieces<Buffer<T>>(p.present * pieces, work, scratch, [&](int64_t piece, T* own) {
    const int64_t u = piece / pieces, begin = piece % pieces * kColumns;
    T* sums = partial.data + piece * row;
    for (int64_t j = 0; j < row; ++j) sums[j] = 0;
    const int64_t end = smaller(begin + kColumns, p.width);
    if (dots) {
      T* own_shares = shares.data == nullptr ? nullptr : shares.data + piece * share;
      piece_of_dots(p, u, begin, end, sums, own_shares, own);
    } else {
      piece_of_products(p, u, begin, end, sums, own);
    }
  });
  for (int64_t u = 0; u < p.present; ++u) {
    T* table = p.table + u * row;
    for (int64_t j = 0; j < row; ++j) {
      T total = 0;
      for (int64_t k = 0; k < pieces; ++k) total += partial.data[(u * pieces + k) * row + j];
      table[j] = total * p.alpha / 2;
    }
    table[p.classes[u]] = 0;
    if (shares.data == nullptr) continue;
    for (int64_t k = 0; k < share; ++k) {
      T total = 0;
      for (int64_t i = 0; i < pieces; ++i) total += shares.data[(u * pieces + i) * share + k];
      p.product[u * share + k] = total;
    }
  }
}

// Σ_a σ_a (x_a − y_a)².
template <class T>
inline T weighted_square(const T* x, const T* y, const T* sigma, int64_t width) {
  Vector<T> s0{}, s1{};
  int64_t a = 0;
  for (; a + 2 * kLanes<T> <= width; a += 2 * kLanes<T>) {
    const Vector<T> d0 = load(x + a) - load(y + a);
    const Vector<T> d1 = load(x + a + kLanes<T>) - load(y + a + kLanes<T>);
    s0 += d0 * d0 * load(sigma + a);
    s1 += d1 * d1 * load(sigma + a + kLanes<T>);
  }
  T total = sum<T>(s0 + s1);
  for (; a < width; ++a) total += (x[a] - y[a]) * (x[a] - y[a]) * sigma[a];
  return total;
}

template <class T>
void diagonal_table(const ClassPass<T>& p) {
  const int64_t width = p.width, row = table_row(p.num_classes);
  const double work = 2.0 * p.present * p.num_classes * width;
  parallel_pieces<Buffer<T>>(p.present, work, 0, [&](int64_t u, T*) {
    const int64_t c = p.classes[u];
    T* table = p.table + u * row;
    for (int64_t j = 0; j < p.num_classes; ++j) {
      table[j] = p.alpha / 2 * weighted_square(p.weight + j * width, p.weight + c * width,
                                               p.covariance + c * width, width);
    }
    for (int64_t j = p.num_classes; j < row; ++j) table[j] = 0;
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

// Tiles on and above the diagonal; the other half is their mirror image.
template <class T>
void full_grad_covariance(const GradCovariance<T>& p) {
  constexpr int64_t n = kTileColumns<T>;
  const int64_t width = p.width, row = table_row(p.num_classes), stride = padded<T>(width);
  const int64_t panels = stride / n;
  const double work = double(p.present) * p.num_classes * width * width / 2;
  Buffer<T> deltas(p.present == 0 ? 0 : p.num_classes * stride);
  Buffer<T> scaled(p.present == 0 ? 0 : p.num_classes * stride);
  for (int64_t u = 0; u < p.present; ++u) {
    const int64_t c = p.classes[u];
    for (int64_t j = 0; j < p.num_classes; ++j) {
      T* delta = deltas.data + j * stride;
      const T g = p.alpha / 2 * p.grad_table[u * row + j];
      difference(p.weight + j * width, p.weight + c * width, width, delta);
      for (int64_t a = width; a < stride; ++a) delta[a] = 0;
      for (int64_t a = 0; a < stride; ++a) scaled.data[j * stride + a] = g * delta[a];
    }
    T* grad = p.grad + c * width * width;
    parallel_pieces<Buffer<T>>(panels, work / p.present, n * n, [&](int64_t i, T* block) {
      for (int64_t k = i; k < panels; ++k) {
        product<T>(n, n, p.num_classes, scaled.data + i * n, 1, stride, deltas.data + k * n, stride,
                   block, n, false);
        const int64_t rows = smaller(n, width - i * n), columns = smaller(n, width - k * n);
        for (int64_t a = 0; a < rows; ++a) {
          for (int64_t b = i == k ? a : 0; b < columns; ++b) {
            const T x = block[a * n + b];
            grad[(i * n + a) * width + k * n + b] = x;
            grad[(k * n + b) * width + i * n + a] = x;
          }
        }
      }
    });
  }
}

template <class T>
void diagonal_grad_covariance(const GradCovariance<T>& p) {
  const int64_t width = p.width, row = table_row(p.num_classes);
  const double work = 2.0 * p.present * p.num_classes * width;
  parallel_pieces<Buffer<T>>(p.present, work, 0, [&](int64_t u, T*) {
    const T* w_c = p.weight + p.classes[u] * width;
    T* grad = p.grad + p.classes[u] * width;
    for (int64_t a = 0; a < width; ++a) grad[a] = 0;
    for (int64_t j = 0; j < p.num_classes; ++j) {
      const T g = p.alpha / 2 * p.grad_table[u * row + j];
      const T* w_j = p.weight + j * width;
      for (int64_t a = 0; a < width; ++a) grad[a] += g * (w_j[a] - w_c[a]) * (w_j[a] - w_c[a]);
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
void grad_covariance(const GradCovariance<float>& p) {
  p.full ? full_grad_covariance(p) : diagonal_grad_covariance(p);
}
void grad_covariance(const GradCovariance<double>& p) {
  p.full ? full_grad_covariance(p) : diagonal_grad_covariance(p);
}
void class_sums(const ClassSums<float>& p) { sums_of_classes(p); }
void class_sums(const ClassSums<double>& p) { sums_of_classes(p); }
}  // namespace IADA_SET

}  // namespace iada
