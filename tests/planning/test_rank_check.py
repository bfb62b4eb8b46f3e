"""A grid of 64 ranks, of which none exists: every rank does the same, and one that does not is
found.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaegpt.config import RunConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.rank_check import (
    Collective,
    CollectiveRecorder,
    RankRecord,
    as_rank,
    choose_ranks,
    find_differences,
    record_rank,
)
from tests.distributed.harness import CONTEXT
from tests.tiny.engines import make_engine, micro_batches, run_config

WORLD, TP = 64, 8
SOME = [0, 7, 9, 63]


def _config(sequence: bool = True, stage: int = 2, **model: Any) -> RunConfig:
    """Every rank has tokens of the vocabulary: without, its loss is not a number here, as no other
    rank's sum reaches it.
    """
    return run_config(
        model={"num_heads": TP, "vocab_size": 128} | model,
        parallel={
            "tensor_parallel_size": TP,
            "sequence_parallel": sequence,
            "zero_stage": stage,
        },
        training={"global_batch_size": 32, "micro_batch_size": 2, "precision": "bf16"},
    )


_LLAMA: dict[str, Any] = {
    "norm": "rms_norm",
    "mlp": "swiglu",
    "positions": "rotary",
    "num_kv_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        _config(),
        pytest.param(_config(sequence=False, **_LLAMA), marks=pytest.mark.long),
        pytest.param(_config(kind="egpt", tied_embeddings=False), marks=pytest.mark.long),
        pytest.param(_config(**_LLAMA), marks=pytest.mark.long),
    ],
    ids=["gpt, sequence-parallel", "llama", "egpt, sequence-parallel", "llama, sequence-parallel"],
)
def test_ranks_of_a_grid_have_their_slices_and_call_the_same(config: RunConfig) -> None:
    records = [record_rank(config, rank, WORLD, "bf16") for rank in SOME]
    assert find_differences(records) == []
    for record in records:
        first = record.rank // TP * TP
        assert {call.group for call in record.calls} == {tuple(range(first, first + TP))}
    calls = {call.operator for call in records[0].calls}
    assert ("_reduce_scatter_base_" in calls) == config.parallel.sequence_parallel
    assert not dist.is_initialized()


def test_a_rank_under_another_configuration_is_found() -> None:
    config = _config()
    records = [record_rank(config, rank, WORLD, "bf16") for rank in (0, 9)]
    for other, words in (
        (_config(sequence=False), "rank 9: collective 0 is allreduce_"),
        (_config(num_layers=3), "rank 9: unlike rank 0 in stack.blocks.2"),
    ):
        mutated = record_rank(other, 9, WORLD, "bf16")
        (first, *_) = find_differences([records[0], mutated])
        assert first.startswith(words)
    assert find_differences(records) == []


def _records() -> list[RankRecord]:
    """Of two tensor-parallel groups of two."""
    shapes = {"weight": (4, 2)}
    return [
        RankRecord(
            rank,
            shapes,
            shapes,
            [
                Collective(
                    "allreduce_", (((3,), torch.float32),), (rank // 2 * 2, rank // 2 * 2 + 1)
                ),
                Collective("allreduce_", (((5,), torch.float32),), (rank % 2, rank % 2 + 2)),
            ],
        )
        for rank in range(4)
    ]


def _changed(number: int, **values: Any) -> list[Collective]:
    calls = list(_records()[3].calls)
    calls[number] = dataclasses.replace(calls[number], **values)
    return calls


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calls": _changed(0, operator="broadcast_")}, "collective 0 is broadcast_"),
        ({"calls": _changed(1, tensors=(((6,), torch.float32),))}, "collective 1 is"),
        ({"calls": _changed(1, tensors=(((5,), torch.bfloat16),))}, "collective 1 is"),
        ({"calls": list(reversed(_records()[3].calls))}, "collective 0 is"),  # order alone
        ({"calls": _records()[3].calls[:1]}, "makes 1 collectives, rank 0 2"),
        ({"calls": _changed(0, group=(0, 1))}, "without being one of [0, 1]"),
        ({"shapes": {"weight": (2, 2)}}, "weight is [2, 2], and should be [4, 2]"),
        ({"shapes": {}}, "unlike rank 0 in weight"),
    ],
)
def test_each_kind_of_difference_is_named(changes: dict[str, Any], words: str) -> None:
    records = _records()
    assert find_differences(records) == []
    records[3] = dataclasses.replace(records[3], **changes)
    found = find_differences(records)
    assert found
    assert all(line.startswith("rank 3: ") for line in found)
    assert words in found[0]


@pytest.mark.parametrize("count", [1, 12, 64, 1000])
def test_ranks_to_check_hold_a_whole_tensor_parallel_group_and_the_last(count: int) -> None:
    chosen = choose_ranks(WORLD, TP, count)
    assert {*range(TP), WORLD - 1} <= set(chosen)
    assert len(chosen) == min(WORLD, max(count, TP + 1))


# -- the engine, with DeepSpeed's own collectives


def _train(config: RunConfig, ranks: list[int], odd: int | None, results: Any) -> None:
    """In a process of its own, as DeepSpeed keeps what it knows of a grid: steps of single ranks of
    64, on real tensors; ``odd`` has half of the micro-batches.
    """
    os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    records = []
    for rank in ranks:
        with as_rank(rank, WORLD):
            grid = ProcessGrid.create(TP)
            engine = make_engine(config, grid)
            batches = micro_batches(0, config, grid)
            with CollectiveRecorder() as recorder:
                engine.train_step(0, batches[: 1 if rank == odd else None])
            shapes = {name: tuple(p.shape) for name, p in engine.model.named_parameters()}
            records.append(RankRecord(rank, shapes, shapes, recorder.calls))
    groups = [len({call.group for call in record.calls}) for record in records]
    results.send((find_differences(records), groups, [len(r.calls) for r in records]))


def _differences(config: RunConfig, ranks: list[int], odd: int | None = None) -> Any:
    receiving, sending = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_train, args=(config, ranks, odd, sending), daemon=True)
    process.start()
    sending.close()
    try:
        assert receiving.poll(300)
        return receiving.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.long
def test_engines_of_a_grid_call_the_same_in_a_step() -> None:
    differences, groups, calls = _differences(_config(), SOME)
    assert differences == []
    assert groups == [2] * len(SOME)  # tensor-parallel and data-parallel
    assert len(set(calls)) == 1


def test_an_engine_that_accumulates_less_than_the_others_is_found() -> None:
    differences, _, _ = _differences(_config(), [0, 9], odd=9)
    assert len(differences) == 1
    assert differences[0].startswith("rank 9: ")


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
def test_all_engines_of_a_grid_call_the_same(stage: int) -> None:
    differences, _, calls = _differences(_config(stage=stage, **_LLAMA), list(range(WORLD)))
    assert differences == []
    assert len(calls) == WORLD
