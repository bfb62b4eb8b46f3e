"""Whether an EGPT reads its history: its loss with true, foreign and empty features, by chunk.

A model that uses what earlier chunks say gets worse with those of another text, the more chunks
there are; one that has learned only that there are earlier chunks does not.

Shapes: B windows, N chunks, S chunk size, C hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megaegpt.data.features.store import FeatureStore
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.windows import TokenSource, tokens_before
from megaegpt.errors import ConfigError, DataError
from megaegpt.evaluation.text import evaluate_text
from megaegpt.evaluation.text_loss import Evaluation
from megaegpt.generation.trained import LoadedModel
from megaegpt.model.calling import chunk_ids_of
from megaegpt.model.egpt.egpt_inputs import EGPTInputs
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.text_tables import format_table

HISTORIES = ("true", "shuffled", "zero")


class ZeroHistory(EGPTInputs):
    """Every feature is a zero vector, and of no chunk the tokens are known."""

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        arguments = super().arguments(batch)
        arguments["features"] = torch.zeros_like(arguments["features"])
        if "text" in arguments:
            size = self._config.egpt.chunk_size
            arguments["earlier_text"] = torch.full_like(arguments["text"][:, size - 1 :], -1)
        return arguments


class ShuffledHistory(EGPTInputs):
    """A window sees the features, and the tokens, of the window half the text away, which in a
    text of several documents is another document's.

    Raises:
        DataError: the text has no second whole window.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        dtype: torch.dtype,
        source: TokenSource,
        token_states: FeatureStore | None = None,
        predictions: FeatureStore | None = None,
    ) -> None:
        config, encoder = loaded.model.config, _encoder(loaded)
        super().__init__(config, encoder, dtype, token_states, predictions=predictions)
        self._egpt, self._source = config.egpt, source
        self._whole = len(source) // config.sample_len
        if self._whole < 2:
            raise DataError(
                f"a text of {len(source):,} tokens has no second window of {config.sample_len:,} "
                "tokens whose features could be exchanged"
            )

    def donor(self, window: int) -> int:
        """Whose features ``window`` is shown."""
        return (window + self._whole // 2) % self._whole

    def prepare(self, batch: Batch) -> Batch:
        """Adds the other windows' tokens (B, N - 1, S), those behind them (B, 1), and before."""
        prepared = dict(super().prepare(batch))
        chunks, size = self._egpt.num_chunks, self._egpt.chunk_size
        firsts = [
            self.donor(first // chunks) * chunks for first in chunk_ids_of(batch)[:, 0].tolist()
        ]
        rows = [self._source.read(first * size, (chunks - 1) * size + 1) for first in firsts]
        text = torch.from_numpy(np.stack(rows).astype(np.int64))
        prepared["donors"] = text[:, :-1].unflatten(1, (chunks - 1, size))
        prepared["behind_donors"] = text[:, -1:]
        if preceding := self._config.preceding_tokens:
            before = [tokens_before(self._source, first * size, preceding) for first in firsts]
            prepared["before_donors"] = torch.from_numpy(np.stack(before))
        if self._token_states is not None:
            chunk_ids = np.array(firsts)[:, None] + np.arange(chunks - 1)
            prepared |= {"states_of_donors": self._token_states.token_states(chunk_ids)}
        return prepared

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        if "states_of_donors" in batch:
            states = batch["states_of_donors"].to(self._dtype)
        else:
            states = self._encoded(batch["donors"], batch.get("before_donors"))
        arguments = super().arguments({**batch, "features": states[:, :, -1]})
        if self._egpt.token_memory:
            arguments["earlier_states"] = states
            parts = (batch["before_donors"][:, -1:], batch["donors"], batch["behind_donors"])
            arguments["earlier_text"] = torch.cat([part.flatten(1) for part in parts], dim=1)
        return arguments


def compare_histories(
    loaded: LoadedModel,
    source: TokenSource,
    grid: ProcessGrid,
    batch_size: int,
    dtype: torch.dtype,
) -> dict[str, Evaluation]:
    """The same text under each of :data:`HISTORIES`. Collective over all ranks.

    Raises:
        ConfigError: the model is no EGPT, or one without a history.
        DataError: the text is too short.
    """
    config = loaded.model.config
    if not config.has_history:
        raise ConfigError(f"histories are compared for an egpt that has one, not a {config.kind}")
    inputs = {
        "true": EGPTInputs(config, _encoder(loaded), dtype),
        "shuffled": ShuffledHistory(loaded, dtype, source),
        "zero": ZeroHistory(config, _encoder(loaded), dtype),
    }
    return {
        name: evaluate_text(loaded, source, inputs[name], grid, batch_size, title=f"{name} history")
        for name in HISTORIES
    }


def history_table(results: dict[str, Evaluation]) -> str:
    """Loss by chunk number under each history, and what the others cost beyond the true one."""
    others = [name for name in results if name != "true"]
    header = ["chunk", *results, *(f"{name}-true" for name in others)]
    by_chunk = zip(*(result.loss_by_chunk for result in results.values()), strict=True)
    rows = [(str(number), losses) for number, losses in enumerate(by_chunk)]
    rows.append(("all", tuple(result.loss for result in results.values())))
    table = [header]
    for title, values in rows:
        losses = dict(zip(results, values, strict=True))
        cells = [f"{losses[name]:.4f}" for name in results]
        cells += [f"{losses[name] - losses['true']:+.4f}" for name in others]
        table.append([title, *cells])
    return format_table(table)


def _encoder(loaded: LoadedModel) -> FrozenEncoder:
    if loaded.encoder is None:
        raise ValueError("an egpt is loaded with its encoder")
    return loaded.encoder
