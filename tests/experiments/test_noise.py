"""Wrong labels: to which classes they go, and draws that fall on an edge."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from iada.experiments.scenarios.noise import _drawn, transition


def given(chances):
    """A generator that draws these."""
    return SimpleNamespace(random=lambda count: np.array(chances))


@pytest.mark.parametrize(("kind", "targets"), [("flip", 1), ("flip2", 2)])
def test_a_class_may_turn_into_any_other(kind, targets):
    tables = [transition(kind, 0.4, 4, np.random.default_rng(seed)) for seed in range(60)]
    for table in tables:
        np.testing.assert_allclose(table.sum(axis=1), 1)
        assert (np.diag(table) == 0.6).all()
        assert ((table == 0.4 / targets).sum(axis=1) == targets).all()
    assert (np.mean(tables, axis=0) > 0).all()  # by chance one in 10⁹ is missed


def test_a_draw_on_an_edge_is_the_class_above_it():
    table = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    drawn = _drawn(labels, table, given([0.0, 0.5, 0.75, 0.49, 0.0, 0.5, 0.25]))
    assert drawn.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_sums_that_fall_short_of_one_leave_no_gap():
    rounded = np.full((10, 10), 0.1)
    largest = 1 - 2.0**-53  # that a generator draws
    assert rounded[0].cumsum()[-1] <= largest
    assert _drawn(torch.tensor([3]), rounded, given([largest])).tolist() == [9]
