"""The program: its command line, and what a kill at any moment leaves behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.data.tokens.shards import Shard
from tests.tiny.tokenizers import BLANK_FIRST, changed

ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "preprocess.py"), *map(str, arguments)]


def run(*arguments: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), capture_output=True, input=stdin, check=False)


def test_a_book_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 50)
    result = run(tmp_path / "book.txt", "--output", tmp_path / "out", "--split-tokens", 0.8)
    assert result.returncode == 0, result.stderr.decode()
    output = result.stdout.decode()
    assert f"{tmp_path}/out/train: 361 tokens in 1 shard" in output
    assert f"{tmp_path}/out/validation: 91 tokens in 1 shard" in output
    again = run(tmp_path / "book.txt", "--output", tmp_path / "out", "--split-tokens", 0.8)
    assert "nothing to do" in again.stdout.decode()


@pytest.mark.parametrize("backend", ["tiktoken", "gigatoken"])
def test_the_report_names_the_program_that_has_tokenized(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    (tmp_path / "a.txt").write_text("A text.")
    output = tmp_path / "out"
    result = run(tmp_path / "a.txt", "--output", output, "--tokenizer-backend", backend)
    assert f"tokenizer   gpt2, on {backend}\n" in result.stdout.decode()


def test_a_tokenizer_that_is_no_byte_level_bpe_is_said_to_be_slow(tmp_path: Path) -> None:
    """In one line: what it runs on, and why not on what is faster."""
    (tmp_path / "marks").mkdir()
    marks = changed(pre_tokenizer=BLANK_FIRST, decoder=BLANK_FIRST)
    save_tokenizer(HuggingFaceTokenizer(marks), tmp_path / "marks")
    (tmp_path / "a.txt").write_text("A text.")
    options = ("--vocabulary", tmp_path / "marks")
    result = run(tmp_path / "a.txt", "--output", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr.decode()
    assert re.findall(r"^tokenizer.*", result.stdout.decode(), re.MULTILINE) == [
        "tokenizer   pages, on the library tokenizers, several times slower than tiktoken: "
        "it is no byte-level BPE"
    ]


def test_standard_input_fills_one_shard(tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    result = run("-", "--output", tmp_path / "out", "--no-append-eod", stdin=lines)
    assert result.returncode == 0, result.stderr.decode()
    shard = Shard(tmp_path / "out" / "train")
    assert Tokenizer.load().decode(shard.tokens) == "onetwo"
    again = run("-", "--output", tmp_path / "out", "--no-append-eod", stdin=lines)
    assert b"holds shards of other inputs" in again.stderr  # what comes next is another text
    result = run("-", "--output", tmp_path / "more", "--shards", 2, stdin=lines)
    assert result.returncode == 2
    assert "no known length" in result.stderr.decode()


def test_bad_input_is_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\nbad\n')
    result = run(tmp_path / "a.jsonl", "--output", tmp_path / "out", "--quiet", "--workers", 2)
    assert result.returncode == 2
    error = result.stderr.decode()
    assert error.startswith(f"error: {tmp_path}/a.jsonl, line 2: not JSON")
    assert error.count("\n") == 1
    result = run(
        tmp_path / "a.jsonl", "--output", tmp_path / "out", "--on-bad-input", "skip", "--quiet"
    )
    assert result.returncode == 0
    assert f"{tmp_path}/a.jsonl, line 2: not JSON" in result.stdout.decode()


def test_nanogpt_files_are_imported(tmp_path: Path) -> None:
    np.array([5, 6, 50256], "<u2").tofile(tmp_path / "val.bin")
    result = run("--from-nanogpt", tmp_path / "val.bin", "--output", tmp_path / "out")
    assert "3 tokens, 1 documents" in result.stdout.decode()
    assert Shard(tmp_path / "out" / "validation").tokens.tolist() == [5, 6, 50256]


def test_the_program_starts_without_torch() -> None:
    code = "import sys; import tools.preprocess; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert result.stdout.decode().strip() == "False"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = np.array(["alpha", "beta", "gamma", "delta", "\n", "1812", "Ω"])
    with open(path, "w") as file:
        for number in range(4000):
            text = " ".join(generator.choice(words, size=300))
            file.write(json.dumps({"text": f"{number % 3500} {text}"}) + "\n")
    return path


def test_forked_workers_change_nothing(corpus: Path, tmp_path: Path) -> None:
    """The program forks its workers; in the tests of the package, which have torch, they spawn."""
    outputs = []
    for workers in (1, 2, 3):
        output = tmp_path / str(workers)
        options = ("--shards", 3, "--shuffle-documents", 1, "--workers", workers)
        result = run(corpus, "--output", output, *options)
        assert result.returncode == 0, result.stderr.decode()
        outputs.append({path.name: path.read_bytes() for path in sorted(output.iterdir())})
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == 7


def test_only_a_process_of_one_thread_without_torch_forks() -> None:
    code = """
import sys, threading
from megaegpt.data.preprocess.pool import _can_fork
print(_can_fork())
stop = threading.Event()
threading.Thread(target=stop.wait).start()
print(_can_fork())
stop.set()
sys.modules["torch"] = None
print(_can_fork())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    expected = ["True" if sys.platform == "linux" else "False", "False", "False"]
    assert result.stdout.decode().split() == expected


@pytest.mark.long
def test_a_killed_run_is_repeated_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """MEGAEGPT_KILLS says how many kills; one at least falls between a run's start and end."""
    options = ["--shards", 8, "--workers", 2, "--deduplicate", "--validation-fraction", 0.1]
    options += ["--shuffle-documents", 1]
    began = time.monotonic()
    assert run(corpus, "--output", tmp_path / "expected", *options).returncode == 0
    duration = time.monotonic() - began
    expected = contents(tmp_path / "expected")
    output = tmp_path / "out"
    arguments = command(corpus, "--output", output, *options, "--quiet")
    moments = random.Random(1)
    kills = interrupted = 0
    while kills < int(os.environ.get("MEGAEGPT_KILLS", "4")) or not interrupted:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, 1.0) * duration)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            assert contents(output) == expected
            shutil.rmtree(output)
            continue
        kills += 1
        interrupted += output.exists() and not (output / "manifest.json").exists()
        _, alive = psutil.wait_procs(workers, timeout=300)
        assert not alive, "workers outlive their killed parent"
        assert_no_half_shard(output)
    assert subprocess.run(arguments, capture_output=True, check=True).stderr == b""
    assert contents(output) == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_no_half_shard(folder: Path) -> None:
    for index in folder.glob("*.idx"):
        Shard(index.with_suffix("")).verify()


def test_options_that_an_import_would_not_use_are_refused(tmp_path: Path) -> None:
    np.array([5, 6, 50256], "<u2").tofile(tmp_path / "val.bin")
    options = ("--shards", 2, "--min-chars", 3, "--no-append-eod")
    result = run("--from-nanogpt", tmp_path / "val.bin", *options, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert "leave out --shards, --append-eod, --min-chars" in result.stderr.decode()
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_printed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("A text.")
    (tmp_path / "in" / "b.pdf").write_text("%PDF")
    result = run(tmp_path / "in", "--output", tmp_path / "out", "--quiet", "--workers", 1)
    assert result.returncode == 0, result.stderr.decode()
    assert b"left out    1 not read, names of no known kind of text: " in result.stdout
