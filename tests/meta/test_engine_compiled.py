"""A compiled backbone: one opaque node in the graph, so that ḣ comes from finite differences."""

import logging

import pytest
import torch
from torch._functorch import config

from tests.helpers.engine_cases import hypergradients, make_batches, make_engine, relative

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def compiled(backbone, head):
    backbone.compile(backend="aot_eager")


@pytest.mark.parametrize("name", ["transformer", "resnet"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_goes_by_differences_and_says_so(name, low_memory, caplog):
    torch._dynamo.reset()
    batches = make_batches(name)
    # As docs/own-loop.md tells people to, where a graph is kept for a second backward.
    donated = config.patch(donated_buffer=low_memory)
    with donated, caplog.at_level(logging.WARNING, "iada"):
        meta = make_engine(name, prepare=compiled, low_memory=low_memory)
        found = hypergradients(meta, *batches)
        meta.step(*batches)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "iada")
    assert "finite differences" in said
    assert "CompiledFunctionBackward" in said
    plain = make_engine(name, hypergradient="finite-difference", low_memory=low_memory)
    errors = relative(found, hypergradients(plain, *batches))
    assert max(errors.values()) < 1e-6, errors
    oracle = make_engine(name, hypergradient="double-backward")
    errors = relative(found, hypergradients(oracle, *batches))
    assert max(errors.values()) < 1e-3, errors
    plain.step(*batches)
    for buffer, expected in zip(
        meta.classifier.backbone.buffers(), plain.classifier.backbone.buffers(), strict=True
    ):
        torch.testing.assert_close(buffer, expected)
