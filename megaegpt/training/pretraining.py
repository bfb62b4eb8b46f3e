"""From a configuration to a trained model: builds the parts of a run and starts the loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from megaegpt.collector import paused_collector
from megaegpt.config import BatchSchedule, GenerationConfig, RunConfig
from megaegpt.config.loading import config_to_yaml
from megaegpt.config.validation import validate
from megaegpt.config.validation_sets import task_files
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.blend import Blend
from megaegpt.data.tokens.loader import TrainingLoader
from megaegpt.data.tokens.token_ids import known_byte_lengths
from megaegpt.data.tokens.windows import Windows
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.evaluation.scorer import Scorer
from megaegpt.evaluation.task_in_training import TaskInTraining
from megaegpt.evaluation.text_loss import Evaluator
from megaegpt.files import write_whole
from megaegpt.generation.generator import Prompt
from megaegpt.generation.trained import LoadedModel
from megaegpt.model.build import Model, build_inputs
from megaegpt.model.calling import ModelInputs
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.fused_block import can_be_fused
from megaegpt.model.weights import load_weights
from megaegpt.parallel.affinity import describe_threads
from megaegpt.parallel.block_operators import kernel_problem
from megaegpt.parallel.chunks import ChunkShares
from megaegpt.parallel.compiling import compile_problem
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import broadcast_object, raising_together
from megaegpt.planning.hardware import peak_flops
from megaegpt.planning.summary import ModelSize, describe_run, measure_model
from megaegpt.precision import DTYPES, Precision, resolve_precision, slow_precision_notice
from megaegpt.training.automatic_batch import settle_micro_batch
from megaegpt.training.checkpoint.exported_weights import exported_weights
from megaegpt.training.checkpoint.manager import CheckpointManager, TrainerState
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.consistency import (
    check_ranks_agree,
    configuration_facts,
    corpus_facts,
)
from megaegpt.training.consumption import Consumption
from megaegpt.training.engine.deterministic import make_deterministic
from megaegpt.training.feature_stores import load_encoder, needs_store, prepare_store
from megaegpt.training.frozen_predictions import FrozenDecoder
from megaegpt.training.identity import check_resume, judged_by, recorded_micro_batch, run_identity
from megaegpt.training.logging.best import BestLoss
from megaegpt.training.logging.earlier import set_aside_records
from megaegpt.training.logging.memory_snapshot import MemorySnapshot
from megaegpt.training.logging.metrics import SpeedMeter, device_name
from megaegpt.training.logging.monitor import Monitor, has_evaluation
from megaegpt.training.logging.profiling import StepProfiler
from megaegpt.training.memory_error import explaining_memory
from megaegpt.training.run_data import PretrainingData, RunData
from megaegpt.training.starting_model import base_of_adapters, starting_model
from megaegpt.training.stopping import StopRequests
from megaegpt.training.trainer import Trainer

SampleText = Callable[[Model, FrozenEncoder | None, Tokenizer, GenerationConfig, Prompt], str]
"""Writes a text with the model in training; ``megaegpt.generation`` has it."""


def pretrain(
    config: RunConfig,
    grid: ProcessGrid,
    *,
    resume: bool = False,
    stops: StopRequests | None = None,
    sample_text: SampleText | None = None,
) -> bool:
    """Train a gpt, egpt or deepgpt on token shards; see :func:`train`."""
    read_data = functools.partial(PretrainingData, rank=grid.rank, world_size=grid.world_size)
    return train(config, grid, read_data, resume=resume, stops=stops, sample_text=sample_text)


def train(
    config: RunConfig,
    grid: ProcessGrid,
    read_data: Callable[[RunConfig], RunData],
    *,
    resume: bool = False,
    stops: StopRequests | None = None,
    sample_text: SampleText | None = None,
) -> bool:
    """Train on what ``read_data`` gives. Collective over all ranks of ``grid``.

    Args:
        read_data: called once on every rank, after the configuration is checked.
        resume: go on from the latest checkpoint if there is one.
        stops: signals and time limit.
        sample_text: called at every evaluation if ``generation.max_new_tokens`` is not 0.

    Returns:
        True if the run is complete, False if it was stopped, and saved, before its last step.

    Raises:
        MegaEGPTError: whatever is the user's to fix, on every rank.
    """
    data, checkpoints, precision = _open_run(config, grid, read_data, resume)
    latest = broadcast_object(checkpoints.latest, grid) if resume else None
    notices: list[str] = []
    saved, recorded = None, None
    if latest is not None:
        saved = broadcast_object(lambda: Manifest.read(latest), grid)
        if config.training.micro_batch_size == "auto":
            recorded = broadcast_object(lambda: recorded_micro_batch(config, saved, latest), grid)
    config = settle_micro_batch(config, grid, precision, data.longest_sample, recorded, notices)
    encoder = load_encoder(config, grid, precision)
    base = base_of_adapters(config, grid)
    judged = broadcast_object(lambda: judged_by(config, data.fingerprints), grid)
    identity = run_identity(config, encoder, data.fingerprint, base and base.sha256, judged)
    state: TrainerState = {}
    if latest is not None and saved is not None:
        notices += broadcast_object(lambda: check_resume(config, identity, latest, saved), grid)
        if broadcast_object(
            lambda: _says_complete(config, data, latest, saved.step, notices), grid
        ):
            return True
        state = saved.trainer
    consumption = Consumption.restored(config.batches, data.tokens_per_sample, state)
    notices += consumption.notices(state, identity)
    _settle_trials(config, grid, precision)
    compiles = config.training.compile and compile_problem(grid.device.type) is None
    encoder_config = None if encoder is None else encoder.config
    snapshot = MemorySnapshot(config.logging, grid)
    explaining = functools.partial(
        explaining_memory, config, grid, encoder_config, precision, snapshot, data.longest_sample
    )
    with explaining():
        model = starting_model(
            config, grid, data.streams.get("train"), encoder, compiles, notices, new=latest is None
        )
    if latest is not None and config.training.freeze:
        # An engine's state has only what is trained, and the rest's source may have changed since.
        with raising_together(grid):
            load_weights(model, latest / "weights", grid, allow_nonfinite=True)
    tasks = _tasks(config, grid, LoadedModel(model, encoder, data.tokenizer), precision)
    feeds = _feeds(config, grid, data, encoder, model, precision)
    inputs = feeds["train"]
    snapshot.start()
    with paused_collector(), explaining():
        from megaegpt.training.engine.engine import Engine  # DeepSpeed: seconds; all is checked

        engine = Engine(model, grid, config, inputs.loss)
        if latest is not None:
            checkpoints.load(engine, latest)
    size = measure_model(config, encoder_config, data.tokens_per_sample)
    with raising_together(grid):
        best, done = BestLoss.restored(state.get("best", {})), state.get("step", 0)
        judged_anew = state.get("judged") not in (None, judged)
        if judged_anew:
            best = BestLoss()
            if config.training.patience is not None or config.checkpoint.keep_best:
                notices.append("the best is sought anew: it was chosen on something else before")
        engine.spike_guard.restore(state.get("gradient_norms", []))
        begins = grid.is_main and latest is None  # with --resume too, where there is no checkpoint
        if begins and (kept := set_aside_records(config.logging.directory)):
            notices.append(f"records of an earlier run lay here: they are in {kept} now")
        monitor = _monitor(config, grid, data, done)
    _introduce(config, grid, monitor, data, consumption, size, precision, state, resume, notices)
    trainer = Trainer(
        config=config,
        model=model,
        engine=engine,
        loader=_loader(config, grid, data, inputs, consumption.batches, state.get("step", 0)),
        consumption=consumption,
        checkpoints=checkpoints,
        monitor=monitor,
        meter=_meter(config, grid, data, size, precision),
        stops=stops or StopRequests(),
        profiler=StepProfiler(config.logging, grid, monitor.log),
        evaluators=_evaluators(config, grid, data, feeds),
        tasks=tasks,
        sample=_sampler(config, model, encoder, data, sample_text),
        parts={
            "weights": functools.partial(exported_weights, config, model, grid, data, encoder, base)
        },
        identity=identity,
        progress=data.samples.progress if isinstance(data.samples, Blend) else None,
        best=best,
        judged_anew=judged_anew,
        done=state.get("step", 0),
        skipped=state.get("skipped", 0),
        spikes=state.get("spikes", 0),
    )
    try:
        with explaining():
            return trainer.train()
    finally:
        snapshot.stop()
        monitor.close()
        engine.close()


def _open_run(
    config: RunConfig, grid: ProcessGrid, read_data: Callable[[RunConfig], RunData], resume: bool
) -> tuple[RunData, CheckpointManager, Precision]:
    """Read the data and check all that needs no model, on all ranks together and between them."""
    check_ranks_agree(lambda: configuration_facts(config), grid)
    with raising_together(grid):
        validate(config, grid.world_size)
        precision = resolve_precision(config.training.precision, grid.device)
        if config.training.deterministic:
            make_deterministic()
        data = read_data(config)
        _check_held_out(config, data)
        checkpoints = _checkpoints(config, resume)
    check_ranks_agree(lambda: corpus_facts(data.fingerprints, precision), grid)
    return data, checkpoints, precision


def _settle_trials(config: RunConfig, grid: ProcessGrid, precision: Precision) -> None:
    """All ranks compile, and take kernels, where all of them can. Collective over all ranks."""
    device_type = grid.device.type
    if config.training.compile or device_type == "cuda":
        compile_problem.settle(device_type, grid)
    if _has_kernels(config, grid, precision):
        kernel_problem.settle(device_type, grid)


def _has_kernels(config: RunConfig, grid: ProcessGrid, precision: Precision) -> bool:
    on_gpu = grid.device.type == "cuda"
    return on_gpu and precision != "fp32" and can_be_fused(config.model, grid)


# -- what the model is fed with -------------------------------------------------------------


def _feeds(
    config: RunConfig,
    grid: ProcessGrid,
    data: RunData,
    encoder: FrozenEncoder | None,
    model: Model,
    precision: Precision,
) -> dict[str, ModelInputs]:
    """How the model is fed from each split. Stores are computed here, before an engine has the
    model.
    """
    decoder = None
    if config.data.predictions == "stored":
        assert isinstance(model, EGPT)
        decoder = FrozenDecoder(model, grid, precision)
    splits = ["train", *([] if data.validation is None else ["validation"])]
    splits += [_set_split(name) for name in data.validation_sets]
    return {
        split: _inputs(config, grid, data, encoder, decoder, precision, split) for split in splits
    }


def _set_split(name: str) -> str:
    """The split of one of ``data.validation_sets``."""
    return f"validation_{name}"


def _inputs(
    config: RunConfig,
    grid: ProcessGrid,
    data: RunData,
    encoder: FrozenEncoder | None,
    decoder: FrozenDecoder | None,
    precision: Precision,
    split: str,
) -> ModelInputs:
    """How the model is fed from a split; computes the split's stores if need be.

    Only training windows are shared by context-parallel ranks: what is held out gives each of them
    windows of its own.
    """
    shared = split == "train" and grid.cp_size > 1 and config.model.needs_encoder
    store, predictions, stream = None, None, data.streams.get(split)
    # A split shorter than a chunk has none to store: it is encoded in the loop.
    if stream is not None and needs_store(config) and len(stream) >= config.model.egpt.chunk_size:
        assert encoder is not None
        store = prepare_store(config, grid, encoder, stream, split, precision)
        if decoder is not None:
            predictions = decoder.prepare(config, store, stream, split)
    return build_inputs(
        config.model,
        encoder,
        DTYPES[precision],
        token_states=store if config.data.token_features == "stored" else None,
        history=store if config.data.history_features == "stored" else None,
        shares=ChunkShares(grid) if shared else None,
        predictions=predictions,
    )


def _loader(
    config: RunConfig,
    grid: ProcessGrid,
    data: RunData,
    inputs: ModelInputs,
    batches: BatchSchedule,
    start_step: int,
) -> TrainingLoader:
    """This rank's micro-batches from a step on."""
    return TrainingLoader(
        data.samples,
        grid,
        batches,
        config.training.chosen_micro_batch_size,
        start_step,
        config.data.prefetch,
        prepare=lambda batch: inputs.prepare(data.trim(batch)),
    )


# -- what is measured and written on the way -------------------------------------------------------


def _evaluators(
    config: RunConfig, grid: ProcessGrid, data: RunData, feeds: Mapping[str, ModelInputs]
) -> dict[str, Evaluator]:
    """Evaluate what is held out, by its name: ``validation`` first, if there is one."""

    def evaluator(windows: Windows, split: str) -> Evaluator:
        stream = data.streams.get(split)
        lengths = (
            data.tokenizer.token_byte_lengths
            if stream is None
            else known_byte_lengths(stream, data.tokenizer, config.model.vocab_size)
        )
        return Evaluator(
            windows,
            num_chunks=data.num_chunks,
            inputs=feeds[split],
            grid=grid,
            batch_size=config.training.chosen_micro_batch_size,
            token_byte_lengths=lengths,
            trim=data.trim,
        )

    found: dict[str, Evaluator] = {}
    if data.validation is not None:
        found["validation"] = evaluator(data.validation, "validation")
    for name, windows in data.validation_sets.items():
        found[name] = evaluator(windows, _set_split(name))
    return found


def _tasks(
    config: RunConfig, grid: ProcessGrid, trained: LoadedModel, precision: Precision
) -> dict[str, TaskInTraining]:
    """Score ``data.tasks``, by their names."""
    rows = config.training.chosen_micro_batch_size
    return {
        name: TaskInTraining(
            name, path, trained.model, Scorer(trained, grid, rows, DTYPES[precision]), grid
        )
        for name, path in task_files(config.data.tasks).items()
    }


def _sampler(
    config: RunConfig,
    model: Model,
    encoder: FrozenEncoder | None,
    data: RunData,
    sample_text: SampleText | None,
) -> Callable[[], str] | None:
    """Writes sample texts, if the configuration asks for them."""
    generation = config.generation
    if sample_text is None or generation.max_new_tokens == 0:
        return None
    prompt = data.prompt(generation.prompt)
    return functools.partial(sample_text, model, encoder, data.tokenizer, generation, prompt)


def _meter(
    config: RunConfig, grid: ProcessGrid, data: RunData, size: ModelSize, precision: Precision
) -> SpeedMeter:
    """Measures speed against all ranks' devices."""
    peak = peak_flops(device_name(grid.device), precision)
    if config.training.freeze or config.training.lora.rank is not None:
        peak = None  # the operations are counted as if everything were trained
    return SpeedMeter(
        batches=config.batches,
        tokens_per_sample=data.tokens_per_sample,
        total_steps=config.training.steps,
        flops_per_token=size.flops_per_token,
        peak_flops=None if peak is None else peak * grid.world_size,
        device=grid.device,
    )


def _monitor(config: RunConfig, grid: ProcessGrid, data: RunData, done: int) -> Monitor:
    """One that knows the steps at which the best was judged; where a run does not measure what it
    would be judged by, those after which the last of all that it does was.
    """
    judged, tasks = config.checkpoint.best_of, task_files(config.data.tasks)
    measured = ["validation"] * (data.validation is not None)
    measured += [*data.validation_sets, *tasks]
    if judged not in measured:
        judged = next(reversed(measured), judged)
    return Monitor(config.logging, grid, done, judged, tasks)


def _introduce(
    config: RunConfig,
    grid: ProcessGrid,
    monitor: Monitor,
    data: RunData,
    consumption: Consumption,
    size: ModelSize,
    precision: Precision,
    state: TrainerState,
    resume: bool,
    notices: list[str],
) -> None:
    """Show and record what the run is, before its first step."""
    resolved = config_to_yaml(config)
    with raising_together(grid):
        if grid.is_main:
            write_whole(Path(config.logging.directory) / "config.yaml", resolved.encode())
    monitor.configuration(config)
    name = device_name(grid.device)
    steps = config.training.steps
    for line in describe_run(
        config,
        size,
        grid.dp_size,
        precision,
        name,
        sample_tokens=data.tokens_per_sample,
        total_tokens=consumption.tokens(steps),
    ):
        monitor.log(line)
    if grid.device.type == "cpu" and grid.world_size > 1:
        monitor.log(f"{'threads':<11}{describe_threads()}")
    monitor.log(f"{'data':<11}{data.describe(consumption.batches.samples_before(steps))}")
    if (slow := slow_precision_notice(precision, grid.device)) is not None:
        notices = [slow, *notices]
    on_gpu = grid.device.type == "cuda"  # where the head's loss is compiled in any case
    if (config.training.compile or on_gpu) and (problem := compile_problem(grid.device.type)):
        slower = "; the head's loss is slower for it" if on_gpu else ""
        off = f"training.compile is off, it does not work here: {problem}{slower}"
        notices = [*notices, off]
    if config.logging.memory_snapshot and not on_gpu:
        notices = [*notices, "logging.memory_snapshot has no effect on a CPU"]
    if _has_kernels(config, grid, precision) and (problem := kernel_problem(grid.device.type)):
        notices = [*notices, f"blocks are computed without their own kernels, as {problem}"]
    for notice in notices:
        monitor.log(f"notice: {notice}")
    if state:
        monitor.log(f"resuming after step {state['step']}")
    elif resume:
        monitor.log(f"no checkpoint in {config.checkpoint.directory}: starting at step 0")


# -- resuming --------------------------------------------------------------------------------------


def _says_complete(
    config: RunConfig, data: RunData, latest: Path, step: int, notices: list[str]
) -> bool:
    """Whether nothing is left to do, which lines say then; all files stay as they are."""
    if step < config.training.steps:
        return False
    evaluates = data.validation is not None or bool(config.data.tasks)
    at_end = step == config.training.steps
    if evaluates and at_end and not has_evaluation(Path(config.logging.directory), step):
        return False  # it ended between its last checkpoint and its last evaluation
    for notice in notices:
        print(f"notice: {notice}")
    print(
        f"complete: {latest} is after step {step} of {config.training.steps}; raise "
        "training.steps to train on",
        flush=True,
    )
    return True


def _check_held_out(config: RunConfig, data: RunData) -> None:
    needed = config.training.patience is not None or config.checkpoint.keep_best
    by_task = config.checkpoint.best_of in task_files(config.data.tasks)
    if needed and data.validation is None and not by_task:
        raise ConfigError(
            "training.patience and checkpoint.keep_best need a validation split: this run has none"
        )


def _checkpoints(config: RunConfig, resume: bool) -> CheckpointManager:
    saving = config.checkpoint
    checkpoints = CheckpointManager(saving.directory, saving.keep, saving.keep_every)
    latest = checkpoints.latest()
    if latest is not None and not resume:
        raise CheckpointError(
            f"{latest} is from an earlier run: go on with it by --resume, or set "
            "checkpoint.directory and logging.directory to new folders"
        )
    return checkpoints
