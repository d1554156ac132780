"""A small data set, and the command that runs a row of a table on it."""

import numpy as np

CLASSES = [f"class{place}" for place in range(10)]
SMALLER = [
    "data.reader=folder",
    "model.backbone=resnet8",
    "trainer.batch_size=16",
    "trainer.meta_batch_size=10",
    "scenario.ratio=2",
    "scenario.meta_per_class=2",
]
ROW = ["paper", "--table", "2", "--row", "cifar10-100", "--device", "cpu", "--set", *SMALLER]


def write_images(root):
    """Train and test folders of ten classes, each of its own brightness."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for place, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 30, (8, 8, 3)) + 22 * place
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root
