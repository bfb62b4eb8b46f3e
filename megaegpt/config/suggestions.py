"""Which key was probably meant by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

LIKELY_RUN_KEYS: dict[str, tuple[str, ...]] = {
    "batch_size": ("training.global_batch_size", "training.micro_batch_size"),
    "betas": ("optimizer.beta1", "optimizer.beta2"),
    "block_size": ("model.max_seq_len",),
    "context_length": ("model.max_seq_len",),
    "d_model": ("model.hidden_size",),
    "grad_clip": ("training.gradient_clipping",),
    "gradient_accumulation_steps": ("training.global_batch_size", "training.micro_batch_size"),
    "layers": ("model.num_layers",),
    "learning_rate": ("optimizer.lr",),
    "max_iters": ("training.steps",),
    "max_lr": ("optimizer.lr",),
    "max_steps": ("training.steps",),
    "n_embd": ("model.hidden_size",),
    "n_head": ("model.num_heads",),
    "n_layer": ("model.num_layers",),
    "out_dir": ("checkpoint.directory", "logging.directory"),
    "seed": ("training.seed",),
    "seq_len": ("model.max_seq_len",),
    "steps": ("training.steps",),
    "train": ("data.train",),
    "train_iters": ("training.steps",),
    "warmup": ("optimizer.warmup_steps",),
}
"""Keys of a run by the names that other programs give them, and the most usual key where several
have the same last name."""


@dataclass(frozen=True)
class KeyFinder:
    """Finds keys below the dataclass ``root``, whose own dotted key is ``prefix``."""

    root: type[Any]
    prefix: str = ""
    likely: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Keys that a name stands for, whatever the keys of the root are called."""

    def find(self, key: str, section: type[Any], section_prefix: str) -> list[str]:
        """Dotted keys that may be meant by ``key`` of ``section``, the most likely first.

        Keys of exactly that name anywhere win over keys of a similar name; all of them are given.
        """
        by_name: dict[str, list[str]] = {}
        for dotted in _dotted_keys(self.root, self.prefix):
            by_name.setdefault(dotted.rsplit(".", 1)[-1], []).append(dotted)
        exact = [*self.likely.get(key, ()), *by_name.get(key, ())]
        if exact:
            return list(dict.fromkeys(exact))
        near = difflib.get_close_matches(key, [f.name for f in fields(section)], n=1)
        if near:
            return [f"{section_prefix}{near[0]}"]
        elsewhere = difflib.get_close_matches(key, by_name, n=1, cutoff=0.75)
        return by_name[elsewhere[0]] if elsewhere else []


def _dotted_keys(section: type[Any], prefix: str) -> Iterator[str]:
    hints = get_type_hints(section)
    for item in fields(section):
        yield f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            nested: Any = hints[item.name]
            yield from _dotted_keys(nested, f"{prefix}{item.name}.")
