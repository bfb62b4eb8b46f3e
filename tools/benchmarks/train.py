"""A training step of a GPT, GPT-2's or Llama's: forward, backward, clipping, AdamW.

Ours runs as in a real run: the engine with DeepSpeed, its micro-batches, its optimizer.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from megaegpt.arguments import integer
from megaegpt.errors import ConfigError
from megaegpt.parallel.devices import local_device
from megaegpt.precision import resolve_precision
from tools.benchmarks import peers
from tools.benchmarks.common import (
    add_profile,
    add_repetitions,
    add_threads,
    parse_peers,
    print_mfu,
    print_results,
)
from tools.benchmarks.processes import Candidate, Workload, compare
from tools.benchmarks.shapes import add_family, model_config, with_family

SHAPES = {
    "small": {"layers": 4, "heads": 4, "hidden": 256, "context": 256, "batch": 8},
    "124M": {"layers": 12, "heads": 12, "hidden": 768, "context": 1024, "batch": 1},
    "135M": {"layers": 30, "heads": 9, "hidden": 576, "context": 1024, "batch": 1},
    "355M": {"layers": 24, "heads": 16, "hidden": 1024, "context": 1024, "batch": 1},
    "774M": {"layers": 36, "heads": 20, "hidden": 1280, "context": 1024, "batch": 1},
    "1558M": {"layers": 48, "heads": 25, "hidden": 1600, "context": 1024, "batch": 1},
}
VOCAB = 50304


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py train``."""
    parser.add_argument("--shape", choices=SHAPES, default="small", help="sizes (%(default)s)")
    add_family(parser)
    parser.add_argument("--context", type=integer(1), help="tokens in a sequence (the shape's)")
    parser.add_argument("--batch", type=integer(1), help="sequences in a step over all processes")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=0, help="ZeRO stage")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "auto"), default="auto", help="%(default)s"
    )
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument(
        "--compile", action="store_true", help="compiled ones too: our blocks, peers whole"
    )
    parser.add_argument(
        "--processes",
        type=integer(1),
        default=1,
        help="also run ours with this many, a thread each",
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="nanogpt=DIR|hf|litgpt=DIR", help="repeat"
    )
    parser.add_argument(
        "--lora",
        type=integer(1),
        metavar="RANK",
        help="train adapters of all linear layers of the blocks, ours and litgpt's, and as the "
        "last candidate all of our weights",
    )
    add_profile(parser)
    add_repetitions(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    shape: dict[str, Any] = dict(SHAPES[arguments.shape], vocab=VOCAB)
    shape |= {key: value for key in ("context", "batch") if (value := getattr(arguments, key))}
    shape = with_family(shape, arguments)
    options = {
        "zero": arguments.zero,
        "precision": arguments.precision,
        "recompute": arguments.recompute,
        "compile": False,
        "lora": arguments.lora,
    }
    if shape["batch"] % arguments.processes:
        raise ConfigError(
            f"--processes {arguments.processes} do not divide a batch of {shape['batch']}: "
            "give another --batch"
        )
    threads = arguments.threads
    candidates = [Candidate("megaegpt", ours, (shape, options), threads=threads)]
    if arguments.compile:
        compiled_too = (shape, options | {"compile": True})
        candidates.append(Candidate("megaegpt, compiled", ours, compiled_too, threads=threads))
    if arguments.processes > 1:
        name = f"megaegpt, {arguments.processes} processes, ZeRO-2"
        together = (shape, options | {"zero": 2})
        candidates.append(Candidate(name, ours, together, processes=arguments.processes, threads=1))
    for name, folder in parse_peers(arguments.peer, ("nanogpt", "hf", "litgpt")).items():
        if arguments.lora and name != "litgpt":
            raise ConfigError(f"--lora is compared with litgpt's adapters: leave --peer {name} out")
        plain = (name, folder, shape, arguments.precision, False, arguments.lora)
        candidates.append(Candidate(name, peer, plain, threads=threads))
        if arguments.compile:
            compiled = (name, folder, shape, arguments.precision, True, arguments.lora)
            candidates.append(Candidate(f"{name}, compiled", peer, compiled, threads=threads))
    if arguments.lora:
        whole = (shape, options | {"lora": None})
        candidates.append(Candidate("megaegpt, all weights", ours, whole, threads=threads))
    results = compare(candidates, arguments.repetitions, warmup=2, profile=arguments.profile)
    print_results(f"training step, {shape}", "tokens", results)
    # Operations are counted as if all weights were trained, which with adapters are the last ones'.
    print_mfu(results[-1:] if arguments.lora else results)
    return {"shape": shape, "options": options, "results": [r.as_dict() for r in results]}


def ours(shape: dict[str, Any], options: dict[str, Any]) -> Workload:
    """One optimizer step through the engine."""
    from tools.benchmarks.engines import build_engine, facts

    config = model_config(shape)
    engine = build_engine(config, shape["batch"], options)
    rows = shape["batch"] // engine.grid.dp_size
    tokens = torch.randint(50257, (rows, shape["context"] + 1), device=engine.grid.device)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    step = itertools.count()

    def one() -> None:
        engine.train_step(next(step), [batch])

    return Workload(one, shape["batch"] * shape["context"], facts(engine, config))


def peer(
    name: str,
    folder: Path | None,
    shape: dict[str, Any],
    precision: str,
    compiled: bool,
    lora: int | None = None,
) -> Workload:
    """The peer's model with torch's fused AdamW and clipping, as its own training script has it;
    in bf16 by autocast, as there.
    """
    device = local_device()
    in_bf16 = resolve_precision(precision, device) == "bf16"
    if lora is None:
        model = peers.build(name, folder, shape).to(device)
    else:
        model = peers.litgpt(folder or Path(), shape, lora).to(device)
    forward = torch.compile(model) if compiled else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(50257, (shape["batch"], shape["context"] + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def one() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            loss = peers.mean_loss(name, forward, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Workload(one, shape["batch"] * shape["context"])
