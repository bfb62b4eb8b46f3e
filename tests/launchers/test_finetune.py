"""``launchers/finetune.py`` as a user starts it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from megaegpt.config.presets import create_model_config
from megaegpt.errors import CheckpointError
from megaegpt.interop import hub, sources
from megaegpt.planning import memory
from megaegpt.planning.memory import MemoryEstimate
from tests.generation.test_trained import save_gpt

ROOT = Path(__file__).parents[2]


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    config = ROOT / "configs" / "finetune_instructions.yaml"
    program = str(ROOT / "launchers" / "finetune.py")
    monkeypatch.setattr(sys, "argv", [program, "--config", str(config), *arguments])
    runpy.run_path(program, run_name="__main__")


def test_a_dry_run_shows_the_weights_model_and_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_gpt(tmp_path / "gpt")
    word = {"instruction": "x", "output": "y"}
    (tmp_path / "records.jsonl").write_text("\n".join([json.dumps(word)] * 10))
    monkeypatch.chdir(tmp_path)
    arguments = ["training.initialize_from=gpt", "data.instructions.train=[records.jsonl]"]
    with pytest.raises(SystemExit) as exit_:
        _run(monkeypatch, "--dry-run", *arguments)
    assert exit_.value.code == 2
    assert (
        "no training record has a prompt and an answer within 16 tokens: "
        in capsys.readouterr().err
    )
    save_gpt(tmp_path / "gpt", max_seq_len=64)
    _run(monkeypatch, "--dry-run", *arguments)
    shown = capsys.readouterr().out
    assert "max_seq_len: 64" in shown
    assert "9 training records in 9 rows of 33 tokens on average" in shown
    assert "1 validation records" in shown
    assert "1,056 tokens = 32 samples of 33 on average" in shown
    assert "GiB a rank" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_needs_neither_weights_nor_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(*_: object, **__: object) -> Path:
        raise CheckpointError("it is not here")

    for module in (hub, sources):
        monkeypatch.setattr(module, "find_model", nowhere)
    _run(monkeypatch, "--dry-run", "training.initialize_from=gpt2")
    shown = capsys.readouterr().out
    assert "124,475,904 trainable parameters" in shown
    assert "notice: the weights gpt2 are not on this machine yet" in shown
    assert sources.source_config("smollm2-135m") == create_model_config("smollm2-135m")


def test_ranks_and_frozen_layers_are_held_against_the_model_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not against the default one, which has 12 heads and 12 layers."""
    save_gpt(tmp_path / "gpt", num_layers=14, num_heads=8)
    monkeypatch.chdir(tmp_path)
    given = ["--dry-run", "training.initialize_from=gpt"]
    _run(monkeypatch, *given, "parallel.tensor_parallel_size=8", "training.freeze=[layers:0-12]")
    assert "GiB a rank" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        _run(
            monkeypatch, *given, "parallel.tensor_parallel_size=3", "training.freeze=[layers:0-14]"
        )
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "model.num_heads=8 is not divisible by parallel.tensor_parallel_size=3" in error
    assert "training.freeze: 'layers:0-14': the model has layers 0 to 13" in error


def test_a_dry_run_without_records_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_gpt(tmp_path / "gpt")
    monkeypatch.chdir(tmp_path)
    _run(monkeypatch, "--dry-run", "training.initialize_from=gpt")
    shown = capsys.readouterr().out
    assert "there are no records yet: data/instructions.jsonl" in shown
    assert "those of records of 16 tokens, the longest that the model takes" in shown


def test_a_dry_run_needs_the_memory_of_the_longest_record_and_not_of_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That shorter ones need less is tests/planning/test_memory.py's to show."""
    asked: list[int | None] = []

    def estimate(*arguments: Any) -> MemoryEstimate:
        asked.append(arguments[-1])
        return MemoryEstimate()

    monkeypatch.setattr(memory, "estimate_memory", estimate)
    save_gpt(tmp_path / "gpt", max_seq_len=1024)
    monkeypatch.chdir(tmp_path)
    _run(monkeypatch, "--dry-run", "training.initialize_from=gpt")
    (tmp_path / "records.jsonl").write_text('{"instruction": "x", "output": "y"}\n' * 10)
    given = "data.instructions.train=[records.jsonl]"
    _run(monkeypatch, "--dry-run", "training.initialize_from=gpt", given)
    assert asked[0] is None
    assert asked[1] in (32, 128)  # a GPU's rows are multiples of 128
    assert "1,056 tokens = 32 samples of 33 on average" in capsys.readouterr().out
