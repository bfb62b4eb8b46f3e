"""The data of a run, made of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.validation_sets import validation_sets
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.blend import Blend
from megaegpt.data.tokens.corpus_manifest import verify_shards
from megaegpt.data.tokens.samples import ChunkWindows, PretrainingSamples, Samples, StreamSamples
from megaegpt.data.tokens.shard_tokenizer import (
    check_model_knows,
    check_same_tokenizer,
    tokenizer_of_shards,
)
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.data.tokens.token_ids import check_document_end, check_ids, document_end
from megaegpt.data.tokens.windows import EvaluationWindows, Windows
from megaegpt.errors import ConfigError, DataError
from megaegpt.evaluation.text_loss import nothing_to_predict
from megaegpt.generation.generator import Prompt


class RunData(Protocol):
    """The data of a run; made on every rank alike, without communication."""

    tokenizer: Tokenizer
    samples: Samples
    fingerprint: str
    """Changes with the samples; a resumed run says so."""
    tokens_per_sample: float
    """Mean over an epoch, padding not counted."""
    longest_sample: int
    """Most columns that a micro-batch can have, padding counted."""
    streams: Mapping[str, TokenStream]
    """The splits that features are stored for, by name; empty: they are computed in the loop."""
    fingerprints: Mapping[str, str]
    """Of all that is learned from and evaluated, by name: every rank must have the same."""
    validation: Windows | None
    validation_sets: Mapping[str, Windows]
    """Further sets by name; each has its stream under ``validation_NAME`` where it has one."""
    num_chunks: int
    """Chunks that the validation loss is reported by."""

    def trim(self, batch: Batch) -> Batch:
        """A micro-batch without the columns that nothing is learned from."""

    def describe(self, samples: int) -> str:
        """One line for people, of a run that draws so many samples."""

    def prompt(self, text: str) -> Prompt:
        """``generation.prompt``, as a model that learns from this data is asked."""

    def save_beside(self, weights: Path) -> dict[str, Any]:
        """Write what else goes with the weights; returns what their description says of it."""


class PretrainingData:
    """Token shards: sequences for a gpt, windows of chunks for egpt and deepgpt.

    Ranks share the work of verifying the shards' checksums.
    """

    def __init__(self, config: RunConfig, rank: int = 0, world_size: int = 1) -> None:
        if not config.data.train:
            raise ConfigError("data.train is empty: give the prefixes of the training shards")
        if config.data.instructions.train or config.data.instructions.validation:
            raise ConfigError(
                "data.instructions is for fine-tuning, and would not be read: leave it out, or "
                "start launchers/finetune.py"
            )
        train = TokenStream(config.data.train)
        self.tokenizer = tokenizer_of_shards(train.prefixes, config.data.vocabulary)
        if not self.tokenizer.is_installed:
            check_model_knows(self.tokenizer, config.model.vocab_size)
        self.fingerprint = train.fingerprint
        self.streams: Mapping[str, TokenStream] = {"train": train}
        model = config.model
        self.tokens_per_sample: float = model.sample_len
        self.longest_sample = model.sample_len
        self.num_chunks = model.chunks_per_sample
        end = _masked_after(config, train, self.tokenizer)
        self.samples: Samples = _samples_of(model, train, config.training.seed, end)
        if config.data.weights:
            self.samples = _blend(config, train, end)
            self.fingerprint += f" blended {train.spans} {list(config.data.weights)}"
        self.validation: Windows | None = None
        if config.data.validation:
            held_out = TokenStream(config.data.validation)
            self.streams = {"train": train, "validation": held_out}
            self.validation = self._windows(config, held_out, "data.validation")
        sets = validation_sets(config.data.validation_sets)
        streams = {name: TokenStream(entries) for name, entries in sets.items()}
        self.validation_sets: Mapping[str, Windows] = {
            name: self._windows(config, stream, f"validation set {name}")
            for name, stream in streams.items()
        }
        self.streams = {**self.streams, **{f"validation_{n}": s for n, s in streams.items()}}
        splits = {f"the {name} split": s.fingerprint for name, s in self.streams.items()}
        self.fingerprints: Mapping[str, str] = {"the training samples": self.fingerprint, **splits}
        prefixes = [p for stream in self.streams.values() for p in stream.prefixes]
        check_same_tokenizer(prefixes, self.tokenizer)
        verify_shards(prefixes, config.data.verify_checksums, rank, world_size)
        for stream in self.streams.values():
            check_document_end(stream, model.document_end)
            check_ids(stream, model.vocab_size, rank, world_size)

    def _windows(self, config: RunConfig, stream: TokenStream, what: str) -> Windows:
        """A whole stream to be evaluated.

        Raises:
            DataError: it has no token to predict.
        """
        windows = EvaluationWindows(
            stream,
            config.model.sample_len,
            self.num_chunks,
            overlap=config.model.preceding_tokens,
            document_end=_masked_after(config, stream, self.tokenizer),
        )
        if not len(windows):
            raise nothing_to_predict(f"{what} ({', '.join(stream.prefixes)})")
        return windows

    def trim(self, batch: Batch) -> Batch:
        """Every column is learned from."""
        return batch

    def describe(self, samples: int) -> str:
        """One line on the splits."""
        validation = self.streams.get("validation")
        held_out = f"{len(validation):,}" if validation else "no"
        sets = (f", {len(self.streams[f'validation_{n}']):,} of {n}" for n in self.validation_sets)
        if isinstance(self.samples, Blend):
            run = f"the run is {self.samples.describe(samples)}"
        else:
            epochs = samples / len(self.samples)
            run = f"{len(self.samples):,} samples; the run is {epochs:.2f} epochs"
        return (
            f"{len(self.streams['train']):,} training tokens ({run}), {held_out} validation tokens"
            f"{''.join(sets)}"
        )

    def prompt(self, text: str) -> Prompt:
        """The text itself."""
        return Prompt(text, self.tokenizer.encode_prompt(text), self.tokenizer.end_tokens)

    def save_beside(self, weights: Path) -> dict[str, Any]:
        """Nothing."""
        return {}


def _masked_after(config: RunConfig, stream: TokenStream, tokenizer: Tokenizer) -> int | None:
    """The token whose target is left out, if the configuration wants that."""
    if not config.data.mask_after_document_end:
        return None
    if config.model.document_end is not None:
        return config.model.document_end
    return document_end(stream, tokenizer)


def _samples_of(
    model: ModelConfig,
    stream: TokenStream,
    seed: int,
    end: int | None,
    span: tuple[int, int] | None = None,
) -> StreamSamples:
    if model.needs_encoder:
        egpt, preceding = model.egpt, model.preceding_tokens
        return ChunkWindows(stream, egpt.num_chunks, egpt.chunk_size, seed, span, preceding, end)
    return PretrainingSamples(stream, model.max_seq_len, seed, span, end)


def _blend(config: RunConfig, stream: TokenStream, end: int | None) -> Blend:
    """Each entry of ``data.train`` by its weight, in an order of its own."""
    seed = config.training.seed
    for prefix, (first, stop) in zip(config.data.train, stream.spans, strict=True):
        if first == stop:
            raise DataError(f"{prefix} has no tokens: leave it and its weight out")
    sources = [
        _samples_of(config.model, stream, seed + number, end, span)
        for number, span in enumerate(stream.spans)
    ]
    return Blend(sources, config.data.weights, seed, config.data.train)
