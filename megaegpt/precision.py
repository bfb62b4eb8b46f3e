"""The precisions that models are trained and run in."""

from __future__ import annotations

from typing import Final, Literal, cast

import torch

from megaegpt.errors import ConfigError

Precision = Literal["bf16", "fp16", "fp32"]

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

INT8: Final = "int8"
"""Weights alone, for inference on a CPU; what is computed with them is fp32."""


def default_precision(device_type: str) -> Precision:
    """Return the precision that ``auto`` stands for: bf16 on a GPU, fp32 on a CPU."""
    return "fp32" if device_type == "cpu" else "bf16"


def inference_dtype(wanted: str | None, device: torch.device) -> torch.dtype:
    """What a trained model computes in; None: what ``auto`` stands for.

    Raises:
        ConfigError: weights in int8 are wanted on another device than a CPU.
    """
    if wanted == INT8:
        if device.type != "cpu":
            raise ConfigError("--dtype int8 is for a CPU: on a GPU take bf16, or fp16")
        return torch.float32
    return DTYPES[wanted or _auto(device)]


def _auto(device: torch.device) -> Precision:
    """Of the device as it is: GPUs before Ampere have fp16 alone."""
    if device.type == "cuda" and not _gpu_has_bf16():
        return "fp16"
    return default_precision(device.type)


def _gpu_has_bf16() -> bool:
    """In hardware: torch counts emulation otherwise. Where there is no GPU it is asked for another
    machine's.
    """
    has = torch.cuda.is_bf16_supported
    return not torch.cuda.is_available() or has(including_emulation=False)


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """``auto`` is bf16 on a GPU, fp16 on one without it, and fp32 on a CPU; the rest is taken as it
    is.

    Raises:
        ConfigError: this device cannot compute in ``wanted``.
    """
    if wanted == "auto":
        return _auto(device)
    if wanted == "fp16" and device.type == "cpu" and not cpu_supports_fp16():
        raise ConfigError("training.precision=fp16 is not supported on this CPU: use fp32, or auto")
    if wanted == "bf16" and device.type == "cuda" and not _gpu_has_bf16():
        raise ConfigError("training.precision=bf16 is not supported on this GPU: use fp16")
    return cast(Precision, wanted)


def cpu_supports_fp16() -> bool:
    """As DeepSpeed asks, which refuses fp16 where this is false."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False


def slow_precision_notice(precision: Precision, device: torch.device) -> str | None:
    """A warning where products in ``precision`` run without vector instructions, else None."""
    if precision != "bf16" or device.type != "cpu" or _cpu_has_fast_bf16():
        return None
    return "bf16 is many times slower than fp32 on this CPU (no avx512_bf16, no amx)"


def _cpu_has_fast_bf16() -> bool:
    """Private names of torch: where a version lacks them, nothing is said."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: True)() for name in checks)
