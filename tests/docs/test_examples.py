"""The examples run, and learn; where their packages are installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.training import differences

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop():
    program = [sys.executable, str(EXAMPLES / "plain_loop.py")]
    output = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    accuracy = re.search(r"test accuracy ([\d.]+)", output)
    assert float(accuracy[1]) > 0.7  # by chance 0.25
    harder = re.search(r"right labels ([\d.]+), wrong labels ([\d.]+)", output)
    assert float(harder[1]) > float(harder[2])  # mislabelled samples are made easier more often


def test_lightning_module(tmp_path):
    pytest.importorskip("lightning")
    example = load("lightning_module")
    trainer = example.main(str(tmp_path), epochs=4)
    assert trainer.callback_metrics["accuracy"] > 0.7
    steps = trainer.global_step
    assert steps == 4 * trainer.num_training_batches  # Meta-IADA's steps are counted
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    more = example.main(str(tmp_path), epochs=6, resume=str(checkpoint))
    assert more.global_step == 6 * more.num_training_batches
    count = more.lightning_module.meta.covariance.count
    assert int(count.sum()) == 6 * more.num_training_batches * 50  # Σ's statistics went on
    assert int(more.lightning_module.meta.memory.epochs) == 6


def test_lightning_settings(monkeypatch):
    """bfloat16 reaches the passes; what would be something else is refused."""
    pytest.importorskip("lightning")
    example = load("lightning_module")
    modes = set()
    forward = torch.nn.Linear.forward

    def noted(layer, inputs):
        if layer.training:
            modes.add(torch.is_autocast_enabled("cpu"))
        return forward(layer, inputs)

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    options = {"epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    example.main(**options, precision="bf16-mixed")
    assert True in modes
    with pytest.raises(Exception, match="accumulation is not supported for manual optimization"):
        example.main(**options, accumulate_grad_batches=4)
    monkeypatch.setattr(example.L.Trainer, "precision", "16-mixed")
    with pytest.raises(ValueError, match="^precision: expected .* pass precision='bf16-mixed'"):
        example.main(**options)


@pytest.fixture
def hf_trainer():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return load("hf_trainer")


@pytest.mark.parametrize("options", [{}, {"bf16": True, "use_cpu": True}], ids=str)
def test_hf_trainer(hf_trainer, options):
    modes = []
    forward = hf_trainer.Encoder.forward

    def noted(encoder, inputs):
        modes.append((encoder.training, torch.is_autocast_enabled("cpu")))
        return forward(encoder, inputs)

    hf_trainer.Encoder.forward = noted
    trainer = hf_trainer.main(**options)
    assert trainer.evaluate()["eval_accuracy"] > 0.6  # by chance 0.33
    assert {autocast for training, autocast in modes if training} == {"bf16" in options}
    assert all("grad_norm" not in row for row in trainer.state.log_history)


def test_an_hf_run_resumes_with_its_covariance_and_network(hf_trainer, tmp_path):
    """With the same bits as one that nobody stopped, in the middle of an epoch as well."""

    def state(trainer):
        return [trainer.model.state_dict(), trainer.meta.state_dict()]

    plans = {"epoch": 2 * 20, "steps": 30}
    for strategy, stop in plans.items():
        options = {"save_strategy": strategy, "save_steps": 15, "max_steps": 60}
        options |= {"lr_scheduler_type": "constant"}
        whole = hf_trainer.main(3, str(tmp_path / f"whole-{strategy}"), **options)
        folder = str(tmp_path / f"part-{strategy}")
        stopped = hf_trainer.main(3, folder, **{**options, "max_steps": stop})
        counted = int(stopped.meta.covariance.count.sum())
        assert counted == stop * 24
        rest = hf_trainer.main(3, folder, resume=True, **options)
        assert rest.state.global_step == 60
        assert int(rest.meta.covariance.count.sum()) == 60 * 24
        assert int(rest.meta.memory.epochs) == int(whole.meta.memory.epochs) == 3
        assert differences(state(rest), state(whole)) == []
        (checkpoint, *_) = Path(folder).glob("checkpoint-60")
        (checkpoint / "meta_iada.pt").unlink()
        with pytest.raises(FileNotFoundError, match="meta_iada.pt"):  # never without its state
            hf_trainer.main(4, folder, resume=True, **{**options, "max_steps": 80})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            "^gradient_accumulation_steps: expected 1, got 4; pass per_device_train_batch_size=96",
        ),
        ({"fp16": True}, "^fp16: expected False, got True; pass bf16=True"),
    ],
)
def test_hf_settings_that_would_be_something_else_are_refused(hf_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        hf_trainer.main(**options)


def test_a_second_hf_run_has_its_own_optimizer(hf_trainer):
    trainer = hf_trainer.main(epochs=1)
    first, before = trainer.meta, trainer.model.head.weight.clone()
    trainer.train()
    assert trainer.meta is not first
    assert not torch.equal(before, trainer.model.head.weight)


def test_the_hf_optimizer_steps_once(hf_trainer):
    steps = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            moved = [
                p for group in self.param_groups for p in group["params"] if p.grad is not None
            ]
            steps.append(len(moved))
            return super().step(closure)

    def create_optimizer(trainer, *arguments):
        trainer.optimizer = Counted(trainer.model.parameters(), lr=0.01)

    hf_trainer.MetaIADATrainer.create_optimizer = create_optimizer
    hf_trainer.main(epochs=1)
    assert len([moved for moved in steps if moved]) == 480 // 24
