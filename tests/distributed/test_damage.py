"""Checkpoints of a real engine, damaged at random: found and named, or refused as ours."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megaegpt.errors import MegaEGPTError
from megaegpt.model.weights import save_weights
from megaegpt.training.checkpoint.inspection import describe_contents
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.checkpoint.manifest import MANIFEST, Manifest, describe_files
from megaegpt.training.engine.engine import Engine
from tests.damage import damaged
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import advance, make_engine, run_config

_ROUNDS = 80


def _saved_run(directory: Path) -> Engine:
    """An engine after a step that ``directory`` has a checkpoint of."""
    config = run_config(parallel={"zero_stage": 1})
    engine = make_engine(config, grid_for(1))
    advance(engine, config, range(1))
    parts = {
        "weights": lambda copies: lambda folder: save_weights(engine.model, folder, engine.grid)
    }
    CheckpointManager(directory, keep=1).save(engine, 1, {"step": 1}, parts)
    return engine


def _error_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except MegaEGPTError as error:
        return str(error)
    return None


def _fuzz(directory: Path) -> dict[str, Counter[str]]:
    """By file: how often its damage was found, passed the checksums, and was refused after them."""
    engine, draw = _saved_run(directory), random.Random(11)
    [whole] = directory.glob("step_*")
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    found: dict[str, Counter[str]] = {name.name: Counter() for name in names}
    for number in range(_ROUNDS):
        scratch = directory / f"round{number}"
        folder, name = scratch / whole.name, draw.choice(names)
        shutil.copytree(whole, folder)
        path, counts = folder / name, found[name.name]
        path.write_bytes(damaged(path.read_bytes(), draw))
        manager = CheckpointManager(scratch, keep=1)
        said = _error_of(lambda manager=manager: manager.load(engine))
        listed = "\n".join(describe_contents(scratch, verify=True))
        if said is not None:
            assert name.name in said
            assert said in listed
        counts["found" if said else "harmless"] += 1
        if name.name != MANIFEST:
            _sign_again(folder, path)
            said = _error_of(lambda manager=manager: manager.load(engine))
            _error_of(lambda folder=folder: list(describe_contents(folder, verify=True)))
            counts["refused later" if said else "loaded"] += 1
        shutil.rmtree(scratch)
    engine.close()
    return found


def _sign_again(folder: Path, path: Path) -> None:
    """As if the file had been saved in that state."""
    manifest = Manifest.read(folder)
    manifest.files.update(describe_files([path], folder))
    manifest.write(folder)


def test_random_damage_is_found_and_named_and_gives_no_other_errors(
    distributed: Distributed, tmp_path: Path
) -> None:
    found = distributed(1, _fuzz, tmp_path)[0]
    assert len(found) == 5
    for name, counts in found.items():
        assert counts["found"] >= 8, (name, counts)
        # Spaces between what the manifest says are nobody's loss.
        assert counts["harmless"] == 0 or name == MANIFEST, (name, counts)
    assert sum(counts["refused later"] for counts in found.values()) > 10
