"""Rows of instruction data: complete, separate, and a function of the sample number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megaegpt.data.instruction.records import Instruction, InstructionDataset
from megaegpt.data.instruction.rows import InstructionSamples, InstructionWindows, pack
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import DataError

TOKENIZER = Tokenizer.load()
RECORDS = [Instruction(f"Count to {n}.", "", " ".join(map(str, range(n)))) for n in range(1, 30)]
ROOM = 150


@pytest.fixture(scope="module")
def dataset() -> InstructionDataset:
    return InstructionDataset(RECORDS, TOKENIZER, ROOM)


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_has_every_answer_once_and_learns_nothing_else(
    dataset: InstructionDataset, packing: bool
) -> None:
    samples = InstructionSamples(dataset, ROOM, 3, packing)
    batch = samples.batch(np.arange(len(samples)))
    assert batch["tokens"].shape == batch["targets"].shape == (len(samples), ROOM)
    answers = Counter[str]()
    for row in batch["targets"]:
        answers.update(TOKENIZER.decode(row[row != -100]).split("<|endoftext|>")[:-1])
    assert answers == Counter(record.response for record in RECORDS)
    assert samples.tokens_per_row * len(samples) == sum(
        len(TOKENIZER.encode(r.prompt)) + len(TOKENIZER.encode(r.response)) + 1 for r in RECORDS
    )
    assert ("segments" in batch) == packing
    assert (len(samples) < len(RECORDS)) == packing


def test_packed_records_are_told_apart_and_padding_is_no_ones(dataset: InstructionDataset) -> None:
    samples = InstructionSamples(dataset, ROOM, 3, packing=True)
    batch = samples.read(np.arange(len(samples)))
    tokens, learned, segments = batch["tokens"], batch["targets"] != -100, batch["segments"]
    for row, items in enumerate(samples.rows):
        for segment, item in enumerate(items):
            inputs, targets = dataset[item]
            (columns,) = (segments[row] == segment).nonzero()
            assert (np.diff(columns) == 1).all()
            first = columns[0]
            assert np.array_equal(tokens[row, first : first + len(inputs)], inputs)
            assert batch["targets"][row, first + len(inputs) - 1] == targets[-1] == 50256
            if first + len(inputs) < ROOM:
                assert tokens[row, first + len(inputs)] == 50256
        assert not learned[row][segments[row] < 0].any()


@pytest.mark.parametrize("packing", [False, True])
def test_the_longest_row_is_as_wide_as_anything_is_learned(
    dataset: InstructionDataset, packing: bool
) -> None:
    samples = InstructionSamples(dataset, ROOM, 3, packing)
    targets = samples.read(np.arange(len(samples)))["targets"]
    assert samples.longest_row == (targets != -100).any(0).nonzero()[0].max() + 1


def test_rows_follow_from_the_seed_and_the_number(dataset: InstructionDataset) -> None:
    samples, again, other = (InstructionSamples(dataset, ROOM, s, True) for s in (3, 3, 4))
    numbers = np.array([5, 0, len(samples) + 2])
    given, twice = samples.batch(numbers), again.batch(numbers)
    assert given.keys() == twice.keys() == {"tokens", "targets", "segments"}
    assert all(np.array_equal(given[name], twice[name]) for name in given)
    assert not np.array_equal(given["tokens"], other.batch(numbers)["tokens"])
    assert samples.fingerprint == again.fingerprint
    assert samples.fingerprint != InstructionSamples(dataset, ROOM, 3).fingerprint


def test_windows_are_the_rows_in_order(dataset: InstructionDataset) -> None:
    windows = InstructionWindows(InstructionSamples(dataset, ROOM, 3))
    assert len(windows) == len(RECORDS)
    batch = windows.batch(np.arange(4, 6))
    tokens, targets = dataset[4]
    assert np.array_equal(batch["tokens"][0, : len(tokens)], tokens)
    learned = batch["targets"][0] != -100
    assert np.array_equal(batch["targets"][0][learned], targets[targets != -100])


def test_packing_fills_rows_and_loses_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000).tolist()
    rows = pack(list(range(2000)), lengths, 128)
    assert sorted(item for row in rows for item in row) == list(range(2000))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 128
    assert sum(lengths) / (len(rows) * 128) > 0.95


def test_no_usable_record_is_an_error() -> None:
    with pytest.raises(DataError, match="within 5 tokens"):
        InstructionSamples(InstructionDataset(RECORDS, TOKENIZER, 5), 5, 0)
