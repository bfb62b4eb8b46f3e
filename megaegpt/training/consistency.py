"""Whether the ranks of a run were given the same: configuration, versions, corpora, weights.

Copies on the machines' own disks that differ, or a path of a run that goes on, would train silently
on a mixture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import megaegpt
from megaegpt.config import RunConfig
from megaegpt.errors import LaunchError
from megaegpt.model.weights import weights_checksum
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_gather_object, raising_together
from megaegpt.precision import Precision
from megaegpt.training.identity import READ_FROM, flatten, show_value


def configuration_facts(config: RunConfig) -> dict[str, Any]:
    """Collect all that the ranks of a run must have been given alike: versions, and every key but
    the places of files, which may differ between machines.
    """
    versions = {"megaegpt": megaegpt.__version__, "torch": torch.__version__}
    keys = {key: value for key, value in flatten(config).items() if key not in READ_FROM}
    return {**versions, **keys}


def corpus_facts(fingerprints: Mapping[str, str], precision: Precision) -> dict[str, Any]:
    """Collect what all ranks must have found alike: data and, where it is ``auto``, precision.

    Args:
        fingerprints: of the data, by its name.
        precision: the one that this rank's device computes in.
    """
    found = {f"the fingerprint of {name}": digest for name, digest in fingerprints.items()}
    return {**found, "what training.precision stands for": precision}


def weights_facts(key: str, weights: str | Path) -> dict[str, Any]:
    """Take the checksum that all ranks must find of the weights that the key ``key`` names."""
    return {f"what {key} holds": weights_checksum(weights)}


def check_ranks_agree(find: Callable[[], Mapping[str, Any]], grid: ProcessGrid) -> None:
    """Compare what each rank was given with what the first was. Collective over all ranks.

    Args:
        find: gives JSON values by a name that people know; it may fail on one rank alone.

    Raises:
        LaunchError: on all ranks; names what differs, both values and the ranks.
    """
    if grid.world_size == 1:
        return
    with raising_together(grid):
        content = json.dumps(find(), sort_keys=True)
    if len(set(all_gather_object(hashlib.sha256(content.encode()).digest(), grid))) == 1:
        return
    everything = [json.loads(text) for text in all_gather_object(content, grid)]
    error = LaunchError(
        "ranks were not given the same: "
        + "; ".join(_describe_disagreement(everything))
        + ". Start all of them with one configuration, corpus, encoder and version, on devices of "
        "one kind"
    )
    error.on_every_rank = True
    raise error


def _describe_disagreement(everything: list[dict[str, Any]]) -> list[str]:
    first = everything[0]
    lines = []
    for name in dict.fromkeys(name for facts in everything for name in facts):
        expected = first.get(name)
        others = [rank for rank, facts in enumerate(everything) if facts.get(name) != expected]
        if others:
            found = show_value(everything[others[0]].get(name))
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            where = f"on rank 0 and {found} on rank {others[0]}{more}"
            lines.append(f"{name} is {show_value(expected)} {where}")
    return lines
