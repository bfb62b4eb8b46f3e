"""Chunk features: computing a store against the encoder alone, and reading windows from it."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.data.features.contents import EncodedChunks
from megaegpt.data.features.store import FeatureSpec
from megaegpt.data.features.writer import compute_store
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder
from tools.benchmarks.common import (
    add_profile,
    add_repetitions,
    add_sizes,
    add_threads,
    print_results,
    single_grid,
)
from tools.benchmarks.processes import Candidate, Workload, compare

_WINDOWS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py features``."""
    add_sizes(
        parser,
        {
            "hidden": (256, "width of the encoder"),
            "layers": (4, "its blocks"),
            "heads": (4, "its heads"),
            "chunks": (64, "chunks of the corpus"),
            "chunk-size": (256, "tokens in a chunk"),
            "window": (16, "chunks in a window"),
            "batch": (8, "chunks encoded at once"),
        },
    )
    add_profile(parser)
    add_repetitions(parser, default=3)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    keys = ("hidden", "layers", "heads", "chunks", "chunk_size", "window", "batch")
    shape = {key: getattr(arguments, key) for key in keys}
    threads = arguments.threads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_corpus(folder / "corpus", shape)
        computing = [
            Candidate("encoder alone", encode, (shape, folder), threads=threads),
            Candidate("features", store, (shape, folder, False), threads=threads),
            Candidate("features and states", store, (shape, folder, True), threads=threads),
        ]
        computed = compare(computing, arguments.repetitions, profile=arguments.profile)
        print_results(f"computing a store, {shape}", "tokens", computed)
        for result in computed[1:]:
            print(f"{result.name}: {result.info['bytes_per_token']:,.1f} bytes of disk a token")
        reading = [
            Candidate("history", read, (shape, folder, "history"), threads=threads),
            Candidate("token states", read, (shape, folder, "token_states"), threads=threads),
        ]
        drawn = compare(reading, arguments.repetitions)
        print_results("reading stored windows", "windows", drawn)
        for result in drawn:
            speed = result.rate * result.info["bytes_per_window"]
            print(f"{result.name}: {speed / 1e6:,.0f} MB/s")
    return {
        "shape": shape,
        "computing": [result.as_dict() for result in computed],
        "reading": [result.as_dict() for result in drawn],
    }


def _write_corpus(prefix: Path, shape: dict[str, int]) -> None:
    size = shape["chunks"] * shape["chunk_size"]
    tokens = np.random.default_rng(1).integers(0, 50257, size, dtype=np.uint16)
    with ShardWriter(prefix) as writer:
        writer.add_document(tokens)
        writer.finish()


def _encoder(shape: dict[str, int]) -> FrozenEncoder:
    """bf16 on a GPU, as in training."""
    config = ModelConfig(
        max_seq_len=shape["chunk_size"],
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
    )
    grid = single_grid()
    encoder = FrozenEncoder(build_model(config, grid))  # type: ignore[arg-type]
    return encoder.to(torch.bfloat16 if grid.device.type == "cuda" else torch.float32)


def _spec(
    shape: dict[str, int], encoder: FrozenEncoder, stream: TokenStream, states: bool
) -> FeatureSpec:
    return FeatureSpec(
        encoder=encoder.fingerprint,
        shards=stream.fingerprint,
        num_chunks=shape["chunks"],
        chunk_size=shape["chunk_size"],
        hidden_size=shape["hidden"],
        dtype="bfloat16" if encoder.gpt.grid.device.type == "cuda" else "float32",
        token_states=states,
    )


def _computation(
    shape: dict[str, int], folder: Path, states: bool
) -> tuple[FeatureSpec, Callable[[Path], Any]]:
    """Return the spec of the store, and the function that computes it into a folder."""
    encoder, stream = _encoder(shape), TokenStream([str(folder / "corpus")])
    spec = _spec(shape, encoder, stream, states)

    def compute(target: Path) -> Any:
        grid, batch = encoder.gpt.grid, shape["batch"]
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            contents = EncodedChunks(spec, stream, encoder)
            return compute_store(target, spec, contents, grid, batch, "features")

    return spec, compute


def encode(shape: dict[str, int], folder: Path) -> Workload:
    """The encoder over the corpus: nothing is pooled, nothing written."""
    encoder, stream = _encoder(shape), TokenStream([str(folder / "corpus")])
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
    chunks = tokens.view(-1, shape["chunk_size"]).to(encoder.gpt.grid.device)

    def one() -> None:
        for batch in chunks.split(shape["batch"]):
            encoder(batch)

    return Workload(one, len(stream))


def store(shape: dict[str, int], folder: Path, states: bool) -> Workload:
    """A whole store from nothing: encoded, pooled, written, checksummed, published."""
    spec, compute = _computation(shape, folder, states)
    target = folder / f"store-{states}"

    def one() -> None:
        shutil.rmtree(target, ignore_errors=True)
        compute(target)

    tokens = shape["chunks"] * shape["chunk_size"]
    return Workload(one, tokens, {"bytes_per_token": spec.num_bytes / tokens})


def read(shape: dict[str, int], folder: Path, what: str) -> Workload:
    """Windows of consecutive chunks at random places, as training draws them."""
    _, compute = _computation(shape, folder, True)
    stored = compute(folder / f"read-{what}")
    draw: Callable[[np.ndarray], Tensor] = getattr(stored, what)
    first = np.random.default_rng(1).integers(0, shape["chunks"] - shape["window"] + 1, _WINDOWS)
    windows = first[:, None] + np.arange(shape["window"])
    info = {"bytes_per_window": draw(windows[0]).nbytes}

    def one() -> None:
        for window in windows:
            draw(window)

    return Workload(one, _WINDOWS, info)
