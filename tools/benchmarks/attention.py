"""Every kind of attention at several lengths: what it costs to train, to decode and to cache.

Training is the forward and backward pass of one sequence, without an optimizer. Decoding adds
tokens one by one at the end of a text of that length. Positions are sinusoidal, which have no
parameters, and the vocabulary is small, so that what differs is attention.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from megaegpt.arguments import integer
from megaegpt.config import ModelConfig
from megaegpt.config.validation import validate_model
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import build_model, meta_model
from megaegpt.model.gpt import GPT
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.allocations import TensorMeter
from megaegpt.text_tables import format_table
from tools.benchmarks.common import (
    add_profile,
    add_repetitions,
    add_sizes,
    add_threads,
    check_plot,
    figure_class,
    single_grid,
)
from tools.benchmarks.processes import Candidate, Result, Workload, compare

VARIANTS: dict[str, tuple[str, ...]] = {
    "multi-head": (),
    "multi-head, rotary": ("rotary",),
    "grouped-query": ("grouped",),
    "multi-query": ("single",),
    "latent": ("latent",),
    "latent, rotary": ("latent", "rotary"),
    "sliding-window": ("window",),
    "sliding-window grouped-query": ("window", "grouped"),
}
"""Settings of each variant; :func:`_config` turns them into keys for the sizes at hand."""

_LONG = 4096
"""Tokens from which on the growth of time per token is attention's alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py attention``."""
    add_sizes(
        parser,
        {
            "hidden": (192, "width"),
            "layers": (2, "blocks"),
            "heads": (12, "query heads"),
            "kv-heads": (4, "key/value heads of grouped-query attention"),
            "window": (256, "tokens that sliding-window attention sees"),
            "vocab": (512, "tokens of the vocabulary"),
            "tokens": (32, "new tokens of decoding"),
        },
    )
    parser.add_argument(
        "--lengths",
        type=integer(1),
        nargs="+",
        default=[1024, 2048, 4096, 8192, 16384],
        metavar="N",
        help="tokens of a sequence (%(default)s)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"some of: {'; '.join(VARIANTS)}",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table (matplotlib)")
    add_profile(parser)
    add_repetitions(parser, default=3)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    if arguments.plot is not None:
        check_plot(arguments.plot)
    keys = ("hidden", "layers", "heads", "kv_heads", "window", "vocab")
    shape = {key: getattr(arguments, key) for key in keys}
    rows = []
    for length in arguments.lengths:
        configs = {name: _config(name, shape, length) for name in arguments.variants}
        trained = _measure(train, configs, arguments)
        decoded = _measure(decode, configs, arguments, min(arguments.tokens, length - 1))
        for name, step, text in zip(configs, trained, decoded, strict=True):
            rows.append(_row(name, length, configs[name], step, text))
        _print(rows[-len(configs) :])
    growth = time_growth(rows)
    if arguments.plot is not None:
        _plot(rows, arguments.plot)
        print(f"wrote {arguments.plot}")
    return {"shape": shape, "growth": growth, "rows": rows}


def _config(variant: str, shape: dict[str, int], length: int) -> ModelConfig:
    head_size = shape["hidden"] // shape["heads"]
    parts = VARIANTS[variant]
    changes: dict[str, Any] = {"positions": "rotary" if "rotary" in parts else "sinusoidal"}
    if "grouped" in parts or "single" in parts:
        changes["num_kv_heads"] = shape["kv_heads"] if "grouped" in parts else 1
    if "latent" in parts:
        changes["attention"] = "latent"
        changes["rope_head_dim"] = max(2, head_size // 4 * 2) if "rotary" in parts else None
    if "window" in parts:
        changes["window"] = shape["window"]
    config = ModelConfig(
        vocab_size=shape["vocab"],
        max_seq_len=length,
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        **changes,
    )
    validate_model(config, variant)
    return config


def _measure(
    factory: Any, configs: dict[str, ModelConfig], arguments: argparse.Namespace, *more: Any
) -> list[Result]:
    candidates = [
        Candidate(name, factory, (config, *more), threads=arguments.threads)
        for name, config in configs.items()
    ]
    profile = arguments.profile
    if profile is not None:
        length = next(iter(configs.values())).max_seq_len
        profile = profile / f"{factory.__name__}-{length}"
    return compare(candidates, arguments.repetitions, profile=profile)


# -- workloads ------------------------------------------------------------------------------------


def _model(config: ModelConfig, grid: ProcessGrid) -> GPT:
    """bf16 on a GPU, where fused attention asks for it."""
    dtype = torch.bfloat16 if grid.device.type == "cuda" else torch.float32
    return build_model(config, grid).to(dtype)  # type: ignore[return-value]


def train(config: ModelConfig) -> Workload:
    """Loss and gradients of one sequence."""
    grid = single_grid()
    model = _model(config, grid)
    tokens = torch.randint(config.vocab_size, (1, config.max_seq_len + 1), device=grid.device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def one() -> None:
        (model(inputs, targets) / config.max_seq_len).backward()
        model.zero_grad(set_to_none=True)

    with TensorMeter() as meter:
        one()
    return Workload(one, config.max_seq_len, {"memory_bytes": meter.peak})


def decode(config: ModelConfig, new_tokens: int) -> Workload:
    """Greedy tokens at the end of a text of ``config.max_seq_len``, one at a time."""
    grid = single_grid()
    model = _model(config, grid).eval()
    cache = KVCache(config, grid, 1, config.max_seq_len, dtype=model.embedding.weight.dtype)
    start = config.max_seq_len - new_tokens
    tokens = torch.randint(config.vocab_size, (1, start), device=grid.device)
    with torch.inference_mode():
        first = model.logits(tokens, cache)[:, -1:].argmax(-1)

    @torch.inference_mode()
    def one() -> None:
        cache.length = start  # a ring then holds newer tokens than it should, at the same cost
        token = first
        for _ in range(new_tokens):
            token = model.logits(token, cache).argmax(-1)

    return Workload(one, new_tokens)


# -- output ---------------------------------------------------------------------------------------


def _row(
    name: str, length: int, config: ModelConfig, trained: Result, decoded: Result
) -> dict[str, Any]:
    counts = meta_model(config)
    cache = KVCache(config, ProcessGrid(device=torch.device("meta")), 1, length)
    return {
        "variant": name,
        "length": length,
        "parameters": counts.num_parameters(),
        "flops_per_token": counts.flops_per_token(),
        "cache_bytes": cache.bytes(),
        "train": trained.as_dict(),
        "decode": decoded.as_dict(),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    """One line a variant and length; the cache is in fp32."""
    heading = ("", "length", "parameters", "MFLOP/token", "cache B/token")
    table = [(*heading, "train tok/s", "memory MiB", "decode tok/s")]
    for row in rows:
        table.append(
            (
                row["variant"],
                f"{row['length']:,}",
                f"{row['parameters']:,}",
                f"{row['flops_per_token'] / 1e6:.2f}",
                f"{row['cache_bytes'] / row['length']:,.0f}",
                f"{row['train']['units_per_second']:,.0f}",
                f"{row['train']['memory_bytes'] / 2**20:,.1f}",
                f"{row['decode']['units_per_second']:,.0f}",
            )
        )
    print(format_table(table))
    print(flush=True)


def time_growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time per token at the greatest length over that at 4,096 (or the smallest above it).

    Processor time where the CPU computes: other programs on the machine disturb it less, and
    lengths are not measured in turns.
    """
    lengths = sorted({row["length"] for row in rows if row["length"] >= _LONG})
    if len(lengths) < 2:
        return {}
    key = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    seconds = {
        (row["variant"], row["length"]): statistics.median(row["train"][key]) / row["length"]
        for row in rows
    }
    growth: dict[str, float] = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        growth[name] = seconds[name, lengths[-1]] / seconds[name, lengths[0]]
        print(f"{name}: time per token x {growth[name]:.2f}, {lengths[0]:,} to {lengths[-1]:,}")
    return growth


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    panels = {
        "training, µs a token": lambda row: 1e6 / row["train"]["units_per_second"],
        "memory of a training step, MiB": lambda row: row["train"]["memory_bytes"] / 2**20,
        "decoding, tokens/s": lambda row: row["decode"]["units_per_second"],
        "cache of a text, KiB": lambda row: row["cache_bytes"] / 2**10,
    }
    figure = figure_class()(figsize=(10, 7), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in dict.fromkeys(row["variant"] for row in rows):
            own = [row for row in rows if row["variant"] == name]
            axes.plot([row["length"] for row in own], [value(r) for r in own], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
