"""Texts as a trainer takes them: the tokens of a Hugging Face tokenizer."""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iada.experiments.datasets.files import missing
from iada.experiments.datasets.labelled import Labelled
from iada.experiments.datasets.view import View
from iada.utils.checks import refusal


def load_tokenizer(path: str | os.PathLike) -> Callable[..., Any]:
    """The tokenizer of a folder, such as a downloaded model; nothing is fetched."""
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        text = "texts are tokenised by transformers: pip install 'iada[paper]'"
        raise ImportError(text) from error
    folder = Path(path)
    if not folder.is_dir():
        remedy = "pass a model's folder; to `paper`: --set model.backbone=transformers/FOLDER"
        raise missing(folder, "a folder with tokenizer.json or vocab.txt", remedy)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        expected = "a tokenizer's files (tokenizer.json, tokenizer_config.json)"
        raise refusal(str(folder), expected, str(error), "download the model again") from error


class TextView(View):
    """Tokens of texts, {"input_ids", "attention_mask"} (N, T) each, with labels and index.

    Args:
        data: texts.
        tokenizer: as `load_tokenizer` returns it.
        max_length: tokens of a text that are kept; WILDS takes 300. A batch is padded to its
            longest text.
    """

    def __init__(
        self, data: Labelled, tokenizer: Callable[..., Any], max_length: int = 300
    ) -> None:
        if isinstance(data.inputs, Tensor) or not all(isinstance(t, str) for t in data.inputs):
            raise refusal("data", "texts", "others", "use MemoryView or FileView")
        self.texts, self.labels = data.inputs, data.labels
        self.tokenizer, self.max_length = tokenizer, max_length

    def whole_batch(
        self, seed: int, step: int, indices: Sequence[int]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs, labels and index of these samples: see `WholeBatches`. Nothing is drawn."""
        tokens = self.tokenizer(
            [self.texts[index] for index in indices],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        rows = torch.as_tensor(indices)
        return inputs, self.labels[rows], rows
