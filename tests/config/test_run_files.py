"""Run files over the files that they extend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megaegpt.config.loading import config_to_yaml, load_config
from megaegpt.config.run_files import merged
from megaegpt.errors import ConfigError

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def _error(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_file_replaces_single_values_of_the_one_it_extends(write: Write) -> None:
    write("a.yaml", "model: {num_layers: 3, window: 8}\ndata: {train: [x, y], validation: v}\n")
    child = write(
        "b.yaml", "extends: a.yaml\nmodel: {window: null}\ndata: {train: [z]}\noptimizer:\n"
    )
    whole = write("whole.yaml", "model: {num_layers: 3}\ndata: {train: [z], validation: v}\n")
    assert load_config(child) == load_config(whole)
    assert load_config(child, ["model.num_layers=5"]).model.num_layers == 5


def test_chains_lead_from_folder_to_folder(write: Write) -> None:
    write("base/a.yaml", "model: {num_layers: 3, num_heads: 2}\n")
    write("base/b.yaml", "extends: a.yaml\nmodel: {num_layers: 4}\n")
    config = load_config(write("mine/c.yaml", "extends: ../base/b.yaml\ntraining: {seed: 5}\n"))
    assert (config.model.num_layers, config.model.num_heads, config.training.seed) == (4, 2, 5)


def test_the_resolved_configuration_stands_alone(write: Write, tmp_path: Path) -> None:
    write("a.yaml", "model: {num_layers: 3}\n")
    config = load_config(write("b.yaml", "extends: a.yaml\n"))
    text = config_to_yaml(config)
    assert "extends" not in text
    (tmp_path / "a.yaml").unlink()
    assert load_config(write("resolved.yaml", text)) == config


def test_the_name_of_a_file_may_hold_variables(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.yaml", "model: {num_layers: 3}\n")
    monkeypatch.setenv("CONFIGS", str(tmp_path))
    child = write("elsewhere/b.yaml", "extends: ${CONFIGS}/a.yaml\n")
    assert load_config(child).model.num_layers == 3
    monkeypatch.delenv("CONFIGS")
    assert "extends ${CONFIGS}/a.yaml: the environment variable ${CONFIGS} is not" in _error(child)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"run.yaml": "extends: run.yaml\n"}, "extends leads back to a file of its own chain"),
        (
            {"run.yaml": "extends: a.yaml\n", "a.yaml": "extends: run.yaml\n"},
            "extends leads back to a file of its own chain",
        ),
        ({"run.yaml": "extends: no.yaml\n"}, "run.yaml: extends no.yaml: "),
        ({"run.yaml": "extends: 3\n"}, "extends must be the name of another run's file, not 3"),
        ({"run.yaml": "extends: [a.yaml]\n"}, "extends must be the name of another run's file"),
        ({"run.yaml": "extends: ''\n"}, "extends must be the name of another run's file, not ''"),
        ({"run.yaml": "extends: a.yaml\n", "a.yaml": "- 1\n"}, "must hold `section: ...` lines"),
        ({"run.yaml": "extends: a.yaml\n", "a.yaml": "x: [\n"}, "not YAML"),
        ({"run.yaml": "extends: .\n"}, "cannot be read"),
    ],
)
def test_a_chain_that_does_not_hold_is_one_line(
    files: dict[str, str], expected: str, write: Write, tmp_path: Path
) -> None:
    for name, text in files.items():
        write(name, text)
    message = _error(tmp_path / "run.yaml")
    assert expected in message
    assert "\n" not in message


def test_a_wrong_value_is_said_to_be_of_the_file_it_stands_in(write: Write, tmp_path: Path) -> None:
    write("a.yaml", "model: {num_layrs: 3, num_heads: 0}\ntraining: {steps: x, seed: y}\n")
    child = write("b.yaml", "extends: a.yaml\ntraining: {steps: z}\nlogging: {interval: -1}\n")
    message = _error(child, "training.seed=w")
    base = f"(in {tmp_path / 'a.yaml'})"
    assert f"did you mean model.num_layers? {base}" in message
    assert f"model.num_heads=0 must be greater than 0 {base}" in message
    assert "training.steps must be an integer, not 'z'\n" in message
    assert "training.seed must be an integer, not 'w' (command line)" in message
    assert message.endswith("logging.interval=-1 must be greater than 0")


def test_merging_alters_neither_side() -> None:
    values, changes = {"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": {"e": 4}}
    assert merged(values, changes) == {"a": {"b": 1, "c": 3}, "d": {"e": 4}}
    assert values == {"a": {"b": 1, "c": 2}}
    merged(values, changes)["d"]["e"] = 5
    assert changes == {"a": {"c": 3}, "d": {"e": 4}}
