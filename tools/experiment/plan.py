"""The plan of an experiment: corpora, an encoder, variants of a decoder, and their runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megaegpt.config import RopeScalingConfig, RunConfig
from megaegpt.config.loading import run_config_from_dict
from megaegpt.config.parsing import Problem, parse_section, raise_problems
from megaegpt.config.ranges import NonNegativeInt, PositiveInt, range_problems
from megaegpt.config.run_files import find_run_file, merged
from megaegpt.config.validation import find_problems
from megaegpt.config.yaml_text import read_yaml

Budget = Literal["steps", "flops", "time"]
BUDGETS: tuple[Budget, ...] = ("steps", "flops", "time")


@dataclass(frozen=True)
class CorpusPlan:
    """One text to train on, and what is held out of it. Texts are books by name, files, or
    ``package:NAME`` or ``package:NAME/FOLDER``: sources and pages of an installed Python package.
    """

    train: tuple[str, ...] = ()
    """Texts to train on."""
    held_out: tuple[str, ...] = ()
    """Texts to validate on. Empty: the end of the training text."""
    train_share: float = 0.8
    """Share of the tokens, from the start, that is trained on where nothing else is held out."""
    runs_of: str | None = None
    """A corpus above this one: its runs are measured on what is held out here, and none is trained
    here."""
    report_tokens: PositiveInt | None = None
    """At most so many reported. None: as of all corpora."""
    variants: tuple[str, ...] = ()
    """Those that are run. Empty: all."""
    readings: tuple[str, ...] = ()
    """Ways in which the encoder reads alone. Empty: all."""


@dataclass(frozen=True)
class EncoderPlan:
    """The frozen encoder under all variants."""

    source: str | None = None
    """Weights, as ``model.encoder.source`` takes them. None: a GPT is pretrained first."""
    texts: tuple[str, ...] = ()
    """Texts of its pretraining: books by name, text files, JSON Lines."""
    documents: PositiveInt | None = None
    """The first ones only. None: all."""
    run: dict[str, Any] = field(default_factory=dict)
    """Sections of its run's configuration."""


@dataclass(frozen=True)
class ReadingPlan:
    """One way in which the encoder reads the reported text by itself, with nothing trained."""

    context: PositiveInt | None = None
    """Tokens that it reads at once, whole chunks; None: one chunk."""
    overlap: NonNegativeInt = 0
    """Tokens before those that it sees too."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """As ``model.rope_scaling``, to read more than it was trained on; of kind ``none`` the
    encoder's own."""


@dataclass(frozen=True)
class ExperimentPlan:
    """Every variant, with every seed, on every corpus, within every budget."""

    output: str = "runs/experiments/default"
    """Folder of data, runs and report."""
    corpora: dict[str, Any] = field(default_factory=dict)
    """By name, each with the keys of a corpus."""
    max_characters: PositiveInt | None = None
    """Of every text, from its start. None: all."""
    train_tokens: PositiveInt | None = None
    """The last so many of the training text. None: all."""
    selection_share: float = 0.3
    """Share of the held-out tokens, from their start, that checkpoints are chosen on; the rest is
    reported."""
    selection_tokens: PositiveInt | None = None
    """At most so many. None: the whole share."""
    report_tokens: PositiveInt | None = None
    """At most so many reported. None: the whole rest."""
    seeds: PositiveInt = 3
    """Runs of each variant; they differ in initial weights and data order."""
    baseline: str = "deepgpt"
    """The variant that the others are compared with; its steps set the other budgets."""
    controls: dict[str, str] = field(default_factory=dict)
    """Variants, by the name of the one that each is compared with besides the baseline."""
    budgets: tuple[str, ...] = ("steps",)
    """Equal budgets: always ``steps``; ``flops``, ``time``: further runs of the variants."""
    encoder: EncoderPlan = field(default_factory=EncoderPlan)
    """The frozen encoder."""
    readings: dict[str, Any] = field(default_factory=dict)
    """By name, ways in which the encoder reads alone, besides chunk by chunk."""
    memory_tokens: PositiveInt | None = None
    """Variants with a token memory are measured once more with a memory that goes on over the whole
    reported text and holds so many tokens. None: they are not."""
    memory_lengths: dict[str, Any] = field(default_factory=dict)
    """By variant with a token memory, a list: tokens that it holds in further measurements of the
    whole text, which show what a history is worth by its length."""
    run: dict[str, Any] = field(default_factory=dict)
    """Sections of a run's configuration, the same for all variants."""
    variants: dict[str, Any] = field(default_factory=dict)
    """By name, what differs from ``run``, or from the variant named by the key ``base``."""

    def corpus(self, name: str) -> CorpusPlan:
        """A corpus by name (``load_plan`` has checked it)."""
        return parse_section(CorpusPlan, self.corpora[name], "", [])

    def variants_on(self, corpus: str) -> tuple[str, ...]:
        """Names of the variants that are run on a corpus, in their order."""
        return _chosen(self.variants, self.corpus(corpus).variants)

    def readings_on(self, corpus: str) -> tuple[str, ...]:
        """Names of the ways in which the encoder reads a corpus alone."""
        return _chosen(self.readings, self.corpus(corpus).readings)

    def lengths_of(self, variant: str) -> list[int]:
        """Tokens that a token memory of a variant holds where it goes on over the whole text."""
        whole = [] if self.memory_tokens is None else [self.memory_tokens]
        return sorted({*whole, *self.memory_lengths.get(variant, ())})

    def reading(self, name: str) -> ReadingPlan:
        """A way of reading by name (``load_plan`` has checked it)."""
        return parse_section(ReadingPlan, self.readings[name], "", [])


def _chosen(all_names: Iterable[str], chosen: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in all_names if not chosen or name in chosen)


def load_plan(path: str | Path) -> ExperimentPlan:
    """Read an experiment and check all that can be checked before it is started.

    Raises:
        ConfigError: one message with everything that is wrong.
    """
    values, problems = read_yaml(find_run_file(path))
    plan = parse_section(ExperimentPlan, values, "", problems)
    if unnamed := _name_problems(plan):
        raise_problems(str(path), [*problems, *unnamed])
    for name, values in plan.corpora.items():
        corpus = parse_section(CorpusPlan, values, f"corpora.{name}.", problems)
        problems += range_problems(corpus, f"corpora.{name}.")
    for name, values in plan.readings.items():
        reading = parse_section(ReadingPlan, values, f"readings.{name}.", problems)
        problems += _reading_problems(reading, f"readings.{name}.")
    problems += [*range_problems(plan), *_problems(plan)]
    if not problems:
        problems += _corpus_problems(plan)
    if not problems:
        for name in plan.variants:
            problems += _run_problems(f"variants.{name}", decoder_values(plan, name))
        problems = problems or _comparison_problems(plan)
        problems += _length_problems(plan)
        if plan.encoder.source is None:
            problems += _run_problems("encoder.run", plan.encoder.run)
    raise_problems(str(path), problems)
    budgets = tuple(budget for budget in BUDGETS if budget in plan.budgets)  # steps before others
    return replace(plan, budgets=budgets)


def _name_problems(plan: ExperimentPlan) -> list[Problem]:
    """Names are joined with others, and name folders: 512 is none in YAML, and "512" is."""
    named = {
        "corpora": plan.corpora,
        "readings": plan.readings,
        "variants": plan.variants,
        "memory_lengths": plan.memory_lengths,
        "controls": [*plan.controls, *plan.controls.values()],
    }
    return [
        Problem((key,), f"{key}: {name!r:.50} is no name: quote it")
        for key, names in named.items()
        for name in names
        if not isinstance(name, str)
    ]


def _reading_problems(reading: ReadingPlan, prefix: str) -> Iterator[Problem]:
    yield from range_problems(reading, prefix)
    scaling = reading.rope_scaling
    if scaling.kind == "none" and scaling != RopeScalingConfig():
        key = f"{prefix}rope_scaling"
        yield Problem((key,), f"{key} has no kind: nothing would be scaled")


def _corpus_problems(plan: ExperimentPlan) -> list[Problem]:
    found, trained = [], list[str]()
    if plan.encoder.source is None and "encoder" in plan.corpora:
        found.append("corpora.encoder: what the encoder is pretrained on is called so: rename it")
    for name in plan.corpora:
        corpus = plan.corpus(name)
        if corpus.runs_of is None:
            trained.append(name)
            if not corpus.train:
                found.append(f"corpora.{name}.train names no text: there is nothing to train on")
        elif corpus.runs_of not in trained:
            found.append(f"corpora.{name}.runs_of={corpus.runs_of}: no corpus above it trains")
        elif corpus.train or not corpus.held_out:
            found.append(f"corpora.{name} has runs_of: give held_out, and leave train out")
        elif not set(plan.variants_on(name)) <= set(plan.variants_on(corpus.runs_of)):
            found.append(f"corpora.{name} has variants that {corpus.runs_of} does not train")
        if not 0 < corpus.train_share < 1:
            found.append(f"corpora.{name}.train_share={corpus.train_share} must be between 0 and 1")
        known = (("variants", plan.variants), ("readings", plan.readings))
        for key, names in known:
            if unknown := set(getattr(corpus, key)) - set(names):
                found.append(f"corpora.{name}.{key}: {', '.join(sorted(unknown))}: not in {key}")
        if corpus.variants and plan.baseline not in corpus.variants:
            found.append(f"corpora.{name}.variants lacks the baseline {plan.baseline}")
    return [Problem((), text) for text in found]


def _comparison_problems(plan: ExperimentPlan) -> list[Problem]:
    """Of variants, each of which could be trained: what they must share to be compared."""
    configs = {n: run_config_from_dict(decoder_values(plan, n), []) for n in plan.variants}
    found, base = [], configs[plan.baseline]
    for name, config in configs.items():
        if not config.model.needs_encoder:
            kind = f"model.kind={config.model.kind}"
            found.append(f"variants.{name}: {kind} reads no encoder: give egpt or deepgpt")
    if found:
        return [Problem((), text) for text in found]
    for name, config in configs.items():
        for key, value in vars(config.training).items():
            if key != "freeze" and value != (other := getattr(base.training, key)):
                found.append(
                    f"variants.{name}: training.{key}={value}, and {other} of the baseline "
                    f"{plan.baseline}, with whose runs it is compared"
                )
        if (length := config.model.sample_len) != (other := base.model.sample_len):
            found.append(
                f"variants.{name}: windows of {length} tokens (model.egpt: num_chunks times "
                f"chunk_size), and {other} of the baseline {plan.baseline}"
            )
    return [Problem((), text) for text in found]


def _length_problems(plan: ExperimentPlan) -> list[Problem]:
    found = []
    for name, lengths in plan.memory_lengths.items():
        if name not in plan.variants:
            found.append(f"memory_lengths: {name} is none of variants: {', '.join(plan.variants)}")
        elif not isinstance(lengths, list) or {type(n) for n in lengths} - {int}:
            found.append(f"memory_lengths.{name} must be a list of whole numbers, not {lengths!r}")
    if found:
        return [Problem((), text) for text in found]
    for name in plan.variants:
        model = run_config_from_dict(decoder_values(plan, name), []).model
        if not model.has_token_memory and name in plan.memory_lengths:
            found.append(f"memory_lengths.{name}: the variant has no token memory")
        size, lengths = model.egpt.chunk_size, plan.lengths_of(name)
        if model.has_token_memory and lengths and lengths[0] < size:
            key = "memory_tokens" if lengths[0] == plan.memory_tokens else f"memory_lengths.{name}"
            found.append(f"{key}: {lengths[0]} is less than a chunk of {size}, and whole are held")
    return [Problem((), text) for text in found]


def _problems(plan: ExperimentPlan) -> list[Problem]:
    found = []
    if not plan.corpora:
        found.append("corpora is empty")
    found += _base_problems(plan.variants)
    if plan.baseline not in plan.variants:
        found.append(f"baseline={plan.baseline} is none of variants: {', '.join(plan.variants)}")
    for name in {*plan.controls, *plan.controls.values()} - set(plan.variants):
        found.append(f"controls: {name} is none of variants: {', '.join(plan.variants)}")
    if unknown := set(plan.budgets) - set(BUDGETS):
        found.append(f"budgets: {', '.join(unknown)}: there are {', '.join(BUDGETS)}")
    if "steps" not in plan.budgets:
        found.append("budgets must hold steps: the others are derived from it")
    if not 0 < plan.selection_share < 1:
        found.append(f"selection_share={plan.selection_share} must be between 0 and 1")
    if plan.encoder.source is None and not plan.encoder.texts:
        found.append("encoder: give a source, or texts to pretrain one on")
    return [Problem((), message) for message in found]


def _base_problems(variants: dict[str, Any]) -> list[str]:
    """A variant is based on one above it, so no chain of bases is a ring."""
    found, above = [], list[str]()
    for name, changes in variants.items():
        if not isinstance(changes, dict | None):
            found.append(
                f"variants.{name} must be a mapping of keys to values, not {changes!r:.50}"
            )
            continue
        base = (changes or {}).get("base")
        if base is not None and base not in above:
            found.append(f"variants.{name}.base={base} is none of the variants above it")
        above.append(name)
    return found


def _run_problems(name: str, values: dict[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    config = run_config_from_dict(values, problems)
    problems = problems or _config_problems(config)
    return [Problem((), f"{name}: {problem.message}") for problem in problems]


def decoder_values(plan: ExperimentPlan, variant: str) -> dict[str, Any]:
    """Sections of a variant's configuration."""
    changes = [plan.variants[variant] or {}]
    while (base := changes[-1].get("base")) is not None:
        changes.append(plan.variants[base] or {})
    values = plan.run
    for change in reversed(changes):
        values = merged(values, {name: of for name, of in change.items() if name != "base"})
    return merged(values, {"model": {"encoder": {"source": plan.encoder.source or "encoder"}}})


def make_run(values: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run in ``folder`` that is saved whenever it is evaluated, so that one can choose.

    Raises:
        ConfigError: what only the values of this run make wrong.
    """
    values = merged(values, sections)
    training = run_config_from_dict(values, []).training
    generated = {
        "checkpoint": {
            "directory": str(folder / "checkpoints"),
            "interval": training.eval_interval,
            "keep_every": training.eval_interval,  # a stop saves besides: those do not count
        },
        "logging": {"directory": str(folder), "tensorboard": False},
    }
    problems: list[Problem] = []
    config = run_config_from_dict(merged(values, generated), problems)
    raise_problems(str(folder), problems or _config_problems(config))
    return config


def _config_problems(config: RunConfig) -> list[Problem]:
    """What is wrong with a run, or with comparing it to others."""
    problems, training = find_problems(config), config.training
    if training.micro_batch_size == "auto":
        key = "training.micro_batch_size"
        problems.append(
            Problem((key,), f"{key}=auto may differ between runs to be compared: give a number")
        )
    if training.patience is not None:
        key = "training.patience"
        text = f"{key}={training.patience} may end runs to be compared at different steps"
        problems.append(Problem((key,), f"{text}: leave it out, the best evaluated step is chosen"))
    return problems
