"""Meta-IADA in a Hugging Face Trainer: a tiny DistilBERT, built from a config, nothing downloaded.

    pip install 'iada[examples]'
    python examples/hf_trainer.py

The texts are random tokens that hint at their class; 30 % of the labels are wrong, and the meta set
is clean. One process only; for several, `iada.Trainer` under torchrun.
"""

import itertools
import tempfile
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

import iada

CLASSES, WORDS, LENGTH = 3, 60, 12


class Encoder(nn.Module):
    """From a tokenizer's output to one feature vector a text, (N, A)."""

    def __init__(self, config: transformers.DistilBertConfig) -> None:
        super().__init__()
        self.bert = transformers.DistilBertModel(config)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The first token's hidden state."""
        return self.bert(**inputs).last_hidden_state[:, 0]


class Classifier(nn.Module):
    """What the Trainer evaluates: encoder and linear head."""

    def __init__(self, config: transformers.DistilBertConfig) -> None:
        super().__init__()
        self.backbone = Encoder(config)
        self.head = nn.Linear(config.dim, CLASSES)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Logits, and the cross-entropy that evaluation reports."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits = self.head(self.backbone(inputs))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class MetaIADATrainer(transformers.Trainer):
    """Each training step is one iteration of Algorithm 1.

    Args:
        meta_dataset: small, clean and balanced.
        class_counts: training samples of each class, (C).
    """

    def __init__(
        self, *arguments: Any, meta_dataset: Dataset, class_counts: torch.Tensor, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        loader = DataLoader(
            meta_dataset, self.args.train_batch_size, shuffle=True, collate_fn=self.data_collator
        )
        self.meta_stream = itertools.chain.from_iterable(itertools.repeat(loader))
        self.class_counts = class_counts
        self.meta: iada.MetaIADA | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Meta-IADA takes the optimizer's step; the Trainer's own finds no gradients left."""
        model.train()
        if self.meta is None:
            plain = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            self.meta = iada.MetaIADA(
                model.backbone,
                model.head,
                plain,
                self.class_counts,
                alpha=0.1,
                clip_norm=self.args.max_grad_norm,
            )
        result = self.meta.step(self._pair(inputs), self._pair(next(self.meta_stream)))
        model.zero_grad(set_to_none=True)
        return result.loss

    def _pair(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = dict(self._prepare_inputs(inputs))
        return inputs, inputs.pop("labels")


class Texts(Dataset):
    """Random tokens, of which half come from the words of the text's class."""

    def __init__(self, count: int, wrong: float = 0.0) -> None:
        truth = torch.arange(count) % CLASSES
        own = WORDS // CLASSES
        hints = truth[:, None] * own + torch.randint(own, (count, LENGTH))
        noise = torch.randint(WORDS, (count, LENGTH))
        self.tokens = torch.where(torch.rand(count, LENGTH) < 0.5, hints, noise)
        flipped = torch.rand(count) < wrong
        self.labels = torch.where(flipped, (truth + 1) % CLASSES, truth)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index]
        mask = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": mask, "labels": self.labels[index]}


class EndEpoch(transformers.TrainerCallback):
    """Last epoch's values for the characteristics."""

    def __init__(self, trainer: MetaIADATrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, *arguments: Any, **options: Any) -> None:
        """After each epoch."""
        if self.trainer.meta is not None:
            self.trainer.meta.memory.end_epoch()


def main(epochs: int = 6) -> float:
    """Train, print, and return the accuracy on clean texts."""
    transformers.set_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=WORDS,
        dim=32,
        hidden_dim=64,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=16,
        attn_implementation="eager",  # fused attention has no second derivative
    )
    train, meta, test = Texts(480, wrong=0.3), Texts(30), Texts(300)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MetaIADATrainer(
            Classifier(config),
            transformers.TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=24,
                learning_rate=2e-3,
                optim="adamw_torch",
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                seed=0,
            ),
            train_dataset=train,
            eval_dataset=test,
            meta_dataset=meta,
            class_counts=torch.bincount(train.labels),
            compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
        )
        trainer.add_callback(EndEpoch(trainer))
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
