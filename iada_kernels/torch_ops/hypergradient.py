"""The hypergradient of the head in closed form, on torch operators (design of Eq. 8 and 9).

L̇ is the derivative of the loss along (ḣ, V, v_b). With q = softmax(z̃), D = q − onehot(y),

    ż̃_ij     = w_j·ḣ_i + V_j·(h_i + ε_i s_i) + v_bj + α Ṙ[y_i, j]
    c_ij     = q_ij (ż̃_ij − Σ_k q_ik ż̃_ik)
    ∂L̇/∂ε_i  = Σ_j D_ij V_j·s_i + Σ_j c_ij T_ij
    ∂L̇/∂Σ_u  = α Σ_j [ Dᵤ_j sym((w_j − w_u)(V_j − V_u)ᵀ) + ½ cᵤ_j (w_j − w_u)(w_j − w_u)ᵀ ]

with Dᵤ and cᵤ the sums of D and c over the samples of class u: nothing of size N·C·A.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from iada_kernels.contract import HeadTangents, LossInputs, LossOptions
from iada_kernels.low_rank import unpacked
from iada_kernels.torch_ops import low_rank
from iada_kernels.torch_ops.blocking import blocks, join
from iada_kernels.torch_ops.loss import perturbation_sign, table_rows
from iada_kernels.torch_ops.quadratic import class_table_and_tangent, differences
from iada_kernels.triangular import is_triangular, triangles


@dataclass(frozen=True)
class ClassSums:
    """α D and α c summed over each class's samples, divided as the loss is: (U, C) each.

    classes (U) names the rows, which may repeat; None stands for every class in order. covariance:
    a low-rank Σ itself, on whose factors the gradient by them depends.
    """

    classes: Tensor | None
    residual: Tensor
    curvature: Tensor
    covariance: Tensor | None = None


def hypergradient(
    inputs: LossInputs, options: LossOptions, tangents: HeadTangents, needs_covariance: bool
) -> tuple[Tensor | None, ClassSums | None]:
    """∂L̇/∂ε (N) and the sums from which `covariance_step` makes ∂L̇/∂Σ."""
    dtype = inputs.compute_dtype
    weight = inputs.weight.to(dtype)
    bias = 0.0 if inputs.bias is None else inputs.bias.to(dtype)
    ignored = inputs.labels == options.ignore_index
    target = inputs.labels.masked_fill(ignored, 0)
    classes = table_rows(target, inputs)
    table = table_tangent = None
    if inputs.covariance is not None:
        table, table_tangent = class_table_and_tangent(
            weight, tangents.weight, inputs.covariance, classes
        )
    row_scale = (~ignored).to(dtype)
    if options.reduction == "mean":
        row_scale /= row_scale.sum().clamp(min=1)

    residuals, curvatures, grads = [], [], []
    for rows in blocks(*inputs.features.shape):
        h, y = inputs.features[rows].to(dtype), target[rows, None]
        z = h @ weight.T + bias
        z_tangent = h @ tangents.weight.T
        if inputs.epsilon is not None:
            sign = perturbation_sign(z, weight, y)
            sign_logits, sign_tangent = sign @ weight.T, sign @ tangents.weight.T  # T and Ṫ
            epsilon = inputs.epsilon[rows, None].to(dtype)
            z.addcmul_(epsilon, sign_logits)
            z_tangent.addcmul_(epsilon, sign_tangent)
        if table is not None and table_tangent is not None:
            index = rows if classes is not None else target[rows]
            z.add_(table[index], alpha=options.alpha)
            z_tangent.add_(table_tangent[index], alpha=options.alpha)
        if inputs.log_prior is not None:
            z.add_(inputs.log_prior.to(dtype), alpha=options.beta)
        if tangents.features is not None:
            z_tangent.addmm_(tangents.features[rows], weight.T)
        if tangents.bias is not None:
            z_tangent += tangents.bias
        # Relative to the label's class both D and c keep the digits that 1 − q_y loses.
        z_tangent -= z_tangent.gather(1, y)
        q = z.softmax(dim=1)
        label_q = q.gather(1, y)
        residual = q.scatter(1, y, 0.0)
        curvature = residual * z_tangent
        mean = curvature.sum(dim=1, keepdim=True)
        curvature -= residual * mean
        curvature.scatter_(1, y, -label_q * mean)
        residual.scatter_(1, y, -residual.sum(dim=1, keepdim=True))
        residual *= row_scale[rows, None]
        curvature *= row_scale[rows, None]
        if inputs.epsilon is not None:
            grad = torch.linalg.vecdot(residual, sign_tangent)
            grads.append(grad + torch.linalg.vecdot(curvature, sign_logits))
        residuals.append(residual)
        curvatures.append(curvature)

    grad_epsilon = join(grads) if grads else None
    if not needs_covariance or inputs.covariance is None:
        return grad_epsilon, None
    residual, curvature = join(residuals) * options.alpha, join(curvatures) * options.alpha
    if classes is None:
        zero = weight.new_zeros(len(weight), len(weight))
        residual = zero.index_add(0, target, residual)
        curvature = zero.index_add_(0, target, curvature)
    if not inputs.has_low_rank_covariance:
        return grad_epsilon, ClassSums(classes, residual, curvature)
    if classes is not None:
        classes, residual, curvature = low_rank.class_sums(classes, residual, curvature)
    return grad_epsilon, ClassSums(classes, residual, curvature, inputs.covariance)


def covariance_step(
    covariance: Tensor, weight: Tensor, weight_tangent: Tensor, sums: ClassSums, scale: float
) -> None:
    """Σ += scale · ∂L̇/∂Σ in place, for covariance (C, A, A), its triangles, (C, A), or packed.

    Of a packed one the gradients are those by d and U.
    """
    dtype = sums.residual.dtype
    weight, weight_tangent = weight.to(dtype), weight_tangent.to(dtype)
    num_classes, width = weight.shape
    if covariance.dim() == 2:
        grad = _diagonal(weight, weight_tangent, sums)
        _add(unpacked(covariance, width).diagonal, sums.classes, slice(None), grad, scale)
        if sums.covariance is not None:
            parts = sums.classes, sums.residual, sums.curvature
            low_rank.covariance_step(
                covariance, sums.covariance, weight, weight_tangent, *parts, scale
            )
        return
    count = num_classes if sums.classes is None else len(sums.classes)
    for rows in blocks(count, width * max(width, num_classes)):
        index = rows if sums.classes is None else sums.classes[rows]
        delta, delta_tangent = differences(weight, index), differences(weight_tangent, index)
        scaled = delta_tangent.mul_(sums.residual[rows, :, None])
        scaled.addcmul_(delta, sums.curvature[rows, :, None], value=0.5)
        grad = delta.mT @ scaled
        grad = (grad + grad.mT) * 0.5
        if is_triangular(covariance, width):  # by the entries of Σ, as of matrices
            grad = triangles(grad)
        _add(covariance, sums.classes, rows, grad, scale)


def covariance_step_bound(weight: Tensor, weight_tangent: Tensor, sums: ClassSums) -> Tensor | None:
    """At least the Frobenius norm of each class's ∂L̇/∂Σ, (C): the sum of those of its terms.

        ‖∂L̇/∂Σ_c‖ ≤ Σ_j |D_cj| ‖w_j − w_c‖ ‖V_j − V_c‖ + ½ |c_cj| ‖w_j − w_c‖²

    None elsewhere than on CPUs.
    """
    if weight.device.type != "cpu":
        return None
    dtype = sums.residual.dtype
    distance = _distances(weight.to(dtype), sums.classes)
    tangent_distance = _distances(weight_tangent.to(dtype), sums.classes)
    bound = (sums.residual.abs() * distance * tangent_distance).sum(dim=1)
    bound += 0.5 * (sums.curvature.abs() * distance.square()).sum(dim=1)
    if sums.classes is None:
        return bound
    return bound.new_zeros(len(weight)).index_add_(0, sums.classes, bound)


def _distances(weight: Tensor, classes: Tensor | None) -> Tensor:
    """‖w_j − w_u‖ for the named classes u, (U, C), and what rounding may have taken from it."""
    weight = weight - weight.mean(dim=0)
    own = weight if classes is None else weight[classes]
    sizes = own.square().sum(dim=1)[:, None] + weight.square().sum(dim=1)
    rounding = 2 * weight.shape[1] * torch.finfo(weight.dtype).eps
    return (sizes * (1 + rounding) - 2 * (own @ weight.T)).clamp(min=0).sqrt()


def _add(
    covariance: Tensor, classes: Tensor | None, rows: slice, grad: Tensor, scale: float
) -> None:
    if classes is None:
        covariance[rows].add_(grad, alpha=scale)
    else:
        covariance.index_add_(0, classes[rows], grad.to(covariance.dtype), alpha=scale)


def _diagonal(weight: Tensor, weight_tangent: Tensor, sums: ClassSums) -> Tensor:
    """∂L̇/∂Σ of variances, (U, A); rows are centred, because expanding a square cancels."""
    weight = weight - weight.mean(dim=0)
    weight_tangent = weight_tangent - weight_tangent.mean(dim=0)
    index = slice(None) if sums.classes is None else sums.classes
    label_weight, label_tangent = weight[index], weight_tangent[index]
    residual, curvature = sums.residual, sums.curvature
    # Rows of D and c sum to 0, but for rounding: terms in w_u ∘ w_u vanish.
    grad = residual @ (weight * weight_tangent) + 0.5 * (curvature @ (weight * weight))
    grad -= label_weight * (residual @ weight_tangent + curvature @ weight)
    return grad.sub_(label_tangent * (residual @ weight))
