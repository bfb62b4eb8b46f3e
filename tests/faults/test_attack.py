"""An attack with figures: kills, damaged and malicious files, full disks, missing rights, too few
descriptors, two processes at one output.

Whatever is done to it, a program ends well or with one clear line, and no file that was complete
is lost. ``pytest -m long -s tests/faults/test_attack.py`` shows the table. No bound is on time, but
for a program that hangs.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zstandard

from megaegpt.config.loading import config_to_dict
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.launcher_variables import without_launcher
from megaegpt.training.checkpoint.manager import CheckpointManager
from tests.damage import damaged
from tests.distributed.harness import CONTEXT
from tests.faults.test_programs import COMMANDS, FILES, Case, kept, run, workspace
from tests.faults.test_random_kills import KilledRun
from tests.tiny.runs import corpus, encoder_config, run_config

__all__ = ["corpus", "workspace"]

pytestmark = pytest.mark.long

HANGING_S = 300


@dataclass
class Row:
    """One line of the table."""

    attack: str
    attempts: int = 0
    survived: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def count(self, what: object, refused: bool, problem: str) -> None:
        """One attempt more, and how it ended."""
        self.attempts += 1
        self.survived += not (refused or problem)
        self.refused += refused
        self.tracebacks += [f"{what}: {problem}"] if problem else []


class Table:
    """What was tried and what became of it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, attack: str) -> Row:
        """A new line, empty."""
        self.rows.append(Row(attack))
        return self.rows[-1]

    def __str__(self) -> str:
        names = ("attempts", "survived", "refused", "tracebacks", "lost files")
        lines = [f"{'attack':34}" + "".join(f"{name:>12}" for name in names)]
        total = [0] * len(names)
        for row in self.rows:
            counts = [row.attempts, row.survived, row.refused, len(row.tracebacks), len(row.lost)]
            total = [a + b for a, b in zip(total, counts, strict=True)]
            lines.append(f"{row.attack:34}" + "".join(f"{count:12}" for count in counts))
        return "\n".join([*lines, f"{'all':34}" + "".join(f"{count:12}" for count in total)])


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Shown when all attacks are over."""
    table = Table()
    yield table
    print(f"\n{table}")


def _check(row: Row) -> None:
    assert row.attempts
    assert not row.tracebacks, "\n".join(row.tracebacks)
    assert not row.lost, "\n".join(row.lost)


# -- programs in processes of their own ------------------------------------------------------------


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _become_nobody() -> None:
    """Another user without an entry, who may read everything (as the interpreter below /root needs)
    and write nowhere that is not theirs."""
    reading = 1 << 2  # CAP_DAC_READ_SEARCH
    libc = ctypes.CDLL(None)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)(reading, reading, 0, 0, 0, 0))
    for name in ("HOME", "USER", "LOGNAME"):
        os.environ.pop(name, None)


_BEFORE: dict[str, Callable[[int], None]] = {
    "": lambda value: None,
    "file size": lambda value: _limit(resource.RLIMIT_FSIZE, value),
    "descriptors": lambda value: _limit(resource.RLIMIT_NOFILE, value),
    "nobody": lambda value: _become_nobody(),
}


def _program(line: list[str], shown: Path, before: str, value: int, folder: Path) -> None:
    descriptor = os.open(shown, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    torch.set_num_threads(1)
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        del os.environ[name]
    sys.argv = line
    program = importlib.import_module(line[0])
    _BEFORE[before](value)
    program.main()


class Program:
    """``line[0]``'s ``main`` with arguments, in a forked process with a limit on what it may."""

    def __init__(self, line: list[str], folder: Path, before: str = "", value: int = 0) -> None:
        self.line, self.value = line, value
        self.output = folder / f"shown-{time.monotonic_ns()}.txt"
        self.output.write_bytes(b"")
        arguments = (line, self.output, before, value, folder)
        self.process = CONTEXT.Process(target=_program, args=arguments, daemon=False)
        self.process.start()

    def ended(self, row: Row) -> int | None:
        """Wait for its end, count it, and give its exit code."""
        self.process.join(HANGING_S)
        code, text = self.process.exitcode, self.output.read_text(errors="replace")
        print(f"{' '.join(self.line)} ({self.value}): {code}: {text[-200:]}")
        self.output.unlink()
        what = f"{' '.join(self.line)} ({self.value})"
        if code is None:
            self.process.kill()
            row.count(what, False, "it hangs")
        elif code == -signal.SIGKILL:
            row.count(what, False, "")
        elif (
            code not in (0, 2)
            or "Traceback" in text
            or (code and len(re.findall("^(?:.*py: )?error: ", text, re.MULTILINE)) != 1)
        ):
            row.count(what, False, f"exit code {code}: {text[-1500:]}")
        else:
            row.count(what, code == 2, "")
        return code


def _complete(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files, but for what is temporary by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and not re.search(r"(^|/)\.|\.tmp$|shown-", str(path.relative_to(folder)))
    }


def _note_lost(row: Row, before: dict[str, str], after: dict[str, str]) -> None:
    row.lost += [name for name, digest in before.items() if after.get(name) != digest]


# -- kills -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that takes a moment to preprocess."""
    folder = tmp_path_factory.mktemp("texts")
    dice = random.Random(0)
    for number in range(4):
        lines = (
            json.dumps({"text": " ".join(str(dice.random()) for _ in range(60))})
            for _ in range(400)
        )
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _killed(row: Row, line: list[str], output: Path, kills: int, dice: random.Random) -> None:
    """Kill a program at random moments, go on to its end, and compare with an undisturbed run."""
    place = line.index(str(output))
    straight = [*line[:place], f"{output}-straight", *line[place + 1 :]]
    began = time.monotonic()
    assert Program(straight, output.parent).ended(row) == 0
    duration = time.monotonic() - began
    for _ in range(kills):
        before = _complete(output) if output.exists() else {}
        program = Program(line, output.parent)
        time.sleep(dice.uniform(0, duration))
        program.process.kill()
        program.ended(row)
        if output.exists():
            _note_lost(row, before, _complete(output))
    assert Program(line, output.parent).ended(row) == 0
    _note_lost(row, _complete(Path(f"{output}-straight")), _complete(output))


def test_preprocessing_survives_kills_at_random_moments(
    table: Table, texts: Path, tmp_path: Path
) -> None:
    row = table.row("kills of preprocessing")
    line = ["tools.preprocess", str(texts), "--output", str(tmp_path / "shards")]
    line += ["--shards", "4", "--workers", "1", "--quiet"]
    _killed(row, line, tmp_path / "shards", 12, random.Random(1))
    _check(row)


def _write_run(folder: Path, kind: str, corpus: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    config = config_to_dict(run_config(kind, corpus, folder / "run", **changes))
    path.write_text(yaml.safe_dump(config))
    return path


def test_writing_features_survives_kills_at_random_moments(
    table: Table, corpus: Path, tmp_path: Path
) -> None:
    row = table.row("kills of feature writing")
    run = _write_run(tmp_path, "egpt", corpus)
    store = tmp_path / "store"
    line = ["tools.precompute_features", "--config", str(run)]
    line = [*line, f"data.features={store}"]
    began = time.monotonic()
    straight = [*line[:3], f"data.features={store}-straight"]
    assert Program(straight, tmp_path).ended(row) == 0
    duration, dice = time.monotonic() - began, random.Random(2)
    for _ in range(10):
        before = _complete(store) if store.exists() else {}
        program = Program(line, tmp_path)
        time.sleep(dice.uniform(0, duration))
        program.process.kill()
        program.ended(row)
        _note_lost(row, before, _complete(store) if store.exists() else {})
    assert Program(line, tmp_path).ended(row) == 0
    _note_lost(row, _complete(Path(f"{store}-straight")), _complete(store))
    _check(row)


def test_saving_survives_kills_at_random_moments(
    table: Table, corpus: Path, tmp_path: Path
) -> None:
    row = table.row("kills of training and saving")
    run = KilledRun(corpus, tmp_path / "killed", random.Random(3))
    for _ in range(6):
        before = run.saved()
        run.live(kill=True)
        row.count("training", False, "")
        if run.saved() < before:
            row.lost.append(f"step {before}")
    _check(row)


# -- files -----------------------------------------------------------------------------------------


def test_damaged_files_of_every_format_are_survived_or_refused(
    table: Table, workspace: Path
) -> None:
    dice = random.Random(4)
    for file in FILES:
        row = table.row(f"damaged {file}")
        commands = [c for c in COMMANDS if any(w.split("/")[0] == file.split("/")[0] for w in c[1])]
        if not commands:  # a file that only a configuration names
            commands = [c for c in COMMANDS if c[0].startswith("launchers.")]
        whole = (workspace / file).read_bytes()
        for _ in range(12):
            program, arguments = dice.choice(commands)
            case = Case(program, tuple(arguments), file, damaged(whole, dice))
            with kept(workspace, case):
                ending = run(case, workspace)
            row.count(case, ending.refused, ending.problem)
        _check(row)


class _Ran:
    """What must never be run by reading a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {_Ran.place}",)

    place = Path()


def _zipped(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return packed.getvalue()


def _malicious(ran: Path) -> Iterator[tuple[list[str], dict[str, bytes]]]:
    """A command line, and the files that it meets."""
    _Ran.place = ran
    model = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 8, "n_embd": 8, "n_layer": 1}
    config = json.dumps(model | {"n_head": 1}).encode()
    imported = ["tools.convert", "import", "evil", "made"]
    headers = [
        (2**63).to_bytes(8, "little"),
        (2**40).to_bytes(8, "little") + b"{}",
        (99).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [1e99], "data_offsets": 3}}',
        (64).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999999]}}',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ]
    for header in headers:
        yield imported, {"evil/config.json": config, "evil/model.safetensors": header}
    for pickled in (
        pickle.dumps(_Ran()),
        _zipped("archive/data.pkl", pickle.dumps(_Ran())),
        _zipped("archive/data/0", b"\0" * (1 << 26)),
    ):
        yield imported, {"evil/config.json": config, "evil/pytorch_model.bin": pickled}
    for place in ("../weights/model.safetensors", "/dev/zero", "/etc/passwd", "..", "a\0b", ""):
        index = json.dumps({"weight_map": {"wte.weight": place}}).encode()
        yield imported, {"evil/config.json": config, "evil/model.safetensors.index.json": index}
    for name in ("/dev/zero", "../../../../../../../dev/zero", "../run.yaml", "\0"):
        summary = {"name": name, "documents": 1, "tokens": 1, "bin_sha256": "0", "idx_sha256": "0"}
        manifest = {"format": 1, "tokenizer": {}, "plan": {}, "counts": {}}
        content = json.dumps(manifest | {"splits": {"train": [summary]}}).encode()
        yield ["tools.inspect_shards", "verify", "shards/train"], {"shards/manifest.json": content}
    bomb = zstandard.compress(b"\0" * (1 << 28))
    lines = zstandard.compress(b'{"text": "' + b"a" * (1 << 28) + b'"}\n')
    for content in (bomb, lines):
        made = ["tools.preprocess", "evil/a.jsonl.zst", "--output", "made", "--workers", "1"]
        yield [*made, "--quiet"], {"evil/a.jsonl.zst": content}
    for suffix, content in (
        ("gz", b"\x1f\x8b" * 99),
        ("parquet", b"PAR1" + b"\xff" * 99 + b"PAR1"),
    ):
        made = ["tools.preprocess", f"evil/a.{suffix}", "--output", "made", "--quiet"]
        yield (
            [*made, *(["--format", "parquet"] if suffix == "parquet" else [])],
            {f"evil/a.{suffix}": content},
        )
    laughs = "a0: &a0 [x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
    )
    for text in (
        laughs,
        "a: &a [*a]",
        "!!python/object/apply:os.system [true]",
        "extends: run.yaml",
    ):
        yield (
            ["launchers.pretrain", "--config", "evil/run.yaml", "--dry-run"],
            {"evil/run.yaml": text.encode()},
        )


def test_malicious_files_are_refused_and_run_nothing(
    table: Table, workspace: Path, tmp_path: Path
) -> None:
    row = table.row("malicious files")
    for line, files in _malicious(tmp_path / "ran"):
        case = Case(line[0], tuple(line[1:]))
        with kept(workspace, case):
            for name, content in files.items():
                (workspace / name).parent.mkdir(exist_ok=True)
                (workspace / name).write_bytes(content)
            ending = run(case, workspace)
        row.count(
            (line, [content[:80] for content in files.values()]), ending.refused, ending.problem
        )
    assert not (tmp_path / "ran").exists(), "code in a file was run"
    assert row.refused == row.attempts, "a malicious file was accepted"
    _check(row)


# -- limits ----------------------------------------------------------------------------------------


def _writers(corpus: Path, texts: Path, folder: Path) -> list[list[str]]:
    """Programs that write, one for each kind of output, each below ``folder``."""
    speaking = corpus / "speaking"
    if not speaking.exists():  # with the tokenizer's vocabulary, which evaluation asks for
        grid = ProcessGrid()
        save_weights(build_model(encoder_config(vocab_size=50257), grid, seed=1), speaking, grid)
    run = _write_run(folder, "gpt", corpus, training={"steps": 6}, checkpoint={"keep": 3})
    return [
        ["tools.preprocess", str(texts), "--output", "shards", "--workers", "1", "--quiet"],
        ["tools.convert", "export", str(corpus / "encoder"), "exported"],
        [
            *("tools.evaluate", "--checkpoint", str(speaking)),
            *("--data", str(corpus / "validation"), "--json", "numbers.json"),
        ],
        ["launchers.pretrain", "--config", str(run), "--resume"],
    ]


def test_each_writer_ends_well_where_nothing_is_in_its_way(
    table: Table, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    """So that what refuses it below is the limit, and not its command line."""
    row = table.row("writers without a limit")
    for line in _writers(corpus, texts, tmp_path):
        assert Program(line, tmp_path).ended(row) == 0
    for name in ("shards", "exported", "numbers.json", "run"):
        assert (tmp_path / name).exists()
    _check(row)


def test_full_disks_lose_nothing_that_was_complete(
    table: Table, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    row = table.row("full disks (limits of file sizes)")
    for size in (5_000, 150_000):  # what the programs print is below it, and limited too
        folder = tmp_path / str(size)
        folder.mkdir()
        lines = _writers(corpus, texts, folder)
        three = [*lines[-1], "training.steps=5", "optimizer.warmup_steps=2"]
        assert Program(three, folder).ended(row) == 0
        before = _complete(folder / "run" / "checkpoints")
        for line in lines:
            Program(line, folder, "file size", size).ended(row)
        after = _complete(folder / "run" / "checkpoints")
        before.pop("latest", None)  # names the newest
        _note_lost(row, before, after)
        checkpoints = CheckpointManager(folder / "run" / "checkpoints", keep=3)
        if checkpoints.latest() is None:
            row.lost.append("latest")
    _check(row)


def test_a_full_file_system_loses_nothing_that_was_complete(
    table: Table, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    row = table.row("full disks (a small file system)")
    try:
        for line in _writers(corpus, texts, disk):
            before = _complete(disk)
            Program(line, disk).ended(row)
            _note_lost(row, {k: v for k, v in before.items() if "shown" not in k}, _complete(disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    _check(row)


def test_folders_that_may_not_be_written_are_named(
    table: Table, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    row = table.row("read-only folders, no user entry")
    before = "nobody" if os.getuid() == 0 else ""
    lines = _writers(corpus, texts, tmp_path)
    for folder in (tmp_path, *tmp_path.parents):  # pytest makes them for their owner alone
        if folder.owner() == tmp_path.owner() and len(folder.parts) > 2:
            folder.chmod(0o755)
    tmp_path.chmod(0o555)
    try:
        names = _complete(tmp_path)
        for line in lines:
            program = Program.__new__(Program)
            program.line, program.value = line, 0
            program.output = corpus / "shown.txt"
            program.output.write_bytes(b"")
            program.output.chmod(0o666)
            program.process = CONTEXT.Process(
                target=_program, args=(line, program.output, before, 0, tmp_path)
            )
            program.process.start()
            assert program.ended(row) == 2
        _note_lost(row, names, _complete(tmp_path))
    finally:
        tmp_path.chmod(0o755)
    _check(row)


def test_too_few_file_descriptors_are_one_line(
    table: Table, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    row = table.row("too few file descriptors")
    lines = _writers(corpus, texts, tmp_path)
    for limit in (9, 15, 24):
        for line in lines:
            Program(line, tmp_path, "descriptors", limit).ended(row)
    _check(row)


def test_two_processes_at_one_output_do_not_mix(
    table: Table, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    row = table.row("two processes at one output")
    line = ["tools.preprocess", str(texts), "--output", "alone", "--workers", "1", "--quiet"]
    assert Program(line, tmp_path).ended(row) == 0
    for number in range(3):
        line[3] = f"shared-{number}"
        codes = sorted(code for code in _both(line, tmp_path, row) if code is not None)
        assert codes[0] == 0
        _note_lost(row, _complete(tmp_path / "alone"), _complete(tmp_path / line[3]))
    run = _write_run(tmp_path, "gpt", corpus)
    assert 0 in _both(["launchers.pretrain", "--config", str(run)], tmp_path, row)
    if CheckpointManager(tmp_path / "run" / "checkpoints", keep=3).latest() is None:
        row.lost.append("latest")
    _check(row)


def _both(line: list[str], folder: Path, row: Row) -> list[int | None]:
    programs = [Program(line, folder) for _ in range(2)]
    return [program.ended(row) for program in programs]
