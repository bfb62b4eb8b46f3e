"""Saving and loading a run's checkpoint, against as many bytes in one plain file."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from megaegpt.config import ModelConfig
from tools.benchmarks.common import add_repetitions, add_sizes, add_threads, print_results
from tools.benchmarks.processes import Candidate, Workload, compare

_BYTES_PER_UNIT = 1000  # rates are printed in thousands of bytes: kB/s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py checkpoint``."""
    add_sizes(
        parser,
        {
            "hidden": (256, "width"),
            "layers": (4, "blocks"),
            "heads": (4, "heads"),
            "processes": (1, "ranks that save and load together"),
        },
    )
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=2, help="ZeRO stage")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (a temporary one)")
    add_repetitions(parser, default=3)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    keys = ("hidden", "layers", "heads", "zero")
    shape = {key: getattr(arguments, key) for key in keys}
    ranks = {"processes": arguments.processes, "threads": arguments.threads}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        # Measured first, as the plain files must have the checkpoint's size.
        saving = [Candidate("save", save, (shape, folder / "saved"), **ranks)]
        loading = [Candidate("load", load, (shape, folder / "loaded"), **ranks)]
        saved = compare(saving, arguments.repetitions)
        loaded = compare(loading, arguments.repetitions)
        size = saved[0].info["bytes"]
        written = compare([Candidate("write", write, (folder, size))], arguments.repetitions)
        read_back = compare([Candidate("read", read, (folder, size))], arguments.repetitions)
    print(f"{size / 1e6:,.1f} MB in {saved[0].info['files']} files, {shape}")
    print_results("saving, and one plain file with fsync", "kB", [*written, *saved])
    print_results("loading with checksums, and one plain file", "kB", [*read_back, *loaded])
    results = [*saved, *loaded, *written, *read_back]
    return {"shape": shape, "results": [result.as_dict() for result in results]}


def _checkpoints(shape: dict[str, int], folder: Path) -> tuple[Any, Any, Any]:
    """An engine after one step (Adam has its moments), its checkpoints, and the weights' writer."""
    from megaegpt.model.weights import save_weights
    from megaegpt.training.checkpoint.manager import CheckpointManager
    from tools.benchmarks.engines import PLAIN, build_engine

    config = ModelConfig(
        max_seq_len=64,
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
    )
    ranks = int(os.environ["WORLD_SIZE"])
    engine = build_engine(config, ranks, PLAIN | {"zero": shape["zero"]})
    tokens = torch.randint(50257, (1, 8), device=engine.grid.device)
    engine.train_step(0, [{"tokens": tokens, "targets": tokens}])

    def weights(target: Path) -> None:
        save_weights(engine.model, target, engine.grid)

    return engine, CheckpointManager(folder, keep=1), weights


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def save(shape: dict[str, int], folder: Path) -> Workload:
    """State, weights and checksums, published; the one before is removed."""
    engine, checkpoints, weights = _checkpoints(shape, folder)
    step = itertools.count(1)

    def one() -> None:
        checkpoints.save(engine, next(step), {}, {"weights": lambda copies: weights})

    one()
    saved = checkpoints.latest()
    size = _size(saved)
    return Workload(one, size // _BYTES_PER_UNIT, {"bytes": size, "files": len(_files(saved))})


def load(shape: dict[str, int], folder: Path) -> Workload:
    """Checksums of all files, then the engine's state."""
    engine, checkpoints, weights = _checkpoints(shape, folder)
    saved = checkpoints.save(engine, 1, {}, {"weights": lambda copies: weights})
    return Workload(lambda: checkpoints.load(engine), _size(saved) // _BYTES_PER_UNIT)


def write(folder: Path, size: int) -> Workload:
    """As many bytes in one file, on the disk when it ends."""
    content = os.urandom(size)

    def one() -> None:
        with open(folder / "plain", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    return Workload(one, size // _BYTES_PER_UNIT)


def read(folder: Path, size: int) -> Workload:
    """The same file again."""
    path = folder / "plain"

    def one() -> None:
        path.read_bytes()

    return Workload(one, size // _BYTES_PER_UNIT)
