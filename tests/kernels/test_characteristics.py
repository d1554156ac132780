"""The characteristics of a batch: every backend against the definition."""

import re
from pathlib import Path

import pytest
import torch

import iada_kernels
from iada_kernels import reference, select_backend
from tests.helpers.problems import max_norm

SIZES = [(12, 4, 5), (1, 3, 2), (2, 1, 3), (33, 100, 17), (130, 10, 64), (6, 70, 1), (0, 3, 4)]


def draw(count, num_classes, width, scale=1.0):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(num_classes, (count,), generator=generator)
    return (
        normal(count, width),
        scale * normal(count, num_classes),
        labels,
        normal(num_classes, width),
    )


def on(device, arguments, dtype=torch.float64):
    return [t.to(device, dtype if t.is_floating_point() else t.dtype) for t in arguments]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("neighbours", [1, 5])
def test_backends_equal_the_definition(target, size, neighbours):
    arguments = on(target.device, draw(*size))
    passes = select_backend(target.backend, target.device)
    before = [t.clone() for t in arguments]
    found = passes.characteristics(*arguments, neighbours)
    expected = reference.batch_characteristics(*arguments, neighbours)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(old, new) for old, new in zip(before, arguments, strict=True))


def test_rows_in_blocks(target, block_elements):
    block_elements(64)
    arguments = on(target.device, draw(33, 5, 4))
    found = select_backend(target.backend, target.device).characteristics(*arguments, 3)
    torch.testing.assert_close(found, reference.batch_characteristics(*arguments, 3))


def test_the_product_does_not_import_the_definitions():
    """Else a backend would be compared with itself."""
    root = Path(iada_kernels.__file__).parent.parent
    for package in ("iada", "iada_kernels"):
        for path in (root / package).rglob("*.py"):
            if path.parent.name != "reference":
                imports = re.search(r"iada_kernels(\.| import.*\b)reference\b", path.read_text())
                assert imports is None, path


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_single_precision_is_as_good_as_torch(target, scale):
    arguments = on(target.device, draw(64, 10, 16, scale), torch.float32)
    exact = reference.batch_characteristics(*on(target.device, arguments), 5)
    own = reference.batch_characteristics(*arguments, 5)
    found = select_backend(target.backend, target.device).characteristics(*arguments, 5)
    assert found.dtype == torch.float32
    for column in range(8):
        error = max_norm(found[:, column].double() - exact[:, column])
        allowed = 4 * max_norm(own[:, column].double() - exact[:, column])
        floor = 2**-22 * max_norm(exact[:, column])
        assert error <= max(allowed, floor), (column, error, allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(target, dtype):
    features, logits, labels, weight = on(target.device, draw(20, 5, 8), dtype)
    passes = select_backend(target.backend, target.device)
    found = passes.characteristics(features, logits, labels, weight, 4)
    single = (features.float(), logits.float(), labels, weight.float())
    torch.testing.assert_close(found, passes.characteristics(*single, 4), rtol=0, atol=0)


def test_extremes_stay_finite(target):
    features, logits, labels, weight = on(target.device, draw(4, 3, 2), torch.float32)
    features[0], weight[1] = 0, 0
    logits[1] = torch.tensor([1e4, -1e4, 0.0])
    labels[1], labels[2] = 1, 1
    found = select_backend(target.backend, target.device).characteristics(
        features, logits, labels, weight, 2
    )
    assert torch.isfinite(found).all()
    expected = reference.batch_characteristics(features, logits, labels, weight, 2)
    torch.testing.assert_close(found[:, :7], expected[:, :7])
