"""A token memory over a whole text against one long window of it."""

from __future__ import annotations

import pytest
import torch

from megaegpt.errors import ConfigError
from megaegpt.evaluation.carried_memory import CarriedMemory, evaluate_with_memory
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.held_tokens import MemoryLimits
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.loaded import load
from tests.tiny.models import CHUNK, CHUNKS, tokens_of

WINDOW = CHUNK * CHUNKS
START = {"distance": (0.35, 0.35, 0.1), "bonus": (0, 0.3, 1.7), "match": (-1, 0, 0.5)}
"""Of a new memory; what is far is as the last of a window."""


class Text:
    """Three windows and a half; few tokens, most of which come again."""

    def __init__(self, length: int = 3 * WINDOW + WINDOW // 2 + 2) -> None:
        model = load("egpt_memory").model
        self._tokens = (tokens_of(model.config, 1, length)[0] % 11).numpy()

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, length: int):
        return self._tokens[start : start + length]


def naive(memory_chunks: int) -> torch.Tensor:
    """Nats of every target: each chunk as the last one of a window of all chunks that it sees."""
    loaded, text = load("egpt_memory"), Text()
    model, encoder = loaded.model, loaded.encoder
    assert isinstance(model, EGPT)
    assert encoder is not None
    tokens = torch.from_numpy(text.read(0, len(text)))
    nats = []
    for start in range(0, len(tokens) - 1, CHUNK):
        window_start = start // WINDOW * WINDOW  # what features are seen of
        begin = max(window_start - memory_chunks * CHUNK, 0)
        span = tokens[begin : start + CHUNK + 1]
        missing = start + CHUNK + 1 - begin - len(span)
        span = torch.nn.functional.pad(span, (0, missing), value=0)
        chunks = span[:-1].view(1, -1, CHUNK)
        states = encoder(chunks)
        own = (window_start - begin) // CHUNK
        hidden = _hidden(model, states[:, own:])
        before = text.read(begin - 1, 1).item() if begin else -1
        p = _probabilities(model, states.flatten(1, 2), [before, *span.tolist()], hidden)
        targets = span[1:].view(1, -1, CHUNK)[0, -1]
        rows = -p.log().gather(1, targets.unsqueeze(1))[:, 0]
        nats.append(rows[: CHUNK - missing])
    return torch.cat(nats)


def _hidden(model: EGPT, states: torch.Tensor) -> torch.Tensor:
    """Of the last chunk of a window of states (1, n, S, C)."""
    return model.hidden_states(states, states[:, :-1, -1:])[:, -1]


def _probabilities(
    model: EGPT, states: torch.Tensor, text: list[int], hidden: torch.Tensor
) -> torch.Tensor:
    """Of the last chunk's targets (S, V) by the definition, for a new memory: states (1, J, C) of
    what is seen, the ids with that before and that behind, what the head reads (1, S, C).
    """
    memory = model.token_memory
    keys, query = memory.keys(states)[0, 0], memory.ask(states[:, -CHUNK:], hidden)
    rows = []
    for t, (asked, by_head) in enumerate(
        zip(query.queries[0, 0], model.head.full_logits(hidden[0]).softmax(-1), strict=True)
    ):
        place = states.shape[1] - CHUNK + t
        if place == 0:
            rows.append(by_head)
            continue
        scores, lengths = asked @ keys[:place].T, []
        for j in range(place):
            distance = place // CHUNK - j // CHUNK
            scores[j] += START["distance"][min(distance, CHUNKS - 1)]
            length = int(text[j + 1] == text[place + 1])
            length += length and int(text[j] == text[place] >= 0)
            scores[j] += START["bonus"][length]
            lengths.append(length)
        weights = scores.softmax(-1)
        behind = torch.tensor(text[2 : place + 2])
        pointed = torch.zeros_like(by_head).index_add_(0, behind, weights)
        gate = query.gates[0, 0, t] + START["match"][max(lengths)]
        gate = gate + 0.4 * 10 * (scores.max() / memory.scale - 0.8)
        gate = gate + 0.1 * pointed[behind[weights.argmax()]].log()
        share = gate.sigmoid()
        rows.append((1 - share) * by_head + share * pointed)
    return torch.stack(rows)


@pytest.mark.parametrize("memory_chunks", [2, 5, 100])
@torch.no_grad()
def test_each_chunk_sees_what_is_held_of_all_before_it(memory_chunks: int) -> None:
    limits = MemoryLimits(memory_chunks * CHUNK + 3)  # what is no whole chunk is not held
    loaded, expected = load("egpt_memory"), naive(memory_chunks)
    result, held = evaluate_with_memory(loaded, Text(), ProcessGrid(), torch.float32, limits)
    assert result.tokens == len(expected) == len(Text()) - 1
    assert result.loss == pytest.approx(expected.mean().item(), rel=1e-5)
    assert held.num_tokens == min(memory_chunks, 4 * CHUNKS) * CHUNK


def test_keys_may_be_rounded() -> None:
    losses = {}
    for dtype in ("fp32", "fp16", "int8"):
        limits = MemoryLimits(WINDOW * 4, dtype)  # type: ignore[arg-type]
        loaded = load("egpt_memory")
        result, held = evaluate_with_memory(loaded, Text(), ProcessGrid(), torch.float32, limits)
        losses[dtype] = result.loss
        each = {"fp32": 4, "fp16": 2, "int8": 1}[dtype] * 8 + 8
        assert held.size() == f"96 tokens in {96 * each / 2**20:.1f} MiB"
    assert losses["fp16"] != losses["fp32"]
    assert losses["int8"] != losses["fp32"]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=1e-4)
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=5e-3)


def test_windows_out_of_order_are_an_error() -> None:
    loaded = load("egpt_memory")
    assert isinstance(loaded.model, EGPT)
    assert loaded.encoder is not None
    inputs = CarriedMemory(loaded.model, loaded.encoder, torch.float32, MemoryLimits())
    tokens = torch.zeros(1, WINDOW, dtype=torch.long)
    chunks = torch.arange(CHUNKS, 2 * CHUNKS).unsqueeze(0)
    batch = inputs.prepare({"tokens": tokens, "targets": tokens, "chunk_ids": chunks})
    with pytest.raises(ValueError, match="in order"):
        inputs.loss(loaded.model, batch)


def test_models_without_a_token_memory_are_refused() -> None:
    for kind in ("gpt", "egpt"):
        with pytest.raises(ConfigError, match="token_memory"):
            evaluate_with_memory(load(kind), Text(), ProcessGrid(), torch.float32, MemoryLimits(8))
