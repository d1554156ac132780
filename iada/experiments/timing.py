"""How long a run will take on this machine, from a few timed steps."""

import time
from dataclasses import dataclass

import torch

from iada.experiments.run import PlannedRun, build_trainer
from iada.meta.method import Method
from iada.utils.distributed import own_part
from iada.utils.loading import batches

WARM_UP, TIMED = 2, 3


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step of plain CE, of the method, of a test and of `Method.prepare`; steps."""

    plain_step: float
    method_step: float
    test: float
    preparation: float
    plain_steps: int
    method_steps: int
    tests: int

    @property
    def total(self) -> float:
        """Seconds of the run."""
        steps = self.plain_step * self.plain_steps + self.method_step * self.method_steps
        return steps + self.preparation + self.test * self.tests


def estimate(planned: PlannedRun) -> Estimate:
    """From the time of a few steps of a throw-away model, loading of their data included."""
    trainer, views, _ = build_trainer(planned)
    config, split, device = trainer.config, planned.split, planned.options.device
    rows = torch.arange(WARM_UP + TIMED)[:, None] * config.batch_size
    rows = (rows + torch.arange(config.batch_size)) % len(split.train)
    order = rows.tolist()
    steps = -(-len(split.train) // config.batch_size)
    # Half-way through: CMO pastes nothing in its first and last epochs.
    phase_two = trainer.method.begin_epoch((config.ce_epochs + config.epochs) // 2, order, 0)
    seconds = []
    for plain in (True, False):
        rows_of_steps = order if plain else phase_two
        own = [rows[own_part(len(rows), trainer.group)] for rows in rows_of_steps]
        served = iter(batches(views.train, own))
        start = 0.0
        for step in range(WARM_UP + TIMED):
            if step == WARM_UP:
                start = _now(device)
            trainer.batch = step % steps
            batch = trainer.acceleration.placed(next(served))
            trainer.step_on(batch, None if plain else trainer.meta_batch(), not plain)
        seconds.append((_now(device) - start) / TIMED)
    count = min(len(split.test), 4 * config.batch_size)
    start = _now(device)
    trainer.outputs(views.test, rows=torch.arange(count))
    sample = (_now(device) - start) / count
    prepares = type(trainer.method).prepare is not Method.prepare
    phases = steps * config.ce_epochs, steps * (config.epochs - config.ce_epochs)
    tests = -(-config.epochs // planned.options.evaluate_every) + 1
    passes = sample * len(split.test), sample * len(split.train) if prepares else 0.0
    return Estimate(seconds[0], seconds[1], *passes, *phases, tests)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
