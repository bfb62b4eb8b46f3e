"""Which device is computed on; a GPU that torch does not use is told of, not passed over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaegpt.errors import LaunchError
from megaegpt.parallel import devices
from megaegpt.parallel.devices import (
    device_type,
    local_device,
    processor_details,
    processor_name,
)

_GPU_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "MEGAEGPT_DEVICE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
_TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/"
)


class Machine:
    """What this process would see of a machine's GPUs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch
        monkeypatch.setattr(devices, "DRIVER", folder / "version")
        monkeypatch.setattr(devices, "DEVICE_FILES", str(folder / "nvidia[0-9]*"))
        monkeypatch.setattr(devices, "AMD_DRIVER", folder / "kfd")
        for name in _GPU_VARIABLES:
            monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
            monkeypatch.delenv(name)
        self.has_torch_for(None, usable=0)

    def has_driver(self) -> None:
        (self._folder / "version").write_text("NVRM version: NVIDIA UNIX 535.54.03")

    def has_gpus(self, count: int) -> None:
        self.has_driver()
        for number in range(count):
            (self._folder / f"nvidia{number}").touch()
        (self._folder / "nvidiactl").touch()

    def has_an_amd_gpu(self) -> None:
        (self._folder / "kfd").touch()

    def has_torch_for_rocm(self) -> None:
        self._patch.setattr(torch.version, "hip", "6.4")

    def has_torch_for(self, cuda: str | None, usable: int) -> None:
        self._patch.setattr(torch.version, "cuda", cuda)
        self._patch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        self._patch.setattr(torch.cuda, "device_count", lambda: usable)
        self._patch.setattr(torch.cuda, "set_device", lambda device: None)

    def fails_with(self, message: str) -> None:
        def init() -> None:
            raise RuntimeError(message)

        self._patch.setattr(torch.cuda, "init", init)

    def sets(self, **variables: str) -> None:
        for name, value in variables.items():
            self._patch.setenv(name, value)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_without_a_gpu_the_cpu_is_used(machine: Machine) -> None:
    assert device_type() == "cpu"
    machine.has_torch_for("13.0", usable=0)
    assert device_type() == "cpu"
    machine.sets(CUDA_VISIBLE_DEVICES="")
    assert local_device() == torch.device("cpu")
    machine.has_an_amd_gpu()  # it may be the graphics of the CPU, which torch for CUDA leaves alone
    assert device_type() == "cpu"


def test_each_local_rank_has_a_gpu_of_its_own(machine: Machine) -> None:
    machine.has_gpus(2)
    machine.has_torch_for("13.0", usable=2)
    assert local_device() == torch.device("cuda", 0)
    machine.sets(LOCAL_RANK="1")
    assert local_device() == torch.device("cuda", 1)
    machine.sets(LOCAL_RANK="2")
    with pytest.raises(LaunchError, match="process 2 of this machine has no GPU: 2 are visible"):
        local_device()


def _cpu_build(machine: Machine) -> None:
    machine.has_gpus(1)


def _old_driver(machine: Machine) -> None:
    machine.has_gpus(1)
    machine.has_torch_for("13.0", usable=0)
    machine.sets(CUDA_VISIBLE_DEVICES="0,1")  # as launchers set it
    machine.fails_with(_TOO_OLD)


def _hidden(machine: Machine) -> None:
    machine.has_gpus(1)
    machine.has_torch_for("13.0", usable=0)
    machine.sets(CUDA_VISIBLE_DEVICES="")


def _hidden_by_a_negative_number(machine: Machine) -> None:
    _hidden(machine)
    machine.sets(CUDA_VISIBLE_DEVICES="-1")


def _wrong_number(machine: Machine) -> None:
    _hidden(machine)
    machine.sets(CUDA_VISIBLE_DEVICES="7")
    machine.fails_with("No CUDA GPUs are available")


def _container(machine: Machine) -> None:
    machine.has_driver()
    machine.has_torch_for("13.0", usable=0)


def _amd(machine: Machine) -> None:
    machine.has_an_amd_gpu()
    machine.has_torch_for_rocm()
    machine.fails_with("No HIP GPUs are available")


def _slurm(machine: Machine) -> None:
    machine.sets(SLURM_JOB_GPUS="0,1")


CAUSES: dict[str, tuple[Callable[[Machine], None], str]] = {
    "torch for the CPU": (_cpu_build, r"nvidia0\), but torch .* is not built for CUDA: install"),
    "an old driver": (_old_driver, r"too old \(found version 12020\); install a newer driver, or"),
    "hidden": (_hidden, "CUDA_VISIBLE_DEVICES= hides all GPUs: unset the variable"),
    "hidden by -1": (_hidden_by_a_negative_number, "CUDA_VISIBLE_DEVICES=-1 hides all GPUs"),
    "another number": (_wrong_number, r"No CUDA GPUs are available \(CUDA_VISIBLE_DEVICES=7\)"),
    "a container": (_container, "there is no /dev/nvidia0: give this container GPUs"),
    "ROCm": (_amd, r"cannot use AMD's GPU \(.*kfd\): No HIP GPUs are available"),
    "a job of Slurm": (_slurm, r"\(SLURM_JOB_GPUS=0,1\), but torch .* is not built for CUDA"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_gpu_that_is_not_used_is_an_error_that_names_the_cause(
    machine: Machine, cause: str
) -> None:
    arrange, told = CAUSES[cause]
    arrange(machine)
    with pytest.raises(LaunchError, match=told) as raised:
        device_type()
    assert str(raised.value).endswith("or set MEGAEGPT_DEVICE=cpu to compute on the CPU on purpose")
    assert "\n" not in str(raised.value)
    machine.sets(MEGAEGPT_DEVICE="cpu")
    assert local_device() == torch.device("cpu")


def test_the_cpu_may_be_meant_where_torch_has_a_gpu(machine: Machine) -> None:
    machine.has_gpus(1)
    machine.has_torch_for("13.0", usable=1)
    machine.sets(MEGAEGPT_DEVICE="cpu")
    assert device_type() == "cpu"
    machine.sets(MEGAEGPT_DEVICE="gpu")
    with pytest.raises(LaunchError, match="MEGAEGPT_DEVICE=gpu is not known"):
        device_type()


@pytest.mark.parametrize("backend", ["mps", "xpu"])
def test_a_gpu_of_another_kind_is_refused_by_the_name_of_its_back_end(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    found = torch.device(backend)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    with pytest.raises(LaunchError, match=f"back-end {backend}, which is not supported"):
        device_type()
    machine.sets(MEGAEGPT_DEVICE="cpu")
    assert device_type() == "cpu"


@pytest.mark.parametrize(
    ("cuda", "given", "allocator"),
    [
        ("13.0", {}, "expandable_segments:True"),
        ("13.0", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("13.0", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        (None, {}, None),
    ],
    ids=["cuda", "configured", "configured as before 2.9", "no cuda"],
)
def test_the_allocator_enlarges_its_segments_unless_it_is_configured(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    given: dict[str, str],
    allocator: str | None,
) -> None:
    machine.has_gpus(1)
    machine.has_torch_for(cuda or "13.0", usable=1)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert local_device().type == "cuda"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == allocator  # for processes to come
    assert told == ([allocator] if cuda and not given else [])  # this one has read it at its import


_EPYC = """processor\t: 0
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx2{more}
"""


@pytest.mark.parametrize(
    ("text", "details"),
    [
        (
            _EPYC.format(model=1, more="") + "\n" + _EPYC.format(model=17, more=" avx512f"),
            "AMD EPYC (family 25, model 1, stepping 1, without AVX-512)",
        ),
        (
            _EPYC.format(model=17, more=" avx512f"),
            "AMD EPYC (family 25, model 17, stepping 1, with AVX-512)",
        ),
        (
            "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
            "aarch64 (implementer 0x41, part 0xd40)",
        ),
        (None, "aarch64"),
    ],
    ids=["first of two", "avx512", "arm", "no such file"],
)
def test_processors_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, details: str
) -> None:
    monkeypatch.setattr(devices, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices.platform, "processor", lambda: "aarch64")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert processor_details() == details
    assert processor_name() == details.partition(" (")[0]
