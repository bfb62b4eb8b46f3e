"""Train a GPT, an EGPT or a DeepGPT from a YAML configuration.

On one process, on the GPUs of one machine, and on several machines:

    python launchers/pretrain.py --config configs/gpt2_124m.yaml
    deepspeed launchers/pretrain.py --config configs/gpt2_124m.yaml
    deepspeed --hostfile hosts launchers/pretrain.py --config configs/gpt2_124m.yaml
    torchrun --nproc_per_node 8 launchers/pretrain.py --config configs/gpt2_124m.yaml

On a CPU, `deepspeed --num_accelerators 2` or `torchrun --nproc_per_node 2` starts two processes.

Any value of the configuration can be changed behind it, as section.key=value:

    python launchers/pretrain.py --config X.yaml training.steps=100 optimizer.lr=1e-3

Ctrl-C, SIGTERM or SIGUSR1 to the processes saves a checkpoint and ends the run, and so does the end
of whoever reads the output; --resume goes on with it, exactly. Exit codes: 0 complete, or saved and
stopped on request (on one process 130 by Ctrl-C, 141 for want of a reader); 2 an error that the
message says how to fix; 1 a bug.
"""

from __future__ import annotations

import time

from megaegpt.errors import exits_cleanly
from megaegpt.training.launching import Train, launch

_STARTED = time.monotonic()


@exits_cleanly
def main() -> None:
    """Train as told on the command line."""
    launch(__doc__, _STARTED, _find_train)


def _find_train() -> Train:
    from megaegpt.training.pretraining import pretrain

    return pretrain


if __name__ == "__main__":
    main()
