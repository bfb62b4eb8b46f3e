"""Whether ``torch.compile`` works on this machine."""

from __future__ import annotations

import functools

import torch


@functools.cache
def compile_problem(device_type: str) -> str | None:
    """Why nothing can be compiled for a device (most often: there is no C++ compiler); else None.

    Compiles a small function to find out: seconds, once a process.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device_type))
    except Exception as error:  # whatever dynamo, inductor and the compilers beneath them raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None
