"""From what a user names to a folder of weights that ``model/weights.py`` reads.

A name may be a weights folder, a checkpoint, the checkpoints of a run or the run's own folder
(whose latest checkpoint is meant), a folder in Hugging Face's form, a GGUF file or the folder of
one, or the name of such a model. What has another form than ours is converted once and kept.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from megaegpt.config import ModelConfig
from megaegpt.config.presets import PRESETS, create_model_config
from megaegpt.errors import CheckpointError
from megaegpt.interop.foreign_models import find_foreign, read_foreign
from megaegpt.interop.hub import GPT2_NAMES, MODEL_NAMES, converted, find_model, is_model_name
from megaegpt.model.adapter_files import Adapter, check_base
from megaegpt.model.weights import find_weights, read_weights_config, verify_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import raising_together


def resolve_weights_source(
    source: str | Path,
    grid: ProcessGrid,
    beside: str | Path | None = None,
    key: str | None = None,
) -> Path:
    """The weights folder that ``source`` stands for. Collective over all ranks.

    Args:
        source: see the module; a relative path starts at the working directory.
        grid: where ``source`` needs a download or conversion, one process of each machine does it.
        beside: a folder from which a relative path is tried too.
        key: of the configuration, where ``source`` is its value; errors begin with it.

    Raises:
        CheckpointError: there is no such thing, it is damaged, or cannot be used.
    """
    first_here = os.environ.get("LOCAL_RANK", str(grid.rank)) == "0"
    with raising_together(grid), _naming(key, source):
        if first_here:
            verify_weights(_resolve(source, beside))
    with raising_together(grid), _naming(key, source):
        folder = _resolve(source, beside)
    return folder


def resolve_base(adapter: Adapter, grid: ProcessGrid) -> Path:
    """The weights beside which an adapter was trained, from the place that it names (from the
    working directory, else from beside the adapter). Collective over all ranks.

    Raises:
        CheckpointError: they cannot be had, or are others by now.
    """
    try:
        weights = resolve_weights_source(adapter.base.source, grid, beside=adapter.folder)
    except CheckpointError as error:
        raise CheckpointError(f"the base of {adapter.folder} cannot be loaded: {error}") from None
    check_base(adapter, weights)
    return weights


def source_config(source: str | Path, key: str | None = None) -> ModelConfig:
    """The model that ``source`` stands for, without downloading or converting it.

    Args:
        key: of the configuration, where ``source`` is its value; errors begin with it.

    Raises:
        CheckpointError: there is no such thing on this machine (the four sizes of GPT-2 and
            smollm2-135m are known without), or it cannot be used.
    """
    with _naming(key, source):
        return _config_of(source)


def _config_of(source: str | Path) -> ModelConfig:
    folder = Path(source)
    if (foreign := find_foreign(folder)) is not None:
        return read_foreign(foreign).config
    if folder.is_dir():
        return read_weights_config(find_weights(folder))[0]
    if source in GPT2_NAMES:
        return create_model_config(str(source))
    if is_model_name(str(source)):
        try:
            return read_foreign(find_model(str(source), only_here=True)).config
        except CheckpointError:
            if source not in PRESETS:
                raise
            return create_model_config(str(source))
    raise CheckpointError(f"there is no folder {source}{_or_no_model(source)}")


@contextlib.contextmanager
def _naming(key: str | None, source: str | Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        if key is None:
            raise
        raise CheckpointError(f"{key}={source}: {error}") from None


def _resolve(source: str | Path, beside: str | Path | None) -> Path:
    places = [Path(source), *([Path(beside) / source] if beside else [])]
    for folder in places:
        if (foreign := find_foreign(folder)) is not None:
            return converted(foreign)
        if folder.is_dir():
            return find_weights(folder)
    if is_model_name(str(source)):
        return converted(find_model(str(source)))
    missing = " and no folder ".join(map(str, places))
    raise CheckpointError(f"there is no folder {missing}{_or_no_model(source)}")


def _or_no_model(source: str | Path) -> str:
    """To follow "there is no folder": what a word without slashes could have been."""
    if len(Path(source).parts) != 1:
        return ""
    near = difflib.get_close_matches(str(source), MODEL_NAMES, 1)
    if near:
        return f", and no model of this name: did you mean {near[0]}?"
    return f", and no model of this name; there are {', '.join(MODEL_NAMES)}, hf:OWNER/NAME"
