"""The machine, and how fast each library's matrix product reads a weight on it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from megaegpt.parallel.affinity import limit_threads
from megaegpt.parallel.kernels import CHOICE, KernelTable, choose_kernels
from megaegpt.text_tables import format_table
from tools.benchmarks.common import add_threads, machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py machine``."""
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the table that decoding uses, measured now if it was not before; return the record."""
    limit_threads()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    for name, value in machine().items():
        print(f"{name:<13}{value}")
    table = choose_kernels()
    _print_products(table)
    return {"kernels": asdict(table)}


def _print_products(table: KernelTable) -> None:
    threads = torch.get_num_threads()
    if not table.products:
        print(
            f"\nnothing is measured: oneDNN's products are taken ({CHOICE}, or a torch without it)"
        )
        return
    rows = [["numbers", "weight of a", "rows, at most", "oneDNN", "torch's own", "taken"]]
    for product in table.products:
        taken = "torch's own" if table.takes_blas(product) else "oneDNN"
        speeds = [f"{product.onednn:.1f}", f"{product.blas:.1f}"]
        rows.append([product.dtype, product.size, str(product.rows), *speeds, taken])
    print(f"\nGB/s of weights read by a product, {threads} threads")
    print(format_table(rows))
