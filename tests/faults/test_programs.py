"""Every program with senseless arguments and damaged files: one clear line, never a traceback.

A sample of some thousand cases runs, a larger one among the long proofs; ``MEGAEGPT_FUZZ_ALL=1``
makes that one all of them (an hour).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import uvicorn

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.bpe_training import train_byte_level_bpe
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.data.tokens.corpus_manifest import Manifest, describe_tokenizer
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.interop.export import export_weights
from megaegpt.interop.gguf_export import export_gguf
from megaegpt.interop.peft import export_peft
from megaegpt.interop.vocabulary_files import copy_tokenizer
from megaegpt.model.adapter_files import Base, save_adapter
from megaegpt.model.adapters import add_adapters, initialize_adapters
from megaegpt.model.build import build_model
from megaegpt.model.weights import read_weights_config, save_weights, tensors_digest
from megaegpt.parallel.grid import ProcessGrid
from tests.report.test_runs import RECORDS, make_run

ROOT = Path(__file__).parents[2]
CASES, LONG_CASES = 60, 700
HANGING_S = 300.0
"""Far more than any program takes here on the busiest machine."""

OUTPUTS = {"output", "plot", "json"}
WAITING = {*OUTPUTS, "prompt_file"}
"""Options for which a pipe is waited with, as any program does: for its reader, or its writer."""

SUBCOMMANDS = {"tools.convert", "tools.inspect_shards", "tools.prepare_data"}

COMMANDS: list[tuple[str, list[str]]] = [
    ("tools.report", ["run", "--output", "page.html"]),
    ("tools.compare_runs", ["run"]),
    ("tools.plan", ["--config", "run.yaml", "--gpu", "h100", "--gpus", "2", "--roofline"]),
    ("tools.convert", ["list", "weights", "--verify"]),
    ("tools.convert", ["export", "weights", "exported"]),
    ("tools.convert", ["import", "foreign", "imported"]),
    ("tools.inspect_shards", ["show", "shards/train"]),
    ("tools.inspect_shards", ["verify", "shards/train"]),
    ("tools.preprocess", ["docs.jsonl", "--output", "made", "--quiet", "--workers", "1"]),
    ("tools.prepare_data", ["text", "--input", "text.txt", "--output", "made"]),
    ("tools.precompute_features", ["--config", "egpt.yaml"]),
    ("tools.generate", ["--checkpoint", "weights", "--prompt", "a", "--max-new-tokens", "2"]),
    ("tools.chat", ["--checkpoint", "weights", "--max-new-tokens", "2"]),
    ("tools.evaluate", ["--checkpoint", "weights", "--text", "text.txt"]),
    ("tools.train_tokenizer", ["docs.jsonl", "--vocab-size", "262", "--output", "made", "--quiet"]),
    (
        "tools.preprocess",
        ["docs.jsonl", "--output", "made", "--workers", "1", "--vocabulary", "llama"],
    ),
    ("tools.convert", ["import", "llama.gguf", "imported"]),
    ("tools.convert", ["export", "llama", "exported.gguf"]),
    ("tools.generate", ["--checkpoint", "llama", "--prompt", "a", "--max-new-tokens", "2"]),
    ("tools.evaluate", ["--checkpoint", "llama.gguf", "--text", "text.txt"]),
    ("tools.convert", ["merge", "adapter", "merged"]),
    ("tools.convert", ["export", "adapter", "exported"]),
    ("tools.convert", ["import", "peft", "imported", "--base", "llama"]),
    ("tools.generate", ["--checkpoint", "adapter", "--prompt", "a", "--max-new-tokens", "2"]),
    ("tools.evaluate", ["--checkpoint", "weights", "--lambada", "words.jsonl"]),
    ("tools.serve", ["--checkpoint", "llama", "--chat-template", "chat.jinja", "--port", "0"]),
    ("launchers.pretrain", ["--config", "run.yaml", "--dry-run"]),
    ("launchers.finetune", ["--config", "finetune.yaml", "--dry-run"]),
    ("launchers.experiment", ["--config", "study.yaml", "--report-only", "--output", "none"]),
]
"""Programs with arguments that are right, in the folder of :func:`workspace`."""

FILES = [
    "run/config.yaml",
    "run/metrics.jsonl",
    "run.yaml",
    "egpt.yaml",
    "finetune.yaml",
    "study.yaml",
    "weights/config.json",
    "weights/model.safetensors",
    "foreign/config.json",
    "shards/manifest.json",
    "shards/train.idx",
    "shards/train.bin",
    "docs.jsonl",
    "text.txt",
    "llama.gguf",
    "llama/tokenizer.json",
    "llama/tokenizer_config.json",
    "llama/config.json",
    "adapter/config.json",
    "adapter/adapter.safetensors",
    "peft/adapter_config.json",
    "peft/adapter_model.safetensors",
    "words.jsonl",
    "tasks.json",
    "chat.jinja",
]

TEXTS = {"docs.jsonl", "text.txt", "words.jsonl", "tasks.json"}
"""Files of which any size is right."""

VALUES = [
    *("", " ", "-1", "0", "1.5", "x", "nan", "inf", "1e999", str(2**31), str(2**63), str(2**64)),
    *("9" * 5000, "٣", "naïve 🙂", "\udcff", "a\nb", "~", "$HOME", "{", "[", "=", "a=b", "a.b=c"),
    *("--", "none/none", "x" * 300, "run.yaml/x", ".", "run", "run.yaml", "loop", "pipe"),
    *("/dev/full", "/dev/null", "/proc/none", "/proc/self/mem", "none.foo"),
]

CONTENTS = [
    *(
        b"",
        b"\n",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{}",
        b'{"step": null}\n',
        b"[{}]",
        b"\xff\xfe",
    ),
    *(b"[" * 100_000, b"{a: " * 5000, b"9" * 5000, b"\0" * 100, b"\xff" * 300, b"a: 2001-99-99\n"),
    *('{"näme": "ä"}\n'.encode("latin-1"), b'{"a": "\\u0000"}\n'),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    b'{"step": 1, "loss": NaN}\n{"step": 99999999999999999999999999, "loss": 1}\n',
    b'{"format": 1, "splits": null, "counts": 3, "plan": "\\u0000", "tokenizer": []}',
    b'{"format": "megaegpt-weights", "version": 1, "model": {"num_layers": 1e9}, "extra": 3}',
    b'{"model_type": "gpt2", "vocab_size": null, "n_embd": -1, "n_layer": 1e300, "n_head": "x"}',
    b"model: {num_layers: 99999999999999999999}\ntraining: [1]\ndata: null\ncorpora: {a: 3}\n",
    b"variants: {a: 3}\nbaseline: a\ncorpora: {a: {train: null}}\nseeds: .nan\n",
    b'{"peft_type": "LORA", "r": 0, "lora_alpha": null, "rank_pattern": [1]}',
    b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999, "alpha_pattern": {"(": 1}}',
]


KINDS = ["nothing", "folder", "pipe", "/dev/zero", "/dev/full", "loop", "/proc/self/mem", "huge"]
"""What may be in a file's place: a path is what a link of its name leads to."""


@dataclass(frozen=True)
class Case:
    """A command line, and what a file holds, or what is there, instead of what it should."""

    program: str
    arguments: tuple[str, ...]
    file: str | None = None
    content: bytes = b""
    kind: str = ""


def _options(program: str, arguments: list[str]) -> Iterator[tuple[str, ...]]:
    """Command lines with one senseless value each, for every option and positional there is."""
    seen: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.parse_known_args

    def noting(self: argparse.ArgumentParser, *rest: object) -> object:
        seen.append(self)
        return original(self, *rest)  # type: ignore[arg-type]

    words = arguments[:1] if not arguments[0].startswith("-") else []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", noting)
        patch.setattr(sys, "argv", [program, *words, "--help"])
        with contextlib.suppress(SystemExit):
            importlib.import_module(program).main()
    for value in VALUES:
        for action in seen[-1]._actions:
            waits = value == "pipe" and action.dest in WAITING
            if action.dest == "num_samples" and len(value) > 9:
                continue  # as many as are asked for, each shown as it comes
            if action.option_strings and action.nargs != 0 and not waits:
                yield (*arguments, f"{action.option_strings[-1]}={value}")
        for number, word in enumerate(arguments):
            before = arguments[number - 1] if number else ""
            waits = value == "pipe" and before.removeprefix("--") in WAITING
            subcommand = number == 0 and program in SUBCOMMANDS
            if not (word.startswith("--") or subcommand or waits):
                yield (*arguments[:number], value, *arguments[number + 1 :])


def _all_cases() -> list[Case]:
    cases = [
        Case(program, line)
        for program, arguments in COMMANDS
        for line in _options(program, arguments)
    ]
    for program, arguments in COMMANDS:
        for file in FILES:
            if any(word.split("/")[0] == file.split("/")[0] for word in arguments):
                cases += [Case(program, tuple(arguments), file, content) for content in CONTENTS]
                kinds = KINDS[:-1] if file in TEXTS else KINDS
                cases += [Case(program, tuple(arguments), file, kind=kind) for kind in kinds]
    return cases


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, shards, weights and texts, tiny and in order."""
    folder = tmp_path_factory.mktemp("workspace")
    make_run(folder / "run", RECORDS)
    (folder / "shards").mkdir()
    with ShardWriter(folder / "shards" / "train", np.uint16) as writer:
        writer.add_document(np.arange(1000))
        shard = writer.finish()
    manifest = Manifest(describe_tokenizer(Tokenizer.load()), {}, {}, {"train": [shard]})
    manifest.save(folder / "shards")
    for name, length in (("weights", 16), ("answers", 64)):  # a task with its answer is longer
        model = ModelConfig(max_seq_len=length, hidden_size=8, num_layers=1, num_heads=1)
        save_weights(build_model(model, ProcessGrid(), seed=1), folder / name, ProcessGrid())
    export_weights(folder / "weights", folder / "foreign")
    _write_configurations(folder)
    shutil.copy(ROOT / "configs" / "experiments" / "smoke.yaml", folder / "study.yaml")
    _make_llama(folder)
    _make_adapters(folder)
    (folder / "docs.jsonl").write_text('{"text": "one, one, one"}\n{"text": "two"}\n')
    (folder / "text.txt").write_text("A text of some words. " * 20)
    (folder / "words.jsonl").write_text('{"text": "a text of words"}\n' * 3)
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


def _write_configurations(folder: Path) -> None:
    """Of a GPT, an EGPT with a memory of tokens and a fine-tuning run, in the order of COMMANDS."""
    model = "max_seq_len: 16, hidden_size: 8, num_layers: 1, num_heads: 1"
    rest = (
        "logging: {tensorboard: false}\noptimizer: {warmup_steps: 0}\n"
        "training: {steps: 2, global_batch_size: 2, micro_batch_size: 1"
    )
    shards = f"data: {{train: [shards/train]}}\n{rest}}}\n"
    (folder / "run.yaml").write_text(f"model: {{{model}}}\n{shards}")
    egpt = "egpt: {num_chunks: 3, chunk_size: 8, token_memory: true, memory_dim: 4}"
    (folder / "egpt.yaml").write_text(
        f"model: {{{model}, kind: egpt, encoder: {{source: weights}}, {egpt}}}\n"
        f"{shards.replace('train]}', 'train], features: made}')}"
    )
    (folder / "finetune.yaml").write_text(
        f"data: {{instructions: {{train: tasks.json}}}}\n{rest}, initialize_from: answers}}\n"
    )
    task = {"instruction": "Name a colour.", "input": "", "output": "Red."}
    (folder / "tasks.json").write_text(json.dumps([task, task]))


def _make_llama(folder: Path) -> None:
    """A model of a published family with a tokenizer of its own, as a folder and in a GGUF file."""
    tokenizer = HuggingFaceTokenizer(train_byte_level_bpe(["a text, a text"], "tiny", 260))
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        max_seq_len=16,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        positions="rotary",
        norm="rms_norm",
        mlp="swiglu",
        bias=False,
    )
    save_weights(build_model(model, ProcessGrid(), seed=1), folder / "llama", ProcessGrid())
    save_tokenizer(tokenizer, folder / "llama")
    export_gguf(folder / "llama", folder / "llama.gguf")


def _make_adapters(folder: Path) -> None:
    """Of the model of :func:`_make_llama`, in our form and in PEFT's."""
    config, _ = read_weights_config(folder / "llama")
    model, lora = build_model(config, ProcessGrid(), seed=1), LoRAConfig(rank=2)
    add_adapters(model, lora)
    initialize_adapters(model, 1, ProcessGrid())
    base = Base("llama", tensors_digest(folder / "llama"))
    save_adapter(model, folder / "adapter", ProcessGrid(), lora, base)
    copy_tokenizer(folder / "llama", folder / "adapter")
    export_peft(folder / "adapter", folder / "peft")


class _HangError(BaseException):
    """A program that does not end."""


def _hang(*_: object) -> None:
    raise _HangError


@dataclass(frozen=True)
class Ending:
    """How a program ended."""

    refused: bool = False
    """With one clear line, rather than well."""
    problem: str = ""
    """What is wrong with how it ended, such as its traceback."""


def run(case: Case, folder: Path) -> Ending:
    """Run a program in this process, in ``folder``."""
    errors = io.StringIO()
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, HANGING_S)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [case.program, *case.arguments])
            patch.setenv("MEGAEGPT_CACHE", str(folder / ".cache"))
            patch.setattr(sys, "stdin", io.StringIO(""))
            patch.setattr(uvicorn.Server, "run", lambda *_, **__: None)  # all but the serving
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                importlib.import_module(case.program).main()
    except SystemExit as ended:
        shown = errors.getvalue()
        if ended.code not in (0, 2, None):
            return Ending(problem=f"exit code {ended.code}: {shown}")
        if ended.code and "error: " not in shown:
            return Ending(problem=f"no message: {shown!r}")
        return Ending(refused=bool(ended.code))
    except _HangError:
        return Ending(problem=f"it hangs: {traceback.format_exc()[-1500:]}")
    except BaseException:
        return Ending(problem=traceback.format_exc()[-1500:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if dist.is_initialized():
            dist.destroy_process_group()
    return Ending()


@contextlib.contextmanager
def kept(folder: Path, case: Case) -> Iterator[None]:
    """The folder is afterwards what it was before."""
    names = {path.name for path in folder.iterdir()}
    whole = {path: path.read_bytes() for path in map(folder.joinpath, FILES)}
    if case.file is not None:
        _put(folder / case.file, case)
    try:
        yield
    finally:
        for path in folder.iterdir():
            if path.name not in names:
                _remove(path)
        for path, content in whole.items():
            regular = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30
            if not regular or path.read_bytes() != content:
                _remove(path)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)


def _put(path: Path, case: Case) -> None:
    """Replace a file by what the case has in its place."""
    if not case.kind:
        path.write_bytes(case.content)
        return
    path.unlink()
    if case.kind == "folder":
        path.mkdir()
    elif case.kind == "pipe":
        os.mkfifo(path)
    elif case.kind == "huge":
        with path.open("wb") as file:
            file.truncate(8 << 30)  # takes no space on the disk
    elif case.kind != "nothing":
        path.symlink_to(path.name if case.kind == "loop" else case.kind)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.long
def test_every_program_ends_well_where_nothing_is_wrong(workspace: Path) -> None:
    """So that what refuses it elsewhere is the case, and not its command line."""
    for program, arguments in COMMANDS:
        case = Case(program, tuple(arguments))
        with kept(workspace, case):
            ending = run(case, workspace)
        # without results an experiment has nothing to report
        assert ending == Ending(refused=program == "launchers.experiment"), case


def _check(cases: list[Case], workspace: Path) -> None:
    failures = []
    for case in cases:
        with kept(workspace, case):
            if problem := run(case, workspace).problem:
                failures.append(f"{case}\n{problem}")
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures)


def test_no_argument_and_no_file_makes_a_traceback(workspace: Path) -> None:
    _check(random.Random(0).sample(_all_cases(), CASES), workspace)


@pytest.mark.long
def test_no_argument_and_no_file_of_many_makes_a_traceback(workspace: Path) -> None:
    cases = _all_cases()
    if not os.environ.get("MEGAEGPT_FUZZ_ALL"):
        cases = random.Random(1).sample(cases, LONG_CASES)
    _check(cases, workspace)
