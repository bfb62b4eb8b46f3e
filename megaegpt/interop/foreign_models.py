"""Models in other programs' forms: a folder of Hugging Face's, or a GGUF file of llama.cpp's.

Their libraries are not needed for the first; nothing is unpickled except tensors
(``weights_only``). Whatever the form, tensors are read one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.errors import CheckpointError
from megaegpt.gguf_files import SUFFIX, GGUFHeader, read_gguf_header
from megaegpt.interop.families import Family
from megaegpt.interop.gguf_weights import (
    ROPE_FACTORS,
    gguf_description,
    gguf_family,
    gguf_tensors,
    llama3_factors,
    read_tensor,
)
from megaegpt.interop.tensor_files import StoredTensor, check_finite, open_tensors, weight_files
from megaegpt.interop.tensor_layout import TensorLayout, match_tensors
from megaegpt.interop.tensor_writer import write_tensors
from megaegpt.interop.translation import (
    CONFIG,
    family_of,
    is_huggingface_folder,
    read_description,
    to_ours,
)
from megaegpt.interop.vocabulary_files import is_gpt2_tokenizer, tokenizer_beside
from megaegpt.model.weights import WEIGHTS, is_run_or_checkpoint, write_description

_ROPE_PRECISION = 1e-4


@dataclass(frozen=True)
class ForeignModel:
    """A model whose description was read, and whose tensors were not."""

    source: Path
    family: Family
    config: ModelConfig
    header: GGUFHeader | None
    """Of a GGUF file."""


def find_foreign(source: Path) -> Path | None:
    """The folder of Hugging Face's or the GGUF file that ``source`` is, or that a folder without
    a ``config.json`` holds as its only one; None if it is neither. A run or a checkpoint of ours
    never is one: a GGUF file in it may be an export of what it was before.
    """
    if source.suffix == SUFFIX and source.is_file():
        return source
    if not source.is_dir():
        return None
    if (source / CONFIG).exists():
        return source if is_huggingface_folder(source) else None
    if is_run_or_checkpoint(source):
        return None
    files = sorted(source.glob(f"*{SUFFIX}"))
    return files[0] if len(files) == 1 else None


def need_foreign(source: Path) -> Path:
    """As :func:`find_foreign`, where there must be one.

    Raises:
        CheckpointError: there is none.
    """
    found = find_foreign(source)
    if found is not None:
        return found
    if (source / CONFIG).exists():
        family_of(read_description(source))
    files = sorted(source.glob(f"*{SUFFIX}"))
    if files and is_run_or_checkpoint(source):
        raise CheckpointError(
            f"{source} is a run or a checkpoint, and no model in another form: if a GGUF file in "
            f"it is meant, name that, {files[0]} say"
        )
    if len(files) > 1:
        raise CheckpointError(f"{source} holds {len(files)} GGUF files: name one, {files[0]} say")
    raise CheckpointError(
        f"{source} is no model in another form: it is no GGUF file and no folder of a model in "
        f"Hugging Face's form, which has {CONFIG}, and model.safetensors or pytorch_model.bin"
    )


def read_foreign(source: Path) -> ForeignModel:
    """Read the configuration of the model in a folder of Hugging Face's or a GGUF file.

    Raises:
        CheckpointError: it is damaged, describes a model that computes something else, or one that
            is larger than its files.
    """
    model = _describe(source)
    if model.header is None:
        held = sum(file.stat().st_size for file in weight_files(source))
        _check_size(model.config, held, "bytes", str(source / CONFIG))
    else:
        tensors = model.header.tensors.values()
        _check_size(model.config, sum(math.prod(t.shape) for t in tensors), "values", str(source))
    return model


def _describe(source: Path) -> ForeignModel:
    if source.suffix == SUFFIX:
        return _describe_gguf(source)
    theirs = read_description(source)
    family = family_of(theirs)
    return ForeignModel(source, family, to_ours(theirs, family), None)


def _describe_gguf(source: Path) -> ForeignModel:
    header = read_gguf_header(source)
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{source} is one of {parts} parts: join them with llama-gguf-split --merge"
        )
    family = gguf_family(header)
    config = to_ours(gguf_description(header, family), family)
    if ROPE_FACTORS in header.tensors:
        factors = read_tensor(header, header.tensors[ROPE_FACTORS])
        known = llama3_factors(config)
        if factors.shape != known.shape or not torch.allclose(factors, known, _ROPE_PRECISION):
            raise CheckpointError(
                f"{source}: {ROPE_FACTORS} is not the scaling of Llama 3.1, and no other is "
                "known by such a tensor"
            )
    return ForeignModel(source, family, config, header)


def _check_size(config: ModelConfig, held: int, unit: str, source: str) -> None:
    """Refuse a model larger than its files before anything is made of its size."""
    width, heads = config.hidden_size, config.num_heads + config.kv_heads
    matrices = 3 if config.has_gated_mlp else 2
    block = 2 * heads * config.head_size * width + matrices * width * config.ffn_size
    rows = config.vocab_size + (config.max_seq_len if config.positions == "learned" else 0)
    parameters = config.num_layers * block + rows * width
    if parameters > held:
        raise CheckpointError(
            f"{source} describes a model of {parameters:,} parameters or more, its files hold "
            f"{held:,} {unit}"
        )


# -- the conversion -------------------------------------------------------------------------------


def import_model(source: str | Path, output: str | Path) -> None:
    """Turn a folder of Hugging Face's or a GGUF file into one of our weights folders, in fp32.

    One tensor at a time is in memory.

    Raises:
        CheckpointError: ``source`` lacks a file or a tensor, holds one that this would not use, one
            that is not finite or has another shape than its configuration says, or a tokenizer
            with more tokens than the model.
    """
    model = _describe(Path(source))
    header = model.header
    stored = open_tensors(model.source) if header is None else gguf_tensors(header)
    try:
        layout, found = match_tensors(stored, model.config, model.family, gguf=header is not None)
    except CheckpointError as error:
        raise CheckpointError(f"{model.source}: {error}") from None
    tokenizer = tokenizer_beside(model.source, model.config)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    shapes = {name: entry.shape for name, entry in layout.entries.items()}

    def read(name: str) -> Tensor:
        return _read_finite(name, layout, found, model.source)

    write_tensors(output / WEIGHTS, shapes, read)
    extra = {"imported_from": str(source)}
    if tokenizer is not None:
        extra["tokenizer_fingerprint"] = tokenizer.fingerprint
        if not is_gpt2_tokenizer(tokenizer, model.config):
            save_tokenizer(tokenizer, output)
    write_description(model.config, output, extra)


def _read_finite(
    name: str, layout: TensorLayout, stored: Mapping[str, StoredTensor], source: Path
) -> Tensor:
    tensor = layout.take(name, stored)
    check_finite(name, tensor, source)
    return tensor
