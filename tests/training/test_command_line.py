"""The command line of programs on a run's configuration, under a launcher."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megaegpt.errors import ConfigError, LaunchError
from megaegpt.training.command_line import RunParser

ROOT = Path(__file__).parents[2]


def test_features_are_computed_by_more_ranks_than_share_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 8, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        sys, "argv", ["", "--config", str(ROOT / "configs/egpt_war_and_peace.yaml")]
    )
    with pytest.raises(ConfigError, match=r"not divisible by .* 8 data-parallel ranks"):
        RunParser(None).parse_run()
    _, config = RunParser(None).parse_run(trains=False)
    assert config.model.kind == "egpt"


@pytest.mark.parametrize(
    ("option", "hint"),
    [("--lr", "optimizer.lr=VALUE"), ("--max-iters=3", "training.steps=VALUE"),
     ("--optimizer.lr", "optimizer.lr=VALUE"), ("--zzz", "see --help")],
)  # fmt: skip
def test_an_option_that_is_a_key_elsewhere_is_shown_as_one(
    monkeypatch: pytest.MonkeyPatch, option: str, hint: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--config", "run.yaml", option])
    with pytest.raises(LaunchError, match=hint):
        RunParser(None).parse_run()
