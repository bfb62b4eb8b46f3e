"""Bit-exact repetition of a run, on a GPU too."""

from __future__ import annotations

import os

import torch

from megaegpt.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


def make_deterministic() -> None:
    """Let every operation of this process give the same bits whenever it gets the same input.

    - ``torch.use_deterministic_algorithms``: operations that add up in the order in which threads
      arrive (the backward passes of the embedding, of flash and of memory-efficient attention) take
      an ordered form; one that has none raises an error.
    - cuBLAS gets a fixed workspace. It reads ``CUBLAS_WORKSPACE_CONFIG`` at its first product, so
      this must be called before anything is computed on a GPU.
    - cuDNN does not choose its algorithms by timing them.

    The cost is speed, most of it in attention's backward pass; it has not been measured on a GPU.
    Two runs are equal to the bit if they have the same kind of device, the same ranks and layout,
    and the same versions of the libraries. Between several GPUs NCCL must add in the same order,
    which it does while the topology and its settings stay.

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG is set to a workspace that is not deterministic.
    """
    given = os.environ.setdefault(_WORKSPACE, _REPEATABLE_WORKSPACES[0])
    if given not in _REPEATABLE_WORKSPACES:
        raise ConfigError(
            f"training.deterministic=true needs {_WORKSPACE} to be one of "
            f"{', '.join(_REPEATABLE_WORKSPACES)}, not {given!r}: unset it in the environment"
        )
    torch.use_deterministic_algorithms(True)
    # New memory is written before it is read: filling it first would cost time and change nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
