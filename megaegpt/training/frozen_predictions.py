"""What an EGPT predicts by itself where its token memory alone learns: it never changes, so it is
computed once, stored, and read by every run over the same decoder.

Blocks and head, the larger part of a step over a large vocabulary, are then left out of training
and evaluation. Stores lie beside those of the encoder's states, in a folder named by the decoder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import torch
from torch import Tensor

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.arithmetic import arithmetic_digest
from megaegpt.data.features.contents import PredictedChunks
from megaegpt.data.features.store import FeatureStore
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import ConfigError
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import weights_fingerprint
from megaegpt.model.parts import part_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import full_state
from megaegpt.parallel.together import raising_together
from megaegpt.precision import DTYPES, Precision
from megaegpt.training.feature_stores import write_or_open

_MEMORY = "token_memory."
_BEFORE_INPUTS = ("input_mlp.up.", "input_mlp.gate.")
"""Weights that differ from seed to seed and change nothing where the input MLP ends in zeros."""
_KEY = "data.predictions=stored"


class FrozenDecoder:
    """The blocks and head of an EGPT of which nothing but the token memory learns. Collective over
    all ranks.

    Args:
        model: as it is before an engine takes it over.
        precision: that the run computes in.

    Raises:
        ConfigError: more of it learns, or it sees earlier chunks in another way.
    """

    def __init__(self, model: EGPT, grid: ProcessGrid, precision: Precision) -> None:
        self.grid = grid
        with raising_together(grid):
            if (problem := _problem(model)) is not None:
                raise ConfigError(f"{_KEY} {problem}")
        digest = hashlib.sha256(_arithmetic(model.config).encode())
        adds = any(bool(full.any()) for _, full in full_state(model.input_mlp.down, grid))
        without = (_MEMORY,) if adds else (_MEMORY, *_BEFORE_INPUTS)
        self._model, self._dtype = model, DTYPES[precision]
        # As it computes: a checkpoint holds frozen weights so, and going on from it is the same.
        digest.update(weights_fingerprint(model, without, self._dtype).encode())
        self.fingerprint = digest.hexdigest()

    @functools.cached_property
    def _copy(self) -> EGPT:
        """The model as a step computes with it, apart from the one that is to be trained."""
        copy = EGPT(self._model.config, self.grid)
        copy.load_state_dict(self._model.state_dict())
        return copy.to(device=self.grid.device, dtype=self._dtype).requires_grad_(False).eval()

    def predict(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`~megaegpt.model.egpt.egpt.EGPT.predict_alone`."""
        return self._copy.predict_alone(states.to(self._dtype), targets)

    def prepare(
        self, config: RunConfig, states: FeatureStore, stream: TokenStream, split: str
    ) -> FeatureStore:
        """Open the store of what is predicted on a split, computing what is missing of it.
        Collective over all ranks.

        Args:
            states: of the split, with the states of its tokens.

        Raises:
            FolderInUseError: it is not complete, and another process is writing it.
            DataError: it is damaged, or cannot be written.
        """
        folder = states.folder.parent / f"predictions_{self.fingerprint[:12]}" / split
        return write_or_open(
            config,
            folder,
            dataclasses.replace(states.spec, token_states=False, decoder=self.fingerprint),
            PredictedChunks(states, stream, self.predict),
            self.grid,
            what=f"{split} predictions",
        )


def _arithmetic(config: ModelConfig) -> str:
    """A digest of all that decides what is predicted, and no tensor's values; memories of any kind
    share it.
    """
    return arithmetic_digest(
        dataclasses.replace(config, egpt=dataclasses.replace(config.egpt, token_memory=False))
    )


@torch.no_grad()
def _problem(model: EGPT) -> str | None:
    """Why what ``model`` predicts of a chunk is not the same in every step and window."""
    learns = [
        part_of(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(_MEMORY)
    ]
    if learns:
        parts = ", ".join(dict.fromkeys(learns))
        return f"is for a decoder that does not learn: add {parts} to training.freeze"
    gates = (p for name, p in model.named_parameters() if name.endswith("attention.gate"))
    if any(bool(gate.any()) for gate in gates):
        return "is for closed memory gates, and those that the model starts with are not"
    positions = model.chunk_positions
    table = None if positions.table is None else positions.table.weight
    if positions.kind == "sinusoidal" or (table is not None and bool((table != table[0]).any())):
        return "is for a decoder to which all chunks of a window are alike: it adds their numbers"
    return None
