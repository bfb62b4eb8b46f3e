"""A tokenizer learned from documents: transformers loads it, and it is the same every time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megaegpt.data.tokenizers.bpe_training import train_byte_level_bpe
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer
from megaegpt.errors import ConfigError, DataError

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
WORDS = "the quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is quick\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_folder_is_loaded_by_transformers_and_by_us(tmp_path: Path) -> None:
    lines = [json.dumps({"content": WORDS}), json.dumps({"content": "half \ud800"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"content": 2 * WORDS}) + "\n")
    (tmp_path / "c.pdf").write_text("not read")
    options = ["--vocab-size", 300, "--text-key", "content", "--special-token", "<|user|>"]
    found = run(tmp_path, *options, "--on-bad-input", "skip", "--output", tmp_path / "out")
    assert "300 ids, 2 of them special" in found.stdout
    assert "runs on tiktoken" in found.stdout
    assert "half of a surrogate pair" in found.stdout
    assert re.search(r"left out .*c\.pdf", found.stdout)
    assert "merging" in found.stderr
    ours, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token == "<|endoftext|>"
    assert ours.encode(WORDS) == theirs.encode(WORDS)
    assert theirs.encode("<|user|>") == [ours.special_tokens["<|user|>"]] == [1]
    assert len(ours.encode(WORDS)) < len(WORDS) / 2
    again = run(tmp_path, *options, "--on-bad-input", "skip", "--output", tmp_path / "out")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "out exists already" in again.stderr


def test_what_a_format_leaves_out_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "fr_chunk1.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    (tmp_path / "c.pdf").write_text("not read")
    options = ("--format", "transwebedu", "--vocab-size", 300, "--quiet")
    found = run(tmp_path, *options, "--output", tmp_path / "out")
    assert "text        1 documents" in found.stdout
    assert re.findall(r"left out +(.*)", found.stdout) == [
        f"1 not read, names of no known kind of text: {tmp_path}/c.pdf"
    ]


def test_options_that_change_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    options = ("--vocab-size", 300, "--output", tmp_path / "out", "--text-key", "content")
    found = run(tmp_path / "a.txt", *options)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "--text-key content is for JSON Lines and tables" in found.stderr
    assert not (tmp_path / "out").exists()


def test_the_same_texts_give_the_same_tokenizer() -> None:
    texts = [WORDS, WORDS[::-1], "a b a b c d c d"]
    first, second = (train_byte_level_bpe(texts, "x", 290).content for _ in range(2))
    assert first == second


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="a vocabulary of 257 has no room for the 256 bytes and 2"
    ):
        train_byte_level_bpe([WORDS], "x", 257, ["<|user|>"])
    with pytest.raises(ConfigError, match=r"no room .* for what is learned: give 259 at least"):
        train_byte_level_bpe([WORDS], "x", 258, ["<|user|>"])
    assert len(train_byte_level_bpe([WORDS], "x", 258).content["model"]["merges"]) == 1
    with pytest.raises(ConfigError, match="special tokens must differ"):
        train_byte_level_bpe([WORDS], "x", 300, ["<|endoftext|>"])
    for word in ("the", "q", "Ġthe"):
        with pytest.raises(ConfigError, match=f"'{word}' is also a word of the texts"):
            train_byte_level_bpe([10 * WORDS], "x", 330, [word])
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        train_byte_level_bpe([WORDS], "x", 300, ["\udcff"])
    with pytest.raises(DataError, match="nothing to learn from"):
        train_byte_level_bpe(["a b"], "x", 300)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    found = run(tmp_path / "bad.jsonl", "--vocab-size", 300, "--output", tmp_path / "out")
    assert found.returncode == 2
    assert not (tmp_path / "out").exists()
