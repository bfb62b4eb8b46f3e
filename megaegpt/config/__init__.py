"""Configuration: frozen dataclasses, one concern a file; ``loading`` reads and checks YAML."""

from megaegpt.config.batch_ramp import BatchRampConfig, BatchSchedule
from megaegpt.config.data import DataConfig
from megaegpt.config.lora import LoRAConfig
from megaegpt.config.model import EGPTConfig, EncoderConfig, ModelConfig, RopeScalingConfig
from megaegpt.config.parallel import ParallelConfig
from megaegpt.config.run import RunConfig
from megaegpt.config.training import (
    CheckpointConfig,
    GenerationConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = [
    "BatchRampConfig",
    "BatchSchedule",
    "CheckpointConfig",
    "DataConfig",
    "EGPTConfig",
    "EncoderConfig",
    "GenerationConfig",
    "LoRAConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "TrainingConfig",
]
