"""The global random generators of torch, Python and numpy: saved, restored, and seeded by place.

A data set that draws from them (an augmentation) is given, before each sample, a seed that is a
function of (seed, step, sample). Its draws then do not depend on the number of workers or
processes, nor on where a run was stopped, and leave the generators of the training loop alone.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits that depends on every one of `numbers`."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_host(seed: int) -> None:
    """Seed the CPU generators: torch's default, Python's `random`, and numpy's legacy global."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what augmentations draw from


def seed_all(seed: int, device: torch.device) -> None:
    """The same, and CUDA's generator on `device` if it is one of CUDA's."""
    seed_host(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def capture(device: torch.device) -> dict[str, Any]:
    """The state of the CPU generators, and of CUDA's on `device`; loads with weights_only."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `capture`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn or seeded inside leaves the CPU generators as they were."""
    host = torch.device("cpu")
    state = capture(host)
    try:
        yield
    finally:
        restore(state, host)
