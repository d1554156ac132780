"""The README's examples train as they stand; `python -m bench.first_use` has eight seeds."""

import pytest

from bench.first_use import configured, readme_block, swapped

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_swap_trains(seed):
    assert swapped("iada", seed, epochs=25) > 80


@pytest.mark.parametrize("method", ["meta-iada", "isda"])  # ISDA not without the clipping
def test_the_settings_train(method):
    assert configured(method, seed=1, epochs=60) > 80


def test_an_example_that_diverges_is_seen(monkeypatch):
    """The loop without the clipping, at the rate and strength where it gave NaN."""
    code = readme_block("python").replace("alpha=0.1", "alpha=0.5")
    lines = [line for line in code.splitlines() if "clip_grad_norm_" not in line]
    monkeypatch.setattr("bench.first_use.readme_block", lambda language: "\n".join(lines))
    assert swapped("iada", 0, epochs=20) == 0
