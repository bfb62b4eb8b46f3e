"""An encoder cut before its end, and decoders that start as the part that was cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig
from megaegpt.config.model import RopeScalingConfig
from megaegpt.errors import ConfigError
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder, encoding_flops, weights_fingerprint
from megaegpt.model.initialization import (
    initialization_problems,
    initialize_from_encoder,
    initialize_token_memory,
)
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.models import variant

N, S = 3, 8
GPT = ModelConfig(vocab_size=300, max_seq_len=S, hidden_size=16, num_layers=4, num_heads=2)
DEEPGPT = replace(GPT, kind="deepgpt", num_layers=2, egpt=EGPTConfig(num_chunks=N, chunk_size=S))
EGPT = replace(
    DEEPGPT,
    kind="egpt",
    egpt=EGPTConfig(
        num_chunks=N,
        chunk_size=S,
        local_attention=True,
        memory_gate=True,
        adapter_residual=True,
    ),
)


LLAMA = variant("qwen3", "rotary_extended", GPT)


def _decoders(encoder: ModelConfig) -> list[ModelConfig]:
    """A DeepGPT and an EGPT that can start as the end of ``encoder``."""
    return [
        replace(encoder, kind=like.kind, num_layers=2, egpt=like.egpt) for like in (DEEPGPT, EGPT)
    ]


def save_encoder(folder: Path, config: ModelConfig = GPT) -> str:
    save_weights(build_model(config, ProcessGrid(), seed=9), folder, ProcessGrid())
    return str(folder)


def _cut(source: str, layers: int, grid: ProcessGrid) -> FrozenEncoder:
    return FrozenEncoder.from_source(EncoderConfig(source=source, layers=layers), grid)


def test_a_cut_encoder_gives_the_states_behind_its_last_block(tmp_path):
    encoder = _cut(save_encoder(tmp_path), 3, ProcessGrid())
    whole = build_model(GPT, ProcessGrid(), seed=9)
    tokens = torch.randint(300, (2, N, S))
    behind = []
    whole.stack.blocks[2].register_forward_hook(lambda _, __, output: behind.append(output))
    whole.hidden_states(tokens.flatten(0, 1))
    assert torch.equal(encoder(tokens), behind[0].view(2, N, S, 16))
    cache = KVCache(encoder.gpt.config, ProcessGrid(), 2, S, dtype=torch.float32)
    first, rest = tokens[:, 0, :5], tokens[:, 0, 5:]
    parts = [encoder.gpt.hidden_states(part, cache) for part in (first, rest)]
    torch.testing.assert_close(torch.cat(parts, 1), behind[0].view(2, N, S, 16)[:, 0])


def test_a_cut_encoder_has_a_fingerprint_and_costs_of_its_own(tmp_path):
    source = save_encoder(tmp_path)
    whole, cut = (
        FrozenEncoder.from_source(EncoderConfig(source), ProcessGrid()),
        _cut(source, 2, ProcessGrid()),
    )
    assert cut.fingerprint == weights_fingerprint(cut.gpt) != whole.fingerprint
    assert encoding_flops(cut.config, S) == encoding_flops(whole.config, S) / 2
    with pytest.raises(ConfigError, match=r"model\.encoder\.layers=5: the encoder has 4 blocks"):
        _cut(source, 5, ProcessGrid())


def _differences(source: str, encoder: ModelConfig, tp: int) -> dict[str, float]:
    """Loss of each decoder as it starts, relative to the whole GPT's, at a tensor-parallel size."""
    grid = grid_for(tp)
    tokens = torch.randint(300, (2, N, S + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    gpt = build_model(encoder, ProcessGrid(), seed=9).double()
    expected = gpt(inputs.flatten(0, 1), targets.flatten(0, 1)).item()
    states = _cut(source, 2, grid).double()(inputs)
    found = {}
    for config in _decoders(encoder):
        assert initialization_problems(config, encoder) == []
        model = build_model(config, grid, seed=1)
        initialize_from_encoder(model, source, grid)
        features = [states[:, :-1, -1]] if config.has_history else []
        found[config.kind] = model.double()(states, *features, targets).item() / expected - 1
    return found


@pytest.mark.parametrize("encoder", [GPT, LLAMA], ids=["gpt2", "llama"])
def test_decoders_over_a_cut_encoder_start_as_the_whole_gpt(
    encoder, tmp_path, distributed: Distributed
):
    source = save_encoder(tmp_path, encoder)
    for result in distributed(2, _differences, source, encoder, 2):
        assert result == pytest.approx({"deepgpt": 0.0, "egpt": 0.0}, abs=1e-9)


def test_an_encoder_with_a_head_of_its_own_gives_that_one(tmp_path):
    untied = replace(GPT, tied_embeddings=False)
    source = save_encoder(tmp_path, untied)
    decoder = build_model(DEEPGPT, ProcessGrid(), seed=1)
    initialize_from_encoder(decoder, source, ProcessGrid())
    expected = build_model(untied, ProcessGrid(), seed=9)
    assert torch.equal(decoder.head.weight, expected.head.weight)
    assert torch.equal(decoder.stack.norm.weight, expected.stack.norm.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 4}, "num_heads is 2, model's 4"),
        ({"bias": False}, "bias is True, model's False"),
        ({"num_layers": 5}, "4 blocks, too few for the 5"),
        ({"positions": "rotary"}, "rotary"),
        ({"window": 2}, f"attends to {S} tokens of a chunk and model's block 0"),
    ],
)
def test_what_cannot_start_as_the_encoder_is_refused_by_name(changes, words):
    assert initialization_problems(EGPT, GPT) == []
    assert any(
        words in problem for problem in initialization_problems(replace(EGPT, **changes), GPT)
    )


def test_differences_from_the_encoder_are_said_once_and_by_the_keys_of_the_configuration():
    wider = replace(EGPT, hidden_size=32, ffn_hidden_size=48)
    (problem,) = initialization_problems(wider, GPT)
    assert problem == (
        "model.encoder.initialize_decoder copies its blocks, and its head_dim is 8, model's 16, "
        "its ffn_hidden_size is 64, model's 48"
    )


def test_frequencies_that_follow_from_the_context_must_be_the_encoders():
    yarn = RopeScalingConfig("yarn", factor=4.0)
    encoder = replace(GPT, positions="rotary", rope_scaling=yarn, max_seq_len=256)
    egpt = replace(EGPT, positions="rotary", rope_scaling=yarn, max_seq_len=64)
    (problem,) = initialization_problems(egpt, encoder)
    assert "its rope_scaling.original_max_seq_len is 64.0, model's 16.0" in problem


@pytest.mark.parametrize("layers", [None, 3])
def test_a_token_memory_begins_as_a_cache_over_the_encoders_states(tmp_path, layers):
    """Keys and queries are the states' principal directions; a cut encoder's pass its norm."""
    source = save_encoder(tmp_path, LLAMA)
    with torch.no_grad():
        whole = build_model(LLAMA, ProcessGrid(), seed=9)
        whole.stack.norm.weight.copy_(torch.linspace(0.5, 1.5, 16))
        save_weights(whole, tmp_path, ProcessGrid())
    egpt = replace(EGPT.egpt, token_memory=True, memory_dim=5, memory_pointers=2)
    config = replace(
        LLAMA, kind="egpt", num_layers=1, egpt=egpt, encoder=EncoderConfig(source, layers)
    )
    encoder = FrozenEncoder.from_source(config.encoder, ProcessGrid())
    model = build_model(config, ProcessGrid())
    tokens = torch.randint(300, (12, S), generator=torch.Generator().manual_seed(2))
    initialize_token_memory(model, encoder, source, tokens)
    states = encoder(tokens).flatten(0, 1)
    weight = whole.stack.norm.weight if layers else torch.ones(16)
    directions = F.normalize(F.rms_norm(states, (16,), weight, config.layer_norm_eps), dim=-1)
    _, _, expected = torch.linalg.svd(directions - directions.mean(0))
    memory = model.token_memory
    assert torch.equal(memory.query, memory.key)
    for pointer, rows in enumerate(memory.query.split(5)):  # each has directions of its own
        similar = (rows @ expected[pointer:10:2].T).abs()
        torch.testing.assert_close(similar, torch.eye(5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_token_memory_with_biases_begins_over_a_cut_encoder_with_or_without_them(tmp_path, bias):
    whole = build_model(replace(GPT, bias=bias), ProcessGrid(), seed=9)
    with torch.no_grad():
        for parameter in whole.stack.norm.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, 16))
    save_weights(whole, tmp_path, ProcessGrid())
    egpt = EGPTConfig(num_chunks=N, chunk_size=S, token_memory=True, memory_dim=5)
    config = replace(EGPT, egpt=egpt, encoder=EncoderConfig(str(tmp_path), layers=3))
    encoder = FrozenEncoder.from_source(config.encoder, ProcessGrid())
    model = build_model(config, ProcessGrid())
    initialize_token_memory(model, encoder, tmp_path, torch.randint(300, (12, S)))
    norm = model.token_memory.norm
    assert torch.equal(norm.weight, whole.stack.norm.weight)
    assert torch.equal(norm.bias, whole.stack.norm.bias if bias else torch.zeros(16))
