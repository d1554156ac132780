// The operators, as operators.cpp registers them.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace iada {

// What the backward pass may be asked for; the same numbers in native/fakes.py, native/loss.py.
enum Needs : int64_t {
  kFeatures = 1, kWeight = 2, kBias = 4, kCovariance = 8, kEpsilon = 16, kPrior = 32
};
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

using torch::stable::Tensor;

using LossResult = std::tuple<Tensor, Tensor, Tensor>;  // loss, D, partial gradients
using HypergradientResult = std::tuple<Tensor, Tensor, Tensor>;  // ∂L̇/∂ε, D, c
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LossResult loss_forward(const Tensor& features, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& labels,
                        const std::optional<Tensor>& covariance,
                        const std::optional<Tensor>& epsilon,
                        const std::optional<Tensor>& log_prior,
                        const std::optional<Tensor>& row_scale, double alpha, double beta,
                        int64_t ignore_index, int64_t reduction, int64_t needs, bool rounded);

// The same after the batch went into covariance, mean and count. Nothing is changed where a label
// is refused.
LossResult loss_forward_update(const Tensor& features, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Tensor& labels,
                               const Tensor& covariance, const Tensor& mean, const Tensor& count,
                               const std::optional<Tensor>& epsilon,
                               const std::optional<Tensor>& log_prior, double alpha, double beta,
                               int64_t ignore_index, int64_t reduction, int64_t needs, bool rounded);

Gradients loss_backward(const Tensor& grad_loss, const Tensor& features, const Tensor& weight,
                        const Tensor& labels, const Tensor& residual, const Tensor& partial,
                        int64_t covariance_dim, double alpha, double beta, int64_t ignore_index,
                        int64_t needs);

void covariance_update(const Tensor& covariance, const Tensor& mean, const Tensor& count,
                       const Tensor& features, const Tensor& labels);

// How the derivative along (features_tangent, weight_tangent, bias_tangent) depends on epsilon; and,
// where needed, D and c (N, C), from which `covariance_step` makes how it depends on the covariance.
HypergradientResult hypergradient(
    const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const std::optional<Tensor>& covariance,
    const std::optional<Tensor>& epsilon, const std::optional<Tensor>& log_prior,
    const std::optional<Tensor>& features_tangent, const Tensor& weight_tangent,
    const std::optional<Tensor>& bias_tangent, double alpha, double beta, int64_t ignore_index,
    int64_t reduction, bool needs_covariance);

// covariance += scale (Σ_j …), see covariance_gradient.cpp; alpha is part of `scale`.
void covariance_step(const Tensor& covariance, const Tensor& weight, const Tensor& weight_tangent,
                     const Tensor& labels, const Tensor& residual, const Tensor& curvature,
                     int64_t ignore_index, double scale);

// (N, 8) in the dtype of the weight, see characteristics.cpp.
Tensor characteristics(const Tensor& features, const Tensor& logits, const Tensor& labels,
                       const Tensor& weight, int64_t neighbours);

// Whether these are arguments of the loss as its operators want them, labels int64 in [0, C) or
// ignore_index, epsilon finite, and the features too where they are streamed.
bool arguments_fit(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& labels, const std::optional<Tensor>& covariance,
                   const std::optional<Tensor>& epsilon, const std::optional<Tensor>& log_prior,
                   int64_t ignore_index, bool streams);

}  // namespace iada
