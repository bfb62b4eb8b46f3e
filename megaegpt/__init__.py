"""MegaEGPT: distributed training of GPT models and their long-context descendant EGPT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaegpt.api import (
        GPTModel,
        InstructionDataset,
        compute_batch_loss,
        create_instruction_collate_fn,
        create_model_config,
        create_pretraining_dataloader,
        finetune,
        generate_text_autoregressive,
        load,
        pretrain,
        text_to_token_ids,
        token_ids_to_text,
    )

__version__ = "0.1.0"

__all__ = [
    "GPTModel",
    "InstructionDataset",
    "compute_batch_loss",
    "create_instruction_collate_fn",
    "create_model_config",
    "create_pretraining_dataloader",
    "finetune",
    "generate_text_autoregressive",
    "load",
    "pretrain",
    "text_to_token_ids",
    "token_ids_to_text",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'megaegpt' has no attribute {name!r}")
    value = getattr(importlib.import_module("megaegpt.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
