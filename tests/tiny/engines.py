"""Tiny runs that the engine and checkpoint tests share, and the same run in plain torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megaegpt.config import EGPTConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megaegpt.config.run import RunConfig
from megaegpt.data.tokens.batch import Batch
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import full_state
from megaegpt.training.engine.engine import Engine, LossFunction, StepResult
from megaegpt.training.engine.schedule import learning_rate

STEPS = 20
_VOCAB, _HIDDEN, _CHUNKS, _CHUNK = 100, 32, 3, 8


def run_config(**changes: Any) -> RunConfig:
    """A GPT of 2 layers with a tied head, changed as in ``parallel={"zero_stage": 1}``."""
    sections = {
        "model": ModelConfig(
            vocab_size=_VOCAB,
            max_seq_len=16,
            hidden_size=_HIDDEN,
            num_layers=2,
            num_heads=4,
            egpt=EGPTConfig(num_chunks=_CHUNKS, chunk_size=_CHUNK),
        ),
        "parallel": ParallelConfig(),
        "training": TrainingConfig(
            steps=STEPS, global_batch_size=8, micro_batch_size=2, gradient_clipping=0.05
        ),
        "optimizer": OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=4),
    }
    for name, values in changes.items():
        sections[name] = dataclasses.replace(sections[name], **values)
    return RunConfig(**sections)


def global_batch(step: int, config: RunConfig) -> dict[str, Tensor]:
    """The step's whole batch; rows have unequal numbers of targets, the first of them none."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows, model = config.training.global_batch_size, config.model
    tokens = torch.randint(_VOCAB, (rows, model.sample_len + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(rows):
        targets[row, row * model.sample_len // rows :] = -100
    if model.kind == "gpt":
        return {"tokens": tokens[:, :-1].contiguous(), "targets": targets}
    shape = (rows, _CHUNKS, _CHUNK, _HIDDEN)
    states = torch.randn(shape, generator=generator)
    batch = {"token_states": states, "targets": targets.view(shape[:3])}
    if model.kind == "egpt":
        batch["features"] = states[:, :-1, -1]
    if model.egpt.token_memory:
        batch["text"] = tokens % 9  # some come again
    return batch


def micro_batches(step: int, config: RunConfig, grid: ProcessGrid) -> list[Batch]:
    """This rank's part of :func:`global_batch`, in the loader's order."""
    whole, size = global_batch(step, config), config.training.micro_batch_size
    starts = [
        (m * grid.dp_size + grid.dp_rank) * size
        for m in range(config.gradient_accumulation(grid.dp_size))
    ]
    return [{name: x[start : start + size] for name, x in whole.items()} for start in starts]


def nats(model: Any, batch: Batch) -> Tensor:
    """The loss function of every run here."""
    inputs = {n: _cast(x, model) if x.is_floating_point() else x for n, x in batch.items()}
    return model(**inputs)


def _cast(x: Tensor, model: Any) -> Tensor:
    return x.to(next(model.parameters()).dtype)


@dataclass
class Curve:
    """What a run gives, in plain numbers that travel between processes."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Full tensors by name, at the end."""

    def add(self, result: StepResult) -> None:
        self.losses.append(result.loss.item())
        self.norms.append(result.grad_norm.item())
        self.applied.append(result.applied)


def make_engine(config: RunConfig, grid: ProcessGrid, loss_function: LossFunction = nats) -> Engine:
    """A freshly initialised engine."""
    model = build_model(
        config.model,
        grid,
        seed=3,
        activation_checkpointing=config.training.activation_checkpointing,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    return Engine(model, grid, config, loss_function)


def advance(engine: Engine, config: RunConfig, steps: range) -> Curve:
    """Train ``engine`` over ``steps``."""
    curve = Curve()
    for step in steps:
        curve.add(engine.train_step(step, micro_batches(step, config, engine.grid)))
    curve.weights = {n: t.float().clone() for n, t in full_state(engine.model, engine.grid)}
    return curve


def train(config: RunConfig, grid: ProcessGrid, steps: int = STEPS) -> Curve:
    """A whole run; replicas are checked at its end."""
    engine = make_engine(config, grid)
    curve = advance(engine, config, range(steps))
    engine.assert_replicas_equal()
    engine.close()
    return curve


def train_plainly(config: RunConfig, dtype: torch.dtype = torch.float32) -> Curve:
    """The same run in plain torch: one process, master weights in at least fp32, torch's own AdamW
    and clipping.

    Gradients are computed in ``dtype`` and summed over micro-batches in the masters' type.
    """
    precise = torch.promote_types(dtype, torch.float32)
    model = build_model(config.model, ProcessGrid(), seed=3).to(dtype)
    masters = [nn.Parameter(p.detach().to(precise).clone()) for p in model.parameters()]
    names = (name for name, _ in model.named_parameters())
    optimizer = _plain_adamw(dict(zip(names, masters, strict=True)), config.optimizer)
    curve = Curve()
    for step in range(config.training.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optimizer, config.training.steps)
        batches = micro_batches(step, config, ProcessGrid())
        tokens = max(1, sum(int((b["targets"] != -100).sum()) for b in batches))
        loss = 0.0
        for batch in batches:
            mean = nats(model, batch) / tokens
            mean.backward()
            loss += mean.item()
            for master, p in zip(masters, model.parameters(), strict=True):
                summed = 0.0 if master.grad is None else master.grad
                master.grad, p.grad = summed + p.grad.to(precise), None
        norm = nn.utils.clip_grad_norm_(masters, config.training.gradient_clipping or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
        curve.losses.append(loss)
        curve.norms.append(norm.item())
    curve.weights = {n: p.detach().to(precise) for n, p in model.named_parameters()}
    return curve


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay acts on a parameter: a matrix or an embedding, not what a token memory
    adds to scores and gates.
    """
    of_scores = ("token_memory.distance", "token_memory.bonus", "token_memory.by_match")
    return parameter.dim() >= 2 and name not in of_scores


def _plain_adamw(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    matrices = [p for n, p in parameters.items() if decays(n, p)]
    vectors = [p for n, p in parameters.items() if not decays(n, p)]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=False,
        foreach=False,
    )


def distance(ours: Curve, reference: Curve) -> float:
    """Relative 2-norm of the difference of all weights, taken as one vector."""
    names = [name for name in reference.weights if not name.endswith("key.bias")]
    found, expected = (
        torch.cat([curve.weights[name].flatten() for name in names]) for curve in (ours, reference)
    )
    return ((found - expected).norm() / expected.norm()).item()


def largest_difference(ours: Curve, reference: Curve) -> float:
    """Largest relative difference of losses, norms and (as whole vectors) weights."""
    pairs = list(zip(ours.losses + ours.norms, reference.losses + reference.norms, strict=True))
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
    for name, b in reference.weights.items():
        if name.endswith("key.bias"):
            continue  # softmax ignores it: its gradient is 0 but for rounding
        differences.append(((ours.weights[name] - b).norm() / b.norm().clamp(min=1e-12)).item())
    return max(differences)
