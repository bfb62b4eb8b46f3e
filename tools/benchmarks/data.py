"""Tokenising to shards, and drawing batches from them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tiktoken

from megaegpt.arguments import integer
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.gpt2_tokenizer import PUBLISHED_PATTERN
from megaegpt.data.tokens.samples import PretrainingSamples
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import ConfigError, LaunchError
from tools.benchmarks.common import add_repetitions, parse_peers, print_results
from tools.benchmarks.processes import Candidate, Result, Workload, compare

PREPROCESS = Path(__file__).parents[1] / "preprocess.py"
_SEQ_LEN = 1024
_BATCH = 8
_BATCHES = 2000
_BYTES_PER_UNIT = 1000  # rates are printed in thousands of bytes: kB/s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py data``."""
    parser.add_argument("--input", type=Path, help="JSON Lines (default: made of Python sources)")
    parser.add_argument("--megabytes", type=integer(1), help="to make, without --input (100)")
    parser.add_argument("--workers", type=integer(1), default=2, help="processes (%(default)s)")
    parser.add_argument(
        "--tokens", type=integer(1), default=42_800_000, help="in the loader's shard"
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="megatron=PATH", help="Megatron-LM's folder"
    )
    add_repetitions(parser, default=3)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    if arguments.input is not None and arguments.megabytes is not None:
        raise ConfigError("--megabytes is for a corpus that is made: leave it out with --input")
    peers = parse_peers(arguments.peer, ("megatron",))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.input or _make_corpus(
            folder / "corpus.jsonl", arguments.megabytes or 100
        )
        with open(corpus, "rb") as file:
            (folder / "one.jsonl").write_bytes(file.readline())
        programs = _programs(folder, peers, arguments.workers)
        raw = Candidate("tiktoken, raw, 1 core", raw_tiktoken, (corpus,))
        tokenising = [raw, *(Candidate(name, program, (corpus, *a)) for name, *a in programs)]
        results = compare(tokenising, arguments.repetitions, warmup=0)
        print_results(f"tokenising, {arguments.workers} workers", "kB", results)
        one = folder / "one.jsonl"
        starting = [Candidate(name, program, (one, *a)) for name, *a in programs]
        starts = compare(starting, arguments.repetitions, warmup=0)
        _print_programs(results, starts)
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
        "starting": [result.as_dict() for result in starts],
        "drawing": [result.as_dict() for result in drawn],
        "first_batch_seconds": opening,
    }


def _programs(
    folder: Path, peers: dict[str, Path | None], workers: int
) -> list[tuple[str, Path, list[str]]]:
    """Name, output folder and command line, all but the input, of each program."""
    programs = []
    for backend in ("tiktoken", "gigatoken"):
        output = folder / backend
        options = ["--output", str(output), "--workers", str(workers), "--quiet", "--overwrite"]
        command = [str(PREPROCESS), *options, "--tokenizer-backend", backend]
        programs.append((f"preprocess.py, {backend}", output, command))
    megatron = peers.get("megatron")
    if megatron is not None:
        # Its tokenizer must be in gpt2 in Hugging Face's form.
        options = ["--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
        options += ["--tokenizer-model", str(megatron / "gpt2")]
        for script, own in (
            ("preprocess_data.py", ["--workers", str(workers)]),
            ("preprocess_data_fast.py", ["--use-gigatoken"]),
        ):
            output = folder / script
            command = [str(megatron / "tools" / script), *options, *own]
            command += ["--output-prefix", str(output / "out")]
            programs.append((f"Megatron-LM {script}", output, command))
    return programs


def _print_programs(results: Sequence[Result], starts: Sequence[Result]) -> None:
    """Processor time, which other users of the machine disturb less, start-up and memory."""
    print()
    for result in results:
        per_second = result.units / statistics.median(result.cpu_seconds)
        print(f"{result.name}: {per_second:,.0f} kB for each second of processor time")
    same = len({result.info["tokens_sha256"] for result in results[1:]}) == 1
    print("all programs wrote " + ("the same tokens" if same else "DIFFERENT tokens"))
    for result, start in zip(results[1:], starts, strict=True):
        seconds = statistics.median(start.seconds)
        print(
            f"{result.name}: {seconds:.2f} s for one document, "
            f"{result.info['memory_mb']:.0f} MB in all processes together"
        )


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
    """tiktoken's own GPT-2: ``encode_ordinary`` on the corpus' documents, in memory, no files."""
    ours = Tokenizer.load()
    ranks = {token: rank for rank, token in enumerate(ours.token_bytes[:-1])}
    published = tiktoken.Encoding(
        "gpt2", pat_str=PUBLISHED_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]

    def repeat() -> None:
        for text in texts:
            published.encode_ordinary(text)

    return Workload(repeat, max(1, corpus.stat().st_size // _BYTES_PER_UNIT))


def program(corpus: Path, output: Path, command: list[str]) -> Workload:
    """A program from the command line, start-up included."""
    output.mkdir(exist_ok=True)
    inputs = [str(corpus)] if command[0] == str(PREPROCESS) else ["--input", str(corpus)]
    command = [sys.executable, command[0], *inputs, *command[1:]]

    def repeat() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    memory = _memory_of(command)  # which runs it once, so files are in the cache for all
    size = max(1, corpus.stat().st_size // _BYTES_PER_UNIT)
    (tokens,) = output.glob("*.bin")
    digest = hashlib.sha256(tokens.read_bytes()).hexdigest()
    return Workload(repeat, size, {"memory_mb": memory / 1e6, "tokens_sha256": digest})


def _memory_of(command: list[str]) -> int:
    """Most bytes that a program and its children have had in memory, shared ones counted once."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        total = 0
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
        most = max(most, total)
        time.sleep(0.02)
    if process.returncode:
        raise LaunchError(f"{' '.join(command)}: exit code {process.returncode}")
    return most


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
    """Shuffled samples, inputs and targets."""
    drawn = PretrainingSamples(TokenStream([str(prefix)]), _SEQ_LEN, seed=1)

    def repeat() -> None:
        for batch in range(_BATCHES):
            drawn.batch(np.arange(_BATCH) + batch * _BATCH)

    return Workload(repeat, _BATCH * _BATCHES)


def _seconds_to_first_batch(prefix: Path) -> float:
    began = time.perf_counter()
    PretrainingSamples(TokenStream([str(prefix)]), _SEQ_LEN, seed=1).batch(np.arange(_BATCH))
    return time.perf_counter() - began
