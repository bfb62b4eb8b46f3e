"""Paths of a configuration: ``~`` and variables are what they are in a shell, in every key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest

from megaegpt.config import RunConfig
from megaegpt.config.loading import load_config
from megaegpt.config.metadata import leaves
from megaegpt.config.paths import PathText, expand_path
from megaegpt.errors import ConfigError

PATHS = {
    "checkpoint.directory",
    "data.features",
    "data.instructions.template",
    "data.instructions.train",
    "data.instructions.validation",
    "data.train",
    "data.validation",
    "data.vocabulary",
    "logging.directory",
    "model.encoder.source",
    "training.initialize_from",
}
OTHER_TEXTS = {
    "checkpoint.best_of",
    "data.tasks",  # NAME=FILE, whose path is expanded where it is taken apart
    "data.validation_sets",  # NAME=PREFIX, likewise
    "deepspeed",
    "generation.prompt",
    "logging.wandb_project",
    "training.freeze",
    "training.lora.targets",
}


def _holds(wanted: Any, annotation: Any) -> bool:
    return annotation == wanted or any(_holds(wanted, part) for part in get_args(annotation))


def _value(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value[0] if isinstance(value, tuple) else value


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("SCRATCH", "/scratch/anna")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "run.yaml").write_text("")
    return tmp_path / "run.yaml"


def test_every_text_is_a_path_or_known_to_be_none() -> None:
    texts = {dotted: of for dotted, of, _ in leaves(RunConfig()) if _holds(str, of)}
    assert set(texts) == PATHS | OTHER_TEXTS
    assert {dotted for dotted, of in texts.items() if _holds(PathText, of)} == PATHS


@pytest.mark.parametrize("dotted", sorted(PATHS))
def test_home_and_variables_are_expanded_in_every_path(dotted: str, empty: Path) -> None:
    for text, meant in {
        "~/runs": "/home/anna/runs",
        "$SCRATCH/a*": "/scratch/anna/a*",
        "${SCRATCH}2/$HOME": "/scratch/anna2//home/anna",
        "a~b/5$": "a~b/5$",
        "gpt2": "gpt2",
    }.items():
        on_command_line = load_config(empty, [f"{dotted}={text}"])
        assert _value(on_command_line, dotted) == meant
        *sections, name = dotted.split(".")
        lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
        in_file = empty.with_name("other.yaml")
        in_file.write_text("\n".join([*lines, f"{'  ' * len(sections)}{name}: '{text}'"]))
        assert _value(load_config(in_file), dotted) == meant


@pytest.mark.parametrize("dotted", sorted(PATHS))
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'$NOWHERE/a'", "the environment variable $NOWHERE is not set"),
        ("'${EMPTY}/a'", "the environment variable ${EMPTY} is not set"),
        ("'~nobody-of-this-name/a'", "there is no home folder for '~nobody-of-this-name'"),
        ('"a\\0b"', "holds a NUL character"),
        ("''", "must not be an empty path"),
    ],
)
def test_what_no_path_is_like_is_one_line_with_its_key(
    dotted: str, text: str, expected: str, empty: Path
) -> None:
    listed = f"[{text}]" if isinstance(_value_or_tuple(dotted), tuple) else text
    with pytest.raises(ConfigError) as caught:
        load_config(empty, [f"{dotted}={listed}"])
    assert expected in str(caught.value)
    assert dotted in str(caught.value)
    assert "\n" not in str(caught.value)


def _value_or_tuple(dotted: str) -> Any:
    value: Any = RunConfig()
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def test_texts_that_are_no_paths_are_left_alone(empty: Path) -> None:
    config = load_config(empty, ["generation.prompt=~ costs $NOWHERE", "logging.wandb_project=~x"])
    assert config.generation.prompt == "~ costs $NOWHERE"
    assert config.logging.wandb_project == "~x"


def test_a_user_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    user = pwd.getpwuid(os.getuid())
    assert expand_path(f"~{user.pw_name}/x") == f"{user.pw_dir.rstrip('/')}/x"
