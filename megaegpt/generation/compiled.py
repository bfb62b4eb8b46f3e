"""One new token through a GPT, compiled; on CUDA the compiled step is recorded as a graph.

What a step computes has the same shapes whatever the length of the text: the token's column is a
tensor, keys and values are written in place, and attention reads the whole preallocated cache under
a mask. Launching a step's hundreds of small kernels one by one takes longer than running them; a
graph launches them as one.

Shapes: B rows, S places of a layer's store, K kv heads, D head dim, C hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaegpt.model.attention.causal import scaled_dot_product
from megaegpt.model.attention.layer import AttentionLayer
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
        stores: each layer's keys and values, (B, K, S, D): column c is at place c mod S.
        column: (1,) of the new token.
        rotary: its rotation.
    """

    absorbed = True
    shards: SequenceShards | None = None
    context_shards: ContextShards | None = None

    def __init__(
        self,
        stores: list[tuple[Tensor, Tensor]],
        column: Tensor,
        rotary: RotaryTable | None,
    ) -> None:
        self.rotary = rotary
        self._stores, self._column = stores, column

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        # A store is no larger than its layer's window: all that is filled is seen.
        keys, values = self._stores[layer.index]
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


def _compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The step as code of its own, which does not look for changes in its model before it runs.

    Looking takes half a millisecond, and of a model nothing changes between steps but values.
    Where torch keeps one list of codes for all steps, each has to see whose it is.
    """
    apart: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        unchanging = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        apart = {"isolate_recompiles": True, "options": {"guard_filter_fn": unchanging}}
    return torch.compile(step, dynamic=False, **apart)


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
        self._code = _compiled(self._compute)
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
        return self._code(self._tokens, self._column)

    def _compute(self, tokens: Tensor, column: Tensor) -> Tensor:
        gpt = self._gpt
        x = gpt.embedding(tokens)
        rotary = rotary_table(gpt.config, column, x.dtype)
        context = SingleTokenContext(self._stores, column, rotary)
        x = gpt.stack(gpt.positions(x, column), context)
        return gpt.head.full_logits(x[:, -1]) if self._with_head else x


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
