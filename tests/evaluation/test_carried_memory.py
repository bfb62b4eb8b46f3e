"""A token memory over a whole text against one long window of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megaegpt.config import EncoderConfig
from megaegpt.data.tokens.windows import EvaluationWindows
from megaegpt.errors import ConfigError
from megaegpt.evaluation.carried_memory import CarriedMemory, evaluate_with_memory
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.egpt_decoder import EGPTDecoder
from megaegpt.model.egpt.held_tokens import MemoryLimits
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.loaded import load
from tests.tiny.models import CHUNK, CHUNKS, build_with_encoder, egpt, tokens_of

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
    """Nats of every target: each chunk as the last one of all whose keys it sees."""
    loaded, text = load("egpt_memory"), Text()
    model, encoder = loaded.model, loaded.encoder
    assert isinstance(model, EGPT)
    assert encoder is not None
    tokens = torch.from_numpy(text.read(0, len(text)))
    nats = []
    for start in range(0, len(tokens) - 1, CHUNK):
        window_start = start // WINDOW * WINDOW  # what features are seen of
        begin = max(start - memory_chunks * CHUNK, 0)
        read = tokens[: start + CHUNK + 1]
        missing = start + CHUNK + 1 - len(read)
        read = torch.nn.functional.pad(read, (0, missing), value=0)
        states = encoder(read[:-1].view(1, -1, CHUNK))
        hidden = _hidden(model, states[:, window_start // CHUNK :])
        before = read[begin - 1].item() if begin else -1
        keys = states[:, begin // CHUNK :].flatten(1, 2)
        p = _probabilities(model, keys, [before, *read[begin:].tolist()], hidden)
        targets = read[-CHUNK:]
        rows = -p.log().gather(1, targets.unsqueeze(1))[:, 0]
        nats.append(rows[: CHUNK - missing])
    return torch.cat(nats)


def _hidden(model: EGPT, states: torch.Tensor) -> torch.Tensor:
    """Of the last chunk of a window of states (1, n, S, C)."""
    return model.hidden_states(states, states[:, :-1, -1])[:, -1]


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


@pytest.mark.parametrize("memory_chunks", [1, 2, 5, 100])
@torch.no_grad()
def test_each_chunk_sees_what_is_held_of_all_before_it(memory_chunks: int) -> None:
    limits = MemoryLimits(memory_chunks * CHUNK + 3)  # what is no whole chunk is not held
    loaded, expected = load("egpt_memory"), naive(memory_chunks)
    result, held = evaluate_with_memory(loaded, Text(), ProcessGrid(), torch.float32, limits)
    assert result.tokens == len(expected) == len(Text()) - 1
    assert result.loss == pytest.approx(expected.mean().item(), rel=1e-5)
    whole = (len(Text()) - 1) // CHUNK  # what is behind the text's end is not held
    assert held.num_tokens == min(memory_chunks, whole) * CHUNK


FORMS = {
    "all": egpt(local_attention=True, memory_gate=True, token_memory=True, memory_dim=8),
    "few_chunks": egpt(
        local_attention=True, memory_gate=True, token_memory=True, memory_dim=8, memory_chunks=1
    ),
}


@pytest.mark.parametrize("memory_chunks", [1, 2, 5, 100])
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_text_is_evaluated_with_what_it_is_written_with(name: str, memory_chunks: int) -> None:
    """Features, which are seen of a window here and of the last chunks there, have shut gates."""
    config = replace(FORMS[name], positions="rotary", encoder=EncoderConfig(overlap=3))
    model, encoder = build_with_encoder(config)
    assert isinstance(model, EGPT)
    assert encoder is not None
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("attention.gate"):
            parameter.zero_()
    text, limits = Text(), MemoryLimits(memory_chunks * CHUNK)
    tokens = torch.from_numpy(text.read(0, len(text)))
    writer = EGPTDecoder(model, encoder, 1, len(text), limits=limits)
    logits = torch.cat([writer.advance(token.view(1, 1)) for token in tokens[:-1]])
    written = -logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    windows = EvaluationWindows(text, WINDOW, CHUNKS, overlap=config.preceding_tokens)
    inputs, evaluated = CarriedMemory(model, encoder, torch.float64, limits), []
    for number in range(len(windows)):
        batch = {k: torch.from_numpy(x) for k, x in windows.batch(np.array([number])).items()}
        evaluated.append(inputs.loss(model, inputs.prepare(batch), "none").flatten())
    found = torch.cat(evaluated)[: len(written)]
    torch.testing.assert_close(found, written, rtol=1e-9, atol=1e-9)


def test_less_than_a_chunk_is_refused() -> None:
    limits = MemoryLimits(CHUNK - 1)
    with pytest.raises(ConfigError, match=f"--memory-tokens 7 is less.*give at least {CHUNK}"):
        evaluate_with_memory(load("egpt_memory"), Text(), ProcessGrid(), torch.float32, limits)


def test_keys_may_be_rounded() -> None:
    losses = {}
    for dtype in ("fp32", "fp16", "int8"):
        limits = MemoryLimits(WINDOW * 4, dtype)  # type: ignore[arg-type]
        loaded = load("egpt_memory")
        result, held = evaluate_with_memory(loaded, Text(), ProcessGrid(), torch.float32, limits)
        losses[dtype] = result.loss
        each = {"fp32": 4, "fp16": 2, "int8": 1}[dtype] * 8 + 8
        assert held.size() == f"80 tokens in {80 * each / 2**20:.1f} MiB"
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
