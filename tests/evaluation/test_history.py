"""The report on EGPT's history: true, another window's, and zero features, by chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megaegpt.errors import ConfigError, DataError
from megaegpt.evaluation.history import HISTORIES, compare_histories, history_table
from megaegpt.evaluation.text_loss import Evaluation
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.loaded import load
from tests.tiny.models import CHUNK, CHUNKS, VOCAB

WINDOW = CHUNK * CHUNKS
LENGTH = 4 * WINDOW + 11  # the last window ends inside its second chunk


class Text:
    """Random tokens."""

    def __init__(self, length: int = LENGTH) -> None:
        self._tokens = np.random.default_rng(0).integers(0, VOCAB, length).astype(np.uint16)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self._tokens[start : start + length]


@torch.inference_mode()
def naive(kind: str) -> dict[str, list[float]]:
    """Nats per token by chunk; window by window, from the model's own forward pass."""
    loaded = load(kind)
    model, encoder = loaded.model, loaded.encoder
    assert encoder is not None
    tokens = torch.from_numpy(Text().read(0, LENGTH).astype(np.int64))
    sums = {name: torch.zeros(CHUNKS, dtype=torch.float64) for name in HISTORIES}
    counts = torch.zeros(CHUNKS)
    for window in range(5):
        span = tokens[window * WINDOW : window * WINDOW + WINDOW + 1]
        inputs, targets = torch.zeros(2, 1, WINDOW, dtype=torch.int64)
        targets.fill_(-100)
        inputs[0, : len(span) - 1], targets[0, : len(span) - 1] = span[:-1], span[1:]
        shape = (1, CHUNKS, CHUNK)
        states = encoder(inputs.view(shape))
        features = states[:, :-1, -1]
        donor = (window + 2) % 4
        others = tokens[donor * WINDOW : (donor + 1) * WINDOW].view(shape)
        states_of = {"true": states, "shuffled": encoder(others), "zero": states}
        foreign = states_of["shuffled"][:, :-1, -1]
        histories = {
            "true": features,
            "shuffled": foreign,
            "zero": torch.zeros_like(features),
        }
        text = F.pad(inputs, (1, 0), value=int(tokens[window * WINDOW - 1]) if window else -1)
        before = int(tokens[donor * WINDOW - 1]) if donor else -1
        texts = {
            "true": text,
            "shuffled": F.pad(others.flatten(1), (1, 0), value=before),
            "zero": torch.full_like(text, -1),
        }
        for name, history in histories.items():
            more = {}
            if model.config.egpt.token_memory:
                more = {"text": text, "earlier_states": states_of[name][:, :-1]}
                more["earlier_text"] = texts[name][:, : WINDOW - CHUNK + 2]
            nats = model(states, history, targets.view(shape), "none", **more)
            sums[name] += nats.double().sum((0, 2))
        counts += (targets.view(shape) >= 0).sum((0, 2))
    return {name: (sums[name] / counts).tolist() for name in HISTORIES}


def _compare(kind: str, tp_size: int) -> dict[str, Evaluation]:
    grid = grid_for(tp_size)
    return compare_histories(load(kind, grid), Text(), grid, 2, torch.float32)


@pytest.mark.parametrize("kind", ["egpt", "egpt_memory"])
def test_the_report_is_that_of_a_loop_over_windows_on_any_ranks(
    distributed: Distributed, kind: str
) -> None:
    expected = naive(kind)
    for results in (_compare(kind, 1), *distributed(4, _compare, kind, 2)):
        for name in HISTORIES:
            assert results[name].loss_by_chunk == pytest.approx(expected[name], rel=1e-5)
            assert results[name].tokens == LENGTH - 1
        first = {results[name].loss_by_chunk[0] for name in HISTORIES}
        assert max(first) == pytest.approx(min(first), rel=1e-6)  # no history to exchange
        assert len({round(results[name].loss_by_chunk[2], 3) for name in HISTORIES}) == 3


def test_the_table_has_a_line_a_chunk_and_the_differences() -> None:
    by_name: dict[str, Any] = {"true": 3.0, "shuffled": 3.25, "zero": 3.5}
    results = {n: Evaluation(x, 1.0, 10, (2.0, x)) for n, x in by_name.items()}
    lines = [line.split() for line in history_table(results).splitlines()]
    assert lines[0] == ["chunk", "true", "shuffled", "zero", "shuffled-true", "zero-true"]
    assert lines[2] == ["0", "2.0000", "2.0000", "2.0000", "+0.0000", "+0.0000"]
    assert lines[3][1:] == lines[4][1:] == ["3.0000", "3.2500", "3.5000", "+0.2500", "+0.5000"]


def test_other_models_and_short_texts_are_refused() -> None:
    grid = ProcessGrid()
    with pytest.raises(ConfigError, match="not a gpt"):
        compare_histories(load("gpt"), Text(), grid, 2, torch.float32)
    with pytest.raises(DataError, match="no second window"):
        compare_histories(load("egpt"), Text(WINDOW + 5), grid, 2, torch.float32)
