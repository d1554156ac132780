"""`python -m bench.moved_picture RECORD PNG`: Fig. 5 of a run with `--moved-features`.

A row a training sample; beside it, for its feature h, for h + ε s and for a draw, the training
image of the nearest feature and the image that was made to have the feature. The report of a run
has the same with all distances.
"""

import argparse
import json
import sys
from base64 import b64decode
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.image

COLUMNS = ("h", "h + ε s", "drawn")


def draw(record: Mapping[str, Any], path: Path) -> None:
    samples, names = record["moved_features"]["samples"], record["class_names"]
    size = (1.0 + 1.15 * 2 * len(COLUMNS), 1.3 * len(samples) + 0.3)
    figure = matplotlib.figure.Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(len(samples), 1 + 2 * len(COLUMNS), squeeze=False)
    for line, sample in zip(panels, samples, strict=True):
        _show(line[0], sample["image"], f"{names[sample['label']]}, ε {sample['epsilon']:+.2f}")
        targets = {target["kind"]: target for target in reversed(sample["targets"])}
        for place, kind in enumerate(COLUMNS):
            target = targets[kind]
            near, made = line[1 + 2 * place : 3 + 2 * place]
            nearest = target["nearest"][0]
            where = f"{names[nearest['label']]}, at {nearest['distance']:.1f}"
            _show(near, target["nearest_image"], f"{kind}: nearest\n{where}")
            _show(made, target["inverted_image"], f"made,\n{target['residual']:.1f} off")
    figure.savefig(path, metadata={"Software": None})


def _show(panel: Any, image: str, title: str) -> None:
    """image: a PNG as a data URI."""
    pixels = matplotlib.image.imread(BytesIO(b64decode(image.partition(",")[2])), format="png")
    panel.imshow(pixels, interpolation="nearest")
    panel.set_title(title, fontsize=6)
    panel.set_axis_off()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.moved_picture", description=__doc__)
    parser.add_argument("record", type=Path, help="record.json of the run")
    parser.add_argument("picture", type=Path, help="the PNG to be written")
    options = parser.parse_args()
    record = json.loads(options.record.read_text(encoding="utf-8"))
    if "moved_features" not in record:
        parser.error(f"{options.record}: expected a run of --moved-features; run it with that")
    draw(record, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
