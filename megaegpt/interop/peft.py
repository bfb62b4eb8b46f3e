"""Adapters in the form of Hugging Face's library PEFT, which is not needed for it.

A folder of theirs has ``adapter_config.json`` and ``adapter_model.safetensors``, over a model in
Hugging Face's form. Most families have our projections one by one, and an adapter there is the same
tensors under other names. GPT-2's query, key and value are one matrix: three adapters of ours are
one of three times the rank there, whose b has a block for each, unless they share one a, as those
do that come from PEFT.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.config.lora import TARGET_GROUPS
from megaegpt.data.tokenizer import whole_characters
from megaegpt.data.tokenizers.definition import read_chat_template
from megaegpt.data.tokenizers.tokenizer_files import CHAT_TEMPLATE_FILE
from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file, whole_folder
from megaegpt.interop.families import Family
from megaegpt.interop.hub import HUB_PREFIX
from megaegpt.interop.tensor_files import check_finite
from megaegpt.interop.tensor_layout import TensorLayout
from megaegpt.interop.translation import lack, nearest_family
from megaegpt.interop.vocabulary_files import (
    copy_tokenizer,
    tokenizer_beside,
    write_tuned_template,
)
from megaegpt.json_files import conform, read_json
from megaegpt.model.adapter_files import (
    Base,
    open_adapter,
    read_adapter,
    write_adapter,
)
from megaegpt.model.adapters import A, B
from megaegpt.model.weights import (
    INSTRUCTIONS,
    read_weights_config,
    tensors_digest,
    verify_weights,
)

N = TypeVar("N", int, float)

PEFT_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""OWNER/NAME, which PEFT has for a model of the hub."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    # Others, such as pissa, take the first product off the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Keys of theirs that change what an adapter computes, and the values with which they do not."""


_REPEATED_GROUP = re.compile(r"\)[*+{]")
"""In a pattern: what can take exponential time to match."""


@dataclass(frozen=True)
class _Described:
    """The keys of ``adapter_config.json`` that say how large the ranks and scales are."""

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


class Factors(NamedTuple):
    """An adapter of one layer, whole: a (R, I) and b (O, R)."""

    a: Tensor
    b: Tensor


# -- ours as theirs --------------------------------------------------------------------------------


def export_peft(adapter_folder: Path, output: Path) -> str:
    """Write an adapter of ours as a folder that ``PeftModel.from_pretrained`` loads over the
    exported base.

    Returns:
        What its base is, with an article.

    Raises:
        CheckpointError: the adapter is damaged, its model is no family of Hugging Face's, or
            ``output`` cannot be written.
        DataError: the chat template beside the adapter cannot be read.
    """
    adapter = read_adapter(adapter_folder)
    verify_weights(adapter_folder)
    family, differences = nearest_family(adapter.config)
    if differences:
        raise CheckpointError(
            f"{adapter_folder} is an adapter of no model of Hugging Face's: "
            f"{lack(family, differences)}; merge it by tools/convert.py merge"
        )
    with open_adapter(adapter) as file:
        ours: dict[str, dict[str, Tensor]] = {}
        for name in file.keys():  # noqa: SIM118, a file is no mapping
            layer, factor = name.rsplit(".lora.", 1)
            ours.setdefault(layer, {})[factor] = file.get_tensor(name).float()
    theirs = dict(_their_factors({n: Factors(**f) for n, f in ours.items()}, adapter.config))
    config = _peft_config(theirs, adapter.lora, family, adapter.base.source)
    tensors = {}
    for module, (a, b) in theirs.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.contiguous()
    with whole_folder(output) as folder:
        save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
        (folder / PEFT_CONFIG).write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")
        copy_tokenizer(adapter_folder, folder)
        if INSTRUCTIONS in adapter.extra:
            said = adapter.extra.get("tokenizer_fingerprint")
            tokenizer = tokenizer_beside(adapter_folder, adapter.config, said)
            write_tuned_template(adapter_folder, adapter.extra, tokenizer, folder)
    return str(family)


def _their_factors(
    ours: Mapping[str, Factors], config: ModelConfig
) -> Iterator[tuple[str, Factors]]:
    """By the names of their modules."""
    for module, layers in _modules(config).items():
        present = [layer if layer in ours else None for layer in layers]
        if not any(present):
            continue
        if len(layers) == 1:
            yield module, ours[layers[0]]
        else:
            yield module, _fused([ours.get(layer) for layer in layers], config)


def _fused(parts: list[Factors | None], config: ModelConfig) -> Factors:
    """Query, key and value side by side; those that have no adapter get zeros."""
    given = [part for part in parts if part is not None]
    width = config.num_heads * config.head_size  # of each: GPT-2 has as many key and value heads
    rank = given[0].a.shape[0]
    if len(given) == len(parts) and all(torch.equal(part.a, given[0].a) for part in given):
        return Factors(given[0].a, torch.cat([part.b for part in given]))
    b = torch.zeros(len(parts) * width, rank * len(given))
    number = 0
    for place, part in enumerate(parts):
        if part is not None:
            rows, columns = place * width, number * rank
            b[rows : rows + width, columns : columns + rank] = part.b
            number += 1
    return Factors(torch.cat([part.a for part in given]), b)


def _peft_config(
    theirs: Mapping[str, Factors], lora: LoRAConfig, family: Family, base: str
) -> dict[str, Any]:
    ranks = {module: factors.a.shape[0] for module, factors in theirs.items()}
    others = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    suffixes = sorted({re.sub(r"^.*\.\d+\.", "", module) for module in theirs})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.removeprefix(HUB_PREFIX),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": suffixes,
        "rank_pattern": others,
        "alpha_pattern": {module: lora.scale * rank for module, rank in others.items()},
        "fan_in_fan_out": any(place.transposed for place in family.places.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _modules(config: ModelConfig) -> dict[str, list[str]]:
    """Layers of ours that can have adapters, by the names of their modules; query, key and value
    in this order where they are one module.
    """
    family, _ = nearest_family(config)
    layout = TensorLayout(config, family, gguf=False)
    names = {name for group in TARGET_GROUPS.values() for name in group}
    found: dict[str, list[tuple[int, str]]] = {}
    for ours, entry in layout.entries.items():
        layer, _, kind = ours.rpartition(".")
        if kind == "weight" and layer.startswith("stack.blocks.") and layer.split(".")[-1] in names:
            module = layout.full_name(entry.name).removesuffix(".weight")
            found.setdefault(module, []).append((entry.place.part or 0, layer))
    return {module: [layer for _, layer in sorted(layers)] for module, layers in found.items()}


# -- theirs as ours --------------------------------------------------------------------------------


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's form."""
    return (folder / PEFT_CONFIG).is_file()


def peft_base(source: Path) -> str:
    """The base that a folder of PEFT's names, as ``training.initialize_from`` would: a folder, else
    a model of the hub.

    Raises:
        CheckpointError: it names none.
    """
    described = read_json(source / PEFT_CONFIG, dict[str, Any], error=CheckpointError)
    named = described.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{source / PEFT_CONFIG} names no base: give it as --base")
    on_hub = _HUB_NAME.fullmatch(named) and not os.path.exists(named)
    return f"{HUB_PREFIX}{named}" if on_hub else named


def import_peft(source: Path, base_source: str, base: Path, output: Path) -> None:
    """Write an adapter of PEFT's as a folder of ours.

    Ranks and scales of single modules become those of all: smaller ranks are filled up with zeros,
    and another scale goes into b.

    Args:
        source: the folder of theirs.
        base_source: as ``training.initialize_from`` would name its base.
        base: weights folder of its base.
        output: exists; gets the tokenizer of ``base``, and the chat template of ``source``.

    Raises:
        CheckpointError: it is damaged, of another model than ``base``, or computes what adapters of
            ours do not.
        DataError: the chat template beside it cannot be read.
    """
    described = _read_description(source)
    config, extra = read_weights_config(base)
    stored = _read_tensors(source)
    modules = _modules(config)
    if foreign := sorted(stored.keys() - modules.keys()):
        raise CheckpointError(
            f"{source} has an adapter for {foreign[0]}, which has no place in {base}: adapters of "
            "a block's linear layers are read, over the model that they were trained with"
        )
    scales = {
        module: _scale(described, module, factors.a.shape[0], source)
        for module, factors in stored.items()
    }
    rank = max(factors.a.shape[0] for factors in stored.values())
    common = set(scales.values())
    scale = common.pop() if len(common) == 1 else 1.0
    tensors: dict[str, Tensor] = {}
    for module, factors in stored.items():
        a, b = _widened(factors, rank, scales[module] / scale)
        layers = modules[module]
        for layer, part in zip(layers, b.chunk(len(layers)), strict=True):
            tensors[f"{layer}.{A}"], tensors[f"{layer}.{B}"] = a.clone(), part.contiguous()
    _check_shapes(tensors, config, source)
    targets = tuple(dict.fromkeys(name.rsplit(".lora.", 1)[0].split(".")[-1] for name in tensors))
    _fill_blocks(tensors, config)
    lora = LoRAConfig(rank, scale * rank, described.lora_dropout or 0.0, targets)
    kept = {key: extra[key] for key in ("tokenizer_fingerprint",) if key in extra}
    write_adapter(tensors, output, config, lora, Base(base_source, tensors_digest(base)), kept)
    copy_tokenizer(base, output)
    if (template := read_chat_template(source)) is not None:
        text = whole_characters(template)
        (output / CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8", newline="")


def _read_description(source: Path) -> _Described:
    """Raises:
    CheckpointError: it is damaged, or of an adapter that computes something else.
    """
    path = source / PEFT_CONFIG
    described = read_json(path, dict[str, Any], error=CheckpointError)
    _check_neutral(described, source)
    found = conform(described, _Described, str(path), error=CheckpointError, other_keys=True)
    if not 0 <= (found.lora_dropout or 0.0) < 1:
        raise CheckpointError(f"{path}: lora_dropout={found.lora_dropout} is no probability")
    for pattern in (*(found.rank_pattern or ()), *(found.alpha_pattern or ())):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{path}: {pattern!r:.60} is no pattern: {error}") from None
        if _REPEATED_GROUP.search(pattern):
            raise CheckpointError(f"{path}: the pattern {pattern!r:.60} may take any time to match")
    return found


def _check_neutral(described: Mapping[str, Any], source: Path) -> None:
    if described.get("peft_type") != "LORA":
        kind = described.get("peft_type")
        raise CheckpointError(f"{source} is an adapter of the kind {kind!r:.40}, not LORA")
    for key, values in _NEUTRAL.items():
        if (value := described.get(key, values[0])) not in values:
            raise CheckpointError(f"{source}: {key}={value!r:.60} is no adapter of low rank alone")


def _scale(described: _Described, module: str, rank: int, source: Path) -> float:
    """Of a module whose factors have the rank ``rank``."""
    said = _of_pattern(described.rank_pattern, module, described.r)
    if said != rank:
        raise CheckpointError(
            f"{source}: the adapter of {module} has the rank {rank}, and {PEFT_CONFIG} says {said}"
        )
    alpha = _of_pattern(described.alpha_pattern, module, described.lora_alpha)
    return alpha / rank**0.5 if described.use_rslora else alpha / rank


def _of_pattern(patterns: Mapping[str, N] | None, module: str, default: N) -> N:
    """As PEFT finds a module's own value: by a pattern that its name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_tensors(source: Path) -> dict[str, Factors]:
    """Their factors by module, in fp32."""
    path = source / _TENSORS
    check_tensor_file(path)
    pattern = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight")
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, a file is no mapping
                match = pattern.fullmatch(name)
                if match is None:
                    raise CheckpointError(f"{path}: {name:.80} is no part of a LoRA adapter")
                tensor = file.get_tensor(name).float()
                check_finite(name, tensor, source)
                found.setdefault(match[1], {})[match[2].lower()] = tensor
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None
    for module, factors in found.items():
        if len(factors) != 2 or any(factor.dim() != 2 for factor in factors.values()):
            raise CheckpointError(f"{path} has not both factors of {module}, as matrices")
        if factors["a"].shape[0] != factors["b"].shape[1]:
            raise CheckpointError(f"{path}: the factors of {module} have different ranks")
        if not factors["a"].shape[0]:
            raise CheckpointError(f"{path}: the factors of {module} have no rank")
    if not found:
        raise CheckpointError(f"{path} holds no adapter")
    return {module: Factors(**factors) for module, factors in found.items()}


def _widened(factors: Factors, rank: int, factor: float) -> Factors:
    more = rank - factors.a.shape[0]
    b = factors.b if factor == 1.0 else factors.b * factor
    pad = torch.nn.functional.pad
    return Factors(pad(factors.a, (0, 0, 0, more)), pad(b, (0, more)))


def _check_shapes(tensors: Mapping[str, Tensor], config: ModelConfig, source: Path) -> None:
    family, _ = nearest_family(config)
    entries = TensorLayout(config, family, gguf=False).entries
    for name, tensor in tensors.items():
        out_size, in_size = entries[f"{name.rsplit('.lora.', 1)[0]}.weight"].shape
        wanted = (tensor.shape[0], in_size) if name.endswith(A) else (out_size, tensor.shape[1])
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{source}: the adapter of {name} has shape {tuple(tensor.shape)}, the model "
                f"{wanted}: it was trained with another one"
            )


def _fill_blocks(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Adapters of ours are in every block; blocks that have none there get zeros."""
    for name in list(tensors):
        number = name.split(".")[2]
        for block in range(config.num_layers):
            other = name.replace(f"stack.blocks.{number}.", f"stack.blocks.{block}.", 1)
            tensors.setdefault(other, torch.zeros_like(tensors[name]))
