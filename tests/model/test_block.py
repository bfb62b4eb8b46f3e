"""Blocks on builds of torch that lack what is private to others."""

from __future__ import annotations

import subprocess
import sys

_WITHOUT_ONEDNN = """
import torch

class Nothing:
    def __getattr__(self, name):
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute {name!r}")

torch.ops.mkldnn = Nothing()
from megaegpt.config import ModelConfig
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid

config = ModelConfig(vocab_size=300, max_seq_len=8, hidden_size=256, num_layers=1, num_heads=2)
for recompute in ("none", "selective"):
    model = build_model(config, ProcessGrid(), activation_checkpointing=recompute)
    tokens = torch.arange(8).unsqueeze(0)
    model(tokens, tokens).backward()
    print(model.embedding.weight.grad.isfinite().all().item())
"""


def test_a_build_of_torch_without_onednn_trains_a_gpt() -> None:
    """Its weights are large enough for oneDNN's products, were there any."""
    command = [sys.executable, "-c", _WITHOUT_ONEDNN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["True", "True"], done.stderr
