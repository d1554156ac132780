"""Parts of one's own data: what is held out, how classes are matched, what is too much alike."""

import numpy as np
import pytest
import torch

from iada.experiments.datasets.own import read_own


def write_features(path, labels, start=0, **more):
    rows = np.arange(start, start + len(labels), dtype=np.float32)
    np.savez(path, inputs=np.stack([rows, -rows], axis=1), labels=np.array(labels), **more)
    return path


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.2, [0, 1, 1, 2, 3]), (0.05, [0, 1, 1, 1, 1]), (0.99, [0, 1, 2, 9, 12])],
)
def test_a_share_of_each_class_is_held_out(tmp_path, share, expected):
    """Rounded, at least one sample, never the last: of 1, 2, 3, 10 and 13."""
    sizes = [1, 2, 3, 10, 13]
    labels = np.repeat(np.arange(5), sizes)
    parts = read_own(write_features(tmp_path / "f.npz", labels), validation=share)
    assert parts["validation"].class_counts().tolist() == expected
    kept = [size - out for size, out in zip(sizes, expected, strict=True)]
    assert parts["train"].class_counts().tolist() == kept
    rows = torch.cat([parts[name].inputs[:, 0] for name in ("train", "validation")])
    assert rows.sort().values.tolist() == list(range(29))


def test_the_shares_come_one_after_the_other(tmp_path):
    data = write_features(tmp_path / "f.npz", [0] * 20 + [1] * 10)
    parts = read_own(data, validation=0.25, test=0.5)
    counts = {name: part.class_counts().tolist() for name, part in parts.items()}
    assert counts == {"train": [8, 4], "test": [10, 5], "validation": [2, 1]}  # of what is left


def test_classes_are_matched_by_their_names(tmp_path):
    train = write_features(tmp_path / "f.npz", ["a", "b", "c"] * 4)
    given = write_features(tmp_path / "g.npz", ["c", "b", "c"], start=50)
    part = read_own(train, validation=str(given))["validation"]
    assert part.class_names == ("a", "b", "c")
    assert part.labels.tolist() == [2, 1, 2]


@pytest.mark.parametrize("copies", [3, 4])
def test_more_than_half_of_the_images_of_the_smaller_part_may_not_be_copies(tmp_path, copies):
    images = np.random.default_rng(0).integers(0, 256, (18, 4, 4, 3)).astype(np.uint8)
    other = np.concatenate([images[:copies], images[12 : 18 - copies]])
    paths = []
    for name, part in (("f", images[:12]), ("g", other)):
        paths.append(str(tmp_path / f"{name}.npz"))
        np.savez(paths[-1], inputs=part, labels=np.arange(len(part)) % 2)
    if copies == 3:
        with pytest.warns(UserWarning, match="3 of 6 with the content of some there"):
            read_own(paths[0], test=paths[1])
        return
    with pytest.raises(ValueError, match="4 of 6 with the content of some there"):
        read_own(paths[0], test=paths[1])
