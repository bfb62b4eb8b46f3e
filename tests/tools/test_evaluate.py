"""The program: what it measures, prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaegpt.data.tokenizer import Tokenizer
from tests.generation.test_trained import EGPT, save_egpt, save_gpt
from tools import evaluate


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_egpt(folder / "egpt", save_gpt(folder / "gpt"))
    (folder / "text.txt").write_text("It was a dark and stormy night. " * 12)
    (folder / "lambada.jsonl").write_text(json.dumps({"text": "It was night"}) + "\n")
    return folder


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, model: str, *arguments: Any) -> Any:
    """The numbers that the program writes."""
    result = folder / "result.json"
    words = ["evaluate.py", "--checkpoint", folder / model, "--json", result, *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    evaluate.main()
    return json.loads(result.read_text())


def test_text_in_sliding_windows(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _run(monkeypatch, models, "gpt", "--text", models / "text.txt", "--stride", 4)
    shown = capsys.readouterr().out
    assert f"validation loss {values['loss']:.4f} nats/token" in shown
    assert f"{values['bits_per_byte']:.4f} bits/byte" in shown
    text = (models / "text.txt").read_text()
    assert values["tokens"] == len(Tokenizer.load().encode(text))


def test_histories_of_an_egpt(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _run(monkeypatch, models, "egpt", "--text", models / "text.txt", "--histories")
    assert list(values) == ["true", "shuffled", "zero"]
    assert values["true"]["loss_by_chunk"][1] != values["zero"]["loss_by_chunk"][1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["chunk", "true", "shuffled", "zero", "shuffled-true", "zero-true"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "all"]


def test_a_memory_of_the_whole_text_is_shown_by_the_place_in_a_window(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier chunks, of all windows before, there are more."""
    remembering = replace(EGPT.egpt, token_memory=True, memory_dim=4, local_attention=True)
    save_egpt(models / "memory", models / "gpt", like=replace(EGPT, egpt=remembering))
    text = ("--text", models / "text.txt")
    _run(monkeypatch, models, "memory", *text)
    assert "  after  1 earlier chunks: " in capsys.readouterr().out
    _run(monkeypatch, models, "memory", *text, "--memory-tokens", 1000)
    shown = capsys.readouterr().out
    assert "  behind  1 chunks of its window: " in shown
    assert "earlier chunks" not in shown


def test_a_task(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _run(monkeypatch, models, "egpt", "--lambada", models / "lambada.jsonl")
    assert values["examples"] == 1
    assert values["perplexity"] > 1
    assert "over 1 passages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (["--data", "absent"], "no shards at absent"),
        (["--lambada", "absent.jsonl"], "absent.jsonl: No such file"),
        (["--text", "text.txt", "--histories"], "not a gpt"),
        (["--text", "text.txt", "--stride", "99"], "--stride 99 does not fit the model"),
        (["--lambada", "lambada.jsonl", "--stride", "3"], "belong to --data or --text"),
        ([], "is required"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(SystemExit) as exit_:
        _run(monkeypatch, models, "gpt", *arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
