"""TP 1, 2 and 4 give the same logits, losses, gradients, gradient norms and training runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of, unshard
from tests.distributed.harness import grid_for

GPT = ModelConfig(vocab_size=300, max_seq_len=12, hidden_size=32, num_layers=2, num_heads=4)
EGPT = replace(GPT, kind="egpt", bias=False, egpt=EGPTConfig(num_chunks=3, chunk_size=4))
IMPROVED = replace(
    EGPT,
    egpt=replace(
        EGPT.egpt,
        local_attention=True,
        features_per_chunk=2,
        memory_gate=True,
        adapter_norm=True,
        adapter_residual=True,
    ),
)
MODELS = {
    "gpt": GPT,
    "gpt_untied": replace(GPT, tied_embeddings=False),
    "gpt_two_kv_heads": replace(GPT, num_kv_heads=2),
    "egpt": EGPT,
    "egpt_improved": IMPROVED,
    "deepgpt": replace(EGPT, kind="deepgpt"),
}
STEPS = 20


def _batch(config: ModelConfig, step: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    if config.kind == "gpt":
        tokens = torch.randint(300, (2, 13), generator=generator)
        return tokens[:, :-1], tokens[:, 1:].clone()
    egpt = config.egpt
    states = torch.randn(2, 3, 4, 32, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(300, (2, 3, 4), generator=generator)
    targets[0, 0, :2] = -100
    if config.kind == "deepgpt":
        return states, targets
    features = torch.randn(2, 2, egpt.features_per_chunk, 32, generator=generator)
    return states, features.to(dtype), targets


def _global_norm(model: torch.nn.Module, grid: ProcessGrid) -> float:
    """The norm of the full gradients, replicated ones counted once."""
    total = sum(
        unshard(p.grad, spec_of(p), grid).double().square().sum() for p in model.parameters()
    )
    return math.sqrt(float(total))


def _run(config: ModelConfig, grid: ProcessGrid, dtype: torch.dtype) -> dict:
    """First loss, logits, full gradients and norm; then losses of a short training run."""
    model = build_model(config, grid).to(dtype)
    batch = _batch(config, 0, dtype)
    loss = model(*batch)
    loss.backward()
    hidden = model.hidden_states(*batch[:-1])
    result = {
        "loss": loss.item(),
        "logits": model.head.full_logits(hidden).detach(),
        "grads": {n: unshard(p.grad, spec_of(p), grid) for n, p in model.named_parameters()},
        "norm": _global_norm(model, grid),
        "losses": [],
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(*_batch(config, step, dtype)) / 24
        loss.backward()
        optimizer.step()
        result["losses"].append(loss.item())
    return result


def _relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def _gradient_difference(name: str, grad: torch.Tensor, alone: dict) -> float:
    """Relative to the parameter's largest gradient; a key bias's to the norm of all.

    Softmax ignores what a key bias adds, so its gradient is 0 but for rounding.
    """
    expected = alone["grads"][name]
    if name.endswith("key.bias"):
        return ((grad - expected).abs().max() / alone["norm"]).item()
    return _relative_difference(grad, expected)


def _compare(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative differences of TP 2 and TP 4 from TP 1, on this rank."""
    config = MODELS[name]
    alone = _run(config, grid_for(1), dtype)
    worst: dict[str, float] = dict.fromkeys(("loss", "logits", "grads", "norm", "losses"), 0.0)
    for tp in (2, 4):
        run = _run(config, grid_for(tp), dtype)
        differences = {
            "loss": abs(run["loss"] / alone["loss"] - 1),
            "logits": _relative_difference(run["logits"], alone["logits"]),
            "norm": abs(run["norm"] / alone["norm"] - 1),
            "losses": max(
                abs(a / b - 1) for a, b in zip(run["losses"], alone["losses"], strict=True)
            ),
            "grads": max(
                _gradient_difference(key, grad, alone) for key, grad in run["grads"].items()
            ),
        }
        worst = {key: max(worst[key], differences[key]) for key in worst}
    return worst


def _compare_all(names: list[str], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    return {name: _compare(name, dtype) for name in names}


@pytest.mark.parametrize(
    ("names", "dtype", "tolerance"),
    [(list(MODELS), torch.float64, 1e-9), (["gpt", "egpt", "deepgpt"], torch.float32, 1e-5)],
    ids=["fp64", "fp32"],
)
def test_every_model_is_the_same_at_tp_1_2_and_4(distributed, names, dtype, tolerance):
    for rank, differences in enumerate(distributed(4, _compare_all, names, dtype)):
        for name, of_model in differences.items():
            for what, difference in of_model.items():
                assert difference <= tolerance, (rank, name, what, difference)


def _dropout_gradients(recompute: str) -> dict[str, torch.Tensor]:
    grid = grid_for(2)
    config = replace(GPT, dropout=0.3)
    model = build_model(config, grid, activation_checkpointing=recompute)
    torch.manual_seed(5)
    model(*_batch(config, 0, torch.float32)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _recomputation_differences() -> float:
    kept = _dropout_gradients("none")
    return max(
        (kept[name] - grad).abs().max().item()
        for recompute in ("full", "selective")
        for name, grad in _dropout_gradients(recompute).items()
    )


def test_recomputed_blocks_see_the_same_dropout_under_tensor_parallelism(distributed):
    assert distributed(2, _recomputation_differences) == [0.0, 0.0]
