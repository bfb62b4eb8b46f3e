"""Measure MegaEGPT against other programs' models, in one run on one machine.

    python tools/benchmark.py overview --peer nanogpt=../nanoGPT --peer hf
    python tools/benchmark.py train --peer nanogpt=../nanoGPT --peer hf
    python tools/benchmark.py egpt --peer egpt=../egpt
    python tools/benchmark.py generate --peer hf

Every candidate lives in a process of its own; repetitions are interleaved, so a machine that gets
slower gets slower for all. Medians are printed with minimum and maximum, and ratios against the
first candidate: compare within one table only. --json FILE keeps the record.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.benchmarks

from megaegpt.arguments import ArgumentParser, path
from megaegpt.environment import is_other_rank
from megaegpt.errors import MegaEGPTError, exits_cleanly
from megaegpt.files import write_whole

SUBCOMMANDS = {
    "overview": "decoding, training and EGPT beside other programs, in one table",
    "train": "a training step of a GPT through the engine",
    "egpt": "a training window of EGPT: online and stored features, and the original",
    "generate": "decoding with a cache, GPT and EGPT",
    "serve": "the HTTP server under load: latencies, tokens a second, memory",
    "attention": "every kind of attention: parameters, cache, speed, memory",
    "data": "tokenizing to shards, and drawing batches",
    "features": "computing and reading chunk features",
    "checkpoint": "saving and loading a run",
    "growth": "time, memory and start-up against model, context, corpus, ranks and history",
    "machine": "this machine, and which library's products are the fastest on it",
    "gpu": "one GPU: its tests, and the speed of training, EGPT and decoding; or several nodes",
}


def new_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Each subcommand is a module of its name: ``add_arguments(parser)``, ``run(arguments)``.

    Args:
        words: the command line; what it does not name is not imported.
    """
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="WHAT")
    for name, summary in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name not in words:
            continue
        module = importlib.import_module(f"tools.benchmarks.{name}")
        module.add_arguments(subparser)
        subparser.add_argument("--json", type=path, metavar="FILE", help="write the record here")
        subparser.set_defaults(run=module.run)
    return parser


@exits_cleanly
def main() -> None:
    """Dispatch to ``tools/benchmarks/<subcommand>.py``."""
    arguments = new_parser(sys.argv[1:]).parse_args()
    from tools.benchmarks.common import check_place, machine  # import torch; --help need not

    if arguments.json is not None and not is_other_rank():  # which writes nothing
        check_place("--json", arguments.json)
    record = {"machine": machine(), **arguments.run(arguments)}
    if arguments.json is not None:
        write_whole(arguments.json, (json.dumps(record, indent=2) + "\n").encode())
        print(f"wrote {arguments.json}")
    if record.get("problems"):
        raise MegaEGPTError("; ".join(record["problems"]))


if __name__ == "__main__":
    main()
