"""Device, precision and optimizer choices that need no processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from megaegpt.errors import ConfigError
from megaegpt.training.engine import resolve_precision, slow_precision_notice
from megaegpt.training.optimizer import parameter_groups

_CPU, _GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_precision_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert resolve_precision("auto", _CPU) == "fp32"
    assert resolve_precision("auto", _GPU) == "bf16"
    assert resolve_precision("bf16", _CPU) == "bf16"


def test_fp16_is_refused_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = type("Accelerator", (), {"is_fp16_supported": lambda self: False})
    monkeypatch.setattr("deepspeed.get_accelerator", accelerator)
    with pytest.raises(ConfigError, match=r"training\.precision=fp16"):
        resolve_precision("fp16", _CPU)


def test_slow_bf16_is_noticed_on_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        notice = slow_precision_notice("bf16", _CPU)
        assert (notice is None) is fast
        assert slow_precision_notice("fp32", _CPU) is None


def test_weight_decay_acts_on_matrices_and_embeddings_only() -> None:
    model = nn.ModuleList([nn.Embedding(4, 2), nn.Linear(2, 3), nn.LayerNorm(3)])
    model[1].weight.requires_grad = False
    decayed, free = parameter_groups(model, weight_decay=0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 2)]
    assert decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in free["params"]] == [(3,), (3,), (3,)]
    assert free["weight_decay"] == 0.0


def test_a_plain_python_process_is_a_world_of_its_own() -> None:
    code = (
        "from megaegpt.training.engine import init_distributed\n"
        "import torch.distributed as dist\n"
        "print(init_distributed().type, dist.get_world_size())\n"
        "dist.destroy_process_group()"
    )
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launched}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == ["cpu", "1"], result.stderr
    assert result.stderr.strip() == ""
