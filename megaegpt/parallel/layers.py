"""Linear layers and embeddings cut over tensor-parallel ranks, and the replicated layers beside
them.

Weights are ``nn.Linear``-shaped (out, in). A column-parallel layer's input must have entered the
sharded region, once for all layers that share it (:func:`column_parallel`, or ``enter_tp``); a
row-parallel layer's output has left it. Layers outside of such regions are given ``shards`` where
sequence parallelism leaves this rank's rows of the tokens there, (n, C) instead of (B, T, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaegpt.config.lora import LoRAConfig
from megaegpt.parallel.adapted_products import AdaptedFactors, adapted_products
from megaegpt.parallel.collectives import copy_to_tp, reduce_from_tp
from megaegpt.parallel.gathered_products import gathered_products
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.int8_weights import Int8Weight
from megaegpt.parallel.low_rank import LowRankAdapter
from megaegpt.parallel.matmul import linear
from megaegpt.parallel.params import new_parameter, spec_of
from megaegpt.parallel.scattered_product import scattered_product
from megaegpt.parallel.sequence import SequenceShards, enter_tp
from megaegpt.parallel.vocabulary import check_tokens


class Linear(nn.Module):
    """``y = x @ weight.T + bias``, the same on every rank."""

    tp_dim: int | None = None
    packed: Tensor | Int8Weight | None = None
    """The weight in ``matmul.packed_order``, once more, or in int8 in its place; for inference."""
    blas_rows: frozenset[int] = frozenset()
    """See :func:`~megaegpt.parallel.matmul.linear`; for inference."""
    lora: LowRankAdapter | None
    """An adapter that is trained beside the frozen weight."""

    def __init__(
        self, in_size: int, out_size: int, grid: ProcessGrid, *, bias: bool, std: float
    ) -> None:
        super().__init__()
        self.grid = grid
        self.weight = new_parameter((out_size, in_size), grid, tp_dim=self.tp_dim, std=std)
        bias_dim = 0 if self.tp_dim == 0 else None
        self.bias = new_parameter((out_size,), grid, tp_dim=bias_dim) if bias else None
        self.lora = None

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.lora is not None and _can_be_joined([self], shards):
            return _joined(x, [self])[0]
        weight, bias = self.factors(shards)
        is_packed = weight is self.weight or isinstance(self.packed, Int8Weight)
        packed = self.packed if is_packed else None
        y = linear(x, weight, bias, packed, self.blas_rows)
        return y if self.lora is None else y + self.lora(x, shards)

    def factors(self, shards: SequenceShards | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias as this rank uses them; on its rows of the tokens, if there are
        ``shards``.
        """
        return _used(shards, self.weight, self.bias)

    def add_adapter(self, config: LoRAConfig) -> None:
        """Train an adapter beside the weight, whose values are drawn by the caller."""
        out_size, in_size = spec_of(self.weight).full_shape
        self.lora = LowRankAdapter(in_size, out_size, self.grid, config, tp_dim=self.tp_dim)

    def full_weight(self) -> Tensor:
        """This rank's weight with what an adapter adds to it."""
        if isinstance(self.packed, Int8Weight):
            return self.packed.whole(self.weight.dtype)
        if self.lora is None:
            return self.weight
        return self.weight + self.lora.product()


class ColumnParallelLinear(Linear):
    """Output features cut over TP: (..., in) -> (..., out / tp). Bias is cut too."""

    tp_dim = 0


def column_parallel(
    x: Tensor, layers: Sequence[Linear], grid: ProcessGrid, shards: SequenceShards | None
) -> tuple[Tensor, ...]:
    """Enter a sharded region by layers that share their input: (..., in), or this rank's rows
    (n, in), -> (..., out / tp) of each.
    """
    if shards is not None and shards.keeps_rows and all(layer.lora is None for layer in layers):
        return gathered_products(x, [layer.factors() for layer in layers], shards)
    if _can_be_joined(layers, shards):
        return _joined(x, layers)
    x = enter_tp(x, grid, shards)
    return tuple(layer(x) for layer in layers)


def _can_be_joined(layers: Sequence[Linear], shards: SequenceShards | None) -> bool:
    """Whether the products of layers with one input are those of ``adapted_products``: in training,
    of whole layers that are frozen and have an adapter each.
    """
    if shards is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(
        layer.lora is not None
        and not layer.weight.requires_grad
        and (layer.bias is None or not layer.bias.requires_grad)
        and layer.grid.tp_group is None
        for layer in layers
    )


def _joined(x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    adapters = [layer.lora for layer in layers if layer.lora is not None]
    factors = [
        AdaptedFactors(layer.weight, layer.bias, adapter.a, adapter.b)
        for layer, adapter in zip(layers, adapters, strict=True)
    ]
    scale, rate = adapters[0].scale, adapters[0].dropout
    if not adapters[0].training or rate == 0:
        return adapted_products(x, factors, scale)
    # Each adapter drops other inputs.
    return tuple(adapted_products(x, [layer], scale, F.dropout(x, rate))[0] for layer in factors)


class RowParallelLinear(Linear):
    """Input features cut over TP: (..., in / tp) -> (..., out), summed over ranks; the bias is
    added once.
    """

    tp_dim = 1

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(..., in / tp) -> (..., out), replicated; or (B, T, in / tp) -> (n, out)"""
        if self.grid.tp_group is None:
            return super().forward(x)
        if shards is not None and self.lora is None and not torch.compiler.is_compiling():
            return scattered_product(x, self.weight, self.bias, shards)
        y = linear(x, self.weight, packed=self.packed, blas_rows=self.blas_rows)
        if self.lora is not None:
            y = y + self.lora(x)
        if shards is not None:
            return shards.scatter(y, self.bias)
        y = reduce_from_tp(y, self.grid)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token embedding with rows cut over TP; padding rows are zero and never looked up."""

    packed: Int8Weight | None = None
    """The weight in int8, in place of it, for inference."""

    def __init__(
        self,
        padded_vocab_size: int,
        vocab_size: int,
        hidden_size: int,
        grid: ProcessGrid,
        std: float,
    ) -> None:
        super().__init__()
        self.grid, self.vocab_size = grid, vocab_size
        self.weight = new_parameter(
            (padded_vocab_size, hidden_size), grid, tp_dim=0, std=std, vocab_rows=vocab_size
        )

    def forward(self, tokens: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(...) ids -> (..., C), replicated; or (B, T) -> (n, C)

        Raises:
            DataError: an id is no token (on a GPU a device assertion).
        """
        check_tokens(tokens, self.vocab_size)
        if self.grid.tp_group is None:
            return self._look_up(tokens)
        rows = self.weight.shape[0]
        local = tokens - self.grid.tp_rank * rows
        elsewhere = (local < 0) | (local >= rows)
        vectors = self._look_up(local.masked_fill(elsewhere, 0))
        vectors = vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return reduce_from_tp(vectors, self.grid) if shards is None else shards.scatter(vectors)

    def _look_up(self, rows: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.embedding(rows, self.weight.dtype)
        return F.embedding(rows, self.weight)


class Embedding(nn.Module):
    """A small replicated table, such as positions."""

    def __init__(self, rows: int, hidden_size: int, grid: ProcessGrid, std: float) -> None:
        super().__init__()
        self.weight = new_parameter((rows, hidden_size), grid, std=std)

    def forward(self, indices: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(...) -> (..., C)"""
        weight, _ = _used(shards, self.weight)
        return F.embedding(indices, weight)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, replicated, with an optional bias."""

    def __init__(self, hidden_size: int, grid: ProcessGrid, *, bias: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter((hidden_size,), grid, mean=1.0)
        self.bias = new_parameter((hidden_size,), grid) if bias else None

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(..., C) -> (..., C)"""
        weight, bias = _used(shards, self.weight, self.bias)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467), replicated."""

    def __init__(self, hidden_size: int, grid: ProcessGrid, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter((hidden_size,), grid, mean=1.0)

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(..., C) -> (..., C)"""
        weight, _ = _used(shards, self.weight)
        return F.rms_norm(x, self.weight.shape, weight, self.eps)


class HeadRMSNorm(nn.Module):
    """RMSNorm of each head, with one weight for all heads, which are cut over TP."""

    def __init__(self, head_dim: int, grid: ProcessGrid, *, eps: float) -> None:
        super().__init__()
        self.grid, self.eps = grid, eps
        self.weight = new_parameter((head_dim,), grid, mean=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, T, D)"""
        # Ranks use the weight on different heads: its gradient is the sum of theirs.
        weight = copy_to_tp(self.weight, self.grid)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class ColumnParallelRMSNorm(nn.Module):
    """RMSNorm over features that are cut over TP, such as a column-parallel layer's output."""

    def __init__(self, size: int, grid: ProcessGrid, *, eps: float) -> None:
        super().__init__()
        self.grid, self.size, self.eps = grid, size, eps
        self.weight = new_parameter((size,), grid, tp_dim=0, mean=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size / tp) -> (..., size / tp)"""
        if self.grid.tp_group is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = precise.square().sum(-1, keepdim=True)
        # Every rank's output depends on every rank's squares: summed forward and backward.
        squares = copy_to_tp(reduce_from_tp(squares, self.grid), self.grid)
        return (precise * (squares / self.size + self.eps).rsqrt()).to(x.dtype) * self.weight


def _used(
    shards: SequenceShards | None, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Replicated parameters as a layer outside of sharded regions uses them."""
    if shards is None:
        return weight, bias
    shared_weight, shared_bias = shards.shared(weight, bias)
    assert shared_weight is not None
    return shared_weight, shared_bias


def count_linear_weights(module: nn.Module) -> int:
    """Full weights that take part in matrix products, for FLOP counts (tables and norms do
    none).
    """
    return sum(
        torch.Size(spec_of(layer.weight).full_shape).numel()
        for layer in module.modules()
        if isinstance(layer, Linear)
    )
