"""The IADA loss (Eq. 6) and its gradients in closed form, on torch operators.

With s the scale-free sign, T = sWᵀ, R the class table and D = softmax(z̃) − onehot(y),

    z̃      = hWᵀ + b + ε T + α R[y] + β log π            ℓ = logsumexp(z̃) − z̃_y
    ∂ℓ/∂h  = D W          ∂ℓ/∂b = Σ_i D_i                 ∂ℓ/∂ε_i = Σ_j D_ij T_ij
    ∂ℓ/∂W  = Dᵀ(h + ε s) + (through R)                    ∂ℓ/∂log π = β Σ_i D_i

Rows are taken in blocks, so that nothing of size N·A is allocated but the gradient of the
features; one N×C tensor, D, is kept for the backward pass. Where that is large, `class_blocks`
serves. No host synchronisation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from iada_kernels.contract import ClassStatistics, LossGradients, LossInputs, LossNeeds, LossOptions
from iada_kernels.streaming import update_statistics
from iada_kernels.torch_ops import class_blocks, low_rank
from iada_kernels.torch_ops.blocking import blocks, is_one_block, join
from iada_kernels.torch_ops.class_blocks import SavedRows
from iada_kernels.torch_ops.covariance import covariance_update
from iada_kernels.torch_ops.quadratic import (
    class_table,
    class_table_and_product,
    class_table_backward,
)
from iada_kernels.torch_ops.reduction import mean_divisor, reduced


class SavedLoss(NamedTuple):
    """What the backward pass needs beside the inputs."""

    target: Tensor  # (N), the labels, 0 where ignored
    residual: Tensor  # D (N, C), 0 where ignored
    grad_epsilon: Tensor | None  # Σ_j D_ij T_ij (N)
    sign: Tensor | None  # s (N, A) where the batch is one block, else computed again
    product: Tensor | None  # of W and Σ where that is small, see `class_table_and_product`
    divisor: Tensor | None  # for the mean: the number of rows not ignored


def loss_forward(
    inputs: LossInputs,
    options: LossOptions,
    needs: LossNeeds,
    stream: ClassStatistics | None = None,
) -> tuple[Tensor, SavedLoss | SavedRows]:
    """The reduced loss and what `loss_backward` needs; a `stream` is updated first."""
    if stream is not None:
        update_statistics(covariance_update, inputs, options, stream)
    if class_blocks.has_many_classes(inputs) and not options.label_smoothing:
        return class_blocks.loss_forward(inputs, options, needs)
    weight, bias = _head(inputs)
    dtype = weight.dtype
    ignored = inputs.labels == options.ignore_index
    target = inputs.labels.masked_fill(ignored, 0)
    classes = table_rows(target, inputs)
    table = product = None
    if inputs.covariance is not None and needs.weight:
        table, product = class_table_and_product(weight, inputs.covariance, classes)
    elif inputs.covariance is not None:
        table = class_table(weight, inputs.covariance, classes)
    one_block = is_one_block(*inputs.features.shape)

    losses, residuals, grad_epsilons = [], [], []
    sign = None
    for rows in blocks(*inputs.features.shape):
        y = target[rows, None]
        z = _linear(inputs.features[rows].to(dtype), weight, bias)
        if inputs.epsilon is not None:
            block_sign = perturbation_sign(z, weight, y)
            sign_logits = block_sign @ weight.T  # T
            z.addcmul_(inputs.epsilon[rows, None].to(dtype), sign_logits)
            sign = block_sign if one_block else None
        if table is not None:
            z.add_(table[target[rows]] if classes is None else table[rows], alpha=options.alpha)
        if inputs.log_prior is not None:
            z.add_(inputs.log_prior.to(dtype), alpha=options.beta)
        log_probability = z.log_softmax(dim=1)
        losses.append(_cross_entropy(log_probability, y, options))
        # D_y = −Σ_{j≠y} p_j keeps the digits that p_y − 1 loses on a confident sample.
        d = log_probability.exp_().scatter_(1, y, 0.0)
        d.scatter_(1, y, -d.sum(dim=1, keepdim=True))
        if options.label_smoothing:  # of each row's target, a share moves from y to all classes
            share = torch.full_like(d, -options.label_smoothing / d.shape[1])
            d.add_(share.scatter_add_(1, y, share.new_full(y.shape, options.label_smoothing)))
        residuals.append(d.masked_fill_(ignored[rows, None], 0.0))
        if inputs.epsilon is not None:
            grad_epsilons.append(torch.linalg.vecdot(d, sign_logits))

    divisor = mean_divisor(ignored, options)
    # Not in place: compiled by torch 2.11, a result that was changed in place has no gradient.
    value = reduced(join(losses).masked_fill(ignored, 0.0), divisor, options)
    grad_epsilon = join(grad_epsilons) if grad_epsilons else None
    return value, SavedLoss(target, join(residuals), grad_epsilon, sign, product, divisor)


def loss_backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: SavedLoss | SavedRows,
    grad_loss: Tensor,
    needs: LossNeeds,
) -> LossGradients:
    """The gradients asked for: of the features in their dtype, others in the compute dtype."""
    if isinstance(saved, SavedRows):
        return class_blocks.loss_backward(inputs, options, saved, grad_loss, needs)
    weight, _ = _head(inputs)
    if saved.divisor is not None:
        grad_loss = grad_loss / saved.divisor
    residual = saved.residual * grad_loss[..., None]

    grads = LossGradients()
    if needs.epsilon and saved.grad_epsilon is not None:
        grads.epsilon = saved.grad_epsilon * grad_loss
    if needs.bias:
        grads.bias = residual.sum(dim=0)
    if needs.log_prior:
        grads.log_prior = residual.sum(dim=0) * options.beta
    if needs.features:
        grads.features = _grad_features(inputs, residual, weight)
    if needs.weight:
        grads.weight = _grad_weight(inputs, saved, residual)
    if inputs.covariance is not None and (needs.weight or needs.covariance):
        classes = table_rows(saved.target, inputs)
        if classes is None:
            grad_table = weight.new_zeros(len(weight), len(weight))
            grad_table.index_add_(0, saved.target, residual, alpha=options.alpha)
        else:
            grad_table = residual * options.alpha
        grads.covariance = class_table_backward(
            weight,
            inputs.covariance,
            classes,
            saved.product,
            grad_table,
            grads.weight,
            needs.covariance,
        )
    return grads


def loss_differentiable(inputs: LossInputs, options: LossOptions) -> Tensor:
    """The same loss as a graph that autograd can differentiate to any order.

    For double backward only: the graph keeps the class table's intermediates, U·C·A elements.
    """
    weight, bias = _head(inputs)
    ignored = inputs.labels == options.ignore_index
    target = inputs.labels.masked_fill(ignored, 0)
    z = logits = _linear(inputs.features.to(weight.dtype), weight, bias)
    if inputs.epsilon is not None:
        with torch.no_grad():
            sign = perturbation_sign(logits, weight, target[:, None])
        z = z + inputs.epsilon[:, None].to(weight.dtype) * (sign @ weight.T)
    if inputs.covariance is not None:
        classes = table_rows(target, inputs)
        table = class_table(weight, inputs.covariance, classes)
        z = z + options.alpha * (table[target] if classes is None else table)
    if inputs.log_prior is not None:
        z = z + options.beta * inputs.log_prior.to(weight.dtype)
    losses = _cross_entropy(z.log_softmax(dim=1), target[:, None], options)
    losses = losses.masked_fill(ignored, 0.0)
    return reduced(losses, mean_divisor(ignored, options), options)


def perturbation_sign(logits: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """s of Eq. 6 in a form free of scale and so of cancellation: sign(Σ_{j≠y} r_j w_j − w_y).

    logits (n, C), weight (C, A), target (n, 1) → (n, A), in the dtype of the weight.
    """
    if len(weight) == 1:
        return weight.new_zeros(len(logits), weight.shape[1])
    mixture = logits.scatter(1, target, -torch.inf).softmax(dim=1)
    return (mixture.scatter_(1, target, -1.0) @ weight).sign_()


def _head(inputs: LossInputs) -> tuple[Tensor, Tensor | None]:
    dtype = inputs.compute_dtype
    return inputs.weight.to(dtype), None if inputs.bias is None else inputs.bias.to(dtype)


def _linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return features @ weight.T if bias is None else torch.addmm(bias, features, weight.T)


def table_rows(target: Tensor, inputs: LossInputs) -> Tensor | None:
    """The classes of the table's rows: all (None), or one row a sample where those are fewer.

    Counting the distinct labels would need the host, which costs nothing on a CPU: the table of a
    low-rank Σ does so there.
    """
    few = len(target) < len(inputs.weight)
    counted = inputs.has_low_rank_covariance and low_rank.counts_classes(target)
    return target if few or counted else None


def _cross_entropy(log_probability: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Of each row, (n), against target (n, 1) smoothed by `label_smoothing`."""
    losses = -log_probability.gather(1, target)[:, 0]
    share = options.label_smoothing
    return losses if not share else (1 - share) * losses - share * log_probability.mean(dim=1)


def _grad_features(inputs: LossInputs, residual: Tensor, weight: Tensor) -> Tensor:
    """D W, cast block by block."""
    if inputs.features.dtype == weight.dtype:
        return residual @ weight
    grad = torch.empty(inputs.features.shape, dtype=inputs.features.dtype, device=weight.device)
    for rows in blocks(*grad.shape):
        grad[rows] = residual[rows] @ weight
    return grad


def _grad_weight(inputs: LossInputs, saved: SavedLoss, residual: Tensor) -> Tensor:
    """Dᵀ(h + ε s), block by block."""
    weight, bias = _head(inputs)
    grad = weight.new_zeros(weight.shape)
    for rows in blocks(*inputs.features.shape):
        h = inputs.features[rows].to(weight.dtype)
        if inputs.epsilon is not None:
            sign = saved.sign
            if sign is None:
                z = _linear(h, weight, bias)
                sign = perturbation_sign(z, weight, saved.target[rows, None])
            h = torch.addcmul(h, inputs.epsilon[rows, None].to(weight.dtype), sign)
        grad.addmm_(residual[rows].T, h)
    return grad
