"""Decoding: tokens a second after a prompt, greedy, random weights."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megaegpt.config import EGPTConfig, GenerationConfig
from megaegpt.errors import ConfigError
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.trained import choose_products, round_to_int8
from megaegpt.model.build import build_model, meta_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.affinity import limit_threads
from megaegpt.text_tables import format_table
from tools.benchmarks import llamacpp, peers
from tools.benchmarks.common import (
    add_profile,
    add_repetitions,
    add_sizes,
    add_threads,
    parse_peers,
    print_results,
    single_grid,
)
from tools.benchmarks.memory import memory_by_tokens
from tools.benchmarks.processes import Candidate, Workload, compare
from tools.benchmarks.shapes import add_family, model_config, with_family

PROMPT = 32
PEERS = ("nanogpt", "hf", "litgpt", "llamacpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py generate``."""
    add_sizes(
        parser,
        {
            "hidden": (768, "width"),
            "layers": (12, "blocks"),
            "heads": (12, "heads"),
            "batch": (1, "sequences"),
            "tokens": (128, "new tokens"),
        },
    )
    add_family(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--egpt", action="store_true", help="EGPT's cost per token at 1k, 4k and 16k of context"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="what EGPT's token memory adds to a token at 1k, 16k and 128k held ones",
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure ours with a compiled step as well"
    )
    parser.add_argument(
        "--int8", action="store_true", help="measure ours with weights in int8 as well"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="nanogpt=DIR|hf|litgpt=DIR|llamacpp",
        help="repeat",
    )
    add_profile(parser)
    add_repetitions(parser, default=3)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    keys = ("hidden", "layers", "heads", "batch", "tokens", "dtype")
    shape = with_family({key: getattr(arguments, key) for key in keys}, arguments)
    others = arguments.peer or arguments.compile or arguments.int8 or arguments.profile
    if (arguments.egpt or arguments.memory) and others:
        raise ConfigError(
            "--egpt measures EGPT alone: leave --peer, --compile, --int8, --profile out"
        )
    if arguments.egpt or arguments.memory:
        if arguments.dtype != "float32" or arguments.batch != 1 or arguments.tokens < 2:
            raise ConfigError(
                "--egpt and --memory measure one text in float32, of 2 tokens or more"
            )
        limit_threads()
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
    if arguments.memory:
        vocab_size = model_config(shape).vocab_size
        rows = memory_by_tokens(shape["hidden"], vocab_size, arguments.repetitions)
        return {"shape": shape, "memory": rows}
    if arguments.egpt:
        return {"shape": shape, "egpt": _egpt_by_context(shape, arguments.repetitions)}
    with tempfile.TemporaryDirectory() as folder:
        candidates = _candidates(arguments, shape, Path(folder))
        results = compare(candidates, arguments.repetitions, profile=arguments.profile)
    print_results(f"decoding, {shape}", "tokens", results)
    return {"shape": shape, "results": [result.as_dict() for result in results]}


def _candidates(
    arguments: argparse.Namespace, shape: dict[str, Any], folder: Path
) -> list[Candidate]:
    """Ours, then the peers; ``folder`` is for what they read."""
    threads = arguments.threads
    candidates = [Candidate("megaegpt", ours, (shape,), threads=threads)]
    if arguments.compile:
        candidates.append(Candidate("megaegpt, compiled", ours, (shape, True), threads=threads))
    if arguments.int8:
        in_int8 = (shape, False, True)
        candidates.append(Candidate("megaegpt, int8", ours, in_int8, threads=threads))
    for name, checkout in parse_peers(arguments.peer, PEERS).items():
        if name == "llamacpp":
            candidates.append(llamacpp.candidate(shape, _prompts(shape), folder, threads))
        else:
            candidates.append(Candidate(name, peer, (name, checkout, shape), threads=threads))
    candidates.append(Candidate("only reading the weights", reading, (shape,), threads=threads))
    return candidates


def _prompts(shape: dict[str, Any]) -> list[list[int]]:
    return [list(range(100 * row, 100 * row + PROMPT)) for row in range(shape["batch"])]


def ours(shape: dict[str, Any], compiled: bool = False, int8: bool = False) -> Workload:
    """Prefill and decoding with the preallocated cache."""
    model = (
        build_model(model_config(shape), single_grid()).to(getattr(torch, shape["dtype"])).eval()
    )
    (round_to_int8 if int8 else choose_products)(model)
    generator = TextGenerator(model, compiled=compiled)
    greedy = GenerationConfig(max_new_tokens=shape["tokens"], temperature=0.0)
    prompts = _prompts(shape)

    def one() -> None:
        for _ in generator.stream_batch(prompts, greedy):
            pass

    return Workload(one, shape["batch"] * shape["tokens"])


def peer(name: str, folder: Path | None, shape: dict[str, Any]) -> Workload:
    """The peer's model, continued greedily by its own program; nanoGPT has no cache."""
    sizes = {"vocab": 50304, "context": 1024} | shape
    device = single_grid().device
    model = peers.build(name, folder, sizes).to(device, getattr(torch, shape["dtype"])).eval()
    prompts = torch.tensor(_prompts(shape), device=device)
    proceed = peers.CONTINUATIONS[name](model, prompts, shape["tokens"])

    def one() -> None:
        with torch.inference_mode():
            proceed()

    return Workload(one, shape["batch"] * shape["tokens"])


def reading(shape: dict[str, Any]) -> Workload:
    """As much memory as the weights take, read once a token: no decoding can be faster."""
    count = meta_model(model_config(shape)).num_parameters()
    size = count * getattr(torch, shape["dtype"]).itemsize
    weights = torch.ones(size // 4, device=single_grid().device)

    def one() -> None:
        for _ in range(shape["tokens"] - 1):
            weights.sum()
        weights.sum().item()  # waits for a GPU

    return Workload(one, shape["batch"] * shape["tokens"])


def _egpt_by_context(shape: dict[str, Any], repetitions: int) -> list[dict[str, float]]:
    """Seconds a token of EGPT in the middle of a chunk after 1k, 4k and 16k tokens."""
    grid = single_grid()
    encoder_config = model_config(shape)
    config = replace(
        encoder_config,
        kind="egpt",
        num_layers=3,
        bias=False,
        egpt=EGPTConfig(num_chunks=16, chunk_size=1024),
    )
    encoder = FrozenEncoder(build_model(encoder_config, grid))  # type: ignore[arg-type]
    generator = TextGenerator(build_model(config, grid).eval(), encoder)
    rows: list[dict[str, float]] = []
    for context in (1024, 4096, 16384):
        prompt = torch.randint(50257, (context - 512,)).tolist()  # ends in the middle of a chunk
        times = []
        for _ in range(repetitions):
            stream = generator.stream(
                prompt, GenerationConfig(max_new_tokens=shape["tokens"], temperature=0.0)
            )
            next(stream)  # the prompt
            began = time.perf_counter()
            count = sum(1 for _ in stream)
            times.append((time.perf_counter() - began) / count)
        times.sort()
        rows.append({"context": context, "ms_per_token": 1e3 * times[len(times) // 2]})
    table = [(f"{row['context']:,}", f"{row['ms_per_token']:.2f}") for row in rows]
    print(format_table([("context", "ms a token"), *table]))
    return rows
