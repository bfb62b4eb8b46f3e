"""Adapters of low rank for linear layers that are cut over tensor-parallel ranks.

Shapes: I inputs, O outputs, R rank; I and O are this rank's share where the layer cuts them.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from megaegpt.config.lora import LoRAConfig
from megaegpt.parallel.collectives import copy_to_tp
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.matmul import linear
from megaegpt.parallel.params import new_parameter, spec_of
from megaegpt.parallel.rng import sharded_rng
from megaegpt.parallel.sequence import SequenceShards, dropout


class LowRankAdapter(nn.Module):
    """``x @ a.T @ b.T * alpha / rank``, added to what a frozen layer gives (Hu et al., arXiv
    2106.09685).

    The factor beside the dimension that the layer cuts is cut like it, and the other one is whole
    on every rank: of a column-parallel layer b is cut and a is whole, of a row-parallel one a is
    cut and b is whole. Ranks use the whole factor on different features, so its gradient is the sum
    of theirs. At the start b is zero, and the model is what it was without adapters.

    Args:
        in_size: inputs of the whole layer.
        out_size: outputs of the whole layer.
        tp_dim: dimension of the layer's weight that is cut; None: neither is.
        head_rows: rows of the weight that this rank uses, where it is whole and they are not all.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        grid: ProcessGrid,
        config: LoRAConfig,
        *,
        tp_dim: int | None,
        head_rows: slice | None = None,
    ) -> None:
        super().__init__()
        assert config.rank is not None
        self.grid, self.scale, self.dropout = grid, config.scale, config.dropout
        self._head_rows, self._cuts_input = head_rows, tp_dim == 1
        self._sums = tp_dim is not None or head_rows is not None
        # The variance of a uniform distribution within 1 / sqrt(I), as nn.Linear's and PEFT's.
        std = (3 * in_size) ** -0.5
        a_dim, b_dim = (1 if tp_dim == 1 else None), (0 if tp_dim == 0 else None)
        self.a = new_parameter((config.rank, in_size), grid, tp_dim=a_dim, std=std)
        self.b = new_parameter((out_size, config.rank), grid, tp_dim=b_dim)

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(..., I) -> (..., O); of a row-parallel layer the ranks' outputs are to be summed, with
        those of the layer. ``shards`` says that x is this rank's rows of the tokens.
        """
        if self.training and self.dropout:
            # Inputs that are cut are dropped by each rank for itself, others alike on all.
            with sharded_rng(self.grid) if self._cuts_input else nullcontext():
                x = dropout(x, self.dropout, True, shards)
        a, b = self._summed(self.a, shards), self._summed(self.b, shards)
        return linear(
            linear(x, a) * self.scale, b if self._head_rows is None else b[self._head_rows]
        )

    def product(self) -> Tensor:
        """(O, I), what is to be added to the layer's weight."""
        return self.scale * (self.b @ self.a)

    def _summed(self, factor: Tensor, shards: SequenceShards | None) -> Tensor:
        sums = self._sums or shards is not None
        whole = sums and spec_of(factor).tp_dim is None
        return copy_to_tp(factor, self.grid) if whole else factor
