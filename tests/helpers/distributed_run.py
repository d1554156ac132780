"""What tests/training/test_distributed.py launches with torchrun: each rank runs all of it.

Usage: distributed_run.py FOLDER METHOD...
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import iada
from iada.experiments.diagnostics import TermsLog
from iada.experiments.epsilon_log import EpsilonLog
from iada.experiments.watch import Watch
from iada.training.first_phase import first_phase_state, start_from
from iada.training.measures import EpochMeasures
from iada.utils.distributed import (
    add_up,
    any_rank,
    average,
    broadcast,
    broadcast_object,
    by_first,
    current_group,
    gather_objects,
    gather_rows,
    launched_group,
    own_part,
    rank_of,
    row_counts,
    told_by_first,
)
from tests.helpers.processes import held_by_another_process
from tests.helpers.training import differences, make_data, make_trainer

DTYPES = (torch.float32, torch.float64)


def check_helpers(group):
    """Rank 0 has three rows, rank 1 two; each row holds its place."""
    rank = rank_of(group)
    part = own_part(5, group)
    assert part == (slice(0, 3), slice(3, 5))[rank]
    counts = row_counts(part.stop - part.start, group)
    assert counts == [3, 2]
    assert any_rank(rank == 1, group)
    assert not any_rank(False, group)
    for dtype in (*DTYPES, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        whole = torch.arange(10).view(5, 2).to(dtype)
        own = whole[part].clone()
        assert torch.equal(gather_rows(own, counts, group), whole)
        assert torch.equal(own, whole[part])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    means = [values[part].mean(), values[part].mean().double(), values[part].mean().bfloat16()]
    transposed = torch.full((2, 3), float(rank)).t()
    average([*means, transposed], counts, group)
    assert [round(float(mean), 5) for mean in means] == [3, 3, 3]
    assert torch.allclose(transposed, torch.full((3, 2), 0.4))
    total = [torch.tensor([rank + 1]), torch.tensor([0.5])]
    add_up(total, group)
    assert [float(t) for t in total] == [3, 1]
    copied = [torch.tensor([rank + 7]), torch.tensor([rank + 0.5, 2.0])]
    broadcast(copied, group)
    assert [t.tolist() for t in copied] == [[7], [0.5, 2.0]]
    assert gather_objects(f"rank {rank}", group) == ["rank 0", "rank 1"]
    assert broadcast_object({"rank": rank}, group) == {"rank": 0}


def check_measures(group):
    """Counts of both ranks, in the summary and in the state; loaded, they are not doubled."""
    rank = rank_of(group)
    measures = EpochMeasures(2, 2)
    one = torch.tensor(1.0)
    epsilon = torch.tensor([[0.5, -0.5, 0.5], [0.5, 0.25, 0.5]])[rank]
    measures.record(0, iada.MetaStep(one, one, epsilon), torch.tensor([0, 0, rank]))
    want = measures.summary(None, group)
    assert want["adversarial_share"] == pytest.approx([0.8, 1.0])
    assert sum(want["epsilon_histogram"]) == 6
    state = broadcast_object(measures.whole_state(group), group)
    assert state["visits"].tolist() == [5, 1]
    other = EpochMeasures(2, 2)
    other.load_state_dict(state)
    if rank > 0:
        other.forget_counts()
    assert other.summary(None, group) == want


def check_watch(group):
    """The state is what both ranks saw; loaded, it is the first's, so that it is counted once."""
    rank = rank_of(group)
    labels = torch.tensor([0, 0, 1])
    watch = Watch(TermsLog(), EpsilonLog(labels, None, 2, epochs=1))
    rows = (torch.tensor([0, 2]), torch.tensor([1]))[rank]
    result = iada.MetaStep(torch.zeros(()), torch.zeros(()), torch.full((len(rows),), 0.5))
    watch.epsilon(SimpleNamespace(epoch=0, method=None), (None, labels[rows], rows), result)
    watch.terms.load_state_dict({"sums": {0: torch.tensor([1.0, 2.0, 3.0, 1.0]) * (rank + 1)}})
    for _ in range(2):  # saved and loaded, nothing changes
        saved = watch.state_dict()
        assert saved["epsilon"]["visits"].sum() == 3
        assert saved["terms"]["sums"][0].tolist() == [3, 6, 9, 3]
        watch.load_state_dict(saved)
    watch.gather()
    assert watch.epsilon.visits.sum() == 3
    assert watch.terms.summary() == [
        {"epoch": 0, "generalization": 1.0, "robustness": 2.0, "fairness": 3.0}
    ]


def check_by_first(group):
    """What the first gives, all have; what it raises, all raise, and one of them shows."""
    rank = rank_of(group)
    assert by_first(lambda: f"of {rank}", group) == "of 0"

    def fail():
        raise ValueError(f"of {rank}")

    with pytest.raises(ValueError, match="of 0") as caught:
        by_first(fail, group)
    assert told_by_first(caught.value) == (rank > 0)


def check_dropout_after_the_first_phase(group):
    """Each rank draws its own masks."""
    trainer = make_trainer()
    start_from(trainer, broadcast_object(first_phase_state(trainer), group))
    first, second = gather_objects(torch.get_rng_state(), group)
    assert not torch.equal(first, second)


def check_errors_of_the_first(folder, group):
    """A folder that the first rank cannot take ends the run on both."""
    with held_by_another_process(folder) if rank_of(group) == 0 else nullcontext():
        gather_objects("held", group)
        with pytest.raises(ValueError, match="folder: expected one that no other process"):
            make_trainer(folder, epochs=2, method="ce").fit()
    (folder / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged or foreign"):
        make_trainer(folder, epochs=2, method="ce").resume()


def state(trainer):
    """What all ranks must share, bit for bit."""
    names = ("backbone", "head", "optimizer", "scheduler", "method", "measures", "history")
    whole = trainer.state_dict()
    return {name: whole[name] for name in names}


def check_alike(trainer):
    first, second = gather_objects(state(trainer), trainer.group)
    assert differences(first, second) == []


def stop_on_the_second_rank(trainer, batch, result):
    if (trainer.epoch, trainer.batch, rank_of(trainer.group)) == (3, 1, 1):
        os.kill(os.getpid(), signal.SIGTERM)


def check_stop_and_resume(folder, method, whole):
    """A signal to one rank stops both after the same step, and the run goes on as if not."""
    with pytest.raises(KeyboardInterrupt, match="stopped at epoch 3"):
        make_trainer(folder, observe=stop_on_the_second_rank, method=method).fit()
    rest = make_trainer(folder, method=method)
    assert rest.resume()
    assert (rest.epoch, rest.batch) == (3, 2)
    rest.fit()
    assert differences(state(rest), state(whole)) == []


def main(folder, methods):
    group = current_group()
    check_helpers(group)
    check_measures(group)
    check_watch(group)
    check_by_first(group)
    check_errors_of_the_first(folder / "held", group)
    check_dropout_after_the_first_phase(group)
    for method in methods:
        for dtype in DTYPES:
            kind = str(dtype).removeprefix("torch.")
            trainer = make_trainer(
                folder / f"{method}-{kind}", dropout=0.0, dtype=dtype, method=method, clip_norm=0.5
            )
            trainer.fit()
            check_alike(trainer)
    whole = make_trainer(folder / "whole", method=methods[-1])  # dropout: each rank its own masks
    whole.fit()
    check_stop_and_resume(folder / "part", methods[-1], whole)
    for method in ("meta-iada", "ce"):
        normalised = make_trainer(method=method, epochs=3, batch_norm=True)
        normalised.fit()
        check_alike(normalised)
    with pytest.raises(ValueError, match="method: expected one process for"):
        make_trainer(method="cmo")
    with pytest.raises(ValueError, match="batch_size: expected a row for each of 2 processes"):
        make_trainer(method="ce", batch_size=1)
    wrapped = torch.nn.parallel.DistributedDataParallel(normalised.backbone)
    with pytest.raises(ValueError, match="backbone: expected a plain module, got Distributed"):
        iada.Trainer(wrapped, normalised.head, make_data(), None, normalised.config)
    print(f"rank {rank_of(group)} done")


if __name__ == "__main__":
    with launched_group():
        assert dist.is_initialized()
        main(Path(sys.argv[1]), sys.argv[2:])
