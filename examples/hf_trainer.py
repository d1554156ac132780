"""Meta-IADA in a Hugging Face Trainer: a tiny DistilBERT, built from a config, nothing downloaded.

    pip install 'iada[examples]'
    python examples/hf_trainer.py

The texts are random tokens that hint at their class; 30 % of the labels are wrong, and the meta set
is clean. One process only; for several, `iada.Trainer` under torchrun.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import get_last_checkpoint

import iada

CLASSES, WORDS, LENGTH = 3, 60, 12
STATE_FILE = "meta_iada.pt"


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

    A checkpoint holds Σ, Ω and the memory as `meta_iada.pt`; a run that resumes goes on with the
    same meta batches.

    Args:
        meta_dataset: small, clean and balanced.
        class_counts: training samples of each class, (C).
    """

    def __init__(
        self, *arguments: Any, meta_dataset: Dataset, class_counts: torch.Tensor, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        check(self.args)
        self.meta_dataset, self.class_counts = meta_dataset, class_counts
        self.meta: iada.MetaIADA | None = None
        self.former: dict[str, Any] | None = None
        self.add_callback(MetaState(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As in the base class, with Meta-IADA's own state taken up before."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        self.meta, self.former = None, None  # the optimizer of this call is a new one
        if folder:
            path = Path(folder) / STATE_FILE
            self.former = torch.load(path, map_location=self.args.device, weights_only=True)
        return super().train(resume_from_checkpoint, **options)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Meta-IADA takes the optimizer's step; the Trainer's own finds no gradients left."""
        model.train()
        if self.meta is None:
            self._begin(model)
        meta_batch = self._pair(next(self.meta_stream))
        with self.accelerator.autocast():  # as bf16=True asks for
            result = self.meta.step(self._pair(inputs), meta_batch)
        model.zero_grad(set_to_none=True)
        return result.loss

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Without the norm of gradients that are gone by then."""
        logs.pop("grad_norm", None)
        super().log(logs, *arguments, **options)

    def _begin(self, model: nn.Module) -> None:
        with torch.random.fork_rng():  # else Ω's start would move a resumed run's dropout
            self.meta = iada.MetaIADA(
                model.backbone,
                model.head,
                getattr(self.optimizer, "optimizer", self.optimizer),  # accelerate wraps it
                self.class_counts,
                alpha=0.1,
                clip_norm=self.args.max_grad_norm,
            )
        loader = DataLoader(
            self.meta_dataset,
            self.args.train_batch_size,
            shuffle=True,
            collate_fn=self.data_collator,
            generator=torch.Generator().manual_seed(self.args.seed),  # for this stream alone
        )
        self.meta_stream = iada.endless(loader)
        if self.former is not None:
            self.meta.load_state_dict(self.former)
            for _ in range(self.state.global_step):  # the set is small: read on to the place
                next(self.meta_stream)

    def _pair(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = dict(self._prepare_inputs(inputs))
        return inputs, inputs.pop("labels")


def check(args: transformers.TrainingArguments) -> None:
    """ValueError for what one iteration of Algorithm 1 cannot be made of."""
    steps = args.gradient_accumulation_steps
    if steps > 1:
        # ε, Σ and the virtual step belong to one batch: parts would be other iterations.
        raise ValueError(
            f"gradient_accumulation_steps: expected 1, got {steps}; pass "
            f"per_device_train_batch_size={steps * args.per_device_train_batch_size}, and for its "
            "memory MetaIADA(..., low_memory=True)"
        )
    if args.fp16:
        raise ValueError("fp16: expected False, got True; pass bf16=True, which needs no scaler")
    if max(args.world_size, args.n_gpu) > 1:
        raise ValueError(
            f"processes and GPUs: expected one, got {args.world_size} and {args.n_gpu}; choose one "
            "with CUDA_VISIBLE_DEVICES, or train with iada.Trainer under torchrun"
        )


class MetaState(transformers.TrainerCallback):
    """Saves Meta-IADA's state beside the checkpoint, and ends its epochs."""

    def __init__(self, trainer: MetaIADATrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Into the checkpoint's folder, which is there by now."""
        if self.trainer.meta is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.trainer.meta.state_dict(), folder / STATE_FILE)

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Last epoch's values for the characteristics; before a checkpoint of this step."""
        if state.global_step % len(options["train_dataloader"]) == 0:
            self.trainer.meta.end_epoch()


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


def main(
    epochs: int = 6, folder: str | None = None, resume: bool = False, **options: Any
) -> MetaIADATrainer:
    """Train, and print the accuracy on clean texts; options: of TrainingArguments.

    With `folder`, a checkpoint is kept there after each epoch, and `resume` goes on from the last.
    """
    transformers.set_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=WORDS,
        dim=32,
        hidden_dim=64,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=16,
    )
    train, meta, test = Texts(480, wrong=0.3), Texts(30), Texts(300)
    settings = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 24,
        "learning_rate": 2e-3,
        "optim": "adamw_torch",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no" if folder is None else "epoch",
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MetaIADATrainer(
            Classifier(config),
            transformers.TrainingArguments(output_dir=folder or scratch, **{**settings, **options}),
            train_dataset=train,
            eval_dataset=test,
            meta_dataset=meta,
            class_counts=torch.bincount(train.labels, minlength=CLASSES),
            compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
        )
        trainer.train(resume_from_checkpoint=resume or None)
        print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    return trainer


if __name__ == "__main__":
    main()
