// The head's second look, for hypergradients: how the loss's derivative along a direction
// (ḣ, V, v_b) depends on ε, and what `covariance_step` needs, a block of rows at a time.
//
//     z̃ = h Wᵀ + b + ε T + R[y] + β log π            T = s Wᵀ,  Ṫ = s Vᵀ
//     ż = ḣ Wᵀ + h Vᵀ + ε Ṫ + v_b + Ṙ[y]
//     D_j = q_j, c_j = q_j (ż_j − ż_y − m) for j ≠ y         q = softmax(z̃),  m = Σ_{j≠y} q_j (ż_j − ż_y)
//     D_y = −Σ_{j≠y} D_j,  c_y = −q_y m                      (times scale)
//     ∂L̇/∂ε_i = Σ_j D_ij Ṫ_ij + c_ij T_ij
//
// Relative to the own class both D and c keep the digits that 1 − q_y loses on a confident sample.
//
// Scratch of a thread: kBlock rows of h and of s (A each) and of four logits (C each). Shared: W
// padded, Wᵀ and Vᵀ.

#include "passes.hpp"
#include "product.hpp"
#include "rows.hpp"
#include "threads.hpp"

namespace iada {
namespace {

constexpr int64_t kBlock = 32;  // rows at a time

// One row: adjusted logits become D, their derivatives c.
template <class T>
void row_tangent(T* logits, T* derivatives, int64_t label, T scale, int64_t count) {
  exponentials(logits, row_maximum(logits, count), count, logits);
  const T own = logits[label], start = derivatives[label];
  logits[label] = 0;
  Vector<T> rest{}, moved{};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vector<T> e = load(logits + j), relative = load(derivatives + j) - start;
    store(derivatives + j, relative);
    rest += e;
    moved += e * relative;
  }
  const T others = sum<T>(rest), total = own + others, mean = sum<T>(moved) / total;
  const T factor = scale / total;
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vector<T> d = load(logits + j) * factor;
    store(derivatives + j, d * (load(derivatives + j) - mean));
    store(logits + j, d);
  }
  logits[label] = -others * factor;
  derivatives[label] = -own * factor * mean;
}

template <class T>
void block_of_rows(const TangentHead<T>& p, const PackedHead<T>& packed, const T* moved_transposed,
                   const T* moved_bias, int64_t begin, int64_t rows, T* memory) {
  const int64_t C = p.num_classes, A = p.width, c_row = packed.classes_row, a_row = packed.width_row;
  const int64_t columns = packed.columns;
  T *features = memory, *direction = features + kBlock * a_row;
  T *logits = direction + kBlock * a_row, *moves = logits + kBlock * c_row;
  T *along = moves + kBlock * c_row, *along_moves = along + kBlock * c_row;
  const auto row_number = [&](int64_t i) {
    return p.rows == nullptr ? begin + i : p.rows[begin + i];
  };
  for (int64_t i = 0; i < rows; ++i) {
    read_row(p.type, p.features, row_number(i) * A, A, features + i * a_row);
  }
  product<T>(rows, columns, A, features, a_row, 1, packed.transposed.data, c_row, logits, c_row, false);
  product<T>(rows, columns, A, features, a_row, 1, moved_transposed, c_row, moves, c_row, false);
  if (p.features_tangent != nullptr) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(features + i * a_row, p.features_tangent + row_number(i) * A, A * sizeof(T));
    }
    product<T>(rows, columns, A, features, a_row, 1, packed.transposed.data, c_row, moves, c_row, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* z = logits + i * c_row;
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      store(z + j, load(z + j) + load(packed.bias.data + j));
    }
  }
  const bool directed = p.epsilon != nullptr && C > 1;
  if (directed) {
    int64_t labels[kBlock];
    for (int64_t i = 0; i < rows; ++i) labels[i] = p.labels[row_number(i)];
    mixtures(logits, c_row, rows, columns, labels, along);
    product<T>(rows, a_row, C, along, c_row, 1, packed.weight.data, a_row, direction, a_row, false);
    for (int64_t k = 0; k < rows * a_row; k += kLanes<T>) {
      store(direction + k, sign<T>(load(direction + k)));
    }
    product<T>(rows, columns, A, direction, a_row, 1, packed.transposed.data, c_row, along, c_row,
               false);
    product<T>(rows, columns, A, direction, a_row, 1, moved_transposed, c_row, along_moves, c_row,
               false);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row_number(i), label = p.labels[row];
    T *z = logits + i * c_row, *z_moves = moves + i * c_row;
    const T *t = along + i * c_row, *t_moves = along_moves + i * c_row;
    const int64_t place = p.table == nullptr ? 0 : p.slot[label] * table_row(C);
    const T epsilon = directed ? p.epsilon[row] : T(0);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      Vector<T> v = load(z + j), dv = load(z_moves + j) + load(moved_bias + j);
      if (directed) {
        v += epsilon * load(t + j);
        dv += epsilon * load(t_moves + j);
      }
      if (p.table != nullptr) {
        v += load(p.table + place + j);
        dv += load(p.tangent + place + j);
      }
      store(z + j, v + load(packed.prior.data + j));
      store(z_moves + j, dv);
    }
    row_tangent(z, z_moves, label, p.scale, columns);
    if (p.grad_epsilon != nullptr) {
      p.grad_epsilon[row] = directed ? dot(z, t_moves, C) + dot(z_moves, t, C) : T(0);
    }
    if (p.residual == nullptr) continue;
    std::memcpy(p.residual + row * C, z, C * sizeof(T));
    std::memcpy(p.curvature + row * C, z_moves, C * sizeof(T));
  }
}

template <class T>
void tangent_of(const TangentHead<T>& p) {
  if (p.count == 0) return;
  const int64_t C = p.num_classes, A = p.width;
  const PackedHead<T> packed(C, A, p.weight, p.bias, p.log_prior, p.beta);
  const int64_t c_row = packed.classes_row, a_row = packed.width_row;
  Buffer<T> transposed(A * c_row), bias(c_row);
  transpose_padded(p.weight_tangent, C, A, c_row, transposed.data);
  for (int64_t j = 0; j < c_row; ++j) {
    bias.data[j] = j >= C || p.bias_tangent == nullptr ? T(0) : p.bias_tangent[j];
  }
  const int64_t blocks = (p.count + kBlock - 1) / kBlock;
  const double work = double(p.count) * C * A * (p.epsilon == nullptr ? 3 : 6);
  const int64_t scratch = kBlock * (2 * a_row + 4 * c_row);
  parallel_pieces<Buffer<T>>(blocks, work, scratch, [&](int64_t block, T* own) {
    const int64_t begin = block * kBlock;
    block_of_rows(p, packed, transposed.data, bias.data, begin, smaller(kBlock, p.count - begin),
                  own);
  });
}

}  // namespace

namespace IADA_SET {
void tangent_head(const TangentHead<float>& p) { tangent_of(p); }
void tangent_head(const TangentHead<double>& p) { tangent_of(p); }
}  // namespace IADA_SET

}  // namespace iada
