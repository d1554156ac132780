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
    "group_rows_kernel": ("count",),
    "moments_kernel": ("mean", "covariance"),
    "softmax_kernel": ("z",),
    "curvature_kernel": ("tangent",),
    "variances_step_kernel": ("covariance",),
    "single_launch_kernel": ("covariance", "mean", "count"),
}
# Their first axis is the class, and classes without rows are left alone.
BY_CLASS = {
    "moments_kernel": ("mean", "center", "shift", "covariance"),
    "class_pass_kernel": ("covariance", "partials", "tangent_partials", "center", "shift"),
    "class_pass_weight_kernel": ("covariance", "curvature"),
    "add_partials_kernel": ("partials", "table"),
    "variances_step_kernel": ("covariance",),
    "single_launch_kernel": ("covariance", "mean", "part_weight", "part_sums", "part_covariance"),
    "single_launch_backward_kernel": ("part_weight", "part_sums", "part_covariance"),
}


def _head(products: int, extra: str = "", extra_products: int = 0) -> Callable[..., float]:
    """2·N·C·A for each product of the head; more where the argument `extra` is given."""

    def count(a: dict[str, Any], present: int) -> float:
        more = extra_products if extra and a.get(extra) is not None else 0
        return 2.0 * (products + more) * a["N"] * a["C"] * a["A"]

    return count


def _class_pass(a: dict[str, Any], present: int) -> float:
    """Σ is symmetric: each product with it, or onto it, is half of a full one."""
    rows, square = 0 if a["features"] is None else len(a["features"]), float(a["A"]) ** 2
    products = 2 if a["tangent"] is not None else 1
    total = rows * square
    if a["TABLE"]:
        total += products * present * a["C"] * square
    if a["curvature"] is not None:
        total += products * present * a["C"] * square
    return total


def _single_launch(a: dict[str, Any], present: int) -> float:
    n, c, width = a["N"], a["C"], a["A"]
    head = 2.0 * n * c * width
    parts = ("part_features", "part_weight")
    products = 1 + 2 * (a["epsilon"] is not None) + sum(a[name] is not None for name in parts)
    total = products * head
    if a["covariance"] is not None:
        total += 2.0 * present * c * width**2
    if a["mean"] is not None:
        total += 2.0 * n * width**2
    return total


OPERATIONS: dict[str, Callable[[dict[str, Any], int], float]] = {
    "class_pass_kernel": _class_pass,
    "class_pass_weight_kernel": lambda a, present: 2.0 * present * a["C"] * a["A"] ** 2,
    "logits_kernel": _head(1, "variances", 2),
    "sign_kernel": _head(1),
    "grad_features_kernel": _head(1),
    "grad_weight_kernel": _head(1, "variances", 1),
    "grad_variances_kernel": _head(2),
    "tangent_kernel": _head(2, "variances", 3),
    "grad_epsilon_kernel": _head(2),
    "variances_step_kernel": _head(3),
    "single_launch_kernel": _single_launch,
    "characteristics_kernel": lambda a, present: 2.0 * a["N"] ** 2 * a["A"],
}


def work_of(launch: Launch, present: int) -> Work:
    """The least work of one launch on a batch that shows `present` classes."""
    name, arguments = launch.kernel.fn.__name__, launch.arguments
    total = 0.0
    for argument, value in arguments.items():
        if isinstance(value, Tensor):
            size = float(value.numel() * value.element_size())
            if argument in BY_CLASS.get(name, ()):
                size *= min(1.0, present / len(value))
            total += size * (2 if _both_ways(name, argument, arguments) else 1)
    count = OPERATIONS.get(name)
    return Work(total, count(arguments, present) if count else 0.0)


def _both_ways(name: str, argument: str, arguments: dict[str, Any]) -> bool:
    if (name, argument) == ("class_pass_kernel", "covariance"):
        return arguments["UPDATE"] in (1, 2)  # NONE only reads, OVERWRITE only writes
    if name == "single_launch_kernel" and argument == "covariance":
        return arguments["mean"] is not None
    return argument in IN_PLACE.get(name, ())
