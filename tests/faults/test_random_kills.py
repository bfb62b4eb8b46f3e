"""kill -9 at random moments of training and saving: nothing is lost, and the curve is the same.

Two kills by default; ``MEGAEGPT_KILLS=100`` makes it a hundred (minutes).
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megaegpt.config.run import RunConfig
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.checkpoint.manifest import Manifest, verify_files
from tests.faults.processes import Ranks, train
from tests.tiny.runs import corpus, losses, records, run_config

__all__ = ["corpus"]

KILLS = int(os.environ.get("MEGAEGPT_KILLS", "2"))
STEPS = 16
MOMENTS = ["at any time", "while training", "while saving"]
VICTIMS = [(0, 1), (0,), (1,)]
"""Both ranks at once, as a machine does, or one, after which the other must end by itself. (Before
they have found each other only a launcher can know of both.)"""
ENDING_S = 60


def _config(corpus: Path, folder: Path) -> RunConfig:
    return run_config(
        "gpt",
        corpus,
        folder,
        training={"steps": STEPS, "eval_interval": 8, "global_batch_size": 4},
        checkpoint={"interval": 2},
        logging={"interval": 3},
    )


@dataclass
class KilledRun:
    """One run that is killed and started again until it is complete."""

    corpus: Path
    folder: Path
    dice: random.Random
    starting: float = 2.0
    """Seconds to the first step."""
    period: float = 0.1
    """Seconds from one checkpoint to the next."""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.config = _config(self.corpus, self.folder)
        self.checkpoints = CheckpointManager(self.config.checkpoint.directory, keep=1)

    def saved(self) -> int:
        """Steps that the latest checkpoint holds, every byte of which is looked at."""
        latest = self.checkpoints.latest()
        if latest is None:
            return 0
        manifest = Manifest.read(latest)
        verify_files(manifest.files, latest)
        return manifest.step

    def live(self, kill: bool) -> bool:
        """Start, and kill at a random moment if asked; whether it was killed."""
        before = self.saved()
        ranks = Ranks(2, self.folder, train, self.config)
        killed = kill and self._wait(ranks, self.dice.choice(MOMENTS))
        if killed:
            joined = "trainable parameters" in ranks.shown(0)
            victims = self.dice.choice(VICTIMS) if joined else (0, 1)
            ranks.kill(*victims)
            codes = ranks.wait(ENDING_S)
            assert None not in codes, f"rank {codes.index(None)} went on alone"
        else:
            assert ranks.wait(600) == [0, 0], ranks.shown(0) + ranks.shown(1)
        announced = re.findall(r"saved \S+step_(\d+) in", ranks.shown(0))
        assert self.saved() >= max([before, *map(int, announced)])
        return killed

    def _wait(self, ranks: Ranks, moment: str) -> bool:
        """Until a random moment of this kind; False if the run was complete before."""
        if moment == "at any time":
            time.sleep(self.dice.uniform(0, 1.5 * self.starting))
        else:
            self._until(ranks, lambda: "| loss" in ranks.shown(0))
            time.sleep(self.dice.uniform(0, 4 * self.period))
        if moment == "while saving":
            directory = self.checkpoints.directory
            self._until(ranks, lambda: any(directory.glob(".*-step_*")))
            time.sleep(self.dice.uniform(0, self.period / 2))
        return any(process.is_alive() for process in ranks.processes)

    def _until(self, ranks: Ranks, condition: Callable[[], bool]) -> None:
        while ranks.processes[0].is_alive() and not condition():
            time.sleep(0.002)

    def measure(self) -> None:
        """Live undisturbed, and take the times that kills are drawn from."""
        began = time.monotonic()
        ranks = Ranks(2, self.folder, train, self.config)
        self._until(ranks, lambda: "| loss" in ranks.shown(0))
        first = time.monotonic()
        assert ranks.wait(600) == [0, 0], ranks.shown(0) + ranks.shown(1)
        self.starting = first - began
        self.period = (time.monotonic() - first) * self.config.checkpoint.interval / STEPS


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    corpus: Path, tmp_path: Path
) -> None:
    dice = random.Random(os.environ.get("MEGAEGPT_KILLS_SEED", "0"))
    straight = KilledRun(corpus, tmp_path / "straight", dice)
    straight.measure()
    assert sorted(losses(straight.folder)) == list(range(1, STEPS + 1))
    kills, runs, lives = 0, 0, []
    while kills < KILLS:
        folder = tmp_path / f"killed_{runs}"
        run = KilledRun(corpus, folder, dice, straight.starting, straight.period)
        while run.saved() < STEPS:
            before = run.saved()
            killed = run.live(kill=kills < KILLS)
            kills += killed
            lives += [run.saved() - before] if killed else []
        run.live(kill=False)  # what was killed after its last checkpoint has its last evaluation
        _assert_same(straight, run)
        runs += 1
    print(f"{kills} kills over {runs} runs of {STEPS} steps; steps saved by each life: {lives}")


def _assert_same(straight: KilledRun, killed: KilledRun) -> None:
    for name in ("loss", "grad_norm", "lr", "validation_loss"):
        curves = [
            [(r["step"], r[name]) for r in records(run.folder) if name in r]
            for run in (straight, killed)
        ]
        assert curves[0] == curves[1], name
    weights = [
        run.checkpoints.directory / f"step_{STEPS:08d}/weights/model.safetensors"
        for run in (straight, killed)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.long
def test_a_rank_that_waits_for_a_killed_ones_part_of_the_weights_ends(
    corpus: Path, tmp_path: Path
) -> None:
    config = _config(corpus, tmp_path)
    zero = {"stage3_param_persistence_threshold": 0}  # or all of so small a model stays whole
    config = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, zero_stage=3),
        deepspeed={"zero_optimization": zero},
    )
    ranks = Ranks(2, tmp_path, train, config)
    while ranks.processes[0].is_alive() and "saved" not in ranks.shown(0):
        time.sleep(0.002)
    ranks.kill(1)
    codes = ranks.wait(ENDING_S)
    assert None not in codes
    assert codes[0] != 0
    assert Ranks(2, tmp_path, train, config).wait(600) == [0, 0]
    assert sorted(losses(tmp_path)) == list(range(1, STEPS + 1))
