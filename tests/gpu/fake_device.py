"""A GPU that is not there: fake tensors on device ``cuda``, under a build of torch without CUDA.

Fake tensors have a shape, a type and a device, and no values. So an operator between a tensor on
the CPU and one on the GPU raises, and so does whatever would have to wait for the device to read a
value, ``tensor.item()`` or ``bool(tensor)``. What they cannot show: the kernels themselves, random
generators, streams and pinned memory.

torch's autograd engine asks a device for a guard and an accelerator, which such a build has only
for the CPU. :func:`enable` gives it a guard that does nothing, by writing into the loaded library:
for x86-64 and one release of torch, in a process that does nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)

_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_IS_ACCELERATOR = "_ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE"
_CUDA, _META, _DEVICE_TYPES = 1, 14, 21  # c10/core/DeviceType.h
_METHODS = 40  # at least as many as c10::impl::DeviceGuardImplInterface has
_RETURN_ONE = b"\xb8\x01\x00\x00\x00\xc3"  # mov eax, 1; ret: DeviceType::CUDA, or its device 0
_RETURN_FALSE = b"\x31\xc0\xc3"  # xor eax, eax; ret

_kept: list[object] = []


def missing() -> str | None:
    """Why there can be no fake GPU here; None if there can."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    if torch.version.cuda is not None:
        return "torch has been built with CUDA"
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"fake GPUs are for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    for library, symbol in (("libc10.so", _GUARDS), ("libtorch_cpu.so", _IS_ACCELERATOR)):
        try:
            getattr(_library(library), symbol)
        except (OSError, AttributeError):
            return f"torch {torch.__version__} has no {symbol} in {library}"
    return None


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


def enable() -> None:
    """Let autograd work on fake CUDA tensors in this process, from now on."""
    registry = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(_library("libc10.so"), _GUARDS)
    if not registry[_CUDA]:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(_RETURN_ONE)
        returns_one = ctypes.addressof(ctypes.c_char.from_buffer(code))
        meta = ctypes.c_void_p.from_address(registry[_META]).value
        assert meta is not None
        methods = (ctypes.c_void_p * _METHODS)(*(ctypes.c_void_p * _METHODS).from_address(meta))
        methods[0] = methods[2] = returns_one  # type() and getDevice()
        guard = ctypes.c_void_p(ctypes.addressof(methods))
        _kept.extend([code, methods, guard])
        registry[_CUDA] = ctypes.addressof(guard)
    address = ctypes.cast(_library("libtorch_cpu.so")[_IS_ACCELERATOR], ctypes.c_void_p).value
    assert address is not None
    page = ctypes.c_void_p(address & ~(mmap.PAGESIZE - 1))
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    if ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(2 * mmap.PAGESIZE), everything):
        raise OSError("mprotect")
    ctypes.memmove(address, _RETURN_FALSE, len(_RETURN_FALSE))  # no streams to wait for


class Transfers(TorchDispatchMode):
    """Refuses copies between the CPU and the device, which fake tensors make without a word."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"):
            leaves = tree_leaves((args, kwargs, result))
            devices = {x.device.type for x in leaves if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise AssertionError(f"{func} copies between {' and '.join(sorted(devices))}")
        return result


class Attention:
    """What ``F.scaled_dot_product_attention`` chooses on an H100 (torch 2.13's sdp_utils.cpp), as
    fake tensors cannot choose for it.
    """

    def __init__(self) -> None:
        self.chosen: Counter[str] = Counter()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        aten, grad = torch.ops.aten, torch.is_grad_enabled()
        half, heads = q.dtype in (torch.bfloat16, torch.float16), q.shape[1]
        bias = None
        if attn_mask is not None:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
            bias = bias.expand(q.shape[0], heads, q.shape[2], k.shape[2])
        if half and torch.backends.cuda.cudnn_sdp_enabled() and q.shape[-1] % 8 == 0:
            self.chosen["cudnn"] += 1
            if bias is not None or q.shape[2] == 1 or not grad:
                raise AssertionError("cuDNN's attention with a mask, for one query or in inference")
            attend = aten._scaled_dot_product_cudnn_attention
            return attend(q, k, v, bias, grad, dropout_p, is_causal, False, scale=scale)[0]
        if half and bias is None:
            self.chosen["flash"] += 1
            attend = aten._scaled_dot_product_flash_attention
            return attend(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        if heads == k.shape[1]:
            self.chosen["efficient"] += 1
            attend = aten._scaled_dot_product_efficient_attention
            return attend(q, k, v, bias, grad, dropout_p, is_causal, scale=scale)[0]
        self.chosen["math"] += 1
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), dropout_p) @ v


@contextlib.contextmanager
def fake_gpu(dtype: torch.dtype = torch.bfloat16) -> Iterator[Attention]:
    """Tensors are fake; floating-point ones without a type of their own are of ``dtype``."""
    previous, attend = torch.get_default_dtype(), F.scaled_dot_product_attention
    torch.set_default_dtype(dtype)
    attention = Attention()
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        with FakeTensorMode(), torch.random.fork_rng(devices=[]):
            yield attention
    finally:
        F.scaled_dot_product_attention = attend
        torch.set_default_dtype(previous)
