"""Two processes under torchrun give what one gives with the whole batch."""

import json

import pytest
import torch

from iada.training.checkpoint import load_checkpoint
from iada.utils.distributed import average, current_group, gather_rows, own_part, row_counts
from tests.helpers.launch import ROOT, torchrun
from tests.helpers.training import make_trainer

pytestmark = pytest.mark.distributed

METHODS = (
    "ce",
    "meta-iada",
    "logit-adjustment",
    "ldam-drw",
    "metasaug",
    "meta-weight-net",
    "group-dro",
    "risda",
    "isda",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes trained by every method, having made their own checks."""
    folder = tmp_path_factory.mktemp("two")
    output = torchrun(ROOT / "tests/helpers/distributed_run.py", folder, *METHODS)
    assert "rank 0 done" in output
    assert "rank 1 done" in output
    return folder


def tensors(state):
    """Parameters, and all that the method keeps: Ω, Σ, weights of groups, …"""
    parts = {name: state[name] for name in ("backbone", "head", "method")}
    return dict(_floating(parts))


def _floating(values, name=""):
    for key, value in values.items():
        path = f"{name}.{key}"
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield path, value.double()
        elif isinstance(value, dict):
            yield from _floating(value, path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
def test_two_processes_train_as_one(folder, tmp_path, method, kind, tolerance):
    one = make_trainer(
        tmp_path, dropout=0.0, dtype=getattr(torch, kind), method=method, clip_norm=0.5
    )
    one.fit()
    want = tensors(load_checkpoint(tmp_path / "checkpoint.pt"))
    got = tensors(load_checkpoint(folder / f"{method}-{kind}" / "checkpoint.pt"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        tensor, found = tensor.nan_to_num(), got[name].nan_to_num()
        error = (found - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12)
        assert error <= tolerance, name
    history = load_checkpoint(folder / f"{method}-{kind}" / "checkpoint.pt")["history"]
    for have, record in zip(history, one.history, strict=True):
        assert have["loss"] == pytest.approx(record["loss"], rel=2e-5)


def test_one_process_takes_up_the_run_of_two(folder):
    rest = make_trainer(folder / "isda-float32", dropout=0.0, method="isda", clip_norm=0.5)
    assert rest.resume()
    assert rest.epoch == 6


def test_one_row_an_epoch_by_the_first_rank_alone(folder):
    lines = (folder / "isda-float32" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", *"012345"]


def test_the_command_line_under_torchrun(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        '[data]\nkind = "digits"\n[model]\nhidden = [16]\n'
        '[trainer]\nmethod = "isda"\nepochs = 3\nce_epochs = 1\nbatch_size = 33\nlr = 0.05\n'
    )
    out = tmp_path / "run"
    text = torchrun("-m", "iada", "train", "--config", config, "--out", out)
    assert text.count("balanced test accuracy") == 1
    assert len(json.loads((out / "result.json").read_text())["history"]) == 3


def test_without_a_group_all_is_the_identity():
    assert current_group() is None
    assert own_part(5, None) == slice(0, 5)
    assert row_counts(5, None) == [5]
    rows = torch.randn(5, 2, requires_grad=True)
    gathered = gather_rows(rows, [5], None)
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad
    value = torch.tensor([3.0])
    average([value], [5], None)
    assert value == 3
