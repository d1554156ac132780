"""Fixtures shared by the suite: the backends that serve here, and small block sizes."""

import os
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings

from tests.helpers.poison import poison_fresh_memory

if not torch.cuda.is_available():  # before triton is imported, which looks once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from iada_kernels import BACKENDS, select_backend
from iada_kernels.dispatch import HAS_TRITON, INTERPRETED

settings.register_profile("suite", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("suite")


POISONED = ("kernels", "nn")  # folders of tests


class Target(NamedTuple):
    """A backend and the device it is tried on."""

    backend: str
    device: torch.device


def _serves(backend: str, device: torch.device) -> bool:
    try:
        select_backend(backend, device)
    except RuntimeError:
        return False
    return True


def _targets() -> list[Target]:
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    found = [Target(name, torch.device(kind)) for name in BACKENDS for kind in devices]
    return [target for target in found if _serves(*target)]


# Session scope, so that hypothesis accepts it next to @given.
@pytest.fixture(scope="session", params=_targets(), ids=lambda t: f"{t.backend}-{t.device}")
def target(request) -> Target:
    """Every backend of this build, on every device of this machine that it serves."""
    return request.param


def is_interpreted(target: Target) -> bool:
    return target.backend == "triton" and target.device.type == "cpu"


# Triton's interpreter is too slow for hundreds of drawn problems: test_triton.py draws fewer.
@pytest.fixture(
    scope="session",
    params=[target for target in _targets() if not is_interpreted(target)],
    ids=lambda t: f"{t.backend}-{t.device}",
)
def compiled_target(request) -> Target:
    """`target` without what is interpreted."""
    return request.param


def pytest_collection_modifyitems(items) -> None:
    """What is interpreted is slow, and what runs on CUDA needs a GPU."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for target in parameters:
            if isinstance(target, Target) and is_interpreted(target):
                item.add_marker(pytest.mark.slow)
            elif isinstance(target, Target) and target.device.type == "cuda":
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Interpreted kernels in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        if HAS_TRITON and INTERPRETED:
            from tests.helpers.interpreter import patch_language_once

            patch_language_once(patch)
        yield


@pytest.fixture(scope="session")
def backend(target: Target) -> str:
    return target.backend


@pytest.fixture(scope="session")
def device(target: Target) -> torch.device:
    return target.device


@pytest.fixture(scope="module")
def one_thread():
    """Many small operators: threads that wait for each other cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Module scope, so that hypothesis accepts it next to @given.
@pytest.fixture(scope="module", autouse=True)
def poison(request):
    """In tests of the kernels and of what calls them, fresh memory starts as NaN."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in POISONED:
            poison_fresh_memory(patch)
        yield


@pytest.fixture
def block_elements(monkeypatch):
    """A function that sets the block size of the torch operators."""

    def set_size(size: int) -> None:
        # Other modules import the constant by name.
        for name, module in list(sys.modules.items()):
            if name.startswith("iada_kernels.torch_ops") and hasattr(module, "BLOCK_ELEMENTS"):
                monkeypatch.setattr(module, "BLOCK_ELEMENTS", size)

    return set_size
