"""A run's identity: the keys of its configuration that decide what it computes.

Every key belongs to one :data:`Effect`. A resumed run is held against its checkpoint by them, and a
new run against the weights it starts from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from megaegpt.config import BatchRampConfig, ModelConfig, RunConfig
from megaegpt.config.arithmetic import (
    ARITHMETIC_KEYS,
    RESOLVED,
    arithmetic_differences,
    model_arithmetic,
)
from megaegpt.config.loading import config_to_dict
from megaegpt.config.metadata import leaves
from megaegpt.config.parsing import parse_section
from megaegpt.config.validation_sets import task_files
from megaegpt.config.yaml_text import read_yaml
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import read_any_config, read_weights_config
from megaegpt.training.checkpoint.manifest import Manifest

Effect = Literal["arithmetic", "data order", "optimization", "none"]
"""The effect of a key on a run that has begun.

- ``arithmetic``: what the model computes from its weights. Trained weights mean nothing under
  another one, and most of it shows in no tensor's shape.
- ``data order``: which samples a step has.
- ``optimization``: what a step makes of its samples.
- ``none``: where, how fast, how often; or how the run began, which is past. Files and folders are
  here too: what they hold is compared by its fingerprint.
"""

_KEYS: dict[Effect, dict[str, str]] = {
    "arithmetic": ARITHMETIC_KEYS,
    "data order": {
        "model": "max_seq_len",
        "model.egpt": "num_chunks",
        "data": "weights",
        "data.instructions": "held_out packing template on_bad_record",
        "training": "seed global_batch_size",
        "training.batch_ramp": "start increment steps",
    },
    "optimization": {
        "model": "dropout z_loss",
        "data": "feature_dtype mask_after_document_end",
        "training": "steps micro_batch_size precision gradient_clipping on_nonfinite freeze",
        "training.spike_guard": "factor window",
        "training.lora": "rank alpha dropout targets",
        "optimizer": "kind lr min_lr schedule warmup_steps decay_steps beta1 beta2 eps "
        "weight_decay momentum groups",
        "": "deepspeed",
    },
    "none": {
        "model": "init_std",
        "model.encoder": "source initialize_decoder batch_size",
        "data": "train validation validation_sets tasks verify_checksums vocabulary features "
        "history_features token_features predictions prefetch",
        "data.instructions": "train validation",
        "parallel": "tensor_parallel_size sequence_parallel context_parallel_size "
        "zero_stage offload overlap_comm",
        "training": "activation_checkpointing eval_interval patience initialize_from compile "
        "deterministic",
        "checkpoint": "directory interval keep keep_every keep_best asynchronous best_of",
        "logging": "directory interval gradient_norms memory_snapshot tensorboard wandb "
        "wandb_project",
        "logging.profile": "start steps",
        "generation": "prompt max_new_tokens temperature top_k top_p seed",
    },
}

EFFECTS: dict[str, Effect] = {
    f"{section}.{name}".lstrip("."): effect
    for effect, sections in _KEYS.items()
    for section, names in sections.items()
    for name in names.split()
}
"""The effect of every key of a run's configuration."""

READ_FROM = {
    "data.train",
    "data.validation",
    "data.validation_sets",
    "data.vocabulary",
    "data.instructions.train",
    "data.instructions.validation",
    "model.encoder.source",
    "training.initialize_from",
}
"""Places that a machine may have elsewhere than the others; what is there is compared instead."""

_PLACES = {"checkpoint.directory", "logging.directory"}
"""Where a run is; it may be moved."""

_MAY_CHANGE_AT_THE_START = {
    "model.max_seq_len",
    "model.egpt.num_chunks",
    "model.vocab_size",
    "model.window",
    "model.window_every",
    "model.document_end",
    "model.rope_base",
    "model.rope_scaling.kind",
    "model.rope_scaling.factor",
    "model.rope_scaling.original_max_seq_len",
    "model.egpt.local_attention",
    "model.egpt.history",
    "model.encoder.layers",
    "model.encoder.overlap",
}
"""Keys that a new run may change on purpose when it starts from trained weights."""


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every key of a configuration with its value, dotted: ``training.batch_ramp.start``."""
    return {dotted: _plain(value) for dotted, _, value in leaves(config)}


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if not isinstance(value, tuple):
        return value
    return [config_to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]


def _different(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys with unequal values: (there, here); None where a side has none."""
    pairs = {key: (there.get(key), here.get(key)) for key in dict.fromkeys([*there, *here])}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _there_and_here(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(
        f"{key} is {show_value(there)} there and {show_value(here)} here"
        for key, (there, here) in differences.items()
    )


def _from_to(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{key} {show_value(there)} -> {show_value(here)}"
        for key, (there, here) in differences.items()
    )


def show_value(value: Any) -> str:
    """A value as a configuration has it, short enough for a line."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- a new run and the weights it starts from ------------------------------------------------------


def check_initialization(model: ModelConfig, weights: str | Path) -> list[str]:
    """Hold a new model against the weights that it is to begin with.

    Returns:
        Notices of what it computes otherwise than the weights were trained for, where that may be
        meant.

    Raises:
        ConfigError: the weights would mean something else in it, whether or not they have the same
            shapes.
    """
    found, _ = read_weights_config(weights)
    lengths = ("model.egpt.num_chunks",) if model.needs_encoder else ("model.max_seq_len",)
    differences = _differences_of_models(found, model, lengths)
    meant = {k: v for k, v in differences.items() if k in _MAY_CHANGE_AT_THE_START}
    refused = {k: v for k, v in differences.items() if k not in meant}
    if refused:
        raise ConfigError(
            f"training.initialize_from: {weights} was trained as another model: "
            f"{_there_and_here(refused)}"
        )
    return [f"{weights} was trained otherwise: {_from_to(meant)}"] if meant else []


def _differences_of_models(
    there: ModelConfig, here: ModelConfig, besides: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Keys in which the arithmetic of two models differs; and those ``besides`` it that differ.

    A default that follows from another key is not named for that key's sake.
    """
    raw = _different(flatten(RunConfig(model=there)), flatten(RunConfig(model=here)))
    found = _different(model_arithmetic(there), model_arithmetic(here))
    followed = {f"model.{name}" for name in RESOLVED} - set(raw)
    named = {key: pair for key, pair in found.items() if key not in followed}
    return {**named, **{key: raw[key] for key in besides if key in raw}}


# -- a resumed run and its checkpoint --------------------------------------------------------------


def run_identity(
    config: RunConfig,
    encoder: FrozenEncoder | None,
    corpus: str,
    base: str | None = None,
    judged: str | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint records of its run, for :func:`check_resume`.

    Args:
        encoder: the frozen one of an EGPT or DeepGPT.
        corpus: fingerprint of what the run learns from.
        base: digest of the weights beside which adapters are trained.
        judged: fingerprint of what its best checkpoint is chosen on.
    """
    training = config.training
    return {
        "encoder": encoder and encoder.fingerprint,
        "base": base,
        "encoder_arithmetic": encoder and model_arithmetic(encoder.config),
        "shards": corpus,
        "judged": judged,
        "global_batch_size": training.global_batch_size,
        "batch_ramp": training.batch_ramp.start and config_to_dict(training.batch_ramp),
        "seed": training.seed,
        "config": config_to_dict(config),
    }


def judged_by(config: RunConfig, fingerprints: Mapping[str, str]) -> str:
    """Fingerprint of what a run's best checkpoint is chosen on: a change of it makes the best so
    far a number of another kind.

    Args:
        fingerprints: of the run's data, by name.
    """
    name = config.checkpoint.best_of
    task = task_files(config.data.tasks).get(name)
    if task is None:
        of_set = "validation" if name == "validation" else f"validation_{name}"
        found = fingerprints.get(f"the {of_set} split") or fingerprints.get("the validation rows")
        # Named where it is on, so that what earlier checkpoints say without it stays.
        masked = ", masked after documents" if config.data.mask_after_document_end else ""
        return f"{name} {found} in samples of {config.model.sample_len}{masked}"
    try:
        found = hashlib.sha256(task.read_bytes()).hexdigest()
    except OSError:  # who reads it says so
        return name
    return f"{name} {found} in contexts of {config.model.sample_len}"


def check_resume(
    config: RunConfig, identity: Mapping[str, Any], folder: Path, manifest: Manifest
) -> list[str]:
    """Hold a run against the checkpoint that it is to go on from, before anything is loaded.

    Args:
        identity: this run's, of :func:`run_identity`.
        manifest: the one in ``folder``.

    Returns:
        Notices: at most one line that names every key that has changed.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model, encoder or run, or beyond the
            last step.
    """
    state = manifest.trainer
    saved = _saved_config(config, manifest, folder)
    changes = _different(flatten(saved), flatten(config))
    changes |= _changed_corpus(state.get("shards", ""), identity["shards"], changes)
    _check_same_run(changes, folder)
    if (kinds := changes.get("optimizer.kind")) is not None:
        raise CheckpointError(
            f"{folder} holds another optimizer's state: optimizer.kind is {kinds[0]} there and "
            f"{kinds[1]} here. Resume with the kind as it was, or begin a new run by "
            "training.initialize_from"
        )
    _check_same_groups(saved, config, folder)
    _check_same_model(saved.model, config.model, folder)
    _check_same_encoder(state, identity, folder)
    _check_same_adapters(saved, config, folder)
    _check_same_base(state, identity, config, folder)
    steps = config.training.steps
    if manifest.step > steps or (manifest.step == steps and "training.steps" in changes):
        raise CheckpointError(
            f"training.steps={steps} is not above the {manifest.step} steps that {folder} has "
            "done: give more, or name an earlier checkpoint in the file `latest`"
        )
    return _describe_changes(changes)


def recorded_micro_batch(config: RunConfig, manifest: Manifest, folder: Path) -> int | None:
    """The micro-batch of the run that made the checkpoint in ``folder``; None where it is not known
    (an earlier version's).
    """
    size = _saved_config(config, manifest, folder).training.micro_batch_size
    return None if size == "auto" else size


def _saved_config(config: RunConfig, manifest: Manifest, folder: Path) -> RunConfig:
    """The configuration of the run that made a checkpoint.

    Checkpoints of earlier versions do not hold it: then it is what the run wrote down when it last
    started, and failing that only the few values that every checkpoint has.
    """
    state = manifest.trainer
    values = state.get("config") or _recorded_config(config)
    saved = config if values is None else parse_section(RunConfig, values, "", [])
    ramp = state.get("batch_ramp")
    training = dataclasses.replace(
        saved.training,
        seed=state.get("seed", saved.training.seed),
        global_batch_size=state.get("global_batch_size", saved.training.global_batch_size),
        batch_ramp=BatchRampConfig(**ramp) if ramp else BatchRampConfig(),
    )
    saved = dataclasses.replace(saved, training=training)
    if (folder / "weights").is_dir():
        model, _, _ = read_any_config(folder / "weights")
        saved = dataclasses.replace(saved, model=model)
    return saved


def _changed_corpus(
    there: str, here: str, changes: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return what differs of the run's data: a digest, and of a blend how it is mixed."""
    pair = there.partition(" "), here.partition(" ")
    mixed_otherwise = pair[0][0] == pair[1][0] and "data.weights" in changes
    if there in ("", here) or mixed_otherwise:
        return {}
    return {"shards": (there[:12], here[:12])}


def _recorded_config(config: RunConfig) -> dict[str, Any] | None:
    path = Path(config.logging.directory) / "config.yaml"
    with contextlib.suppress(ConfigError):
        return read_yaml(path)[0] if path.is_file() else None
    return None


def _check_same_run(changes: Mapping[str, tuple[Any, Any]], folder: Path) -> None:
    """Other folders and another seed or corpus at once: nobody goes on with a run like that."""
    places = {k: v for k, v in changes.items() if k in _PLACES}
    others = {k: v for k, v in changes.items() if k in ("training.seed", "shards")}
    if places and others:
        raise CheckpointError(
            f"{folder} is of another run: {_there_and_here({**places, **others})}. To begin a new "
            "run with its weights set training.initialize_from; to go on with that run leave its "
            "folders or its seed and data as they were"
        )


def _check_same_groups(saved: RunConfig, config: RunConfig, folder: Path) -> None:
    """Under ZeRO stage 3 optimizer states lie in groups of so many parameters."""
    there, here = (
        run.deepspeed.get("zero_optimization", {}).get("sub_group_size") for run in (saved, config)
    )
    if there != here and 3 in (saved.parallel.zero_stage, config.parallel.zero_stage):
        raise CheckpointError(
            f"{folder} has optimizer states in other groups: "
            f"deepspeed.zero_optimization.sub_group_size is {there} there and {here} here. Resume "
            "with it as it was"
        )


def _check_same_model(saved: ModelConfig, ours: ModelConfig, folder: Path) -> None:
    differences = _differences_of_models(saved, ours)
    if differences:
        raise CheckpointError(
            f"{folder} was trained as another model: {_there_and_here(differences)}. Resume with "
            "the model section as it was, or begin a new run by training.initialize_from"
        )


def _check_same_encoder(
    state: Mapping[str, Any], identity: Mapping[str, Any], folder: Path
) -> None:
    saved, ours = state.get("encoder"), identity["encoder"]
    if saved != ours:
        raise CheckpointError(
            f"{folder} was trained over another encoder (fingerprint {str(saved)[:12]}, now "
            f"{str(ours)[:12]}): set model.encoder.source to the one it was trained with"
        )
    arithmetic = state.get("encoder_arithmetic")
    if not arithmetic:  # of an earlier version
        return
    differences = arithmetic_differences(arithmetic, identity["encoder_arithmetic"])
    if differences:
        raise CheckpointError(
            f"{folder} was trained over an encoder of the same weights that computes otherwise: "
            f"{_there_and_here(differences)} (in config.json of model.encoder.source)"
        )


def _check_same_adapters(saved: RunConfig, config: RunConfig, folder: Path) -> None:
    there, here = saved.training.lora, config.training.lora
    differences = {
        f"training.lora.{name}": (getattr(there, name), getattr(here, name))
        for name in ("rank", "alpha", "targets")
        if getattr(there, name) != getattr(here, name)
    }
    if differences:
        raise CheckpointError(
            f"{folder} was trained with other adapters: {_there_and_here(differences)}. Resume "
            "with training.lora as it was, or begin a new run"
        )


def _check_same_base(
    state: Mapping[str, Any], identity: Mapping[str, Any], config: RunConfig, folder: Path
) -> None:
    saved, ours = state.get("base"), identity["base"]
    if saved != ours:
        raise CheckpointError(
            f"{folder} was trained beside other weights than {config.training.initialize_from} "
            f"has (sha256 {str(saved)[:12]}, now {str(ours)[:12]}): set training.initialize_from "
            "to those with which it began"
        )


def _describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """One line on what has changed, first what the losses depend on."""
    titles: dict[Effect, str] = {
        "data order": "the samples of the steps to come change",
        "optimization": "the optimization changes",
        "none": "without effect on the losses",
    }
    parts = []
    for effect, title in titles.items():
        some = {k: v for k, v in changes.items() if _effect_in_the_same_model(k) == effect}
        if some:
            parts.append(f"{title}: {_from_to(some)}")
    return [f"since the checkpoint, {'; '.join(parts)}"] if parts else []


def _effect_in_the_same_model(key: str) -> Effect:
    """Keys of the model that are left are those that do nothing in it."""
    effect = EFFECTS.get(key, "data order")
    return "none" if effect == "arithmetic" else effect
