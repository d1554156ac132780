"""Pages and figures of made-up records with known values; what is missing is left out."""

import copy
import functools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from iada.experiments.report import charts, style, write_page
from iada.experiments.report.charts import mean_and_spread
from iada.experiments.report.figures import draw_all, main_variants
from iada.experiments.report.page import made
from iada.experiments.report.style import HATCHES, PALETTE, Picture, series_styles
from iada.experiments.report.variants import by_experiment, variants_of

pytestmark = pytest.mark.slow

METHODS = {
    "ce": "CE",
    "logit-adjustment": "Logit Adjustment",
    "metasaug": "MetaSAug",
    "meta-iada": "Meta-IADA",
}
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EPOCHS = 40


def make_record(method="ce", seed=0, experiment="table2/cifar10-100", classes=10, **more):
    """A run whose top-1 is 0.7 + 0.04 · (place of the method) + 0.01 · seed."""
    place = list(METHODS).index(method)
    random = np.random.default_rng(100 * place + seed)
    top1 = 0.7 + 0.04 * place + 0.01 * seed
    counts = (5000 * 0.01 ** (np.arange(classes) / max(classes - 1, 1))).astype(int)
    recall = np.clip(1.4 * top1 - 0.4 - 0.03 * np.arange(classes) + 0.2, 0.05, 0.97)
    confusion = random.multinomial(20, np.ones(classes) / classes, size=classes)
    confusion[np.arange(classes), np.arange(classes)] += (300 * recall).astype(int)
    figures = {"top1": top1, "balanced": top1 - 0.01, "many": 0.9, "medium": 0.7, "few": None}
    epochs = np.arange(EPOCHS)
    curve = [
        {
            "epoch": int(e),
            "loss": float(2.3 * np.exp(-e / 12) + 0.1 * place),
            "accuracy": float(top1 * (1 - np.exp(-(e + 1) / 8)) + 0.01 * random.normal()),
            "generalization": float(1 + e / 10) if method == "meta-iada" and e >= 20 else None,
            "robustness": float(-0.1 * e / 40) if method == "meta-iada" and e >= 20 else None,
            "fairness": float(0.5 * np.exp(-e / 20)) if method == "meta-iada" and e >= 20 else None,
        }
        for e in epochs
    ]
    ours = method == "meta-iada"
    bell = np.exp(-((np.linspace(-1, 1, 20) - 0.2) ** 2) / 0.08)
    epsilon = {
        "class_share": [0.2 + 0.06 * c if c else None for c in range(classes)],
        "share_clean": 0.61,
        "share_flipped": 0.07,
        "histogram_clean": (1000 * bell).astype(int).tolist(),
        "histogram_flipped": (400 * bell[::-1]).astype(int).tolist(),
    }
    spectrum = [(3.0 * np.exp(-np.arange(16) / (2 + c))).tolist() for c in range(classes)]
    surrogate = {
        "classes": list(range(classes)),
        "gap": [0.01 * (c + 1) for c in range(classes)],
    }
    return {
        "experiment": experiment,
        "title": "CIFAR10-LT 100:1",
        "method": method,
        "method_name": METHODS[method],
        "seed": seed,
        "settings": {"method": method, "lr": 0.1, "alpha": 0.5, "beta": 1.0, "seed": seed},
        "class_names": NAMES if classes == 10 else [f"C{c + 1}" for c in range(classes)],
        "class_counts": counts.tolist(),
        "last": figures,
        "best": {**figures, "top1": top1 + 0.005},
        "best_epoch": 33,
        "confusion": confusion.tolist(),
        "group_accuracy": None,
        "curve": curve,
        "epsilon": epsilon if ours else None,
        "spectrum": spectrum if ours else None,
        "surrogate": surrogate if ours else None,
        "seconds": 123.4,
        "machine": {"device": "a machine", "torch": "2.0"},
        **more,
    }


def make_comparison(seeds=3):
    return [make_record(method, seed) for method in METHODS for seed in range(seeds)]


def make_groups():
    groups = ["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"]
    found = []
    for place, method in enumerate(("ce", "meta-iada")):
        accuracy = dict(zip(groups, (0.99, 0.78 + 0.1 * place, None, 0.95), strict=True))
        last = {"average": 0.95, "worst_group": 0.78 + 0.1 * place, "top1": 0.95}
        found.append(
            make_record(
                method,
                experiment="table6/waterbirds",
                title="Waterbirds",
                classes=2,
                group_accuracy=accuracy,
                last=last,
                best=last,
            )
        )
    return found


def make_sweep():
    found = []
    for alpha, beta in [(1.0, 1.0), (0.1, 1.0), (0.25, 1.0), (0.5, 1.0), (0.5, 0.5), (0.5, 1.5)]:
        for seed in range(2):
            record = make_record("meta-iada", seed, "fig6/cifar10-10", title="CIFAR10-LT 10:1")
            record["method"] = f"alpha-{alpha}" if beta == 1 else f"beta-{beta}"
            changed = f"α = {alpha}" if beta == 1 else f"β = {beta}"
            record["method_name"] = f"Meta-IADA, {changed}"
            record["settings"] |= {"alpha": alpha, "beta": beta}
            top1 = 0.9 - (alpha - 0.5) ** 2 / 4 - (beta - 1) ** 2 / 20 + 0.01 * seed
            record["last"] = {"top1": top1}
            found.append(record)
    return found


def corrupted(place=0):
    rows = {"gaussian_noise": [0.6, 0.5, 0.4, 0.3, 0.2], "fog": [0.7, 0.65, 0.6, 0.55, 0.5]}
    rows = {name: [value + 0.05 * place for value in row] for name, row in rows.items()}
    values = [value for row in rows.values() for value in row]
    return {
        "source": "made",
        "clean": 0.8,
        "accuracy": rows,
        "mean": sum(values) / len(values),
    }


def moved(wrong=None):
    def target(kind, length, residual):
        return {
            "kind": kind,
            "moved": length,
            "prediction": 3,
            "own_rank": 0,
            "nearest": [{"row": 9, "label": 2, "distance": 1.25}],
            "residual": residual,
            "below_zero": 0.75 * length,
            "nearest_image": "data:image/png;base64,bmVhcg==",
            "inverted_image": "data:image/png;base64,bWFkZQ==",
        }

    targets = [target("h", 0.0, 0.1), target("h + ε s", 2.0, 0.9), target("drawn", 4.0, 2.1)]
    sample = {
        "row": 7,
        "label": 1,
        "wrong": wrong,
        "epsilon": -0.25,
        "image": "data:image/png;base64,b3du",
        "targets": targets,
    }
    radii = [0.0, 1.5, 2.5]
    return {"alpha": 0.5, "width": 64, "steps": 300, "radii": radii, "samples": [sample]}


class Page(HTMLParser):
    """What a page holds; fails on tags that are not closed in order."""

    VOID = ("meta", "img", "br", "source")

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.ids, self.rows, self.text = [], [], set(), [], ""
        self.headings, self.links = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "svg":
            self.pictures.append(found)
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids.add(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def row(self, label):
        """The cells of the first row of that label."""
        return next(row for row in self.rows if row and row[0] == label)


def read(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert all(picture["aria-label"].strip() for picture in page.pictures)
    return page


def names(records):
    """The figures of the records' only experiment."""
    ((_, part),) = by_experiment(records).items()
    pictures = draw_all("Table/Row!", "A title", variants_of(part), "top1")
    return {picture.name.removeprefix("table-row-"): picture for picture in pictures}


@pytest.fixture
def sketch(monkeypatch):
    """Everything is drawn, but not laid out and rendered, which takes most of the time."""

    def paint(name, caption, alt, draw, panels=1, columns=1, height=3.0):
        figure = Figure()
        draw(figure, list(figure.subplots(panels, 1, squeeze=False).flat))
        return Picture(name, caption, alt, "<svg/>", "<svg/>")

    monkeypatch.setattr(charts, "paint", paint)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    published = {("table2/cifar10-100", m): {"top1": 80.0 + i} for i, m in enumerate(METHODS)}
    del published["table2/cifar10-100", "logit-adjustment"]
    folder = tmp_path_factory.mktemp("page")
    path = write_page(make_comparison(), folder, published, "A <comparison>", "python -m iada")
    return path, read(path)


def test_page_is_whole_and_stands_alone(comparison):
    path, page = comparison
    assert path.name == "index.html"
    assert len(page.pictures) >= 16  # each for wide and for narrow screens
    text = re.sub(r"base64,\s*[A-Za-z0-9+/=\s]*", "", path.read_text())
    used = re.findall(r'(?:url\(|href=")#([^)"]*)', text)
    assert used
    assert set(used) <= page.ids
    assert "#000000" not in text  # black is the text's colour, on dark screens too
    assert "http" not in text
    assert "A &lt;comparison&gt;" in text
    assert "NaN" not in text
    assert "nan" not in [word.strip(",.()%:") for word in page.text.split()]
    assert all("nan" not in picture["aria-label"].split() for picture in page.pictures)
    assert json.loads((path.parent / "records.json").read_text()) == make_comparison()


def test_table_has_last_best_and_published(comparison):
    _, page = comparison
    ahead = "+12.0 ± 0.0"  # seed by seed the same, of which no test has a p
    assert page.row("CE") == ["CE", "71.00 ± 1.00", "71.50 ± 1.00", "80.00", ahead]
    assert page.row("Meta-IADA") == ["Meta-IADA", "83.00 ± 1.00", "83.50 ± 1.00", "83.00", "–"]
    assert page.row("Logit Adjustment")[3] == "–"  # nothing published of it
    assert [row[0] for row in page.rows[1:5]] == list(METHODS.values())


def test_seeds_are_told(sketch, comparison, tmp_path):
    assert "over 3 seeds" in comparison[1].text
    page = read(write_page(make_comparison()[:5], tmp_path))
    assert page.row("CE")[-1] == "3"
    assert page.row("Logit Adjustment")[-1] == "2"
    assert "paired" not in page.text.lower()  # there is no Meta-IADA


def test_each_metric_has_its_paired_differences(sketch, tmp_path):
    records = [
        {**record, "seed": seed, "last": {**record["last"], "worst_group": worst}}
        for record in make_groups()
        for seed, worst in ((0, 0.7), (1, 0.74 + 0.04 * (record["method"] == "meta-iada")))
    ]
    page = read(write_page(records, tmp_path, reference="meta-iada"))
    row = page.row("CE")
    assert page.row("method")[-2:] == [
        "Meta-IADA less this, paired: Average accuracy",
        "Meta-IADA less this, paired: Worst group",
    ]
    assert row[-2:] == ["+0.0 ± 0.0 (p 1.000)", "+2.0 ± 25.4 (p 0.500)"]
    assert "interval of 95 %" in page.text
    other = read(write_page(records, tmp_path, reference="ce"))
    assert other.row("Meta-IADA")[-1] == "-2.0 ± 25.4 (p 0.500)"
    assert other.row("CE")[-1] == "–"


def test_best_is_bold(comparison):
    path, _ = comparison
    table = path.read_text().split("</table>")[0]
    assert table.count("<strong>") == 1
    assert "<strong>83.00 ± 1.00</strong>" in table


def test_every_figure_of_a_long_tail(sketch):
    found = names(make_comparison(seeds=2))
    assert list(found) == [
        "classes",
        "shots",
        "confusion",
        "curves",
        "adversarial-share",
        "clean-flipped",
        "terms",
        "surrogate",
        "spectrum",
    ]
    assert "Meta-IADA: from 26.0 (automobile) to 74.0 (truck)." in found["adversarial-share"].alt
    assert "61.0 % of those with a right label and 7.0 %" in found["clean-flipped"].alt
    assert "from 1.0 (airplane)" not in found["surrogate"].alt
    assert "from 0.0 (airplane) to 0.1 (truck)" in found["surrogate"].alt
    assert "MetaSAug" in found["confusion"].alt


def test_groups_are_headlined_and_drawn(sketch, tmp_path):
    page = read(write_page(make_groups(), tmp_path))
    assert page.row("CE") == ["CE", "95.00", "95.00", "78.00", "78.00"]
    found = names(make_groups())
    assert "groups" in found
    assert "from 78.0 (landbird, water) to 99.0 (landbird, land)" in found["groups"].alt


def test_sweep_over_alpha_and_beta(sketch, tmp_path):
    found = names(make_sweep())["sensitivity"]
    assert "over α: Meta-IADA 86.5 at 0.1, 88.9 at 0.25, 90.5 at 0.5, 84.2 at 1" in found.alt
    assert "over β: Meta-IADA 89.2 at 0.5, 90.5 at 1, 89.2 at 1.5" in found.alt
    variants = variants_of(make_sweep())
    assert len(variants) == 6
    (main,) = main_variants(variants)
    assert (main.label, main.style.colour) == ("Meta-IADA, α = 0.5", "#D55E00")
    page = read(write_page(make_sweep(), tmp_path))
    assert page.row("Meta-IADA, α = 0.25")[1] == "88.94 ± 0.71"
    assert "sensitivity" not in names(make_comparison(1))


def test_sweep_by_settings_alone(sketch):
    records = make_sweep()
    for record in records:
        record |= {"method": "meta-iada", "method_name": "Meta-IADA"}
    assert variants_of(records)[0].label == "Meta-IADA (alpha 0.1, beta 1.0)"
    assert names(records)["sensitivity"].alt == names(make_sweep())["sensitivity"].alt


def test_an_ablation_is_no_sweep(sketch):
    records = [r for r in make_sweep() if r["settings"]["alpha"] in (0.1, 0.5)]
    records = [r for r in records if r["settings"]["beta"] in (0.5, 1.0)]
    assert len(main_variants(variants_of(records))) == 3
    assert "sensitivity" not in names(records)
    other = make_sweep()
    other[0]["settings"]["perturbation"] = "constant"
    assert "sensitivity" not in names(other)


@pytest.mark.parametrize(
    ("judge", "said"), [("validation_worst_group", "best on the validation"), ("test_top1", "hind")]
)
def test_how_the_best_epoch_was_chosen_is_said(sketch, tmp_path, judge, said):
    assert said in read(write_page([make_record(best_by=judge)], tmp_path)).text
    assert said not in read(write_page([make_record()], tmp_path)).text


def test_curve_that_is_not_measured_each_epoch():
    values = np.full((1, 9), np.nan)
    values[0, 2::3] = (1.0, 2.0, 3.0)
    axes = Figure().subplots()
    charts._band(axes, np.arange(9), charts.Series("CE", charts.SeriesStyle("black"), values))
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [2, 5, 8]
    assert line.get_ydata().tolist() == [1, 2, 3]


def test_several_experiments_have_an_overview(sketch, tmp_path):
    records = make_comparison(1) + make_groups()
    page = read(write_page(records, tmp_path))
    assert page.headings == ["Overview", "CIFAR10-LT 100:1", "Waterbirds"]
    assert page.row("CE") == ["CE", "70.00", "95.00"]
    assert page.row("MetaSAug") == ["MetaSAug", "78.00", "–"]


def test_published_figure_of_an_ablation_goes_by_its_name(sketch, tmp_path):
    records = [make_record("meta-iada", 0), make_record("meta-iada", 0, method_name="Without G")]
    published = {
        ("table2/cifar10-100", "meta-iada"): {"top1": 84.01},
        ("table2/cifar10-100", "Without G"): {"top1": 81.8},
    }
    page = read(write_page(records, tmp_path, published))
    assert page.row("Without G")[3] == "81.80"
    assert (
        page.row("Meta-IADA")[3] == "–"
    )  # two variants share the method: which is meant is not said
    published["table2/cifar10-100", "Meta-IADA"] = {"top1": 84.01}
    assert read(write_page(records, tmp_path, published)).row("Meta-IADA")[3] == "84.01"


@pytest.mark.parametrize(
    ("key", "gone"),
    [
        ("epsilon", {"adversarial-share", "clean-flipped"}),
        ("confusion", {"classes", "confusion"}),
        ("curve", {"curves", "terms"}),
        ("spectrum", {"spectrum"}),
        ("surrogate", {"surrogate"}),
        ("last", {"shots"}),
        ("best", set()),
        ("class_names", set()),
        ("class_counts", set()),
        ("settings", set()),
        ("title", set()),
        ("machine", set()),
        ("seconds", set()),
        ("seed", set()),
        ("method_name", set()),
        ("best_epoch", set()),
    ],
)
def test_what_is_missing_is_left_out(key, gone, sketch, tmp_path):
    whole = [make_record("ce"), make_record("meta-iada")]
    absent, null = copy.deepcopy(whole), copy.deepcopy(whole)
    for record in absent:
        del record[key]
    for record in null:
        record[key] = None
    drawn = names_of_whole()
    assert drawn - set(names(null)) == gone
    page = read(write_page(absent, tmp_path))
    assert len(page.pictures) == 2 * (len(drawn) - len(gone))


@functools.cache
def names_of_whole():
    """Drawn once, not for each key that is missing."""
    return frozenset(names([make_record("ce"), make_record("meta-iada")]))


def test_bare_records_give_a_page(sketch, tmp_path):
    read(write_page([{"experiment": "e", "method": "ce"}], tmp_path))


def test_parts_of_epsilon(sketch, tmp_path):
    record = make_record("meta-iada")
    record["epsilon"] |= {"share_flipped": None}
    assert "clean-flipped" not in names([record])
    record["epsilon"] |= {"class_share": [None] * 10}
    assert "adversarial-share" not in names([record])


def test_reliability_is_drawn_beside_the_diagonal(sketch):
    bins = {"count": [0, 4, 8], "confidence": [None, 0.5, 0.9], "accuracy": [None, 0.25, 0.75]}
    found = names([make_record("ce", reliability=bins), make_record("metasaug")])["reliability"]
    assert "CE 25.0 at 50, 75.0 at 83.3" in found.alt
    assert "nan" not in found.alt
    assert "as sure as right 16.7 at 16.7" in found.alt


def test_detection_of_wrong_labels_is_told(sketch):
    record = make_record("meta-iada")
    issues = {"auroc": 0.9, "precision": 0.8, "base_rate": 0.4}
    record["epsilon"] = record["epsilon"] | {"label_issues": issues}
    caption = names([record])["clean-flipped"].caption
    assert "AUROC of 0.900" in caption
    assert "80.0 % of the samples ranked first are wrong (40.0 % by chance)" in caption


def test_many_series_leave_room_for_the_axes():
    figure = Figure(figsize=(4, 3.3), layout="constrained")
    axes = figure.subplots()
    for number in range(25):
        axes.plot([0, 1], label=f"a method with a long name, {number}")
    style.legend(figure, axes)
    figure.draw_without_rendering()
    assert axes.get_position().height * figure.get_figheight() > 1


def test_an_untrained_network_is_the_control(sketch):
    record = make_record("meta-iada")
    control = make_record("meta-iada", method_name="Ω untrained")
    control["settings"] = record["settings"] | {"perturbation": "untrained"}
    control["epsilon"] = record["epsilon"] | {"share_clean": 0.52, "share_flipped": 0.48}
    record["settings"] |= {"perturbation": "learned"}
    found = names([record, control])
    assert "owe nothing to learning" in found["adversarial-share"].caption
    assert found["adversarial-share"].alt.count("from 26.0") == 2
    assert "52.0 % of the visits with a right label" in found["clean-flipped"].caption
    assert "48.0 % with a flipped one" in found["clean-flipped"].caption
    assert "Control" not in found["clean-flipped-1"].caption


def test_many_classes_and_one_class_without_samples(sketch, tmp_path):
    record = make_record("meta-iada", classes=100)
    record["confusion"][7] = [0] * 100
    found = names([record])
    assert "classes" not in found
    assert "adversarial-share" in found
    few = make_record("meta-iada")
    few["confusion"][7] = [0] * 10
    assert "nan" not in names([few])["classes"].alt
    read(write_page([record], tmp_path))


def test_runs_of_other_lengths_share_a_curve(sketch):
    longer, shorter = make_record("ce", 0), make_record("ce", 1)
    shorter["curve"] = shorter["curve"][:10]
    assert "curves" in names([longer, shorter])


def test_seeds_come_once_and_records_at_all(sketch, tmp_path):
    with pytest.raises(ValueError, match="records: expected one record for each seed"):
        write_page([make_record(), make_record()], tmp_path)
    with pytest.raises(ValueError, match="records: expected at least one"):
        write_page([], tmp_path)


def test_settings_that_differ_make_an_arm():
    one, other = make_record("ce", 0), make_record("ce", 1)
    assert len(variants_of([one, other])) == 1
    other["settings"]["lr"] = 0.2
    other["settings"]["checkpoint_every"] = 5
    assert [variant.label for variant in variants_of([one, other])] == [
        "CE (lr 0.1)",
        "CE (lr 0.2)",
    ]


def test_looks_differ_and_methods_keep_their_colour():
    methods = list(METHODS) * 8
    found = series_styles(methods)
    assert len(set(found)) == len(found) == 32 <= len(PALETTE) * len(HATCHES)
    assert [style.colour for style in series_styles(["meta-iada", "ce"])] == ["#D55E00", "#999999"]
    assert len(series_styles(["x"] * 50)) == 50


def test_spread_ignores_what_is_not_known():
    mean, error = mean_and_spread(np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]]))
    np.testing.assert_array_equal(mean, [2.0, 5.0, np.nan])
    np.testing.assert_allclose(error, [2**0.5, 0.0, 0.0])


def test_pages_repeat_byte_for_byte(tmp_path):
    record = make_record(classes=2)
    paths = [write_page([record], tmp_path / name) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_matplotlib_waits_until_something_is_drawn():
    code = (
        "import sys, iada.experiments.metrics, iada.experiments.diagnostics; "
        "import iada.experiments.report, iada.experiments.demo; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wrong_labels_make_no_class_rare(sketch):
    assert "shots" in names([make_record()])
    runs = [make_record(), make_record("meta-iada")]
    found = names([{**run, "split": {"scenario": "noise"}} for run in runs])
    assert "shots" not in found
    assert "most to fewest" not in found["adversarial-share"].caption


def test_the_page_says_when_by_what_and_how_long():
    machine = {"iada": "0.1.0"}
    records = [
        {"finished": "2026-01-02T03:04Z", "commit": "abc1234", "seconds": 61, "machine": machine},
        {"finished": "2026-01-01T00:00Z", "commit": "abc1234", "seconds": None, "machine": "cpu"},
    ]
    said = "02 January 2026, 03:04 UTC; iada 0.1.0; commit abc1234; 1 of 2 runs took 0:01:01"
    assert made(records) == said
    assert made([{}]) == ""


def test_corruptions_have_a_table_and_a_figure(sketch, tmp_path):
    records = [make_record("ce", seed, corruptions=corrupted(seed)) for seed in (0, 1)]
    records += [make_record("meta-iada", seed) for seed in (0, 1)]  # not measured
    page = read(write_page(records, tmp_path))
    assert page.row("corruption") == ["corruption", "CE"]
    assert page.row("none") == ["none", "80.0 ± 0.0"]
    assert page.row("mean")[1].startswith("52.5")
    assert page.row("gaussian noise") == ["gaussian noise", "42.5 ± 3.5"]
    assert "not the files of CIFAR-10-C" in page.text
    both = [{**run, "corruptions": corrupted(run["seed"])} for run in records]
    page = read(write_page(both, tmp_path))
    assert page.row("mean: Meta-IADA less this, paired")[1:] == ["+0.0 ± 0.0 (p 1.000)", "–"]
    picture = names(records)["corruptions"]
    for told in ("80.0 at 0", "67.5 at 1", "37.5 at 5"):
        assert told in picture.alt
    assert "corruptions" not in names(make_comparison())
    published = {**corrupted(), "source": "published"}
    page = read(write_page([make_record(corruptions=published)], tmp_path))
    assert "Corruptions as published" in page.text
    assert "not the files" not in page.text


@pytest.mark.parametrize(("wrong", "said"), [(None, ""), (True, ", wrong label")])
def test_moved_features_are_shown_as_they_are(wrong, said, sketch, tmp_path):
    records = [make_record("meta-iada", 3, moved_features=moved(wrong)), make_record("ce", 3)]
    path = write_page(records, tmp_path)
    page = read(path)
    text = path.read_text(encoding="utf-8")
    assert text.count("<img") == text.count('alt="') == 1 + 2 * 3
    assert text.count("bmVhcg==") == text.count("bWFkZQ==") == 3
    assert "training image" in page.row("training image")[0]
    (row,) = [cells for cells in page.rows if cells and cells[0].startswith("automobile")]
    assert row[0] == f"automobile{said}ε -0.250√tr Σ_y 1.50"
    assert row[1] == " nearest: bird, at 1.25predicted: catmade: 0.10 off"
    assert row[2] == " moved by 2.00nearest: bird, at 1.25predicted: catmade: 0.90 off"
    for told in (
        "Meta-IADA, CIFAR10-LT 100:1, seed 3",
        "α = 0.5",
        "300 steps",
        "√tr Σ_y are 1.50 to 2.50",
        "√A = 8.00",
        "Of the 2 moved features 1 have one that is off by more than half of the move",
        "1.50 to 3.00 of each moved one lies there",
    ):
        assert told in page.text, told
