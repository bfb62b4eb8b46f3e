"""The command ``megaegpt``: every program of ``tools/`` and ``launchers/`` under one name.

``megaegpt generate ...`` is ``python tools/generate.py ...``, and
``torchrun --nproc_per_node 2 -m megaegpt pretrain ...`` is that launcher with
``launchers/pretrain.py``. Nothing but the program that is asked for is imported.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megaegpt import __version__
from megaegpt.errors import exits_cleanly
from megaegpt.shipped import SHIPPED

SUBCOMMANDS = {
    "prepare": "tools/prepare_data.py",
    "train-tokenizer": "tools/train_tokenizer.py",
    "preprocess": "tools/preprocess.py",
    "inspect": "tools/inspect_shards.py",
    "precompute": "tools/precompute_features.py",
    "plan": "tools/plan.py",
    "pretrain": "launchers/pretrain.py",
    "finetune": "launchers/finetune.py",
    "experiment": "launchers/experiment.py",
    "generate": "tools/generate.py",
    "chat": "tools/chat.py",
    "serve": "tools/serve.py",
    "evaluate": "tools/evaluate.py",
    "convert": "tools/convert.py",
    "compare": "tools/compare_runs.py",
    "report": "tools/report.py",
    "benchmark": "tools/benchmark.py",
}
"""Names and programs, in the order in which a project meets them."""

_USAGE = "usage: megaegpt COMMAND ...     (megaegpt COMMAND --help: its options)"


def main(words: Sequence[str] | None = None) -> None:
    """Run the program that the command line names.

    Args:
        words: the command line without the name of the command; None: this process's.

    Raises:
        SystemExit: with code 2 for a name that is no program's, 0 after ``--help``.
    """
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        _say(_help())
        sys.exit(0)
    if words[0] in ("-V", "--version"):
        _say(f"megaegpt {__version__}")
        sys.exit(0)
    name, *arguments = words
    if name.startswith("--local_rank=") and arguments:  # the deepspeed launcher's, before all else
        name, arguments[0] = arguments[0], name
    if name not in SUBCOMMANDS:
        close = difflib.get_close_matches(name, SUBCOMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else "megaegpt --help lists them"
        print(f"error: {name!r} is not a command of megaegpt: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"megaegpt {name}", *arguments]
    _run(SHIPPED / SUBCOMMANDS[name])


def _say(text: str) -> None:
    """To a reader that may have left, or a disk that may be full."""
    exits_cleanly(lambda: print(text))()


def _run(program: Path) -> None:
    """As ``python program`` does; processes that it starts find its functions by the file."""
    module = ModuleType("__main__")
    module.__file__ = str(program)
    sys.modules["__main__"] = module
    exec(compile(program.read_bytes(), str(program), "exec"), module.__dict__)


def _help() -> str:
    width = max(map(len, SUBCOMMANDS)) + 2
    lines = [f"  {name:<{width}}{_summary(SHIPPED / file)}" for name, file in SUBCOMMANDS.items()]
    return "\n".join([_USAGE, "", *lines])


def _summary(program: Path) -> str:
    """The first line of a program's docstring."""
    with program.open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')
