"""What launchers work out on the host, and how often."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.compiler import CompiledKernel

from bench.offline.combinations import Combination, recorded_launches
from iada_kernels.contract import LossNeeds
from iada_kernels.triton import config, launch
from iada_kernels.triton.config import cdiv, next_power_of_2


def test_sizes_are_cut_as_triton_cuts_them():
    for size in (1, 2, 3, 4, 5, 31, 32, 33, 1000, 2**20, 2**20 + 1):
        assert next_power_of_2(size) == triton.next_power_of_2(size)
        assert [cdiv(size, b) for b in (1, 3, 64)] == [triton.cdiv(size, b) for b in (1, 3, 64)]
    assert cdiv(0, 64) == 0


def test_a_device_is_asked_once_what_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0)
    )
    devices = [torch.device("cuda", index) for index in (6, 7, 6, 7)]
    try:
        assert {launch._architecture(device) for device in devices} == {"sm_90"}
    finally:
        launch._architecture.cache_clear()
    assert asked == devices[:2]


class Binary(CompiledKernel):
    """Loaded, it tells what it keeps of each thread in memory."""

    module = None

    def __init__(self, spills: int, backend: str = "cuda") -> None:
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))
        self.n_spills, self.loaded = spills, 0

    def __getitem__(self, grid: tuple[int, ...]) -> None:
        self.loaded += 1


@pytest.mark.parametrize(("first", "second", "taken"), [(2, 0, 1), (9, 4, 1), (4, 4, 0), (2, 8, 0)])
def test_what_keeps_less_in_memory_is_launched(first, second, taken):
    binaries = Binary(first), Binary(second)
    found = launch.keeping_less(binaries[0], lambda: binaries[1])
    assert found is binaries[taken]
    assert binaries[1].loaded == 1


def test_nothing_is_compiled_again_without_need():
    def again():
        raise AssertionError("compiled again")

    for binary in (Binary(0), Binary(3, backend="hip"), SimpleNamespace(n_spills=3), None):
        assert launch.keeping_less(binary, again) is binary


GPUS = {
    "sm_80": config.AMPERE,
    "sm_89": config.AMPERE,
    "sm_90": config.NVIDIA,
    "sm_100": config.BLACKWELL,
    "sm_103": config.BLACKWELL,
    "sm_120": config.BLACKWELL_RTX,
    "gfx90a": config.AMD,
}


@pytest.mark.parametrize("architecture", GPUS)
def test_sums_in_float64_have_small_tiles(architecture):
    assert config.configuration_for(architecture) is GPUS[architecture]
    for name, tile in vars(GPUS[architecture]).items():
        if isinstance(tile, config.Tile):
            assert tile.of(torch.float64).rows <= 32, name
            assert tile.of(torch.float32) is tile


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "is_large"),
    [
        (64, 640, torch.float32, True),
        (63, 640, torch.float32, False),
        (64, 650, torch.float32, False),
        (64, 640, torch.float64, False),
    ],
)
@pytest.mark.parametrize("kernel", ["class_pass", "diagonal_logits", "diagonal_weight"])
def test_which_results_have_large_tiles(kernel, rows, width, dtype, is_large):
    hopper = config.NVIDIA
    expected = getattr(hopper.large if is_large else hopper, kernel).of(dtype)
    assert hopper.tile_of(kernel, rows, width, dtype) == expected
    assert expected.rows == 64 or not is_large
    for other in {*GPUS.values()} - {hopper}:
        assert other.tile_of(kernel, rows, width, dtype) == getattr(other, kernel).of(dtype)


@pytest.mark.parametrize(
    ("architecture", "width", "dtype", "is_single"),
    [
        ("sm_90", 64, "float32", True),
        ("sm_90", 63, "float32", False),
        ("sm_90", 16, "float64", True),
        ("sm_100", 64, "float32", True),
        ("sm_100", 16, "float64", False),
        ("sm_120", 64, "float32", True),
        ("sm_120", 16, "float64", False),
    ],
)
def test_which_heads_a_single_launch_serves(architecture, width, dtype, is_single):
    c = Combination(
        rows=64, classes=100, width=width, features=dtype, weight=dtype, covariance=dtype,
        structure="full", streams=False, terms=(), needs=LossNeeds(*(True,) * 4, False, False),
        reduction="mean", matmul="highest", other="update", neighbours=0,
    )  # fmt: skip
    kernels = {launch.kernel.fn.__name__ for _, launch in recorded_launches(c, architecture)}
    assert ("single_launch_kernel" in kernels) == is_single
