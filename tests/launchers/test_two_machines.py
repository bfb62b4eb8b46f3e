"""Two network namespaces are two machines: train on both, lose one, go on.

A minute or two, so only with ``MEGAEGPT_NODES=1``, and where namespaces may be made.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaegpt.config.loading import config_to_yaml
from tests.tiny.runs import corpus, losses, run_config

__all__ = ["corpus"]

ROOT = Path(__file__).parents[2]
NODES = {"megaegpt-a": "10.213.7.1", "megaegpt-b": "10.213.7.2"}
HOSTS = Path("/etc/netns")  # files in its folder NAME stand over those of /etc in namespace NAME
STEPS, ENDING_S = 60, 60


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Two namespaces with a cable between them. As on Debian, the name of each machine is one for
    its loopback address, which leads to no other machine.
    """
    if not os.environ.get("MEGAEGPT_NODES"):
        pytest.skip("set MEGAEGPT_NODES=1 to train over two network namespaces")
    first, second = NODES
    try:
        for name in NODES:
            _ip("netns", "add", name)
            (HOSTS / name).mkdir(parents=True)
            hosts = f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n"
            (HOSTS / name / "hosts").write_text(hosts)
        _ip(
            "link", "add", "egpt0", "netns", first, "type", "veth", "peer", "egpt0", "netns", second
        )
        for name, address in NODES.items():
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "egpt0")
            for device in ("lo", "egpt0"):
                _ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        _remove()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield
    _remove()


def _remove() -> None:
    for name in NODES:
        _lose(name)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(HOSTS / name, ignore_errors=True)


def _lose(node: str) -> None:
    """kill -9 to every process of a machine."""
    found = subprocess.run(
        ["ip", "netns", "pids", node], capture_output=True, text=True, check=False
    )
    for pid in map(int, found.stdout.split()):
        os.kill(pid, signal.SIGKILL)


def _start(
    launcher: str, node: int, port: int, folder: Path, config: Path
) -> subprocess.Popen[str]:
    name, master = list(NODES)[node], NODES["megaegpt-a"]
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{address} slots=2\n" for address in NODES.values()))
    at = ["--node_rank", str(node), "--master_addr", master, "--master_port", str(port)]
    start = {
        "torchrun": ["torchrun", "--nnodes", "2", "--nproc_per_node", "2", *at],
        "deepspeed": ["deepspeed", "--hostfile", str(hosts), "--no_ssh", *at],
    }[launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    program = ["launchers/pretrain.py", "--config", str(config), "--resume"]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *start, *program],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_run_on_two_machines_survives_the_loss_of_one(
    corpus: Path, tmp_path: Path, launcher: str, network: None
) -> None:
    run = run_config(
        "gpt",
        corpus,
        tmp_path / "run",
        model={"dropout": 0.0},
        parallel={"tensor_parallel_size": 2},
        training={"steps": STEPS, "eval_interval": STEPS},
        checkpoint={"interval": 5},
    )
    config = tmp_path / "run.yaml"
    config.write_text(config_to_yaml(run))
    both = [_start(launcher, node, 29511, tmp_path, config) for node in (0, 1)]
    latest = tmp_path / "run" / "checkpoints" / "latest"
    while not latest.exists():
        assert both[0].poll() is None, both[0].communicate()[0]
        time.sleep(0.01)
    _lose("megaegpt-b")
    shown, _ = both[0].communicate(timeout=ENDING_S)
    both[1].communicate()
    assert both[0].returncode != 0
    assert shown.count("error: rank") == 1, shown
    assert "of 4 ended without a message" in shown
    assert 'pretrain.py", line' not in shown  # no rank complains about its connection
    again = [_start(launcher, node, 29513, tmp_path, config) for node in (0, 1)]
    texts = [process.communicate(timeout=600)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], texts
    assert "resuming after step" in texts[0]
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    alone = tmp_path / "one"
    changes = [f"logging.directory={alone}", f"checkpoint.directory={alone}/checkpoints"]
    changes.append("parallel.tensor_parallel_size=1")
    subprocess.run(
        [sys.executable, "launchers/pretrain.py", "--config", str(config), *changes],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
