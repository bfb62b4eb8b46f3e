"""The common parts of the benchmarks: options, tables, and the description of the machine."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megaegpt.arguments import integer
from megaegpt.errors import ConfigError
from megaegpt.files import is_special
from megaegpt.parallel.devices import local_device, processor_details
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.text_tables import format_table
from tools.benchmarks.processes import Result


def parse_peers(values: Sequence[str], known: Sequence[str]) -> dict[str, Path | None]:
    """``name`` or ``name=path`` -> {name: path}.

    Raises:
        ConfigError: a name that is not known, or a path that does not exist.
    """
    peers: dict[str, Path | None] = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in known:
            raise ConfigError(f"--peer {name}: not one of {', '.join(known)}")
        if path and not Path(path).is_dir():
            raise ConfigError(f"--peer {value}: there is no folder {path}")
        peers[name] = Path(path).resolve() if path else None
    return peers


def add_repetitions(parser: argparse.ArgumentParser, default: int = 5) -> None:
    """How often."""
    parser.add_argument(
        "--repetitions",
        type=integer(1),
        default=default,
        metavar="N",
        help="counted rounds (%(default)s)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """With how many threads, where it is not the benchmark that decides."""
    parser.add_argument(
        "--threads",
        type=integer(1),
        metavar="N",
        help="threads of a single process (as a run would have)",
    )


def add_profile(parser: argparse.ArgumentParser) -> None:
    """For what torch computes."""
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="trace one repetition of ours; print the top 10"
    )


def add_sizes(parser: argparse.ArgumentParser, sizes: dict[str, tuple[int, str]]) -> None:
    """Whole numbers by name: ``{"chunk-size": (1024, "tokens in a chunk")}``."""
    for name, (default, meaning) in sizes.items():
        parser.add_argument(
            f"--{name}",
            type=integer(1),
            default=default,
            metavar="N",
            help=f"{meaning} (%(default)s)",
        )


def figure_class() -> Any:
    """matplotlib's, for ``--plot``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    return Figure


def check_plot(path: Path) -> None:
    """Refuse ``--plot`` before anything is measured.

    Raises:
        ConfigError: matplotlib is not installed or does not know the kind of picture, or no file
            can be written there.
    """
    kinds = figure_class()().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(f"--plot {path}: pictures end in .{', .'.join(sorted(kinds))}")
    check_place("--plot", path)


def check_place(option: str, path: Path) -> None:
    """Refuse a file that could not be written once all is measured.

    Raises:
        ConfigError: says why.
    """
    if is_special(path):
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option} {path}: nothing can be written into {path.parent}")


def single_grid() -> ProcessGrid:
    """One process, on the GPU if there is one."""
    return ProcessGrid(device=local_device())


def print_results(title: str, unit: str, results: Sequence[Result]) -> None:
    """A table: rate at the median, least and most, ratio to the first, peak memory."""
    print(f"\n{title}")
    rows = [("", f"{unit}/s", "min", "max", "ratio", "peak memory")]
    first = results[0].rate
    for result in results:
        slowest, fastest = result.units / max(result.seconds), result.units / min(result.seconds)
        rows.append(
            (
                result.name,
                f"{result.rate:,.1f}",
                f"{slowest:,.1f}",
                f"{fastest:,.1f}",
                f"{result.rate / first:.2f}",
                f"{result.peak_bytes / 2**30:.2f} GiB",
            )
        )
    print(format_table(rows))


def print_mfu(results: Sequence[Result]) -> None:
    """Note and print the share of the device's peak, where the peak is known."""
    for result in results:
        if result.info.get("mfu_peak"):
            mfu = result.rate * result.info["flops_per_token"] / result.info["mfu_peak"]
            result.info["mfu"] = mfu
            print(f"{result.name}: MFU {mfu:.1%}")


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that the figures depend on."""
    versions = {}
    for package in ("torch", "deepspeed", "transformers", "tiktoken"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "cpu": processor_details(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions,
    }
