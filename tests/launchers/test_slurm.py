"""``launchers/slurm/pretrain.sbatch`` with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launchers" / "slurm" / "pretrain.sbatch"

# srun starts one task here; scancel passes its signal on to it.
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 exec "$@"
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >> calls\nkill -USR1 "$(cat rank.pid)"\n'
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node-a; echo node-b; else echo "scontrol $*" >> calls; fi
"""
# Two ranks that end with 2, the second later. srun gives the highest code, of a rank it ends 143.
FAILING_SRUN = """#!/bin/bash
for option in "$@"; do [ "$option" = --kill-on-bad-exit=0 ] && leaves=1; done
sleep 0.1 & second=$!
[ -n "$leaves" ] || kill "$second"
wait "$second" && exit 2
exit 143
"""
RANK = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > seen
trap 'exit 0' USR1
echo $$ > rank.pid
for _ in $(seq "$LIVES"); do sleep 0.02; done
exit "$CODE"
"""


@pytest.fixture
def job(tmp_path: Path):
    """Start the script in a folder of stand-ins."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        _write(tmp_path / "bin" / name, text)
    _write(tmp_path / ".venv" / "bin" / "python", RANK)

    def start(code: int = 0, lives: int = 1, **more: str) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "CODE": str(code),
            "LIVES": str(lives),
        }
        command = ["bash", str(SCRIPT), "--config", "run.yaml", "training.steps=7"]
        return subprocess.Popen(command, env=environment | more)

    return start


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _calls(folder: Path) -> list[str]:
    calls = folder / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_ranks_get_their_place_and_the_commands_arguments(job, tmp_path: Path) -> None:
    assert job().wait(30) == 0
    assert (tmp_path / "seen").read_text().split() == [
        *("3", "1", "4", "node-a", "21234"),
        *("launchers/pretrain.py", "--config", "run.yaml", "training.steps=7", "--resume"),
    ]
    assert _calls(tmp_path) == []


def test_ranks_get_the_cores_of_the_job(job, tmp_path: Path) -> None:
    """srun has not taken them over from the job since Slurm 22.05, but reads a variable."""
    looking = '#!/bin/bash\necho "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS $1" > cores\n'
    _write(tmp_path / "bin" / "srun", looking)
    assert job(SLURM_CPUS_PER_TASK="8").wait(30) == 0
    assert (tmp_path / "cores").read_text().split() == ["8", "8", "--distribution=block"]


def test_a_rank_that_is_stuck_leaves_its_collectives_where_the_log_is(job, tmp_path: Path) -> None:
    looking = '#!/bin/bash\necho "$TORCH_FR_BUFFER_SIZE $TORCH_NCCL_DUMP_ON_TIMEOUT" > seen\n'
    looking += 'echo "$TORCH_FR_DUMP_TEMP_FILE" >> seen\n'
    _write(tmp_path / "bin" / "srun", looking)
    assert job().wait(30) == 0
    expected = ["2000 1", f"{tmp_path}/megaegpt-41234-collectives-"]
    assert (tmp_path / "seen").read_text().splitlines() == expected


def test_near_the_limit_ranks_are_told_and_the_job_is_requeued(job, tmp_path: Path) -> None:
    running = job(code=9, lives=1000)
    while not (tmp_path / "rank.pid").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(30) == 0
    assert _calls(tmp_path) == ["scancel --signal=USR1 41234", "scontrol requeue 41234"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(1, 0, True), (137, 9, True), (137, 10, False), (2, 0, False)],
)
def test_dead_ranks_are_tried_again_but_not_mistakes_nor_for_ever(
    job, tmp_path: Path, code: int, restarts: int, requeued: bool
) -> None:
    assert job(code, SLURM_RESTART_COUNT=str(restarts)).wait(30) == code
    assert _calls(tmp_path) == (["scontrol requeue 41234"] if requeued else [])


def test_a_mistake_on_all_ranks_is_no_dead_rank_though_one_ends_first(job, tmp_path: Path) -> None:
    _write(tmp_path / "bin" / "srun", FAILING_SRUN)
    assert job().wait(30) == 2
    assert _calls(tmp_path) == []
