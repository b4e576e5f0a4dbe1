"""Textual inversions: words put into tokenizer and text encoder for one task.

The tokenizer is a copy of the task's own; the text encoder's table of embeddings is replaced by a
longer one and put back afterwards, the same table as before, so later results have the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind, TaskUnsupported

MOST_VECTORS: Final = 128


@contextmanager
def attached(pipe: Any, file: Path) -> Iterator[None]:
    """The inversion's words in the pipeline's vocabulary for as long as the context lasts.

    As the network's runner has it, only the first text encoder learns them. Raises
    `ModelUnavailable` when the file can't be read, `TaskUnsupported` when its words don't go with
    the text encoder: the network's own runner stops there too, but others may not.
    """
    try:
        words = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelUnavailable(
            ModelUnavailableKind.DAMAGED, f"{file.name} can't be read: {type(error).__name__}"
        ) from error
    for vectors in words.values():
        _check_vectors(vectors)
    encoder = pipe.text_encoder
    before = _Table.of(encoder)
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    try:
        try:
            pipe.load_textual_inversion(words)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            line = " ".join(str(error).split())[:200]
            raise TaskUnsupported(f"textual_inversion: {line}") from error
        yield
    finally:
        before.put_back(encoder)


def _check_vectors(vectors: torch.Tensor) -> None:
    """A text encoder reads 77 tokens at once, and each vector is one: the library adds them one by
    one, each slower than the one before."""
    if not vectors.is_floating_point() or vectors.dim() not in (1, 2):
        raise TaskUnsupported("textual_inversion: no vectors of numbers")
    if vectors.dim() == 2 and len(vectors) > MOST_VECTORS:
        raise TaskUnsupported(f"textual_inversion: more than {MOST_VECTORS} vectors")


class _Table:
    """A text encoder's table of embeddings as it was."""

    def __init__(self, module: torch.nn.Embedding, words: int | None) -> None:
        self._module = module
        self._weight = module.weight
        self._data = module.weight.data
        self._count = module.num_embeddings
        self._words = words

    @classmethod
    def of(cls, encoder: Any) -> _Table:
        return cls(encoder.get_input_embeddings(), getattr(encoder.config, "vocab_size", None))

    def put_back(self, encoder: Any) -> None:
        self._weight.data = self._data
        self._module.weight = self._weight
        self._module.num_embeddings = self._count
        encoder.set_input_embeddings(self._module)
        if self._words is not None:
            encoder.config.vocab_size = self._words
