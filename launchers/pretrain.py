"""Train a GPT, an EGPT or a DeepGPT from a YAML configuration.

On one process, on the GPUs of one machine, and on several machines:

    python launchers/pretrain.py --config configs/gpt2_124m.yaml
    deepspeed launchers/pretrain.py --config configs/gpt2_124m.yaml
    deepspeed --hostfile hosts launchers/pretrain.py --config configs/gpt2_124m.yaml
    torchrun --nproc_per_node 8 launchers/pretrain.py --config configs/gpt2_124m.yaml

On a CPU, `deepspeed --num_accelerators 2` or `torchrun --nproc_per_node 2` starts two processes.

Any value of the configuration can be changed behind it, as section.key=value:

    python launchers/pretrain.py --config X.yaml training.steps=100 optimizer.lr=1e-3

SIGTERM or SIGUSR1 to the processes saves a checkpoint and ends the run; --resume goes on with it,
exactly. Exit codes: 0 complete, or saved and stopped on request; 2 an error that the message says
how to fix; 1 a bug.
"""

from __future__ import annotations

import time

from megaegpt.config.loading import config_to_yaml
from megaegpt.config.run import RunConfig
from megaegpt.errors import exits_cleanly
from megaegpt.training.command_line import RunParser, is_main_process, started_processes

_STARTED = time.monotonic()


@exits_cleanly
def main() -> None:
    """Read the command line and the configuration, then train or say what would be trained."""
    parser = RunParser(__doc__)
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
        type=float,
        metavar="M",
        help="save and stop M minutes after the start, before a job's time limit does",
    )
    arguments, config = parser.parse_run()
    if not arguments.dry_run:
        _train(config, arguments.resume, arguments.exit_minutes)
    elif is_main_process():
        _dry_run(config, started_processes() or config.parallel.tensor_parallel_size)


def _train(config: RunConfig, resume: bool, exit_minutes: float | None) -> None:
    from megaegpt.generation.generator import sample_text
    from megaegpt.training.pretraining import pretrain
    from megaegpt.training.processes import joined_processes
    from megaegpt.training.stopping import StopRequests

    stops = StopRequests(exit_minutes, _STARTED)
    with joined_processes(config.parallel.tensor_parallel_size) as grid:
        pretrain(config, grid, resume=resume, stops=stops, sample_text=sample_text)


def _dry_run(config: RunConfig, world_size: int) -> None:
    import torch

    from megaegpt.errors import CheckpointError
    from megaegpt.training.engine import resolve_precision
    from megaegpt.training.memory import estimate_memory
    from megaegpt.training.metrics import device_name
    from megaegpt.training.stores import find_encoder
    from megaegpt.training.summary import describe_run, measure_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.training.precision, device)
    print(config_to_yaml(config))
    encoder = None
    try:
        encoder = find_encoder(config)
    except CheckpointError as error:
        print(f"notice: the encoder is left out of the numbers below: {error}")
    dp_size = world_size // config.parallel.tensor_parallel_size
    size = measure_model(config, encoder)
    memory = estimate_memory(config, dp_size, precision, encoder, device.type)
    for line in describe_run(config, size, dp_size, precision, device_name(device), memory):
        print(line)


if __name__ == "__main__":
    main()
