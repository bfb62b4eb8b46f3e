"""The program: what it prints where, how it is told, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from megaegpt.data.instruction.records import Instruction
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer
from megaegpt.model.build import build_model
from megaegpt.model.weights import read_weights_config, save_weights
from megaegpt.parallel import compiling
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed
from tests.generation.test_trained import save_egpt, save_gpt
from tools import generate

COMMON = ["--max-new-tokens", "12", "--top-k", "0"]


@pytest.fixture(scope="module")
def egpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return save_egpt(folder / "egpt", save_gpt(folder / "encoder"))


def _run(*arguments: object, stdin: bytes = b"") -> tuple[str, str]:
    """stdout and stderr of the program in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv = ["generate.py", *map(str, arguments), *COMMON]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            generate.main()
    finally:
        sys.argv, sys.stdin = before
    return out.getvalue(), err.getvalue()


def test_the_prompt_and_its_continuation_go_to_stdout_and_the_speed_to_stderr(egpt: Path) -> None:
    out, err = _run("--checkpoint", egpt, "--prompt", "Well, Prince,")
    assert out.startswith("Well, Prince,")
    assert len(out) > len("Well, Prince,\n")
    assert out.endswith("\n")
    assert re.fullmatch(r"prompt: 4 tokens in [\d.]+ s; then [\d.]+ tokens/s; 12 new tokens\n", err)
    assert _run("--checkpoint", egpt, "--prompt", "Well, Prince,", "--only-new")[0] == out[13:]


def test_the_cache_does_not_change_the_text(egpt: Path) -> None:
    with_cache, _ = _run("--checkpoint", egpt, "--prompt", "It")
    without, _ = _run("--checkpoint", egpt, "--prompt", "It", "--no-cache")
    assert with_cache == without


def test_where_nothing_can_be_compiled_the_text_is_written_all_the_same(
    egpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = _run("--checkpoint", egpt, "--prompt", "It")
    monkeypatch.setattr(compiling, "compile_problem", lambda device: "no compiler")
    text, shown = _run("--checkpoint", egpt, "--prompt", "It", "--compile")
    assert text == expected
    assert "not compiled: no compiler\n" in shown
    _, shown = _run("--checkpoint", egpt, "--prompt", "It", "--compile", "--num-samples", 5)
    assert "not compiled: on a CPU more than 4 texts at once" in shown


def test_compiled_steps_write_the_same_and_the_wait_for_them_is_shown(
    egpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = _run("--checkpoint", egpt, "--prompt", "It")
    monkeypatch.setattr(compiling, "compile_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    text, shown = _run("--checkpoint", egpt, "--prompt", "It", "--compile")
    assert text == expected
    assert re.search(r"\d tokens and compiling in [\d.]+ s; then [\d.]+ tokens/s; 12 new", shown)
    text, shown = _run("--checkpoint", egpt, "--prompt", "It", "--compile", "--no-cache")
    assert text == expected
    assert "not compiled: without the cache" in shown


def test_a_prompt_comes_from_the_command_line_a_file_or_stdin(egpt: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("Пьер\n".encode())
    expected, _ = _run("--checkpoint", egpt, "--prompt", "Пьер")
    assert _run("--checkpoint", egpt, "--prompt-file", file)[0] == expected
    stdin = "Пьер\r\n".encode()
    assert _run("--checkpoint", egpt, "--prompt-file", "-", stdin=stdin)[0] == expected


def test_an_instruction_is_put_into_its_format_and_only_answered(egpt: Path) -> None:
    task = ["--instruction", "Spell it.", "--input", "freind"]
    answer, _ = _run("--checkpoint", egpt, *task)
    prompt = Instruction("Spell it.", "freind", "").prompt
    assert answer == _run("--checkpoint", egpt, "--prompt", prompt, "--only-new")[0]


def test_an_answer_ends_before_what_its_template_writes_behind_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a tokenizer that knows no ``<|im_end|>`` it is several tokens."""
    tokenizer = load_tokenizer()
    rows = [tokenizer.encode(text) for text in ("Yes.<|im_end|>\nMore", "No, never.<|im_end|> x")]
    writer = generate.SampleWriter(tokenizer, 2, 0, True, False, ("<|im_end|>",))
    writer.begin("", 0, 2)
    stopped = []
    for step in zip(*(row[: min(map(len, rows))] for row in rows), strict=True):
        writer.add([*step])
        stopped.append(writer.all_ended)
    writer.end()
    shown = capsys.readouterr().out
    assert shown == "=== sample 1, seed 0 ===\nYes.\n=== sample 2, seed 1 ===\nNo, never.\n"
    assert not stopped[0]
    assert stopped[-1]


def test_samples_that_have_ended_in_different_ways_have_all_ended() -> None:
    tokenizer = load_tokenizer()
    (end,) = tokenizer.encode("###")
    writer = generate.SampleWriter(tokenizer, 4, 0, False, False, ("###",))
    for first in (0, 2):
        writer.begin("", first, 2)
        ended = []
        steps: list[list[int | None]] = [[end, end + 1], [end + 1, None]]
        for step in steps:
            writer.add(step)
            ended.append(writer.all_ended)
        assert ended == [False, True]


def test_samples_are_numbered_by_the_seed_that_makes_them(egpt: Path) -> None:
    out, err = _run("--checkpoint", egpt, "--prompt", "It", "--num-samples", 3, "--seed", 5)
    _, *parts = re.split(r"=== sample \d, seed (\d) ===\n", out)
    assert parts[::2] == ["5", "6", "7"]
    assert len(set(parts[1::2])) == 3
    assert "36 new tokens" in err
    assert _run("--checkpoint", egpt, "--prompt", "It", "--seed", 7)[0] == parts[5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "generation.temperature=-1.0 must not be negative"),
        (["--temperature", "nan"], "generation.temperature=nan"),
        (["--temperature", "inf"], "generation.temperature=inf"),
        (["--top-k", "-1"], "generation.top_k=-1 must be"),
        (["--top-p", "0"], "generation.top_p=0.0 must be"),
        (["--top-p", "1.5", "--seed", "-2"], r"generation.top_p=1.5 .*"),
        (["--seed", str(2**64)], f"seed={2**64}|seed {2**64}"),
        (["--seed", str(2**63)], f"generation.seed={2**63} must be at most"),
        (["--prompt-file", "absent.txt"], "cannot read absent.txt: No such file"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    egpt: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(egpt), *arguments])
    with pytest.raises(SystemExit) as exit_:
        generate.main()
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_prompt_without_end_is_refused(
    egpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt"
    with file.open("wb") as sparse:
        sparse.truncate(8 << 30)
    with pytest.raises(SystemExit):
        _run_visibly(egpt, "--prompt-file", str(file))
    assert f"{file}: longer than 268,435,456 bytes, too long for" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused(
    egpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"abc\xff")
    with pytest.raises(SystemExit):
        _run_visibly(egpt, "--prompt-file", str(file))
    assert f"{file} is not UTF-8: invalid start byte at 3" in capsys.readouterr().err


def _run_visibly(checkpoint: Path, *arguments: str) -> None:
    before = sys.argv
    sys.argv = ["generate.py", "--checkpoint", str(checkpoint), *arguments]
    try:
        generate.main()
    finally:
        sys.argv = before


def _run_on_ranks(checkpoint: str) -> tuple[str, str]:
    return _run("--checkpoint", checkpoint, "--prompt", "It")


def test_under_torchrun_rank_0_alone_prints_the_same_text(
    egpt: Path, distributed: Distributed
) -> None:
    alone, _ = _run("--checkpoint", egpt, "--prompt", "It")
    first, second = distributed(2, _run_on_ranks, str(egpt))
    assert first[0] == alone
    assert "12 new tokens" in first[1]
    assert second == ("", "")


def test_samples_beyond_one_batch_are_those_of_their_seeds(
    egpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = _run("--checkpoint", egpt, "--prompt", "It", "--num-samples", 3, "--seed", 5)
    monkeypatch.setattr(generate, "SAMPLES_AT_ONCE", 2)
    batches, err = _run("--checkpoint", egpt, "--prompt", "It", "--num-samples", 3, "--seed", 5)
    assert batches == together
    assert "36 new tokens" in err


def test_any_number_of_samples_is_begun_at_once(
    egpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written batch by batch; the second one is where this test stops."""
    begin, begun = generate.SampleWriter.begin, []

    def stop_at_the_second(self: object, prompt: str, first: int, count: int) -> None:
        begun.append((first, count))
        if len(begun) == 2:
            raise KeyboardInterrupt
        begin(self, prompt, first, count)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "SAMPLES_AT_ONCE", 2)
    monkeypatch.setattr(generate.SampleWriter, "begin", stop_at_the_second)
    with pytest.raises(SystemExit):
        _run("--checkpoint", egpt, "--num-samples", 99999999999)
    assert begun == [(0, 2), (2, 2)]


def test_line_ends_of_a_prompt_file_become_lf(egpt: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfOne\r\ntwo\r\n")
    out, _ = _run("--checkpoint", egpt, "--prompt-file", file)
    assert out.startswith("One\ntwo")
    assert out == _run("--checkpoint", egpt, "--prompt", "One\ntwo")[0]


def test_of_a_prompt_beyond_the_context_it_is_said_what_is_seen(tmp_path: Path) -> None:
    gpt = save_gpt(tmp_path / "gpt")  # its context has 16 tokens
    _, err = _run("--checkpoint", gpt, "--prompt", "one " * 20)
    assert re.search(
        r"the prompt has 2\d tokens: the model sees the last 1\d, its context is 16", err
    )


def test_weights_that_are_no_numbers_are_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = read_weights_config(save_gpt(tmp_path / "gpt"))
    model = build_model(config, ProcessGrid())
    model.embedding.weight.data[3, :2] = float("nan")
    save_weights(model, tmp_path / "diverged", ProcessGrid())
    with pytest.raises(SystemExit) as exit_:
        _run_visibly(tmp_path / "diverged", "--max-new-tokens", "1")
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert "model.safetensors: 2 of the " in shown
    assert "weights of embedding.weight are infinite or no number" in shown
