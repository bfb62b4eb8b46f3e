"""Models of ours for other programs: Hugging Face's form where it can be, else safetensors."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file, whole_folder
from megaegpt.interop.families import Family
from megaegpt.interop.tensor_files import check_finite
from megaegpt.interop.tensor_layout import TensorLayout
from megaegpt.interop.tensor_writer import write_tensors
from megaegpt.interop.translation import CONFIG, lack, nearest_family, to_theirs
from megaegpt.interop.vocabulary_files import (
    copy_tokenizer,
    tokenizer_beside,
    write_tuned_template,
)
from megaegpt.model.build import meta_model
from megaegpt.model.weights import WEIGHTS, read_weights_config, verify_weights

Read = Callable[[str], Tensor | None]
"""One of our tensors by its name; None: the model has no such."""


def export_weights(
    weights: str | Path, output: str | Path, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Write a model of ours, of any kind, as a folder for other programs.

    What a family of Hugging Face's computes goes into its form (see :func:`export_huggingface`),
    any other keeps the form it has: full tensors in safetensors, and a ``config.json``.

    Returns:
        Why it could not be Hugging Face's form, by the family that comes nearest; empty if it is.

    Raises:
        CheckpointError: the weights are missing, damaged or not finite, or ``output`` cannot be
            written.
        DataError: the chat template beside the weights cannot be read.
    """
    weights = Path(weights)
    config, _ = read_weights_config(weights)
    _, differences = nearest_family(config)
    if not differences:
        export_huggingface(weights, output, dtype)
        return []
    verify_weights(weights)
    with open_ours(weights, config) as read:
        for name, _ in meta_model(config).named_parameters():
            read(name)
    with whole_folder(Path(output)) as folder:
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(weights / name, folder / name)
        copy_tokenizer(weights, folder)
    return differences


def export_huggingface(
    weights: str | Path, output: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a model of ours as a folder that ``AutoModelForCausalLM.from_pretrained`` and
    ``AutoTokenizer.from_pretrained`` load; one tensor at a time is in memory.

    Args:
        dtype: of the tensors: fp32, bf16 or fp16.

    Raises:
        CheckpointError: no family of Hugging Face's computes the model, the weights are damaged or
            not finite, or ``output`` cannot be written.
        DataError: the chat template beside the weights cannot be read.
    """
    weights, output = Path(weights), Path(output)
    config, extra = read_weights_config(weights)
    family, differences = nearest_family(config)
    if differences:
        raise CheckpointError(
            f"{weights} is no model of Hugging Face's: {lack(family, differences)}"
        )
    verify_weights(weights)
    layout = TensorLayout(config, family, gguf=False)
    names = {layout.full_name(name): name for name in layout.shapes}
    shapes = {full: layout.shapes[name] for full, name in names.items()}
    with open_ours(weights, config) as read, whole_folder(output) as folder:
        write_tensors(folder / WEIGHTS, shapes, lambda full: layout.give(names[full], read), dtype)
        tokenizer = tokenizer_beside(weights, config, extra.get("tokenizer_fingerprint"))
        text = json.dumps(_description(config, family, dtype, tokenizer), indent=2)
        (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder, config.max_seq_len)
        write_tuned_template(weights, extra, tokenizer, folder)


def _description(
    config: ModelConfig, family: Family, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    end = begin = None if tokenizer is None else tokenizer.eot_token
    if tokenizer is not None and tokenizer.bos_token is not None:
        begin = tokenizer.bos_token
    return to_theirs(config, family) | {
        "bos_token_id": begin,
        "eos_token_id": end,
        "dtype": str(dtype).removeprefix("torch."),
    }


@contextlib.contextmanager
def open_ours(weights: Path, config: ModelConfig) -> Iterator[Read]:
    """Read the tensors of a weights folder one by one, each checked to be what ``config`` says.

    Raises:
        CheckpointError: the file is damaged or does not fit, or a value is not finite.
    """
    path = weights / WEIGHTS
    check_tensor_file(path)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    try:
        with safe_open(path, framework="pt") as file:
            held = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            if held != shapes:
                name = min(n for n in held.keys() | shapes if held.get(n) != shapes.get(n))
                raise CheckpointError(
                    f"{path} does not fit its {CONFIG}: {name} has shape {held.get(name)}, not "
                    f"{shapes.get(name)}"
                )

            def read(name: str) -> Tensor | None:
                if name not in held:
                    return None
                tensor: Tensor = file.get_tensor(name)
                check_finite(name, tensor, weights)
                return tensor

            yield read
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None
