"""The examples run, and learn; where their packages are installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_hf_trainer():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert load("hf_trainer").main() > 0.6  # by chance 0.33


def test_the_hf_optimizer_steps_once():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    example = load("hf_trainer")
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

    example.MetaIADATrainer.create_optimizer = create_optimizer
    example.main(epochs=1)
    assert len([moved for moved in steps if moved]) == 480 // 24
