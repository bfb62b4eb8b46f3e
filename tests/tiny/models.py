"""Tiny models of the tests: every attention kind with every kind of positions, and models lively
enough that every token of a generated text matters.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megaegpt.config import EGPTConfig, GenerationConfig, ModelConfig, RopeScalingConfig
from megaegpt.model.build import Model, build_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid

# -- variants: attention and positions -------------------------------------------------------------

WINDOW, CHUNK, CHUNKS = 5, 8, 3
BASE = ModelConfig(vocab_size=61, max_seq_len=48, hidden_size=32, num_layers=2, num_heads=4)
_LLAMA = {"norm": "rms_norm", "mlp": "swiglu", "bias": False}
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
    "qwen2": _LLAMA | {"num_kv_heads": 2, "qkv_bias": True},
    "qwen3": _LLAMA | {"num_kv_heads": 1, "qk_norm": "head", "head_dim": 12, "window": WINDOW},
    "olmo2": _LLAMA
    | {"qk_norm": "projection", "norm_placement": "post", "mlp": "geglu", "logit_softcap": 2.0},
}
"""Kinds of attention, and of the blocks that families of models have it in."""
POSITIONS = ("learned", "sinusoidal", "rotary", "rotary_extended", "none")


def variant(attention: str, positions: str, base: ModelConfig = BASE) -> ModelConfig:
    """``base`` with an attention kind and positions."""
    config = replace(base, **ATTENTION[attention])
    if positions != "rotary_extended":
        config = replace(config, positions=positions)
    elif config.attention == "latent":
        scaling = RopeScalingConfig("llama3", 4.0, original_max_seq_len=40, high_freq_factor=9.0)
        config = replace(config, positions="rotary", rope_pairs="interleaved", rope_scaling=scaling)
    else:
        scaling = RopeScalingConfig("yarn", 4.0, original_max_seq_len=40, beta_fast=5.0)
        config = replace(config, positions="rotary", rope_fraction=0.5, rope_scaling=scaling)
    if config.attention == "latent" and config.positions == "rotary":
        config = replace(config, rope_head_dim=4)
    return config


VARIANTS = {f"{a}-{p}": variant(a, p) for a in ATTENTION for p in POSITIONS}


def of_kind(config: ModelConfig, kind: str, **egpt) -> ModelConfig:
    """The decoder of EGPT or DeepGPT with the attention and positions of ``config``."""
    chunks = EGPTConfig(num_chunks=CHUNKS, chunk_size=CHUNK, **egpt)
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


# -- models that write ----------------------------------------------------------------------------

VOCAB, MAX_LEN = 90, 16

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


def build_with_encoder(
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
    return tokens_of(GPT, 1, length, seed)[0].tolist()
