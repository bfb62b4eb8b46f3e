"""Descriptions of a run's checkpoints, of one checkpoint, or of a folder of weights, in words."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megaegpt.config import ModelConfig
from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file
from megaegpt.interop.foreign_models import find_foreign, read_foreign
from megaegpt.model.adapter_files import lora_of
from megaegpt.model.adapters import add_adapters
from megaegpt.model.build import empty_model
from megaegpt.model.weights import (
    ADAPTER,
    WEIGHTS,
    find_weights,
    read_any_config,
    verify_weights,
)
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import ParamSpec, spec_of
from megaegpt.training.checkpoint.folders import CheckpointFolders
from megaegpt.training.checkpoint.manifest import MANIFEST, Manifest, Topology, verify_files


def describe_contents(path: Path, verify: bool = False, tensors: bool = True) -> Iterator[str]:
    """Lines on a run, its checkpoints, one of them, or a folder of weights, ours or Hugging Face's.

    Args:
        verify: read everything and compare checksums.
        tensors: with a line for each.

    Raises:
        CheckpointError: it is none of these, or damaged, or has no checksums to ``verify``.
    """
    if (path / MANIFEST).is_file():
        yield from _describe_checkpoint(path, verify, tensors)
        return
    for directory in (path / "checkpoints", path):
        if CheckpointFolders(directory).complete():
            yield from _describe_directory(directory, verify)
            return
    if (foreign := find_foreign(path)) is not None:
        if verify:
            raise CheckpointError(f"{foreign}: other programs' files have no checksums to verify")
        model = read_foreign(foreign)
        form = "in Hugging Face's form" if model.header is None else "a GGUF file"
        yield f"{foreign}: {form}, {model.family.title}"
        yield from _describe_model(model.config)
        return
    yield from _describe_weights(find_weights(path), verify, tensors)


def _describe_directory(directory: Path, verify: bool) -> Iterator[str]:
    folders = CheckpointFolders(directory)
    complete, names = folders.complete(), {"latest": folders.latest(), "best": folders.best()}
    yield f"{directory}: {len(complete)} checkpoints"
    for folder in complete:
        marks = ", ".join(name for name, named in names.items() if named == folder)
        try:
            manifest = Manifest.read(folder)
            if verify:
                verify_files(manifest.files, folder)
        except CheckpointError as error:
            yield f"  {folder.name} {marks:<12}  DAMAGED: {error}"
            continue
        verified = ", verified" if verify else ""
        size = _megabytes(sum(entry.size for entry in manifest.files.values()))
        yield (
            f"  {folder.name} {marks:<12}  {_date(manifest)}  {size}  "
            f"{Topology(**manifest.topology)}{verified}"
        )


def _describe_checkpoint(folder: Path, verify: bool, tensors: bool) -> Iterator[str]:
    manifest = Manifest.read(folder)
    if verify:
        verify_files(manifest.files, folder)
    topology = Topology(**manifest.topology)
    parts: dict[str, int] = {}
    for name, entry in manifest.files.items():
        part = name.split("/")[0]
        parts[part] = parts.get(part, 0) + entry.size
    yield f"{folder}: a checkpoint{', every file verified' if verify else ''}"
    yield _line("step", f"{manifest.step}, saved {_date(manifest)}")
    yield _line("topology", str(topology))
    yield _line("run", ", ".join(_state_of_run(manifest)))
    sizes = ", ".join(f"{part} {_megabytes(size)}" for part, size in sorted(parts.items()))
    yield _line("files", f"{len(manifest.files)}: {sizes}")
    config, extra, _ = read_any_config(folder / "weights")
    yield from _describe_model(config, extra)
    shapes = {name: tuple(shape) for name, shape in manifest.parameters.items()}
    yield _total(shapes)
    if tensors:
        tp = topology.tensor_parallel
        yield from _table(shapes, _specs(config, extra, tp), tp)


def _state_of_run(manifest: Manifest) -> Iterator[str]:
    for name, value in manifest.trainer.items():
        if name not in ("config", "encoder_arithmetic"):  # long; config.yaml of the run shows it
            yield f"{name}={value}"


def _describe_weights(folder: Path, verify: bool, tensors: bool) -> Iterator[str]:
    config, extra, is_whole = read_any_config(folder)
    if verify:
        verify_weights(folder)
    kind, path = ("weights", folder / WEIGHTS) if is_whole else ("an adapter", folder / ADAPTER)
    yield f"{folder}: {kind}, whatever the parallelism{', verified' if verify else ''}"
    yield from _describe_model(config, extra)
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {part.get_dtype() for part in slices.values()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    yield f"{_total(shapes)} of type {', '.join(sorted(types))}"
    if tensors:
        yield from _table(shapes)


def _describe_model(config: ModelConfig, extra: dict[str, object] | None = None) -> Iterator[str]:
    heads = f"{config.num_heads} heads"
    if config.attention == "latent":
        heads += f" over a latent of {config.latent_size}"
    elif config.kv_heads != config.num_heads:
        heads += f" over {config.kv_heads} key-value heads"
    yield _line(
        "model",
        f"{config.kind}: {config.num_layers} layers of width {config.hidden_size}, {heads}, "
        f"{config.positions} positions, {config.sample_len} tokens",
    )
    yield _line("vocabulary", f"{config.vocab_size} tokens in {config.padded_vocab_size} rows")
    if config.encoder.source is not None:
        yield _line("encoder", config.encoder.source)
    if extra:
        yield _line("extra", ", ".join(f"{name}={value}" for name, value in extra.items()))


def _specs(config: ModelConfig, extra: dict[str, Any], tp_size: int) -> dict[str, ParamSpec]:
    with torch.device("meta"):
        model = empty_model(config, ProcessGrid(tp_size=tp_size))
        if (lora := lora_of(extra)) is not None:
            add_adapters(model, lora)
    return {name: spec_of(parameter) for name, parameter in model.named_parameters()}


def _total(shapes: dict[str, tuple[int, ...]]) -> str:
    total = sum(math.prod(shape) for shape in shapes.values())
    return _line("tensors", f"{len(shapes)}, {total:,} parameters")


def _table(
    shapes: dict[str, tuple[int, ...]],
    specs: dict[str, ParamSpec] | None = None,
    tp_size: int = 1,
) -> Iterator[str]:
    """A line a tensor: its name, full shape, and how it is cut over tensor-parallel ranks."""
    width = max(map(len, shapes), default=0)
    for name, shape in shapes.items():
        full = " x ".join(map(str, shape))
        cut = ""
        if specs is not None and tp_size > 1 and name in specs:
            tp_dim = specs[name].tp_dim
            cut = {None: f"on each of {tp_size}", 0: f"rows over {tp_size}"}.get(
                tp_dim, f"columns over {tp_size}"
            )
        yield f"    {name:<{width}}  {full:<14}  {cut}".rstrip()


def _line(title: str, text: str) -> str:
    return f"  {title:<11}{text}"


def _date(manifest: Manifest) -> str:
    saved = datetime.datetime.fromtimestamp(manifest.saved_at_ns / 1e9, datetime.UTC)
    return f"{saved:%Y-%m-%d %H:%M:%S} UTC"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
