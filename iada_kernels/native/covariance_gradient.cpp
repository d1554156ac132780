// Gradients by Σ, and steps along them. With differences δ_j = w_j − w_c, η_j = V_j − V_c,
//
//     ∂L/∂Σ_c = ½ α Σ_j G_j δ_j δ_jᵀ
//     ∂L̇/∂Σ_c = α Σ_j [ D_j sym(δ_j η_jᵀ) + ½ c_j δ_j δ_jᵀ ] = sym(Σ_j δ_j m_jᵀ),
//     m_j = α (D_j η_j + ½ c_j δ_j)
//
// Both are symmetric: tiles on and above the diagonal are computed, the others are their mirror
// image. Scratch of a thread: two matrices (C, A) and a tile.

#include "passes.hpp"
#include "product.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kLines = 64;  // rows of Σ of half a piece

// Rows w_j − w_c, padded with zeros to whole tiles.
template <class T>
void differences(const T* matrix, int64_t c, int64_t rows, int64_t width, int64_t stride, T* to) {
  const T* own = matrix + c * width;
  for (int64_t j = 0; j < rows; ++j, to += stride) {
    for (int64_t a = 0; a < width; ++a) to[a] = matrix[j * width + a] - own[a];
    for (int64_t a = width; a < stride; ++a) to[a] = 0;
  }
}

// put(a, b, x) for each element on and above the diagonal of sym(leftᵀ right) or, where that is
// symmetric by itself, of leftᵀ right; rows of tiles [begin, end).
template <class T, class Put>
void upper_half(int64_t depth, int64_t width, int64_t stride, const T* left, const T* right,
                bool symmetric, int64_t begin, int64_t end, T* block, const Put& put) {
  constexpr int64_t n = kTileColumns<T>;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t k = i; k * n < width; ++k) {
      product<T>(n, n, depth, left + i * n, 1, stride, right + k * n, stride, block, n, false);
      if (!symmetric) {
        product<T>(n, n, depth, right + i * n, 1, stride, left + k * n, stride, block, n, true);
      }
      const int64_t rows = smaller(n, width - i * n), columns = smaller(n, width - k * n);
      const T factor = symmetric ? T(1) : T(0.5);
      for (int64_t a = 0; a < rows; ++a) {
        for (int64_t b = i == k ? a : 0; b < columns; ++b) {
          put(i * n + a, k * n + b, factor * block[a * n + b]);
        }
      }
    }
  }
}

// Calls f(u, b0, e0, b1, e1, scratch): class u, rows of tiles [b0, e0) and [b1, e1). A piece is a long
// and a short group of rows of the upper half: all cost the same.
template <class T, class F>
void pieces_of_upper_halves(int64_t present, int64_t depth, int64_t width, const F& f) {
  constexpr int64_t n = kTileColumns<T>, tiles = kLines / n > 0 ? kLines / n : 1;
  const int64_t stride = padded<T>(width), rows = stride / n;
  const int64_t groups = (rows + tiles - 1) / tiles, pairs = (groups + 1) / 2;
  const double work = double(present) * depth * width * width;
  parallel_pieces<Buffer<T>>(present * pairs, work, 2 * depth * stride + n * n,
                             [&](int64_t piece, T* scratch) {
    const int64_t u = piece / pairs, pair = piece % pairs, other = groups - 1 - pair;
    f(u, pair * tiles, smaller(rows, (pair + 1) * tiles), other * tiles,
      other == pair ? other * tiles : smaller(rows, (other + 1) * tiles), scratch);
  });
}

template <class T>
void full_gradient(const GradCovariance<T>& p) {
  const int64_t width = p.width, row = table_row(p.num_classes), stride = padded<T>(width);
  pieces_of_upper_halves<T>(p.present, p.num_classes, width,
                            [&](int64_t u, int64_t b0, int64_t e0, int64_t b1, int64_t e1, T* own) {
    T *delta = own, *scaled = delta + p.num_classes * stride;
    T* block = scaled + p.num_classes * stride;
    const int64_t c = p.classes[u];
    differences(p.weight, c, p.num_classes, width, stride, delta);
    for (int64_t j = 0; j < p.num_classes; ++j) {
      const T g = p.alpha / 2 * p.grad_table[u * row + j];
      for (int64_t a = 0; a < stride; ++a) scaled[j * stride + a] = g * delta[j * stride + a];
    }
    T* grad = p.grad + c * width * width;
    const auto put = [grad, width](int64_t a, int64_t b, T x) {
      grad[a * width + b] = x;
      grad[b * width + a] = x;
    };
    upper_half(p.num_classes, width, stride, scaled, delta, true, b0, e0, block, put);
    upper_half(p.num_classes, width, stride, scaled, delta, true, b1, e1, block, put);
  });
}

template <class T>
void full_step(const CovarianceStep<T>& p) {
  const int64_t width = p.width, row = table_row(p.num_classes), stride = padded<T>(width);
  pieces_of_upper_halves<T>(p.present, p.num_classes, width,
                            [&](int64_t u, int64_t b0, int64_t e0, int64_t b1, int64_t e1, T* own) {
    T *delta = own, *moved = delta + p.num_classes * stride;
    T* block = moved + p.num_classes * stride;
    const int64_t c = p.classes[u];
    differences(p.weight, c, p.num_classes, width, stride, delta);
    differences(p.weight_tangent, c, p.num_classes, width, stride, moved);
    for (int64_t j = 0; j < p.num_classes; ++j) {
      const T d = p.scale * p.residual[u * row + j], half = p.scale * p.curvature[u * row + j] / 2;
      T* m = moved + j * stride;
      for (int64_t a = 0; a < stride; ++a) m[a] = d * m[a] + half * delta[j * stride + a];
    }
    T* sigma = p.covariance + c * width * width;
    const auto put = [sigma, width](int64_t a, int64_t b, T x) {
      sigma[a * width + b] += x;
      if (a != b) sigma[b * width + a] += x;
    };
    upper_half(p.num_classes, width, stride, delta, moved, false, b0, e0, block, put);
    upper_half(p.num_classes, width, stride, delta, moved, false, b1, e1, block, put);
  });
}

template <class T>
void diagonal_gradient(const GradCovariance<T>& p) {
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
void diagonal_step(const CovarianceStep<T>& p) {
  const int64_t width = p.width, row = table_row(p.num_classes);
  const double work = 4.0 * p.present * p.num_classes * width;
  parallel_pieces<Buffer<T>>(p.present, work, width, [&](int64_t u, T* grad) {
    const int64_t c = p.classes[u];
    const T *w_c = p.weight + c * width, *v_c = p.weight_tangent + c * width;
    for (int64_t a = 0; a < width; ++a) grad[a] = 0;
    for (int64_t j = 0; j < p.num_classes; ++j) {
      const T d = p.scale * p.residual[u * row + j], half = p.scale * p.curvature[u * row + j] / 2;
      const T *w_j = p.weight + j * width, *v_j = p.weight_tangent + j * width;
      for (int64_t a = 0; a < width; ++a) {
        const T delta = w_j[a] - w_c[a];
        grad[a] += delta * (d * (v_j[a] - v_c[a]) + half * delta);
      }
    }
    T* sigma = p.covariance + c * width;
    for (int64_t a = 0; a < width; ++a) sigma[a] += grad[a];
  });
}

}  // namespace

namespace IADA_SET {
void grad_covariance(const GradCovariance<float>& p) {
  p.full ? full_gradient(p) : diagonal_gradient(p);
}
void grad_covariance(const GradCovariance<double>& p) {
  p.full ? full_gradient(p) : diagonal_gradient(p);
}
void covariance_step(const CovarianceStep<float>& p) { p.full ? full_step(p) : diagonal_step(p); }
void covariance_step(const CovarianceStep<double>& p) { p.full ? full_step(p) : diagonal_step(p); }
}  // namespace IADA_SET

}  // namespace iada
