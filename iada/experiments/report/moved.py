"""Fig. 5 on a page: rows of training samples, what ε does to each one's feature beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from iada.experiments.report.variants import Record, Variants, is_noisy

_HALF = 0.5  # of a move: an inversion that is farther off than so much of it does not show it


def moved_panels(title: str, variants: Variants) -> list[dict[str, Any]]:
    """What the template shows of each variant that has it: that of its first seed."""
    panels = []
    for variant in variants:
        for record in variant.has("moved_features")[:1]:
            seed = record.get("seed", 0)
            of = f"{variant.label}, {title}, seed {seed}"
            panels.append({"caption": caption(of, record), **_rows(record)})
    return panels


def _rows(record: Record) -> dict[str, Any]:
    """Column heads, and a row for each sample."""
    samples: Sequence[Mapping[str, Any]] = record["moved_features"]["samples"]
    names = record.get("class_names") or ()

    def named(label: int) -> str:
        return str(names[label]) if label < len(names) else f"C{label + 1}"

    rows = []
    for sample in samples:
        cells = []
        for target in sample["targets"]:
            nearest = target["nearest"][0]
            lines = [
                f"nearest: {named(nearest['label'])}, at {nearest['distance']:.2f}",
                f"predicted: {named(target['prediction'])}",
                f"made: {target['residual']:.2f} off",
            ]
            if target["kind"] != "h":
                lines.insert(0, f"moved by {target['moved']:.2f}")
            alt = f"Nearest training image, {named(nearest['label'])}"
            cells.append(
                {
                    "nearest": target["nearest_image"],
                    "nearest_alt": alt,
                    "made": target["inverted_image"],
                    "made_alt": f"Image made to have the feature {target['kind']}",
                    "lines": lines,
                }
            )
        wrong = {None: "", False: ", right label", True: ", wrong label"}[sample.get("wrong")]
        radius = record["moved_features"]["radii"][sample["label"]]
        about = [f"{named(sample['label'])}{wrong}", f"ε {sample['epsilon']:+.3f}"]
        about.append(f"√tr Σ_y {radius:.2f}")
        alt = f"Training image {sample['row']}, {about[0]}"
        rows.append({"image": sample["image"], "alt": alt, "lines": about, "cells": cells})
    kinds = [target["kind"] for target in samples[0]["targets"]]
    return {"head": ["training image", *kinds], "rows": rows}


def caption(of: str, record: Record) -> str:
    """What the rows and columns are, in which units, and what the pictures cannot show."""
    found = record["moved_features"]
    targets = [t for sample in found["samples"] for t in sample["targets"]]
    moved = [target for target in targets if target["kind"] != "h"]
    lost = sum(target["residual"] > _HALF * target["moved"] for target in moved)
    radii = [radius for radius in found["radii"] if radius > 0] or [0.0]
    order = "" if is_noisy(record) else " from the largest to the smallest"
    text = (
        f"What ε does to features, {of}: after the paper's Fig. 5. Rows: of classes{order}, "
        "the training sample of largest and that of smallest mean ε late "
        "in training. Columns: its feature h, the control; h + ε s; and draws from "
        f"N(h + ε s, αΣ_y), α = {found['alpha']:g}. In each, left the training image, unaugmented, "
        "whose feature is nearest, the sample itself left out; right an image made to have the "
        f"feature, by {found['steps']} steps of gradient descent on pixels, from grey noise and "
        "with a prior for little total variation. Lengths are in units of the features: class "
        f"radii √tr Σ_y are {min(radii):.2f} to {max(radii):.2f}, and |ε| = 1 moves a feature by "
        f"√A = {found['width'] ** 0.5:.2f}. An image that was made is one of many with about that "
        "feature, chosen by the prior and the start: it shows what the backbone keeps, not what a "
        f"new training image would look like. Of the {len(moved)} moved features {lost} have one "
        "that is off by more than half of the move, and so does not show the move."
    )
    beyond = [t["below_zero"] for t in moved if t.get("below_zero") is not None]
    if beyond and max(beyond) > 0:
        text += (
            f" No training image has a feature below 0; {min(beyond):.2f} to {max(beyond):.2f} of "
            "each moved one lies there, as near as an image can then come to it."
        )
    return text
