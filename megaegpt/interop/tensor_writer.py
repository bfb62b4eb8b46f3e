"""A safetensors file written tensor by tensor, for models that are larger than the memory.

The format: https://huggingface.co/docs/safetensors. The library's own ``save_file`` wants all
tensors at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megaegpt.errors import CheckpointError

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write tensors of known shapes, of which ``read`` gives one at a time by name.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor has another shape.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(shapes):
        end = offset + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shapes[name]}")
            file.write(bytes_of(narrowed(tensor, dtype, name)))


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor of finite numbers in another type.

    Raises:
        CheckpointError: some of them are too large for it.
    """
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not bool(converted.isfinite().all()):
        raise CheckpointError(
            f"{name} has numbers up to {tensor.abs().max().item():.3g}, which fp16 cannot hold: "
            "write bf16 or fp32 (--dtype)"
        )
    return converted


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values in memory order, copied only where they are not in that order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
