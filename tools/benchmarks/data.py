"""Tokenising to shards, and drawing batches from them."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.data.samples import PretrainingSamples
from megaegpt.data.shards import ShardWriter
from megaegpt.data.stream import TokenStream
from megaegpt.data.tokenizer import Tokenizer
from tools.benchmarks.common import add_repetitions, parse_peers, print_results
from tools.benchmarks.processes import Candidate, Workload, compare

PREPROCESS = Path(__file__).parents[1] / "preprocess.py"
_RAW_MEGABYTES = 8
_SEQ_LEN = 1024
_BATCH = 8
_BATCHES = 2000
_BYTES_PER_UNIT = 1000  # rates are printed in thousands of bytes: kB/s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py data``."""
    parser.add_argument("--input", type=Path, help="JSON Lines (default: made of Python sources)")
    parser.add_argument("--megabytes", type=int, default=100, help="to make (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--tokens", type=int, default=42_800_000, help="in the loader's shard")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="megatron=PATH", help="Megatron-LM's folder"
    )
    add_repetitions(parser, default=3)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    peers = parse_peers(arguments.peer, ("megatron",))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.input or _make_corpus(folder / "corpus.jsonl", arguments.megabytes)
        tokenising = [Candidate("tiktoken, raw, 1 core", raw_tiktoken, (corpus,))]
        for backend in ("tiktoken", "gigatoken"):
            out = folder / backend
            options = (corpus, out, backend, arguments.workers)
            tokenising.append(Candidate(f"preprocess.py, {backend}", ours, options))
        if "megatron" in peers:
            work = (corpus, folder / "megatron", peers["megatron"], arguments.workers)
            tokenising.append(Candidate("Megatron-LM preprocess_data.py", megatron, work))
        results = compare(tokenising, arguments.repetitions, warmup=0)
        print_results(f"tokenising, {arguments.workers} workers", "kB", results)
        for result in results[1:]:
            largest = result.info["largest_process_mb"]
            print(f"{result.name}: largest process at most {largest:.0f} MB")
        shard = _make_shard(folder / "loader", arguments.tokens)
        drawing = [
            Candidate("nanoGPT's random crops", nanogpt_crops, (shard,), threads=1),
            Candidate("PretrainingSamples", samples, (shard,), threads=1),
        ]
        drawn = compare(drawing, arguments.repetitions)
        print_results(f"drawing {_BATCH} x {_SEQ_LEN}, 1 core", "samples", drawn)
        opening = _seconds_to_first_batch(shard)
        print(f"opening the corpus and drawing the first batch: {1000 * opening:.1f} ms")
    return {
        "tokenising": [result.as_dict() for result in results],
        "drawing": [result.as_dict() for result in drawn],
        "first_batch_seconds": opening,
    }


def _make_corpus(path: Path, megabytes: int) -> Path:
    """Documents of 2 to 10 kB from the sources of Python's library and the installed packages."""
    left = megabytes * 10**6
    sizes = np.random.default_rng(1)
    with open(path, "w", encoding="utf-8") as file:
        for text in _python_sources():
            start = 0
            while start < len(text) and left > 0:
                size = int(sizes.integers(2000, 10_000))
                left -= file.write(json.dumps({"text": text[start : start + size]}) + "\n")
                start += size
            if left <= 0:
                break
    return path


def _python_sources() -> Iterator[str]:
    for key in ("stdlib", "purelib"):
        for source in sorted(Path(sysconfig.get_path(key)).rglob("*.py")):
            text = source.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield text


def raw_tiktoken(corpus: Path) -> Workload:
    """``encode_ordinary`` on documents in memory: no reading, no writing."""
    tokenizer = Tokenizer.load()
    texts, size = [], 0
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(line.encode())
            if size > _RAW_MEGABYTES * 10**6:
                break

    def repeat() -> None:
        for text in texts:
            tokenizer.encode(text)

    return Workload(repeat, size // _BYTES_PER_UNIT)


def ours(corpus: Path, output: Path, backend: str, workers: int) -> Workload:
    """``tools/preprocess.py`` from the command line, start-up included."""
    options = ["--workers", str(workers), "--tokenizer-backend", backend, "--quiet", "--overwrite"]
    command = [sys.executable, str(PREPROCESS), str(corpus), "--output", str(output), *options]
    return _program(command, corpus, output)


def megatron(corpus: Path, output: Path, folder: Path, workers: int) -> Workload:
    """Megatron-LM's script; its tokenizer must be in ``folder``/gpt2 in Hugging Face's form."""
    output.mkdir(exist_ok=True)
    command = [sys.executable, str(folder / "tools" / "preprocess_data.py")]
    command += ["--input", str(corpus), "--output-prefix", str(output / "out"), "--append-eod"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--workers", str(workers)]
    command += ["--tokenizer-model", str(folder / "gpt2")]
    return _program(command, corpus, output)


def _program(command: list[str], corpus: Path, output: Path) -> Workload:
    def repeat() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    repeat()  # also shows the memory it takes, or this process's where that is more
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    size = corpus.stat().st_size // _BYTES_PER_UNIT
    info = {"largest_process_mb": largest, "output": sorted(p.name for p in output.iterdir())}
    return Workload(repeat, size, info)


def _make_shard(prefix: Path, tokens: int) -> Path:
    generator = np.random.default_rng(1)
    with ShardWriter(prefix) as writer:
        for _ in range(max(1, tokens // 2300)):
            writer.add_document(generator.integers(0, 50257, 2300, dtype=np.uint16))
        writer.finish()
    return prefix


def nanogpt_crops(prefix: Path) -> Workload:
    """nanoGPT's way: the file is mapped for each batch, starts are drawn, crops are stacked."""
    generator = np.random.default_rng(1)

    def repeat() -> None:
        for _ in range(_BATCHES):
            data = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
            starts = generator.integers(0, len(data) - _SEQ_LEN - 1, _BATCH)
            np.stack([data[i : i + _SEQ_LEN].astype(np.int64) for i in starts])
            np.stack([data[i + 1 : i + 1 + _SEQ_LEN].astype(np.int64) for i in starts])

    return Workload(repeat, _BATCH * _BATCHES)


def samples(prefix: Path) -> Workload:
    """Shuffled samples into one buffer that is used again."""
    drawn = PretrainingSamples(TokenStream([str(prefix)]), _SEQ_LEN, seed=1)
    buffer = np.empty((_BATCH, drawn.row_len), np.int64)

    def repeat() -> None:
        for batch in range(_BATCHES):
            drawn.batch(np.arange(_BATCH) + batch * _BATCH, out=buffer)

    return Workload(repeat, _BATCH * _BATCHES)


def _seconds_to_first_batch(prefix: Path) -> float:
    began = time.perf_counter()
    PretrainingSamples(TokenStream([str(prefix)]), _SEQ_LEN, seed=1).batch(np.arange(_BATCH))
    return time.perf_counter() - began
