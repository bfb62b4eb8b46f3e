"""Muon in one process, against torch's own, which has no ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megaegpt.config import EGPTConfig, ModelConfig, OptimizerConfig
from megaegpt.model.build import build_model
from megaegpt.model.parts import matrices_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.engine.muon import orthogonalized, update_scale
from megaegpt.training.engine.optimizer import build_optimizer

GRID = ProcessGrid()
GPT = ModelConfig(vocab_size=90, max_seq_len=8, hidden_size=32, num_layers=1, num_heads=4)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16), (1, 9)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    """Jordan's coefficients give 0.68 to 1.14 of values that are no smaller than 0.05."""
    matrix = _random(*shape).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.max() * 0.9 + 0.1
    found = orthogonalized(left * values @ right)
    assert found.shape == shape
    inside = left.T @ found @ right.T  # diagonal
    assert ((inside.diagonal() > 0.65) & (inside.diagonal() < 1.25)).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9


def test_no_gradient_is_no_step() -> None:
    assert not orthogonalized(torch.zeros(3, 5)).any()


def test_it_is_for_linear_layers_and_not_for_tables_and_heads() -> None:
    model = build_model(GPT, GRID)
    names = [f"attention.{n}" for n in ("query", "key", "value", "output")] + ["mlp.up", "mlp.down"]
    assert list(matrices_of(model)) == [f"stack.blocks.0.{name}.weight" for name in names]
    egpt = EGPTConfig(num_chunks=2, chunk_size=4, token_memory=True, memory_dim=4)
    config = ModelConfig(
        kind="egpt", vocab_size=90, hidden_size=32, num_layers=1, num_heads=4, egpt=egpt
    )
    chosen = set(matrices_of(build_model(config, GRID)))
    assert {"input_mlp.up.weight", "input_mlp.down.weight"} <= chosen
    assert not [name for name in chosen if "memory" in name or "head" in name]


def test_frozen_matrices_are_left_out() -> None:
    model = build_model(GPT, GRID)
    model.stack.blocks[0].mlp.up.weight.requires_grad_(False)
    assert "stack.blocks.0.mlp.up.weight" not in matrices_of(model)


def test_its_steps_are_those_of_torchs_muon_in_bf16() -> None:
    """Which matches AdamW's root mean square by the same rule; all other parameters are AdamW's."""
    config = OptimizerConfig(kind="muon", lr=0.02, weight_decay=0.1, momentum=0.9)
    ours, theirs = build_model(GPT, GRID, seed=1), build_model(GPT, GRID, seed=1)
    optimizer = build_optimizer(ours, config, GRID)
    matrices = [*matrices_of(theirs).values()]
    muon = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    chosen = {id(p) for p in matrices}
    others = [p for p in theirs.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(3):
        for number, pair in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            for p in pair:
                p.grad = _random(*p.shape, seed=100 * step + number)
        optimizer.step()
        muon.step()
        adamw.step()
    muons = matrices_of(ours)
    for (name, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        moved = (other - before[name]).norm()
        assert (p - other).norm() <= (0.02 if name in muons else 1e-5) * moved, name


def test_a_matrix_moves_as_far_as_under_adamw() -> None:
    """Liu et al.: with 0.2 of the root of the longer side, the root mean square is 0.2."""
    for rows, columns in ((64, 64), (32, 128), (128, 32)):
        update = orthogonalized(_random(rows, columns)) * update_scale(rows, columns)
        assert 0.15 < update.square().mean().sqrt() < 0.25


def test_clipping_without_zero_skips_what_is_not_finite() -> None:
    model = nn.ModuleList([build_model(GPT, GRID)])
    optimizer = build_optimizer(model, OptimizerConfig(kind="muon"), GRID, clipping=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
