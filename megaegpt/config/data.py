"""Where the tokens and the chunk features come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megaegpt.config.paths import PathText
from megaegpt.config.ranges import Fraction, PositiveFloat, PositiveInt

VerifyPolicy = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class InstructionConfig:
    """Tasks and their answers, for ``launchers/finetune.py``."""

    train: tuple[PathText, ...] = ()
    """Files of Alpaca's or Dolly's records or of conversations: JSON arrays or JSON Lines."""
    validation: tuple[PathText, ...] = ()
    """Files of such records evaluated whole. Empty: ``held_out`` of the training records."""
    held_out: Fraction = 0.1
    """Share of the training records that is evaluated instead, drawn by ``training.seed``."""
    packing: bool = False
    """Several records in a row of full length, unseen by each other (gpt only); false: one a row,
    padded to the longest of the micro-batch."""
    template: PathText | None = None
    """Chat template that all records are put into: tokenizer (its own), chatml, llama3, alpaca, or
    a file of Jinja. None: tasks are put into Alpaca's prompt, conversations into the tokenizer's
    own template."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """Reaction to a record without an instruction or an answer: end the run, or leave it out."""


@dataclass(frozen=True)
class DataConfig:
    """The data of training and validation, and how it is read."""

    train: tuple[PathText, ...] = ()
    """Shard prefixes (or globs of them), as ``tools/preprocess.py`` prints them."""
    weights: tuple[PositiveFloat, ...] = ()
    """Share of each entry of ``train`` in the samples, in any unit. Empty: all are one corpus."""
    validation: tuple[PathText, ...] = ()
    """Shard prefixes evaluated whole. Empty: no evaluation."""
    validation_sets: tuple[str, ...] = ()
    """Further sets evaluated whole and recorded by name, beside ``validation``: NAME=PREFIX each;
    entries of one name are one set."""
    tasks: tuple[str, ...] = ()
    """Tasks scored at every evaluation and recorded by name: NAME=FILE each, JSON Lines of
    LAMBADA's form (last words) or HellaSwag's (the true one of several endings)."""
    mask_after_document_end: bool = False
    """Leave the first token after a document's end in a sample of shards out of the losses, of
    training and of validation: it does not follow from what is before it."""
    verify_checksums: VerifyPolicy = "auto"
    """Hold shards and feature stores against their ``manifest.json`` when a run starts; auto: if
    either is 4 GiB at most."""
    vocabulary: PathText | None = None
    """Tokenizer: a folder with ``tokenizer.json``, such a file, a ``.gguf`` or ``.tiktoken`` file,
    ``cl100k_base`` or ``o200k_base``, or a folder with GPT-2's ``encoder.json``. None: that of the
    shards or of the weights, else GPT-2's."""
    features: PathText | None = None
    """Folder of EGPT's chunk-feature stores; None: next to the run's checkpoints."""
    history_features: Literal["stored", "online"] = "stored"
    """Earlier chunks' features: read from the store, or encoded again in the loop."""
    token_features: Literal["online", "stored"] = "online"
    """The current chunks' encoder states: encoded in the loop, or read (large: a vector each)."""
    predictions: Literal["online", "stored"] = "online"
    """What an egpt's blocks and head predict: computed in the loop, or, where training.freeze
    leaves the token memory alone to learn, once for all runs that share ``features``, and read
    (large: a vector each)."""
    feature_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage type of features; auto: bfloat16 where a run computes in bf16, else float32."""
    prefetch: PositiveInt = 2
    """Global batches prepared ahead by a background thread."""
    instructions: InstructionConfig = field(default_factory=InstructionConfig)
    """Records that ``launchers/finetune.py`` reads instead of shards."""
