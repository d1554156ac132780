"""What must not cost a night: a full disk, a diverged run, a foreign folder; and schedules."""

import copy
import os
import resource
import signal

import pytest
import torch

import iada
import iada.training.divergence
from iada.training.checkpoint import load_checkpoint, save_checkpoint
from iada.training.divergence import CHECK_EVERY, LossWatch
from iada.utils.loading import batches
from tests.helpers.training import CLASSES, differences, make_trainer


@pytest.fixture
def size_limit():
    """A function that limits the size of any file this process writes, as a full disk does."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_found_at_the_start(tmp_path, size_limit):
    trainer = make_trainer(tmp_path)
    steps = []
    trainer.method.cross_entropy_step = lambda batch: steps.append(batch)
    size_limit(4096)
    with pytest.raises(OSError, match="checkpoint: expected to write .*; free some space"):
        trainer.fit()
    assert steps == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_checkpoint(tmp_path, size_limit):
    whole = make_trainer(tmp_path / "whole")
    whole.fit()

    def fill_up(trainer, batch, result):
        if trainer.epoch == 3:
            size_limit(4096)

    part = make_trainer(tmp_path / "part", observe=fill_up)
    with pytest.raises(OSError, match="a former checkpoint there is intact"):
        part.fit()
    size_limit(resource.RLIM_INFINITY)
    assert load_checkpoint(tmp_path / "part" / "checkpoint.pt")["epoch"] == 3
    rest = make_trainer(tmp_path / "part")
    assert rest.resume()
    rest.fit()
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "part")]
    assert differences(*states) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_no_space_left_on_device(tmp_path):
    path = tmp_path / "checkpoint.pt"
    aside = tmp_path / f".checkpoint.pt.{os.getpid()}.part"
    aside.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device.*free some space"):
        save_checkpoint(path, {"step": torch.zeros(100)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_that_cannot_be_written_is_named(tmp_path):
    trainer = make_trainer(tmp_path, epochs=3)

    def replace_the_log(trainer, batch, result):
        if trainer.epoch == 2:
            (tmp_path / "log.csv").unlink(missing_ok=True)
            (tmp_path / "log.csv").symlink_to("/dev/full")

    trainer.observe = replace_the_log
    with pytest.raises(OSError, match="log.csv: expected to append a row, got .*; free some space"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 2


def test_workers_leave_ctrl_c_to_the_loop():
    class Handler(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return float(signal.getsignal(signal.SIGINT) == signal.SIG_IGN), 0

    inputs, *_ = next(iter(batches(Handler(), [[0, 1]], num_workers=1)))
    assert inputs.tolist() == [1.0, 1.0]


def test_an_error_in_the_data_names_the_step(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_set.data.labels[5] = 7
    with pytest.raises(ValueError, match=r"labels: expected class indices .* \(step \d, epoch 0\)"):
        trainer.fit()


def test_a_folder_that_cannot_be_written_is_found_at_the_start(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="folder: expected one that can be written at .*; choose"):
        make_trainer(blocked).fit()


def test_another_run_is_not_overwritten(tmp_path):
    make_trainer(tmp_path, epochs=3).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="folder: expected no checkpoint of another run"):
        make_trainer(tmp_path, epochs=3).fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_leftovers_of_a_kill_are_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.123.part").write_bytes(b"half")
    make_trainer(tmp_path, epochs=2).fit()
    names = ["checkpoint.previous.pt", "checkpoint.pt", "log.csv"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names


def test_a_checkpoint_holds_tensors_and_plain_values_only(tmp_path):
    make_trainer(tmp_path, optimizer="AdamW", optimizer_options={"betas": [0.9, 0.98]}).fit()
    torch.load(tmp_path / "checkpoint.pt", weights_only=True)


def test_a_last_step_that_ruins_the_parameters_is_not_saved(tmp_path):
    """Its loss, of before the step, is finite."""
    trainer = make_trainer(tmp_path, method="ce", ce_epochs=0, batch_size=44, warmup_epochs=0)

    def ruin(optimizer, arguments, options):
        with torch.no_grad():
            trainer.head.weight[0, 0] = torch.inf

    trainer.optimizer.register_step_post_hook(ruin)
    with pytest.raises(FloatingPointError, match=r"parameters that are not finite at step 0 "):
        trainer.fit()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["head"].values())


class Runs:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-checkpoint",)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "iada-checkpoint-2", "config": Runs()}, "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint: expected one written by iada"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "made-by-a-checkpoint").exists()


def test_a_stop_in_the_step_that_ruins_the_parameters_saves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, method="ce", ce_epochs=0)

    def ruin(optimizer, arguments, options):
        if trainer.batch == 2:
            os.kill(os.getpid(), signal.SIGINT)
            with torch.no_grad():
                trainer.head.weight[0, 0] = torch.inf

    trainer.optimizer.register_step_post_hook(ruin)
    with pytest.raises(FloatingPointError, match=r"parameters that are not finite at step 2 "):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["batch"] == 0


def test_an_omega_that_is_ruined_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, ce_epochs=0, batch_size=44, warmup_epochs=0)

    def ruin(own, batch, result):
        with torch.no_grad():
            own.method.perturbation.strength.bias.fill_(torch.nan)

    trainer.observe = ruin
    with pytest.raises(FloatingPointError, match=r"parameters that are not finite at step 0 "):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0


def test_the_last_epoch_is_saved_whatever_comes_between(tmp_path):
    make_trainer(tmp_path, method="ce", ce_epochs=0, epochs=5, checkpoint_every=3).fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 5


def test_a_loss_that_is_not_finite_stops_the_epoch(tmp_path):
    trainer = make_trainer(tmp_path)
    step, calls = trainer.method.cross_entropy_step, []

    def poisoned(batch):
        calls.append(0)
        return step(batch) * (torch.nan if len(calls) == 9 else 1)

    trainer.method.cross_entropy_step = poisoned
    with pytest.raises(FloatingPointError, match=r"got nan at step 8 \(epoch 1\); try a smaller"):
        trainer.fit()
    assert len(calls) == 9
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1


class Accelerator:
    """Stands in for a device: what was copied has arrived after so many questions."""

    def __init__(self, monkeypatch, delay):
        self.delay, self.reads = delay, 0

        class Losses(torch.Tensor):
            device = torch.device("cuda")

        class Event:
            def __init__(own, device):
                own.questions = 0

            def record(own):
                pass

            def query(own):
                own.questions += 1
                return own.questions > delay

        self.losses = torch.zeros(200).as_subclass(Losses)
        self.meta_losses = torch.full((200,), torch.nan).as_subclass(Losses)
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(
            torch, "empty_like", lambda part, **options: empty_like(part.as_subclass(torch.Tensor))
        )


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("bad", [0, 31, 32, 77])
def test_an_accelerator_is_not_waited_for(monkeypatch, delay, bad):
    device = Accelerator(monkeypatch, delay)
    watch = LossWatch(device.losses, device.meta_losses, 2, 1000, meta_from=None)
    device.losses[bad] = torch.inf

    done = 0

    def run():
        nonlocal done
        while done < 200:
            done += 1
            watch.look(done)

    with pytest.raises(FloatingPointError, match=rf"got inf at step {1000 + bad} \(epoch 2\)"):
        run()
    assert bad < done <= bad + 2 * (CHECK_EVERY + delay + 1)


def test_what_an_accelerator_did_last_is_seen_at_the_end(monkeypatch):
    device = Accelerator(monkeypatch, 1000)
    device.losses[5] = torch.nan
    watch = LossWatch(device.losses, device.meta_losses, 0, 0, meta_from=None)
    for done in range(1, 41):
        watch.look(done)
    with pytest.raises(FloatingPointError, match="at step 5 "):
        watch.finish(40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "Sgd"}, "optimizer: expected one of 'ASGD', .*got 'Sgd'"),
        ({"optimizer": "LBFGS"}, "optimizer: expected one of"),
        ({"optimizer_options": {"lr": 0.1}}, "optimizer_options: .*got 'lr'; set lr itself"),
        ({"optimizer_options": {"beta": 1}}, "optimizer_options: expected some of .*got 'beta'"),
        (
            {"optimizer": "Adam", "optimizer_options": {"betas": [0.9, 2.0]}},
            "optimizer_options: expected what torch.optim.Adam takes, .*Invalid beta",
        ),
        ({"optimizer_options": [1]}, "optimizer_options: expected a value of type dict"),
        ({"warmup_epochs": 6}, "warmup_epochs: expected less than epochs=6"),
        ({"warmup_epochs": -1.0}, "warmup_epochs: expected at least 0"),
        ({"schedule_each": "batch"}, "schedule_each: expected one of 'epoch', 'step'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


@pytest.mark.parametrize("other", ["model", "data"])
def test_another_model_or_data_set_changes_nothing(tmp_path, other):
    make_trainer(tmp_path).fit()
    trainer = make_trainer(tmp_path)
    if other == "model":
        trainer.backbone[-1] = torch.nn.Linear(8, 5)  # what comes before it would load
    else:
        trainer.method.memory = iada.TrainingMemory(CLASSES, 43)
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match="checkpoint: expected the model and data of this run"):
        trainer.resume()
    assert differences(trainer.state_dict(), before) == []
