"""Decoding and training in one table, each beside the fastest of other programs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from megaegpt.arguments import ArgumentParser
from megaegpt.errors import ConfigError
from megaegpt.text_tables import format_table
from tools.benchmarks.common import add_repetitions, machine

_LLAMA = ("--family", "llama", "--kv-heads", "3")
_SMOLLM2 = ("--layers", "30", "--hidden", "576", "--heads", "9", *_LLAMA)
PARTS = {
    "decode": ("decoding, GPT-2 124M", ("generate", "--compile", "--int8")),
    "decode-8": ("... 8 sequences", ("generate", "--batch", "8", "--int8")),
    "decode-bf16": ("... in bf16", ("generate", "--compile", "--dtype", "bfloat16")),
    "decode-llama": ("decoding, Llama 135M", ("generate", *_SMOLLM2, "--compile", "--int8")),
    "train": ("training, 4 x 256, context 256, batch 8", ("train", "--processes", "2")),
    "train-compiled": ("... compiled", ("train", "--compile")),
    "train-124M": (
        "training, GPT-2 124M, context 256, batch 1",
        ("train", "--shape", "124M", "--context", "256", "--batch", "1"),
    ),
    "train-llama": (
        "training, Llama 135M, context 256, batch 1",
        ("train", "--shape", "135M", "--context", "256", "--batch", "1", *_LLAMA),
    ),
    "egpt": ("training, EGPT, 16 x 128", ("egpt", "--chunk-size", "128")),
}
"""By name: what stands in the table, and the subcommand that measures it."""
_PEERS = {
    "generate": ("hf", "litgpt", "llamacpp"),  # nanoGPT has no cache
    "train": ("nanogpt", "hf", "litgpt"),
    "egpt": ("egpt",),
}
_NO_LLAMA = "nanogpt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py overview``."""
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="nanogpt=DIR|hf|litgpt=DIR|llamacpp|egpt=DIR",
        help="repeat; each where it has such a model",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help="%(choices)s"
    )
    add_repetitions(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each part by its subcommand, print the table, and return all records."""
    known = {name for names in _PEERS.values() for name in names}
    for peer in arguments.peer:
        if peer.partition("=")[0] not in known:
            raise ConfigError(f"--peer {peer}: not one of {', '.join(sorted(known))}")
    records = {}
    for name in arguments.parts:
        _, words = PARTS[name]
        more = ("--repetitions", str(arguments.repetitions), *peers_for(words, arguments.peer))
        records[name] = _measure(*words, *more)
    facts = machine()
    print(f"\n{facts['gpu'] or facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}")
    print(_table(records))
    return {"parts": records}


def peers_for(words: Sequence[str], peers: Sequence[str]) -> list[str]:
    """The options that name those that have such a model."""
    chosen = []
    for peer in peers:
        name = peer.partition("=")[0]
        if name in _PEERS[words[0]] and not (name == _NO_LLAMA and "llama" in words):
            chosen += ["--peer", peer]
    return chosen


def _measure(subcommand: str, *words: str) -> dict[str, Any]:
    module = importlib.import_module(f"tools.benchmarks.{subcommand}")
    parser = ArgumentParser(prog=f"benchmark.py {subcommand}")
    module.add_arguments(parser)
    record: dict[str, Any] = module.run(parser.parse_args(words))
    return record


def _table(records: dict[str, Any]) -> str:
    """Tokens a second of each of ours, of the fastest other program, and how many times that is."""
    rows = [("tokens/s", "", "megaegpt", "the fastest other", "", "ratio")]
    for part, record in records.items():
        by_whom: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for result in record["results"]:
            by_whom[result["name"].startswith("megaegpt")].append(result)
        ours, others = by_whom[True], by_whom[False]
        peers = [result for result in others if not result["name"].startswith("only")]
        best = max(peers, key=lambda result: result["units_per_second"], default=None)
        for number, result in enumerate(ours):
            rate = result["units_per_second"]
            how = result["name"].partition(", ")[2]
            beside = ("", "", "")
            if best is not None:
                peer = best["units_per_second"]
                beside = (f"{peer:,.1f}", best["name"], f"{rate / peer:.2f}")
            rows.append((PARTS[part][0] if number == 0 else "", how, f"{rate:,.1f}", *beside))
    return format_table(rows)
