"""The training run: batch, precision, optimizer, checkpoints, logging, samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megaegpt.config.batch_ramp import BatchRampConfig
from megaegpt.config.lora import LoRAConfig
from megaegpt.config.parameter_groups import ParameterGroup
from megaegpt.config.paths import PathText
from megaegpt.config.ranges import (
    BatchSize,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    SampleLength,
    ScaleFactor,
    Seed,
    StepWindow,
)


@dataclass(frozen=True)
class SpikeGuardConfig:
    """When a gradient norm stands out so far that its step is left out."""

    factor: ScaleFactor | None = None
    """Skip the update of a step whose gradient norm is above so many times the median of the steps
    before. None: none is skipped."""
    window: StepWindow = 100
    """Steps of the median; none is skipped before there are as many."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: BatchSize = 8
    """Samples (gpt: sequences; egpt, deepgpt: windows) per optimizer step over all ranks."""
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    """How the global batch grows to ``global_batch_size``."""
    micro_batch_size: BatchSize | Literal["auto"] = 1
    """Samples a rank runs at once; gradient accumulation follows from the two. auto: as many as fit
    the memory, or on a CPU as make it faster."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. fp16 uses dynamic loss scaling."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """In the backward pass recompute nothing, all but matrix products and attention, or blocks."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    seed: Seed = 1337
    """Seed of initial weights, data order and dropout."""
    deterministic: bool = False
    """The same run gives the same bits on a GPU too: ordered algorithms only, which are slower."""
    eval_interval: PositiveInt = 500
    """Steps between evaluations over the whole validation split (one follows the last step)."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a better loss after which the run ends. None: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a non-finite loss or gradient norm: stop the run, or skip and count the step."""
    spike_guard: SpikeGuardConfig = field(default_factory=SpikeGuardConfig)
    """Which steps are left out because their gradient norm stands out."""
    initialize_from: PathText | None = None
    """Weights to start from at step 0, given as ``model.encoder.source`` is (to continue a run use
    --resume instead)."""
    freeze: tuple[str, ...] = ()
    """Parts whose weights stay as they start: embeddings, layers:N, layers:FIRST-LAST, norm, head,
    and whatever else the model is made of (a wrong name lists them)."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters that are trained beside the weights of ``initialize_from``."""
    compile: bool = False
    """torch.compile each transformer block, the encoder's too."""

    @property
    def chosen_micro_batch_size(self) -> int:
        """``micro_batch_size`` as a number, which a run has chosen before it builds anything.

        Raises:
            ValueError: it is still ``auto`` (``planning.micro_batch`` chooses).
        """
        if self.micro_batch_size == "auto":
            raise ValueError("training.micro_batch_size is auto: choose a number first")
        return self.micro_batch_size


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule. Weight decay acts on matrices and embeddings only, unless
    ``groups`` say otherwise."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised steps (Jordan et al. 2024) for the matrices of blocks, at the same
    learning rate; AdamW for embeddings, the head, norms and biases."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 6e-5
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd: stable, then linear decay over the last ``decay_steps``."""
    warmup_steps: NonNegativeInt = 20
    """Linear warm-up from 0."""
    decay_steps: PositiveInt | None = None
    """cosine, linear: step at which min_lr is reached (None: behind the last).
    wsd: length of the decay (None: a fifth of all steps)."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    momentum: Fraction = 0.95
    """muon: decay of the mean of gradients (Nesterov's)."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with a learning rate or weight decay of their own: a list of {match: a pattern of
    names, lr_scale: a factor of the learning rate, weight_decay}; the first that matches counts."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where a run is saved."""

    directory: PathText = "runs/default/checkpoints"
    """Holds one folder a checkpoint and the file ``latest``."""
    interval: NonNegativeInt = 500
    """Steps between checkpoints (one follows the last step); 0: only at the end and on a signal."""
    keep: PositiveInt = 2
    """Complete checkpoints kept; older ones are removed after a newer one is complete."""
    keep_every: PositiveInt | None = None
    """Also save at every so many steps, and keep those checkpoints for good. None: keep none."""
    keep_best: bool = False
    """Also save at every best validation loss and keep that checkpoint; the link ``best`` leads to
    it."""
    asynchronous: bool = False
    """Copy what is saved to host memory and go on training while it is written; false: wait until
    it is on the disk."""
    best_of: str = "validation"
    """The validation set whose loss is compared, here and by ``training.patience``: ``validation``
    or a name of ``data.validation_sets``; or of ``data.tasks``, by its share of wrong answers."""


@dataclass(frozen=True)
class ProfileConfig:
    """A window of steps whose operators are timed; traces go to ``profile/`` beside the metrics."""

    start: PositiveInt | None = None
    """First step of the window, counted from 1. None: no step is profiled."""
    steps: PositiveInt = 3
    """Steps of the window."""


@dataclass(frozen=True)
class LoggingConfig:
    """The lines, metrics and figures of a run, and where they go."""

    directory: PathText = "runs/default"
    """Holds ``metrics.jsonl``, ``config.yaml``, ``tensorboard/`` and ``wandb/``."""
    interval: PositiveInt = 10
    """Steps between log lines."""
    gradient_norms: bool = False
    """At steps that ``interval`` divides record the gradient norm of each layer, the embeddings and
    the rest."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """The steps whose operators are timed."""
    memory_snapshot: bool = False
    """On a GPU record allocations, so that a run that ends for lack of memory writes what lay there
    and which lines put it there."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Report to Weights & Biases; offline keeps it in ``wandb/`` until ``wandb sync``."""
    wandb_project: str = "megaegpt"
    """Project there; the run has the name of ``directory``."""

    def measures_parts(self, step: int) -> bool:
        """Whether gradient norms by layer are wanted of step ``step``, counted from 0."""
        return self.gradient_norms and (step + 1) % self.interval == 0


@dataclass(frozen=True)
class GenerationConfig:
    """Samples written at every evaluation; also the defaults of ``tools/generate.py``."""

    prompt: str = "\n"
    """Text to continue."""
    max_new_tokens: SampleLength = 0
    """Length of a sample in tokens; 0: no samples during training."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0 is greedy."""
    top_k: PositiveInt | None = 200
    """Sample among the k most likely tokens only. None: all."""
    top_p: Probability | None = None
    """Sample among the fewest tokens that hold this probability. None: all."""
    seed: Seed = 1337
    """Seed of the sampling."""
