"""Instruction data: the answer and its end are learned, and nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megaegpt.data.instruction.chat_template import ChatTemplate, load_chat_template
from megaegpt.data.instruction.conversations import Message
from megaegpt.data.instruction.records import (
    ChatRecord,
    Instruction,
    InstructionDataset,
    create_instruction_collate_fn,
    read_instructions,
)
from megaegpt.data.instruction.rows import InstructionSamples
from megaegpt.data.readers.documents import Problems
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import ChatTemplateError, DataError
from tests.tiny.tokenizers import with_bos

TOKENIZER = Tokenizer.load()
SHORT = Instruction("Say yes.", "", "Yes.")
LONG = Instruction("Repeat {this}.", "a, b", "a, b, a, b")


def test_alpaca_and_dolly_in_arrays_and_lines_are_one_kind_of_record(tmp_path: Path) -> None:
    alpaca = [
        {"instruction": "Say yes.", "input": "", "output": "Yes."},
        {"instruction": "Repeat {this}.", "input": "a, b", "output": "a, b, a, b"},
        {"instruction": "Say yes.", "output": "Yes."},
    ]
    dolly = [
        {"instruction": "Say yes.", "context": "", "response": "Yes.", "category": "x"},
        {"instruction": "Repeat {this}.", "context": "a, b", "response": "a, b, a, b"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca, indent=4))
    (tmp_path / "dolly.jsonl").write_text("\n".join(map(json.dumps, dolly)) + "\n\n")
    fail = Problems("fail")
    assert read_instructions(tmp_path / "alpaca.json", fail) == [SHORT, LONG, SHORT]
    assert read_instructions(tmp_path / "dolly.jsonl", fail) == [SHORT, LONG]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"instruction": "x"}]', "record 1: needs the texts"),
        ("a.json", '[{"instruction": "x", "output": 5}]', "record 1: needs the texts"),
        ("a.json", '[["x"]]', "record 1: a JSON list"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{"a": 1}', "line 2: needs the texts"),
        ("a.jsonl", '{"instruction": ', "line 1: .*not JSON"),
    ],
)
def test_bad_records_are_named_or_skipped(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_instructions(tmp_path / name, Problems("fail"))
    problems = Problems("skip")
    assert len(read_instructions(tmp_path / name, problems)) == content.count('"y"')
    assert problems.count == 1


def test_a_broken_array_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "x"},')
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        read_instructions(tmp_path / "a.json", Problems("skip"))


def test_prompts_have_alpacas_form_and_keep_braces() -> None:
    assert SHORT.prompt.endswith("### Instruction:\nSay yes.\n\n### Response:\n")
    assert "### Input:" not in SHORT.prompt
    assert "Repeat {this}.\n\n### Input:\na, b\n\n### Response:\n" in LONG.prompt


@pytest.mark.parametrize("record", [SHORT, LONG])
def test_exactly_the_answer_and_its_end_are_learned(record: Instruction) -> None:
    ((tokens, targets),) = list(_items(InstructionDataset([record], TOKENIZER, 200)))
    assert tokens.shape == targets.shape
    learned = targets[targets != -100].tolist()
    assert learned == [*TOKENIZER.encode(record.response), 50256]
    assert TOKENIZER.decode(tokens) == record.prompt + record.response
    valid = targets[:-1] != -100
    assert torch.equal(targets[:-1][valid], tokens[1:][valid])


def test_the_prompt_is_learned_on_request() -> None:
    ((tokens, targets),) = list(
        _items(InstructionDataset([SHORT], TOKENIZER, 200, mask_prompt=False))
    )
    assert torch.equal(targets[:-1], tokens[1:])


def test_records_with_nothing_to_learn_are_dropped_and_long_ones_cut() -> None:
    prompt = len(TOKENIZER.encode(SHORT.prompt))
    empty = Instruction("Say nothing.", "", "")
    fits = InstructionDataset([SHORT, empty], TOKENIZER, max_seq_len=prompt)
    assert (len(fits), fits.dropped, fits.cut) == (1, 1, 1)
    tokens, targets = fits[0]
    assert len(tokens) == prompt
    assert targets[targets != -100].tolist() == TOKENIZER.encode("Yes.")[:1]
    none = InstructionDataset([SHORT], TOKENIZER, max_seq_len=prompt - 1)
    assert (len(none), none.dropped) == (0, 1)


def test_batches_are_padded_without_learning_the_padding() -> None:
    dataset = InstructionDataset([SHORT, LONG], TOKENIZER, 200)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, collate_fn=create_instruction_collate_fn(50256, multiple_of=8)
    )
    ((tokens, targets),) = list(loader)
    longest = max(len(item) for item, _ in _items(dataset))
    assert tokens.shape == targets.shape == (2, -(-longest // 8) * 8)
    for row, (item_tokens, item_targets) in enumerate(_items(dataset)):
        assert torch.equal(tokens[row, : len(item_tokens)], item_tokens)
        assert (tokens[row, len(item_tokens) :] == 50256).all()
        assert torch.equal(targets[row, : len(item_targets)], item_targets)
        assert (targets[row, len(item_targets) :] == -100).all()
    assert (targets == 50256).sum() == 2  # each answer's end, and no padding


def test_real_instructions_are_all_usable(data_dir: Path) -> None:
    records = read_instructions(data_dir / "instructions.json", Problems("fail"))
    dataset = InstructionDataset(records, TOKENIZER, 1024)
    assert (len(records), len(dataset), dataset.dropped, dataset.cut) == (1100, 1100, 0, 0)


def _items(dataset: InstructionDataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("indent", [None, 4])
def test_a_byte_order_mark_before_an_array_changes_nothing(
    tmp_path: Path, indent: int | None
) -> None:
    records = [{"instruction": "Say yes.", "output": "Yes."}] * 2
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, indent=indent), encoding="utf-8-sig")
    assert read_instructions(path, Problems("fail")) == [SHORT, SHORT]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8-sig")
    assert read_instructions(path, Problems("fail")) == [SHORT, SHORT]


def test_a_null_column_is_an_absent_one(tmp_path: Path) -> None:
    """As tables joined from Alpaca's and Dolly's have it."""
    columns = ("instruction", "input", "output", "context", "response")
    rows = [
        ("Repeat {this}.", "a, b", "a, b, a, b", None, None),
        ("Repeat {this}.", None, None, "a, b", "a, b, a, b"),
        ("Say yes.", None, None, None, "Yes."),
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]))
    assert read_instructions(path, Problems("fail")) == [LONG, LONG, SHORT]


@pytest.mark.parametrize("content", [b"", b"[]", b"\n \n", b"\xef\xbb\xbf[]"])
def test_a_file_without_records_is_named_or_counted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: has no records"):
        read_instructions(path, Problems("fail"))
    problems = Problems("skip")
    assert read_instructions(path, problems) == []
    assert problems.count == 1


def test_pointers_devices_and_endless_nesting_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="a Git LFS pointer"):
        read_instructions(path, Problems("skip"))
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="is not JSON"):
        read_instructions(path, Problems("skip"))
    with pytest.raises(DataError, match="is a pipe or a device"):
        read_instructions(Path("/dev/zero"), Problems("skip"))


def test_compressed_files_are_read_and_other_encodings_named(tmp_path: Path) -> None:
    content = json.dumps([{"instruction": "Say yes.", "output": "Yes."}])
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(content.encode()))
    assert read_instructions(tmp_path / "a.json.gz", Problems("fail")) == [SHORT]
    for name, text in (("a.json", content), ("a.jsonl", content[1:-1] + "\n")):
        (tmp_path / name).write_bytes((text * 2).encode("utf-16"))
        with pytest.raises(DataError, match=f"{name}: text in UTF-16"):
            read_instructions(tmp_path / name, Problems("fail"))
        problems = Problems("skip")
        assert (read_instructions(tmp_path / name, problems), problems.count) == ([], 1)


@pytest.mark.parametrize("context", [0, False, [], {}])
def test_a_context_that_is_no_text_is_no_empty_one(tmp_path: Path, context: object) -> None:
    row = {"instruction": "Say yes.", "input": context, "output": "Yes."}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="record 1: needs the texts"):
        read_instructions(tmp_path / "a.json", Problems("fail"))


def test_an_object_over_several_lines_is_named_as_that(tmp_path: Path) -> None:
    row = {"instruction": "Say yes.", "output": "Yes."}
    (tmp_path / "a.json").write_text(json.dumps({"data": [row]}, indent=1))
    with pytest.raises(DataError, match="line 1: a JSON object over several lines"):
        read_instructions(tmp_path / "a.json", Problems("fail"))


CHAT = {
    "messages": [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "Yes!"},
    ]
}


def test_conversations_are_learned_where_the_assistant_speaks(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(CHAT)}\n")
    records = read_instructions(tmp_path / "chats.jsonl", Problems("fail"))
    dataset = InstructionDataset(
        records, TOKENIZER, 200, chat=load_chat_template(TOKENIZER, "alpaca")
    )
    ((tokens, targets),) = list(_items(dataset))
    assert TOKENIZER.decode(targets[targets != -100]) == "Yes.<|endoftext|>Yes!<|endoftext|>"
    assert TOKENIZER.decode(tokens).endswith("### Instruction:\nAgain.\n\n### Response:\nYes!")


@pytest.mark.parametrize("bos", [False, True])
def test_a_single_task_in_the_alpaca_template_is_the_task_itself(bos: bool) -> None:
    tokenizer = with_bos(bos_token="<|im_start|>") if bos else TOKENIZER
    chat = load_chat_template(tokenizer, "alpaca")
    as_chats = InstructionDataset([SHORT], tokenizer, 500, chat=chat, tasks_are_chats=True)
    for ours, wanted in zip(
        as_chats[0], InstructionDataset([SHORT], tokenizer, 500)[0], strict=True
    ):
        assert torch.equal(ours, wanted)


def test_conversations_without_anything_to_learn_are_counted() -> None:
    chat = load_chat_template(TOKENIZER, "chatml")
    silent = ChatRecord((Message("user", "a"),), "here")
    unlearned = ChatRecord(
        (Message("user", "a"), Message("assistant", "b", learned=False)), "there"
    )
    late = ChatRecord((Message("user", "a" * 99), Message("assistant", "b")), "there")
    empty = ChatRecord((Message("user", "a"), Message("assistant", "")), "there")
    records = [silent, unlearned, late, empty, Instruction("Say nothing.", "", "")]
    dataset = InstructionDataset(records, TOKENIZER, 30, chat=chat, tasks_are_chats=True)
    assert (len(dataset), dataset.dropped, dataset.cut) == (0, 5, 0)


def test_conversations_that_a_template_refuses_are_bad_records() -> None:
    chat = ChatTemplate("{{ raise_exception('roles must alternate') }}", "strict")
    record = ChatRecord((Message("user", "a"),), "chats.jsonl, line 3")
    with pytest.raises(DataError, match=r"chats\.jsonl, line 3: .*strict: roles must alternate"):
        InstructionDataset([record], TOKENIZER, 30, chat=chat)
    problems = Problems("skip")
    assert not len(InstructionDataset([record], TOKENIZER, 30, chat=chat, problems=problems))
    assert problems.count == 1


def test_an_answer_that_its_template_ends_with_text_is_ended_by_end_of_text_too() -> None:
    """GPT-2's tokenizer has no ``<|im_end|>``: nothing else would say where to stop."""
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    record = ChatRecord((*turns, Message("assistant", "d")), "here")
    dataset = InstructionDataset(
        [record], TOKENIZER, 200, chat=load_chat_template(TOKENIZER, "chatml")
    )
    targets = dataset[0][1]
    learned = TOKENIZER.decode(targets[targets != -100].tolist())
    assert learned == "b<|im_end|>\nd<|im_end|>\n<|endoftext|>"
    assert targets[-1] == TOKENIZER.eot_token


def test_a_template_that_does_not_answer_in_time_is_no_bad_record() -> None:
    """On a busy machine, good records would be left out."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    chat = ChatTemplate(endless, "slow", seconds=0.2)
    record = ChatRecord((Message("user", "a"), Message("assistant", "b")), "chats.jsonl, line 3")
    problems = Problems("skip")
    with pytest.raises(ChatTemplateError, match=r"chats\.jsonl, line 3: .* slow did not end"):
        InstructionDataset([record], TOKENIZER, 30, chat=chat, problems=problems)
    assert problems.count == 0


def test_packed_conversations_keep_their_tokens_and_targets() -> None:
    chat = load_chat_template(TOKENIZER, "chatml")
    records = [
        ChatRecord((Message("user", "a"), Message("assistant", word)), word)
        for word in ("b", "c d")
    ]
    dataset = InstructionDataset(records, TOKENIZER, 100, chat=chat)
    rows = InstructionSamples(dataset, 100, seed=1, packing=True).read(np.array([0]))
    learned = rows["targets"][rows["targets"] != -100]
    shown = TOKENIZER.decode(learned)
    b, c = "b<|im_end|>\n<|endoftext|>", "c d<|im_end|>\n<|endoftext|>"
    assert shown in (b + c, c + b)
    for place in np.flatnonzero(rows["targets"][0][:-1] != -100):
        assert rows["tokens"][0][place + 1] == rows["targets"][0][place]
