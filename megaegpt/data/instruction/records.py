"""Instruction data: tasks with answers, and conversations, with what is not learned masked.

The prompt of a task is Alpaca's (Taori et al., "Stanford Alpaca", 2023); the answer ends with
end-of-text, so that a model learns to stop. Conversations, and tasks if it is asked for, are put
into a chat template.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaegpt.data.instruction.chat_template import ChatTemplate, EncodedChat
from megaegpt.data.instruction.conversations import (
    Conversation,
    Message,
    is_conversation,
    parse_conversation,
)
from megaegpt.data.readers.documents import Problems
from megaegpt.data.readers.inputs import (
    BYTE_ORDER_MARK,
    UTF_16_MARKS,
    UTF_16_MESSAGE,
    read_bytes,
)
from megaegpt.data.readers.json_lines import parse_object
from megaegpt.data.tokenizer import END_OF_TEXT_ID, Tokenizer
from megaegpt.errors import ChatTemplateError, DataError
from megaegpt.files import is_special
from megaegpt.labels import IGNORE

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Instruction:
    """One task and its answer."""

    instruction: str
    context: str
    """Alpaca's ``input``, Dolly's ``context``; may be empty."""
    response: str

    @property
    def prompt(self) -> str:
        """The text that a model is given; the answer follows it directly."""
        template = _WITH_INPUT if self.context else _WITHOUT_INPUT
        return template.format(instruction=self.instruction, context=self.context)

    @property
    def conversation(self) -> Conversation:
        """The same as a user's message and the assistant's."""
        task = f"{self.instruction}\n\n{self.context}" if self.context else self.instruction
        return (Message("user", task), Message("assistant", self.response))


@dataclass(frozen=True)
class ChatRecord:
    """A conversation, and where it was read."""

    conversation: Conversation
    where: str
    """File and place, for messages."""


Record = Instruction | ChatRecord


def read_instructions(path: Path, problems: Problems) -> list[Record]:
    """Alpaca (``instruction, input, output``) or Dolly (``instruction, context, response``)
    records, and conversations (:mod:`~megaegpt.data.instruction.conversations`).

    Args:
        path: a JSON array or JSON Lines, plain or compressed as ``open_bytes`` knows it; each
            record may be of any kind.
        problems: told of records without an instruction or an answer, or with a message that is
            none.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or is no whole JSON array; a bad record,
            under the policy ``fail``.
    """
    if is_special(path):
        raise DataError(f"{path} is a pipe or a device, not a file")
    content = read_bytes(path).removeprefix(BYTE_ORDER_MARK)
    already_bad = problems.count
    if content.startswith(UTF_16_MARKS):
        problems.report(str(path), UTF_16_MESSAGE)
        return []
    records = [_record(row, where, problems) for where, row in _rows(path, content, problems)]
    if not records and problems.count == already_bad:
        problems.report(str(path), "has no records")
    return [record for record in records if record is not None]


def _rows(
    path: Path, content: bytes, problems: Problems
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not content.lstrip().startswith(b"["):
        for number, line in enumerate(io.BytesIO(content), 1):
            where = f"{path}, line {number}"
            row = parse_object(line, where, problems) if line.strip() else None
            if row is not None:
                yield where, row
        return
    try:
        array = json.loads(content.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start:,}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    for number, row in enumerate(array, 1):
        where = f"{path}, record {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            problems.report(where, f"a JSON {type(row).__name__}, not an object")


def _record(row: Mapping[str, Any], where: str, problems: Problems) -> Record | None:
    if not is_conversation(row):
        return _instruction(row, where, problems)
    try:
        return ChatRecord(parse_conversation(row), where)
    except DataError as error:
        problems.report(where, str(error))
        return None


def _instruction(row: Mapping[str, Any], where: str, problems: Problems) -> Instruction | None:
    instruction = row.get("instruction")
    # Tables joined from both kinds have null or nothing where a row's own kind has no such column.
    context = row["input"] if row.get("input") not in (None, "") else row.get("context")
    response = row.get("response") if row.get("output") is None else row["output"]
    context = "" if context is None else context
    texts = [text for text in (instruction, context, response) if isinstance(text, str)]
    if len(texts) < 3:
        problems.report(where, "needs the texts instruction, input or context, output or response")
        return None
    return Instruction(*texts)


def _says_something(record: Record) -> bool:
    """Whether any answer in it is more than an empty text, after which it would only end."""
    if isinstance(record, Instruction):
        return bool(record.response)
    return any(m.content for m in record.conversation if m.role == "assistant" and m.learned)


class InstructionDataset(torch.utils.data.Dataset):
    """Records as token ids and as what is to be predicted.

    Item i is ``(tokens, targets)``, int64 of one length T: ``targets[t]`` is the token after
    ``tokens[t]`` where that belongs to an answer or ends it, and -100 elsewhere. Records
    longer than ``max_seq_len + 1`` tokens are cut at the end; those that then have nothing to
    learn, or have an empty answer, are left out and counted. What comes after the last learned
    token of a conversation is left out too.

    Args:
        records: from :func:`read_instructions`.
        tokenizer: encodes prompts and answers, apart from each other: what a model is asked to
            continue is exactly the prompt's tokens.
        max_seq_len: most tokens of an item.
        mask_prompt: False: the prompt is learned too.
        chat: the template of conversations.
        tasks_are_chats: tasks with their answers are put into it too.
        problems: told of conversations that the template refuses.

    Example:
        >>> records = [Instruction("Name the capital.", "France", "Paris")]
        >>> dataset = InstructionDataset(records, Tokenizer.load(), max_seq_len=128)
        >>> tokens, targets = dataset[0]
        >>> targets[targets != -100].tolist()  # "Paris" and the end of the text
        [40313, 50256]
    """

    def __init__(
        self,
        records: Iterable[Record],
        tokenizer: Tokenizer,
        max_seq_len: int,
        mask_prompt: bool = True,
        *,
        chat: ChatTemplate | None = None,
        tasks_are_chats: bool = False,
        problems: Problems | None = None,
    ) -> None:
        self.dropped = 0
        self.cut = 0
        self.pad_token = tokenizer.eot_token
        self._tokenizer, self._chat, self._tasks_are_chats = tokenizer, chat, tasks_are_chats
        self._problems = problems or Problems()
        self._items: list[tuple[torch.Tensor, torch.Tensor]] = []
        for record in records:
            encoded = self._encode(record)
            if encoded is not None and _says_something(record):
                self._add(encoded, max_seq_len, mask_prompt)
            else:
                self.dropped += encoded is not None

    def _encode(self, record: Record) -> EncodedChat | None:
        """None: a problem was reported."""
        if isinstance(record, Instruction) and not self._tasks_are_chats:
            return self._encode_task(record)
        if self._chat is None:
            raise DataError("conversations need a chat template")
        try:
            return self._ended(self._chat.encode_training(record.conversation, self._tokenizer))
        except DataError as error:
            where = record.where if isinstance(record, ChatRecord) else repr(record.instruction)
            if isinstance(error, ChatTemplateError):
                raise ChatTemplateError(f"{where}: {error}") from None
            self._problems.report(where, str(error))
            return None

    def _ended(self, encoded: EncodedChat) -> EncodedChat:
        """With end-of-text behind the last answer, where the template ends it with text alone: a
        model that learns no token to stop at writes on for ever.
        """
        ids, learned = encoded
        if not any(learned):
            return encoded
        kept = len(ids) - learned[::-1].index(True)
        if ids[kept - 1] in self._tokenizer.special_tokens.values():
            return encoded
        return EncodedChat([*ids[:kept], self._tokenizer.eot_token], [*learned[:kept], True])

    def _encode_task(self, record: Instruction) -> EncodedChat:
        prompt = self._tokenizer.encode_prompt(record.prompt)
        answer = [*self._tokenizer.encode(record.response), self._tokenizer.eot_token]
        return EncodedChat([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))

    def _add(self, encoded: EncodedChat, max_seq_len: int, mask_prompt: bool) -> None:
        ids, learned = encoded
        kept = min(max_seq_len + 1, len(ids) - (learned[::-1].index(True) if any(learned) else 0))
        if not any(learned[1:kept]):  # the first token of a row is predicted from nothing
            self.dropped += 1
            return
        self.cut += any(learned[kept:])
        row = torch.tensor(ids[:kept])
        targets = row[1:].clone()
        if mask_prompt:
            targets[~torch.tensor(learned[1:kept])] = IGNORE
        self._items.append((row[:-1], targets))

    def __len__(self) -> int:
        """Items that have something to learn."""
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._items[index]


Collate = Callable[[Sequence[tuple[torch.Tensor, torch.Tensor]]], tuple[torch.Tensor, torch.Tensor]]


def create_instruction_collate_fn(
    pad_token_id: int = END_OF_TEXT_ID, multiple_of: int = 1
) -> Collate:
    """A function for ``DataLoader(collate_fn=...)``: items of several lengths to one batch.

    It returns tokens (B, T), padded at the end with ``pad_token_id``, and targets (B, T), padded
    with -100: end-of-text pads too, and must be learned once, at the end of an answer, and
    nowhere else.

    Args:
        pad_token_id: what fills the tokens.
        multiple_of: T is rounded up to it.

    Example:
        >>> records = [Instruction(f"Count to {n}.", "", "1 2 3"[: 2 * n - 1]) for n in (1, 2, 3)]
        >>> dataset = InstructionDataset(records, Tokenizer.load(), max_seq_len=128)
        >>> collate = create_instruction_collate_fn(pad_token_id=50256)
        >>> batches = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=collate)
        >>> tokens, targets = next(iter(batches))
        >>> (targets != -100).sum(dim=1)
        tensor([2, 3, 4])
    """

    def collate(
        items: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not items:
            raise DataError("a batch without items: the records have nothing to learn, or are none")
        longest = max(len(tokens) for tokens, _ in items)
        width = -(-longest // multiple_of) * multiple_of
        tokens = torch.full((len(items), width), pad_token_id, dtype=torch.int64)
        targets = torch.full((len(items), width), IGNORE, dtype=torch.int64)
        for row, (item_tokens, item_targets) in enumerate(items):
            tokens[row, : len(item_tokens)] = item_tokens
            targets[row, : len(item_targets)] = item_targets
        return tokens, targets

    return collate
