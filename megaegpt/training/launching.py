"""The options of the programs in ``launchers/`` that train, and how they start.

Imports torch only where a run starts: a wrong command line is reported at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megaegpt.arguments import number
from megaegpt.collector import paused_collector
from megaegpt.config.loading import config_to_yaml
from megaegpt.config.run import RunConfig
from megaegpt.environment import CLOSED_PIPE_CODE
from megaegpt.parallel.launcher_variables import is_launched, is_main_process, started_processes
from megaegpt.training.command_line import RunParser

if TYPE_CHECKING:
    from megaegpt.parallel.grid import ProcessGrid
    from megaegpt.training.pretraining import SampleText
    from megaegpt.training.stopping import StopRequests


class Train(Protocol):
    """:func:`~megaegpt.training.pretraining.pretrain`, or another of its form."""

    def __call__(
        self,
        config: RunConfig,
        grid: ProcessGrid,
        *,
        resume: bool,
        stops: StopRequests,
        sample_text: SampleText,
    ) -> bool: ...


@dataclass(frozen=True)
class Preview:
    """What ``--dry-run`` finds out about a run without starting it."""

    config: RunConfig
    """That it would train with."""
    lines: Sequence[str] = ()
    """About its data."""
    tokens_per_sample: float | None = None
    """On average, where samples are shorter than the model takes."""
    longest_sample: int | None = None
    """Most columns of a micro-batch, where that is known."""


def launch(
    description: str | None,
    started: float,
    find_train: Callable[[], Train],
    preview: Callable[[RunConfig], Preview] = Preview,
) -> None:
    """Read the command line and the configuration, then train or say what would be trained.

    Args:
        description: of the program, for ``--help``.
        started: ``time.monotonic()`` at its start, from which ``--exit-minutes`` counts.
        find_train: imports what trains.
        preview: for ``--dry-run``.
    """
    parser = RunParser(description)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the latest checkpoint in checkpoint.directory; without one, start anew",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the resolved configuration, parameters, tokens and operations per step and an "
        "estimate of memory, for WORLD_SIZE processes (environment; default: as few as possible)",
    )
    parser.add_argument(
        "--exit-minutes",
        type=number(least=0),
        metavar="M",
        help="save and stop M minutes after the start, before a job's time limit does",
    )
    arguments, config = parser.parse_run()
    if not arguments.dry_run:
        with paused_collector():
            train = find_train()
        start_run(config, train, arguments.resume, arguments.exit_minutes, started)
    elif is_main_process():
        with paused_collector():
            _dry_run(config, started_processes() or config.parallel.ranks_of_a_sample, preview)


def start_run(
    config: RunConfig,
    train: Train,
    resume: bool,
    exit_minutes: float | None = None,
    started: float | None = None,
) -> bool:
    """Train among the processes that a launcher started, in folders that no other run is using.

    Args:
        config: of the run.
        train: the kind of training.
        resume: go on from the latest checkpoint, if there is one.
        exit_minutes: save and stop so long after ``started``; None: never.
        started: ``time.monotonic()`` at the program's start; None: now.

    Returns:
        True if the run is complete, False if it was stopped, and saved, before its last step.

    Raises:
        KeyboardInterrupt: so it was, by Ctrl-C, on a single process.
        SystemExit: so it was, for whoever read the output has left, on a single process.
    """
    from megaegpt.generation.generator import sample_text
    from megaegpt.parallel.launch import joined_processes
    from megaegpt.training.run_lock import locked_folders
    from megaegpt.training.stopping import StopRequests

    stops = StopRequests(exit_minutes, started)
    folders = (config.logging.directory, config.checkpoint.directory)
    with (
        joined_processes(
            config.parallel.tensor_parallel_size, config.parallel.context_parallel_size
        ) as grid,
        locked_folders(folders, grid),
    ):
        complete = train(config, grid, resume=resume, stops=stops, sample_text=sample_text)
    if stops.interrupted and not is_launched():
        raise KeyboardInterrupt  # a script would go on behind an exit code of 0
    if stops.unread and not is_launched():
        sys.exit(CLOSED_PIPE_CODE)
    return complete


def _dry_run(config: RunConfig, world_size: int, find: Callable[[RunConfig], Preview]) -> None:
    import torch

    from megaegpt.config.validation import validate
    from megaegpt.errors import CheckpointError
    from megaegpt.parallel.devices import device_type
    from megaegpt.planning.memory import estimate_memory
    from megaegpt.planning.summary import describe_run, measure_model
    from megaegpt.precision import resolve_precision
    from megaegpt.training.logging.metrics import device_name

    preview = find(config)
    config = preview.config
    validate(config, world_size)  # with the model of weights, where they are what a run starts from
    device = torch.device(device_type())
    precision = resolve_precision(config.training.precision, device)
    print(config_to_yaml(config))
    encoder = None
    if config.model.needs_encoder:
        from megaegpt.training.feature_stores import find_encoder  # and all forms of weights

        try:
            encoder = find_encoder(config)
        except CheckpointError as error:
            print(f"notice: the encoder is left out of the numbers below: {error}")
    dp_size = world_size // config.parallel.ranks_of_a_sample
    lines = list(preview.lines)
    if config.training.micro_batch_size == "auto":
        from megaegpt.planning.micro_batch import largest_that_fits, with_micro_batch
        from megaegpt.training.automatic_batch import memory_limit

        limit, longest = memory_limit(device, world_size), preview.longest_sample
        choice = largest_that_fits(config, dp_size, precision, limit, encoder, device.type, longest)
        config = with_micro_batch(config, choice.size)
        lines.append(f"{'batch':<11}{choice}")
    size = measure_model(config, encoder, preview.tokens_per_sample)
    memory = estimate_memory(
        config, dp_size, precision, encoder, device.type, preview.longest_sample
    )
    name, tokens = device_name(device), preview.tokens_per_sample
    described = describe_run(config, size, dp_size, precision, name, memory, tokens)
    for line in [*described, *lines]:
        print(line)
