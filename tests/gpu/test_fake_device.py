"""Every kind of model on a GPU that is not there: no device is mixed with another, nothing waits
for the device in a training or a decoding step, and nothing is copied to it or from it.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from tests.distributed.harness import CONTEXT
from tests.gpu import fake_cases, fake_device
from tools.benchmarks.processes import free_port

_LONGEST = 600.0
"""Seconds that a process may take, on a busy machine."""

pytestmark = pytest.mark.skipif(
    fake_device.missing() is not None, reason=str(fake_device.missing())
)


Answer = tuple[BaseProcess, Connection]


def ask(function: Callable[..., None], *arguments: Any) -> Answer:
    """Start ``function(*arguments, results)`` in a process of its own, as it alters torch."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = CONTEXT.Process(target=function, args=(*arguments, sending), daemon=True)
    process.start()
    sending.close()
    return process, receiving


def answer_of(asked: Answer) -> Any:
    """What it sends."""
    process, receiving = asked
    try:
        if not receiving.poll(_LONGEST):
            raise AssertionError(f"no answer after {_LONGEST} s")
        return receiving.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended by {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


@functools.cache
def outcome_of(which: str) -> dict[str, str]:
    """What went wrong by case."""
    return answer_of(ask(fake_cases.run_cases, which))


@pytest.mark.parametrize("name", fake_cases.short_cases())
def test_a_step_stays_on_the_device(name: str) -> None:
    problem = outcome_of("short")[name]
    assert not problem, problem


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("control: a value is read", "DataDependentOutputException"),
        ("control: devices are mixed", "at least two devices"),
        ("control: a tensor is fetched", "copies between cpu and cuda"),
    ],
)
def test_what_leaves_the_device_is_found(name: str, error: str) -> None:
    assert error in outcome_of("short")[name]


@pytest.mark.parametrize("name", fake_cases.rank_cases())
def test_a_rank_of_many_stays_on_its_device(name: str) -> None:
    problem = outcome_of("ranks")[name]
    assert not problem, problem


def test_groups_of_two_backends_sum_on_the_cpu_what_is_there() -> None:
    port = free_port()
    problems = [answer_of(a) for a in [ask(fake_cases.run_rank, rank, port) for rank in range(2)]]
    assert problems == ["", ""]


@pytest.mark.long
def test_every_kind_of_model_stays_on_the_device_in_every_way() -> None:
    problems = {name: problem for name, problem in outcome_of("long").items() if problem}
    assert not problems, "\n".join(f"{name}:\n{problem}" for name, problem in problems.items())
