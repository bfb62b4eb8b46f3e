"""The table of GPUs."""

from __future__ import annotations

import pytest

from megaegpt.errors import ConfigError
from megaegpt.planning.hardware import (
    accelerator_names,
    accelerator_of,
    find_accelerator,
    peak_flops,
)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA GH200 144G HBM3e", 989.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_comes_from_the_device_s_name(name: str, tflops: float) -> None:
    assert peak_flops(name, "bf16") == tflops * 1e12


def test_a_v100_for_pcie_has_a_lower_peak_than_one_on_a_board() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert peak_flops("Tesla V100-PCIE-16GB", "fp16") == 112e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "fp32"),
        ("NVIDIA A100-SXM4-80GB", "fp32"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA X9000 of next year", "bf16"),
    ],
)
def test_an_unknown_peak_is_not_guessed(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A10-24Q",
    ],
)
def test_a_part_or_a_variant_of_a_device_is_another_one(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert accelerator_of(name) is None


def test_every_gpu_of_the_table_has_a_peak_and_others_are_refused() -> None:
    for name in accelerator_names():
        gpu = find_accelerator(name, 1)
        precision = "fp16" if name == "v100" else "bf16"
        assert gpu.memory > 2**30
        assert gpu.node_bandwidth > 0 < gpu.network_bandwidth
        assert (gpu.peak_flops(precision) is None) == (name == "cpu")
    with pytest.raises(ConfigError, match="--gpu h42 is not in the table"):
        find_accelerator("h42", 1)
