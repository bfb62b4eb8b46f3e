"""Muon written a second time: one process, whole matrices, products as in the paper (or plain AdamW
in its place); and the engine in fp64, for which DeepSpeed has no setting.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megaegpt.config import OptimizerConfig
from megaegpt.config.run import RunConfig
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import full_state
from megaegpt.training.engine.engine import Engine
from megaegpt.training.engine.schedule import learning_rate
from tests.tiny.engines import advance, decays, micro_batches, nats

_MUONS = (".attention.", "mlp.")
"""Parts of the names of linear layers."""


def naive_orthogonal(x: Tensor) -> Tensor:
    """Jordan's quintic iteration, whichever side is longer."""
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


Settings = Callable[[str, nn.Parameter], tuple[float, float]]
"""Name and parameter -> factor of the learning rate, and weight decay."""


class NaiveMuon:
    """Muon on matrices of blocks, torch's AdamW on the rest; or AdamW on all."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, settings: Settings) -> None:
        named = dict(model.named_parameters())
        is_muon = config.kind == "muon"
        self._matrices = {
            n: p
            for n, p in named.items()
            if is_muon and p.dim() == 2 and any(part in n for part in _MUONS)
        }
        self._means = {n: torch.zeros_like(p) for n, p in self._matrices.items()}
        self._config = config
        self._settings = {n: settings(n, p) for n, p in named.items()}
        rest = {n: p for n, p in named.items() if n not in self._matrices}
        self._scales = [self._settings[n][0] for n in rest]
        self._adamw = torch.optim.AdamW(
            [{"params": [p], "weight_decay": self._settings[n][1]} for n, p in rest.items()],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients that are there, which go."""
        for group, scale in zip(self._adamw.param_groups, self._scales, strict=True):
            group["lr"] = lr * scale
        self._adamw.step()
        momentum = self._config.momentum
        for name, p in self._matrices.items():
            mean, (scale, decay) = self._means[name], self._settings[name]
            mean.copy_(momentum * mean + (1 - momentum) * p.grad)
            update = naive_orthogonal(momentum * mean + (1 - momentum) * p.grad)
            p -= lr * scale * (0.2 * math.sqrt(max(p.shape)) * update + decay * p)
            p.grad = None
        self._adamw.zero_grad()


Weights = dict[str, Tensor]


def train_naively(config: RunConfig, settings: Settings | None = None) -> Weights:
    """What a run in fp64 in one process comes to, with nothing of the engine."""
    model = build_model(config.model, ProcessGrid(), seed=3).double()
    decay = config.optimizer.weight_decay
    usual: Settings = lambda name, p: (1.0, decay if decays(name, p) else 0.0)  # noqa: E731
    optimizer = NaiveMuon(model, config.optimizer, settings or usual)
    for step in range(config.training.steps):
        batches = micro_batches(step, config, ProcessGrid())
        tokens = sum((batch["targets"] != -100).sum() for batch in batches)
        share = 1 / tokens  # in fp32, as the engine has it
        for batch in batches:
            (nats(model, batch) * share).backward()
        optimizer.step(learning_rate(step, config.optimizer, config.training.steps))
    return {name: p.detach() for name, p in model.named_parameters()}


@contextlib.contextmanager
def _everything_in_fp64() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        double = torch.float64
        patch.setattr(DeepSpeedEngine, "communication_data_type", double)
        patch.setattr(DeepSpeedZeroOptimizer, "_configure_master_weights", lambda *_, **__: double)
        types = DeepSpeedEngine.get_data_types

        def data_types(engine: DeepSpeedEngine) -> tuple[torch.dtype, torch.dtype]:
            return (double, double) if engine.zero_optimization() else types(engine)

        patch.setattr(DeepSpeedEngine, "get_data_types", data_types)
        patch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float32, double])
        yield


def train_in_fp64(config: RunConfig, grid: ProcessGrid) -> Weights:
    """What a run of the engine in fp64 comes to: whole tensors."""
    with _everything_in_fp64():
        model = build_model(config.model, grid, seed=3).double()
        engine = Engine(model, grid, config, nats)
        advance(engine, config, range(config.training.steps))
        engine.assert_replicas_equal()
        weights = dict(full_state(engine.model, grid))
        engine.close()
    return {name: weight.clone() for name, weight in weights.items()}


def farthest(ours: Weights, reference: Weights) -> float:
    """The largest difference of a tensor's numbers, by the largest of them. A bias of keys, whose
    gradient is 0 but for rounding, is left out.
    """
    assert ours.keys() == reference.keys()
    return max(
        ((ours[name] - expected).abs().max() / expected.abs().max()).item()
        for name, expected in reference.items()
        if not name.endswith("key.bias")
    )
