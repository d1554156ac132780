"""Fig. 5 of the IADA paper for a run's record: what ε does to a feature, as images.

Of a few training samples, the feature h, h + ε s and draws of N(h + ε s, αΣ_y) (Eq. 2), each shown
as the training image with the nearest feature and as an image that is made to have it.
"""

from typing import Any

import torch
from torch import Tensor

from iada.experiments.datasets import FileView, Labelled, MemoryView
from iada.experiments.datasets.images import data_address
from iada.experiments.diagnostics.inversion import SMOOTHNESS, STEPS, Inverted, invert
from iada.experiments.diagnostics.moved_features import class_radii, moved_features, neighbours
from iada.experiments.scenarios import Split
from iada.meta.learner import detached
from iada.training.trainer import Trainer
from iada.utils.checks import argument_error
from iada.utils.evaluate import outputs
from iada_kernels.contract import LossInputs

CLASSES = 4  # that samples are taken of, from the largest class to the smallest
DRAWS = 2
KINDS = ("h", "h + ε s", *["drawn"] * DRAWS)  # of the features of each sample
NEAREST = 3  # training samples that the record has of each feature; the first is shown
MOST_PIXELS = 64  # a side of a picture


def check_images(data: Labelled) -> None:
    """ValueError for what is no image."""
    inputs: Any = data.inputs
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        got = "features of a backbone"
    elif not isinstance(inputs, Tensor) and len(inputs) and isinstance(inputs[0], str):
        got = "texts"
    else:
        return
    raise argument_error("--moved-features", "a row whose data are images", got, "leave it out")


def moved_record(
    trainer: Trainer, view: MemoryView | FileView, split: Split, epsilon: Tensor | None
) -> dict[str, Any]:
    """What the report's Fig. 5 shows of a finished run, in plain values.

    view: the training set without augmentation. epsilon: each training sample's mean ε late in
    training, (N), NaN for one that was not visited. All in float32 or better, without autocast.
    Raises ValueError for a method that has no ε or no Σ.
    """
    covariance = trainer.method.covariance
    if covariance is None or epsilon is None:
        missing = "Σ" if covariance is None else "ε"
        remedy = "choose Meta-IADA with a perturbation, or leave the option out"
        raise argument_error(
            "--moved-features", "a method with ε and Σ", f"none of {missing}", remedy
        )
    config, head = trainer.config, trainer.method.head
    rows = chosen_rows(epsilon, split.train)
    every = outputs(trainer.backbone, head, view, num_workers=trainer.num_workers)
    features, labels = every.features.float(), every.labels
    weight, bias = (None if t is None else t.float().cpu() for t in detached(head))
    assert weight is not None
    sigma, strengths = covariance.shrunk().cpu(), epsilon[rows].float()
    alpha = config.alpha_at(config.epochs - 1)
    inputs = LossInputs(features[rows], weight, bias, labels[rows], sigma, strengths)
    given, drawn = moved_features(inputs, alpha=alpha or 0.0, draws=DRAWS, seed=config.seed)
    targets = torch.cat([given, drawn], dim=1)  # (samples, kinds, A)
    flat, own = targets.flatten(0, 1), rows.repeat_interleave(len(KINDS))
    near = neighbours(features, flat, own, min(NEAREST, len(features) - 1))
    made = _inverted(trainer, view, flat.float(), rows)
    predictions = (flat.float() @ weight.T + (0.0 if bias is None else bias)).argmax(dim=1)
    radii = class_radii(sigma, features.shape[1])
    # After a ReLU no image has a feature below 0: that part of a target cannot be matched.
    beyond = flat.clamp(max=0).norm(dim=1) if bool((features >= 0).all()) else None
    pictures = _Pictures(view)

    def target(at: int) -> dict[str, Any]:
        pairs = zip(near.rows[at].tolist(), near.distances[at].tolist(), strict=True)
        nearest = [{"row": r, "label": int(labels[r]), "distance": far} for r, far in pairs]
        return {
            "kind": KINDS[at % len(KINDS)],
            "moved": float(near.own_distance[at]),
            "prediction": int(predictions[at]),
            "own_rank": int(near.own_rank[at]),
            "nearest": nearest,
            "residual": float(made.residual[at]),
            "residual_start": float(made.start[at]),
            "below_zero": None if beyond is None else float(beyond[at]),
            "nearest_image": pictures.of_row(nearest[0]["row"]),
            "inverted_image": pictures.of_values(made.images[at].cpu()),
        }

    samples = [
        {
            "row": row,
            "label": int(labels[row]),
            "wrong": None if split.wrong is None else bool(split.wrong[row]),
            "epsilon": float(epsilon[row]),
            "norm": float(features[row].norm()),
            "image": pictures.of_row(row),
            "targets": [target(len(KINDS) * place + kind) for kind in range(len(KINDS))],
        }
        for place, row in enumerate(rows.tolist())
    ]
    return {
        "alpha": alpha,
        "seed": config.seed,
        "width": features.shape[1],
        "steps": STEPS,
        "smoothness": list(SMOOTHNESS),
        "radii": radii.tolist(),
        "samples": samples,
    }


def _inverted(
    trainer: Trainer, view: MemoryView | FileView, targets: Tensor, rows: Tensor
) -> Inverted:
    """Images of the shape of these training samples, with these features."""
    device = trainer.head.weight.device
    mean, deviation = view.mean.to(device), view.deviation.to(device)
    channels, height, width = view.inputs(0, 0, rows[:1]).shape[1:]
    return invert(
        trainer.backbone,
        targets.to(device),
        (channels, height, width),
        lambda values: (values - mean) / deviation,
        seed=trainer.config.seed,
    )


def chosen_rows(epsilon: Tensor, train: Labelled) -> Tensor:
    """Of CLASSES classes from the largest to the smallest, the samples of largest and smallest ε.

    A class none of whose samples was visited late in training is passed over. ValueError without
    any sample.
    """
    counts = train.class_counts()
    known = ~epsilon.isnan()
    visited = torch.bincount(train.labels[known], minlength=len(counts)) > 0
    order = [c for c in counts.argsort(descending=True, stable=True).tolist() if visited[c]]
    places = torch.linspace(0, len(order) - 1, min(CLASSES, len(order))).round().long().tolist()
    rows: list[int] = []
    for c in [order[place] for place in places]:
        members = (known & (train.labels == c)).nonzero()[:, 0]
        values = epsilon[members]
        rows += dict.fromkeys([int(members[values.argmax()]), int(members[values.argmin()])])
    if not rows:
        got = "no sample visited in the last epochs"
        raise argument_error("epsilon", "the ε of training samples", got, "train for longer")
    return torch.tensor(rows)


class _Pictures:
    """Images as addresses that hold them."""

    def __init__(self, view: MemoryView | FileView) -> None:
        self.view = view

    def of_row(self, row: int) -> str:
        """A training image as the backbone is given it."""
        (image,) = self.view.inputs(0, 0, torch.tensor([row])).cpu()
        return self.of_values(image * self.view.deviation + self.view.mean)

    def of_values(self, values: Tensor) -> str:
        """(C, H, W) with values in [0, 1]."""
        from PIL import Image

        levels = (255 * values).round().clamp(0, 255).to(torch.uint8)
        array = levels.permute(1, 2, 0).contiguous().numpy()
        image = Image.fromarray(array[:, :, 0] if len(levels) == 1 else array)
        return data_address(image, MOST_PIXELS)
