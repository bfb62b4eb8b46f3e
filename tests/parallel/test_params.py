"""Initial values depend on (seed, name) alone, so every layout starts from the same model."""

import torch

from megaegpt.config import ModelConfig
from megaegpt.model.build import build_model, meta_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of

TINY = ModelConfig(vocab_size=300, max_seq_len=16, hidden_size=16, num_layers=2, num_heads=2)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (build_model(TINY, ProcessGrid(), seed=s) for s in (1, 1, 2))
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (spec_of(a).init_std == 0), name


def test_initial_values_are_gpt2s():
    model = build_model(TINY, ProcessGrid())
    named = dict(model.named_parameters())
    assert abs(named["embedding.weight"][:300].std().item() - 0.02) < 1e-3
    down = named["stack.blocks.0.mlp.down.weight"].std().item()
    assert abs(down - 0.02 / 4**0.5) < 1e-3
    assert (named["stack.norm.weight"] == 1).all()
    assert (named["stack.norm.bias"] == 0).all()
    assert (named["embedding.weight"][300:] == 0).all()


def test_a_meta_model_counts_without_memory():
    model = meta_model(TINY)
    assert all(p.is_meta for p in model.parameters())
    assert model.num_parameters() == build_model(TINY, ProcessGrid()).num_parameters()
