"""The frozen encoder stays what it was, whatever is done around it."""

import hashlib
from dataclasses import replace

import pytest
import torch

from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.labels import NOTHING_BEFORE
from megaegpt.model.build import build_model
from megaegpt.model.calling import overlapped
from megaegpt.model.encoder import FrozenEncoder, encoding_flops, weights_fingerprint
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid

TINY = ModelConfig(
    vocab_size=300, max_seq_len=8, hidden_size=16, num_layers=2, num_heads=2, dropout=0.5
)
DECODER = replace(TINY, kind="egpt", egpt=EGPTConfig(num_chunks=3, chunk_size=8))
GRID = ProcessGrid()


@pytest.fixture
def source(tmp_path):
    save_weights(build_model(TINY, GRID, seed=9), tmp_path / "encoder", GRID)
    return tmp_path / "encoder"


def _bytes(encoder: FrozenEncoder) -> str:
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_constructing_the_decoders_leaves_the_encoder_bit_for_bit(source):
    """The original's DeepGPT re-drew 24 matrices of its frozen encoder in its constructor."""
    encoder = FrozenEncoder.from_source(EncoderConfig(source=str(source)), GRID)
    before, fingerprint = _bytes(encoder), encoder.fingerprint
    for kind in ("egpt", "deepgpt"):
        build_model(replace(DECODER, kind=kind), GRID, seed=1)
    assert _bytes(encoder) == before
    assert encoder.fingerprint == fingerprint == weights_fingerprint(encoder.gpt)
    assert fingerprint == weights_fingerprint(build_model(TINY, GRID, seed=9))


def test_training_a_decoder_leaves_the_encoder_bit_for_bit(source):
    encoder = FrozenEncoder.from_source(EncoderConfig(source=str(source)), GRID)
    model = build_model(DECODER, GRID)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = _bytes(encoder)
    tokens = torch.randint(300, (2, 3, 8))
    for _ in range(3):
        encoder.train()
        states = encoder(tokens)
        loss = model(states, states[:, :-1, -1], tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert _bytes(encoder) == before
    assert all(p.grad is None for p in encoder.parameters())


def test_train_mode_does_not_reach_the_encoder(source):
    encoder = FrozenEncoder.from_source(EncoderConfig(source=str(source)), GRID)
    whole = torch.nn.ModuleDict({"encoder": encoder, "decoder": build_model(DECODER, GRID)})
    whole.train()
    assert not any(module.training for module in encoder.modules())
    tokens = torch.randint(300, (2, 8))
    assert torch.equal(encoder(tokens), encoder(tokens))  # dropout 0.5 is in its configuration
    assert not encoder(tokens).requires_grad


def test_states_are_those_of_the_source_after_its_final_norm(source):
    encoder = FrozenEncoder.from_source(EncoderConfig(source=str(source)), GRID)
    gpt = build_model(TINY, GRID, seed=9).eval()
    tokens = torch.randint(300, (2, 3, 8))
    states = encoder(tokens)
    assert states.shape == (2, 3, 8, 16)
    expected = gpt.hidden_states(tokens.flatten(0, 1)).view(2, 3, 8, 16)
    torch.testing.assert_close(states, expected)


def test_what_cannot_be_an_encoder_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.encoder\.source is not set"):
        FrozenEncoder.from_source(EncoderConfig(), GRID)
    with pytest.raises(CheckpointError, match="nowhere"):
        FrozenEncoder.from_source(EncoderConfig(source=str(tmp_path / "nowhere")), GRID)
    save_weights(build_model(DECODER, GRID), tmp_path / "decoder", GRID)
    with pytest.raises(ConfigError, match="is of kind egpt; an encoder must be a gpt"):
        FrozenEncoder.from_source(EncoderConfig(source=str(tmp_path / "decoder")), GRID)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_an_overlap_is_seen_and_gives_no_states(positions):
    """A chunk behind its overlap is the end of the sequence that both make; without one before it,
    the beginning.
    """
    config = replace(TINY, positions=positions, max_seq_len=11)
    gpt = build_model(config, GRID, seed=9)
    encoder = FrozenEncoder(gpt)
    tokens = torch.randint(300, (2, 3, 8))
    before = torch.randint(300, (2, 3, 3))
    before[0, 0] = before[1, 2] = NOTHING_BEFORE
    states = encoder(tokens, before)
    for row in range(2):
        for chunk in range(3):
            own = tokens[row, chunk]
            if before[row, chunk, 0] == NOTHING_BEFORE:
                expected = gpt.hidden_states(own[None])[0]
            else:
                expected = gpt.hidden_states(torch.cat([before[row, chunk], own])[None])[0, 3:]
            torch.testing.assert_close(states[row, chunk], expected)


def test_the_overlap_of_a_chunk_is_the_end_of_the_chunk_before():
    tokens = torch.arange(2 * 3 * 8).view(2, 3, 8)
    before = torch.tensor([[90, 91, 92], [-1, -1, -1]])
    assert overlapped(tokens, before, 3).tolist() == [
        [[90, 91, 92], [5, 6, 7], [13, 14, 15]],
        [[-1, -1, -1], [29, 30, 31], [37, 38, 39]],
    ]
    assert (overlapped(tokens, None, 3)[:, 0] == NOTHING_BEFORE).all()


def test_an_overlap_costs_its_share_of_the_operations(source):
    encoder = FrozenEncoder.from_source(EncoderConfig(source=str(source)), GRID)
    alone, behind = encoding_flops(encoder.config, 8), encoding_flops(encoder.config, 8, overlap=2)
    assert 1.25 < behind / alone < 1.25**2  # attention sees more keys too
