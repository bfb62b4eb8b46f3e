"""One table of all that this project uses of DeepSpeed and DeepSpeed does not promise.

Beside this module only ``engine``, ``fewer_operators``, ``gradients``, ``muon``, ``optimizer``
and ``stage_3`` here, ``deepspeed_state`` and ``universal`` in ``training.checkpoint``, and
``parallel.partitions`` know of it. A release that lacks one of these is refused by name when an
engine is built, rather than found out in the middle of a run.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError

from megaegpt.errors import ConfigError, LaunchError
from megaegpt.training.engine.muon import Piece
from megaegpt.training.engine.unknown_keys import NotedMapping, say_refused, say_unknown

ENGINE = (
    "checkpoint_engine",  # writes and reads the files of a checkpoint; replaced by ours
    "_copy_recovery_script",  # is called at each save; switched off
    "_config.load_universal_checkpoint",  # says how load_checkpoint reads
    "enable_backward_allreduce",
    "optimizer.param_groups",
)
"""Attributes of the engine that ``deepspeed.initialize`` gives."""

PARTITIONED = (
    "averaged_gradients",  # this rank's share, by group
    "params_in_partition",
    "clip_grad",
    "update_lp_params",  # gathers the weights after loading; put off until no rank has failed
    "load_hp_checkpoint_state_from_checkpoint_dir",  # gets the groups that a rank has a share of
    "has_overflow",  # replaced, as is the next
    "get_grad_norm_direct",
)
"""Attributes of the optimizer of ZeRO stages 1 and 2, but of bf16 at stage 1."""

PARTITIONED_PARAMETERS = (
    "averaged_gradients",
    "get_fp32_grad_partitions",  # this rank's share, by group
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "clip_grad",
    "parameter_offload.forward_hooks",  # taken off for an evaluation, and put on again
    "parameter_offload.backward_hooks",
    "parameter_offload._register_deepspeed_module",
    "parameter_offload.pre_sub_module_forward_function",  # gathers; hidden from checkpointing
    "parameter_offload.post_sub_module_forward_function",
    "checkpoint_event_prologue",  # lets go of whole parameters; the next gathers some of them
    "checkpoint_event_epilogue",
    "_load_global_state_stage3",
)
"""Attributes of the optimizer of ZeRO stage 3."""

BF16_STAGE_1 = (
    "bf16_groups",
    "fp32_groups_gradients",
    "fp32_groups_gradient_flat_partition",
    "fp32_groups_has_gradients",
    "clip_grad",
    "update_lp_params",
    "load_hp_checkpoint_state_from_checkpoint_dir",
    "update_hp_grads",  # replaced, as is the next
    "get_grads_for_norm",
)
"""Attributes of the optimizer of ZeRO stage 1 in bf16."""

LOSS_SCALER = ("cur_scale", "min_scale", "raise_error_at_min_scale")
"""Attributes of ``optimizer.loss_scaler`` in fp16."""

READ_BY_DEEPSPEED = ("_global_grad_norm", "overflow")
"""Attributes that the engine reads of our own optimizer at stage 0."""


def quieten(device_type: str) -> None:
    """Keep DeepSpeed from telling what it does, and on a CPU from compiling an operator (45 s, with
    a compiler) that only its inference uses.

    On a GPU the table of operators is not touched: whoever reads it first has all of them probed,
    with a dozen warnings where there is no CUDA toolkit.
    """
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_is_news)
    # Names of torch's collectives that DeepSpeed's stage 3 calls, and torch has new ones for.
    renamed = ".*(all_gather_into_tensor|reduce_scatter_tensor)"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line is another than the warnings that an optimizer is not one of DeepSpeed's, and
    that a step was left out, of which the training loop says why and where.
    """
    known = ("untested optimizer", "Gradients are non-finite, weights were not updated")
    return not any(text in record.getMessage() for text in known)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, for which it asks whatever the optimizer is, without compiling it.

    That brings all of torch's compiler in: a second or two of every start, for functions that are
    not used here. What asks for it later finds the module imported.
    """
    compile_ = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # an earlier or later release
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_


def check_compatible(engine: Any, stage: int, precision: str) -> None:
    """Look for everything that an engine of this stage and precision needs.

    Raises:
        LaunchError: this release of DeepSpeed lacks something, which is named.
    """
    missing = [f"engine.{name}" for name in _missing(engine, ENGINE)]
    optimizer = engine.optimizer
    if stage == 0:
        missing += [f"optimizer.{name}" for name in _missing(optimizer, READ_BY_DEEPSPEED)]
    else:
        other = precision == "bf16" and not hasattr(optimizer, "averaged_gradients")
        names: tuple[str, ...] = BF16_STAGE_1 if other else PARTITIONED
        if stage == 3:
            names = PARTITIONED_PARAMETERS
        missing += [f"optimizer.{name}" for name in _missing(optimizer, names)]
    if precision == "fp16":
        scaler = getattr(optimizer, "loss_scaler", None)
        missing += [f"loss_scaler.{name}" for name in _missing(scaler, LOSS_SCALER)]
    if missing:
        raise LaunchError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}: install the release "
            "that setup.py names"
        )


def piece_of(parameter: Any) -> Piece | None:
    """What this rank's partition has of a parameter of ZeRO stage 1 or 2; None: nothing.

    Raises:
        LaunchError: this release of DeepSpeed does not say it.
    """
    try:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(own.start, there.start, own.numel)
    except AttributeError:
        raise LaunchError(
            f"DeepSpeed {deepspeed.__version__} does not say what a rank has of a parameter, which "
            "optimizer.kind=muon needs: install the release that setup.py names"
        ) from None


def _missing(place: Any, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        found = place
        for part in name.split("."):
            if not hasattr(found, part):
                yield name
                break
            found = getattr(found, part)


_REFUSED = "DeepSpeed refuses the keys under deepspeed"


def check_accepted(options: dict[str, Any]) -> None:
    """Let DeepSpeed read ``options`` before any memory is spent on them.

    Args:
        options: what :func:`~megaegpt.config.deepspeed_config.deepspeed_config` gives.

    Raises:
        ConfigError: DeepSpeed does not accept a value, or does not know a key; names all of them.
    """
    # The micro-batch alone agrees with any number of ranks, which DeepSpeed does not know yet.
    batch = ("train_batch_size", "gradient_accumulation_steps")
    read = {key: copy.deepcopy(value) for key, value in options.items() if key not in batch}
    noted = NotedMapping(read)
    try:
        DeepSpeedConfig(noted)
    except ValidationError as error:
        text = "; ".join(say_refused(error, options))
    except (AssertionError, AttributeError, DeepSpeedConfigError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
    else:
        unknown = [say_unknown(key, known) for key, known in noted.unknown()]
        if unknown:
            raise ConfigError("; ".join(unknown))
        return
    raise ConfigError(f"{_REFUSED}: {text}")


@contextlib.contextmanager
def naming_raw_keys(raw: dict[str, Any]) -> Iterator[None]:
    """Name keys that DeepSpeed refuses only once it has the model, such as a combination of them.

    Args:
        raw: the section ``deepspeed`` of the configuration.

    Raises:
        ConfigError: an assertion of DeepSpeed failed, and there are raw keys.
    """
    try:
        yield
    except AssertionError as error:
        if not raw:
            raise
        raise ConfigError(f"{_REFUSED} ({', '.join(raw)}): {error}") from None
