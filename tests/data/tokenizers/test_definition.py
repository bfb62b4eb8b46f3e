"""Tokenizer files that are missing, damaged or of another kind are one line that names them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer, save_tokenizer
from megaegpt.errors import DataError
from tests.tiny.tokenizers import trained_definition, trained_tokenizer


def write(folder: Path, content: Any, **settings: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _wordpiece(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordPiece", "vocab": {"a": 2, "</s>": 3}, "unk_token": "a"}


def _no_decoder(content: dict[str, Any]) -> None:
    content["decoder"] = content["pre_tokenizer"] = None


def _model_of(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update(changes)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "kind": (_wordpiece, "is of the kind 'WordPiece'"),
    "decoder": (_no_decoder, "is of an unknown kind: neither byte-level"),
    "no model": (lambda content: content.pop("model"), "is damaged: it has no model"),
    "no vocabulary": (_model_of(vocab=3), "is damaged"),
    "huge id": (
        lambda content: content["model"]["vocab"].update(a=1 << 31),
        "has the id 2147483648",
    ),
    "negative id": (lambda content: content["model"]["vocab"].update(a=-1), "has the id -1"),
    "one id of two tokens": (lambda content: content["model"]["vocab"].update(zz=5), "the id 5"),
    "unknown merge": (_model_of(merges=[["qqq", "zzz"]]), "is damaged"),
    "merge of three": (_model_of(merges=[["a", "b", "c"]]), "is damaged"),
    "no list of added tokens": (lambda content: content.update(added_tokens=3), "added_tokens"),
    "a list of numbers": (_model_of(type="Unigram", vocab=[1]), "its vocabulary is damaged"),
    "added token": (lambda content: content.update(added_tokens=[3]), "is damaged"),
    "added token without a text": (
        lambda content: content["added_tokens"][1].update(content=""),
        "an added token has no text",
    ),
    "part": (lambda content: content.update(pre_tokenizer={"type": "?"}), "is damaged, or newer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    content = copy.deepcopy(trained_definition().content)
    damage(content)
    with pytest.raises(DataError) as error:
        load_tokenizer(write(tmp_path, content))
    assert f"{tmp_path}/tokenizer.json" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"nowhere does not exist: give a folder"):
        load_tokenizer(tmp_path / "nowhere")
    content = json.dumps(trained_definition().content)
    (tmp_path / "tokenizer.json").write_text(content[:-100], encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)


def test_the_end_of_documents_is_what_the_files_name(tmp_path: Path) -> None:
    content = trained_definition().content
    named = {"content": "<|im_start|>", "lstrip": False}
    assert load_tokenizer(write(tmp_path, content, eos_token=named)).eot_token == 1
    write(tmp_path, content)
    assert load_tokenizer(tmp_path).eot_token == 0  # by its well-known name
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert load_tokenizer(tmp_path).eot_token == 1
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert load_tokenizer(tmp_path).eot_token == 0
    write(tmp_path, content, eos_token="<none>")
    with pytest.raises(DataError, match="its eos_token '<none>' is no token"):
        load_tokenizer(tmp_path)


def test_all_ends_of_a_text_are_known_and_travel_with_the_tokenizer(tmp_path: Path) -> None:
    """Llama 3.1 has three."""
    folder = write(tmp_path, trained_definition().content, eos_token="<|im_start|>")
    assert load_tokenizer(folder).end_tokens == {1}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1, 99999]}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eot_token, tokenizer.end_tokens) == (1, {1, 5})
    (tmp_path / "saved").mkdir()
    save_tokenizer(tokenizer, tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.eot_token, saved.end_tokens) == (1, {1, 5})
    theirs = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == [1, 5]


def write_older(folder: Path, **settings: Any) -> None:
    """What a slow tokenizer of transformers 4 was saved as."""
    model = trained_definition().content["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_a_folder_of_the_older_form_is_read(tmp_path: Path) -> None:
    write_older(tmp_path)
    older, ours = load_tokenizer(tmp_path), trained_tokenizer()
    text = "Shards, tokens\n\n and 12  words"
    assert older.encode(text) == ours.encode(text)
    (tmp_path / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"merges\.txt is damaged: a rule is not two tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("by_settings", [True, False])
def test_added_tokens_of_the_older_form_are_those_of_transformers(
    by_settings: bool, tmp_path: Path
) -> None:
    """``added_tokens_decoder`` has flags; ``added_tokens.json``, before it, names and ids alone."""
    entry = {**dict.fromkeys(("single_word", "rstrip", "normalized"), False), "lstrip": by_settings}
    listed = [("<|im_start|>", 1, True), ("<|im_end|>", 700, True), ("<think>", 701, False)]
    decoder = {str(n): {**entry, "content": name, "special": s} for name, n, s in listed}
    named = {"bos_token": "<|im_start|>", "additional_special_tokens": ["<|im_end|>"]}
    settings = {"added_tokens_decoder": decoder, **named} if by_settings else {}
    write_older(tmp_path, tokenizer_class="GPT2Tokenizer", **settings)
    (tmp_path / "added_tokens.json").write_text('{"<think>": 701, "<|im_end|>": 700}')
    named["eos_token"] = "<|im_end|>"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    ours = load_tokenizer(tmp_path)
    assert (ours.eot_token, ours.vocab_size) == (700, 702)
    (tmp_path / "saved").mkdir()
    save_tokenizer(ours, tmp_path / "saved")
    texts = ["<|im_start|>user\nhi  <|im_end|> <think>so</think>", "a <think> b", " <|endoftext|> "]
    for theirs in map(AutoTokenizer.from_pretrained, (tmp_path, tmp_path / "saved")):
        for text in texts:
            plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert ours.encode(text) == plain
            wanted = theirs.encode(text, add_special_tokens=False)
            assert ours.encode_with_special_tokens(text) == wanted


_TEXTS = ["<|im_start|>user\nhi  <|im_end|> <think>so</think>", "a <think> b$c", " <|endoftext|> "]


def _gives_the_ids_of_transformers(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in _TEXTS:
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == plain
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode_with_special_tokens(text) == wanted


@pytest.mark.parametrize("by_settings", [True, False])
def test_added_tokens_that_tokenizer_json_lacks_are_those_of_transformers(
    by_settings: bool, tmp_path: Path
) -> None:
    """The ids that the other files say hold only where no other token has them."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    listed = [(0, "<|endoftext|>"), (1, "<|im_start|>"), (5, "$"), (6, "<|im_end|>")]
    assert trained_definition().vocabulary["$"] == 5
    named: dict[str, Any] = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizer"}
    if by_settings:
        named["added_tokens_decoder"] = {
            str(number): {**flags, "content": name, "special": name.startswith("<|")}
            for number, name in [*listed, (709, "<think>")]
        }
    else:
        (tmp_path / "added_tokens.json").write_text('{"<think>": 701, "<|im_end|>": 700}')
    write(tmp_path, trained_definition().content, **named)
    ours = load_tokenizer(tmp_path)
    assert (ours.eot_token, ours.vocab_size) == (700, 702)
    _gives_the_ids_of_transformers(tmp_path)
    (tmp_path / "saved").mkdir()
    save_tokenizer(ours, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    _gives_the_ids_of_transformers(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["bos", "pad", "unk"])
def test_special_tokens_that_the_settings_name_are_no_text_whatever_their_entry_says(
    kind: str, tmp_path: Path
) -> None:
    content = copy.deepcopy(trained_definition().content)
    for token in content["added_tokens"]:
        token["special"] = False
    write(tmp_path, content, eos_token="<|endoftext|>", **{f"{kind}_token": "<|im_start|>"})
    assert 1 not in load_tokenizer(tmp_path).encode("<|im_start|>user")
    _gives_the_ids_of_transformers(tmp_path)


@pytest.mark.parametrize("listed", [{"x": {"content": "a"}}, {"7": {}}, {"9" * 5000: {}}, [7]])
def test_damaged_added_tokens_of_the_older_form_are_named(listed: Any, tmp_path: Path) -> None:
    write_older(tmp_path, added_tokens_decoder=listed)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: added_tokens_decoder is damaged"):
        load_tokenizer(tmp_path)


def test_words_of_the_older_form_are_those_of_its_class_or_it_is_refused(tmp_path: Path) -> None:
    text = "We've 12345 words,\n\n  e\u0301 and more!!\n"
    for kind in ("CodeGenTokenizer", "RobertaTokenizerFast", "GPT2TokenizerFast"):
        write_older(tmp_path, tokenizer_class=kind)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).encode(text) == theirs.encode(
            text, add_special_tokens=False
        )
    write_older(tmp_path, tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(DataError, match=r"vocab\.json is of a 'Qwen2Tokenizer', .* save it again"):
        load_tokenizer(tmp_path)


def test_ids_out_of_range_are_refused_by_name() -> None:
    for token in (700, -1):
        with pytest.raises(DataError, match=f"outside the vocabulary of 700: {token}"):
            trained_tokenizer().decode([5, token])


def test_saving_tells_the_length_of_the_model(tmp_path: Path) -> None:
    save_tokenizer(trained_tokenizer(), tmp_path, max_length=128)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (settings["model_max_length"], settings["eos_token"]) == (128, "<|endoftext|>")
