"""The trainer: methods, resume, interruption, errors; and its data order and checkpoints."""

import dataclasses
import os
import signal

import pytest
import torch

import iada
from iada.methods.options import MethodOptions
from iada.methods.registry import METHODS
from iada.models import mlp
from iada.training.checkpoint import load_checkpoint, save_checkpoint
from iada.training.interrupt import stop_flag
from iada.utils.loading import WithIndex, batches, epoch_order, stream_order

SMALL = {
    "epochs": 4,
    "ce_epochs": 2,
    "batch_size": 16,
    "meta_batch_size": 8,
    "lr": 0.1,
    "schedule": "cosine",
    "clip_norm": 0.0,
}


def make_data(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    inputs = torch.randn(count, 8, generator=generator) + 2 * labels[:, None]
    return iada.TensorData(inputs, labels, groups=torch.arange(count) % 2)


def make_trainer(folder=None, train_set=None, **settings):
    torch.manual_seed(0)
    backbone, head = mlp(8, (16,), 3)
    backbone.append(torch.nn.Dropout(0.2))
    config = iada.TrainerConfig.from_settings({**SMALL, **settings})
    meta_set = make_data(15, seed=1)
    data = make_data() if train_set is None else train_set
    counts = torch.tensor([20, 20, 20])
    return iada.Trainer(backbone, head, data, meta_set, config, folder=folder, class_counts=counts)


def parameters(trainer):
    return [*trainer.backbone.parameters(), *trainer.head.parameters()]


# test_methods_training.py has all of them: two take images, and these classes, which lie on one
# line, leave no room for LDAM's margins on cosines.
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("cmo", "afr", "ldam-drw")])
def test_every_method_learns(method):
    trainer = make_trainer(method=method, epochs=12)
    history = trainer.fit()
    assert [record["epoch"] for record in history] == list(range(12))
    assert history[-1]["loss"] < history[0]["loss"]
    assert trainer.class_accuracy(make_data(seed=2)).mean() > 0.8


@pytest.mark.parametrize(
    "settings", [{"method": "isda"}, {"method": "meta-iada"}, {"interval": 3}], ids=str
)
@pytest.mark.parametrize("stop_after", [1, 5, 9, 13])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, settings, stop_after):
    whole = make_trainer(**settings)
    whole.fit()

    part = make_trainer(tmp_path, **settings)
    steps = 0

    def count_and_interrupt(step):
        def counted(*arguments):
            nonlocal steps
            steps += 1
            if steps == stop_after:
                os.kill(os.getpid(), signal.SIGINT)
            return step(*arguments)

        return counted

    part.method.step = count_and_interrupt(part.method.step)
    part.method.cross_entropy_step = count_and_interrupt(part.method.cross_entropy_step)
    with pytest.raises(KeyboardInterrupt, match="resume from"):
        part.fit()
    assert steps == stop_after

    rest = make_trainer(tmp_path, **settings)
    assert rest.resume()
    rest.fit()
    assert rest.history == whole.history
    for a, b in zip(parameters(rest), parameters(whole), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("other", [{"method": "ce"}, {"lr": 0.2}, {"epochs": 8}, {"seed": 5}])
def test_resume_refuses_another_run_and_changes_nothing(tmp_path, other):
    make_trainer(tmp_path).fit()
    trainer = make_trainer(tmp_path, **other)
    before = [p.clone() for p in parameters(trainer)]
    name = next(iter(other))
    with pytest.raises(ValueError, match=rf"checkpoint's {name}: expected .* got .*; resume with"):
        trainer.resume()
    for a, b in zip(before, parameters(trainer), strict=True):
        assert torch.equal(a, b)


def test_epochs_are_the_runs_where_the_method_counts_them(tmp_path):
    """α rises to its value at the last one, where the rate does not ask for their number."""
    settings = {"method": "isda", "ce_epochs": 0, "schedule": "constant", "alpha_ramp": True}
    make_trainer(tmp_path, **settings, epochs=2).fit()
    more = make_trainer(tmp_path, **settings, epochs=3, loss_limit=7.0, checkpoint_every=2)
    with pytest.raises(ValueError, match="checkpoint's epochs: expected 3 .* got 2; resume with"):
        more.resume()
    same = make_trainer(tmp_path, **settings, epochs=2, loss_limit=7.0, checkpoint_every=2)
    assert same.resume()


def test_a_setting_that_the_former_run_did_not_know_had_its_default():
    state = make_trainer().state_dict()
    del state["config"]["covariance_lr"]
    make_trainer().load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"checkpoint's covariance_lr: expected 0\.5 .* got 0\.001"
    ):
        make_trainer(covariance_lr=0.5).load_state_dict(state)


def test_resume_refuses_another_model(tmp_path):
    make_trainer(tmp_path).fit()
    trainer = make_trainer(tmp_path)
    trainer.backbone[1] = torch.nn.Linear(8, 5)
    with pytest.raises(ValueError, match="checkpoint: expected the model and data of this run"):
        trainer.resume()


def test_more_epochs_may_be_added_where_no_schedule_depends_on_them(tmp_path):
    settings = {"schedule": "multistep", "milestones": (1, 3)}
    make_trainer(tmp_path, **settings).fit()
    more = make_trainer(tmp_path, **settings, epochs=6)
    assert more.resume()
    assert len(more.fit()) == 6


def test_a_stop_after_divergence_keeps_the_good_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, method="ce", ce_epochs=0, lr=1e20)
    trainer.save()
    step = trainer.method.step

    def stop_later(*arguments):
        if trainer.batch == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    trainer.method.step = stop_later
    with pytest.raises(FloatingPointError, match="at step"):
        trainer.fit()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["head"].values())


def test_a_stop_in_the_last_step_is_not_swallowed(tmp_path):
    trainer = make_trainer(tmp_path, method="ce", epochs=1, ce_epochs=0)
    trainer.observe = lambda own, batch, result: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def test_parts_in_eval_mode_stay_so():
    trainer = make_trainer(method="ce", epochs=1, ce_epochs=0)
    trainer.backbone[-1].eval()
    trainer.fit()
    trainer.class_accuracy(make_data())
    assert trainer.backbone.training
    assert not trainer.backbone[-1].training


def test_half_precision_models_train():
    torch.manual_seed(0)
    backbone, head = mlp(8, (16,), 3, torch.bfloat16)
    data = make_data()
    half = iada.TensorData(data.inputs.bfloat16(), data.labels)
    iada.Trainer(backbone, head, half, half, iada.TrainerConfig.from_settings(SMALL)).fit()
    assert head.weight.dtype == torch.bfloat16


def test_workers_get_another_seed_each_epoch_and_run():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return torch.rand(1), i

    def draw(seed):
        return next(iter(batches(Noisy(), [[0, 1]], num_workers=1, seed=seed)))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_subclass_of_tensor_data_is_asked_item_by_item():
    class Shifted(iada.TensorData):
        def __getitem__(self, i):
            inputs, labels, index = super().__getitem__(i)
            return inputs + 100, labels, index

    data = Shifted(make_data().inputs, make_data().labels)
    assert next(iter(batches(data, [[0, 1]])))[0].min() > 50


def test_nothing_to_resume(tmp_path):
    assert not make_trainer(tmp_path).resume()
    assert not make_trainer().resume()


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    # A suite in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_flag() as stopped:
            signal.raise_signal(signal.SIGINT)
            assert stopped()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    make_trainer(method="ce", epochs=1, ce_epochs=0).fit()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("method", ["ce", "isda", "meta-iada"])
def test_divergence_names_the_step_and_keeps_the_checkpoint(tmp_path, method):
    trainer = make_trainer(tmp_path, method=method, lr=1e20, ce_epochs=1)
    trainer.save()
    with pytest.raises(FloatingPointError, match=r"at step \d+ \(epoch \d\); try a smaller lr"):
        trainer.fit()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["head"].values())


def test_any_map_style_data_set():
    class Pairs(torch.utils.data.Dataset):
        data = make_data()

        def __len__(self):
            return 60

        def __getitem__(self, i):
            return self.data.inputs[i], int(self.data.labels[i])

    tensors = make_trainer()
    tensors.fit()
    pairs = make_trainer(train_set=Pairs())
    pairs.fit()
    for a, b in zip(parameters(tensors), parameters(pairs), strict=True):
        assert torch.equal(a, b)


def test_inputs_may_be_a_dict():
    class Tokens(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return {"ids": torch.full((4,), float(i)), "mask": torch.ones(4)}, i % 3

    class Backbone(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs["ids"] * inputs["mask"])

    config = iada.TrainerConfig.from_settings({**SMALL, "epochs": 2, "ce_epochs": 1, "lr": 0.001})
    counts = torch.tensor([4, 4, 4])
    trainer = iada.Trainer(
        Backbone(4, 5), torch.nn.Linear(5, 3), Tokens(), Tokens(), config, class_counts=counts
    )
    assert len(trainer.fit()) == 2


def test_arguments_are_checked():
    backbone, head = mlp(8, (16,), 3)
    config = iada.TrainerConfig.from_settings(SMALL)
    with pytest.raises(ValueError, match="meta_set: expected a small clean data set, got None"):
        iada.Trainer(backbone, head, make_data(), None, config)
    with pytest.raises(ValueError, match="class_counts: expected samples of each class"):
        iada.Trainer(backbone, head, WithIndex(make_data()), make_data(), config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "sgd"),
        ("structure", "lowrank"),
        ("schedule", "step"),
        ("epochs", 0),
        ("epochs", 2.5),
        ("ce_epochs", 300),
        ("batch_size", 0),
        ("lr", "fast"),
        ("milestones", [1.5]),
        ("milestones", 5),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("momentum", 5.0),
        ("clip_norm", -1.0),
        ("project", 1),
    ],
)
def test_settings_are_checked(key, value):
    with pytest.raises(ValueError, match=rf"{key}: expected .* got .*; "):
        iada.TrainerConfig.from_settings({key: value})


def test_alpha_ramp_reaches_alpha():
    trainer = make_trainer(alpha=0.5, alpha_ramp=True)
    seen = []
    trainer.observe = lambda own, batch, result: seen.append(own.method.alpha)
    trainer.fit()
    assert sorted(set(seen)) == [0.0, 0.25, 0.5]  # 0 before the method's own epochs


def test_epoch_order_is_a_permutation_in_even_parts():
    order = epoch_order(65, 16, seed=3, epoch=2)
    assert sorted(sum(order, [])) == list(range(65))
    assert {len(batch) for batch in order} == {13}
    assert order == epoch_order(65, 16, seed=3, epoch=2)
    assert order != epoch_order(65, 16, seed=3, epoch=3)


def test_stream_order_can_start_anywhere():
    whole = list(stream_order(10, 4, seed=1, first_step=0, steps=12))
    assert whole[5:9] == list(stream_order(10, 4, seed=1, first_step=5, steps=4))
    first_ten = sum(whole[:5], [])
    assert sorted(first_ten[:10]) == list(range(10))
    assert list(stream_order(3, 8, 0, 0, 2)) == [[0, 1, 2]] * 2


def test_batches_carry_the_index():
    inputs, labels, index = next(iter(batches(make_data(), [[4, 2, 7]])))
    assert index.tolist() == [4, 2, 7]
    assert labels.tolist() == [1, 2, 1]
    assert inputs.shape == (3, 8)


def test_checkpoint_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="checkpoint: expected to write .*; free some space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other", "empty"])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"tensor": torch.zeros(1000)})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "foreign":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="checkpoint: expected .*got .*; "):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="expected a file"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "settings",
    [
        {"hypergradient": "finite-difference"},
        {"scope": "head"},
        {"interval": 3},
        {"low_memory": True},
    ],
    ids=str,
)
def test_the_engine_s_settings_reach_it(settings):
    trainer = make_trainer(method="meta-iada", epochs=8, **settings)
    trainer.fit()
    for name, value in settings.items():
        assert trainer.config.settings()[name] == value
    assert trainer.class_accuracy(make_data(seed=2)).mean() > 0.8
    plain = make_trainer(method="meta-iada", epochs=8)
    plain.fit()
    same = all(
        torch.equal(a, b) for a, b in zip(parameters(trainer), parameters(plain), strict=True)
    )
    assert same == (settings == {"low_memory": True})


def test_meta_batches_are_loaded_for_meta_steps_alone():
    class Counted(iada.TensorData):
        reads = 0

        def __getitem__(self, i):
            Counted.reads += 1
            return super().__getitem__(i)

    trainer = make_trainer(epochs=4, ce_epochs=2, interval=3)
    trainer.meta_set = Counted(make_data(15, seed=1).inputs, make_data(15).labels)
    trainer.fit()
    assert Counted.reads == 3 * 8  # steps 0, 3 and 6 of eight, with a meta batch of eight


@pytest.mark.parametrize("from_table", [False, True])
def test_an_option_with_the_name_of_a_setting_is_refused(monkeypatch, from_table):
    @dataclasses.dataclass(frozen=True)
    class Focal(MethodOptions):
        gamma: float = 2.0

    monkeypatch.setitem(METHODS, "focal", Focal)
    kind = iada.TrainerConfig
    make = kind.from_settings if from_table else lambda settings: kind(method=Focal())
    with pytest.raises(ValueError, match=r"^Focal.gamma: expected a name of its own"):
        make({"method": "focal", "gamma": 0.1})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hypergradient", "exact", "one of"),
        ("scope", "all", "'full', 'head' or a positive int"),
        ("scope", 0, "'full', 'head' or a positive int"),
        ("scope", True, "'full', 'head' or a positive int"),
    ],
)
def test_unknown_settings_of_the_engine_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}"):
        iada.TrainerConfig.from_settings({name: value})
