"""What `python -m bench.low_rank` prints."""

import sys

import torch

from bench import low_rank
from iada.experiments.datasets.features import write_features
from iada.experiments.datasets.labelled import Labelled
from iada_kernels.environment import environment


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.low_rank", *map(str, arguments)])
    assert low_rank.main() == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert f"diag and full = {environment()['backend']}; rank r = torch operators" in lines[:2]
    header, _, *rows = lines[3:]
    return header, [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_times_of_each_structure(monkeypatch, capsys):
    sizes = ("--samples", 8, "--classes", 5, "--width", 6, "--ranks", 0, 2, "--rounds", 1)
    header, rows = printed(monkeypatch, capsys, *sizes)
    assert header == "| Σ | MB | update, ms | loss and gradients, ms |"
    assert [row[0] for row in rows] == ["diag", "full", "rank 0", "rank 2"]
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
    _, rows = printed(monkeypatch, capsys, *sizes, "--most-gigabytes", 0)
    assert "full" not in [row[0] for row in rows]


def test_errors_stay_within_their_bounds(monkeypatch, capsys, tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    part = Labelled(inputs, torch.arange(300) % 3, ("a", "b", "c"))
    write_features(tmp_path / "features.npz", {"train": part, "test": part}, {})
    _, rows = printed(
        monkeypatch, capsys, "--features", tmp_path / "features.npz", "--ranks", 1, 3, 6
    )
    for rank, *cells in rows:
        left, error, bound, off, off_bound = map(float, cells)
        assert error <= bound + 1e-5, rank
        assert off <= off_bound + 1e-5, rank
        assert (left < 1e-5) == (rank == "6")
