"""Any text: every byte counts, with the context that the stride gives."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokens.batch import Batch
from megaegpt.errors import ConfigError, DataError
from megaegpt.evaluation.text import TextTokens, evaluate_text, inputs_of
from megaegpt.generation.trained import LoadedModel
from megaegpt.model.calling import SequenceInputs
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.loaded import TOKENIZER, load, load_speaking, naive_score
from tests.tiny.tokenizers import changed, trained_definition

TEXT = "Пьер went home. " * 10


def test_a_texts_bytes_and_bits_are_those_of_a_loop(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace(". ", ".\r\n").encode())
    text = TEXT.replace(". ", ".\n")
    loaded, grid = load_speaking("gpt"), ProcessGrid()
    source = TextTokens([str(path)], TOKENIZER)
    tokens = [50256, *TOKENIZER.encode(text)]
    assert source.read(0, len(source)).tolist() == tokens
    result = evaluate_text(loaded, source, inputs_of(loaded, torch.float32), grid, 2, stride=20)
    total, window = 0.0, loaded.model.config.max_seq_len
    assert len(tokens) > window + 40
    for t in range(1, len(tokens)):
        start = -(-max(t - window, 0) // 20) * 20
        total -= naive_score(loaded, tokens[start:t], [tokens[t]])[0]
    assert result.tokens == len(tokens) - 1
    assert result.loss == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-5)


def test_texts_are_documents_and_bad_ones_are_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    source = TextTokens([str(tmp_path)], TOKENIZER)
    (a,), (b,) = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    assert source.read(0, 4).tolist() == [50256, a, 50256, b]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfa")
    with pytest.raises(DataError, match=r"c\.txt: not UTF-8"):
        TextTokens([str(tmp_path)], TOKENIZER)


def test_json_lines_are_their_texts_given_by_name_or_in_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b", "meta": {}}\n')
    (a,), (b,) = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    for given in (path, tmp_path):
        source = TextTokens([str(given)], TOKENIZER)
        assert source.read(0, len(source)).tolist() == [50256, a, 50256, b]
        assert source.left_out.lines() == []
    path.write_text('{"content": "a"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no text column 'text'"):
        TextTokens([str(path)], TOKENIZER)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"a\.jsonl: no document is in it"):
        TextTokens([str(path)], TOKENIZER)


def test_a_text_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(DataError, match=r"a\.txt: longer than 4,294,967,296 bytes, too long"):
        TextTokens([str(tmp_path / "a.txt")], TOKENIZER)


def test_a_stride_that_does_not_fit_is_refused() -> None:
    class Counting:
        def __len__(self) -> int:
            return 100

        def read(self, start: int, length: int) -> np.ndarray:
            return np.arange(start, start + length) % 90

    for kind, stride in (("gpt", 17), ("egpt", 4)):
        loaded = load(kind)
        inputs = inputs_of(loaded, torch.float32)
        with pytest.raises(ConfigError, match=f"--stride {stride} does not fit the model"):
            evaluate_text(loaded, Counting(), inputs, ProcessGrid(), 2, stride)


def test_a_short_text_is_not_computed_in_a_whole_window(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Well, Prince, so Genoa")
    loaded, grid = load_speaking("gpt"), ProcessGrid()
    source = TextTokens([str(tmp_path / "a.txt")], TOKENIZER)
    tokens, window = source.read(0, len(source)).tolist(), loaded.model.config.max_seq_len
    assert len(tokens) < window // 2
    seen: list[int] = []

    class Inputs(SequenceInputs):
        def arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
            seen.append(batch["tokens"].shape[1])
            return super().arguments(batch)

    result = evaluate_text(loaded, source, Inputs(), grid, 2)
    assert seen == [len(tokens) - 1]
    total = naive_score(loaded, tokens[:1], tokens[1:])[0]
    assert result.loss == pytest.approx(-total / (len(tokens) - 1), rel=1e-5)


def sentencepiece_tokenizer(texts: Sequence[str], scheme: str) -> HuggingFaceTokenizer:
    """Of single characters, with a mark in place of each blank and before the first word."""
    mark = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}
    characters = sorted({*"".join(texts).replace(" ", "\u2581")})
    vocabulary = {token: number for number, token in enumerate(["</s>", *characters])}
    end = {**trained_definition().content["added_tokens"][0], "id": 0, "content": "</s>"}
    content = {"added_tokens": [end], "pre_tokenizer": mark, "decoder": mark}
    definition = changed(**content, model={"vocab": vocabulary, "merges": []})
    return HuggingFaceTokenizer(replace(definition, settings={}))


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_bytes_are_those_of_the_text_where_a_tokenizer_adds_blanks(
    tmp_path: Path, scheme: str
) -> None:
    texts = ["Well, Prince", "so Genoa, \u0438 Lucca"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = sentencepiece_tokenizer(texts, scheme)
    model, encoder, *_ = load_speaking("gpt", vocab_size=tokenizer.vocab_size)
    loaded, grid = LoadedModel(model, encoder, tokenizer), ProcessGrid()
    source = TextTokens([str(tmp_path / "a.jsonl")], tokenizer)
    tokens = source.read(0, len(source))
    of_text = sum(len(text.encode()) for text in texts)
    assert tokenizer.token_byte_lengths[tokens].sum() == of_text + 2
    result = evaluate_text(loaded, source, inputs_of(loaded, torch.float32), grid, 2)
    assert result.loss * result.tokens / result.nats_per_byte == pytest.approx(of_text, rel=1e-12)


class Tokens:
    """Ids of a tokenizer that is not GPT-2's."""

    def __len__(self) -> int:
        return 100

    def read(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, min(start + length, 100)) * 7 % 60_000


def test_bytes_of_an_unknown_tokenizer_are_not_given() -> None:
    model, encoder, tokenizer, *_ = load_speaking("gpt", vocab_size=60_000)
    loaded = LoadedModel(model, encoder, tokenizer, is_own_tokenizer=False)
    inputs = inputs_of(loaded, torch.float32)
    result = evaluate_text(loaded, Tokens(), inputs, ProcessGrid(), 2)
    assert result.loss == pytest.approx(math.log(60_000), rel=0.1)
    assert math.isnan(result.bits_per_byte)
    assert "(n/a nats/byte, perplexity" in str(result)
