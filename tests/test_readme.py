"""What the README tells people to type exists and is accepted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
PROGRAMS = sorted({word for words in COMMANDS for word in words if word.endswith(".py")})
DRY_RUNS = [words for words in COMMANDS if "--dry-run" in words]


def test_there_are_commands():
    assert ["bash", "tests/run.sh"] in COMMANDS
    assert ["bash", "launchers/quickstart.sh"] in COMMANDS
    assert len(PROGRAMS) >= 4
    assert DRY_RUNS


def test_every_file_that_a_command_or_link_names_is_in_the_repository():
    names = {
        word
        for words in COMMANDS
        for word in words
        if re.match(r"(configs|launchers|tools|tests)/", word)
    }
    names |= set(re.findall(r"\]\(([^)#:]+)\)", README))
    names |= {f"configs/{name}" for name in re.findall(r"`([a-z0-9_]+\.yaml)`", README)}
    assert {name for name in names if not (ROOT / name).exists()} == set()


def test_every_configuration_is_mentioned():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_file_tree_is_the_repositorys_and_has_every_tool():
    (tree,) = (block for block in README.split("```") if "\ntests/ " in block)
    folder = ""
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        assert (ROOT / folder / name).exists(), f"{folder}{name}"
        if not line.startswith(" "):
            folder = name
    listed = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    programs = {path.name for path in (ROOT / "tools").glob("*.py")} - {"__init__.py"}
    assert programs <= listed


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_a_command_is_one_of_the_programs(program):
    help_text = run([sys.executable, program, "--help"]).stdout
    for words in COMMANDS:
        if program not in words:
            continue
        for word in words[words.index(program) + 1 :]:
            if word.startswith("--"):
                assert re.search(rf"{word}\b", help_text), f"{program} {word}"


@pytest.mark.parametrize("words", DRY_RUNS, ids=" ".join)
def test_dry_runs_succeed(words):
    assert "trainable parameters" in run([sys.executable, *words[1:]]).stdout


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done
