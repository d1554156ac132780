"""The methods of the demo and their settings.

Chosen on the validation images of seeds 100–107, which the demo's seeds 0, 1, 2, … do not share;
the test images played no part. Every method had the same grid over lr and the same epochs, and
each scenario keeps its best.
"""

from iada.config import TrainerConfig

HIDDEN = (128, 64)  # hidden layers of the MLP; the last is the feature width A

METHODS = {
    "ce": "CE",
    "ce+meta": "CE on train + meta",
    "logit-adjustment": "Logit Adjustment",
    "isda": "ISDA",
    "meta-iada": "Meta-IADA",
}


def trainer_config(scenario: str, method: str, seed: int) -> TrainerConfig:
    """What the demo trains `method` with on `scenario`."""
    raise NotImplementedError
