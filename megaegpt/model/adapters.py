"""A model whose weights are frozen and whose adapters are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from megaegpt.config import LoRAConfig, TrainingConfig
from megaegpt.errors import ConfigError
from megaegpt.model.base import LanguageModel
from megaegpt.model.parts import freeze
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import Linear
from megaegpt.parallel.params import initialize_parameter

A, B = "lora.a", "lora.b"
"""The factors of an adapter, behind the name of its layer."""


class Tensors(Protocol):
    """Whole tensors by name, of an opened file or in memory."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


def target_layers(model: LanguageModel, config: LoRAConfig) -> dict[str, Linear]:
    """The layers of a model's blocks that adapters are for, by name.

    Raises:
        ConfigError: a target that is named by itself is nowhere in the model.
    """
    found = {
        f"stack.blocks.{path}": layer
        for path, layer in model.stack.blocks.named_modules()
        if isinstance(layer, Linear) and _target_name(path) in config.layers
    }
    names = {_target_name(path.removeprefix("stack.blocks.")) for path in found}
    groups = {"attention", "mlp"}
    if missing := [t for t in config.targets if t not in groups and t not in names]:
        there = sorted(
            {
                _target_name(path)
                for path, layer in model.stack.blocks.named_modules()
                if isinstance(layer, Linear)
            }
        )
        raise ConfigError(
            f"training.lora.targets: this model has no {missing[0]}; it has {', '.join(there)}"
        )
    return found


def _target_name(path: str) -> str:
    """``0.attention.query`` and ``0.attention.latent.down`` by the names that targets have."""
    parts = path.split(".")
    return parts[2] if len(parts) > 2 else ""


def add_adapters(model: LanguageModel, config: LoRAConfig) -> None:
    """Freeze a model and give its layers adapters, whose values are open.

    Raises:
        ConfigError: as for :func:`target_layers`.
    """
    model.requires_grad_(False)
    for layer in target_layers(model, config).values():
        with layer.weight.device:  # made there: a move to or from "meta" would lose specs
            layer.add_adapter(config)
        if layer.lora is not None and layer.lora.a.dtype != layer.weight.dtype:
            layer.lora.to(layer.weight.dtype)


def initialize_adapters(model: nn.Module, seed: int, grid: ProcessGrid) -> None:
    """Draw every adapter from (seed, its name): the same at any tensor-parallel size."""
    for name, parameter in adapter_state(model):
        initialize_parameter(parameter, name, seed, grid)


def choose_trained(model: LanguageModel, training: TrainingConfig) -> int:
    """Leave to training what the configuration wants: all weights but those of ``freeze``, or
    adapters, whose values are open.

    Returns:
        Parameters of this rank that are frozen.

    Raises:
        ConfigError: ``freeze`` or ``lora`` does not fit the model.
    """
    if training.lora.rank is None:
        return freeze(model, training.freeze)
    count = sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, training.lora)
    return count


def adapter_state(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of all adapters, in the order of the model."""
    return (
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.endswith((f".{A}", f".{B}"))
    )


def merge(weight: Tensor, name: str, adapters: Tensors, scale: float) -> Tensor:
    """A whole weight with its adapter's product added, in fp64, so that it is rounded once and by
    the caller; the weight itself, if it has no adapter.

    Args:
        name: of the weight.
        adapters: whole factors by their names.
    """
    layer = name.removesuffix(".weight")
    if f"{layer}.{A}" not in adapters.keys():  # noqa: SIM118, a file is no mapping
        return weight
    a, b = (adapters.get_tensor(f"{layer}.{factor}").double() for factor in (A, B))
    return weight.double() + scale * (b @ a)
