"""Rules between values: what divides what, what needs what.

``parsing`` has checked types; the range of a single number stands at its field (``ranges``).
"""

from __future__ import annotations

from collections.abc import Iterator

from megaegpt.config.batch_ramp import BatchRampConfig
from megaegpt.config.deepspeed_keys import deepspeed_problems
from megaegpt.config.freezing import part_problem
from megaegpt.config.lora import LoRAConfig, target_problem
from megaegpt.config.model import ModelConfig
from megaegpt.config.model_rules import has_effect, model_problems
from megaegpt.config.parallel import ParallelConfig
from megaegpt.config.parameter_groups import parameter_group_problems
from megaegpt.config.parsing import Problem, raise_problems
from megaegpt.config.paths import path_problems
from megaegpt.config.ranges import range_problems
from megaegpt.config.run import RunConfig
from megaegpt.config.training import OptimizerConfig, SpikeGuardConfig
from megaegpt.config.validation_sets import named_evaluation_problems

_MEMORY = ("model.egpt.memory_dim", "model.egpt.memory_pointers", "model.hidden_size")
_BATCH = {
    "parallel.tensor_parallel_size",
    "parallel.context_parallel_size",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.batch_ramp.start",
    "training.batch_ramp.increment",
    "training.batch_ramp.steps",
}


def validate(config: RunConfig, world_size: int | None = None) -> None:
    """Check every rule between values; ``world_size`` (processes) adds those about ranks.

    Raises:
        ConfigError: one message that lists all problems.
    """
    raise_problems("configuration", find_problems(config, world_size))


def validate_model(model: ModelConfig, source: str, tp: int = 1) -> None:
    """Check the rules of a model by itself, on ``tp`` tensor-parallel ranks; the encoder's source
    may still be open.

    Raises:
        ConfigError: one message that lists all problems, beginning with ``source``.
    """
    problems = find_problems(RunConfig(model=model, parallel=ParallelConfig(tp)))
    source = f"{source} on {tp} tensor-parallel ranks" if tp > 1 else source
    about_run = {"model.encoder.source"}
    raise_problems(
        source,
        [p for p in problems if p.keys[0].startswith("model.") and about_run.isdisjoint(p.keys)],
    )


def find_problems(
    config: RunConfig, world_size: int | None = None, *, model_is_known: bool = True
) -> list[Problem]:
    """All problems of values that have the right types.

    A rule is left out where one of its values is out of range: 0 divides nothing.

    Args:
        model_is_known: ``config.model`` is the run's; False: weights will say what that is.
    """
    problems = [*range_problems(config), *path_problems(config)]
    broken = {key for problem in problems for key in problem.keys}
    if model_is_known and not any(key.startswith(("model.", "parallel.")) for key in broken):
        problems += model_problems(config.model, config.parallel.tensor_parallel_size)
    if broken.isdisjoint(_BATCH):
        problems += _batch(config, world_size)
    if model_is_known:
        problems += _context(config)
    problems += _partitioned_parameters(config)
    problems += [p for p in _schedule(config) if broken.isdisjoint(p.keys)]
    problems += [p for p in _blend(config) if broken.isdisjoint(p.keys)]
    problems += parameter_group_problems(config.optimizer.groups)
    problems += _freezing(config, config.model.num_layers if model_is_known else None)
    problems += _stored_predictions(config)
    if broken.isdisjoint(_MEMORY):
        problems += _new_memory(config)
    problems += _adapters(config)
    problems += [p for p in _profile(config) if broken.isdisjoint(p.keys)]
    problems += _validation_split(config)
    problems += named_evaluation_problems(config)
    problems += deepspeed_problems(config.deepspeed, config.parallel.zero_stage)
    return problems


def _new_memory(config: RunConfig) -> Iterator[Problem]:
    """The keys of a token memory begin as directions of the encoder's states, each pointer's as
    others.
    """
    model, egpt = config.model, config.model.egpt
    begins = config.data.train and config.training.initialize_from is None
    if not begins or not has_effect(model, "egpt.memory_dim"):
        return
    if egpt.memory_pointers * egpt.memory_dim > model.hidden_size:
        yield Problem(
            _MEMORY,
            f"model.egpt.memory_dim={egpt.memory_dim} for each of "
            f"model.egpt.memory_pointers={egpt.memory_pointers} is more than "
            f"model.hidden_size={model.hidden_size}: keys are made of so many numbers of a state",
        )


def _partitioned_parameters(config: RunConfig) -> Iterator[Problem]:
    """What cannot be where each rank has a part of every parameter only."""
    if config.parallel.zero_stage != 3:
        if config.parallel.offload != "none":
            yield Problem(
                ("parallel.offload", "parallel.zero_stage"),
                f"parallel.offload={config.parallel.offload} needs parallel.zero_stage=3, not "
                f"{config.parallel.zero_stage}",
            )
        return
    if config.optimizer.kind == "muon":
        yield Problem(
            ("parallel.zero_stage", "optimizer.kind"),
            "optimizer.kind=muon steps whole matrices, of which parallel.zero_stage=3 leaves parts "
            "to each rank: use zero_stage=2, or adamw",
        )
    if config.training.compile:
        yield Problem(
            ("parallel.zero_stage", "training.compile"),
            "training.compile=true compiles whole blocks, between whose layers "
            "parallel.zero_stage=3 gathers parameters: use zero_stage=2, or compile=false",
        )


def _schedule(config: RunConfig) -> Iterator[Problem]:
    optimizer, steps = config.optimizer, config.training.steps
    warmup = optimizer.warmup_steps
    if optimizer.kind == "adamw" and optimizer.momentum != OptimizerConfig.momentum:
        yield Problem(
            ("optimizer.momentum", "optimizer.kind"),
            f"optimizer.momentum={optimizer.momentum} has no effect without optimizer.kind=muon",
        )
    guard = config.training.spike_guard
    if guard.factor is None and guard != SpikeGuardConfig():
        key = "training.spike_guard"
        keys = (f"{key}.factor", f"{key}.window")
        yield Problem(keys, f"{key} has no effect without {key}.factor")
    if optimizer.min_lr > optimizer.lr and optimizer.schedule != "constant":
        yield Problem(
            ("optimizer.min_lr", "optimizer.lr"),
            f"optimizer.min_lr={optimizer.min_lr} must not be above optimizer.lr={optimizer.lr}",
        )
    if optimizer.schedule in ("cosine", "linear"):
        end = steps if optimizer.decay_steps is None else optimizer.decay_steps
        name = "training.steps" if optimizer.decay_steps is None else "optimizer.decay_steps"
        if end <= warmup:
            yield Problem(
                (name, "optimizer.warmup_steps"),
                f"{name}={end} must be greater than optimizer.warmup_steps={warmup}: "
                "lower that too, to 0 for a short try",
            )
    elif optimizer.schedule == "wsd" and warmup + (optimizer.decay_steps or steps // 5) > steps:
        yield Problem(
            ("training.steps", "optimizer.decay_steps", "optimizer.warmup_steps"),
            f"optimizer.warmup_steps={warmup} and optimizer.decay_steps="
            f"{_or_null(optimizer.decay_steps)} do not fit in training.steps={steps}",
        )


def _batch(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Processes = TP x CP x DP, and global batch = micro batch x DP x gradient accumulation."""
    training, sharing = config.training, config.parallel.ranks_of_a_sample
    batch, micro = training.global_batch_size, training.micro_batch_size
    least = 1 if micro == "auto" else micro
    if world_size is not None and world_size % sharing:
        sizes = f"parallel.tensor_parallel_size={config.parallel.tensor_parallel_size}"
        if config.parallel.context_parallel_size > 1:
            context = config.parallel.context_parallel_size
            sizes += f" x parallel.context_parallel_size={context}"
        yield Problem(
            ("parallel.tensor_parallel_size", "parallel.context_parallel_size"),
            f"{world_size} processes are not divisible by {sizes}",
        )
        world_size = None
    dp = 1 if world_size is None else world_size // sharing
    multiple = least * dp
    if batch % multiple:
        ranks = f"{dp} data-parallel ranks" if dp > 1 else ""
        size = "" if micro == "auto" else f"training.micro_batch_size={micro}"
        suggestion = -(-batch // multiple) * multiple
        yield Problem(
            ("training.global_batch_size", "training.micro_batch_size"),
            f"training.global_batch_size={batch} is not divisible by "
            f"{' x '.join(part for part in (size, ranks) if part)}: use for example {suggestion}",
        )
    else:
        yield from _batch_ramp(config, multiple)


def _context(config: RunConfig) -> Iterator[Problem]:
    size = config.parallel.context_parallel_size
    chunks = config.model.egpt.num_chunks
    if config.model.needs_encoder and size > 0 and chunks % size:
        yield Problem(
            ("model.egpt.num_chunks", "parallel.context_parallel_size"),
            f"model.egpt.num_chunks={chunks} is not divisible by "
            f"parallel.context_parallel_size={size}, which deals every rank as many chunks: use "
            f"for example {-(-chunks // size) * size}",
        )


def _batch_ramp(config: RunConfig, multiple: int) -> Iterator[Problem]:
    """Every size on the way is whole micro-steps, and the way leads upwards."""
    training, ramp = config.training, config.training.batch_ramp
    key = "training.batch_ramp"
    if ramp.start is None:
        if ramp != BatchRampConfig():
            keys = (f"{key}.start", f"{key}.increment", f"{key}.steps")
            yield Problem(keys, f"{key} has no effect without {key}.start")
        return
    if ramp.start >= training.global_batch_size:
        yield Problem(
            (f"{key}.start", "training.global_batch_size"),
            f"{key}.start={ramp.start} must be below "
            f"training.global_batch_size={training.global_batch_size}",
        )
    for name, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % multiple:
            yield Problem(
                (f"{key}.{name}", "training.micro_batch_size"),
                f"{key}.{name}={value} is not divisible by {multiple}, the samples of a "
                f"micro-step: use for example {-(-value // multiple) * multiple}",
            )
    if config.batches.ramp_steps >= training.steps:
        yield Problem(
            (f"{key}.steps", "training.steps"),
            f"{key} takes {config.batches.ramp_steps} steps, training.steps={training.steps}: "
            f"global_batch_size={training.global_batch_size} is never reached",
        )


def _blend(config: RunConfig) -> Iterator[Problem]:
    """A weight for each corpus of a blend."""
    weights, corpora = config.data.weights, len(config.data.train)
    if weights and len(weights) != corpora:
        yield Problem(
            ("data.weights", "data.train"),
            f"data.weights={list(weights)} must be one number for each of the {corpora} entries "
            "of data.train",
        )


def _freezing(config: RunConfig, num_layers: int | None) -> Iterator[Problem]:
    for part in config.training.freeze:
        if wrong := part_problem(part, num_layers):
            yield Problem(("training.freeze", "model.num_layers"), f"training.freeze: {wrong}")


def _stored_predictions(config: RunConfig) -> Iterator[Problem]:
    """What blocks and head predict is the same in every step and window only where nothing about
    them changes; whether ``training.freeze`` names all of them is seen when the model is built.
    """
    model, key = config.model, "data.predictions"
    if config.data.predictions == "online":
        return
    if not model.has_token_memory:
        yield Problem(
            (key, "model.kind", "model.egpt.token_memory"),
            f"{key}=stored is for an egpt with model.egpt.token_memory, which alone learns",
        )
        return
    for other, given, needed in (
        (
            "data.token_features",
            config.data.token_features == "stored",
            "=stored: the token memory reads the encoder's states",
        ),
        (
            "model.egpt.memory_gate",
            model.egpt.memory_gate,
            "=true, closed: the blocks must not see earlier chunks",
        ),
        (
            "training.freeze",
            bool(config.training.freeze),
            ": all parts but the token memory",
        ),
    ):
        if not given:
            yield Problem((key, other), f"{key}=stored needs {other}{needed}")
    if config.parallel.zero_stage == 3:  # a split's last window has a chunk that is not stored
        yield Problem(
            (key, "parallel.zero_stage"),
            f"{key}=stored is for parallel.zero_stage of 0 to 2: with 3 all ranks must run the "
            "blocks together, and a rank runs them for what is not stored only",
        )
    if model.dropout:
        yield Problem(
            (key, "model.dropout"),
            f"{key}=stored is without dropout: model.dropout={model.dropout}",
        )


def _adapters(config: RunConfig) -> Iterator[Problem]:
    """Adapters stand beside weights that are given, and that nothing else changes."""
    training, lora, key = config.training, config.training.lora, "training.lora"
    if lora.rank is None:
        if lora != LoRAConfig():
            names = ("rank", "alpha", "dropout", "targets")
            keys = tuple(f"{key}.{name}" for name in names)
            yield Problem(keys, f"{key} has no effect without {key}.rank")
        return
    for target in lora.targets:
        if wrong := target_problem(target):
            yield Problem((f"{key}.targets",), f"{key}.targets: {wrong}")
    if not lora.targets:
        yield Problem((f"{key}.targets",), f"{key}.targets is empty: nothing would be trained")
    if training.initialize_from is None:
        yield Problem(
            (f"{key}.rank", "training.initialize_from"),
            f"{key}.rank={lora.rank} needs training.initialize_from: adapters are trained beside "
            "weights that stay as they are",
        )
    if training.freeze:
        yield Problem(
            (f"{key}.rank", "training.freeze"),
            f"training.freeze={list(training.freeze)} is for training without adapters: "
            f"{key}.rank={lora.rank} freezes all of the model's own weights",
        )
    if config.optimizer.kind == "muon":
        yield Problem(
            (f"{key}.rank", "optimizer.kind"),
            f"optimizer.kind=muon steps the model's own matrices, which {key}.rank={lora.rank} "
            "freezes: use adamw",
        )


def _validation_split(config: RunConfig) -> Iterator[Problem]:
    """Keys whose decisions depend on the validation loss need a validation split."""
    judged = f"{config.checkpoint.best_of}="
    by_task = any(entry.startswith(judged) for entry in config.data.tasks)
    if not config.data.train or config.data.validation or by_task:
        return
    if config.training.patience is not None:
        yield Problem(
            ("training.patience", "data.validation"),
            f"training.patience={config.training.patience} needs data.validation",
        )
    if config.checkpoint.keep_best:
        yield Problem(
            ("checkpoint.keep_best", "data.validation"),
            "checkpoint.keep_best=true needs data.validation",
        )


def _profile(config: RunConfig) -> Iterator[Problem]:
    start, steps = config.logging.profile.start, config.training.steps
    if start is not None and start > steps:
        yield Problem(
            ("logging.profile.start", "training.steps"),
            f"logging.profile.start={start} is after the last step, training.steps={steps}",
        )


def _or_null(value: int | None) -> str:
    return "null" if value is None else str(value)
