"""The tasks that come with the project: distinct, right where that can be computed, and short."""

from __future__ import annotations

import re

from megaegpt.data.instruction.exercises import exercises
from megaegpt.data.tokenizer import Tokenizer

_SIGNS = {"+": int.__add__, "-": int.__sub__}


def test_no_task_is_there_twice_or_unanswered() -> None:
    tasks = exercises()
    assert len({(task.instruction, task.context) for task in tasks}) == len(tasks) > 500
    assert all(task.response.strip() == task.response != "" for task in tasks)
    assert exercises() == tasks


def test_sums_and_orders_are_right() -> None:
    checked = 0
    for task in exercises():
        if found := re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", task.instruction):
            value = _SIGNS[found[2]](int(found[1]), int(found[3]))
            assert task.response == f"{found[1]} {found[2]} {found[3]} = {value}."
        elif found := re.fullmatch(r"Multiply (\d+) by (\d+)\.", task.instruction):
            assert task.response.endswith(f" = {int(found[1]) * int(found[2])}.")
        elif task.instruction.startswith("Sort"):
            assert task.response.split(", ") == sorted(task.context.split(", "))
        else:
            continue
        checked += 1
    assert checked > 150


def test_they_are_short() -> None:
    """A micro-batch of them costs little, whatever the model's context."""
    tokenizer = Tokenizer.load()
    assert max(len(tokenizer.encode(t.prompt + t.response)) for t in exercises()) < 96
