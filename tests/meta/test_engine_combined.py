"""Options of the engine together: what holds for each alone holds for any of their combinations."""

import copy
import random

import pytest
import torch

import iada
from tests.helpers.engine_cases import CLASSES, make_batches, make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

CHOICES = {
    "structure": ["full", "diag", "low-rank", "triangle"],
    "epsilon": [None, None, 0.0, 0.3],
    "class_weights": [None, torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])],
    "alpha": [0.5, 0.0, 2.0],
    "beta": [1.0, 0.0],
    "covariance_lr": [0.0, 1e-3, 0.1],
    "epsilon_scale": [1.0, 0.2],
    "epsilon_unit": ["feature", "class-deviation"],
    "log_proportion": [False, True],
    "rate_free_perturbation": [False, True],
    "rate_free_covariance": [False, True],
    "persistent": [True, True, False],
    "clip_norm": [0.0, 0.0, 0.5],
    "scope": ["full", "full", "head", 1, 2],
    "interval": [1, 1, 2],
    "virtual_momentum": [False, False, True],
    "virtual_weight_decay": [False, False, True],
}
CONES = [{"keep_semidefinite": True}, {"project": True, "keep_semidefinite": False}, {}]


def draw(case):
    """A backbone's name, options, whether samples are known by their index, and what is frozen."""
    chooser = random.Random(case)
    options = {name: chooser.choice(values) for name, values in CHOICES.items()}
    options |= chooser.choice(CONES)
    name = chooser.choice(["mlp", "conv", "transformer"])
    return name, options, chooser.random() < 0.4, chooser.random() < 0.15


def after_four_steps(case, stopped=False, **more):
    """States and losses; with `stopped` a second engine goes on with the first one's states."""
    name, options, indexed, frozen = draw(case)

    def build():
        memory = iada.TrainingMemory(CLASSES, 12).double() if indexed else None
        prepare = freeze_the_first if frozen else None
        return make_engine(name, prepare=prepare, memory=memory, **options | more)

    (inputs, labels), meta_batch = make_batches(name)
    rest = (torch.arange(len(labels)),) if indexed else ()
    engine, losses = build(), []
    torch.manual_seed(3)
    engine.cross_entropy_step((inputs, labels, *rest))
    engine.end_epoch()
    for step in range(4):
        if stopped and step == 2:
            states, random_state = copy.deepcopy(states_of(engine)), torch.get_rng_state()
            engine = build()
            for part, state in zip(parts_of(engine), states, strict=True):
                part.load_state_dict(state)
            torch.set_rng_state(random_state)
        batch = (inputs + 0.1 * step, labels, *rest)
        meta = meta_batch if engine.needs_meta_batch else None
        losses.append(engine.step(batch, meta).loss.detach())
        if step == 1:
            engine.end_epoch()
    classifier, _, own = states_of(engine)
    found = {**classifier, **own, "losses": torch.stack(losses)}
    if name == "conv":  # of a bias before BatchNorm the gradient is rounding alone
        del found["backbone.0.bias"]
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def freeze_the_first(backbone, _):
    next(iter(backbone.parameters())).requires_grad_(False)


def parts_of(engine):
    return engine.classifier, engine.optimizer, engine


def states_of(engine):
    return [part.state_dict() for part in parts_of(engine)]


def relative_difference(one, other):
    """The largest of any tensor, as a share of its largest number."""
    assert one.keys() == other.keys()
    worst = 0.0
    for key, value in one.items():
        have, want = value.double().nan_to_num(), other[key].double().nan_to_num()
        assert torch.equal(value.isnan(), other[key].isnan()), key
        if not torch.equal(have, want):
            worst = max(worst, float((have - want).abs().max() / want.abs().max().clamp(min=1e-12)))
    return worst


@pytest.mark.parametrize("case", range(24))
def test_any_combination(case):
    found = after_four_steps(case)
    oracle = after_four_steps(case, hypergradient="double-backward")
    assert relative_difference(found, oracle) < 1e-6
    assert relative_difference(found, after_four_steps(case, low_memory=True)) < 1e-12
    assert relative_difference(found, after_four_steps(case, stopped=True)) == 0.0
    if draw(case)[1]["covariance_lr"]:
        near = after_four_steps(case, hypergradient="finite-difference")
        assert relative_difference(found, near) < 0.05


def test_every_choice_is_drawn():
    drawn = [draw(case)[1] for case in range(24)]
    for name, values in CHOICES.items():
        assert {str(options[name]) for options in drawn} == set(map(str, values)), name
