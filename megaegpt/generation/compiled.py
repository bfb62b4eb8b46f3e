"""One new token through a GPT, compiled; on CUDA the compiled step is recorded as a graph.

What a step computes has the same shapes whatever the length of the text: the token's column is a
tensor, keys and values are written in place, and attention reads the whole preallocated cache under
a mask. Launching a step's hundreds of small kernels one by one takes longer than running them; a
graph launches them as one.

Blocks are compiled a few at a time, as code that all of them share, since compiling takes as long
as what is compiled (on a CPU three seconds a block).

Shapes: B rows, S places of a layer's store, K kv heads, D head dim, C hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from megaegpt.model.attention.causal import scaled_dot_product
from megaegpt.model.attention.layer import AttentionLayer
from megaegpt.model.block import Block
from megaegpt.model.decoding import new_cache
from megaegpt.model.gpt import GPT
from megaegpt.model.rotary import RotaryTable, rotary_table
from megaegpt.parallel.context_shards import ContextShards
from megaegpt.parallel.int8_weights import Int8Weight
from megaegpt.parallel.sequence import SequenceShards

_CAPACITIES = 128
"""Caches are made for a multiple of so many tokens: texts of like lengths share a compiled step."""
_RUNS_BEFORE_RECORDING = 3
"""In them code is generated and libraries take the memory that they keep."""
_MOST_BLOCKS = 4
"""Compiled together: each call of compiled code takes a tenth of a millisecond."""

_R = TypeVar("_R")
_Stores = Sequence[tuple[Tensor, Tensor]]


def uncompilable(gpt: GPT) -> str | None:
    """Why a model's step cannot be compiled, apart from the machine; None if it can."""
    if gpt.grid.tp_size > 1:
        return "the model is cut over tensor-parallel ranks"
    if isinstance(gpt.head.packed, Int8Weight):
        return "products with weights in int8 are faster as they are"
    if gpt.config.document_end is not None:
        return "attention depends on the tokens (model.document_end)"
    return None


class SingleTokenContext:
    """A token at a column that is a tensor, over stores as they lie in memory.

    Args:
        stores: keys and values, (B, K, S, D), of each layer that will attend, in their order:
            column c is at place c mod S.
        column: (1,) of the new token.
        rotary: its rotation.
    """

    absorbed = True
    shards: SequenceShards | None = None
    context_shards: ContextShards | None = None

    def __init__(
        self,
        stores: _Stores,
        column: Tensor,
        rotary: RotaryTable | None,
    ) -> None:
        self.rotary = rotary
        self._stores, self._column = iter(stores), column

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        # A store is no larger than its layer's window: all that is filled is seen. Whose it is
        # must not be read off the layer: blocks could not share code.
        keys, values = next(self._stores)
        size = keys.shape[2]
        keys.index_copy_(2, self._column % size, k.to(keys.dtype))
        if values is not keys:
            values.index_copy_(2, self._column % size, v.to(values.dtype))
        filled = torch.arange(size, device=keys.device) <= self._column  # (S,)
        if keys.device.type == "cpu":
            return _attention_over_places(q, keys, values, filled)
        return scaled_dot_product(q, keys, values, filled.unsqueeze(0))


def _attention_over_places(q: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> Tensor:
    """Attention of one query, (B, H, 1, D), to the ``filled`` places, (S,), as generated code.

    A kernel of torch's would cut the step in two at every layer, and cost a call in each.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(1, (keys.shape[1], -1))  # (B, K, G, 1, D)
    scores = (q * keys.unsqueeze(2)).sum(-1, dtype=precise) * q.shape[-1] ** -0.5
    shares = scores.masked_fill(~filled, -math.inf).softmax(-1)  # (B, K, G, S)
    y = (shares.unsqueeze(-1) * values.unsqueeze(2)).sum(-2)
    return y.to(q.dtype).flatten(1, 2).unsqueeze(2)  # (B, H, 1, D)


def _compiled(part: Callable[..., _R]) -> Callable[..., _R]:
    """A part of a step as code of its own, which does not look for changes in its model before it
    runs.

    Looking takes half a millisecond, and of a model nothing changes between steps but values, and
    between its blocks nothing that the code depends on but tensors.
    Where torch keeps one list of codes for all steps, each has to see whose it is.
    """
    apart: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        unchanging = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        apart = {"isolate_recompiles": True, "options": {"guard_filter_fn": unchanging}}
    return torch.compile(part, dynamic=False, **apart)


def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What ``run`` launches, as a CUDA graph: each call launches it again, on the same memory.

    torch can compile into graphs by itself, but looks at every tensor before it launches one, which
    takes longer than a small model's step.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_RUNS_BEFORE_RECORDING):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may go on
        result = run()

    def launch() -> Tensor:
        graph.replay()
        return result

    return launch


def places_in_memory(gpt: GPT) -> list[int]:
    """Of the parameters."""
    return [parameter.data_ptr() for parameter in gpt.parameters()]


class CompiledStep:
    """The step for one batch size and one capacity, and the cache that it was compiled for."""

    def __init__(self, gpt: GPT, batch_size: int, capacity: int, with_head: bool) -> None:
        self._gpt, self._with_head = gpt, with_head
        self.borrower: Callable[[], object | None] = lambda: None
        device = gpt.grid.device
        self.cache = new_cache(gpt, batch_size, capacity)
        self._stores = self.cache.stores()
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._spans = _spans(gpt, self._stores)
        self._begin, self._end = _compiled(self._embed), _compiled(self._finish)
        self._add = _compiled(_add_blocks)
        self._launch: Callable[[], Tensor] | None = None
        self._places: list[int] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, 1) ids behind those in the cache -> (B, V) logits of the next, or without the head
        (B, 1, C) states. The next call may overwrite the result.
        """
        self._tokens.copy_(tokens)  # always the same strides: others would be compiled anew
        self._column.fill_(self.cache.length)
        result = self._run() if self._launch is None else self._launch()
        self.cache.length += 1
        return result

    def begin(self) -> None:
        """Empty the cache for a new text, and record the step on CUDA, unless it is recorded."""
        self.cache.reset()
        with torch.inference_mode():
            for store in self._stores:
                for tensor in store:
                    tensor.zero_()  # what is masked is multiplied by 0, and must be finite
        if self._tokens.device.type != "cuda":
            return
        places = places_in_memory(self._gpt)
        if self._launch is None or places != self._places:  # or it would read what was there before
            self._launch = None  # its memory is free for the next
            with torch.inference_mode():
                self._launch, self._places = record(self._run), places

    def _run(self) -> Tensor:
        x, rotary = self._begin(self._tokens, self._column)
        for blocks, stores in self._spans:
            x = self._add(x, blocks, stores, self._column, rotary)
        return self._end(x)

    def _embed(self, tokens: Tensor, column: Tensor) -> tuple[Tensor, RotaryTable | None]:
        x = self._gpt.embedding(tokens)
        return self._gpt.positions(x, column), rotary_table(self._gpt.config, column, x.dtype)

    def _finish(self, x: Tensor) -> Tensor:
        norm = self._gpt.stack.norm
        x = x if norm is None else norm(x)
        return self._gpt.head.full_logits(x[:, -1]) if self._with_head else x


def _spans(gpt: GPT, stores: _Stores) -> list[tuple[tuple[Block, ...], _Stores]]:
    """The blocks and their stores in equal parts, which share code."""
    blocks = tuple(cast(Iterable[Block], gpt.stack.blocks))
    size = max(n for n in range(1, _MOST_BLOCKS + 1) if len(blocks) % n == 0)
    starts = range(0, len(blocks), size)
    return [(blocks[i : i + size], tuple(stores[i : i + size])) for i in starts]


def _add_blocks(
    x: Tensor,
    blocks: Sequence[Block],
    stores: _Stores,
    column: Tensor,
    rotary: RotaryTable | None,
) -> Tensor:
    """(B, 1, C) -> (B, 1, C)"""
    context = SingleTokenContext(stores, column, rotary)
    for block in blocks:
        x = block(x, context)
    return x


class CompiledSteps:
    """Steps of one GPT, kept for the texts to come.

    Args:
        gpt: in eval mode.
        with_head: steps give logits and not states.
    """

    def __init__(self, gpt: GPT, with_head: bool) -> None:
        self._gpt, self._with_head = gpt, with_head
        self._steps = defaultdict[tuple[int, int, torch.dtype], list[CompiledStep]](list)

    def lend(self, borrower: object, batch_size: int, capacity: int) -> CompiledStep:
        """A step that is ``borrower``'s as long as that lives, whose empty cache has room for
        ``capacity`` tokens a row, or for as many as the model sees.
        """
        rounded = -(-capacity // _CAPACITIES) * _CAPACITIES
        rounded = min(rounded, self._gpt.config.max_seq_len)
        steps = self._steps[batch_size, rounded, self._gpt.head.weight.dtype]
        free = [step for step in steps if step.borrower() is None]
        if not free:
            free = [CompiledStep(self._gpt, batch_size, rounded, self._with_head)]
            steps += free
        free[0].borrower = weakref.ref(borrower)
        free[0].begin()
        return free[0]
