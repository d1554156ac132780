// The passes, as plain records of pointers. Each is compiled for float and double, once for each
// instruction set (IADA_SETS in CMakeLists.txt); operators.cpp takes the best set that runs here.
//
// N rows (samples), C classes, A features; U classes present among the labels. Rows of a class
// are listed in `order` (U runs one after the other), `begins` (U + 1) says where each starts.

#pragma once

#include <cstdint>

#include "vectors.hpp"

namespace iada {

// Rows of the tables R and G, padded for every instruction set: the widest tile divides 32.
static inline int64_t table_row(int64_t num_classes) { return (num_classes + 31) / 32 * 32; }

// Rows of one class: row numbers order[begins[u]] … order[begins[u + 1] − 1] have label classes[u].
struct ClassRows {
  int64_t present;         // U
  const int64_t* classes;  // (U)
  const int64_t* order;    // (rows that count)
  const int64_t* begins;   // (U + 1)
};

// R[u, j] = ½ α (w_j − w_c)ᵀ Σ_c (w_j − w_c), c = classes[u], and the products it is made of.
template <class T>
struct ClassPass {
  int64_t num_classes, width, present;
  const int64_t* classes;
  const T* weight;      // (C, A)
  const T* covariance;  // (C, A, A) symmetric, or (C, A)
  bool full;
  T alpha;
  T* table;    // (U, table_row(C))
  T* product;  // (U, C, A): (W − 1w_c) Σ_c; null where not wanted, and for the diagonal form
  const T* weight_tangent;  // V (C, A), or null
  T* tangent;  // α (w_j − w_c)ᵀ Σ_c (V_j − V_c) (U, table_row(C)), or null
  const T* next;  // (A, A): Σ of the class that comes after, brought closer meanwhile; or null
  bool rounded;   // whether products may be of operands rounded to bfloat16
};

// ∂L/∂W through R: grad_weight_j += α Σ_u G_uj P_uj, grad_weight_c −= α Σ_j G_uj P_uj.
template <class T>
struct TableBackward {
  int64_t num_classes, width, present;
  const int64_t* classes;
  const T* weight;
  const T* covariance;  // (C, A), the diagonal form; null where `product` is given
  const T* product;     // (U, C, A)
  const T* grad_table;  // G (U, table_row(C))
  T alpha;
  T* grad_weight;  // (C, A), added to
};

// ∂L/∂Σ_c = ½ α (W − 1w_c)ᵀ diag(G_c) (W − 1w_c), or its diagonal.
template <class T>
struct GradCovariance {
  int64_t num_classes, width, present;
  const int64_t* classes;
  const T* weight;
  const T* grad_table;
  T alpha;
  bool full;
  T* grad;  // (C, A, A) or (C, A); rows of absent classes are not written
};

// Σ_c += scale ∂L̇/∂Σ_c, see covariance_gradient.cpp.
template <class T>
struct CovarianceStep {
  int64_t num_classes, width, present;
  const int64_t* classes;
  const T *weight, *weight_tangent;  // W and V (C, A)
  const T *residual, *curvature;     // class sums of D and c (U, table_row(C))
  T scale;
  bool full;
  T* covariance;  // (C, A, A) or (C, A), added to
};

// G[u] = scale Σ_{i: y_i = classes[u]} D_i.
template <class T>
struct ClassSums {
  int64_t num_classes;
  ClassRows rows;
  const T* residual;  // D (N, C)
  T scale;
  T* sums;  // (U, table_row(C))
};

// The rows and the head that `Head` and `TangentHead` read.
template <class T>
struct HeadInputs {
  int64_t num_classes, width, count;  // count: rows of this call
  const int64_t* rows;                // (count) row numbers, or null for 0 … count − 1
  RowType type;
  const void* features;  // (N, A)
  const T* weight;       // (C, A)
  const T* bias;         // (C) or null
  const int64_t* labels;  // (N)
  const T* epsilon;       // (N) or null
  const T* log_prior;     // (C) or null
  const T* table;         // R (U, table_row(C)) or null
  const int64_t* slot;    // (C): row of the table of each class
  T beta, scale;
};

// The head: logits, sign, adjusted logits, loss, D and what sums over the rows.
template <class T>
struct Head : HeadInputs<T> {
  const T* row_scale;   // (N) or null
  double* loss_sum;     // added to
  T* losses;            // (N) or null
  T* residual;          // D (N, C), scaled, or null
  T* grad_weight;       // (C, A), added to, or null
  T* grad_bias;         // (C), added to, or null
  T* grad_epsilon;      // (N) or null
};

// How the loss's derivative along (ḣ, V, v_b) depends on ε and Σ, see tangent.cpp.
template <class T>
struct TangentHead : HeadInputs<T> {
  const T *features_tangent, *weight_tangent, *bias_tangent;  // ḣ (N, A) or null, V, v_b or null
  const T* tangent;         // Ṙ (U, table_row(C)) or null
  T* grad_epsilon;          // (N) or null
  T *residual, *curvature;  // D and c (N, C), scaled, or null
};

// The characteristics that a batch shows by itself, see characteristics.cpp.
template <class T>
struct Characteristics {
  int64_t count, num_classes, width, neighbours;  // neighbours ≤ kMaxNeighbours, < count
  RowType features_type, logits_type;
  const void *features, *logits;
  const int64_t* labels;
  const T* weight;  // (C, A)
  T* result;        // (N, 8)
};
constexpr int64_t kMaxNeighbours = 64;

// ∂L/∂h = scale D W.
template <class T>
struct GradFeatures {
  int64_t num_classes, width, count;
  RowType type;
  const T* residual;  // (N, C)
  const T* weight;    // (C, A)
  T scale;
  void* grad;  // (N, A)
};

// One batch of the streaming update of Σ, μ, n.
template <class T>
struct CovarianceUpdate {
  int64_t num_classes, width;
  ClassRows rows;
  RowType type;
  const void* features;  // (N, A)
  bool full;
  T* covariance;   // (C, A, A) or (C, A)
  T* mean;         // (C, A)
  int64_t* count;  // (C)
};

// *all &= every element is finite.
struct AllFinite {
  RowType type;
  const void* numbers;
  int64_t count;
  bool* all;
};

#define IADA_DECLARE_PASSES(set)                                      \
  namespace set {                                                     \
  void class_pass(const ClassPass<float>&);                           \
  void class_pass(const ClassPass<double>&);                          \
  void table_backward(const TableBackward<float>&);                   \
  void table_backward(const TableBackward<double>&);                  \
  void grad_covariance(const GradCovariance<float>&);                 \
  void grad_covariance(const GradCovariance<double>&);                \
  void class_sums(const ClassSums<float>&);                           \
  void class_sums(const ClassSums<double>&);                          \
  void head(const Head<float>&);                                      \
  void head(const Head<double>&);                                     \
  void grad_features(const GradFeatures<float>&);                     \
  void grad_features(const GradFeatures<double>&);                    \
  void covariance_update(const CovarianceUpdate<float>&);             \
  void covariance_update(const CovarianceUpdate<double>&);            \
  void covariance_step(const CovarianceStep<float>&);                 \
  void covariance_step(const CovarianceStep<double>&);                \
  void tangent_head(const TangentHead<float>&);                       \
  void tangent_head(const TangentHead<double>&);                      \
  void characteristics(const Characteristics<float>&);                \
  void characteristics(const Characteristics<double>&);               \
  void all_finite(const AllFinite&);                                  \
  }

IADA_DECLARE_PASSES(portable)
IADA_DECLARE_PASSES(avx2)
IADA_DECLARE_PASSES(avx512)

}  // namespace iada
