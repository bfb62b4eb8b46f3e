"""What is looked at on a GPU before anything is timed: facts beside what they should be.

Each function makes a workload that does nothing, whose ``info["checks"]`` are rows of what was
looked at, what was found, what is expected, and whether that is so. On a CPU the same code runs at
small sizes, where expectations that only a GPU can meet hold by themselves.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from megaegpt.config import ModelConfig
from megaegpt.model.attention.causal import Segments, causal_attention, scaled_dot_product
from megaegpt.model.build import build_model
from tools.benchmarks.checklist import Check
from tools.benchmarks.common import single_grid
from tools.benchmarks.processes import Workload

_LEAST_CUDNN = 91500
"""Older releases are not torch's first choice for attention on Hopper."""
_MOST_WAITS = 4
"""Times that a step waits for the device: for the norm, and for what DeepSpeed asks beside it."""


def _checks(rows: list[Check]) -> Workload:
    return Workload(lambda: None, 1, {"checks": rows})


def environment(on_gpu: bool) -> Workload:
    """The build of torch and the libraries under it."""
    cudnn = torch.backends.cudnn.version() or 0
    rows = [
        ("torch.version.cuda", str(torch.version.cuda), "13 or 12", not on_gpu or _has_cuda()),
        ("a GPU can be used", str(torch.cuda.is_available()), str(on_gpu), True),
        _growing_segments(on_gpu),
        ("cuDNN", str(cudnn), f"from {_LEAST_CUDNN} on", not on_gpu or cudnn >= _LEAST_CUDNN),
    ]
    return _checks(rows)


def _growing_segments(on_gpu: bool) -> Check:
    """Whether torch has read what ``parallel.devices`` asks of its allocator."""
    grow = False
    if on_gpu:
        tensor = torch.zeros(1 << 20, device=single_grid().device)
        grow = all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
        del tensor
    return ("the allocator's segments grow", str(grow), str(on_gpu), grow == on_gpu)


def _has_cuda() -> bool:
    return str(torch.version.cuda).partition(".")[0] in ("12", "13")


def attention(on_gpu: bool) -> Workload:
    """Masked and causal attention as training has it: finite, and as torch's plain products say.

    The lengths are those at which cuDNN's gradients with a mask can be NaN
    (https://github.com/pytorch/pytorch/issues/196678), which none of ours may reach.
    """
    device = single_grid().device
    dtype, small = (torch.bfloat16, 1) if on_gpu else (torch.float32, 4)
    length = 1024 // small

    def draw(queries: int, keys: int) -> list[Tensor]:
        shapes = [(2, 4, queries, 64), (2, 4, keys, 64), (2, 4, keys, 64)]
        tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        return [x.requires_grad_() for x in tensors]

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, window=None)

    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, window=128 // small)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        numbers = torch.arange(q.shape[2], device=device).div(100, rounding_mode="floor")
        segments = numbers.expand(q.shape[0], -1)
        return causal_attention(q, k, v, window=None, segments=Segments(segments, segments))

    def of_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(k.shape[2], device=device)
        before = places <= places[-q.shape[2] :].unsqueeze(1)
        return scaled_dot_product(q, k, v, before)

    cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "causal": (causal, draw(length, length)),
        "window of 128": (
            lambda *x: causal_attention(*x, window=128 // small),
            draw(length, length),
        ),
        "packed texts, 704 long": (packed, draw(704 // small, 704 // small)),
        "192 long, packed": (packed, draw(192, 192)),
        "a chunk behind 15 features": (of_chunks, draw(length, length + 15)),
        "a chunk behind 240 features": (of_chunks, draw(length, length + 240)),
    }
    return _checks([row for name, case in cases.items() for row in _compare(name, *case)])


def _compare(name: str, attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Check]:
    """Output and gradients beside those of plain products; the first call's time."""
    began = time.perf_counter()
    found = _with_gradients(attend, inputs)
    _synchronise()
    first = time.perf_counter() - began
    soon = first < 3 or not inputs[0].is_cuda  # a busy CPU may take any time
    with sdpa_kernel(SDPBackend.MATH):
        expected = _with_gradients(attend, [x.detach().float().requires_grad_() for x in inputs])
    finite = all(bool(x.isfinite().all()) for x in found)
    error = max(
        ((x.float() - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)
    )
    return [
        (f"attention, {name}: finite", str(finite), "True", finite),
        (f"attention, {name}: error", f"{error:.1e}", "below 2e-2", error < 2e-2),
        (f"attention, {name}: first call", f"{first:.2f} s", "below 3 s", soon),
    ]


def _with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = attend(*inputs)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def graphs(on_gpu: bool) -> Workload:
    """Compiled blocks under training, evaluation, a smaller last batch, and other lengths."""
    grid = single_grid()
    length = 512 if on_gpu else 32
    config = ModelConfig(
        vocab_size=1000,
        max_seq_len=length,
        hidden_size=64,
        num_layers=12 if on_gpu else 2,
        num_heads=4,
    )
    model = build_model(config, grid)
    model.stack.compile_blocks(**({} if on_gpu else {"backend": "eager"}))
    counters.clear()

    def run(rows: int, tokens: int, train: bool) -> int:
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device=grid.device)
        model.train(train)
        with torch.set_grad_enabled(train):
            loss = model(ids, ids)
        if train:
            loss.backward()
        return counters["stats"]["unique_graphs"]

    widths = [(4, length), (3, length), (4, length // 2), (3, length // 4)]
    before = [run(*width, train) for width in widths for train in (True, False)][-1]
    widths = [(2, length // 8), (4, length), (3, length // 2)]
    after = [run(*width, train) for width in widths for train in (True, False)][-1]
    breaks, more = sum(counters["graph_break"].values()), after - before
    rows = [
        ("graph breaks of compiled blocks", str(breaks), "0", breaks == 0),
        ("graphs made after the first four widths", str(more), "0", more == 0),
    ]
    return _checks(rows)


class _Reads(TorchDispatchMode):
    """Counts values read of tensors, where a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def waits(on_gpu: bool, zero: int) -> Workload:
    """How often a training step waits for the device."""
    from tools.benchmarks.engines import PLAIN, build_engine

    config = ModelConfig(max_seq_len=64, hidden_size=64, num_layers=4, num_heads=4)
    engine = build_engine(config, 2, PLAIN | {"zero": zero, "precision": "auto"})
    ids = torch.zeros(2, 64, dtype=torch.int64, device=engine.grid.device)
    batch = {"tokens": ids, "targets": ids}
    for step in range(3):
        engine.train_step(step, [batch])
    if on_gpu:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            engine.train_step(3, [batch])
        torch.cuda.set_sync_debug_mode("default")
        count = sum("synchroniz" in str(w.message) for w in seen)
    else:
        with _Reads() as reads:
            engine.train_step(3, [batch])
        count = reads.count
    most = _MOST_WAITS if on_gpu else math.inf  # a CPU looks at the tokens, which costs nothing
    row = (f"waits of a step, ZeRO-{zero}", str(count), f"at most {_MOST_WAITS}", count <= most)
    return _checks([row])
