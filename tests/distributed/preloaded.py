"""What forked ranks have imported already."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a GPU when it is imported

import deepspeed

import megaegpt.generation.generator
import megaegpt.parallel.launch
import megaegpt.training.pretraining

__all__ = ["deepspeed", "megaegpt"]
