"""What each kernel must do at least: bytes through memory and floating-point operations.

Every tensor counts once for each direction in which it must move, however often a kernel reads it
from a cache; of a covariance only the classes that the batch shows. `float_operations` counts the
products of the mathematics, each multiplication and addition as one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from iada_kernels.triton.launch import Launch


@dataclass(frozen=True)
class Work:
    bytes: float
    float_operations: float


# Written where they were read. What is only written counts once, like what is only read.
IN_PLACE = {
    "rows_and_logits_kernel": ("count",),
    "moments_and_sign_kernel": ("moments.mean", "covariance"),
    "softmax_kernel": ("z",),
    "class_pass_weight_kernel": ("partials", "grad"),
    "curvature_kernel": ("tangent",),
    "variances_step_kernel": ("covariance",),
    "single_launch_kernel": ("terms.covariance", "statistics.mean", "statistics.n"),
}
_CLASS_PARTS = ("parts.weight", "parts.sums", "parts.covariance")
# Their first axis is the class, and classes without rows are left alone.
BY_CLASS = {
    "moments_and_sign_kernel": (
        *("moments.mean", "moments.center", "moments.shift", "moments.batch_weight"),
        "covariance",
    ),
    "class_pass_kernel": (
        *("covariance", "partials.table", "partials.table_tangent"),
        *("partials.total", "partials.total_tangent"),
        *("moments.center", "moments.shift"),
    ),
    "class_pass_weight_kernel": ("covariance", "curvature"),
    "variances_step_kernel": ("covariance",),
    "single_launch_kernel": ("terms.covariance", "statistics.mean", "statistics.n", *_CLASS_PARTS),
    "single_launch_backward_kernel": _CLASS_PARTS,
}
# Of a record that serves several kernels, what one of them leaves alone; and counters.
UNREAD = {
    "class_pass_kernel": ("moments.mean", "partials.arrived"),
    "softmax_kernel": ("arrived",),
    "logits_kernel": ("diagonal.tangent_mean", "arrived"),
    "class_pass_weight_kernel": ("arrived",),
    "head_backward_kernel": ("quadratic.diagonal.tangent_mean",),
}


def _head(products: int, diagonal_products: int = 0) -> Callable[..., float]:
    """2·N·C·A for each product of the head; more of them for a diagonal Σ."""

    def count(a: dict[str, Any], present: int) -> float:
        is_diagonal = any(name.endswith("diagonal.variances") for name in a)
        size = 2.0 * a["sizes.N"] * a["sizes.C"] * a["sizes.A"]
        return (products + is_diagonal * diagonal_products) * size

    return count


def _head_if(result: str) -> Callable[..., float]:
    """One product where there is such a result: other programs of the launch have none."""
    return lambda a, present: 0.0 if a[result] is None else _head(1)(a, present)


def _head_backward(a: dict[str, Any], present: int) -> float:
    products = ("features_grid.rows" in a) + ("weight_grid.rows" in a)
    return _head(products, 1)(a, present)


def _class_pass(a: dict[str, Any], present: int) -> float:
    """Σ is symmetric: each product with it, or onto it, is half of a full one."""
    rows = len(a["samples.features"]) if "moments.mean" in a else 0
    square = float(a["A"]) ** 2
    products = 2 if a.get("head.tangent") is not None else 1
    total = rows * square
    if "partials.table" in a:
        total += products * present * a["C"] * square
    if "rank_c.curvature" in a:
        total += products * present * a["C"] * square
    return total


def _single_launch(a: dict[str, Any], present: int) -> float:
    n, c, width = (a[f"sizes.{axis}"] for axis in "NCA")
    head = 2.0 * n * c * width
    parts = ("parts.features", "parts.weight")
    products = 1 + 2 * (a["samples.epsilon"] is not None) + sum(a[p] is not None for p in parts)
    total = products * head
    if a["terms.covariance"] is not None:
        total += 2.0 * present * c * width**2
    if "statistics.mean" in a:
        total += 2.0 * n * width**2
    return total


OPERATIONS: dict[str, Callable[[dict[str, Any], int], float]] = {
    "class_pass_kernel": _class_pass,
    "class_pass_weight_kernel": lambda a, present: 2.0 * present * a["C"] * a["A"] ** 2,
    "rows_and_logits_kernel": _head_if("z"),
    "moments_and_sign_kernel": _head_if("sign"),
    "logits_kernel": _head(1, 2),
    "head_backward_kernel": _head_backward,
    "grad_variances_kernel": lambda a, present: 4.0 * len(a["residual"]) * a["C"] * a["A"],
    "tangent_kernel": _head(2, 3),
    "grad_epsilon_kernel": _head(2),
    "variances_step_kernel": lambda a, present: 6.0 * len(a["residual"]) * a["C"] * a["A"],
    "single_launch_kernel": _single_launch,
    "characteristics_kernel": lambda a, present: 2.0 * a["sizes.N"] ** 2 * a["sizes.A"],
}


def work_of(launch: Launch, present: int) -> Work:
    """The least work of one launch on a batch that shows `present` classes."""
    name, arguments = launch.kernel.fn.__name__, launch.leaves()
    total = 0.0
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and not _unread(name, argument, arguments):
            size = float(value.numel() * value.element_size())
            if argument in BY_CLASS.get(name, ()):
                size *= min(1.0, present / len(value))
            total += size * (2 if _both_ways(name, argument, arguments) else 1)
    count = OPERATIONS.get(name)
    return Work(total, count(arguments, present) if count else 0.0)


def _unread(name: str, argument: str, arguments: dict[str, Any]) -> bool:
    if name == "rows_and_logits_kernel":
        made_of = {"samples.features": "z", "labels.classes": "groups.order"}
        return argument in made_of and arguments.get(made_of[argument]) is None
    if name == "moments_and_sign_kernel":
        if argument.startswith(("samples.", "groups.")):
            return "moments.mean" not in arguments
        return argument == "labels.classes" and arguments["sign"] is None
    if name == "head_backward_kernel":
        has_quadratic = "quadratic.alpha.high" in arguments
        readers = {
            "labels.classes": has_quadratic or "sums_grid.rows" in arguments,
            "weight": has_quadratic or "features_grid.rows" in arguments,
            "samples.features": "weight_grid.rows" in arguments,
            "samples.epsilon": "weight_grid.rows" in arguments,
            "samples.sign": "weight_grid.rows" in arguments
            or arguments["results.epsilon"] is not None,
        }
        if argument in readers:
            return not readers[argument]
    return argument in UNREAD.get(name, ())


def _both_ways(name: str, argument: str, arguments: dict[str, Any]) -> bool:
    if (name, argument) == ("class_pass_kernel", "covariance"):
        return arguments["UPDATE"] in (1, 2)  # NONE only reads, OVERWRITE only writes
    if argument in ("partials.table", "partials.table_tangent"):
        return arguments["partials.total"] is not None  # where the last program adds them
    if name == "single_launch_kernel" and argument == "terms.covariance":
        return "statistics.mean" in arguments
    if name == "logits_kernel" and argument == "z":
        return arguments["losses"] is not None and not arguments["ALONE"]  # D in place of z̃
    if argument == "losses":
        return "reduction.loss" in arguments
    return argument in IN_PLACE.get(name, ())
