"""The device that a process computes on: a GPU, or the CPU where there is none.

A GPU that is there and that torch cannot use is an error: a job that computes on the CPU beside it,
a hundred times slower, would lose its allocation before anybody notices.
"""

from __future__ import annotations

import glob
import os
import platform
import socket
import warnings
from pathlib import Path

import torch

from megaegpt.errors import LaunchError

DRIVER = Path("/proc/driver/nvidia/version")
"""Exists where NVIDIA's driver is loaded, in a container without GPUs too."""

DEVICE_FILES = "/dev/nvidia[0-9]*"
"""Pattern of the files of NVIDIA's GPUs, one for each."""

AMD_DRIVER = Path("/dev/kfd")
"""Exists where AMD's driver for computing is loaded, beside the graphics of an ordinary CPU too."""

PROCESSORS = Path("/proc/cpuinfo")
"""What the kernel says of each processor, blank lines between them."""

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_OLDER_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
_GROWING = "expandable_segments:True"
_CHOICE = "MEGAEGPT_DEVICE"
_ON_PURPOSE = f"or set {_CHOICE}=cpu to compute on the CPU on purpose"
_NO_DEVICES = ("", "NoDevFiles")  # the second is Slurm's
_DETAILS = {
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "implementer",  # this and the others are Arm's
    "CPU part": "part",
    "CPU variant": "variant",
    "CPU revision": "revision",
}
"""Fields of Linux, and their names in :func:`processor_details`."""


def processor_name() -> str:
    """The processor's model, as the kernel names it."""
    return _first_processor().get("model name") or platform.processor() or platform.machine()


def processor_details() -> str:
    """The name with the numbers by which makers tell their processors apart, and which virtual
    machines leave as they are where all models have one name: ``AMD EPYC (family 25, model 1,
    stepping 1, without AVX-512)``.
    """
    facts = _first_processor()
    details = [f"{word} {facts[key]}" for key, word in _DETAILS.items() if key in facts]
    if "flags" in facts:  # as Linux calls them on x86
        has = "avx512f" in facts["flags"].split()
        details.append("with AVX-512" if has else "without AVX-512")
    return f"{processor_name()} ({', '.join(details)})" if details else processor_name()


def _first_processor() -> dict[str, str]:
    """What Linux says of it."""
    try:
        text = PROCESSORS.read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.strip().partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def device_type() -> str:
    """``cuda`` if torch has a GPU (NVIDIA's, or AMD's with a build for ROCm, which goes by the same
    name), else ``cpu``. The environment variable ``MEGAEGPT_DEVICE=cpu`` leaves GPUs alone.

    Raises:
        LaunchError: this machine or job has a GPU that torch cannot use; names the cause.
    """
    choice = os.environ.get(_CHOICE, "")
    if choice not in ("", "cpu"):
        raise LaunchError(
            f"{_CHOICE}={choice} is not known: cpu means the CPU, and unset any GPU that torch has"
        )
    if choice == "cpu":
        return "cpu"
    _let_segments_grow()
    with warnings.catch_warnings():  # torch warns of what the error below says
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return "cuda"
        problem = _why_no_gpu_is_used()
    if problem is not None:
        error = LaunchError(f"{socket.gethostname()}: {problem}, {_ON_PURPOSE}")
        error.on_whole_machine = True
        raise error
    return "cpu"


def _let_segments_grow() -> None:
    """Have torch's allocator enlarge its segments, unless the user has configured it.

    Widths of instructions and of texts differ from batch to batch, and ZeRO takes and frees buffers
    of all gradients in each step. In segments of a fixed size that leaves holes which nothing fits.
    The allocator has read the variable when torch was imported: it is for processes that this one
    starts. ROCm's lacks the option, and warns.
    """
    if torch.version.cuda is None or os.environ.get(_OLDER_ALLOCATOR) or _ALLOCATOR in os.environ:
        return
    os.environ[_ALLOCATOR] = _GROWING
    torch._C._accelerator_setAllocatorSettings(_GROWING)


def local_device() -> torch.device:
    """The GPU of this process's local rank, made the current one; the CPU where there is none.

    Raises:
        LaunchError: as for :func:`device_type`, or there are more processes on this machine than it
            has GPUs.
    """
    if device_type() == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are "
            "visible; start as many processes as GPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _why_no_gpu_is_used() -> str | None:
    """What keeps torch from a GPU that is there, and the remedy; None: there is none."""
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None:
        return (
            f"the GPU here is one for torch's back-end {other.type}, which is not supported: use a "
            "machine with NVIDIA GPUs, or AMD's and a build of torch for ROCm"
        )
    if torch.version.hip is not None and AMD_DRIVER.exists():
        return f"torch {torch.__version__} cannot use AMD's GPU ({AMD_DRIVER}): {_failure()}"
    files = sorted(glob.glob(DEVICE_FILES))
    sign = _sign_of_gpus(files)
    if sign is None:
        return None
    if torch.version.cuda is None:
        return (
            f"{sign}, but torch {torch.__version__} is not built for CUDA: install a build that is "
            "(MEGAEGPT_TORCH=gpu bash launchers/quickstart.sh does)"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (visible in _NO_DEVICES or visible.startswith("-")):
        return f"{sign}, but CUDA_VISIBLE_DEVICES={visible} hides all GPUs: unset the variable"
    if not files:
        return (
            f"{sign}, but there is no /dev/nvidia0: give this container GPUs (docker run --gpus "
            "all, apptainer exec --nv), or this job (srun --gpus-per-node)"
        )
    return f"{sign}, but torch {torch.__version__} cannot use it: {_failure()}"


def _sign_of_gpus(files: list[str]) -> str | None:
    """How it shows that there is an NVIDIA GPU for this process; None: there is no sign of one."""
    if files:
        return f"there is an NVIDIA GPU ({files[0]})"
    if DRIVER.exists():
        return f"NVIDIA's driver is loaded ({DRIVER})"
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if os.environ.get(name):
            return f"Slurm has given the job GPUs ({name}={os.environ[name]})"
    return None


def _failure() -> str:
    """What CUDA or ROCm itself says, in one line, with the remedy where it is the driver's age."""
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, or whatever a driver's library raises
        said = " ".join(str(error).split()).partition(". ")[0]
    else:
        said = "it counts no GPUs"
    if "too old" in said:
        return (
            f"{said}; install a newer driver, or a build of torch for this one "
            "(MEGAEGPT_TORCH=cu126 bash launchers/quickstart.sh)"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return said if visible is None else f"{said} (CUDA_VISIBLE_DEVICES={visible})"
