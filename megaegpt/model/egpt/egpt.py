"""EGPT's trainable part: a shallow decoder that reads encoder states of the current chunk's tokens
and one feature of each earlier chunk of the window: the encoder's state of its last token.

Shapes: B batch, N chunks, n those of a rank under chunk parallelism, S chunk size, M
features of earlier chunks, C hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.labels import NOTHING_BEFORE
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.base import LanguageModel, Predictions
from megaegpt.model.block import BlockStack
from megaegpt.model.egpt.chunk_memory import (
    ChunkWindowContext,
    Gates,
    ReadingContext,
    RecordingContext,
)
from megaegpt.model.egpt.copy_attention import Keys
from megaegpt.model.egpt.token_memory import MemoryMixture, TokenMemory
from megaegpt.model.flops import attention_flops, matmul_flops
from megaegpt.model.head import OutputHead
from megaegpt.model.mlp import MLP
from megaegpt.model.positions import AddedPositions
from megaegpt.model.rotary import RotaryTable, rotary_table
from megaegpt.parallel.chunks import ChunkShares
from megaegpt.parallel.collectives import copy_to_tp
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import Embedding
from megaegpt.parallel.loss import mixed_cross_entropy
from megaegpt.parallel.params import new_parameter, spec_of, unshard
from megaegpt.parallel.partitions import gathered
from megaegpt.parallel.rng import context_rng
from megaegpt.parallel.sequence import SequenceShards, dropout
from megaegpt.parallel.vocabulary import check_targets, check_tokens

Recorded = list[tuple[Tensor, Tensor]]


class EGPT(LanguageModel):
    """The decoder over a frozen encoder (``FrozenEncoder``, kept outside of this module)."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        chunks, width = config.egpt, config.hidden_size
        residual = chunks.adapter_residual  # then nothing is added to the states at first
        std, out_std = (0.0, 0.0) if residual else (config.init_std, config.residual_std)
        self.input_mlp = MLP(config, grid, out_std=out_std)
        self.chunk_positions = AddedPositions(config, chunks.num_chunks, grid, std=std)
        self.lengths = Embedding(chunks.chunk_size, width, grid, std)  # by offset in the chunk
        self.stack = BlockStack(config, grid)
        if chunks.memory_gate:
            for block in self.stack.blocks:
                gate = new_parameter((config.num_heads,), grid, tp_dim=0)
                block.get_submodule("attention").register_parameter("gate", gate)
        self.sink = new_parameter((width,), grid, std=std) if chunks.attention_sink else None
        self.head = OutputHead(config, grid)
        self.token_memory = TokenMemory(config, grid) if chunks.token_memory else None

    def _embed(
        self,
        states: Tensor,
        chunk: Tensor,
        offset: Tensor,
        shards: SequenceShards | None = None,
    ) -> Tensor:
        """Encoder states (B, T, C) with chunk numbers and offsets (T,) -> decoder inputs (B, T, C),
        or this rank's rows of them (n, C).

        At a negative offset stands the attention sink, whatever the states there are.
        """
        if shards is not None:
            tokens = states.shape[:2]
            chunk, offset = (shards.own(x.expand(tokens)) for x in (chunk, offset))
            states = shards.own(states)
        x = self.input_mlp(states, shards)
        if self.config.egpt.adapter_residual:
            x = states + x
        x = self.chunk_positions(x, chunk, shards) + self.lengths(offset.clamp(min=0), shards)
        x = dropout(x, self.config.dropout, self.training, shards)
        if self.sink is None:
            return x
        sink = self.sink if shards is None else copy_to_tp(self.sink, self.grid)
        return torch.where((offset < 0).unsqueeze(1), sink.to(x.dtype), x)

    def _rotary(self, chunk: Tensor, offset: Tensor, dtype: torch.dtype) -> RotaryTable | None:
        """Rotations of tokens and features at chunk numbers and offsets (T,). Where tokens see each
        other they are rotated by their place in the window, else by the number of their chunk.
        """
        egpt = self.config.egpt
        places = chunk * egpt.chunk_size + offset if egpt.local_attention else chunk
        return rotary_table(self.config, places, dtype)

    def _gates(self) -> Gates:
        """By layer, how far its heads are open to what is read from earlier chunks."""
        if not self.config.egpt.memory_gate:
            return ()
        return [block.get_parameter("attention.gate") for block in self.stack.blocks]

    def _feature_places(self, chunks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Chunk number and offset of each of the first ``chunks`` chunks' features, (M,) each."""
        number = torch.arange(chunks, device=device)
        return number, torch.full_like(number, self.config.egpt.chunk_size - 1)

    def hidden_states(
        self,
        token_states: Tensor,
        features: Tensor,
        shares: ChunkShares | None = None,
    ) -> Tensor:
        """A whole window: states (B, N, S, C), features (B, N - 1, C) -> (B, N, S, C) after the
        final norm; with ``shares`` states (B, n, S, C) of this rank's chunks -> (B, n, S, C).

        Positions computed: N * S tokens and N - 1 features, each once.
        """
        egpt = self.config.egpt
        if not egpt.history:
            features = features[:, :0]
        chunks, size = token_states.shape[1:3]
        sinks = int(self.sink is not None)  # tokens before each chunk's own
        device = token_states.device
        numbers = torch.arange(chunks, device=device)
        if shares is not None:
            numbers = shares.places(shares.whole(chunks), device)
        token_chunk = numbers.repeat_interleave(sinks + size)
        token_offset = torch.arange(-sinks, size, device=device).repeat(chunks)
        feature_chunk, feature_offset = self._feature_places(features.shape[1], device)
        chunk = torch.cat([feature_chunk, token_chunk])  # (M + N * S,)
        offset = torch.cat([feature_offset, token_offset])
        tokens = F.pad(token_states, (0, 0, sinks, 0)) if sinks else token_states
        states = torch.cat([features, tokens.flatten(1, 2)], dim=1)
        shards = self.stack.shards(*states.shape[:2])
        context = ChunkWindowContext(
            numbers,
            sinks + size,
            feature_chunk.numel(),
            local=egpt.local_attention,
            rotary=self._rotary(chunk, offset, states.dtype),
            gates=self._gates(),
            shards=shards,
        )
        x = self.stack(self._embed(states, chunk, offset, shards), context)
        return x[:, feature_chunk.numel() :].unflatten(1, (chunks, sinks + size))[:, :, sinks:]

    def forward(
        self,
        token_states: Tensor,
        features: Tensor,
        targets: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        shares: ChunkShares | None = None,
        predicted: tuple[Tensor, Tensor] | None = None,
        **earlier: Tensor,
    ) -> Tensor:
        """States (B, N, S, C), features (B, N - 1, C), targets (B, N, S) -> nats.

        Args:
            shares: of the window's chunks; states and targets are then of this rank's (B, n, S),
                and so are the nats. Collective over the context-parallel group.
            predicted: what :meth:`predict_alone` has given of these states and targets, in the
                place of blocks and head.
            earlier: what :meth:`predictions` needs besides.
        """
        hidden = None if predicted is None else predicted[0]
        _, hidden, mixture = self._predictions(token_states, features, shares, earlier, hidden)
        if mixture is None:
            return self.head.loss(hidden, targets, reduction)
        check_targets(targets, hidden.shape[:-1], self.config.vocab_size)  # they are looked up
        log_keep, added = (x.view(targets.shape) for x in mixture.of(targets.flatten(1)))
        if predicted is not None:
            return mixed_cross_entropy(predicted[1], targets, (log_keep, added), reduction)
        return self.head.loss(hidden, targets, reduction, (log_keep, added))

    @torch.no_grad()
    def predict_alone(self, token_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What blocks and head make of chunks without any history.

        Args:
            token_states: (n, S, C).
            targets: (n, S) the tokens behind each, ``IGNORE`` where there is none.

        Returns:
            What the head and the memory's gates read (n, S, C), and the head's log-probabilities of
            the targets (n, S) in at least fp32.
        """
        states = token_states.unsqueeze(1)
        hidden = self.hidden_states(states, states[:, :0, -1])
        nats = self.head.loss(hidden, targets.unsqueeze(1), "none")
        return hidden.squeeze(1), -nats.squeeze(1)

    def predictions(  # type: ignore[override]
        self,
        token_states: Tensor,
        features: Tensor,
        **memory: Tensor,
    ) -> Predictions:
        """Predict the token behind each.

        Args:
            token_states: (B, N, S, C).
            features: (B, N - 1, C).
            memory: with ``token_memory`` what :meth:`_remembered` needs.
        """
        return self._predictions(token_states, features, None, memory)

    def _predictions(
        self,
        token_states: Tensor,
        features: Tensor,
        shares: ChunkShares | None,
        memory: Mapping[str, Tensor],
        hidden: Tensor | None = None,
    ) -> Predictions:
        if hidden is None:
            shared = shares is not None and self.training and self.drops()
            with context_rng(self.grid) if shared else contextlib.nullcontext():
                hidden = self.hidden_states(token_states, features, shares)
        if self.token_memory is None:
            return Predictions(self.head, hidden)
        mixture = self._remembered(token_states, hidden, shares, **memory)
        return Predictions(self.head, hidden, mixture)

    def _remembered(
        self,
        token_states: Tensor,
        hidden: Tensor,
        shares: ChunkShares | None,
        text: Tensor | None = None,
        earlier_text: Tensor | None = None,
        earlier_states: Tensor | None = None,
        past_keys: Tensor | None = None,
        past_text: Tensor | None = None,
        from_chunk: Tensor | None = None,
    ) -> MemoryMixture:
        """What the token memory says of the tokens behind a window's.

        Args:
            token_states: (B, N, S, C) of the encoder.
            hidden: (B, N, S, C), what the head reads.
            shares: see :meth:`hidden_states`.
            text: (B, 1 + N * S) ids of the window, and of the token before it; -1: it is not known.
            earlier_text: (B, (N - 1) * S + 2) ids that are seen in the place of all chunks but the
                last, those before and behind them included; -1: none is known. None: the window's.
            earlier_states: encoder states of them (B, N - 1, S, C); None: the window's.
            past_keys: (B, H, J, D) held of chunks before the window; None: nothing is.
            past_text: (B, J + 2) ids of them, with that before them and one that is not read.
            from_chunk: (B, N) the first chunk whose keys each chunk sees, counted from that of the
                first key held; None: they see all.
        """
        memory, size = self.token_memory, self.config.egpt.chunk_size
        assert memory is not None
        if text is None:
            raise ValueError("token_memory needs the tokens of the window")
        for ids in (text, earlier_text):
            if ids is not None:
                check_tokens(ids.clamp(min=0), self.config.vocab_size)
        states = token_states.flatten(1, 2)  # (B, T, C)
        keys, numbers = memory.keys(states), None
        if shares is not None:
            keys = shares.gather(keys.unflatten(2, (-1, size)), dim=2).flatten(2, 3)
            numbers = shares.numbers(keys.shape[2] // size)
        own = Keys(keys, F.pad(text, (0, 1), value=NOTHING_BEFORE))
        earlier = own.cut(0, own.num_keys - size)
        if earlier_text is not None:
            earlier = earlier._replace(text=earlier_text)
        if earlier_states is not None:
            earlier = earlier._replace(keys=memory.keys(earlier_states.flatten(1, 2)))
        first_chunk = 0
        if past_keys is not None and past_text is not None:
            first_chunk = past_keys.shape[2] // size
            earlier = Keys(
                torch.cat([past_keys, earlier.keys], dim=2),
                torch.cat([past_text[:, :-1], earlier.text[:, 1:]], dim=1),
            )
        query = memory.ask(states, hidden.flatten(1, 2))
        return MemoryMixture(memory, query, earlier, own, first_chunk, from_chunk, numbers)

    def record_memory(self, features: Tensor) -> Recorded:
        """Features of the chunks before the current one, (B, n, C) with n < N -> each layer's
        keys, values.
        """
        if not self.config.egpt.history:
            features = features[:, :0]
        chunk, offset = self._feature_places(features.shape[1], features.device)
        context = RecordingContext(self._rotary(chunk, offset, features.dtype))
        self.stack(self._embed(features, chunk, offset), context)
        return context.recorded

    def decode(
        self,
        token_states: Tensor,
        memory: Recorded,
        chunk: int,
        offset: int,
        cache: KVCache | None = None,
    ) -> Tensor:
        """New tokens of chunk number ``chunk`` of the window, from ``offset`` on: (B, T, C) -> (B,
        T, C).

        ``cache`` holds the chunk's attention sink and its earlier tokens, and is needed with local
        attention only.
        """
        sinks = int(self.sink is not None and offset == 0)
        if sinks:
            token_states = F.pad(token_states, (0, 0, sinks, 0))
        length, device = token_states.shape[1], token_states.device
        chunks = torch.full((length,), chunk, device=device)
        offsets = torch.arange(offset - sinks, offset - sinks + length, device=device)
        rotary = self._rotary(chunks, offsets, token_states.dtype)
        context = ReadingContext(memory, cache, rotary, self._gates())
        x = self.stack(self._embed(token_states, chunks, offsets), context)
        if cache is not None:
            cache.length += length
        return x[:, sinks:]

    def metrics(self) -> dict[str, float]:
        """How far each layer's memory gate is open: the mean of ``|tanh(gate)|`` over its heads, 0
        to 1. Of a token memory the mean share of its pointers since the last call, 0 to 1, and the
        mean of their scales.
        """
        gates = list(self._gates())
        with gathered(gates):
            full = [unshard(gate, spec_of(gate), self.grid) for gate in gates]
            openness = [gate.float().tanh().abs().mean().item() for gate in full]
        found = {f"memory_gate/{layer:02d}": value for layer, value in enumerate(openness)}
        if (memory := self.token_memory) is not None:
            if (share := memory.mean_share()) is not None:
                found["token_memory/share"] = share
            with gathered([memory.log_scale]):
                found["token_memory/scale"] = memory.scale.mean().item()
        return found

    def flops_per_token(self) -> int:
        config, egpt = self.config, self.config.egpt
        features = egpt.num_chunks - 1 if egpt.history else 0
        beside = features + (egpt.num_chunks if egpt.attention_sink else 0)
        positions = 1 + beside / (egpt.num_chunks * egpt.chunk_size)  # a token's share of them
        per_position = matmul_flops(self.stack) + matmul_flops(self.input_mlp)
        visible = features + (egpt.chunk_size if egpt.local_attention else 1)
        forward = positions * per_position + attention_flops(config, visible)
        forward += 2 * config.vocab_size * config.hidden_size
        return int(3 * forward) + self.memory_flops_per_token()

    def memory_flops_per_token(self) -> int:
        """Of :meth:`flops_per_token` those of the token memory."""
        if (memory := self.token_memory) is None:
            return 0
        egpt = self.config.egpt
        projected = 2 * sum(x.numel() for x in (memory.query, memory.key, memory.gate))
        seen = egpt.num_chunks * egpt.chunk_size / 2  # on average over a window
        compared = 2 * seen * egpt.memory_dim * egpt.memory_pointers
        return int(3 * (projected + compared))
