"""Ids that are no token of the model are named where they enter it, whatever the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.errors import DataError
from megaegpt.model.build import build_model, meta_model
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for

GPT = ModelConfig(vocab_size=300, max_seq_len=8, hidden_size=16, num_layers=1, num_heads=2)
EGPT = replace(GPT, kind="egpt", egpt=EGPTConfig(num_chunks=3, chunk_size=4, token_memory=True))
WRONG = (-1, 300, 383, 50_256)  # 384 rows: from 300 on they are padding


def _ids(wrong: int) -> torch.Tensor:
    return torch.tensor([[1, 2, wrong, 299]])


@pytest.mark.parametrize("wrong", WRONG)
def test_a_token_that_the_model_does_not_know_is_named(wrong: int) -> None:
    model = build_model(GPT, ProcessGrid())
    with pytest.raises(DataError, match=f"token id {wrong} .* 300 tokens.*another tokenizer"):
        model.hidden_states(_ids(wrong))


def _refusals() -> list[str]:
    model, refused = build_model(GPT, grid_for(2)), []
    for tokens, targets in [(_ids(wrong), _ids(0)) for wrong in WRONG] + [
        (_ids(0), _ids(wrong)) for wrong in WRONG
    ]:
        try:
            model(tokens, targets)
        except DataError as error:
            refused.append(str(error).split(" is ")[0])
    return refused


def test_every_tensor_parallel_rank_refuses_it(distributed: Distributed) -> None:
    """Each holds some rows; an id in none of them would be looked up as zeros."""
    expected = [f"token id {wrong}" for wrong in WRONG] + [f"target {wrong}" for wrong in WRONG]
    assert distributed(2, _refusals) == [expected, expected]


@pytest.mark.parametrize("where", ["targets", "text", "earlier_text"])
@pytest.mark.parametrize("wrong", [300, 383, 50_256])
def test_remembered_tokens_are_asked_too(where: str, wrong: int) -> None:
    model = build_model(EGPT, ProcessGrid())
    states, features = torch.zeros(1, 3, 4, 16), torch.zeros(1, 2, 16)
    ids = {"targets": torch.zeros(1, 3, 4).long()}
    ids |= {"text": torch.zeros(1, 13).long(), "earlier_text": torch.zeros(1, 10).long()}
    ids["earlier_text"][0, 0] = -1  # none
    ids[where].view(-1)[6] = wrong
    with pytest.raises(DataError, match=f"{wrong} is"):
        model(states, features, **ids)


def test_tensors_without_values_are_not_asked() -> None:
    model = build_model(GPT, ProcessGrid())
    assert model.hidden_states(_ids(0)[:0]).shape == (0, 4, 16)
    assert meta_model(GPT).hidden_states(_ids(0).to("meta")).is_meta
