"""Rotations of queries and keys, and their scaling to longer texts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megaegpt.config import ModelConfig, RopeScalingConfig
from megaegpt.model.rotary import RotaryTable, rotary_factor, rotary_frequencies, rotary_table
from megaegpt.model.segments import padding_segments
from tests.tiny.models import build, of_kind, tokens_of, variant


class Operators(TorchDispatchMode):
    """Counts operators that read numbers in fp64, as rotary tables are made in."""

    def __init__(self):
        super().__init__()
        self.of_doubles = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.dtype == torch.float64 for x in leaves):
            self.of_doubles[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def forward(model):
    """One pass over two rows."""
    config = model.config
    if config.kind == "gpt":
        model.hidden_states(tokens_of(config, 2, 24))
        return
    egpt = config.egpt
    states = torch.randn(2, egpt.num_chunks, egpt.chunk_size, config.hidden_size)
    if config.kind == "deepgpt":
        model.hidden_states(states)
    else:
        model.hidden_states(states, states[:, :-1, -1])


CPU = torch.device("cpu")
HEAD_64 = ModelConfig(max_seq_len=8192, hidden_size=256, num_heads=4, positions="rotary")


def _table(positions, size, base, dtype, **options):
    config = replace(HEAD_64, head_dim=size, rope_base=base)
    return RotaryTable(torch.tensor(positions), rotary_frequencies(config, CPU), dtype, **options)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rotary_scores_depend_on_the_distance_only(base, pairs):
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            _table([position], 8, base, x.dtype, pairs=pairs).rotate(x)
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum().item()

    for distance in (0, 1, 7, 100):
        expected = score(distance, 0)
        for start in (1, 13, 5000):
            assert score(start + distance, start) == pytest.approx(expected, abs=1e-9)
    assert score(3, 0) != pytest.approx(score(4, 0), abs=1e-3)


def test_rotation_keeps_lengths_and_its_base_sets_the_rates():
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    tables = [_table(range(5), 8, base, torch.float64) for base in (10000.0, 100.0)]
    for table in tables:
        torch.testing.assert_close(table.rotate(x).norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(tables[0].rotate(x), tables[1].rotate(x))
    slowest = _table([1], 8, 16.0, torch.float32).rotate(torch.eye(8)[3].view(1, 1, 1, 8))
    angle = 16.0 ** (-6 / 8)
    assert slowest[0, 0, 0, 3].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert slowest[0, 0, 0, 7].item() == pytest.approx(math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("attention", ["multi_head", "window", "latent"])
def test_a_rotary_model_does_not_know_where_a_text_starts(attention):
    """The same text, whether its columns are 0, 1, ... or come after padding."""
    config = variant(attention, "rotary")
    model = build(config)
    tokens = tokens_of(config, 1, 9)
    shifted = torch.cat([tokens_of(config, 1, 20), tokens], dim=1)
    real = torch.arange(29).unsqueeze(0) >= 20
    torch.testing.assert_close(
        model.hidden_states(shifted, segments=padding_segments(real))[:, 20:],
        model.hidden_states(tokens),
        rtol=1e-9,
        atol=1e-9,
    )


def test_rotary_width_is_the_head_or_the_decoupled_part():
    for config, width in ((variant("grouped", "rotary"), 8), (variant("latent", "rotary"), 4)):
        table = rotary_table(config, torch.arange(3), torch.float64)
        assert table.rotate(torch.randn(1, 1, 3, width)).shape[-1] == width
    assert rotary_table(variant("grouped", "learned"), torch.arange(3), torch.float32) is None


def test_interleaved_pairs_are_halves_in_another_order():
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the first of each pair, then the second
    halves, interleaved = (
        _table(range(3), 8, 100.0, x.dtype, pairs=pairs) for pairs in ("halves", "interleaved")
    )
    turned = interleaved.rotate(x)
    torch.testing.assert_close(turned[..., order], halves.rotate(x[..., order]))
    assert not torch.allclose(turned, halves.rotate(x))


def test_a_fraction_of_a_head_is_rotated_and_the_rest_is_not():
    config = replace(HEAD_64, rope_fraction=0.25)
    x = torch.randn(1, 4, 9, 64, dtype=torch.float64)
    turned = rotary_table(config, torch.arange(9), x.dtype).rotate(x)
    whole = _table(range(9), 16, 10000.0, x.dtype)  # frequencies of the rotated width
    assert torch.equal(turned[..., 16:], x[..., 16:])
    torch.testing.assert_close(turned[..., :16], whole.rotate(x[..., :16]))


@pytest.mark.parametrize(("fraction", "width"), [(0.58, 58), (0.29, 29), (0.25, 25), (1.0, 100)])
def test_a_fraction_in_decimals_is_of_as_many_columns_as_it_says(fraction, width):
    assert replace(HEAD_64, head_dim=100, rope_fraction=fraction).rope_size == width


SCALED = {
    "linear": (RopeScalingConfig("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        RopeScalingConfig("yarn", 4.0, original_max_seq_len=2048),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    ),
    "yarn_with_options": (
        RopeScalingConfig(
            "yarn", 8.0, original_max_seq_len=1024, beta_fast=16, beta_slow=2, attention_factor=1.5
        ),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
        },
    ),
    "llama3": (
        RopeScalingConfig("llama3", 32.0, original_max_seq_len=512),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_transformers(name):
    """Theirs are computed in fp32."""
    scaling, theirs = SCALED[name]
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 10000.0, **theirs},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, CPU)
    ours = rotary_frequencies(replace(HEAD_64, rope_scaling=scaling), CPU)
    torch.testing.assert_close(ours, expected.double(), rtol=1e-6, atol=0)
    assert rotary_factor(scaling) == pytest.approx(factor, abs=1e-12)
    plain = rotary_frequencies(HEAD_64, CPU)
    if scaling.kind != "linear":
        assert ours[0] == plain[0]  # the fastest pair tells neighbours apart
    assert ours[-1] == pytest.approx(plain[-1] / scaling.factor)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    scaled = rotary_frequencies(replace(HEAD_64, rope_scaling=RopeScalingConfig("ntk", 4.0)), CPU)
    plain = rotary_frequencies(HEAD_64, CPU)
    assert scaled[0] == plain[0]
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 4)
    assert ((scaled / plain).diff() < 0).all()


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_original_length_follows_from_the_factor_where_it_is_not_given(kind):
    given, left_out = (
        rotary_frequencies(replace(HEAD_64, rope_scaling=RopeScalingConfig(kind, 4.0, length)), CPU)
        for length in (2048, None)
    )
    assert torch.equal(given, left_out)


@pytest.mark.parametrize("kind", ["gpt", "egpt", "deepgpt"])
def test_a_pass_makes_and_rounds_one_table_for_all_layers(kind):
    """In every layer that would be a fifth of the elementwise work of a block on a GPU."""
    counts = []
    for layers in (1, 4):
        config = replace(variant("grouped", "rotary"), num_layers=layers)
        model = build(of_kind(config, kind) if kind != "gpt" else config).float()
        with Operators() as operators, torch.no_grad():
            forward(model)
        counts.append(operators.of_doubles)
    assert counts[0] == counts[1]
    assert {"cos": 1, "sin": 1, "_to_copy": 2}.items() <= counts[0].items()
