"""The short tables that `python -m bench.gpu` prints last."""

from typing import Any

from bench.gpu.device import Ceilings

COLUMNS = ("eager", "eager_compiled", "torch", "torch_compiled", "triton", "triton_loss")


def table(shapes: dict[str, dict[str, Any]], ceilings: Ceilings) -> str:
    lines = [
        f"copy {ceilings.bytes / 1e12:.2f} TB/s, float32 {ceilings.float32 / 1e12:.1f} and TF32 "
        f"{ceilings.tf32 / 1e12:.1f} Tflop/s"
    ]
    for mode, title in (
        ("launched", "launch by launch, ms"),
        ("replayed", "CUDA graph replays, ms"),
    ):
        if any(mode in found for found in shapes.values()):
            lines += ["", *_times(shapes, mode, title)]
    return "\n".join([*lines, "", *_kernels(shapes)])


def _times(shapes: dict[str, dict[str, Any]], mode: str, title: str) -> list[str]:
    lines = [
        f"| {title} | eager | compiled | torch | compiled | triton | its loss | cross-entropy "
        "| eager / triton | compiled torch / triton | triton / cross-entropy |",
        "|---|" + "---:|" * 10,
    ]
    for name, found in shapes.items():
        ms, by_triton = _merged(found, mode, "ms"), _merged(found, mode, "by_triton")
        cells = [_number(ms.get(side), "{:.3f}") for side in (*COLUMNS, "cross_entropy")]
        cells += [_number(by_triton.get(side), "{:.1f}×") for side in ("eager", "torch_compiled")]
        floor = by_triton.get("cross_entropy")
        cells.append(_number(1 / floor if floor else None, "{:.2f}×"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _merged(found: dict[str, Any], mode: str, what: str) -> dict[str, float]:
    """A compiled contestant's figures come from its own rounds; Triton's from the first."""
    merged: dict[str, float] = {}
    for key in ("with_eager_compiled", "with_torch_compiled"):
        merged |= found.get(key, {}).get(mode, {}).get(what, {})
    return merged | found.get(mode, {}).get(what, {})


def _kernels(shapes: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| kernels | µs | share of the ceiling | bound by |", "|---|---:|---:|---|"]
    for name, found in shapes.items():
        for row in found.get("kernels") or []:
            lines.append(
                f"| {name} {row['kernel']} | {1e3 * row['ms']:.1f} | {row['share']:.0%} "
                f"| {row['bound']} |"
            )
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
