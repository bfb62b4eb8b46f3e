"""DeepSpeed's checkpoint files: written durably, read without running code from them.

Used by :mod:`megaegpt.training.engine.engine` only. Files are recorded as they are written, so that
the checkpoint manager can checksum them; reading allows tensors, plain containers and the few
DeepSpeed classes below, and refuses every other pickled object.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import megaegpt.training.accelerator  # noqa: F401, before DeepSpeed

# isort: split
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megaegpt.errors import CheckpointError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import ParamSpec
from megaegpt.parallel.together import raising_together
from megaegpt.training.checkpoint.host_copies import HostCopies
from megaegpt.training.checkpoint.universal import (
    MOMENTS,
    load_partitioned,
    load_replicated,
    universal_info,
)


def _member(members: Any, name: str) -> ZeroStageEnum:
    """What a pickled stage asks ``getattr`` for: some Pythons, 3.11.2 say, write members of an Enum
    so.
    """
    if members is not ZeroStageEnum:
        raise pickle.UnpicklingError(f"getattr of {members!r} is not allowed")
    return ZeroStageEnum[name]


_TRUSTED = [
    DynamicLossScaler,
    LossScaler,
    ZeroStageEnum,
    fragment_address,
    (_member, "builtins.getattr"),
]
_SAFE_LOADING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_SPACE_TO_RESHAPE = 3
"""Times the checkpoint's size: fragments, joined tensors, and copies of the weights."""
_LOADING_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    pickle.PickleError,
)


class _CheckpointFiles(TorchCheckpointEngine):
    """torch.save and torch.load as DeepSpeed calls them, made durable and safe.

    What is to be written is noted, or its copies are: DeepSpeed calls between barriers, where the
    other ranks would wait for the one that writes most, and give up on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: HostCopies | None = None
        self.noted: list[tuple[Any, Path]] = []

    def save(self, state_dict: Any, path: str) -> None:
        noted = state_dict if self.copies is None else self.copies.of(state_dict)
        self.noted.append((noted, Path(path)))

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)


def _write(state_dict: Any, path: Path) -> None:
    """Write a file of state durably.

    Raises:
        OSError: with the file's name, for whatever reason.
    """
    try:
        with open(path, "wb") as file:
            torch.save(state_dict, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise as_os_error(error, path) from error


def install(engine: Any) -> None:
    """Make a DeepSpeed engine read and write through :class:`_CheckpointFiles`."""
    engine.checkpoint_engine = _CheckpointFiles()
    # Its recovery scripts would be copied into each checkpoint; they refuse tensor parallelism.
    engine._copy_recovery_script = lambda save_path: None
    engine.module_state_dict = functools.partial(_trainable_state, engine, engine.module_state_dict)


def _trainable_state(
    engine: Any, state_dict: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    """DeepSpeed's dictionary of the model, without frozen parameters under any of their names: it
    leaves out a tied one under the first alone.
    """
    state = state_dict(*args, **options)
    if options.get("exclude_frozen_parameters"):
        for name, parameter in engine.module.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(name, None)
    return state


def save(engine: Any, folder: Path, specs: dict[str, ParamSpec]) -> list[Path]:
    """Write ``engine``'s weights and optimizer state under ``folder``; collective, but for the
    writing, in which each rank is alone.

    Returns:
        The files that this rank wrote.

    Raises:
        OSError: this rank could not write one of them.
    """
    return _prepare(engine, folder, specs, None)()


def copy_state(
    engine: Any, folder: Path, specs: dict[str, ParamSpec], copies: HostCopies
) -> Callable[[], list[Path]]:
    """Copy all that :func:`save` would write; collective.

    Returns:
        What writes it, without other ranks and as often as once, and gives the files.
    """
    return _prepare(engine, folder, specs, copies)


def _prepare(
    engine: Any, folder: Path, specs: dict[str, ParamSpec], copies: HostCopies | None
) -> Callable[[], list[Path]]:
    """The collective part of saving; gives what writes the files, of the copies or, without any, of
    the state itself.
    """
    files: _CheckpointFiles = engine.checkpoint_engine
    files.copies = copies
    try:
        engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state={UNIVERSAL_CHECKPOINT_INFO: universal_info(specs)},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
    finally:
        files.copies = None
        noted, files.noted = files.noted, []

    def write() -> list[Path]:
        written = []
        while noted:  # a copy that is written gives its memory back
            state_dict, path = noted.pop()
            _write(state_dict, path)
            written.append(path)
        return written

    return write


def load(engine: Any, folder: Path) -> None:
    """Restore what :func:`save` wrote, under the same topology; each rank reads alone.

    Raises:
        CheckpointError: a file is missing, holds more than tensors, or is of another model.
    """
    with loading(folder), _settings_kept(engine):
        path, _ = engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=_all_trainable(engine)
        )
        if path is None:
            raise CheckpointError(f"{folder} holds no weights for this rank")


def _all_trainable(engine: Any) -> bool:
    """Frozen parameters are not in the files; the manifest lists those that are."""
    return all(parameter.requires_grad for parameter in engine.module.parameters())


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Read safely and quietly, and turn what DeepSpeed raises into a :class:`CheckpointError`.

    Inside, ``torch.load`` takes tensors, plain containers and the trusted classes even where
    DeepSpeed asks for any object.
    """
    before = os.environ.get(_SAFE_LOADING)
    os.environ[_SAFE_LOADING] = "1"
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),  # progress bars
            torch.serialization.safe_globals(_TRUSTED),
        ):
            yield
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded into this model: {reason}") from error
    finally:
        os.environ.pop(_SAFE_LOADING)
        if before is not None:
            os.environ[_SAFE_LOADING] = before


@contextlib.contextmanager
def _settings_kept(engine: Any) -> Iterator[None]:
    """Let this run's optimizer settings win over those that loading brings back."""
    optimizer = engine.optimizer
    settings = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    clipping = getattr(optimizer, "clip_grad", None)
    yield
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)
    if clipping is not None:
        optimizer.clip_grad = clipping


def make_scratch(scratch: Path, source: Path) -> None:
    """Make the folder in which a universal checkpoint of ``source`` is built.

    Raises:
        CheckpointError: there is no room for it.
    """
    needed = _SPACE_TO_RESHAPE * sum(file.stat().st_size for file in source.iterdir())
    free = shutil.disk_usage(scratch.parent).free
    if free < needed:
        raise CheckpointError(
            f"joining the state of {source.parent} from its ranks needs {needed / 2**30:.1f} GiB "
            f"free in {scratch.parent}, which has {free / 2**30:.1f} GiB"
        )
    try:
        scratch.mkdir()
    except OSError as error:
        raise CheckpointError(f"{scratch} cannot be made: {error.strerror}") from error


def load_universal(engine: Any, folder: Path, grid: ProcessGrid) -> None:
    """Restore from the universal checkpoint ``folder``, whatever topology it came from; collective.

    Raises:
        CheckpointError: as for :func:`load`, on every rank.
    """
    if engine.zero_optimization_partition_weights():
        with raising_together(grid), loading(folder), _settings_kept(engine):
            engine.optimizer.checkpoint_event_prologue()
            names = {parameter: name for name, parameter in engine.module.named_parameters()}
            load_partitioned(engine.optimizer, names, folder, grid)
        engine.optimizer.checkpoint_event_epilogue()  # gathers small parameters, on all ranks
        return
    with raising_together(grid), loading(folder), _settings_kept(engine):
        if not engine.zero_optimization():
            load_replicated(engine.module, engine.optimizer, folder, grid)
            return
        engine._config.load_universal_checkpoint = True
        # The gathering of weights that ends DeepSpeed's loading would wait for a rank that fails.
        engine.optimizer.update_lp_params = lambda: None
        load_groups = engine.optimizer.load_hp_checkpoint_state_from_checkpoint_dir
        engine.optimizer.load_hp_checkpoint_state_from_checkpoint_dir = functools.partial(
            _load_groups, engine.optimizer, load_groups
        )
        try:
            engine.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=_all_trainable(engine)
            )
        finally:
            del engine.optimizer.update_lp_params
            del engine.optimizer.load_hp_checkpoint_state_from_checkpoint_dir
            engine._config.load_universal_checkpoint = False
        for parameter, state in engine.optimizer.state.items():
            state["step"] = state["step"].to(parameter.device)  # DeepSpeed leaves it on the CPU
    engine.optimizer.update_lp_params()


def _load_groups(
    optimizer: Any, load: Callable[[str, str], None], parameters_name: str, folder: str
) -> None:
    """Load the groups that this rank has a share of, as DeepSpeed does; it fails at one of which a
    rank has padding alone, such as a group of a single number. That is given a state of zeros.
    """
    groups, parameters = optimizer.optimizer.param_groups, getattr(optimizer, parameters_name)
    shared = [any(p._hp_mapping is not None for p in of_group) for of_group in parameters]
    optimizer.optimizer.param_groups = list(itertools.compress(groups, shared))
    setattr(optimizer, parameters_name, list(itertools.compress(parameters, shared)))
    try:
        load(parameters_name, folder)
    finally:
        optimizer.optimizer.param_groups = groups
        setattr(optimizer, parameters_name, parameters)
    states = optimizer.optimizer.state
    steps = [states[group["params"][0]]["step"] for group in itertools.compress(groups, shared)]
    for group, has_share in zip(groups, shared, strict=True):
        if not has_share:
            (padding,) = group["params"]
            moments = MOMENTS[:1] if group.get("muon") else MOMENTS
            step = steps[0].clone() if steps else torch.zeros(())
            states[padding] = {"step": step, **{m: torch.zeros_like(padding) for m in moments}}


def as_os_error(error: Exception, path: str | Path) -> OSError:
    """The operating system's reason behind a failed torch write, naming the file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(cause.errno or errno.EIO, cause.strerror or str(cause), str(path))
