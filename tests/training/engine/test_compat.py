"""What the project needs of DeepSpeed and torch beyond their documentation: an upgrade that lacks
some of it fails here, by name.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megaegpt.errors import ConfigError, LaunchError
from megaegpt.training.engine import compat
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import make_engine, run_config

PACKAGE = Path(__file__).parents[3] / "megaegpt"
KNOW_DEEPSPEED = {
    "training/engine/engine.py",
    "training/engine/compat.py",
    "training/engine/stage_3.py",
    "parallel/partitions.py",
    "training/checkpoint/deepspeed_state.py",
    "training/checkpoint/universal.py",
}
IMPORTED = [
    "deepspeed.runtime.config.DeepSpeedConfig",
    "deepspeed.runtime.config.DeepSpeedConfigError",
    "deepspeed.ops.__compatible_ops__",
    "deepspeed.runtime.compiler",
    "deepspeed.runtime.compiler.compile",
    "deepspeed.checkpoint.ds_to_universal.main",
    "deepspeed.checkpoint.ds_to_universal.DeepSpeedCheckpoint",
    "deepspeed.checkpoint.constants.BASE_OPTIMIZER_STATE",
    "deepspeed.checkpoint.constants.CAT_DIM",
    "deepspeed.checkpoint.constants.DS_VERSION",
    "deepspeed.checkpoint.constants.FP32_FLAT_GROUPS",
    "deepspeed.checkpoint.constants.LOSS_SCALER",
    "deepspeed.checkpoint.constants.PARAM",
    "deepspeed.checkpoint.constants.PARAM_GROUPS",
    "deepspeed.checkpoint.constants.PARAM_SHAPES",
    "deepspeed.checkpoint.constants.PARAM_SLICE_MAPPINGS",
    "deepspeed.checkpoint.constants.OPTIMIZER_STATE_DICT",
    "deepspeed.checkpoint.constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS",
    "deepspeed.checkpoint.constants.TP_REPLICATED_PARAMETER_PATTERNS",
    "deepspeed.checkpoint.constants.UNIVERSAL_CHECKPOINT_INFO",
    "deepspeed.checkpoint.constants.UNIVERSAL_CHECKPOINT_VERSION_KEY",
    "deepspeed.runtime.checkpoint_engine.TorchCheckpointEngine",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.comm.init_distributed",
    "deepspeed.runtime.zero.GatheredParameters",
    "deepspeed.runtime.zero.Init",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus",
    "deepspeed.utils.tensor_fragment.fragment_address",
]
PRIVATE_IN_TORCH = {
    "torch._dynamo.config.recompile_limit",
    "torch._foreach_add_",
    "torch._foreach_mul_",
    "torch._foreach_norm",
    "torch._foreach_zero_",
    "torch.cuda.memory._dump_snapshot",
    "torch.cuda.memory._record_memory_history",
    "torch._C._accelerator_setAllocatorSettings",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.distributed._tools.fake_collectives",
    "torch.ops.aten._scaled_dot_product_cudnn_attention",
    "torch.ops.aten._scaled_dot_product_efficient_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._weight_int8pack_mm",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._get_current_dispatch_mode",
    "torch.utils._python_dispatch._pop_mode_temporarily",
    "torch.utils._pytree.tree_leaves",
}
PRIVATE_OF_SOME_BUILDS = {
    "torch._assert_async",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported",
    "torch.ops.mkldnn._linear_pointwise",
    "torch.ops.mkldnn._reorder_linear_weight",
}
"""Of torch with oneDNN; without it they are done without."""


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _used(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a file imports and of the attributes that it reads or sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.Attribute):
            yield _dotted(node)


def _files() -> Iterator[tuple[str, set[str]]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), set(_used(ast.parse(path.read_text())))


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def test_few_files_know_deepspeed_and_the_table_has_what_they_import() -> None:
    imports = {
        file: {name for name in used if name.startswith("deepspeed.")} for file, used in _files()
    }
    assert {file for file, names in imports.items() if names} == KNOW_DEEPSPEED
    of_modules = {name for names in imports.values() for name in names if name.count(".") > 1}
    assert of_modules - {"deepspeed.checkpoint.ds_to_universal"} <= set(IMPORTED)


@pytest.mark.parametrize("name", [*IMPORTED, *sorted(PRIVATE_IN_TORCH)])
def test_what_is_used_is_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    place = torch.ops.aten if module == "torch.ops.aten" else importlib.import_module(module)
    assert hasattr(place, attribute), f"{name} is gone"


def test_no_other_private_names_of_torch_are_used() -> None:
    known = PRIVATE_IN_TORCH | PRIVATE_OF_SOME_BUILDS
    for file, used in _files():
        private = {n for n in used if n.startswith("torch.") and _is_private(n)}
        # ``torch.ops.aten.x.default`` and ``torch.utils._pytree`` belong to a name of the table.
        unknown = {n for n in private if not any(n.startswith(k) or k.startswith(n) for k in known)}
        assert not unknown, file


def test_private_attributes_of_deepspeed_are_in_the_table() -> None:
    table = {
        part
        for names in (compat.ENGINE, compat.READ_BY_DEEPSPEED, compat.PARTITIONED_PARAMETERS)
        for n in names
        for part in n.split(".")
    }
    for file, used in _files():
        if file in KNOW_DEEPSPEED:
            chains = [n.split(".") for n in used if n.startswith(("engine.", "optimizer."))]
            private = {part for chain in chains for part in chain[1:] if part.startswith("_")}
            assert private <= table, file


def test_deepspeeds_operators_are_probed_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    compat.quieten("cuda")
    assert "__compatible_ops__" not in vars(deepspeed.ops)
    compat.quieten("cpu")
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_deepspeeds_muon_is_imported_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes longer to import than torch."""
    name, compile_ = "deepspeed.runtime.zero.muon.original_muon", deepspeed.runtime.compiler.compile
    compiled = mock.Mock()
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.delitem(sys.modules, name, raising=False)
    compat.import_muon_uncompiled()
    assert name in sys.modules
    assert not compiled.called
    assert deepspeed.runtime.compiler.compile is compile_


def _build(stages: list[tuple[int, str]]) -> None:
    """An engine looks for all of it as it is made."""
    for stage, precision in stages:
        config = run_config(parallel={"zero_stage": stage}, training={"precision": precision})
        make_engine(config, grid_for(1)).close()


def test_an_engine_of_every_stage_and_precision_has_what_is_needed(
    distributed: Distributed,
) -> None:
    distributed(
        1, _build, [(0, "fp32"), *((stage, p) for stage in (1, 2, 3) for p in ("fp32", "bf16"))]
    )
    scaler = DynamicLossScaler(1, 2, 2, 1, 1, False, True)
    assert [name for name in compat.LOSS_SCALER if not hasattr(scaler, name)] == []


def _refusal(raw: dict[str, Any]) -> str:
    config = dataclasses.replace(run_config(parallel={"zero_stage": 2}), deepspeed=raw)
    with pytest.raises(ConfigError) as refused:
        make_engine(config, grid_for(1))
    return str(refused.value)


@pytest.mark.parametrize("key", ["prescale_gradients", "gradient_predivide_factor"])
def test_raw_keys_that_deepspeed_refuses_once_it_has_the_model_are_named(
    distributed: Distributed, key: str
) -> None:
    [told] = distributed(1, _refusal, {key: 2, "zero_optimization": {"reduce_scatter": True}})
    keys = f"{key}, zero_optimization"
    assert told.startswith(f"DeepSpeed refuses the keys under deepspeed ({keys}): ")


def test_a_release_without_something_is_refused_by_name() -> None:
    engine = SimpleNamespace(
        checkpoint_engine=None,
        _config=SimpleNamespace(),
        enable_backward_allreduce=True,
        optimizer=SimpleNamespace(param_groups=[], averaged_gradients={}, clip_grad=1.0),
    )
    with pytest.raises(LaunchError) as caught:
        compat.check_compatible(engine, 2, "fp32")
    said = str(caught.value)
    assert deepspeed.__version__ in said
    for name in (
        "engine._copy_recovery_script",
        "engine._config.load_universal_checkpoint",
        "optimizer.params_in_partition",
    ):
        assert name in said
    assert "clip_grad" not in said
