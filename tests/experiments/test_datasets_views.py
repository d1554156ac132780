"""What a trainer gets of a data set: whole batches, the same however a run is cut up."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iada.experiments.datasets import READERS, Labelled, read_civilcomments, read_folder
from iada.experiments.datasets.augment import HOLE, crop_flip, cutout
from iada.experiments.datasets.counter_rng import draws
from iada.experiments.datasets.views import (
    CIFAR10,
    NORMALISATIONS,
    FileView,
    MemoryView,
    TextView,
    load_tokenizer,
    middle,
    random_part,
)
from iada.experiments.experiment import make_view
from iada.experiments.model_file import describe
from iada.experiments.recipe import ModelSettings, load
from iada.models.small import mlp
from iada.training.config import TrainerConfig
from iada.training.trainer import Trainer
from iada.utils.loading import TensorData, batches, count_classes
from iada.utils.seeds import seed_of
from tests.helpers import dataset_files as made

pytestmark = pytest.mark.slow

NAMES = ("a", "b", "c")


def images(count=40, size=32, channels=3):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_digits_without_colours_are_normalised_as_mnist(tmp_path):
    parts = READERS["mnist"](made.write_mnist(tmp_path))
    view = make_view(load("table6/cmnist"), parts["train"], torch.device("cpu"))
    images, _, _ = next(iter(batches(view, [[0, 1]])))
    expected = (parts["train"].inputs[:2].float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(images, expected)


def labelled(count=40, size=32):
    return Labelled(images(count, size), torch.arange(count) % 3, NAMES)


def in_python(seed, step, row, place, bound):
    """The same draw, in integers that do not wrap by themselves."""
    golden, everything = 0x9E3779B97F4A7C15, 2**64 - 1

    def mixed(bits):
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & everything
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & everything
        return bits ^ bits >> 31

    sample = mixed(row * golden + seed_of(seed, step) & everything)
    return (mixed(sample + (place + 1) * golden & everything) >> 33) * bound >> 31


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**31), st.integers(1, 2**31 - 1)
)
def test_draws_are_those_of_splitmix(seed, step, row, bound):
    found = draws(seed, step, torch.tensor([row, 5]), (bound, 7))
    assert found[0][0] == in_python(seed, step, row, 0, bound)
    assert found[1][1] == in_python(seed, step, 5, 1, 7)


def test_draws_are_even_and_independent():
    found = draws(3, 8, torch.arange(90_000), (9, 9))
    table = torch.bincount(found[0] * 9 + found[1], minlength=81)
    expected = 90_000 / 81
    assert float(((table - expected) ** 2 / expected).sum()) < 130  # χ² of 80 degrees: p = 0.0003


def by_hand(image, down, right, flip, padding="black"):
    """Pad, crop and flip one image in numpy."""
    mode = {"black": "constant", "reflect": "reflect"}[padding]
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode=mode)
    cut = padded[:, down : down + 32, right : right + 32]
    return torch.from_numpy((cut[:, :, ::-1] if flip else cut).copy())


@pytest.mark.parametrize("padding", ["black", "reflect"])
def test_crop_flip_against_numpy(padding):
    data, rows = images(), torch.arange(40)
    found = crop_flip(data, 1, 2, rows, padding)
    down, right, flip = draws(1, 2, rows, (9, 9, 2))
    assert down.unique().numel() > 5
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.3)
    for row in rows.tolist():
        place = int(down[row]), int(right[row]), int(flip[row])
        expected = by_hand(data[row], *place, padding)
        assert torch.equal(found[row], expected)


def test_cutout_blackens_one_square():
    ones = torch.full((200, 3, 32, 32), 7, dtype=torch.uint8)
    found = cutout(ones, 0, 0, torch.arange(200))
    holes = found == 0
    assert torch.equal(holes[:, 0], holes[:, 2])
    sides = holes[:, 0].any(dim=2).sum(dim=1), holes[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(holes[:, 0].sum(dim=(1, 2)), sides[0] * sides[1])
    assert sides[0].max() == HOLE
    assert sides[0].min() >= HOLE // 2
    assert (ones == 7).all()


def test_memory_view_normalises():
    data = labelled()
    inputs, labels, index = MemoryView(data, CIFAR10).whole_batch(0, 0, [5, 3])
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in CIFAR10)
    expected = (data.inputs[3].double() / 255 - mean) / deviation
    torch.testing.assert_close(inputs[1].double(), expected, rtol=0, atol=1e-6)
    assert labels.tolist() == [2, 0]
    assert index.tolist() == [5, 3]
    single, label = MemoryView(data, CIFAR10)[3]
    assert torch.equal(single, inputs[1])
    assert label == 0


@pytest.mark.parametrize("augment", [None, "crop-flip"])
def test_a_batch_is_the_sum_of_its_parts(augment):
    view = MemoryView(labelled(), CIFAR10, augment)
    order = [[3, 1, 4, 15], [9, 2, 6, 5]]
    whole = list(batches(view, order, seed=7, first_step=20))
    resumed = list(batches(view, order[1:], seed=7, first_step=21))
    ranks = [list(batches(view, [r[half] for r in order], seed=7, first_step=20)) for half in
             (slice(0, 2), slice(2, 4))]  # fmt: skip
    assert torch.equal(whole[1][0], resumed[0][0])
    for step in (0, 1):
        parts = [rank[step] for rank in ranks]
        for place in range(3):
            assert torch.equal(whole[step][place], torch.cat([part[place] for part in parts]))
    again = next(iter(batches(view, order, seed=8, first_step=20)))
    assert torch.equal(again[0], whole[0][0]) == (augment is None)


def test_serving_leaves_the_generators_alone():
    view = MemoryView(labelled(), CIFAR10, "crop-flip")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(batches(view, [[1, 2]], num_workers=2))
    assert torch.equal(torch.rand(1), expected)


def test_single_samples_are_drawn_anew():
    view = MemoryView(labelled(), CIFAR10, "crop-flip")
    assert len({view[0][0].sum().item() for _ in range(8)}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": "flip"}, "augment: expected one of None, 'crop-flip'"),
        ({"padding": "white"}, "padding: expected one of 'black', 'reflect', got 'white'"),
        ({"normalise": ((0.5,), (0.5,))}, "normalise: expected 3 means and deviations, got 1"),
        ({"data": Labelled(["x"], torch.tensor([0]), ("a",))}, "data: expected images in memory"),
    ],
)
def test_memory_view_errors(change, message):
    with pytest.raises(ValueError, match=message):
        MemoryView(**{"data": labelled(), "normalise": CIFAR10, **change})


def test_auto_augment_draws_by_place():
    pytest.importorskip("kornia.augmentation.auto")
    view = MemoryView(labelled(12), CIFAR10, "autoaugment-cutout", device="meta")
    assert not view.in_memory
    loaded = next(iter(batches(view, [[0, 4, 7]], num_workers=2, seed=1, first_step=5)))
    whole = view.whole_batch(1, 5, [0, 4, 7])[0]
    assert torch.equal(loaded[0], whole)
    assert torch.equal(whole[1:], view.whole_batch(1, 5, [4, 7])[0])
    plain = MemoryView(labelled(12), CIFAR10, "crop-flip").whole_batch(1, 5, [0, 4, 7])[0]
    assert not torch.equal(whole, plain)


def test_half_of_the_images_have_a_contrastive_augmentation():
    pytest.importorskip("kornia.augmentation")
    rows, normalise = list(range(40)), ((0.0,) * 3, (1.0,) * 3)
    kinds = ("autoaugment-cutout", "autoaugment-contrastive")
    one, both = (MemoryView(labelled(), normalise, kind) for kind in kinds)
    found = both.whole_batch(1, 5, rows)[0]
    other = torch.tensor([not torch.equal(*pair) for pair in zip(
        found, one.whole_batch(1, 5, rows)[0], strict=True)])  # fmt: skip
    assert 8 < int(other.sum()) < 32
    assert torch.equal(found[20:], both.whole_batch(1, 5, rows[20:])[0])
    grey = (found[:, 0] == found[:, 1]).flatten(1).all(dim=1)
    assert (grey <= other).all()
    assert int(grey.sum()) > 0
    assert 0 <= found.min() < found.max() <= 1
    second_stage = MemoryView(labelled(), normalise, kinds[1], plain_from=5)
    plain = MemoryView(labelled(), normalise, "crop-flip").whole_batch(1, 5, rows)[0]
    assert torch.equal(second_stage.whole_batch(1, 5, rows)[0], plain)


def test_means_and_padding_are_those_of_the_recipe(tmp_path):
    made.write_folder(tmp_path, size=(90, 70), suffix=".png")
    files, device = read_folder(tmp_path)["train"], torch.device("cpu")
    model = {"normalise": "inaturalist18"}
    view = make_view(load("table3/inat2018"), files, device)
    usual = make_view(load("table3/inat2018", {"model": {"normalise": ""}}), files, device)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in NORMALISATIONS["inaturalist18"])
    pixels = usual[0][0] * usual.deviation + usual.mean
    torch.testing.assert_close(view[0][0], (pixels - mean) / deviation)
    about = describe(ModelSettings(**model), files, {"path": tmp_path}, torch.nn.Linear(2, 3))
    assert about["normalise"] == NORMALISATIONS["inaturalist18"]
    small = load("table2/cifar10-100", {"model": {"crop_padding": "reflect", **model}})
    assert make_view(small, labelled(), device).padding == "reflect"
    assert make_view(small, labelled(), device).mean.flatten().tolist() == mean.flatten().tolist()
    features = Labelled(torch.zeros(3, 5), torch.arange(3), NAMES)
    for data, changes, message in (
        (files, {"crop_padding": "reflect"}, "crop_padding: expected small images, got image f"),
        (features, {"crop_padding": "reflect"}, "crop_padding: expected images, got features"),
        (features, model, "normalise: expected images, got features"),
        (files, {"augment": "autoaugment-contrastive"}, "augment: expected 'none' or 'crop-flip'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_view(load("table2/cifar10-100", {"model": changes}), data, device)
    with pytest.raises(ValueError, match="normalise: expected one of '', 'cifar10'"):
        ModelSettings(normalise="imagenet21k")


def without(module, code):
    """Runs code in a process in which `module` cannot be imported."""
    start = f"import sys; sys.modules[{module!r}] = None\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, check=False
    )


def test_data_sets_import_without_the_optional_packages():
    blocked = "; ".join(
        f"sys.modules[{name!r}] = None"
        for name in ("transformers", "sklearn", "kornia", "torchvision")
    )
    done = without(
        "PIL", f"{blocked}\nimport iada.experiments.datasets, iada.experiments.scenarios"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("PIL", "from iada.experiments.datasets.images import open_image as f; f(None)"),
        ("kornia", "from iada.experiments.datasets.augment import auto_augment as f; f()"),
        (
            "transformers",
            "from iada.experiments.datasets.views import load_tokenizer as f; f('.')",
        ),
    ],
)
def test_a_missing_package_is_named(module, code):
    done = without(module, code)
    assert "pip install 'iada[paper]'" in done.stderr.splitlines()[-1]


def test_file_view(tmp_path):
    made.write_folder(tmp_path, size=(90, 70), suffix=".png")
    data = read_folder(tmp_path)["train"]
    plain = FileView(data, size=32, normalise=((0, 0, 0), (1, 1, 1)))
    inputs, labels, _ = plain.whole_batch(0, 0, [0, 5])
    assert inputs.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    image = Image.open(data.inputs[5])
    box = (90 - 61.25) / 2, (70 - 61.25) / 2, (90 + 61.25) / 2, (70 + 61.25) / 2
    cut = np.array(image.resize((32, 32), Image.Resampling.BILINEAR, box=box))
    expected = torch.from_numpy(cut).permute(2, 0, 1) / 255
    torch.testing.assert_close(inputs[1], expected, rtol=0, atol=1e-6)
    assert plain[5][1] == 1


def test_file_view_augments_by_place(tmp_path):
    made.write_folder(tmp_path, size=(90, 70))
    data = read_folder(tmp_path)["train"]
    view = FileView(data, augment=True, size=16)
    whole = view.whole_batch(1, 5, [0, 3, 2])[0]
    assert torch.equal(whole[1:], view.whole_batch(1, 5, [3, 2])[0])
    assert not torch.equal(whole, view.whole_batch(1, 6, [0, 3, 2])[0])
    loaded = next(iter(batches(view, [[0, 3, 2]], num_workers=1, seed=1, first_step=5)))
    assert torch.equal(loaded[0], whole)


def test_half_of_the_files_are_flipped_by_their_last_draw(tmp_path):
    made.write_folder(tmp_path, size=(90, 90), suffix=".png")
    data = read_folder(tmp_path)["train"]
    for file in data.inputs:  # brighter to the right
        Image.fromarray(np.tile(np.arange(90, dtype=np.uint8) * 2, (90, 1))).save(file)
    rows = torch.arange(len(data))
    found = torch.cat(
        [FileView(data, augment=True, size=8).inputs(3, step, rows)[:, 0, 0] for step in range(4)]
    )
    drawn = torch.cat([draws(3, step, rows, (2**30,) * 22 + (2,))[-1] for step in range(4)])
    assert torch.equal(found[:, 0] > found[:, -1], drawn == 1)
    assert 0 < drawn.sum() < len(drawn)


def test_a_damaged_image_is_named_when_it_is_read(tmp_path):
    made.write_folder(tmp_path, size=(90, 70))
    path = tmp_path / "train/cat/0001.jpg"
    path.write_bytes(path.read_bytes()[:500])
    view = FileView(read_folder(tmp_path)["train"])
    with pytest.raises(OSError, match="cat/0001.jpg: expected an image"):
        view.whole_batch(0, 0, [0, 1])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=22, max_size=22),
)
def test_random_parts_lie_in_the_image(width, height, chances):
    left, upper, right, lower = random_part(width, height, (0.08, 1.0), chances)
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


@pytest.mark.parametrize(("aspect", "sides"), [(0.0, (52, 69)), (0.5, (60, 60)), (1.0, (69, 52))])
def test_a_random_part_by_hand(aspect, sides):
    """A quarter of 120 × 120: sides √(3600 · ¾) and √(3600 · 4/3), in the middle."""
    box = random_part(120, 120, (0.25, 1.0), [0.0, aspect] * 10 + [0.5, 0.5])
    left, upper = (int((120 - side + 1) / 2) for side in sides)
    assert box == (left, upper, left + sides[0], upper + sides[1])


def test_the_middle():
    assert middle(256, 256, "crop") == (16, 16, 240, 240)
    assert middle(256, 512, "square") == (16, 32, 240, 480)
    assert middle(178, 218, "whole") == (0, 20, 178, 198)


def tokenizer(texts, padding, truncation, max_length, return_tensors):
    assert (padding, truncation, return_tensors) == (True, True, "pt")
    rows = [[ord(letter) for letter in text][:max_length] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": ids * 0}


def test_text_view(tmp_path):
    data = read_civilcomments(made.write_civilcomments(tmp_path))["train"]
    view = TextView(data, tokenizer, max_length=9)
    inputs, labels, _ = next(iter(batches(view, [[2, 0]])))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (2, 9)
    assert labels.tolist() == [1, 0]
    assert view[3][1] == 1


def test_tokenizer_of_a_folder(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"expected a folder with tokenizer.json"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="expected a tokenizer's files"):
        load_tokenizer(tmp_path)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "comment",
        "line",
        "with",
        "and",
        ",",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    data = read_civilcomments(made.write_civilcomments(tmp_path))["train"]
    inputs, *_ = TextView(data, load_tokenizer(tmp_path), 6).whole_batch(0, 0, [0, 1])
    assert inputs["input_ids"][0].tolist() == [2, 5, 6, 10, 8, 3]


def test_class_counts_are_read_from_views():
    view = MemoryView(labelled(), CIFAR10)
    assert count_classes(view, 3).tolist() == [14, 13, 13]
    with pytest.raises(ValueError, match="labels"):
        count_classes(view, 2)


def test_a_trainer_takes_views():
    data = labelled(24, 8)
    backbone, head = mlp(3 * 8 * 8, (8,), 3, torch.float32)
    config = TrainerConfig(
        method="meta-iada", epochs=2, ce_epochs=1, batch_size=8, meta_batch_size=4, lr=0.01
    )
    trainer = Trainer(
        torch.nn.Sequential(torch.nn.Flatten(), backbone),
        head,
        MemoryView(data, CIFAR10, "crop-flip"),
        MemoryView(data.subset(torch.arange(6)), CIFAR10, "crop-flip"),
        config,
        validation_set=MemoryView(data, CIFAR10),
    )
    assert len(trainer.fit()) == 2


def test_tensor_data_stays_as_it_is():
    data = TensorData(torch.randn(6, 2), torch.arange(6) % 3)
    inputs, labels, index = next(iter(batches(data, [[4, 1]])))
    assert torch.equal(inputs, data.inputs[[4, 1]])
    assert labels.tolist() == index.remainder(3).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, "labels: expected class indices"),
        ({"labels": torch.tensor([0])}, "labels: expected integer class indices"),
        ({"inputs": torch.zeros(2, 3, 4, 4)}, "inputs: expected uint8 images"),
        ({"groups": torch.tensor([0, 9]), "group_names": ("g",)}, "groups: .* got 9 at row 1"),
        ({"members": torch.ones(2, 3, dtype=torch.bool)}, "members: expected bool"),
    ],
)
def test_labelled_errors(change, message):
    fine = {"inputs": images(2, 4), "labels": torch.tensor([0, 2]), "class_names": NAMES}
    with pytest.raises(ValueError, match=message):
        Labelled(**{**fine, **change})


def test_labelled_subsets():
    data = labelled(6, 4)
    assert data.subset(torch.tensor([5, 0])).labels.tolist() == [2, 0]
    assert data.relabelled(torch.ones(6, dtype=torch.int64)).class_counts().tolist() == [0, 6, 0]
    assert data[4][1] == 1
    with pytest.raises(ValueError, match=r"rows: expected row numbers in \[0, 6\)"):
        data.subset(torch.tensor([6]))
    with pytest.raises(ValueError, match="groups: expected a group for each sample"):
        data.group_counts()
