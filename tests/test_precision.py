"""The precisions that models are trained and run in."""

from __future__ import annotations

import pytest
import torch

from megaegpt import precision
from megaegpt.errors import ConfigError
from megaegpt.planning.hardware import find_accelerator
from megaegpt.precision import inference_dtype, resolve_precision, slow_precision_notice

_CPU, _GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_precision_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert resolve_precision("auto", _CPU) == "fp32"
    assert resolve_precision("auto", _GPU) == "bf16"
    assert resolve_precision("bf16", _CPU) == "bf16"


def test_a_gpu_without_bf16_computes_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts bf16 that is emulated, at a fraction of fp32's speed, as support."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert resolve_precision("auto", _GPU) == "fp16"
    assert inference_dtype(None, _GPU) == torch.float16
    with pytest.raises(ConfigError, match=r"training\.precision=bf16 is not supported on this GPU"):
        resolve_precision("bf16", _GPU)
    assert find_accelerator("v100", 8).precision("auto") == "fp16"
    assert find_accelerator("h100", 8).precision("auto") == "bf16"


def test_weights_in_int8_are_for_a_cpu() -> None:
    assert inference_dtype("int8", _CPU) == torch.float32
    with pytest.raises(ConfigError, match="--dtype int8 is for a CPU: on a GPU take bf16"):
        inference_dtype("int8", _GPU)


def test_fp16_is_refused_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_supports_fp16", lambda: False)
    with pytest.raises(ConfigError, match=r"training\.precision=fp16"):
        resolve_precision("fp16", _CPU)


def test_slow_bf16_is_noticed_on_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        notice = slow_precision_notice("bf16", _CPU)
        assert (notice is None) is fast
        assert slow_precision_notice("fp32", _CPU) is None
