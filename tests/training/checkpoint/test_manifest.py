"""A checkpoint's description is what a resumed run needs, or refused in one line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megaegpt.errors import CheckpointError
from megaegpt.training.checkpoint.manifest import Manifest, Topology

_TOPOLOGY = asdict(Topology(1, 1, 0, "fp32"))


def test_what_a_later_version_adds_to_the_loop_s_state_is_kept(tmp_path: Path) -> None:
    Manifest(3, _TOPOLOGY, {}, {"step": 3, "moons": [1]}, {}).write(tmp_path)
    assert Manifest.read(tmp_path).trainer == {"step": 3, "moons": [1]}


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"step": "3"}, 'trainer, is damaged: step must be an integer, not "3"'),
        ({"skipped": None}, "skipped must be an integer, not null"),
        ({"seed": 1.5}, "seed must be an integer or null, not 1.5"),
        ({"batch_ramp": [1]}, "batch_ramp must be an object or null, not a list"),
        ({"shards": 7}, "shards must be text, not 7"),
        ({"encoder": 7}, "encoder must be text or null, not 7"),
        ({"encoder_arithmetic": "gelu"}, "encoder_arithmetic must be an object or null"),
        ({"config": []}, "config must be an object or null, not a list"),
    ],
)
def test_state_of_another_type_than_a_resumed_run_needs_is_named(
    tmp_path: Path, state: dict[str, Any], told: str
) -> None:
    Manifest(3, _TOPOLOGY, {}, state, {}).write(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        Manifest.read(tmp_path)
    assert f"{tmp_path}/manifest.json" in str(raised.value)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"zero_stage": "2"}, 'topology, is damaged: zero_stage must be an integer, not "2"'),
        ({"pipeline_parallel": 2}, '"pipeline_parallel" is no key of it'),
    ],
)
def test_a_topology_of_another_form_is_named(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    Manifest(3, {**_TOPOLOGY, **change}, {}, {"step": 3}, {}).write(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        Manifest.read(tmp_path)
    assert told in str(raised.value)
