"""A whole run: one section per concern, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megaegpt.config.batch_ramp import BatchSchedule
from megaegpt.config.data import DataConfig
from megaegpt.config.model import ModelConfig
from megaegpt.config.parallel import ParallelConfig
from megaegpt.config.training import (
    CheckpointConfig,
    GenerationConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs; ``megaegpt.config.loading`` makes one from YAML and overrides."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, merged into the generated configuration; what other sections decide, or
    the optimizer cannot do, is refused."""

    def gradient_accumulation(self, data_parallel_size: int) -> int:
        """Micro-steps of an optimizer step (``loading`` has checked that it divides).

        While the batch grows, steps have fewer: those that follow from :attr:`batches`.
        """
        return self.training.global_batch_size // (
            self.training.chosen_micro_batch_size * data_parallel_size
        )

    @property
    def batches(self) -> BatchSchedule:
        """Samples of every optimizer step."""
        return BatchSchedule(self.training.global_batch_size, self.training.batch_ramp)

    def tokens_before(self, step: int) -> int:
        """Tokens predicted in the steps 0 .. ``step - 1`` together, where every sample is full."""
        return self.batches.samples_before(step) * self.model.sample_len
