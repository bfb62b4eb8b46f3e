"""GPT as a whole: sizes, loss, head. test_attention.py and test_kinds.py hold its attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megaegpt.config import ModelConfig
from megaegpt.model.build import build_model, meta_model
from megaegpt.parallel.grid import ProcessGrid

GRID = ProcessGrid()
TINY = ModelConfig(vocab_size=300, max_seq_len=8, hidden_size=16, num_layers=2, num_heads=2)
SIZES = {  # layers, heads, width -> parameters with GPT-2's 50,257 tokens, as published
    "124M": (12, 12, 768, 124_439_808),
    "355M": (24, 16, 1024, 354_823_168),
    "774M": (36, 20, 1280, 774_030_080),
    "1558M": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize("name", SIZES)
def test_gpt2_sizes_have_the_published_parameters(name):
    layers, heads, width, published = SIZES[name]
    config = ModelConfig(num_layers=layers, num_heads=heads, hidden_size=width)
    padding = (config.padded_vocab_size - config.vocab_size) * width
    assert meta_model(config).num_parameters() == published + padding


def test_operations_per_token_of_gpt2_124m():
    """6 x matrix weights + 12 x layers x width x context (PaLM, appendix B), by hand."""
    matrices = 12 * 12 * 768 * 768 + 50257 * 768
    assert meta_model(ModelConfig()).flops_per_token() == 6 * matrices + 12 * 12 * 768 * 1024


def test_loss_is_the_cross_entropy_of_its_logits():
    model = build_model(TINY, GRID).double()
    tokens = torch.randint(300, (2, 8))
    targets = torch.randint(300, (2, 8))
    targets[1, 3:] = -100
    logits = model.logits(tokens)
    assert torch.isneginf(logits[..., 300:]).all()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model(tokens, targets, "none").flatten(), expected.detach())
    torch.testing.assert_close(model(tokens, targets), expected.sum())


def test_the_tied_head_and_the_embedding_are_one_parameter():
    tied, untied = (build_model(replace(TINY, tied_embeddings=t), GRID) for t in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 384 * 16


def test_a_token_sees_its_past_only():
    model = build_model(TINY, GRID).double()
    tokens = torch.randint(300, (1, 8))
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 300
    moved = (model.hidden_states(tokens) != model.hidden_states(changed)).any(-1)[0]
    assert moved.tolist() == [False] * 4 + [True] * 4
