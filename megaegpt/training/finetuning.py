"""Fine-tuning on instructions: pretraining's run on other data, from weights that say the model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaegpt.bars import progress_bar
from megaegpt.config import ModelConfig, RunConfig
from megaegpt.data.instruction.chat_template import ChatTemplate, load_chat_template
from megaegpt.data.instruction.records import (
    ChatRecord,
    Instruction,
    InstructionDataset,
    Record,
    read_instructions,
)
from megaegpt.data.instruction.rows import InstructionSamples, InstructionWindows, trim_padding
from megaegpt.data.readers.documents import Problems
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import CHAT_TEMPLATE_FILE, has_tokenizer
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.permutation import Permutation
from megaegpt.data.tokens.samples import Samples
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.data.tokens.windows import Windows
from megaegpt.errors import CheckpointError, ConfigError, DataError
from megaegpt.files import whole_file
from megaegpt.generation.generator import Prompt
from megaegpt.interop.sources import resolve_weights_source, source_config
from megaegpt.model.weights import INSTRUCTIONS, read_weights_config
from megaegpt.parallel.devices import device_type
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.launcher_variables import is_main_process
from megaegpt.parallel.together import raising_together

if TYPE_CHECKING:
    from megaegpt.training.pretraining import SampleText
    from megaegpt.training.stopping import StopRequests

_SOURCE = "training.initialize_from"

_FREE = {"dropout", "z_loss", "encoder", "encoder.source", "encoder.batch_size"}
"""Keys of ``model`` that a run may set whatever its weights say; a section's own are compared."""

_WIDTH_MULTIPLES = {"cpu": 8, "cuda": 128}  # of a gpt's rows; CUDA may make a kernel for each width


def finetune(
    config: RunConfig,
    grid: ProcessGrid,
    *,
    resume: bool = False,
    stops: StopRequests | None = None,
    sample_text: SampleText | None = None,
) -> bool:
    """Train a gpt, egpt or deepgpt on ``config.data.instructions``, the answers alone.

    Everything else is as in :func:`~megaegpt.training.pretraining.train`; the sample texts answer
    ``generation.prompt``. Collective over all ranks.
    """
    from megaegpt.training.pretraining import train  # imports DeepSpeed; --dry-run needs none

    config = finetuning_config(config, grid)
    return train(config, grid, InstructionData, resume=resume, stops=stops, sample_text=sample_text)


def finetuning_config(config: RunConfig, grid: ProcessGrid) -> RunConfig:
    """The configuration with the model of ``training.initialize_from``. Collective.

    Raises:
        ConfigError: there is nothing to start from or to learn, or the configuration describes
            another model, or data that is not read.
        CheckpointError: the weights cannot be had.
    """
    with raising_together(grid):
        source = _checked_source(config)
    weights = resolve_weights_source(source, grid, key=_SOURCE)
    with raising_together(grid):
        config = _with_model(config, read_weights_config(weights)[0], weights)
        if config.data.vocabulary is None:
            data = dataclasses.replace(config.data, vocabulary=_tokenizer_of(weights))
            config = dataclasses.replace(config, data=data)
    return config


def planned_config(config: RunConfig) -> RunConfig:
    """The same of weights that are neither downloaded nor converted, without their tokenizer.

    Raises:
        ConfigError: as for :func:`finetuning_config`.
        CheckpointError: there are no such weights here, and their model is not known without.
    """
    source = _checked_source(config)
    return _with_model(config, source_config(source, _SOURCE), source)


def _checked_source(config: RunConfig) -> str:
    """What a run that fine-tunes starts from."""
    if config.training.initialize_from is None:
        raise ConfigError(f"{_SOURCE} is not set: give a run, a folder of weights or gpt2")
    for name in ("train", "validation", "validation_sets", "weights"):
        if getattr(config.data, name):
            raise ConfigError(
                f"data.{name} is for pretraining, and would not be read: leave it out; records "
                "are given by data.instructions"
            )
    if not config.data.instructions.train:
        raise ConfigError("data.instructions.train is empty: give files of records")
    return str(config.training.initialize_from)


def _with_model(config: RunConfig, found: ModelConfig, weights: str | Path) -> RunConfig:
    model = model_of_weights(found, config.model, weights)
    if config.data.instructions.packing and model.needs_encoder:
        raise ConfigError(
            f"data.instructions.packing=true is for a gpt; {config.training.initialize_from} is an "
            f"{model.kind}, whose chunks would see other records: set it to false"
        )
    # Records have no chunk numbers to store features by.
    data = dataclasses.replace(
        config.data, history_features="online", token_features="online", predictions="online"
    )
    return dataclasses.replace(config, model=model, data=data)


def _tokenizer_of(weights: Path) -> str | None:
    """The place of the tokenizer beside weights; None: there is none, and it is GPT-2's."""
    if has_tokenizer(weights):
        return str(weights)
    _, extra = read_weights_config(weights)
    if extra.get("tokenizer_fingerprint") not in (None, Tokenizer.load().fingerprint):
        raise CheckpointError(
            f"{weights} was not trained with GPT-2's tokenizer, and its own is not beside it: set "
            "data.vocabulary to that"
        )
    return None


def model_of_weights(found: ModelConfig, wanted: ModelConfig, weights: str | Path) -> ModelConfig:
    """The model ``found`` beside weights, with the dropout, the z-loss and the encoder's place of
    ``wanted``.

    Args:
        weights: their name in errors.

    Raises:
        ConfigError: ``wanted`` has a value that is neither the default nor the weights'.
    """
    default = ModelConfig()
    different = [
        f"model.{prefix}{name}={value!r}, the weights have {getattr(theirs, name)!r}"
        for prefix, ours, usual, theirs in (
            ("", wanted, default, found),
            ("encoder.", wanted.encoder, default.encoder, found.encoder),
        )
        for name, value in vars(ours).items()
        if prefix + name not in _FREE and value not in (getattr(usual, name), getattr(theirs, name))
    ]
    if different:
        raise ConfigError(
            f"{weights} holds another model: {'; '.join(different)}; leave these keys out, the "
            "weights say what the model is"
        )
    encoder = found.encoder
    if wanted.encoder.source is not None:
        encoder = dataclasses.replace(encoder, source=wanted.encoder.source)
    if wanted.encoder.batch_size != default.encoder.batch_size:
        encoder = dataclasses.replace(encoder, batch_size=wanted.encoder.batch_size)
    return dataclasses.replace(found, dropout=wanted.dropout, z_loss=wanted.z_loss, encoder=encoder)


class InstructionData:
    """A run's data (:class:`~megaegpt.training.run_data.RunData`) made of instruction records.

    Raises:
        DataError: a file cannot be read, a record is bad, or none fits the model.
        CheckpointError: the model was not trained on this tokenizer's text.
        ConfigError: a record goes on behind ``model.document_end``.
    """

    def __init__(self, config: RunConfig) -> None:
        self.tokenizer = Tokenizer.load(config.data.vocabulary)
        self._model, options = config.model, config.data.instructions
        seed, self._packing = config.training.seed, options.packing
        self._datasets: list[InstructionDataset] = []
        if self._model.vocab_size < self.tokenizer.vocab_size:
            raise CheckpointError(
                f"{config.training.initialize_from} has a vocabulary of {self._model.vocab_size} "
                f"tokens, the tokenizer {self.tokenizer.name} has {self.tokenizer.vocab_size}: set "
                "data.vocabulary to the tokenizer of the weights"
            )
        self._problems = Problems(options.on_bad_record, "data.instructions.on_bad_record=skip")
        self._tasks_are_chats = options.template is not None
        train = self._read(options.train)
        held_out = self._read(options.validation)
        self._chat = self._template(options.template, [*train, *held_out])
        self._asks_in_chats = self._chat is not None and (
            self._tasks_are_chats
            or not any(isinstance(record, Instruction) for record in (*train, *held_out))
        )
        if not options.validation:
            train, held_out = hold_out(train, options.held_out, seed)
        samples = self._rows(self._encode(train, "training"), seed)
        self.samples: Samples = samples
        self.validation_sets: Mapping[str, Windows] = {}
        self.fingerprint = samples.fingerprint
        self.fingerprints: Mapping[str, str] = {"the training samples": self.fingerprint}
        self.validation: Windows | None = None
        if held_out:
            rows = self._rows(self._encode(held_out, "validation"), seed)
            self.validation = InstructionWindows(rows)
            self.fingerprints = {**self.fingerprints, "the validation rows": rows.fingerprint}
        self.tokens_per_sample = samples.tokens_per_row
        self.streams: Mapping[str, TokenStream] = {}
        self.num_chunks = 1
        self._width_multiple = _WIDTH_MULTIPLES[device_type()]
        if self._model.needs_encoder:  # rows of whole chunks
            self._width_multiple = self._model.length_multiple
        longest = -(-samples.longest_row // self._width_multiple) * self._width_multiple
        self.longest_sample = min(longest, self._model.sample_len)

    def _read(self, files: Sequence[str]) -> list[Record]:
        for file in files:
            if not os.path.lexists(file):
                raise DataError(
                    f"there are no records {file}; to begin with, some tasks are written by: "
                    "python tools/prepare_data.py instructions --output data"
                )
        return [r for file in files for r in read_instructions(Path(file), self._problems)]

    def _template(self, wanted: str | None, records: Sequence[Record]) -> ChatTemplate | None:
        """The chat template, where one is needed."""
        if wanted is None and not any(isinstance(record, ChatRecord) for record in records):
            return None
        try:
            return load_chat_template(self.tokenizer, None if wanted == "tokenizer" else wanted)
        except DataError as error:
            raise DataError(f"data.instructions.template: {error}") from None

    def _encode(self, records: Sequence[Record], name: str) -> InstructionDataset:
        shown = progress_bar(records, f"{name} records", disable=not is_main_process(), leave=False)
        dataset = InstructionDataset(
            shown,
            self.tokenizer,
            self._model.sample_len,
            chat=self._chat,
            tasks_are_chats=self._tasks_are_chats,
            problems=self._problems,
        )
        if not len(dataset):
            raise DataError(
                f"no {name} record has a prompt and an answer within {self._model.sample_len} "
                f"tokens: each of the {len(records):,} has a longer prompt, or no answer"
            )
        self._check_document_end(dataset, name)
        return dataset

    def _check_document_end(self, dataset: InstructionDataset, name: str) -> None:
        """Refuse records that go on behind ``model.document_end``: alone in a row, and in
        generation, they would be cut there, and in packed rows not. One that they begin with, a
        BOS of the same token, cuts off nothing.
        """
        if (end := self._model.document_end) is None:
            return
        cut = sum(bool((dataset[item][0][1:] == end).any()) for item in range(len(dataset)))
        if cut:
            written = "Alpaca's prompt" if self._chat is None else f"template {self._chat.name}"
            raise ConfigError(
                f"data.instructions.template: {cut:,} {name} records in the {written} go on behind "
                f"model.document_end={end}, and the model would see nothing of what is before it: "
                "name a template that ends answers with another token, chatml say, or leave "
                "records of several answers out"
            )

    def _rows(self, dataset: InstructionDataset, seed: int) -> InstructionSamples:
        self._datasets.append(dataset)
        return InstructionSamples(dataset, self._model.sample_len, seed, self._packing)

    def trim(self, batch: Batch) -> Batch:
        """Without the padding behind the longest answer."""
        return trim_padding(batch, self._width_multiple)

    def describe(self, samples: int) -> str:
        """One line on the records."""
        train, *held_out = (len(dataset) for dataset in self._datasets)
        dropped = sum(dataset.dropped for dataset in self._datasets)
        cut = sum(dataset.cut for dataset in self._datasets)
        epochs = samples / len(self.samples)
        notes = [
            f"{count:,} {what}"
            for count, what in (
                (self._problems.count, "bad"),
                (dropped, "without anything to learn left out"),
                (cut, "cut"),
            )
            if count
        ]
        return (
            f"{train:,} training records in {len(self.samples):,} rows of "
            f"{self.tokens_per_sample:.0f} tokens on average (the run is {epochs:.2f} "
            f"epochs), {sum(held_out) or 'no'} validation records"
            + self._describe_prompts()
            + (f"; {', '.join(notes)}" if notes else "")
        )

    def _describe_prompts(self) -> str:
        if self._chat is None:
            return ""
        if self._asks_in_chats:
            return f", in the chat template {self._chat.name}"
        return f", conversations in the chat template {self._chat.name}, tasks in Alpaca's prompt"

    def prompt(self, text: str) -> Prompt:
        """The text as a task, in the form that tasks have here."""
        task = Instruction(text, "", "")
        if self._chat is None or not self._asks_in_chats:
            ids = self.tokenizer.encode_prompt(task.prompt)
            return Prompt(task.prompt, ids, self.tokenizer.end_tokens)
        ids = self._chat.encode_prompt(task.conversation[:1], self.tokenizer)
        return Prompt(self.tokenizer.decode(ids), ids, self._chat.end_tokens(self.tokenizer))

    def save_beside(self, weights: Path) -> dict[str, Any]:
        """The chat template, in the file where it is looked for."""
        if self._chat is None:
            return {INSTRUCTIONS: "tasks"}
        with whole_file(weights / CHAT_TEMPLATE_FILE) as temporary:
            temporary.write_text(self._chat.source, encoding="utf-8", newline="")
        return {INSTRUCTIONS: "chats" if self._asks_in_chats else "mixed"}


def hold_out(
    records: Sequence[Record], share: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Records to train on and those to evaluate; at least one of each if both are asked for."""
    count = min(max(round(share * len(records)), 1), len(records) - 1) if share else 0
    if count < 1:
        return list(records), []
    order = Permutation(len(records), (seed, 0, 3))(np.arange(len(records)))
    chosen = set(order[:count].tolist())
    return (
        [record for number, record in enumerate(records) if number not in chosen],
        [record for number, record in enumerate(records) if number in chosen],
    )
