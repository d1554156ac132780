"""What launchers work out on the host, and how often."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from iada_kernels.triton import launch
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
