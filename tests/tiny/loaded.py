"""Tiny models for the real tokenizer, and the naive way to ask them for probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megaegpt.config import EncoderConfig
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.generation.recomputing import RecomputingDecoder
from megaegpt.generation.trained import LoadedModel
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.models import DEEPGPT, EGPT, GPT, build_with_encoder, egpt

TOKENIZER = Tokenizer.load()
CONFIGS = {
    "gpt": GPT,
    "egpt": EGPT,
    "egpt_memory": egpt(token_memory=True, memory_dim=8),
    "egpt_overlap": replace(egpt(local_attention=True), encoder=EncoderConfig(overlap=3)),
    "deepgpt": DEEPGPT,
}


def load(kind: str, grid: ProcessGrid | None = None) -> LoadedModel:
    """A model of the tests of generation; its vocabulary is 90 tokens."""
    model, encoder = build_with_encoder(CONFIGS[kind], grid, torch.float32)
    return LoadedModel(model, encoder, TOKENIZER)


def load_speaking(kind: str, vocab_size: int = 50257) -> LoadedModel:
    """With the tokenizer's vocabulary, and room for a sentence."""
    config = replace(
        CONFIGS[kind], vocab_size=vocab_size, hidden_size=16, num_heads=2, max_seq_len=40
    )
    model, _ = build_with_encoder(config, None, torch.float32)
    return LoadedModel(model, None, TOKENIZER)


@torch.inference_mode()
def naive_score(
    loaded: LoadedModel, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Token by token, each from the whole text before it."""
    total, greedy = 0.0, True
    text = list(context)
    for token in continuation:
        decoder = RecomputingDecoder(loaded.model, loaded.encoder)
        logits = decoder.advance(torch.tensor([text]))[0]
        total += logits.double().log_softmax(-1)[token].item()
        greedy = greedy and int(logits.argmax()) == token
        text.append(token)
    return total, greedy
