// The fused head: from features to the loss and every gradient, a block of rows at a time.
//
//     z  = h Wᵀ + b            s = sign(Σ_{j≠y} e^{z_j} (w_j − w_y))          T = s Wᵀ
//     z̃  = z + ε T + R[y] + β log π        ℓ = logsumexp(z̃) − z̃_y
//     D_j = softmax(z̃)_j for j ≠ y,  D_y = −Σ_{j≠y} D_j              (times scale and row_scale)
//     ∂L/∂W += Dᵀ (h + ε s)    ∂L/∂b += Σ_i D_i    ∂L/∂ε_i = Σ_j D_ij T_ij    ∂L/∂h = D W
//
// The direction s does not depend on scale: leaving out softmax's divisor and the factor 1 − p_y
// keeps the digits that softmax(z) − onehot(y) loses on a confident sample.
//
// Scratch of a thread: kBlock rows of h, of s (A each) and of three logits (C each). Shared: W padded
// and Wᵀ, and the gradients of at most kPieces pieces of rows, added up in order.

#include "passes.hpp"
#include "product.hpp"
#include "rows.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kBlock = 32;   // rows at a time
constexpr int64_t kPieces = 16;  // pieces of work, each with gradients of W and b of its own

// What a piece of rows adds up: ∂L/∂W (C, padded A), ∂L/∂b (padded C).
template <class T>
struct Sums {
  T *weight, *bias;
  double loss;
};

template <class T>
struct BlockScratch {
  T *features, *sign, *logits, *moved, *adjusted;
  BlockScratch(T* memory, int64_t classes_row, int64_t width_row) {
    features = memory;
    sign = features + kBlock * width_row;
    logits = sign + kBlock * width_row;
    moved = logits + kBlock * classes_row;
    adjusted = moved + kBlock * classes_row;
  }
  static int64_t size(int64_t classes_row, int64_t width_row) {
    return kBlock * (2 * width_row + 3 * classes_row);
  }
};

// Losses of rows of adjusted logits, which become D; `scale` of each row.
template <class T>
void row_losses(T* adjusted, int64_t stride, int64_t rows, int64_t columns, const int64_t* labels,
                const T* scale, double* losses) {
  constexpr int64_t n = kLanes<T>;
  for (int64_t first = 0; first < rows; first += n, adjusted += n * stride) {
    const int64_t count = smaller(n, rows - first);
    T top[n], own[n], own_exponential[n], others[n];
    row_maxima(adjusted, stride, count, columns, top);
    for (int64_t i = 0; i < count; ++i) {
      T* row = adjusted + i * stride;
      T& at_label = row[labels[first + i]];
      own[i] = at_label - top[i];
      exponentials(row, top[i], columns, row);
      own_exponential[i] = at_label;
      at_label = 0;
    }
    row_sums(adjusted, stride, count, columns, others);
    for (int64_t i = 0; i < count; ++i) {
      T* d = adjusted + i * stride;
      const T total = own_exponential[i] + others[i], factor = scale[first + i] / total;
      for (int64_t j = 0; j < columns; j += n) store(d + j, load(d + j) * factor);
      d[labels[first + i]] = -others[i] * factor;
      // log1p keeps what log(1 + others) loses when the label's logit is far above all others.
      losses[first + i] =
          own[i] == 0 ? __builtin_log1p(static_cast<double>(others[i]) / own_exponential[i])
                      : __builtin_log(static_cast<double>(total)) - static_cast<double>(own[i]);
    }
  }
}

template <class T>
void block_of_rows(const Head<T>& p, const PackedHead<T>& packed, int64_t begin, int64_t rows,
                   const BlockScratch<T>& s, Sums<T>& sums) {
  const int64_t C = p.num_classes, A = p.width, c_row = packed.classes_row,
                a_row = packed.width_row, columns = packed.columns;
  const auto row_number = [&](int64_t i) {
    return p.rows == nullptr ? begin + i : p.rows[begin + i];
  };
  for (int64_t i = 0; i < rows; ++i) {
    read_row(p.type, p.features, row_number(i) * A, A, s.features + i * a_row);
    for (int64_t a = A; a < a_row; ++a) s.features[i * a_row + a] = 0;
  }
  product<T>(rows, columns, A, s.features, a_row, 1, packed.transposed.data, c_row, s.logits, c_row, false);
  for (int64_t i = 0; i < rows; ++i) {
    T* z = s.logits + i * c_row;
    for (int64_t j = 0; j < columns; j += kLanes<T>) store(z + j, load(z + j) + load(packed.bias.data + j));
  }
  int64_t labels[kBlock];
  for (int64_t i = 0; i < rows; ++i) labels[i] = p.labels[row_number(i)];
  const bool directed = p.epsilon != nullptr && C > 1;
  if (directed) {
    mixtures(s.logits, c_row, rows, columns, labels, s.moved);
    product<T>(rows, a_row, C, s.moved, c_row, 1, packed.weight.data, a_row, s.sign, a_row, false);
    for (int64_t k = 0; k < rows * a_row; k += kLanes<T>) store(s.sign + k, sign<T>(load(s.sign + k)));
    product<T>(rows, columns, A, s.sign, a_row, 1, packed.transposed.data, c_row, s.moved, c_row, false);
  }
  T scale[kBlock];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row_number(i);
    const T* z = s.logits + i * c_row;
    const T* t = s.moved + i * c_row;
    T* d = s.adjusted + i * c_row;
    const T epsilon = directed ? p.epsilon[row] : T(0);
    const T* table =
        p.table == nullptr ? nullptr : p.table + p.slot[labels[i]] * table_row(p.num_classes);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      Vector<T> v = load(z + j);
      if (directed) v += epsilon * load(t + j);
      if (table != nullptr) v += load(table + j);
      store(d + j, v + load(packed.prior.data + j));
    }
    scale[i] = p.row_scale == nullptr ? p.scale : p.scale * p.row_scale[row];
  }
  double losses[kBlock];
  row_losses(s.adjusted, c_row, rows, columns, labels, scale, losses);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row_number(i);
    const T* t = s.moved + i * c_row;
    const T* d = s.adjusted + i * c_row;
    sums.loss += losses[i];
    if (p.losses != nullptr) p.losses[row] = static_cast<T>(losses[i]);
    if (p.grad_epsilon != nullptr) p.grad_epsilon[row] = directed ? dot(d, t, C) : T(0);
    if (p.residual != nullptr) std::memcpy(p.residual + row * C, d, C * sizeof(T));
  }
  if (p.grad_bias != nullptr) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      Vector<T> total{};
      for (int64_t i = 0; i < rows; ++i) total += load(s.adjusted + i * c_row + j);
      store(sums.bias + j, load(sums.bias + j) + total);
    }
  }
  if (p.grad_weight != nullptr) {
    if (directed) {
      for (int64_t i = 0; i < rows; ++i) {
        const T epsilon = p.epsilon[row_number(i)];
        T* h = s.features + i * a_row;
        for (int64_t a = 0; a < a_row; a += kLanes<T>) {
          store(h + a, load(h + a) + epsilon * load(s.sign + i * a_row + a));
        }
      }
    }
    product<T>(C, a_row, rows, s.adjusted, 1, c_row, s.features, a_row, sums.weight, a_row, true);
  }
}

template <class T>
void head_of(const Head<T>& p) {
  const int64_t C = p.num_classes, A = p.width;
  if (p.count == 0) return;
  const PackedHead<T> packed(C, A, p.weight, p.bias, p.log_prior, p.beta);
  const int64_t c_row = packed.classes_row, a_row = packed.width_row;

  const int64_t blocks = (p.count + kBlock - 1) / kBlock;
  const int64_t pieces = smaller(blocks, kPieces);
  const int64_t sums_size =
      (p.grad_weight != nullptr ? C * a_row : 0) + (p.grad_bias != nullptr ? c_row : 0);
  Buffer<T> sums_memory(pieces * sums_size);
  Buffer<double> losses(pieces);
  const double work = double(p.count) * C * A * (p.epsilon == nullptr ? 2 : 4);
  const int64_t scratch = BlockScratch<T>::size(c_row, a_row);
  parallel_pieces<Buffer<T>>(pieces, work, scratch, [&](int64_t piece, T* own) {
    T* mine = sums_memory.data + piece * sums_size;
    for (int64_t k = 0; k < sums_size; ++k) mine[k] = 0;
    Sums<T> sums{mine, p.grad_weight != nullptr ? mine + C * a_row : mine, 0.0};
    const BlockScratch<T> block(own, c_row, a_row);
    for (int64_t b = blocks * piece / pieces; b < blocks * (piece + 1) / pieces; ++b) {
      const int64_t begin = b * kBlock;
      block_of_rows(p, packed, begin, smaller(kBlock, p.count - begin), block, sums);
    }
    losses.data[piece] = sums.loss;
  });
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const T* mine = sums_memory.data + piece * sums_size;
    *p.loss_sum += losses.data[piece];
    if (p.grad_weight != nullptr) {
      for (int64_t j = 0; j < C; ++j, mine += a_row) {
        for (int64_t a = 0; a < A; ++a) p.grad_weight[j * A + a] += mine[a];
      }
    }
    if (p.grad_bias != nullptr) {
      for (int64_t j = 0; j < C; ++j) p.grad_bias[j] += mine[j];
    }
  }
}

template <class T>
void grad_features_of(const GradFeatures<T>& p) {
  const int64_t C = p.num_classes, A = p.width, a_row = padded<T>(A);
  const bool packs = a_row != A;  // else W itself can be read in whole tiles
  Buffer<T> memory(packs ? C * a_row : 0);
  if (packs) {
    for (int64_t j = 0; j < C; ++j) {
      std::memcpy(memory.data + j * a_row, p.weight + j * A, A * sizeof(T));
      for (int64_t a = A; a < a_row; ++a) memory.data[j * a_row + a] = 0;
    }
  }
  const T* weight = packs ? memory.data : p.weight;
  const int64_t blocks = (p.count + kBlock - 1) / kBlock;
  parallel_pieces<Buffer<T>>(blocks, double(p.count) * C * A, kBlock * (a_row + C),
                             [&](int64_t block, T* own) {
    const int64_t begin = block * kBlock, rows = smaller(kBlock, p.count - begin);
    T* scaled = own + kBlock * a_row;
    for (int64_t i = 0; i < rows; ++i) {
      const T* d = p.residual + (begin + i) * C;
      for (int64_t j = 0; j < C; ++j) scaled[i * C + j] = p.scale * d[j];
    }
    product<T>(rows, a_row, C, scaled, C, 1, weight, a_row, own, a_row, false);
    for (int64_t i = 0; i < rows; ++i) {
      write_row(p.type, p.grad, (begin + i) * A, A, own + i * a_row);
    }
  });
}

}  // namespace

namespace IADA_SET {
void head(const Head<float>& p) { head_of(p); }
void head(const Head<double>& p) { head_of(p); }
void grad_features(const GradFeatures<float>& p) { grad_features_of(p); }
void grad_features(const GradFeatures<double>& p) { grad_features_of(p); }
}  // namespace IADA_SET

}  // namespace iada
