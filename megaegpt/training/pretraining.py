"""From a configuration to a trained model: builds the parts of a run and starts the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megaegpt.config import GenerationConfig, RunConfig
from megaegpt.config.loading import config_to_dict, config_to_yaml
from megaegpt.config.validation import validate
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.blend import Blend
from megaegpt.data.tokens.loader import TrainingLoader
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.files import write_whole
from megaegpt.interop.sources import resolve_weights_source
from megaegpt.model.build import Model, build_model
from megaegpt.model.calling import ChunkInputs, ModelInputs, SequenceInputs
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.initialization import check_same_arithmetic, initialize_from_encoder
from megaegpt.model.parts import freeze
from megaegpt.model.weights import load_weights, read_weights_config, save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import broadcast_object, raising_together
from megaegpt.planning.summary import ModelSize, describe_run, measure_model
from megaegpt.precision import DTYPES, resolve_precision, slow_precision_notice
from megaegpt.training.checkpoint.manager import CheckpointManager, TrainerState
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.engine.compiling import compile_problem
from megaegpt.training.engine.engine import Engine
from megaegpt.training.evaluation import Evaluator
from megaegpt.training.feature_stores import load_encoder, needs_store, prepare_store
from megaegpt.training.logging.best import BestLoss
from megaegpt.training.logging.metrics import SpeedMeter, device_name, peak_flops
from megaegpt.training.logging.monitor import Monitor, has_validation
from megaegpt.training.run_data import PretrainingData, RunData
from megaegpt.training.stopping import StopRequests
from megaegpt.training.trainer import Trainer

SampleText = Callable[[Model, FrozenEncoder | None, Tokenizer, GenerationConfig], str]
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
    read_data = partial(PretrainingData, rank=grid.rank, world_size=grid.world_size)
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
    with raising_together(grid):
        validate(config, grid.world_size)
        data = read_data(config)
        _check_held_out(config, data)
        checkpoints = _checkpoints(config, resume)
    latest = broadcast_object(checkpoints.latest, grid) if resume else None
    if broadcast_object(lambda: _says_complete(config, data, latest), grid):
        return True
    run = _Run(config, grid, data)
    state: TrainerState = {} if latest is None else run.restore(checkpoints, latest)
    with raising_together(grid):
        differences = _differences(state, run.identity)
        monitor = Monitor(config.logging, grid, state.get("step", 0))
    run.introduce(monitor, state, resume, differences)
    trainer = Trainer(
        config=config,
        engine=run.engine,
        inputs=run.inputs("train"),
        loader=run.loader(state.get("step", 0)),
        checkpoints=checkpoints,
        monitor=monitor,
        meter=run.meter(),
        stops=stops or StopRequests(),
        evaluator=run.evaluator(),
        sample=run.sampler(sample_text),
        writers={"weights": run.export_weights},
        identity=run.identity,
        progress=data.samples.progress if isinstance(data.samples, Blend) else None,
        best=BestLoss(**state.get("best", {})),
        done=state.get("step", 0),
        skipped=state.get("skipped", 0),
    )
    try:
        return trainer.train()
    finally:
        monitor.close()
        run.engine.close()


@dataclass
class _Run:
    """The model under its engine, and what is made of it."""

    config: RunConfig
    grid: ProcessGrid
    data: RunData

    def __post_init__(self) -> None:
        config, grid, training = self.config, self.grid, self.config.training
        with raising_together(grid):
            self.precision = resolve_precision(training.precision, grid.device)
        compiles = training.compile and compile_problem(grid.device.type) is None
        self.encoder = load_encoder(config, grid, self.precision)
        if self.encoder is not None and compiles:
            for block in self.encoder.gpt.stack.blocks:
                block.compile()
        self.model = build_model(
            config.model,
            grid,
            seed=training.seed,
            activation_checkpointing=training.activation_checkpointing,
            compile_blocks=compiles,
        )
        if self.encoder is not None and config.model.encoder.initialize_decoder:
            source = resolve_weights_source(str(config.model.encoder.source), grid)
            with raising_together(grid):
                initialize_from_encoder(self.model, source, grid)
        if training.initialize_from is not None:
            weights = resolve_weights_source(training.initialize_from, grid)
            with raising_together(grid):
                self._check_encoder(weights)
                check_same_arithmetic(config.model, weights)
                load_weights(self.model, weights, grid)
        with raising_together(grid):
            freeze(self.model, training.freeze)
        self.engine = Engine(self.model, grid, config)
        self.size: ModelSize = measure_model(
            config, None if self.encoder is None else self.encoder.config
        )
        self.identity = {
            "encoder": self.encoder and self.encoder.fingerprint,
            "shards": self.data.fingerprint,
            "global_batch_size": training.global_batch_size,
            "batch_ramp": training.batch_ramp.start and config_to_dict(training.batch_ramp),
            "seed": training.seed,
        }

    def restore(self, checkpoints: CheckpointManager, folder: Path) -> TrainerState:
        """Go on from a checkpoint, whatever has become of where frozen parts came from."""
        if self.config.training.freeze:  # the engine's state has only what is trained
            with raising_together(self.grid):
                load_weights(self.model, folder / "weights", self.grid)
        return checkpoints.load(self.engine, folder)

    def _check_encoder(self, weights: Path) -> None:
        """A decoder goes on over the encoder it was trained with."""
        wanted = read_weights_config(weights)[1].get("encoder_fingerprint")
        if self.encoder is not None and wanted not in (None, self.encoder.fingerprint):
            raise CheckpointError(
                f"{weights} was trained over another encoder (fingerprint {wanted[:12]}, now "
                f"{self.encoder.fingerprint[:12]}): set model.encoder.source to that one"
            )

    def loader(self, start_step: int) -> TrainingLoader:
        """This rank's micro-batches from a step on."""
        training = self.config.training
        return TrainingLoader(
            self.data.samples,
            self.grid,
            self.config.batches,
            training.micro_batch_size,
            start_step,
            self.config.data.prefetch,
        )

    def inputs(self, split: str) -> ModelInputs:
        """How the model is fed from a split; computes the split's feature store if need be."""
        config = self.config
        if self.encoder is None:
            return self.data.adapt(SequenceInputs())
        store = None
        stream = self.data.streams.get(split)
        if stream is not None and needs_store(config):
            store = prepare_store(config, self.grid, self.encoder, stream, split, self.precision)
        inputs = ChunkInputs(
            config.model,
            self.encoder,
            DTYPES[self.precision],
            history=store if config.data.history_features == "stored" else None,
            token_states=store if config.data.token_features == "stored" else None,
        )
        return self.data.adapt(inputs)

    def evaluator(self) -> Evaluator | None:
        """Evaluates what is held out, if anything is."""
        if self.data.validation is None:
            return None
        return Evaluator(
            self.data.validation,
            num_chunks=self.data.num_chunks,
            inputs=self.inputs("validation"),
            grid=self.grid,
            batch_size=self.config.training.micro_batch_size,
            token_byte_lengths=self.data.tokenizer.token_byte_lengths,
        )

    def sampler(self, sample_text: SampleText | None) -> Callable[[], str] | None:
        """Writes sample texts, if the configuration asks for them."""
        generation = self.config.generation
        if sample_text is None or generation.max_new_tokens == 0:
            return None
        return lambda: sample_text(self.model, self.encoder, self.data.tokenizer, generation)

    def meter(self) -> SpeedMeter:
        """Measures speed against all ranks' devices."""
        peak = peak_flops(device_name(self.grid.device), self.precision)
        if self.config.training.freeze:
            peak = None  # the operations are counted as if everything were trained
        return SpeedMeter(
            batches=self.config.batches,
            tokens_per_sample=self.data.tokens_per_sample,
            total_steps=self.config.training.steps,
            flops_per_token=self.size.flops_per_token,
            peak_flops=None if peak is None else peak * self.grid.world_size,
            device=self.grid.device,
        )

    def export_weights(self, folder: Path) -> None:
        """Write the model for generation, evaluation, conversion, or use as an encoder."""
        if self.grid.dp_rank != 0:
            return
        extra = {"tokenizer_fingerprint": self.data.tokenizer.fingerprint}
        if self.encoder is not None:
            extra["encoder_fingerprint"] = self.encoder.fingerprint
        save_weights(self.model, folder, self.grid, extra)

    def introduce(
        self, monitor: Monitor, state: TrainerState, resume: bool, differences: list[str]
    ) -> None:
        """Show and record what the run is, before its first step."""
        config, grid = self.config, self.grid
        resolved = config_to_yaml(config)
        with raising_together(grid):
            if grid.is_main:
                write_whole(Path(config.logging.directory) / "config.yaml", resolved.encode())
        monitor.configuration(config)
        name = device_name(grid.device)
        for line in describe_run(config, self.size, grid.dp_size, self.precision, name):
            monitor.say(line)
        monitor.say(f"{'data':<11}{self.data.describe()}")
        notices = [slow_precision_notice(self.precision, grid.device), *differences]
        if config.training.compile and (problem := compile_problem(grid.device.type)):
            notices.append(f"training.compile is off, it does not work here: {problem}")
        for notice in notices:
            if notice is not None:
                monitor.say(f"notice: {notice}")
        if state:
            monitor.say(f"resuming after step {state['step']}")
        elif resume:
            monitor.say(f"no checkpoint in {config.checkpoint.directory}: starting at step 0")


def _says_complete(config: RunConfig, data: RunData, latest: Path | None) -> bool:
    """Whether nothing is left to do, which a line says then; all files stay as they are."""
    if latest is None or (step := Manifest.read(latest).step) < config.training.steps:
        return False
    evaluates = data.validation is not None and step == config.training.steps
    if evaluates and not has_validation(Path(config.logging.directory), step):
        return False  # it ended between its last checkpoint and its last evaluation
    print(
        f"complete: {latest} is after step {step} of {config.training.steps}; raise "
        "training.steps to train on",
        flush=True,
    )
    return True


def _check_held_out(config: RunConfig, data: RunData) -> None:
    needed = config.training.patience is not None or config.checkpoint.keep_best
    if needed and data.validation is None:
        raise ConfigError(
            "training.patience and checkpoint.keep_best need a validation split: this run has none"
        )


def _checkpoints(config: RunConfig, resume: bool) -> CheckpointManager:
    checkpoints = CheckpointManager(config.checkpoint.directory, config.checkpoint.keep)
    latest = checkpoints.latest()
    if latest is not None and not resume:
        raise CheckpointError(
            f"{latest} is from an earlier run: go on with it by --resume, or set "
            "checkpoint.directory and logging.directory to new folders"
        )
    return checkpoints


def _differences(state: TrainerState, identity: dict[str, Any]) -> list[str]:
    """What a resumed run no longer has in common with its checkpoint, if that is tolerable."""
    if not state:
        return []
    if state["encoder"] != identity["encoder"]:
        raise CheckpointError(
            "the checkpoint was trained over another encoder (fingerprint "
            f"{str(state['encoder'])[:12]}, now {str(identity['encoder'])[:12]}): "
            "set model.encoder.source to the one it was trained with"
        )
    changed = [name for name, value in identity.items() if state.get(name) != value]
    return [f"{name} differs from the checkpoint's: the data order changes" for name in changed]
