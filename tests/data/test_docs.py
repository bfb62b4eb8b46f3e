"""The commands of docs/data.md are accepted by the programs, and every reader is in its table."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from megaegpt.config.loading import load_config
from megaegpt.data.readers import READERS, reader_options
from tools import inspect_shards, prepare_data, preprocess

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`(python tools/[^`]+)`", DOCS)))
PROGRAMS: dict[str, ModuleType] = {
    "tools/inspect_shards.py": inspect_shards,
    "tools/prepare_data.py": prepare_data,
    "tools/preprocess.py": preprocess,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, *words = shlex.split(command)
    monkeypatch.setattr("sys.argv", [program, *words])
    arguments = PROGRAMS[program].parse_arguments()
    if program == "tools/preprocess.py":
        preprocess.options_of(arguments)


def test_every_reader_and_option_is_described() -> None:
    formats = set(re.findall(r"--format (\w+)", DOCS))
    assert formats >= set(READERS) - {"text", "jsonl"}
    for source in READERS:
        missing = [name for name in reader_options(source) if name not in DOCS]
        assert not missing, source


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (tmp_path / "run.yaml").write_text(example, encoding="utf-8")
    config = load_config(tmp_path / "run.yaml")
    assert config.data.weights == (0.7, 0.3)
    assert config.model.document_end == 50256
