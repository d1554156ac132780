// The operators, as operators.cpp registers them.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace iada {

using torch::stable::Tensor;

using LossResult = std::tuple<Tensor, Tensor, Tensor>;  // loss, D, partial gradients
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LossResult loss_forward(const Tensor& features, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& labels,
                        const std::optional<Tensor>& covariance,
                        const std::optional<Tensor>& epsilon,
                        const std::optional<Tensor>& log_prior,
                        const std::optional<Tensor>& row_scale, double alpha, double beta,
                        int64_t ignore_index, int64_t reduction, int64_t needs);

// The same after the batch went into covariance, mean and count. Nothing is changed where a label
// is refused.
LossResult loss_forward_update(const Tensor& features, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Tensor& labels,
                               const Tensor& covariance, const Tensor& mean, const Tensor& count,
                               const std::optional<Tensor>& epsilon,
                               const std::optional<Tensor>& log_prior, double alpha, double beta,
                               int64_t ignore_index, int64_t reduction, int64_t needs);

Gradients loss_backward(const Tensor& grad_loss, const Tensor& features, const Tensor& weight,
                        const Tensor& labels, const Tensor& residual, const Tensor& partial,
                        int64_t covariance_dim, double alpha, double beta, int64_t ignore_index,
                        int64_t needs);

void covariance_update(const Tensor& covariance, const Tensor& mean, const Tensor& count,
                       const Tensor& features, const Tensor& labels);

// Whether these are arguments of the loss as its operators want them, labels int64 in [0, C) or
// ignore_index, epsilon finite, and the features too where they are streamed.
bool arguments_fit(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& labels, const std::optional<Tensor>& covariance,
                   const std::optional<Tensor>& epsilon, const std::optional<Tensor>& log_prior,
                   int64_t ignore_index, bool streams);

}  // namespace iada
