"""Corruptions made here, and the published files: in kind, by severity, and by seed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from iada.experiments.datasets import Labelled
from iada.experiments.datasets.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    MadeCorruptions,
    PublishedCorruptions,
    corrupted,
    made,
)
from iada.experiments.diagnostics.corruption_accuracy import corruption_accuracy
from iada.experiments.on_demand import OnDemand, check_demand
from iada.experiments.recipe import load

pytest.importorskip("PIL.Image")
DRAWN = ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog", "elastic_transform")


def smooth_images(count=40, channels=3, side=32, seed=0):
    """Blobs with edges, so that blurs and bends have something to change."""
    drawn = np.random.default_rng(seed).standard_normal((count, channels, 6, 6)).astype(np.float32)
    size = (side, side)
    values = torch.nn.functional.interpolate(torch.from_numpy(drawn), size, mode="bicubic")
    edges = (values[:, :1] > 0.5).float() * 60
    return (128 + 45 * values + edges).clamp(0, 255).to(torch.uint8)


def labelled(images):
    return Labelled(images, torch.arange(len(images)) % 4, ("a", "b", "c", "d"))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 8), (3, 48)])
def test_images_stay_images_and_get_worse(name, channels, side):
    images = smooth_images(channels=channels, side=side)
    given = images.clone()
    distances = []
    for severity in range(1, SEVERITIES + 1):
        found = corrupted(images, name, severity)
        assert found.dtype == torch.uint8
        assert found.shape == images.shape
        difference = found.double() - images.double()
        distances.append(float(difference.square().mean(dim=(1, 2, 3)).sqrt().mean()))
    assert torch.equal(images, given)
    assert distances[0] > 1
    assert all(low < high for low, high in zip(distances, distances[1:], strict=False)), distances


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seeds_repeat(name, monkeypatch):
    monkeypatch.setattr(made, "_BLOCK", 16)
    images = smooth_images()
    first = corrupted(images, name, 2, seed=3)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(corrupted(images, name, 2, seed=3), first)
    assert torch.equal(corrupted(images, name, 2, seed=4), first) == (name not in DRAWN)
    assert torch.equal(corrupted(images[:16], name, 2, seed=3), first[:16])


@pytest.mark.parametrize("name", DRAWN)
def test_no_image_is_corrupted_like_the_next(name, monkeypatch):
    monkeypatch.setattr(made, "_BLOCK", 2)
    same = smooth_images(1).expand(4, -1, -1, -1).contiguous()
    found = corrupted(same, name, 3)
    assert len(found.flatten(1).unique(dim=0)) == 4


def test_noise_is_as_strong_as_stated():
    grey = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    _, amounts = CORRUPTIONS["gaussian_noise"]
    noise = corrupted(grey, "gaussian_noise", 1).double() - 128
    assert float(noise.std()) / 255 == pytest.approx(amounts[0], rel=0.02)
    _, amounts = CORRUPTIONS["impulse_noise"]
    lost = corrupted(grey, "impulse_noise", 4) != 128
    assert float(lost.double().mean()) == pytest.approx(amounts[3], rel=0.05)
    _, amounts = CORRUPTIONS["shot_noise"]
    noise = corrupted(grey, "shot_noise", 3).double() / 255
    assert float(noise.var()) == pytest.approx(128 / 255 / amounts[2], rel=0.05)


def test_lost_values_are_as_often_white_as_black_and_photons_keep_the_mean():
    """Within 4.5 deviations of a binomial count, and of a mean of Poisson counts."""
    grey = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    found = corrupted(grey, "impulse_noise", 5)
    lost = found[found != 128]
    assert set(lost.tolist()) == {0, 255}
    assert float((lost == 255).double().mean()) == pytest.approx(0.5, abs=2.25 / len(lost) ** 0.5)
    _, amounts = CORRUPTIONS["shot_noise"]
    mean = float(corrupted(grey, "shot_noise", 2).double().mean()) / 255
    deviation = (128 / 255 / amounts[1] / grey.numel()) ** 0.5
    assert mean == pytest.approx(128 / 255, abs=4.5 * deviation)


def test_light_by_hand():
    image = torch.tensor([0, 100, 200, 250, 30, 20]).to(torch.uint8).view(1, 3, 1, 2)
    plus = [0 + 102, 100 + 102, 255, 255, 30 + 102, 20 + 102]  # 0.4 of 255
    assert corrupted(image, "brightness", 5).flatten().tolist() == plus
    towards = [60, 100, 140, 160, 72, 68]  # 0.4 of the distance to 100, the mean of all
    assert corrupted(image, "contrast", 3).flatten().tolist() == towards
    black = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    fog = corrupted(black, "fog", 3).flatten(1)  # half of the light, and a quarter of it
    assert fog.amax(dim=1).tolist() == [round(255 * 0.9 * 0.5)] * 3
    assert fog.amin(dim=1).tolist() == [round(255 * 0.9 * 0.25)] * 3


def test_coarse_pixels_are_the_means_of_their_blocks():
    """Four of eight pixels are left: blocks of two by two."""
    image = smooth_images(3, side=8)
    means = torch.nn.functional.avg_pool2d(image.double(), 2)
    means = means.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    found, halves = corrupted(image, "pixelate", 3).double(), means % 1 == 0.5
    assert torch.equal(found[~halves], means[~halves].round())
    assert ((found - means)[halves].abs() == 0.5).all()


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "zoom_blur", "pixelate"])
def test_blurs_leave_a_flat_image_as_it_is(name):
    flat = torch.full((3, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(corrupted(flat, name, 5), flat)


@pytest.mark.parametrize(
    ("images", "name", "severity", "message"),
    [
        (smooth_images(2), "snow", 1, "corruption"),
        (smooth_images(2), "fog", 0, "severity: expected 1 to 5"),
        (smooth_images(2), "fog", 6, "severity: expected 1 to 5"),
        (smooth_images(2).float(), "fog", 1, "images: expected uint8"),
        (smooth_images(2, channels=4), "fog", 1, "images: expected uint8"),
    ],
)
def test_errors(images, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupted(images, name, severity)


def test_the_amounts_are_documented():
    page = (Path(__file__).parents[2] / "docs/experiments.md").read_text(encoding="utf-8")
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    told = {cells[1].strip(" `"): cells[2] for cells in lines}
    for name, (_, amounts) in CORRUPTIONS.items():
        assert [float(number) for number in told[name].split(",")] == list(amounts)


def test_a_test_set_with_every_corruption():
    data = labelled(smooth_images(6))
    found = list(MadeCorruptions(data, seed=1))
    assert [name for name, _ in found] == [n for n in CORRUPTIONS for _ in range(SEVERITIES)]
    for _, part in found:
        assert torch.equal(part.labels, data.labels)
    name, part = found[3]
    assert torch.equal(part.inputs, corrupted(data.inputs, name, 4, seed=1))


@pytest.fixture
def folder(tmp_path):
    """CIFAR-10-C of four images."""
    images = smooth_images(4)
    labels = np.tile([0, 1, 2, 3], SEVERITIES)
    np.save(tmp_path / "labels.npy", labels)
    for name in ("fog", "snow"):
        parts = [images + severity for severity in range(SEVERITIES)]
        np.save(tmp_path / f"{name}.npy", torch.cat(parts).permute(0, 2, 3, 1).numpy())
    return tmp_path


def test_published_files_are_cut_by_severity(folder):
    test = labelled(smooth_images(4))
    source = PublishedCorruptions(folder, replace(test, class_names=("k", "l", "m", "n")))
    found = list(source)
    assert [name for name, _ in found] == ["fog"] * SEVERITIES + ["snow"] * SEVERITIES
    for place, (_, part) in enumerate(found):
        assert torch.equal(part.inputs, test.inputs + place % SEVERITIES)
        assert part.labels.tolist() == [0, 1, 2, 3]
        assert part.class_names == ("k", "l", "m", "n")
    assert source.about["files"] == ["fog", "snow"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "labels.npy").unlink(), "labels.npy"),
        (lambda f: [path.unlink() for path in f.glob("*o*.npy")], "gaussian_noise.npy"),
        (lambda f: np.save(f / "labels.npy", np.full(20, 4)), "labels below 4"),
        (lambda f: np.save(f / "labels.npy", np.zeros(7, int)), "labels below 4"),
        (lambda f: np.save(f / "fog.npy", np.zeros((20, 8, 8, 3), np.uint8)), r"fog.npy: expected"),
        (lambda f: (f / "fog.npy").write_bytes(b"none"), "fog.npy: expected an array"),
    ],
)
def test_published_files_that_are_not_right(folder, break_it, message):
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(PublishedCorruptions(folder, labelled(smooth_images(4))))


def test_published_files_go_with_the_whole_test_set(folder):
    recipe = load("table2/cifar10-100")
    parts = {"train": labelled(smooth_images(8)), "test": labelled(smooth_images(4))}
    check_demand(OnDemand(corruptions=folder), recipe, parts)
    parts["test"] = labelled(smooth_images(3))
    with pytest.raises(ValueError, match="expected the whole test set, 4 images, with .*, got 3"):
        check_demand(OnDemand(corruptions=folder), recipe, parts)


@pytest.mark.parametrize("extra", [("saturate",), ("saturate", "fog", "snow")])
def test_the_mean_is_over_the_corruptions_of_the_benchmark(folder, monkeypatch, extra):
    """By hand: fog 0 to 0.4, saturate 1, snow 0.5 to 0.9; of all where there is no other."""
    monkeypatch.setattr("iada.experiments.diagnostics.corruption_accuracy.EXTRA", extra)
    np.save(folder / "saturate.npy", np.load(folder / "fog.npy"))
    shares = {
        "fog": [0.0, 0.1, 0.2, 0.3, 0.4],
        "saturate": [1.0] * 5,
        "snow": [0.5, 0.6, 0.7, 0.8, 0.9],
    }
    given = iter([*sum(shares.values(), []), 0.75])
    source = PublishedCorruptions(folder, labelled(smooth_images(4)))
    found = corruption_accuracy(lambda data: next(given), source)
    assert found["accuracy"] == shares
    assert (found["clean"], found["images"]) == (0.75, 4)
    alone = len(extra) == 1
    assert found["in_mean"] == (["fog", "snow"] if alone else ["fog", "saturate", "snow"])
    assert found["mean"] == pytest.approx((1 + 3.5) / 10 if alone else (1 + 5 + 3.5) / 15)


def test_published_labels_are_those_of_their_severity(folder):
    labels = torch.arange(4 * SEVERITIES) // 2 % 4
    np.save(folder / "labels.npy", labels.numpy())
    source = PublishedCorruptions(folder, labelled(smooth_images(4)))
    found = torch.cat([part.labels for name, part in source if name == "fog"])
    assert torch.equal(found, labels)
