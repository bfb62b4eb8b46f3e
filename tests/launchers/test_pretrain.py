"""``launchers/pretrain.py`` and the programs beside it, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megaegpt.config.loading import config_to_yaml
from megaegpt.config.run import RunConfig
from tests.data.corpora import write_shard
from tests.faults.processes import Ranks, train
from tests.tiny.runs import corpus, losses, records, run_config
from tools import precompute_features
from tools.benchmarks.processes import free_port

__all__ = ["corpus"]

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT["PATH"] = f"{SCRIPTS}{os.pathsep}{ENVIRONMENT['PATH']}"


def _command(launcher: str, program: str, *arguments: str) -> list[str]:
    start = {
        "python": [sys.executable],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())],
        "elastic": ["torchrun", "--nproc_per_node", "2", "--standalone", "--max-restarts", "1"],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
    }[launcher]
    return [*start, program, *arguments]


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def _start(launcher: str, *arguments: str) -> subprocess.Popen[str]:
    """``launchers/pretrain.py``, not waited for."""
    return subprocess.Popen(
        _command(launcher, "launchers/pretrain.py", *arguments),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Until something is written there."""
    while not file.exists() or not file.stat().st_size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _write_config(folder: Path, kind: str, corpus: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    config = run_config(kind, corpus, folder / "run", **changes)
    path.write_text(config_to_yaml(config))
    return path


def _train_alone(config: RunConfig) -> dict[int, float]:
    """In one process, without a launcher; its losses by step."""
    folder = Path(config.logging.directory)
    folder.mkdir()
    ranks = Ranks(1, folder, train, config)
    assert ranks.wait(120) == [0], ranks.shown(0)
    return losses(folder)


def test_a_run_is_the_same_under_every_launcher(corpus: Path, tmp_path: Path) -> None:
    changes = {"model": {"dropout": 0.0}}  # its masks depend on the number of ranks, no other thing
    found = {"python": _train_alone(run_config("egpt", corpus, tmp_path / "alone", **changes))}
    for launcher in ("torchrun", "deepspeed"):
        folder = tmp_path / launcher
        folder.mkdir()
        config = _write_config(folder, "egpt", corpus, **changes)
        done = _run(*_command(launcher, "launchers/pretrain.py", "--config", str(config)))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 00006/00006") == 1
        found[launcher] = losses(folder / "run")
    assert sorted(found["python"]) == [1, 2, 3, 4, 5, 6]
    assert found["torchrun"] == found["deepspeed"]
    assert found["python"] == pytest.approx(found["torchrun"], rel=1e-5)


def test_an_error_is_one_line_from_one_rank_and_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    config = _write_config(tmp_path, "gpt", corpus)
    wrong = ["--config", str(config), "data.train=[nowhere]"]
    done = _run(*_command("torchrun", "launchers/pretrain.py", *wrong))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error: no shards at nowhere" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert 'pretrain.py", line' not in done.stderr


def test_wrong_arguments_and_keys_exit_with_2() -> None:
    for arguments, words in [
        (["--config", "configs/gpt2_124m.yaml", "--resumee"], "--resumee"),
        (["--config", "configs/gpt2_124m.yaml", "training.stesp=1"], "training.steps"),
        ([], "--config"),
    ]:
        done = _run(sys.executable, "launchers/pretrain.py", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_number_of_processes_left_over_in_a_shell_is_named(corpus: Path, tmp_path: Path) -> None:
    config = _write_config(tmp_path, "gpt", corpus)  # 4 x 3 sequences would not be its batch
    command = (sys.executable, "launchers/pretrain.py", "--config", str(config))
    for rank in ({}, {"RANK": "1"}):
        done = _run(*command, WORLD_SIZE="3", **rank)
        assert done.returncode == 2
        assert "WORLD_SIZE=3 set, but not " in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_dry_run_shows_everything_and_starts_nothing(corpus: Path, tmp_path: Path) -> None:
    config = _write_config(tmp_path, "egpt", corpus)
    command = [sys.executable, "launchers/pretrain.py", "--config", str(config), "--dry-run"]
    done = _run(*command, "training.steps=12", WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr
    for words in (
        "steps: 12",
        "10,944 trainable parameters over a frozen encoder of 8,768",
        "2 = 1 tensor-parallel x 2 data-parallel",
        "FLOP a token",
        "GiB a rank",
    ):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()


def _endless_run(folder: Path, corpus: Path) -> Path:
    """A configuration that saves when it is stopped and not before."""
    return _write_config(
        folder,
        "gpt",
        corpus,
        training={"steps": 100_000, "eval_interval": 100_000},
        checkpoint={"interval": 0},
        logging={"interval": 1},
    )


@pytest.mark.long
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    config = _endless_run(tmp_path, corpus)
    process = _start("torchrun", "--config", str(config), "--resume")
    _wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=600)
    assert "stopped by SIGTERM after step" in shown
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    done = int(latest.removeprefix("step_"))
    assert f"stopped by SIGTERM after step {done} of" in shown
    assert max(losses(tmp_path / "run")) == done


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_ctrl_c_that_ends_tee_too_saves(corpus: Path, tmp_path: Path, launcher: str) -> None:
    """A terminal sends it to all that is in the foreground."""
    config = _endless_run(tmp_path, corpus)
    command = _command(launcher, "launchers/pretrain.py", "--config", str(config))
    process: subprocess.Popen[str] = subprocess.Popen(
        ["bash", "-c", '"$@" 2>&1 | tee "$0"', str(tmp_path / "log"), *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        # A shell's background job, as a test may be, ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    _wait_for(tmp_path / "run" / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(120)
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert max(losses(tmp_path / "run")) == int(latest.removeprefix("step_"))


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_killed_launcher_takes_its_ranks_along_and_the_run_goes_on_at_once(
    corpus: Path, tmp_path: Path, launcher: str
) -> None:
    changes: dict[str, Any] = {
        "training": {"steps": 100_000, "eval_interval": 100_000},
        "checkpoint": {"interval": 0},
        "logging": {"interval": 20},
    }
    config = _write_config(tmp_path, "gpt", corpus, **changes)
    process = _start(launcher, "--config", str(config))
    _wait_for(tmp_path / "run" / "metrics.jsonl", process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    ranks = Ranks(1, tmp_path, train, run_config("gpt", corpus, tmp_path / "run", **changes), 0.0)
    assert ranks.wait(120) == [0], ranks.shown(0)
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    done = int(latest.removeprefix("step_"))
    assert f"resuming after step {done}\n" in ranks.shown(0)
    steps = [record["step"] for record in records(tmp_path / "run") if "loss" in record]
    assert steps == list(range(1, done + 1))
    _, alive = psutil.wait_procs(started, timeout=600)
    assert not alive


@pytest.mark.long
def test_torchrun_starts_all_ranks_again_when_one_was_killed(corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "training": {"steps": 20, "eval_interval": 20},
        "checkpoint": {"interval": 5},
    }
    config = _write_config(tmp_path, "gpt", corpus, **changes)
    process = _start("elastic", "--config", str(config), "--resume")
    _wait_for(tmp_path / "run" / "checkpoints" / "latest", process)
    victim, *_ = [
        child
        for child in psutil.Process(process.pid).children()
        if child.environ().get("RANK") == "1"
    ]
    victim.kill()
    shown, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert errors.count("error: rank 1 of 2 ended without a message") == 1, errors
    assert "resuming after step" in shown
    straight = run_config("gpt", corpus, tmp_path / "straight", **changes)
    ranks = Ranks(2, tmp_path, train, straight)
    assert ranks.wait(120) == [0, 0], ranks.shown(0)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_features_are_computed_by_all_ranks_then_checked_and_others_refused(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _write_config(tmp_path, "egpt", corpus)
    program = "tools/precompute_features.py"
    done = _run(*_command("torchrun", program, "--config", str(config)))
    assert done.returncode == 0, done.stderr
    store = tmp_path / "run" / "features" / "train"
    manifest = (store / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [program, "--config", str(config), "--verify"])
    precompute_features.main()
    assert f"{store}: 125 chunks, verified" in capsys.readouterr().out
    assert (store / "manifest.json").stat().st_mtime_ns == manifest
    short = write_shard(tmp_path / "short", [np.arange(7)])
    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], f"data.validation={short}"])
    precompute_features.main()
    assert "validation: nothing to store, 7 of a chunk's 8 tokens" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "model.egpt.chunk_size=4"])
    with pytest.raises(SystemExit, match="2"):
        precompute_features.main()
    assert "chunk_size is 8 there and 4 here" in capsys.readouterr().err


@pytest.mark.long
def test_evaluate_gives_the_loss_that_training_recorded(corpus: Path, tmp_path: Path) -> None:
    vocabulary = {"vocab_size": 50257, "dropout": 0.0}
    training = {"steps": 3, "eval_interval": 3}
    _train_alone(run_config("gpt", corpus, tmp_path / "run", model=vocabulary, training=training))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--data", str(corpus / "validation")]
    result = tmp_path / "result.json"
    done = _run(*_command("torchrun", "tools/evaluate.py", *arguments, "--json", str(result)))
    assert done.returncode == 0, done.stderr
    recorded = [r for r in records(tmp_path / "run") if "validation_loss" in r][-1]
    values = json.loads(result.read_text())
    assert values["loss"] == pytest.approx(recorded["validation_loss"], rel=1e-6)
    assert values["nats_per_byte"] == pytest.approx(recorded["validation_nats_per_byte"], rel=1e-6)
