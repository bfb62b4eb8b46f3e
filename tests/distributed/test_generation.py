"""Tensor-parallel ranks write the text of one, whatever the attention and the positions."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.recomputing import RecomputingDecoder
from megaegpt.generation.trained import round_to_int8
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.int8_weights import MOST_ROWS
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.models import (
    ATTENTION,
    CHUNK,
    GPT,
    POSITIONS,
    SAMPLING,
    WINDOW,
    egpt,
    prompt,
    variant,
)

_GPT = replace(GPT, num_layers=1)
_EGPT = replace(egpt(local_attention=True), num_layers=1)
CONFIGS = {
    **{(a, p, "gpt"): variant(a, p, _GPT) for a in ATTENTION for p in POSITIONS},
    **{
        (a, p, kind): replace(variant(a, p, _EGPT), kind=kind)
        for a, p in zip(ATTENTION, cycle(POSITIONS), strict=False)
        for kind in ("egpt", "deepgpt")
    },
}
PROMPTS = [prompt(WINDOW + 1, seed) for seed in range(2)]
NEW = 4  # into a second chunk
assert WINDOW + 1 < CHUNK < WINDOW + NEW

Texts = dict[tuple[str, str, str], list[list[int]]]


def _write(config: ModelConfig, grid: ProcessGrid, *, use_cache: bool) -> list[list[int]]:
    model = build_model(config, grid, seed=5).double().eval()
    encoder = None
    if config.kind != "gpt":  # an encoder of the same attention and positions
        encoder = FrozenEncoder(build_model(replace(config, kind="gpt"), grid, seed=6).double())
    sampling = replace(SAMPLING, max_new_tokens=NEW)
    return TextGenerator(model, encoder).generate(PROMPTS, sampling, use_cache=use_cache)


def _at_2_and_4() -> tuple[Texts, Texts]:
    """Texts of the variants that fall to this rank's group: at TP 2 half of them, at TP 4 all."""
    written = []
    for grid in (grid_for(2), grid_for(4)):
        share = list(CONFIGS)[grid.dp_rank :: grid.dp_size]
        written.append({name: _write(CONFIGS[name], grid, use_cache=True) for name in share})
    return written[0], written[1]


def test_tensor_parallel_ranks_write_with_caches_what_one_writes_without(
    distributed: Distributed,
) -> None:
    alone = {name: _write(c, ProcessGrid(), use_cache=False) for name, c in CONFIGS.items()}
    assert len({str(texts) for texts in alone.values()}) > len(alone) // 2  # no text fits all
    shares = distributed(4, _at_2_and_4)
    for rank, (at_2, at_4) in enumerate(shares):
        assert at_4 == alone, rank
        assert at_2 == {name: alone[name] for name in at_2}, rank
    assert len(shares[0][0]) + len(shares[2][0]) == len(alone)


def _int8_logits(grid: ProcessGrid) -> list[Tensor]:
    tokens = torch.tensor([prompt(WINDOW, seed) for seed in range(MOST_ROWS + 1)])
    logits = []
    for attention in ("grouped", "multi_query", "latent"):
        model = build_model(variant(attention, "rotary", _GPT), grid, seed=5).double().eval()
        model.requires_grad_(False)
        round_to_int8(model)
        logits.append(RecomputingDecoder(model, None).advance(tokens))
    return logits


def _int8_logits_at_2() -> list[Tensor]:
    return _int8_logits(grid_for(2))


def test_tensor_parallel_ranks_round_to_int8_as_one_does(distributed: Distributed) -> None:
    alone = _int8_logits(ProcessGrid())
    for logits in distributed(4, _int8_logits_at_2):
        torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)
