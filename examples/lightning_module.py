"""Meta-IADA as a LightningModule with manual optimization, on a long-tailed toy problem.

    pip install 'iada[examples]'
    python examples/lightning_module.py

Meta-IADA makes its own backward passes, so Lightning must not: `automatic_optimization` is off.
One process only; for several, `iada.Trainer` under torchrun.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import iada

CLASSES = 4


class MetaIADAModule(L.LightningModule):
    """A backbone and a linear head, trained by Meta-IADA on {"train": batch, "meta": batch}."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, class_counts: torch.Tensor) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.head = backbone, head
        parameters = [*backbone.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        # A module: .to(), checkpoints and resuming take Ω, its optimizer, Σ and the memory along.
        options = {"alpha": 0.1, "clip_norm": 1.0}
        self.meta = iada.MetaIADA(backbone, head, optimizer, class_counts, **options)

    def configure_optimizers(self) -> dict[str, Any]:
        """The classifier's optimizer, with a cosine schedule, stepped below."""
        optimizer, epochs = self.meta.optimizer, self.trainer.max_epochs or 1
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_start(self) -> None:
        """Steps go through Lightning's optimizer, which counts them."""
        if str(self.trainer.precision).startswith("16"):
            raise ValueError(
                "precision: expected '32-true' or 'bf16-mixed', got '16-mixed'; its "
                "scaler would not see the losses: pass precision='bf16-mixed'"
            )
        self.meta.optimizer = self.optimizers()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One iteration of Algorithm 1."""
        result = self.meta.step(batch["train"], batch["meta"])
        share = (result.epsilon > 0).float().mean()
        self.log_dict({"loss": result.loss, "meta_loss": result.meta_loss, "adversarial": share})

    def on_train_epoch_end(self) -> None:
        """Last epoch's values for the characteristics, and the learning rate."""
        self.meta.end_epoch()
        self.lr_schedulers().step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy."""
        inputs, labels = batch
        hit = self.head(self.backbone(inputs)).argmax(dim=1) == labels
        self.log("accuracy", hit.float().mean())


def make_set(counts: list[int], centres: torch.Tensor) -> TensorDataset:
    """So many points of each class around its centre."""
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts))
    return TensorDataset(centres[labels] + torch.randn(len(labels), 16), labels)


def main(
    folder: str | None = None, epochs: int = 10, resume: str | None = None, **options: Any
) -> L.Trainer:
    """Train; with `folder`, checkpoints are kept there. options: of the Trainer."""
    L.seed_everything(0)
    centres = torch.randn(CLASSES, 16)
    counts = [400, 100, 25, 6]
    train = DataLoader(make_set(counts, centres), batch_size=50, shuffle=True, drop_last=True)
    meta = DataLoader(make_set([10] * CLASSES, centres), batch_size=20, shuffle=True)
    validation = DataLoader(make_set([100] * CLASSES, centres), batch_size=400)
    backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
    module = MetaIADAModule(backbone, nn.Linear(32, CLASSES), torch.tensor(counts))
    settings = {
        "max_epochs": epochs,
        "devices": 1,
        "default_root_dir": folder,
        "enable_checkpointing": folder is not None,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{**settings, **options})
    loaders = CombinedLoader({"train": train, "meta": meta}, mode="max_size_cycle")
    trainer.fit(module, loaders, validation, ckpt_path=resume)
    print(f"balanced accuracy {trainer.callback_metrics['accuracy']:.3f}")
    return trainer


if __name__ == "__main__":
    main()
