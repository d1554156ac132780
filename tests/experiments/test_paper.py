"""Recipes of the papers' tables, and `python -m iada paper` on a small data set of true format."""

import argparse
import csv
import json
import re
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from iada.cli import main
from iada.experiments import recipe as recipes
from iada.experiments.command import _command, add_paper
from iada.experiments.datasets import Labelled
from iada.experiments.datasets.subpopulations import MEMBERS
from iada.experiments.epsilon_log import EpsilonLog
from iada.experiments.experiment import Limits, first_of_each, limited, make_split, read_parts
from iada.experiments.first_phase import FOLDER as FIRST_PHASES
from iada.experiments.listing import comparison, derived_records, published_figures
from iada.experiments.metrics import METRICS
from iada.experiments.progress import Series
from iada.experiments.recipe import (
    DerivedEntry,
    from_sections,
    load,
    names,
    parse_change,
    shortened,
    table_name,
)
from iada.experiments.records import read_records
from iada.experiments.scenarios.split import fingerprint, other_parts, outline
from iada.meta.method import MetaStep
from iada.training.first_phase import can_share, first_phase_config
from iada.training.trainer import Trainer
from iada.utils.lock import LOCK
from tests.helpers import dataset_files as made
from tests.helpers.paper_runs import ROW, SMALLER, write_images
from tests.helpers.processes import held_by_another_process

pytestmark = pytest.mark.slow
CONTROLS = ("paper", "--table", "controls", "--row", "cifar10-100", "--device", "cpu")

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def test_every_row_of_the_tables_has_a_recipe():
    tables = {name.split("/")[0] for name in names()}
    assert tables == {
        *(f"table{place}" for place in range(2, 8)),
        "figure6",
        "afr-table1",
        "afr-table2",
        "uniform-noise",
        "frozen",
        "controls",
        "digits",
    }
    rows = {name.split("/")[1] for name in names() if name.startswith("table6/")}
    assert rows == {"celeba", "cmnist", "waterbirds", "civilcomments"}
    assert len([name for name in names() if name.startswith(("table2/", "table5/"))]) == 8
    assert names().index("table7/cifar10-10") < names().index("figure6/cifar10-10")


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_whole(name):
    recipe = load(name)
    assert recipe.title
    assert recipe.needs
    assert set(recipe.metrics) <= set(METRICS)
    assert len({entry.title for entry in recipe.methods}) == len(recipe.methods)
    keys = {entry.key for entry in recipe.methods}
    figures = [entry.published for entry in (*recipe.methods, *recipe.derived.values())]
    for entry in recipe.derived.values():
        assert entry.of in keys
        assert {*entry.metrics.values(), *entry.metrics} <= set(METRICS)
    for published in (*figures, *recipe.published.values()):
        assert set(published) <= set(recipe.metrics)
        assert all(20 < value < 100 for value in published.values())
    if not name.startswith(("figure", "digits", "uniform-noise", "frozen")):
        assert any(figures)
    for entry in recipe.methods:
        assert entry.trainer.ce_epochs < entry.trainer.epochs
        if not name.startswith("digits/"):
            # As published, whatever the defaults are.
            trainer = entry.trainer
            assert trainer.clip_norm == 0.0
            assert not getattr(trainer.method, "keep_semidefinite", False)


@pytest.mark.parametrize(
    ("name", "method", "metric", "percent"),
    [
        ("table2/cifar10-100", "meta-iada", "top1", 84.01),
        ("table2/cifar100-10", "metasaug", "top1", 61.73),
        ("table2/cifar100-100", "risda", "top1", 50.16),
        ("table3/inat2018-whole", "risda", "top1", 69.15),
        ("table3/inat2018", "meta-iada", "top1", 72.55),
        ("table4/imagenet-glt", "meta-iada", "precision", 50.07),
        ("table5/cifar10-40", "meta-weight-net", "top1", 87.65),
        ("table6/waterbirds", "meta-iada", "worst_group", 92.5),
        ("table6/waterbirds", "group-dro", "worst_group", 90.6),
        ("table6/celeba", "uw", "average", 92.9),
        ("table7/cifar10-100", "meta-iada", "top1", 84.01),
        ("table7/cifar100-10", "without-r", "top1", 62.38),
        ("afr-table1/cifar100-100", "afr-400", "top1", 51.91),
        ("afr-table2/cifar100-100", "mixup-50", "top1", 51.21),
    ],
)
def test_published_figures(name, method, metric, percent):
    own = {entry.key: entry for entry in load(name).methods}
    assert own[method].published[metric] == percent


@pytest.mark.parametrize("name", names())
def test_meta_images_are_trained_on_where_they_are_out_of_the_training_set(name):
    recipe = load(name)
    scenario = recipe.scenario
    if any(entry.with_meta for entry in recipe.methods):
        assert scenario["name"] in ("long-tail", "noise") or scenario["meta_from"] == "train"
        assert not scenario.get("meta_in_train", False)


def test_what_recipes_owe_to_the_sources():
    """Settings that the quoted figures were made with, each with its source in the recipe."""
    for protocol in ("alt", "clt", "glt"):
        recipe = load(f"table4/imagenet-{protocol}")
        assert recipe.model.image_size == 112
        quoted = {c.key: c.trainer for c in recipe.methods if "momentum 0" in c.title}
        assert set(quoted) == {"ce-without-momentum", "ldam-drw", "logit-adjustment"}
        assert {trainer.momentum for trainer in quoted.values()} == {0.0}
        assert quoted["ldam-drw"].method.reweight_from == 0.8
        assert recipe.derived["la-post-hoc"].of == "ce-without-momentum"
    assert load("table4/imagenet-clt").derived["la-post-hoc"].published["top1"] == 46.53
    inat = load("table3/inat2018")
    assert (inat.model.frozen, inat.model.normalise) == (True, "inaturalist18")
    assert inat.scenario["meta_in_train"]
    alphas = {
        c.key: (c.trainer.method.alpha, c.trainer.method.alpha_ramp) for c in inat.methods[3:]
    }
    rising = (0.25, True)
    assert alphas == {"isda": rising, "metasaug": rising, "meta-iada": (0.5, False)}
    for row in ("celeba", "cmnist", "waterbirds"):
        model = load(f"table6/{row}").model
        assert (model.pretrained, model.weights) == (True, "IMAGENET1K_V1")
        assert model.augment == "none"
    ldam = {c.key: c.trainer for c in load("table2/cifar10-100").methods}["ldam-drw"]
    assert (ldam.warmup_epochs, ldam.weight_decay) == (5.0, 2e-4)
    for name, form in (("table2/cifar10-100", True), ("table5/cifar10-40", False)):
        net = {c.key: c.trainer.method for c in load(name).methods}["meta-weight-net"]
        assert (net.normalized, net.through_loss) == (form, form)
        assert (net.perturbation_optimizer, net.perturbation_lr) == (
            ("SGD", 1e-5) if form else ("Adam", 1e-3)
        )
        assert net.perturbation_weight_decay == (5e-4 if form else 1e-4)
    arms = {c.key: c.trainer for c in load("table2/cifar100-100").methods}
    risda = arms["risda"].method
    scales = risda.covariance_scale, risda.prototype_scale, risda.head_share
    assert (arms["risda"].ce_epochs, *scales) == (160, 0.75, 1.0, 0.2)
    assert first_phase_config(arms["risda"]) == first_phase_config(arms["meta-iada"])
    for name in ("table3/inat2018-whole", "table4/imagenet-clt"):
        risda = {c.key: c.trainer.method for c in load(name).methods}["risda"]
        assert (risda.covariance_scale, risda.prototype_scale, risda.structure) == (7.5, 0, "diag")
    uniform = load("uniform-noise/cifar10-40")
    assert uniform.model.backbone == "wrn-28-10"
    assert {(c.trainer.epochs, c.trainer.milestones) for c in uniform.methods} == {(60, (50, 55))}


def test_a_row_adds_to_what_its_base_says_of_a_method():
    rows = ("frozen/cifar10-flip-40", "frozen/cifar10-100")
    base, own = ({m.key: m for m in load(row).methods}["meta-weight-net"] for row in rows)
    assert own.title == base.title == "Meta-Weight-Net"
    assert own.meta_per_class == base.meta_per_class == 10
    assert own.trainer.ce_epochs == base.trainer.ce_epochs
    assert own.trainer.method.normalized


def test_the_model_in_a_digest_is_that_of_before_there_were_choices():
    names = {"backbone", "pretrained", "augment", "image_size"}
    assert set(load("table2/cifar10-100").model.as_record()) == names
    assert set(load("table3/inat2018").model.as_record()) == {*names, "frozen", "normalise"}


def test_a_method_may_have_an_augmentation_of_its_own():
    recipe = load("afr-table1/cifar100-100")
    arms = {entry.key: entry for entry in recipe.methods}
    own = recipe.as_run(arms["cmo-400"]).model.as_record()
    assert own == recipe.model.as_record() | {"augment": "autoaugment-contrastive"}
    assert recipe.as_run(arms["cmo"]) is recipe
    with pytest.raises(ValueError, match="augment: expected one of '', 'none'"):
        load(recipe.name, {"methods.cmo-400": {"augment": "mosaic"}})


def test_ablations_leave_out_one_term_each():
    own = {c.key: c.trainer for c in load("table7/cifar10-10").methods}
    whole = own["meta-iada"]
    for key, change in (
        ("without-g", {"alpha": 0.0}),
        ("without-r", {"perturbation": "constant"}),
        ("without-f", {"beta": 0.0}),
    ):
        assert own[key].settings() == {**whole.settings(), **change}
    assert whole.method.epsilon == 0


def test_a_shorter_schedule_is_the_same_in_proportion():
    config = {c.key: c.trainer for c in load("table2/cifar10-100").methods}["meta-iada"]
    assert (config.epochs, config.ce_epochs, config.milestones) == (200, 160, (160, 180))
    short = shortened(config, 20)
    assert (short.epochs, short.ce_epochs, short.milestones) == (20, 16, (16, 18))
    assert replace(short, epochs=200, ce_epochs=160, milestones=(160, 180)) == config
    assert shortened(replace(config, warmup_epochs=5.0), 20).warmup_epochs == 0.5
    assert shortened(config, 2).ce_epochs == 1  # of 1.6, as the last epoch is the method's own
    assert shortened(replace(config, milestones=(1, 199)), 20).milestones == (1,)


@pytest.mark.parametrize(
    ("given", "folder"),
    [("2", "table2"), ("table2", "table2"), ("afr-2", "afr-table2"), ("figure6", "figure6")],
)
def test_names_of_tables(given, folder):
    assert table_name(given) == folder


def test_changes():
    assert parse_change("scenario.ratio=50") == ("scenario", "ratio", 50)
    assert parse_change("scenario.kind=flip") == ("scenario", "kind", "flip")
    assert parse_change("trainer.milestones=[1, 2]") == ("trainer", "milestones", [1, 2])
    assert parse_change("methods.alpha-0.1.lr=1") == ("methods.alpha-0.1", "lr", 1)
    changed = load("table2/cifar10-10", {"trainer": {"alpha": 0.25}})
    alphas = {entry.trainer.settings().get("alpha") for entry in changed.methods}
    assert alphas == {0.25, None}  # CE and others have none


def test_a_change_reaches_what_it_names_or_fails():
    name = "table2/cifar10-10"
    changed = load(name, {"methods.metasaug": {"ce_epochs": 100}})
    marks = {entry.key: entry.trainer.ce_epochs for entry in changed.methods}
    assert (marks["ce"], marks["metasaug"], marks["meta-iada"]) == (0, 100, 160)
    with pytest.raises(ValueError, match=r"ce_epochs: .* metasaug, meta-iada.* methods\.\w+\.ce"):
        load(name, {"trainer": {"ce_epochs": 100}})
    with pytest.raises(ValueError, match="section methods.sgd: expected .*methods.ce"):
        load(name, {"methods.sgd": {"lr": 1.0}})
    with pytest.raises(ValueError, match=r"trainer\.focal_gamma: expected a setting of one of"):
        load("table7/cifar10-10", {"trainer": {"focal_gamma": 2.0}})
    with pytest.raises(ValueError, match="methods.ce.title: expected a setting"):
        load(name, {"methods.ce": {"title": "ERM"}})


def test_limits_keep_the_classes_even(images):
    parts = read_parts(load("table2/cifar10-10", {"data": {"reader": "folder"}}), images, Limits())
    few = first_of_each(parts["train"], 5)
    assert few.class_counts().tolist() == [5] * 10
    assert first_of_each(parts["train"], 0) is parts["train"]


def test_runs_write_records_a_page_and_a_comparison(images, tmp_path, capsys):
    command = [*ROW, "--data", str(images), "--out", str(tmp_path), "--epochs", "2"]
    command += ["--methods", "ce", "meta-iada", "--seeds", "2", "--evaluate-every", "2"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "84.01" in output
    assert "MiSLAS" in output
    page = tmp_path / "table2/cifar10-100/index.html"
    assert str(page) in output
    text = page.read_text(encoding="utf-8")
    assert "84.01" in text
    assert "Not as published:" in text
    assert "2 of 200 epochs" in text
    records = read_records([tmp_path])
    assert len(records) == 4
    for record in records:
        assert record["deviations"] == [*SMALLER, "2 of 200 epochs"]
        assert record["settings"]["seed"] == record["seed"]
        assert np.sum(record["confusion"]) == 30
        assert record["last"]["top1"] == pytest.approx(np.trace(record["confusion"]) / 30)
        assert set(record["best"]) == set(METRICS)
        assert [row["epoch"] for row in record["curve"]] == [0, 1]
        assert record["class_counts"] == record["split"]["class_counts"]["train"]
    own = next(r for r in records if r["method"] == "meta-iada" and r["seed"] == 0)
    visits = sum(own["epsilon"]["histogram_clean"])
    assert visits == sum(own["class_counts"])  # the last epoch of two
    assert len(own["spectrum"]) == 10
    assert own["surrogate"]["classes"]
    assert {"generalization", "robustness", "fairness"} <= set(own["curve"][-1])
    assert "± " in comparison(load("table2/cifar10-100"), records)
    assert 0 < own["curve"][-1]["covariance_change"] < 0.1
    assert "covariance_change" not in own["curve"][0]  # plain CE

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert main(command) == 0  # nothing is run twice
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert main([*command, "--epochs", "1"]) == 2
    assert "one with another settings" in capsys.readouterr().err

    older = next(path for path in files if "meta-iada" in str(path))
    record = json.loads(older.read_text(encoding="utf-8"))
    del record["settings"]["epsilon_scale"]  # of a version without it
    older.write_text(json.dumps(record), encoding="utf-8")
    assert main(command) == 0
    record["settings"]["alpha"] = 0.25
    older.write_text(json.dumps(record), encoding="utf-8")
    assert main(command) == 2
    assert "one with another settings" in capsys.readouterr().err

    assert main(["paper", "--list", "--out", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    for name in names():
        assert name in listed
    assert "2 of 200 epochs" in listed
    assert "scenario.ratio=2" in listed


def test_an_interrupted_run_goes_on(images, tmp_path, monkeypatch):
    command = [*ROW, "--data", str(images), "--epochs", "2", "--methods", "meta-iada"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    stopped = []

    def stop(self, trainer, batch, result):
        call(self, trainer, batch, result)
        if not stopped:
            stopped.append(trainer.batch)
            raise KeyboardInterrupt

    call = EpsilonLog.__call__
    monkeypatch.setattr(EpsilonLog, "__call__", stop)
    assert main([*command, "--out", str(tmp_path / "cut")]) == 130
    assert not list((tmp_path / "cut").rglob("record.json"))
    assert main([*command, "--out", str(tmp_path / "cut")]) == 0
    whole, cut = (read_records([tmp_path / name])[0] for name in ("whole", "cut"))
    for name in set(whole) - {"seconds", "finished"}:
        assert cut[name] == whole[name], name


def test_what_runs_have_in_common_is_made_once(images, tmp_path, capsys, monkeypatch):
    trained = []
    fit = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self: trained.append((self.folder, self.epoch)) or fit(self)
    )
    command = ["paper", "--device", "cpu", "--epochs", "3", "--data", str(images)]
    command += ["--out", str(tmp_path), "--evaluate-every", "3", "--set", *SMALLER]
    row = ["--table", "7", "--row", "cifar10-100", "--methods", "meta-iada", "without-r"]
    assert main([*command, *row]) == 0
    output = capsys.readouterr().out
    phases = [folder for folder, _ in trained if folder.parent.name == FIRST_PHASES]
    assert len(phases) == 1
    assert [epoch for folder, epoch in trained if folder not in phases] == [2, 2]
    assert "run 2 of 2: without R, seed 0" in output
    assert re.search(r"at the last epoch, about \d:\d\d:\d\d left", output)
    count = len(trained)
    row = ["--table", "2", "--row", "cifar10-100", "--methods", "ce", "metasaug", "meta-iada"]
    assert main([*command, *row]) == 0
    assert [epoch for _, epoch in trained[count:]] == [0, 2]  # CE, and MetaSAug after phase 1
    records = {(r["experiment"], r["method"]): r for r in read_records([tmp_path])}
    again = records["table2/cifar10-100", "meta-iada"]
    assert again["same_as"] == "table7/cifar10-100/meta-iada/seed0"
    first = records["table7/cifar10-100", "meta-iada"]
    assert again["confusion"] == first["confusion"]
    assert [row["epoch"] for row in again["curve"]] == [0, 1, 2]


def test_a_first_phase_serves_another_test_set(images, tmp_path, monkeypatch):
    """Copied to another folder, as docs/controls.md says; what it was tested on is not taken."""
    trained = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: trained.append(self.epoch) or fit(self))
    command = [*CONTROLS, "--epochs", "3"]
    command += ["--data", str(images), "--set", *SMALLER, "--methods"]
    assert main([*command, "ce", "--out", str(tmp_path / "a")]) == 0
    shutil.copytree(tmp_path / "a" / FIRST_PHASES, tmp_path / "b" / FIRST_PHASES)
    command += ["deferred-la", "--test-limit", "2", "--out", str(tmp_path / "b")]
    assert main(command) == 0
    assert trained == [0, 2, 2]
    first, second = (read_records([tmp_path / name])[0]["curve"] for name in "ab")
    assert all(row["accuracy"] is not None for row in first)
    assert [row["accuracy"] is None for row in second] == [True, True, False]
    assert [row["loss"] for row in second[:2]] == [row["loss"] for row in first[:2]]


def test_meta_images_as_training_images(images, tmp_path):
    command = [*CONTROLS, "--epochs", "2"]
    command += ["--data", str(images), "--out", str(tmp_path), "--set", *SMALLER]
    assert main([*command, "--methods", "ce", "ce-with-meta"]) == 0
    records = {record["method"]: record for record in read_records([tmp_path])}
    more, fewer = (np.array(records[key]["class_counts"]) for key in ("ce-with-meta", "ce"))
    assert (more - fewer).tolist() == [2] * 10
    assert records["ce-with-meta"]["split"]["meta_in_train"] == 20
    assert "meta" in records["ce"]["split"]["from"]
    assert "meta" not in records["ce-with-meta"]["split"]["from"]


def test_what_stands_beside_the_quoted_baselines_of_table_2_runs(images, tmp_path, capsys):
    command = [*ROW, "--data", str(images), "--out", str(tmp_path), "--epochs", "3"]
    assert main([*command, "--methods", "risda", "meta-weight-net"]) == 0
    output = capsys.readouterr().out
    for figure in ("79.89", "73.57"):
        assert figure in output
    records = {record["method"]: record for record in read_records([tmp_path])}
    risda, net = records["risda"], records["meta-weight-net"]
    assert (risda["settings"]["ce_epochs"], net["settings"]["ce_epochs"]) == (2, 0)
    assert len(risda["spectrum"]) == 10
    assert len(list(tmp_path.rglob("first-phase.pt"))) == 1
    for record in (risda, net):
        assert all(row["loss"] is not None for row in record["curve"])


def test_a_frozen_backbone_stays_as_its_file_has_it(images, tmp_path, capsys):
    def command(out, *changes):
        words = [*ROW[: ROW.index("--set")], "--data", str(images), "--epochs", "2"]
        words += ["--out", str(tmp_path / out), "--methods", "ce", "meta-iada"]
        return main([*words, "--set", *SMALLER, *changes])

    def state(out, method):
        path = tmp_path / out / "table2/cifar10-100" / method / "seed0/checkpoint.pt"
        return path, torch.load(path, weights_only=True)

    frozen = ("model.frozen=true", "trainer.scope=head")
    assert command("trained") == 0
    assert command("frozen", *frozen) == 2
    assert "model.weights: expected a file" in capsys.readouterr().err
    file, trained = state("trained", "ce")
    assert command("frozen", *frozen, f"model.weights={file}") == 0
    for method in ("ce", "meta-iada"):
        _, after = state("frozen", method)
        for name, value in trained["backbone"].items():  # BatchNorm's statistics too
            assert torch.equal(after["backbone"][name], value)
        assert not torch.equal(after["head"]["weight"], trained["head"]["weight"])


def test_a_derived_row_is_read_off_a_methods_runs():
    derived = {"post-hoc": DerivedEntry("Post-hoc LA", "ce", {"top1": "posthoc_top1"}, {"top1": 9})}
    recipe = replace(load("table2/cifar10-100"), derived=derived)
    figures = {"top1": 0.5, "posthoc_top1": 0.75}
    record = {"experiment": recipe.name, "method": "ce", "seed": 0, "last": figures}
    record |= {"best": figures, "best_epoch": 3, "best_by": "test_top1"}
    (row,) = derived_records(recipe, [record])
    assert (row["method"], row["last"], row["seed"]) == ("post-hoc", {"top1": 0.75}, 0)
    assert published_figures([recipe])[recipe.name, "Post-hoc LA"] == {"top1": 9}
    shown = {line[:11].strip(): line.split() for line in comparison(recipe, [record]).splitlines()}
    assert shown["Post-hoc LA"][-3:] == ["75.00", "75.00", "9.00"]
    assert shown["CE"][-3:-1] == ["50.00", "50.00"]


def test_controls_share_one_first_phase():
    arms = {c.key: c for c in load("controls/cifar10-100").methods}
    deferred = [arm for arm in arms.values() if arm.trainer.ce_epochs]
    assert all(can_share(arm.trainer) and not arm.with_meta for arm in deferred)
    assert len({repr(first_phase_config(arm.trainer)) for arm in deferred}) == 1
    assert len(deferred) == len(arms) - 3
    table = {c.key: c for c in load("table2/cifar10-100").methods}
    for key in ("meta-iada", "metasaug", "logit-adjustment"):
        assert arms[key].trainer == table[key].trainer


def test_one_seed_alone(images, tmp_path, capsys):
    command = [*ROW, "--data", str(images), "--epochs", "2", "--methods", "ce"]
    command += ["--out", str(tmp_path)]
    assert main([*command, "--seed", "3"]) == 0
    (record,) = read_records([tmp_path])
    assert record["seed"] == 3
    folder = tmp_path / "table2/cifar10-100/ce/seed3"
    assert (folder / "record.json").exists()
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy"] for row in rows] == [row["test_balanced"] for row in rows]
    assert float(rows[-1]["accuracy"]) == pytest.approx(record["last"]["balanced"])
    with pytest.raises(SystemExit):
        main([*command, "--seed", "3", "--seeds", "2"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_run_that_another_process_makes_is_left_alone(images, tmp_path, capsys):
    command = [*ROW, "--data", str(images), "--epochs", "2", "--methods", "ce"]
    folder = tmp_path / "table2/cifar10-100/ce/seed0"
    with held_by_another_process(folder) as other:
        assert main([*command, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"{folder}, in use by process {other}" in error
        assert [entry.name for entry in folder.iterdir()] == [LOCK]
    assert main([*command, "--out", str(tmp_path)]) == 0


def test_a_run_that_was_begun_goes_on_with_its_own_data_only(images, tmp_path, monkeypatch, capsys):
    command = [*ROW, "--data", str(images), "--epochs", "2", "--methods", "ce"]
    command += ["--out", str(tmp_path)]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr("iada.experiments.run.measured_on", stop)  # at the end of the first epoch
        assert main(command) == 130
    capsys.readouterr()
    for change, what in (("model.augment=none", "model"), ("scenario.convention=step", "split")):
        assert main([*command, "--set", *SMALLER, change]) == 2
        assert f"one with another {what}" in capsys.readouterr().err
    assert main(command) == 0
    (record,) = read_records([tmp_path])
    assert record["model"]["augment"] == "crop-flip"
    assert record["split"]["parameters"]["convention"] == "ldam"


def test_texts_with_groups_run_whole(tmp_path, monkeypatch, capsys):
    made.write_civilcomments(tmp_path / "data", copies=4)

    def tokenizer(texts, **_):
        width = max(map(len, texts))  # as a tokenizer's, it depends on the batch
        ids = torch.tensor([[*map(ord, text), *[0] * (width - len(text))] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.letters = torch.nn.Embedding(128, 4)

        def forward(self, inputs):
            return self.letters(inputs["input_ids"]).mean(dim=1)

    monkeypatch.setattr("iada.experiments.experiment.load_tokenizer", lambda path: tokenizer)
    monkeypatch.setattr(
        "iada.experiments.model_file.build_backbone",
        lambda *_, **__: (Mean(), torch.nn.Linear(4, 2)),
    )
    command = ["paper", "--table", "6", "--row", "civilcomments", "--data", str(tmp_path / "data")]
    command += ["--device", "cpu", "--out", str(tmp_path / "runs"), "--methods"]
    command += [*(methods := ["ce", "group-dro", "uw", "meta-iada"])]
    command += ["--epochs", "2", "--set", "scenario.meta_per_group=1"]
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    records = read_records([tmp_path / "runs"])
    assert sorted(record["method"] for record in records) == sorted(methods)
    for record in records:
        assert record["best_by"] == "validation_worst_group"
        assert set(record["group_accuracy"]) == set(MEMBERS)
    (own,) = (record for record in records if record["method"] == "meta-iada")
    assert own["surrogate"]["classes"] == [0, 1]
    assert "Worst group, best  published" in capsys.readouterr().out


def test_a_dry_run_trains_nothing(images, tmp_path, capsys):
    command = [*ROW, "--data", str(images), "--out", str(tmp_path), "--dry-run", "--epochs", "4"]
    assert main([*command, "--methods", "ce", "meta-iada"]) == 0
    output = capsys.readouterr().out
    assert "30 test samples" in output
    assert "Meta-IADA: " in output
    assert "about 0:0" in output
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--table: expected a table"),
        (["--table", "9"], "--table: expected one of afr-table1"),
        (["--table", "2", "--row", "mnist", "--data", "."], "--row: expected one of 'cifar10-10"),
        (["--table", "2", "--row", "cifar10-10"], "--data: expected a path"),
        (["--table", "2", "--row", "cifar10-10", "--data", "/none"], "--data: expected CIFAR-10"),
        (["--table", "2", "--data", ".", "--methods", "sgd"], "--methods: expected one of 'ce"),
        (["--table", "2", "--data", ".", "--seeds", "0"], "--seeds: expected at least 1"),
        (["--table", "2", "--data", ".", "--seed", "-1"], "--seed: expected 0 or more"),
        (["--table", "2", "--data", ".", "--epochs", "-1"], "--epochs: expected 0 or more"),
        (["--table", "7", "--data", "."], "--row: expected rows of one data set"),
        (["--table", "4", "--data", "."], "--row: expected rows of one data set"),
        (["--table", "4", "--data", ".", "--device", "x"], "--device: expected a torch device"),
        (["--table", "2", "--data", ".", "--set", "ratio=3"], "--set: expected section.key"),
        (["--table", "2", "--data", ".", "--set", "published.x=3"], "section published: expected"),
        (["--table", "2", "--data", ".", "--set", "trainer.epoch=3"], "epoch"),
        (["--table", "3", "--data", ".", "--set", "data.size=3"], r"\[data\] size: expected one"),
        (
            ["--table", "2", "--data", ".", "--set", "scenario.name=x"],
            "name: expected one of 'long",
        ),
    ],
)
def test_errors(arguments, message, capsys, tmp_path):
    assert main(["paper", *arguments, "--out", str(tmp_path)]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert __import__("re").search(message, found), found


def test_an_unknown_scenario_setting(images):
    recipe = load("table2/cifar10-10", {"data": {"reader": "folder"}, "scenario": {"size": 3}})
    with pytest.raises(ValueError, match=r"\[scenario\] size: expected one of 'ratio"):
        make_split(recipe, read_parts(recipe, images, Limits()), 0)


def test_a_damaged_record(tmp_path, capsys):
    (tmp_path / "record.json").write_text('{"experiment": ')
    assert main(["paper", "--list", "--out", str(tmp_path)]) == 2
    assert "record.json: expected a run's record" in capsys.readouterr().err


def test_epsilon_is_counted_by_class_and_label():
    labels = torch.tensor([0, 0, 1, 1, 1])
    wrong = torch.tensor([False, True, False, False, True])
    counts = EpsilonLog(labels, wrong, 3, epochs=10)
    assert counts.as_record() is None
    epsilon = torch.tensor([0.5, -0.5, 0.5, -0.2, -1.0])
    result = MetaStep(torch.zeros(()), torch.zeros(()), epsilon)
    batch = (None, labels, torch.arange(5))
    counts(type("Run", (), {"epoch": 7, "method": None}), batch, result)  # before the last fifth
    assert counts.as_record() is None
    counts(type("Run", (), {"epoch": 8, "method": None}), batch, result)
    found = counts.as_record()
    assert found["class_share"] == [1 / 2, 1 / 3, None]
    assert (found["share_clean"], found["share_flipped"]) == (2 / 3, 0)
    assert sum(found["histogram_clean"]) == 3
    assert found["histogram_flipped"][0] == 1
    json.dumps(found)
    again = MetaStep(torch.zeros(()), torch.zeros(()), torch.tensor([0.2]))
    late = type("Run", (), {"epoch": 9, "method": None})
    counts(late, (None, labels[:1], torch.arange(1)), again)
    assert counts.mean_epsilon().tolist() == pytest.approx([0.35, -0.5, 0.5, -0.2, -1.0])


def test_the_command_on_a_page_is_the_whole_one():
    recipe = load("table2/cifar10-10")
    parser = argparse.ArgumentParser()
    add_paper(parser.add_subparsers())
    given = ["paper", "--table", "2", "--row", "cifar10-10", "--data", "PATH", "--epochs", "1"]
    given += ["--train-limit", "1", "--methods", "ce", "--set", "data.images=/a b", "data.reader=x"]
    words = shlex.split(_command(recipe, parser.parse_args(given)))
    assert words[:3] == ["python", "-m", "iada"]
    assert vars(parser.parse_args(words[3:])) == vars(parser.parse_args(given))
    given += ["--seed", "2"]
    words = shlex.split(_command(recipe, parser.parse_args(given)))
    assert vars(parser.parse_args(words[3:])) == vars(parser.parse_args(given))


def test_groups_are_published_at_the_epoch_chosen_by_validation():
    assert {load(name).selection for name in names() if name.startswith("table6/")} == {"best"}


def test_the_recipes_are_shipped():
    assert (recipes.recipe_folder() / "table2/cifar10-100.toml").is_file()


def test_differences_are_told_of_the_method_that_the_recipe_names():
    records = [
        {
            "experiment": "figure6/cifar10-10",
            "method": f"alpha-{alpha}",
            "seed": seed,
            "last": {"top1": 0.8 + 0.01 * seed * alpha},
        }
        for alpha in (0.1, 0.5, 1.0)
        for seed in (0, 1)
    ]
    text = comparison(load("figure6/cifar10-10"), records)
    assert "Meta-IADA, α = 0.5 less this, paired" in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "-0.2 ± 3.2 (p 0.500)" in rows["Meta-IADA, α = 1.0"]
    assert "p" not in rows["Meta-IADA, α = 0.5"].split("0.5", 1)[1]
    for name in ("afr-table1/cifar100-100", "afr-table1/crop-flip-100", "afr-table2/cifar100-100"):
        recipe = load(name)
        assert recipe.reference in [entry.key for entry in recipe.methods]
    sections = {
        "experiment": {"title": "t", "source": "s", "metrics": ["top1"], "reference": "none"},
        "data": {"reader": "digits", "needs": "nothing"},
        "scenario": {"name": "long-tail"},
        "methods": {"ce": {}},
    }
    with pytest.raises(ValueError, match="reference: expected .*'ce'.*'none'"):
        from_sections("own/row", sections)
    del sections["experiment"]["reference"]
    assert from_sections("own/row", sections).reference == ""


def test_the_time_left_is_that_of_shortened_schedules():
    """Of other lengths, shortened to one."""
    recipe = load("afr-table1/cifar100-100")
    whole = Series([(recipe, entry, 0) for entry in recipe.methods]).costs
    shorter = limited(recipe, Limits(epochs=10))
    costs = Series([(shorter, entry, 0) for entry in shorter.methods]).costs
    assert len(set(whole)) > 1
    assert max(costs) <= 40 < min(whole)


def test_data_that_changed_where_an_outline_does_not_see_it():
    labels = torch.arange(4000) % 2
    data = Labelled(torch.zeros(4000, 3), labels, ("a", "b"))
    other = Labelled(data.inputs.clone(), labels, ("a", "b"))
    other.inputs[1] = 1.0
    before, after = {"train": fingerprint(data)}, {"train": fingerprint(other)}
    assert outline(data) == outline(other)
    assert other_parts(before, after) == ["train"]
    assert other_parts(before, {"train": fingerprint(data)}) == []
    assert other_parts({"train": outline(data)}, after) == []  # as earlier versions wrote it
    assert other_parts(before, {**before, "test": before["train"]}) == ["test"]


def test_a_first_phase_on_other_images_that_look_alike_is_refused(images, tmp_path, capsys):
    changed = shutil.copytree(images, tmp_path / "images")
    command = [
        *CONTROLS,
        "--epochs",
        "3",
        "--out",
        str(tmp_path / "runs"),
        "--set",
        *SMALLER,
        "--methods",
    ]
    assert main([*command, "ce", "--data", str(changed)]) == 0
    (file,) = (tmp_path / "runs" / FIRST_PHASES).glob("*/first-phase.pt")
    state = torch.load(file, weights_only=True)
    state["trained_on"]["train"]["content"] = "another"
    torch.save(state, file)
    assert main([*command, "deferred-la", "--data", str(changed)]) == 2
    assert "expected a first phase on these training samples" in capsys.readouterr().err
    del state["trained_on"]  # as earlier versions wrote it
    torch.save(state, file)
    assert main([*command, "deferred-la", "--data", str(changed)]) == 0


def test_a_record_says_how_often_it_was_tested(images, tmp_path):
    command = [*ROW, "--data", str(images), "--out", str(tmp_path), "--epochs", "5"]
    assert main([*command, "--evaluate-every", "2", "--methods", "ce"]) == 0
    (record,) = read_records([tmp_path])
    assert record["tests"] == 3  # after 2, 4 and 5
