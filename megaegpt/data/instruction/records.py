"""Instruction data: Alpaca and Dolly records as prompts and answers, with the prompts masked.

The prompt is Alpaca's (Taori et al., "Stanford Alpaca", 2023); the answer ends with end-of-text, so
that a model learns to stop.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaegpt.data.readers.documents import Problems
from megaegpt.data.readers.inputs import (
    BYTE_ORDER_MARK,
    UTF_16_MARKS,
    UTF_16_MESSAGE,
    read_bytes,
)
from megaegpt.data.readers.json_lines import parse_object
from megaegpt.data.tokenizer import END_OF_TEXT_ID, Tokenizer
from megaegpt.errors import DataError
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


def read_instructions(path: Path, problems: Problems) -> list[Instruction]:
    """Alpaca (``instruction, input, output``) or Dolly (``instruction, context, response``)
    records.

    Args:
        path: a JSON array or JSON Lines, plain or compressed as ``open_bytes`` knows it; each
            record may be of either kind.
        problems: told of records without an instruction or an answer.

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


def _record(row: Mapping[str, Any], where: str, problems: Problems) -> Instruction | None:
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


class InstructionDataset(torch.utils.data.Dataset):
    """Records as token ids and as what is to be predicted.

    Item i is ``(tokens, targets)``, int64 of one length T: ``targets[t]`` is the token after
    ``tokens[t]`` where that belongs to the answer or ends it, and -100 in the prompt. Records
    longer than ``max_seq_len + 1`` tokens are cut at the end; those that then have nothing to
    learn, or have an empty answer, are left out and counted.

    Args:
        records: from :func:`read_instructions`.
        tokenizer: encodes prompts and answers, apart from each other: what a model is asked to
            continue is exactly the prompt's tokens.
        max_seq_len: most tokens of an item.
        mask_prompt: False: the prompt is learned too.

    Example:
        >>> records = [Instruction("Name the capital.", "France", "Paris")]
        >>> dataset = InstructionDataset(records, Tokenizer.load(), max_seq_len=128)
        >>> tokens, targets = dataset[0]
        >>> targets[targets != -100].tolist()  # "Paris" and the end of the text
        [40313, 50256]
    """

    def __init__(
        self,
        records: Iterable[Instruction],
        tokenizer: Tokenizer,
        max_seq_len: int,
        mask_prompt: bool = True,
    ) -> None:
        self.dropped = 0
        self.cut = 0
        self.pad_token = tokenizer.eot_token
        self._items: list[tuple[torch.Tensor, torch.Tensor]] = []
        for record in records:
            prompt = tokenizer.encode_prompt(record.prompt)
            answer = tokenizer.encode(record.response)
            ids = [*prompt, *answer, tokenizer.eot_token]
            if not answer or len(prompt) > max_seq_len:
                self.dropped += 1
                continue
            self.cut += len(ids) > max_seq_len + 1
            row = torch.tensor(ids[: max_seq_len + 1])
            targets = row[1:].clone()
            if mask_prompt:
                targets[: len(prompt) - 1] = IGNORE
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
