"""Training and measuring the experiment's runs; what is finished is not done again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megaegpt.config import OptimizerConfig, RunConfig
from megaegpt.config.loading import (
    config_to_dict,
    config_to_yaml,
    load_config,
    run_config_from_dict,
)
from megaegpt.data.tokenizers.tokenizer_files import has_tokenizer, load_tokenizer
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import CheckpointError, ConfigError, DataError
from megaegpt.evaluation.history import HISTORIES
from megaegpt.files import locked_folder, write_whole
from megaegpt.generation.trained import LoadedModel, load_for_inference
from megaegpt.interop.sources import resolve_weights_source
from megaegpt.json_files import conform, read_json
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.held_tokens import MemoryLimits
from megaegpt.model.weights import read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.summary import measure_model
from megaegpt.precision import DTYPES, resolve_precision
from megaegpt.report.runs import read_run
from megaegpt.training.feature_stores import find_encoder, prepare_store
from megaegpt.training.frozen_predictions import FrozenDecoder
from megaegpt.training.identity import flatten, show_value
from megaegpt.training.pretraining import pretrain
from megaegpt.training.stopping import StopRequests
from tools.experiment.costs import reading_cost, variant_cost
from tools.experiment.measure import (
    NOTHING_STORED,
    Stores,
    Text,
    nats_with_memory,
    summarize,
    token_nats,
)
from tools.experiment.place import describe_machine
from tools.experiment.plan import Budget, ExperimentPlan, ReadingPlan, decoder_values, make_run
from tools.experiment.readings import load_reader, reader_config, reading_nats
from tools.experiment.texts import prepare_corpus, prepare_encoder_texts

RESULT, READINGS = "result.json", "readings"
STEPS = "steps.json"
"""In the folder of a budget that is derived from equal steps: what it comes to, by variant, those
included that have no runs of their own for it."""
HELD = "held"
"""Losses with a token memory that goes on over the whole reported text, by the tokens it holds."""
_PATHS = (
    "checkpoint.directory",
    "logging.directory",
    "model.encoder.source",
    "data.train",
    "data.validation",
    "data.features",
    "data.vocabulary",
)
"""Keys of a run's configuration that name files of the experiment, or of its encoder."""
_READING = "reading"
"""How the encoder read, of a result of it alone."""


class StoppedError(Exception):
    """A run was asked to stop and is saved."""


class Experiment:
    """All runs of a plan on one process.

    Args:
        plan: what to do.
        grid: of one process.
        stops: requests to stop; each run is saved then.
    """

    def __init__(self, plan: ExperimentPlan, grid: ProcessGrid, stops: StopRequests) -> None:
        self.plan, self._grid, self._stops = plan, grid, stops
        self.folder = Path(plan.output)
        self._source: Path | None = None  # the encoder's weights, where the plan names some
        if plan.encoder.source is not None:
            self._source = resolve_weights_source(plan.encoder.source, grid)
        own = self._source is not None and has_tokenizer(self._source)
        self._vocabulary = str(self._source) if own else None
        self._tokenizer = load_tokenizer(self._vocabulary)

    def run(self) -> None:
        """Texts, encoder, and every run.

        Raises:
            StoppedError: on a request to stop; the same call goes on from there.
            DataError: another process is at work on the same folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked_folder(self.folder):
            self._run()

    def _run(self) -> None:
        self._check_readings()
        for name in self.plan.corpora:
            prepare_corpus(self.plan, name, self.folder / "data" / name, self._tokenizer)
        self._encoder = self._prepare_encoder()
        for name in self.plan.corpora:
            self._measure_encoder(name)
            for budget in self.plan.budgets:
                steps = self._steps(name, budget)  # type: ignore[arg-type]
                for seed in range(1, self.plan.seeds + 1):
                    for variant in steps:
                        self._run_variant(name, variant, budget, seed, steps[variant])
            for reading in self.plan.readings_on(name):
                self._measure_reading(name, reading)

    # -- the encoder ------------------------------------------------------------------------------

    def _check_readings(self) -> None:
        """Refuse what the encoder cannot read, which is measured behind all that is trained."""
        if self._source is not None:
            encoder = read_weights_config(self._source)[0]
        else:
            encoder = run_config_from_dict(self.plan.encoder.run, []).model
        baseline = run_config_from_dict(decoder_values(self.plan, self.plan.baseline), [])
        for name in self.plan.readings:
            try:
                reader_config(encoder, self.plan.reading(name), baseline.model.egpt.chunk_size)
            except ConfigError as error:
                raise ConfigError(f"readings.{name}: {error}") from None

    def _prepare_encoder(self) -> str:
        """Return the weights for ``model.encoder.source``; pretrain them if the plan names none."""
        encoder = self.plan.encoder
        if self._source is not None:
            return str(self._source)
        data, folder = self.folder / "data" / "encoder", self.folder / "encoder"
        prepare_encoder_texts(self.plan, data, self._tokenizer)
        held_out = self.folder / "data" / next(iter(self.plan.corpora)) / "selection"
        config = make_run(
            encoder.run,
            folder,
            data={"train": [str(data / "train")], "validation": [str(held_out)]},
        )
        weights = folder / "weights"
        if not self._is_done(folder, config):
            self._train(config, folder)
            shutil.copytree(_last_weights(config), weights, dirs_exist_ok=True)
            self._finish(folder, config, self._training_figures(config))
        return str(weights)

    def _measure_encoder(self, corpus: str) -> None:
        """The encoder alone, each chunk by itself, with its own head."""
        folder = self.folder / "runs" / corpus / "encoder"
        config = self._config(corpus, self.plan.baseline, folder, 1, None)
        if self._is_done(folder, config):
            return
        self._heed_stops()
        result = self._measure(config, self._encoder, ("true",))
        gpt = read_weights_config(self._encoder)[0]
        values = {"model": {**config_to_dict(gpt), "kind": "gpt"}}
        parameters = measure_model(make_run(values, folder)).parameters
        cost = reading_cost(gpt, ReadingPlan(), config.model)
        figures = {"parameters": parameters, "training": {}, "cost": cost}
        self._finish(folder, config, {**result, **figures})

    def _measure_reading(self, corpus: str, name: str) -> None:
        """The encoder alone in another way."""
        folder = self.folder / "runs" / corpus / READINGS / name
        config = self._config(corpus, self.plan.baseline, folder, 1, None)
        reading = self.plan.reading(name)
        if self._is_done(folder, config):
            check_reading(folder, reading)
            return
        self._heed_stops()
        print(f"\n=== {corpus}: the encoder alone, {name}", flush=True)
        dtype = DTYPES[resolve_precision(config.training.precision, self._grid.device)]
        size = config.model.egpt.chunk_size
        gpt = load_reader(self._encoder, reading, size, self._grid, dtype)
        text = self._reported(config)
        nats = reading_nats(gpt, text, reading)
        losses = summarize(nats, text, self._tokenizer.token_byte_lengths)
        result = {
            "losses": {"true": losses},
            "gates": [],
            "parameters": gpt.num_parameters(),
            "training": {},
            "cost": reading_cost(gpt.config, reading, config.model),
            _READING: asdict(reading),
        }
        self._finish(folder, config, result)

    # -- the decoders -----------------------------------------------------------------------------

    def _config(
        self, corpus: str, variant: str, folder: Path, seed: int, steps: int | None
    ) -> RunConfig:
        data, values = self.folder / "data" / corpus, decoder_values(self.plan, variant)
        encoder = values["model"]["encoder"]
        store = f"{encoder.get('layers') or 'all'}_layers_overlap_{encoder.get('overlap', 0)}"
        own, base = (
            run_config_from_dict(of, [])
            for of in (values, decoder_values(self.plan, self.plan.baseline))
        )
        training, optimizer = {"seed": seed}, dict[str, int]()
        if steps is not None:
            training["steps"] = steps
            optimizer["warmup_steps"] = _fitting_warmup(own.optimizer, steps)
        size = own.model.egpt.chunk_size
        if own.data.token_features == "stored" and size != base.model.egpt.chunk_size:
            store += f"_chunks_of_{size}"
        return make_run(
            values,
            folder,
            model={"encoder": {"source": self._encoder}},
            data={
                "train": [str(data / "train")],
                "validation": [str(data / "selection")],
                "vocabulary": self._vocabulary,
                "history_features": "online",
                "features": str(data / "features" / store),
            },
            training=training,
            optimizer=optimizer,
        )

    def _steps(self, corpus: str, budget: Budget) -> dict[str, int]:
        """Steps of each variant; of those budgets that are derived, only where they differ."""
        equal = {}
        for variant in self.plan.variants_on(corpus):
            config = self._config(corpus, variant, self.folder, 1, None)
            equal[variant] = config.training.steps
        if budget == "steps":
            return equal
        trained = self._runs(self.plan.corpus(corpus).runs_of or corpus)
        steps = {name: self._scaled(trained, name, budget, equal[name]) for name in equal}
        folder = _whole_folder(self._runs(corpus) / budget)
        write_whole(folder / STEPS, (json.dumps(steps, indent=1) + "\n").encode())
        return {name: scaled for name, scaled in steps.items() if scaled != equal[name]}

    def _scaled(self, trained: Path, variant: str, budget: Budget, equal: int) -> int:
        """Steps of a variant within a budget that is derived. Where it has a run those of it: a
        speed that is measured is another after every further run.
        """
        if begun := sorted((trained / budget / variant).glob("*/run.yaml")):
            return load_config(begun[0]).training.steps
        usual = self._cost(trained, self.plan.baseline, budget)
        return max(1, round(equal * usual / self._cost(trained, variant, budget)))

    def _cost(self, trained: Path, variant: str, budget: Budget) -> float:
        """Operations a token, or seconds a token as measured in the runs of equal steps."""
        if budget == "flops":
            config = self._config(trained.name, variant, self.folder, 1, None)
            return measure_model(config, find_encoder(config)).flops_per_token
        folders = (trained / "steps" / variant).glob(f"*/{RESULT}")
        speeds = [read_result(f.parent)["training"]["tokens_per_second"] for f in folders]
        return 1 / median(speeds)

    def _run_variant(self, corpus: str, variant: str, budget: str, seed: int, steps: int) -> None:
        run = f"{budget}/{variant}/seed{seed}"
        folder = self._runs(corpus) / run
        config = self._config(corpus, variant, folder, seed, steps)
        lengths = self.plan.lengths_of(variant) if config.model.has_token_memory else []
        trained = self._runs(self.plan.corpus(corpus).runs_of or corpus) / run
        if self._is_done(folder, config):
            self._measure_missing(config, trained, folder, lengths)
            return
        print(f"\n=== {corpus}, equal {budget}: {variant}, seed {seed}", flush=True)
        if trained != folder:
            self._heed_stops()
            self._measure_run(config, trained, folder, lengths)
            return
        self._train(config, folder)
        self._heed_stops()
        chosen = best_step(folder)
        weights = folder / "checkpoints" / f"step_{chosen:08d}" / "weights"
        kinds = HISTORIES if config.model.has_history else ("true",)
        result = self._measure(config, str(weights), kinds, lengths)
        shutil.copytree(weights, folder / "weights", dirs_exist_ok=True)
        gpt = find_encoder(config)
        assert gpt is not None
        figures = {**self._training_figures(config), "cost": variant_cost(gpt, config.model)}
        self._finish(folder, config, {**result, **figures, "chosen_step": chosen})

    def _measure_run(
        self, config: RunConfig, trained: Path, folder: Path, lengths: Iterable[int]
    ) -> None:
        """Measure a finished run, in the folder ``trained``, on the text of ``config``."""
        kinds = HISTORIES if config.model.has_history else ("true",)
        measured = self._measure(config, str(trained / "weights"), kinds, lengths)
        self._finish(folder, config, {**read_result(trained), **measured})

    def _measure_missing(
        self, config: RunConfig, trained: Path, folder: Path, lengths: Iterable[int]
    ) -> None:
        """Measure a run that is finished also with the lengths that the plan did not have then."""
        result = read_result(folder)
        held = result.get(HELD, {})
        if missing := [tokens for tokens in lengths if str(tokens) not in held]:
            self._heed_stops()
            print(f"\n=== {folder}: holding {', '.join(map(str, missing))} tokens", flush=True)
            measured = self._measure(config, str(trained / "weights"), (), missing)
            _write_result(folder, {**result, HELD: {**held, **measured[HELD]}})

    def _runs(self, corpus: str) -> Path:
        return self.folder / "runs" / corpus

    # -- one run ----------------------------------------------------------------------------------

    def _train(self, config: RunConfig, folder: Path) -> None:
        if self._grid.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        write_whole(_whole_folder(folder) / "run.yaml", config_to_yaml(config).encode())
        if not pretrain(config, self._grid, resume=True, stops=self._stops):
            raise StoppedError

    def _heed_stops(self) -> None:
        """Stop here on a request: what follows is long, and is not left before it is finished."""
        self._stops.ask(failed=False, grid=self._grid)
        if self._stops.answer()[1] is not None:
            raise StoppedError

    def _measure(
        self,
        config: RunConfig,
        weights: str,
        kinds: tuple[str, ...],
        lengths: Iterable[int] = (),
    ) -> dict[str, Any]:
        """Losses on the reported part with these histories, and with a token memory that goes on
        over the whole text and holds so many tokens.
        """
        dtype = DTYPES[resolve_precision(config.training.precision, self._grid.device)]
        # That which the weights name is where the output was when they were trained.
        source = self._encoder if read_weights_config(weights)[0].needs_encoder else None
        loaded = load_for_inference(weights, self._grid, dtype, encoder_source=source)
        text = self._reported(config)
        stores = self._stores(config, loaded, text)
        byte_lengths = self._tokenizer.token_byte_lengths
        measured = {}
        for kind in kinds:
            nats = token_nats(
                loaded, text, config.training.chosen_micro_batch_size, dtype, kind, stores
            )
            measured[kind] = summarize(nats, text, byte_lengths)

        def holding(tokens: int) -> dict[str, Any]:
            nats = nats_with_memory(loaded, text, dtype, MemoryLimits(tokens), stores)
            return summarize(nats, text, byte_lengths)

        held = {str(tokens): holding(tokens) for tokens in lengths}
        metrics = loaded.model.metrics().items()
        gates = [value for name, value in metrics if name.startswith("memory_gate/")]
        return {"losses": measured, "gates": gates, HELD: held}

    def _stores(self, config: RunConfig, loaded: LoadedModel, text: Text) -> Stores:
        """Stored of the reported part what is of the training text."""
        if loaded.encoder is None or config.data.token_features == "online":
            return NOTHING_STORED
        precision = resolve_precision(config.training.precision, self._grid.device)
        source = text.source
        assert isinstance(source, TokenStream)
        states = prepare_store(config, self._grid, loaded.encoder, source, "report", precision)
        if config.data.predictions == "online":
            return Stores(states)
        assert isinstance(loaded.model, EGPT)
        decoder = FrozenDecoder(loaded.model, self._grid, precision)
        return Stores(states, decoder.prepare(config, states, source, "report"))

    def _reported(self, config: RunConfig) -> Text:
        """The part of the held-out text that losses are reported of."""
        prefix, egpt = Path(config.data.validation[0]).with_name("report"), config.model.egpt
        before = config.model.preceding_tokens
        return Text(TokenStream([str(prefix)]), egpt.num_chunks, egpt.chunk_size, before)

    def _training_figures(self, config: RunConfig) -> dict[str, Any]:
        """Collect the figures of a run: its tokens, operations, speed and memory."""
        records = read_metrics(Path(config.logging.directory))
        size = measure_model(config, find_encoder(config))
        speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        tokens = config.tokens_before(config.training.steps)
        return {
            "parameters": size.parameters,
            "training": {
                "steps": config.training.steps,
                "tokens": tokens,
                "flops": tokens * size.flops_per_token,
                "tokens_per_second": median(speeds),
                "memory_gib": max(r["memory_gib"] for r in records if "memory_gib" in r),
                "selection": {
                    r["step"]: r["validation_loss"] for r in records if "validation_loss" in r
                },
            },
        }

    def _is_done(self, folder: Path, config: RunConfig) -> bool:
        """Whether the run is finished; refuses to go on where another one was begun."""
        begun = folder / "run.yaml"
        if begun.exists():
            place = folder.relative_to(self.folder)
            if differences := _differences(load_config(begun), config, place):
                raise CheckpointError(
                    f"{folder} is a run of another configuration: {'; '.join(differences)}. Choose "
                    "another output; or remove it, if it is not needed any more"
                )
        return (folder / RESULT).exists()

    def _finish(self, folder: Path, config: RunConfig, result: dict[str, Any]) -> None:
        """Publish the result; of the checkpoints only the chosen weights were kept."""
        write_whole(_whole_folder(folder) / "run.yaml", config_to_yaml(config).encode())
        about = {
            "finished": time.strftime("%Y-%m-%d %H:%M"),
            "machine": describe_machine(self._grid.device),
        }
        _write_result(folder, result | about)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def check_reading(folder: Path, reading: ReadingPlan) -> None:
    """Refuse a result that was read in another way; those of earlier versions do not say in which.

    Raises:
        CheckpointError: it was.
        DataError: the result is damaged.
    """
    if read_result(folder).get(_READING) not in (None, asdict(reading)):
        raise CheckpointError(
            f"{folder} was read in another way than the plan says now: remove it, or give the "
            "reading a name of its own"
        )


def best_step(folder: Path) -> int:
    """The evaluated step of a run with the lowest loss on the selection part.

    Raises:
        DataError: no loss of it is finite.
    """
    best = read_run(folder).best_validation()
    if best is None:
        raise DataError(f"{folder}: none of the run's validation losses is finite: it diverged")
    return best["step"]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's records."""
    return read_run(folder).records


@dataclass(frozen=True)
class _Losses:
    """The summary of :func:`tools.experiment.measure.summarize`."""

    loss: float
    nats_per_byte: float
    tokens: int
    bytes: int
    by_chunk: list[float]
    by_position: list[float]


@dataclass(frozen=True)
class _Result:
    """The part of a result that the report reads."""

    machine: str
    losses: dict[str, _Losses]
    gates: list[float]
    parameters: int
    training: dict[str, Any]


def read_result(folder: Path) -> dict[str, Any]:
    """Read the published result of a run.

    Raises:
        DataError: nothing was, or it is damaged.
    """
    path = folder / RESULT
    remedy = f"remove {folder}, and start the experiment again"
    missing = "the run is not finished; start the experiment without --report-only"
    result = read_json(path, dict[str, Any], remedy=remedy, missing=missing)
    conform(result, _Result, str(path), remedy=remedy, other_keys=True)
    return result


def read_steps(folder: Path) -> dict[str, int]:
    """Steps within a budget that is derived, by variant; none before they are.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / STEPS
    if not path.exists():
        return {}
    return read_json(path, dict[str, int], remedy=f"remove {path}, and start the experiment again")


def _kept_alike(config: RunConfig, other: RunConfig) -> RunConfig:
    """``config`` with as many checkpoints kept as of ``other``: earlier versions kept others."""
    keep, keep_every = other.checkpoint.keep, other.checkpoint.keep_every
    checkpoint = replace(config.checkpoint, keep=keep, keep_every=keep_every)
    return replace(config, checkpoint=checkpoint)


def _differences(begun: RunConfig, config: RunConfig, place: Path) -> list[str]:
    """Keys in which a run at ``place`` in the output was another one when it was begun. The output
    may have been named otherwise then, or have been elsewhere: paths inside are compared from it.
    """
    begun = _kept_alike(begun, config)
    there, here = flatten(begun), flatten(config)
    placed_there, placed_here = (
        _placed(values, _output(of, place)) for values, of in ((there, begun), (here, config))
    )
    return [
        f"{key} is {show_value(there[key])} there and {show_value(here[key])} here"
        for key in here
        if placed_there[key] != placed_here[key]
    ]


def _output(config: RunConfig, place: Path) -> Path | None:
    """The experiment's output as it was named for a run at ``place`` in it; None: the run was at
    another place.
    """
    folder, depth = Path(config.logging.directory), len(place.parts)
    return folder.parents[depth - 1] if folder.parts[-depth:] == place.parts else None


def _placed(values: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """A run's values by dotted key, with its paths from the output, or from the root."""

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        if value is None:
            return None
        path = Path(value)
        if output is not None and path.is_relative_to(output):
            return path.relative_to(output)
        return path.absolute()

    return {key: placed(value) if key in _PATHS else value for key, value in values.items()}


def _fitting_warmup(optimizer: OptimizerConfig, steps: int) -> int:
    """The warm-up's steps, or as many of them as a run that is scaled to ``steps`` can hold."""
    if optimizer.schedule == "wsd":
        room = steps - (optimizer.decay_steps or steps // 5)
    elif optimizer.schedule == "constant" or optimizer.decay_steps is not None:
        return optimizer.warmup_steps
    else:
        room = steps - 1
    return min(optimizer.warmup_steps, max(0, room))


def _last_weights(config: RunConfig) -> Path:
    return Path(config.checkpoint.directory) / f"step_{config.training.steps:08d}" / "weights"


def _write_result(folder: Path, result: dict[str, Any]) -> None:
    write_whole(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


def _whole_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
