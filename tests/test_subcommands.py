"""The command ``megaegpt``, and the wheel that brings it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from megaegpt import __version__
from megaegpt.subcommands import SUBCOMMANDS, main

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "launchers")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
}


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``megaegpt WORDS``."""
    with pytest.raises(SystemExit) as end:
        main(words)
    output = capsys.readouterr()
    return int(end.value.code or 0), output.out, output.err


def test_every_program_has_one_command() -> None:
    assert sorted(SUBCOMMANDS.values()) == sorted(PROGRAMS)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_has_a_sentence_for_each(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(words, capsys)
    lines = out.splitlines()[2:]
    assert code == 0
    assert [line.split()[0] for line in lines] == list(SUBCOMMANDS)
    assert all(line.endswith(".") for line in lines)
    assert "`" not in out


def test_an_unknown_command_is_named_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(["pretrian", "--config", "a"], capsys)
    assert (code, out) == (2, "")
    assert err == "error: 'pretrian' is not a command of megaegpt: did you mean pretrain?\n"
    assert "megaegpt --help" in run(["?"], capsys)[2]


@pytest.mark.parametrize(("output", "code"), [("| true", 141), ("> /dev/full", 2)])
def test_help_that_cannot_be_shown_makes_no_traceback(output: str, code: int) -> None:
    command = f'{sys.executable} -m megaegpt --help {output}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys)[1] == f"megaegpt {__version__}\n"


def test_a_command_runs_its_program_under_its_own_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # put back afterwards
    monkeypatch.setattr(sys, "argv", [])
    code, out, _ = run(["compare", "--help"], capsys)
    assert code == 0
    assert out.startswith("usage: megaegpt compare ")
    code, _, err = run(["compare", "no/such/run"], capsys)
    assert code == 2
    assert "no/such/run" in err


def test_what_deepspeed_puts_before_the_command_reaches_its_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", [])
    _, _, err = run(["--local_rank=1", "pretrain", "--config", "no/such.yaml"], capsys)
    assert "no/such.yaml" in err
    assert sys.argv == ["megaegpt pretrain", "--local_rank=1", "--config", "no/such.yaml"]


def test_help_imports_nothing_of_the_programs() -> None:
    code = (
        "import sys, megaegpt.subcommands as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'yaml', 'megaegpt.config') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_launchers_can_start_it_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megaegpt", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"megaegpt {__version__}\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: setuptools leaves its folders beside them."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("megaegpt", "tools", "launchers", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True)
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.mark.long
def test_a_wheel_has_the_programs_and_configurations_inside_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "megaegpt",
        f"megaegpt-{__version__}.dist-info",
    }
    configs = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    inside = {f"megaegpt/programs/{name}" for name in configs | PROGRAMS}
    assert inside <= names
    assert {"megaegpt/programs/tools/benchmarks/train.py", "megaegpt/api.py"} <= names
    assert "megaegpt/serving/page.html" in names
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.long
def test_an_installed_wheel_runs_the_main_job_from_another_folder(
    wheel: Path, tmp_path: Path
) -> None:
    """In an environment that has the wheel alone, and sees the packages that it needs."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    alone = ["--no-deps", "--no-index", str(wheel)]
    subprocess.run([python, "-m", "pip", "install", *alone], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    work.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def megaegpt(*words: str) -> str:
        done = subprocess.run(
            [tmp_path / "env" / "bin" / "megaegpt", *words],
            cwd=work, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog. \n" * 4000)
    shards = "data/quickstart"
    megaegpt("prepare", "text", "--input", "text.txt", "--output", shards)
    megaegpt("preprocess", f"{shards}/text.jsonl", "--output", shards, "--split-tokens", "0.8")
    run = ["training.steps=2", "training.eval_interval=2", "optimizer.warmup_steps=0"]
    megaegpt("pretrain", "--config", "gpt_encoder_cpu", *run)
    decoder = ["--config", "egpt_war_and_peace_cpu", *run]
    megaegpt("precompute", *decoder)
    megaegpt("pretrain", *decoder)
    runs = ["runs/quickstart/encoder", "runs/quickstart/egpt"]
    assert "egpt" in megaegpt("compare", *runs)
    written = ("--prompt", "The quick", "--max-new-tokens", "3")
    assert megaegpt("generate", "--checkpoint", runs[1], *written).startswith("The quick")
    assert "megaegpt/programs" not in str(list(work.rglob("*")))
