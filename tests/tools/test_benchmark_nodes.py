"""What several nodes measure together, and how it is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaegpt.errors import LaunchError
from tests.distributed.harness import Distributed, grid_for
from tools import benchmark
from tools.benchmarks import node_parts
from tools.benchmarks.node_parts import Place
from tools.benchmarks.nodes import NodesChecklist
from tools.benchmarks.processes import free_port

ROOT = Path(__file__).parents[2]
FAST = ("groups", "bandwidth", "agreement")


def _measure_as_two_nodes(names: tuple[str, ...]) -> dict[str, Any]:
    """On a worker, each of which counts as a node of its own."""
    place = Place(grid_for(1), 1, 2, on_gpu=False)
    return {p.name: p.measure(place) for p in node_parts.all_parts() if p.name in names}


def _judged(found: dict[str, list[Any]], on_gpu: bool = False) -> NodesChecklist:
    checklist = NodesChecklist(on_gpu)
    for part in node_parts.all_parts():
        if part.name in found:
            part.judge(checklist, found)
    return checklist


@pytest.fixture(scope="module")
def measured(distributed: Distributed) -> dict[str, list[Any]]:
    ranks = distributed(2, _measure_as_two_nodes, FAST)
    for rank, found in enumerate(ranks):
        found["groups"]["host"] = f"node{rank}"
    return {name: [json.loads(json.dumps(found[name])) for found in ranks] for name in FAST}


def test_two_nodes_that_are_well_have_no_problem(measured: dict[str, list[Any]]) -> None:
    checklist = _judged(measured)
    assert checklist.problems == []
    named = {what for what, *_ in checklist.checks}
    assert {"ranks of a node are neighbours", "sums over groups"} <= named
    assert [row[0] for row in checklist.rows] == ["sum over all ranks"] * 2 + [
        "sum over one rank of each node"
    ] * 2
    assert "## Sums over ranks" in checklist.page(1.0)


def _changed(found: dict[str, list[Any]], name: str, **values: Any) -> dict[str, list[Any]]:
    """The second rank's finding is another one."""
    first, second = found[name]
    return {name: [first, second | values]}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"torch": "2.0"}, "builds of torch"),
        ({"wrong": ["all ranks on cuda: 0.0, not 1"]}, "rank 1: all ranks on cuda: 0.0, not 1"),
    ],
)
def test_what_differs_between_nodes_is_a_problem(
    measured: dict[str, list[Any]], values: dict[str, Any], problem: str
) -> None:
    (told,) = _judged(_changed(measured, "groups", **values)).problems
    assert problem in told


def test_ranks_of_a_node_that_are_not_neighbours_are_a_problem() -> None:
    rank = {"torch": "2", "nccl": "2", "device": "", "wrong": [], "on_gpu": False}
    found = [rank | {"host": host} for host in ("a", "b", "a", "b")]
    (told,) = _judged({"groups": found}).problems
    assert "neighbours is a, b, a, b" in told


def test_two_ranks_on_one_gpu_are_a_problem() -> None:
    rank = {"torch": "2", "nccl": "2", "wrong": [], "on_gpu": True, "host": "a"}
    found = [rank | {"device": "GPU-1"}, rank | {"device": "GPU-1"}]
    assert _judged({"groups": found}).problems == ["GPUs in use is 1, not 2"]


@pytest.mark.parametrize(("seconds", "holds"), [(0.035, True), (0.5, False)])
def test_a_network_far_below_its_data_sheet_is_a_problem(seconds: float, holds: bool) -> None:
    sums = {"one rank of each node": {"ranks": 2, "seconds": {str(2**30): seconds}}}
    rank = {"device": "NVIDIA H100 80GB HBM3", "seconds": sums}
    checklist = _judged({"bandwidth": [rank, rank]}, on_gpu=True)
    assert bool(checklist.problems) is not holds
    assert "at least 25.0 GB/s" in checklist.checks[0]


def test_losses_and_speed_are_compared_with_one_nodes() -> None:
    alone = {"losses of one node": [{"data-parallel": [6.0, 5.0]}], "speed of one node": [100.0]}
    good = alone | {"losses": [{"data-parallel": [6.0, 5.0001]}], "speed": [95.0, 90.0]}
    bad = alone | {"losses": [{"data-parallel": [6.0, 5.1]}], "speed": [95.0, 40.0]}
    assert _judged(good, on_gpu=True).problems == []
    assert len(_judged(bad, on_gpu=True).problems) == 2


def test_without_a_launcher_there_are_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["gpu", "--nodes"]
    arguments = benchmark.new_parser(words).parse_args(words)
    with pytest.raises(LaunchError, match="torchrun --nnodes N"):
        arguments.run(arguments)


def test_deepspeed_may_name_the_local_rank() -> None:
    words = ["--local_rank=1", "gpu", "--nodes"]
    assert benchmark.new_parser(words).parse_args(words).nodes


def _launch(program: list[str], ranks_of_a_node: int) -> str:
    """By two launchers on this machine, which stand for two nodes; what the first one prints."""
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    started = []
    for node in ("0", "1"):
        start = ["torchrun", "--nnodes", "2", "--nproc_per_node", str(ranks_of_a_node)]
        start += ["--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
        process = subprocess.Popen(
            [*start, *program],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
    texts = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    return texts[0]


@pytest.mark.long
def test_every_part_runs_under_a_launcher(tmp_path: Path) -> None:
    record, page = tmp_path / "nodes.json", tmp_path / "nodes.md"
    program = ["tools/benchmark.py", "gpu", "--nodes", "--json", str(record), "--page", str(page)]
    _launch(program, 2)
    found = json.loads(record.read_text())
    assert found["problems"] == []
    assert list(found["found"]) == [part.name for part in node_parts.all_parts()]
    assert (found["ranks"], found["ranks_of_a_node"]) == (4, 2)
    alone, losses = (found["found"][name] for name in ("losses of one node", "losses"))
    assert (len(alone), len(losses)) == (2, 4)
    assert alone[0] != losses[0]  # they are sums in another order
    assert set(losses[0]) == {"data-parallel", "tensor-parallel over 2"}
    assert "# Several nodes" in page.read_text()


BROKEN = """
import os, sys, time
from tools.benchmarks.node_parts import Part, judge_nothing
from tools.benchmarks.nodes import NodesChecklist, Ranks, measure

def raises(place):
    if place.grid.rank == 1:
        raise ValueError("no such thing")
    time.sleep(600)

def dies(place):
    if place.grid.rank == 1:
        os._exit(1)
    time.sleep(600)

def hangs(place):
    time.sleep(600)

def works(place):
    return place.grid.rank

if __name__ == "__main__":
    ranks, checklist = Ranks(), NodesChecklist(False)
    minutes = {raises: 5, dies: 5, hangs: 0.1, works: 5}  # no machine is too slow for the others
    parts = [Part(f.__name__, f, judge_nothing, limit) for f, limit in minutes.items()]
    found = measure(ranks, checklist, parts)
    if ranks.rank == 0:
        print("FOUND", found, *checklist.problems, sep="\\n")
"""


@pytest.mark.long
def test_a_part_that_fails_dies_or_hangs_does_not_stop_the_rest(tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    shown = _launch([str(program)], 1)
    found, raised, died, hung = shown.split("FOUND\n")[1].splitlines()[:4]
    assert found == "{'works': [0, 1]}", shown
    assert raised == "raises: ValueError: no such thing"
    assert died.startswith("dies: rank 1 on ")
    assert died.endswith("its process ended without a message")
    assert hung.endswith("no answer after 0.1 minutes")
