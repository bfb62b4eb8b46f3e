"""Models small enough to be run hundreds of times, lively enough that every token matters."""

from __future__ import annotations

from dataclasses import replace

import torch

from megaegpt.config import EGPTConfig, GenerationConfig, ModelConfig
from megaegpt.model.build import Model, build_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid

VOCAB, MAX_LEN, CHUNK, CHUNKS = 90, 16, 8, 3

GPT = ModelConfig(
    vocab_size=VOCAB,
    max_seq_len=MAX_LEN,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    init_std=0.4,  # twenty times GPT-2's: the next token is far from uniform
)
EGPT = replace(GPT, kind="egpt", bias=False, egpt=EGPTConfig(num_chunks=CHUNKS, chunk_size=CHUNK))
DEEPGPT = replace(EGPT, kind="deepgpt")

SAMPLING = GenerationConfig(temperature=1.0, top_k=None, top_p=0.95, seed=3)
SAMPLING_24 = replace(SAMPLING, max_new_tokens=24)


def egpt(**changes: object) -> ModelConfig:
    """EGPT with other chunks, features or extensions."""
    return replace(EGPT, egpt=replace(EGPT.egpt, **changes))


def build(
    config: ModelConfig, grid: ProcessGrid | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Model, FrozenEncoder | None]:
    """The model in eval mode and its encoder; memory gates are open."""
    grid = grid or ProcessGrid()
    model = build_model(config, grid, seed=5).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("attention.gate"):
            parameter.data.fill_(0.7)
    if config.kind == "gpt":
        return model, None
    encoder = FrozenEncoder(build_model(replace(GPT, num_layers=1), grid, seed=6))
    return model, encoder.to(dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length,), generator=generator).tolist()
