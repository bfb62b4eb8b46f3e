"""What EGPT's token memory adds to the writing of a token, by how many tokens it holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.model.egpt.held_tokens import HeldTokens, KeyType, MemoryLimits
from megaegpt.model.egpt.token_memory import TokenMemory
from megaegpt.text_tables import format_table
from tools.benchmarks.common import single_grid

_HELD = (1024, 16_384, 131_072)
_CHUNK, _CHUNKS = 1024, 4
"""Tokens in a chunk, and how many chunks are looked at where not all are."""
_LOOK_UPS: tuple[tuple[str, int | None, KeyType], ...] = (
    ("all", None, "fp32"),
    ("all_int8", None, "int8"),
    ("few", _CHUNKS, "fp32"),
)
_COLUMNS = {
    "held": "held tokens",
    "bytes": "keys, MB",
    "all_ms": "all keys, ms",
    "products_ms": "their products, ms",
    "read_ms": "reading them, ms",
    "all_int8_ms": "in int8, ms",
    "few_ms": f"{_CHUNKS} chunks, ms",
}


def memory_by_tokens(hidden: int, vocab_size: int, repetitions: int) -> list[dict[str, Any]]:
    """Time the look-up of one token, with all held keys and with those of a few chunks, and, in
    turns with the first, the products of all keys and the reading of them alone.

    Args:
        hidden: width of the model.
        vocab_size: of the probabilities that are mixed.
        repetitions: counted look-ups, of which the median is taken.
    """
    rows = [_row(tokens, hidden, vocab_size, repetitions) for tokens in _HELD]
    table = [list(_COLUMNS.values())]
    for row in rows:
        times = [f"{row[name]:.2f}" for name in _COLUMNS if name.endswith("_ms")]
        table.append([f"{row['held']:,}", f"{row['bytes'] / 1e6:.1f}", *times])
    print("what the token memory adds to a token that is written")
    print(format_table(table))
    return rows


def _row(tokens: int, hidden: int, vocab_size: int, repetitions: int) -> dict[str, Any]:
    row: dict[str, Any] = {"held": tokens}
    states, logits = torch.randn(2, 1, 1, hidden), torch.randn(1, 1, vocab_size)
    for name, chunks, dtype in _LOOK_UPS:
        held, module = _filled(hidden, vocab_size, MemoryLimits(tokens, dtype), chunks)
        held.append(states[0], torch.zeros(1, 1, dtype=torch.long))
        keys = held.earlier.keys
        query = torch.randn(1, module.pointers, 1, module.dim)
        calls: dict[str, Callable[[], object]] = {
            name: lambda: held.mix(states[0], states[1], logits)  # noqa: B023
        }
        if name == "all":
            row["bytes"] = keys.nbytes
            calls["products"] = lambda: query @ keys.transpose(-1, -2)  # noqa: B023
            calls["read"] = keys.sum
        times = _milliseconds(calls, repetitions)
        row |= {f"{call}_ms": time for call, time in times.items()}
    return row


def _filled(
    hidden: int, vocab_size: int, limits: MemoryLimits, chunks: int | None
) -> tuple[HeldTokens, TokenMemory]:
    """A memory of random states."""
    egpt = EGPTConfig(chunk_size=_CHUNK, token_memory=True, memory_chunks=chunks)
    config = ModelConfig(kind="egpt", hidden_size=hidden, vocab_size=vocab_size, egpt=egpt)
    module = TokenMemory(config, single_grid()).requires_grad_(False)
    held = HeldTokens(module, 1, torch.empty(0), limits)
    generator = torch.Generator().manual_seed(1)
    for _ in range(held.most_chunks):
        ids = torch.randint(vocab_size, (1, _CHUNK), generator=generator)
        held.append(torch.randn(1, _CHUNK, hidden, generator=generator), ids)
        held.finish_chunk()
    return held, module


def _milliseconds(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The median time of each call, in turns, so that none finds in the cache what it read before
    and others did not.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repetitions):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(taken) for name, taken in times.items()}
