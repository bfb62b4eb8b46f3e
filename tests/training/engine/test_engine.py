"""Device, precision and optimizer choices that need no processes."""

from __future__ import annotations

import os
import subprocess
import sys

from torch import nn

from megaegpt.config import OptimizerConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.launcher_variables import without_launcher
from megaegpt.training.engine.optimizer import build_optimizer, parameter_groups


def test_weight_decay_acts_on_matrices_and_embeddings_only() -> None:
    model = nn.ModuleList([nn.Embedding(4, 2), nn.Linear(2, 3), nn.LayerNorm(3)])
    model[1].weight.requires_grad = False
    decayed, free = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 2)]
    assert decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in free["params"]] == [(3,), (3,), (3,)]
    assert free["weight_decay"] == 0.0


def test_every_adamw_updates_all_parameters_in_one_operator() -> None:
    model, config = nn.Linear(2, 3), OptimizerConfig()
    for clipping in (None, 1.0):
        optimizer = build_optimizer(model, config, ProcessGrid(), clipping)
        assert all(group["fused"] for group in optimizer.param_groups)


def test_a_plain_python_process_is_a_world_of_its_own() -> None:
    code = (
        "from megaegpt.parallel.launch import init_distributed\n"
        "import torch.distributed as dist\n"
        "print(init_distributed().type, dist.get_world_size())\n"
        "dist.destroy_process_group()"
    )
    environment = without_launcher(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.stdout.split() == ["cpu", "1"], result.stderr
    assert result.stderr.strip() == ""
