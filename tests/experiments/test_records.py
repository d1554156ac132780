"""By what a finished run is known again: all that decides its result, and nothing else."""

import json

import pytest

from iada.experiments.records import equal_run, previous_record, read_records

REQUEST = {
    "experiment": "table2/row",
    "title": "A row",
    "method": "ce",
    "method_name": "CE",
    "seed": 1,
    "settings": {"method": "ce", "epochs": 3, "lr": 0.1, "clip_norm": 1.0},
    "model": {"backbone": "resnet8"},
    "split": {"seed": 1, "parts": {"train": {"count": 3, "hash": "a"}}},
    "deviations": [],
    "class_counts": [2, 1],
}
RESULT = {"last": {"top1": 0.5}}


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**REQUEST, **RESULT, **changes}), encoding="utf-8")
    return path


def with_setting(**changes):
    return {**REQUEST, "settings": {**REQUEST["settings"], **changes}}


def test_names_do_not_make_another_run(tmp_path):
    path = write(tmp_path / "a/record.json", title="Before", method_name="before")
    assert previous_record(path, REQUEST)["last"] == RESULT["last"]
    own = {"experiment": "table3/row", "title": "T", "method": "plain", "method_name": "N"}
    found = equal_run(tmp_path, {**REQUEST, **own})
    assert found == {**REQUEST, **RESULT, **own, "same_as": "a"}
    write(tmp_path / "a/record.json", same_as="b")
    assert equal_run(tmp_path, REQUEST)["same_as"] == "b"


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({**REQUEST, "seed": 2}, r"another seed \(1, here 2\)"),
        (with_setting(lr=0.2), r"another settings \(lr 0\.1, here 0\.2\)"),
        (with_setting(clip_norm=0.5), r"another settings \(clip_norm 1\.0, here 0\.5\)"),
        (with_setting(new="x"), "another settings"),
        ({**REQUEST, "model": {"backbone": "mlp"}}, "another model"),
        ({**REQUEST, "deviations": ["3 of 200 epochs"]}, "another deviations"),
        ({**REQUEST, "class_counts": [1, 2]}, "another class_counts"),
        ({**REQUEST, "split": {**REQUEST["split"], "seed": 2}}, r"split \(seed 1, here 2\)"),
        (
            {**REQUEST, "split": {**REQUEST["split"], "parts": {"train": {"count": 4}}}},
            r"another split \(samples of train\)",
        ),
    ],
)
def test_all_else_does(tmp_path, request_, told):
    path = write(tmp_path / "a/record.json")
    with pytest.raises(ValueError, match=told):
        previous_record(path, request_)
    assert equal_run(tmp_path, request_) is None


def test_what_a_former_version_did_not_record_had_its_default(tmp_path):
    settings = {"method": "ce", "epochs": 3, "lr": 0.1}  # clip_norm is 1 unless it is set
    split = {"seed": 1, "parts": {"train": {"count": 3}}}
    path = write(tmp_path / "a/record.json", settings=settings, split=split)
    assert previous_record(path, {**REQUEST, "split": {**split, **REQUEST["split"]}})
    with pytest.raises(ValueError, match="another settings"):
        previous_record(path, with_setting(clip_norm=0.0))


def test_each_run_is_read_once_under_the_names_of_today(tmp_path):
    """Runs that deviate otherwise are others; a copy, and a list in one file, are not."""
    former = {"departures": ["3 of 200 epochs"], "strengths": {"share_clean": 0.5}}
    plain = {name: value for name, value in REQUEST.items() if name != "deviations"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/record.json").write_text(json.dumps([{**plain, **former}, plain, plain]))
    write(tmp_path / "b/record.json", last=None)
    write(tmp_path / "c/record.json", seed=2)
    found = read_records([tmp_path, tmp_path / "c/record.json"])
    assert [(run["seed"], run.get("deviations")) for run in found] == [
        (1, ["3 of 200 epochs"]),
        (1, None),
        (2, []),
    ]
    assert found[0]["epsilon"] == {"share_clean": 0.5}
