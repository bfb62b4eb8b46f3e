"""Any text as a row of tokens, and what it costs a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megaegpt.data.instruction.rows import trim_padding
from megaegpt.data.readers import json_lines, plain
from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import ends_in, expand
from megaegpt.data.tokenizer import Tokenizer, whole_characters
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.windows import EvaluationWindows, TokenSource
from megaegpt.errors import ConfigError, DataError
from megaegpt.evaluation.text_loss import Evaluation, Evaluator
from megaegpt.generation.trained import LoadedModel
from megaegpt.model.build import build_inputs
from megaegpt.model.calling import ModelInputs
from megaegpt.parallel.grid import ProcessGrid


class TextTokens:
    """Documents, each behind an end-of-text token, or behind a BOS where that is the tokenizer's
    rule: every byte of them is predicted.

    Args:
        paths: text files, which are one document each and whose line ends become LF; JSON Lines,
            whose documents are the texts under ``text``; compressed or not; or folders of them.
        tokenizer: the model's.

    Attributes:
        num_bytes: of the documents in UTF-8.
        left_out: files of the folders that are not read, and why.

    Raises:
        DataError: a file cannot be read, is no text, or is empty.
    """

    def __init__(self, paths: Sequence[str], tokenizer: Tokenizer) -> None:
        first = np.array([tokenizer.first_token], np.int64)
        problems = Problems("fail", "leaving it out of the list")
        parts: list[np.ndarray] = []
        self.num_bytes = 0
        for document in _documents(map(Path, paths), problems):
            parts += first, tokenizer.encode_numpy(document.text)
            self.num_bytes += len(whole_characters(document.text).encode())
        if not parts:
            raise DataError(f"{', '.join(paths)}: no document is in it")
        self._tokens = np.concatenate(parts).astype(np.int64)
        self.left_out = problems.left_out

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens from ``start`` on."""
        return self._tokens[start : start + length]


def _documents(paths: Iterable[Path], problems: Problems) -> Iterator[Document]:
    """Of files by their names, as preprocessing takes them; any other name is a text's."""
    for path in expand(paths, json_lines.SUFFIXES + plain.SUFFIXES, problems.left_out):
        reader = json_lines if ends_in(path.name, json_lines.SUFFIXES) else plain
        yield from reader.read([path], problems)


def inputs_of(loaded: LoadedModel, dtype: torch.dtype) -> ModelInputs:
    """How a loaded model is fed, everything encoded in the loop."""
    return build_inputs(loaded.model.config, loaded.encoder, dtype)


def evaluate_text(
    loaded: LoadedModel,
    source: TokenSource,
    inputs: ModelInputs,
    grid: ProcessGrid,
    batch_size: int,
    stride: int | None = None,
    title: str = "windows",
) -> Evaluation:
    """Loss on a text in windows of the model's length. Collective over all ranks.

    Args:
        stride: tokens from window to window; smaller than the window, tokens have more context and
            windows overlap. None: they do not.

    Raises:
        ConfigError: the stride does not fit the model.
    """
    config = loaded.model.config
    num_chunks = config.chunks_per_sample
    try:
        windows = EvaluationWindows(
            source, config.sample_len, num_chunks, stride, config.preceding_tokens
        )
    except ValueError as error:
        raise ConfigError(f"--stride {stride} does not fit the model: {error}") from None
    trim: Callable[[Batch], Batch] = dict
    if not config.needs_encoder:
        # A short text is not computed in a whole window: no token of a gpt sees what is behind it.
        width = 128 if grid.device.type == "cuda" else 1  # CUDA may make a kernel for each width
        trim = functools.partial(trim_padding, multiple_of=width)
    evaluator = Evaluator(
        windows,
        num_chunks=num_chunks,
        inputs=inputs,
        grid=grid,
        batch_size=batch_size,
        token_byte_lengths=(
            loaded.tokenizer.token_byte_lengths if loaded.is_own_tokenizer else None
        ),
        # Tokens of some tokenizers have a blank more than a document, before its first word.
        num_bytes=source.num_bytes if isinstance(source, TextTokens) else None,
        progress=title,
        trim=trim,
    )
    return evaluator.evaluate(loaded.model)
