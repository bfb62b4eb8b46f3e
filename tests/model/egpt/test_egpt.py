"""EGPT against the original's way of computing it: one short sequence for every token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megaegpt.config import EGPTConfig, ModelConfig, RopeScalingConfig
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import build_model
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.rotary import rotary_table
from megaegpt.parallel.grid import ProcessGrid
from tests.model.naive import naive_egpt_hidden

N, S, C, HEADS, BATCH = 4, 6, 16, 2, 2
ORIGINAL = ModelConfig(
    kind="egpt",
    vocab_size=40,
    hidden_size=C,
    num_layers=3,
    num_heads=HEADS,
    bias=False,
    egpt=EGPTConfig(num_chunks=N, chunk_size=S),
)


def _variant(**changes) -> ModelConfig:
    return replace(ORIGINAL, egpt=replace(ORIGINAL.egpt, **changes))


VARIANTS = {
    "original": ORIGINAL,
    "biases": replace(ORIGINAL, bias=True),
    "local": _variant(local_attention=True),
    "sinusoidal": replace(ORIGINAL, positions="sinusoidal"),
    "window_2": replace(ORIGINAL, window=2),
    "window_3_local": replace(_variant(local_attention=True), window=3),
    "grouped_query": replace(ORIGINAL, num_kv_heads=1),
    "exact_gelu": replace(ORIGINAL, activation="gelu"),
    "linear_scaling": replace(
        ORIGINAL, positions="rotary", rope_scaling=RopeScalingConfig("linear", 4.0)
    ),
    "ntk_scaling_local": replace(
        _variant(local_attention=True),
        positions="rotary",
        rope_scaling=RopeScalingConfig("ntk", 4.0),
    ),
    "adapter": _variant(adapter_residual=True),
    "no_history": _variant(history=False, local_attention=True),
    "sink": replace(_variant(local_attention=True, attention_sink=True), positions="rotary"),
}
SINKLESS = {name: config for name, config in VARIANTS.items() if name != "sink"}


def _model(config: ModelConfig) -> EGPT:
    model = build_model(config, ProcessGrid(), seed=3).double()
    with torch.no_grad():  # larger than initial weights, so that softmax is far from uniform
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2
            )
    return model


def _batch(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(BATCH, N, S, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(40, (BATCH, N, S), generator=generator)
    targets[0, 1, 2] = -100
    return states, states[:, :-1, -1], targets


@pytest.mark.parametrize("name", SINKLESS)
def test_shared_feature_stream_equals_one_sequence_per_token(name):
    config = VARIANTS[name]
    model = _model(config)
    states, features, targets = _batch(config)
    parameters = dict(model.named_parameters())

    hidden = model.hidden_states(states, features)
    loss = model(states, features, targets)
    grads = torch.autograd.grad(loss, list(parameters.values()))

    naive_hidden = torch.stack([naive_egpt_hidden(parameters, config, row) for row in states])
    logits = naive_hidden @ model.head.weight[:40].t()
    naive_loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="sum")
    naive_grads = torch.autograd.grad(naive_loss, list(parameters.values()))

    torch.testing.assert_close(hidden, naive_hidden, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, naive_loss, rtol=1e-9, atol=0)
    largest = max(grad.abs().max() for grad in naive_grads)
    for key, grad, naive_grad in zip(parameters, grads, naive_grads, strict=True):
        difference = ((grad - naive_grad).abs().max() / largest).item()
        assert difference <= 1e-9, (key, difference)


def test_a_window_computes_each_token_and_each_feature_once():
    model = _model(ORIGINAL)
    states, features, _ = _batch(ORIGINAL)
    lengths = []
    for block in model.stack.blocks:
        block.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    model.hidden_states(states, features)
    assert lengths == [N * S + (N - 1)] * 3


@pytest.mark.parametrize("name", ["original", "local"])
def test_a_token_sees_earlier_chunks_and_its_own_past_and_nothing_else(name):
    """Perturb one encoder state at a time; it is the feature too where it is its chunk's last."""
    config = VARIANTS[name]
    model = _model(config)
    states, _, _ = _batch(config)
    states = states[:1]
    before = model.hidden_states(states, states[:, :-1, -1])
    for n in range(N):
        for t in range(S):
            changed = states.clone()
            changed[0, n, t] += 1.0
            after = model.hidden_states(changed, changed[:, :-1, -1])
            moved = (after != before).any(-1)[0]  # (N, S)
            expected = torch.zeros(N, S, dtype=torch.bool)
            expected[n, t] = True
            if config.egpt.local_attention:
                expected[n, t:] = True
            if t == S - 1:  # this state is the feature of chunk n
                expected[n + 1 :] = True
            assert torch.equal(moved, expected), (n, t)


def test_a_closed_gate_hides_the_history_and_an_open_one_shows_it():
    config = _variant(memory_gate=True, local_attention=True)
    model = build_model(config, ProcessGrid(), seed=3).double()
    states, features, _ = _batch(config)
    closed = model.hidden_states(states, features)
    assert torch.equal(closed, model.hidden_states(states, features + 1.0))
    with torch.no_grad():
        for block in model.stack.blocks:
            block.attention.gate.fill_(0.5)
    opened = model.hidden_states(states, features)
    moved = (opened != closed).any(-1)  # (B, N, S)
    assert not moved[:, 0].any()
    assert moved[:, 1:].all()


def test_gates_receive_gradient_from_the_first_step():
    config = _variant(memory_gate=True)
    model = build_model(config, ProcessGrid(), seed=3).double()
    model(*_batch(config)).backward()
    assert all(block.attention.gate.grad.abs().min() > 0 for block in model.stack.blocks)


class _OneMask:
    """All of a window as one sequence under one dense mask, from the definition of what is seen."""

    absorbed = False
    shards = None

    def __init__(self, model, rotary):
        self.rotary = rotary
        self._gates = [block.get_parameter("attention.gate") for block in model.stack.blocks]
        rows = S + 1
        chunk = torch.tensor([*range(N - 1), *(n for n in range(N) for _ in range(rows))])
        token = torch.arange(len(chunk)) >= N - 1
        place = torch.cat([torch.zeros(N - 1).long(), torch.arange(N * rows)])
        among_features = ~token[:, None] & ~token & (chunk <= chunk[:, None])
        self._features = token[:, None] & ~token & (chunk < chunk[:, None])
        own = (place <= place[:, None]) & (chunk == chunk[:, None])
        self._rest = among_features | token[:, None] & token & own

    def attend(self, q, k, v, layer):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5

        def read(mask):
            weights = scores.masked_fill(~mask, -1e30).softmax(-1) * mask.any(-1, keepdim=True)
            return weights @ v

        gate = self._gates[layer.index].tanh()[:, None, None]
        return read(self._rest) + gate * read(self._features)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_chunks_tokens_see_a_sink_before_them(positions):
    egpt = {"local_attention": True, "memory_gate": True}
    model = _model(replace(_variant(attention_sink=True, **egpt), positions=positions))
    states, features, targets = _batch(model.config)
    parameters = dict(model.named_parameters())
    hidden = model.hidden_states(states, features)
    grads = torch.autograd.grad(model(states, features, targets), list(parameters.values()))

    chunk = torch.tensor([*range(N - 1), *(n for n in range(N) for _ in range(S + 1))])
    offset = torch.tensor([S - 1] * (N - 1) + [-1, *range(S)] * N)
    own = model.chunk_positions(model.input_mlp(states.flatten(1, 2)), torch.arange(N * S) // S)
    own = (own + model.lengths(torch.arange(S).repeat(N))).unflatten(1, (N, S))
    tokens = torch.cat([model.sink.expand(BATCH, N, 1, -1), own], dim=2).flatten(1, 2)
    ahead = model.chunk_positions(model.input_mlp(features), torch.arange(N - 1))
    ahead = ahead + model.lengths(torch.full((N - 1,), S - 1))
    rotary = rotary_table(model.config, chunk * S + offset, torch.float64)
    naive = model.stack(torch.cat([ahead, tokens], dim=1), _OneMask(model, rotary))
    naive = naive[:, N - 1 :].unflatten(1, (N, S + 1))[:, :, 1:]
    torch.testing.assert_close(hidden, naive, rtol=1e-9, atol=1e-9)
    nats = model.head.loss(naive, targets, "sum")
    expected = torch.autograd.grad(nats, list(parameters.values()))
    for (name, grad), want in zip(zip(parameters, grads, strict=True), expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-9, msg=name)
    assert grads[list(parameters).index("sink")].abs().max() > 0


@pytest.mark.parametrize(
    "name",
    ["original", "local", "window_3_local", "adapter", "no_history", "sink"],
)
def test_decoding_from_a_recorded_memory_equals_the_whole_window(name):
    config = VARIANTS[name]
    model = _model(config).eval()
    states, features, _ = _batch(config)
    whole = model.hidden_states(states, features)
    for n in range(N):
        memory = model.record_memory(features[:, :n])
        cache = None
        if config.egpt.local_attention:
            cache = KVCache(config, ProcessGrid(), BATCH, S + 1, dtype=torch.float64)
        parts = [
            model.decode(states[:, n, start:stop], memory, n, start, cache)
            for start, stop in ((0, 3), (3, 4), (4, S))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, n], rtol=1e-9, atol=1e-9)


def test_a_residual_adapter_starts_as_the_identity_whatever_the_chunk_and_offset():
    config = _variant(adapter_residual=True)
    model = build_model(config, ProcessGrid(), seed=3).double()
    states, features, _ = _batch(config)
    inputs = []
    model.stack.blocks[0].register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    model.hidden_states(states, features)
    expected = torch.cat([features, states.flatten(1, 2)], dim=1)
    assert torch.equal(inputs[0], expected)


def test_operations_per_token_are_counted_position_by_position():
    """3 x (2 x weights x positions a token + attention + head), worked out by hand."""
    weights = 3 * (4 * C * C + 8 * C * C) + 8 * C * C  # three blocks, and the input MLP
    positions = (N * S + N - 1) / (N * S)
    attention = 3 * 4 * C * (N - 1 + 1)
    expected = 3 * (positions * 2 * weights + attention + 2 * 40 * C)
    assert build_model(ORIGINAL, ProcessGrid()).flops_per_token() == int(expected)
