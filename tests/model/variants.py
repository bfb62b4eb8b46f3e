"""Every attention kind with every kind of positions, at a tiny size, for the tests."""

from __future__ import annotations

from dataclasses import replace

import torch

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.model.build import Model, build_model
from megaegpt.parallel.grid import ProcessGrid

WINDOW = 5
BASE = ModelConfig(vocab_size=61, max_seq_len=48, hidden_size=32, num_layers=2, num_heads=4)
ATTENTION: dict[str, dict] = {
    "multi_head": {},
    "grouped": {"num_kv_heads": 2},
    "multi_query": {"num_kv_heads": 1},
    "window": {"window": WINDOW},
    "grouped_window_every_2": {"num_kv_heads": 2, "window": WINDOW, "window_every": 2},
    "latent": {"attention": "latent", "latent_dim": 12, "latent_norm": False},
    "latent_with_query_latent": {
        "attention": "latent",
        "latent_dim": 6,
        "query_latent_dim": 10,
        "head_dim": 6,
    },
}
POSITIONS = ("learned", "sinusoidal", "rotary", "none")


def variant(attention: str, positions: str, base: ModelConfig = BASE) -> ModelConfig:
    """``base`` with an attention kind and positions."""
    config = replace(base, positions=positions, **ATTENTION[attention])
    if config.attention == "latent" and positions == "rotary":
        config = replace(config, rope_head_dim=4)
    return config


VARIANTS = {f"{a}-{p}": variant(a, p) for a in ATTENTION for p in POSITIONS}


def of_kind(config: ModelConfig, kind: str, **egpt) -> ModelConfig:
    """The decoder of EGPT or DeepGPT with the attention and positions of ``config``."""
    chunks = EGPTConfig(num_chunks=3, chunk_size=8, **egpt)
    return replace(config, kind=kind, egpt=chunks)


def build(config: ModelConfig, grid: ProcessGrid | None = None) -> Model:
    """A model in fp64 with weights far from 0, so that no part of it hides behind small numbers."""
    model = build_model(replace(config, init_std=0.15), grid or ProcessGrid(), seed=3).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("gate"):  # norms and replicated biases
                steps = torch.arange(len(parameter), dtype=torch.float64)
                parameter.add_(0.1 * torch.sin(steps + len(name)))
    return model


def tokens_of(config: ModelConfig, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)
