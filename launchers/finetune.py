"""Fine-tune a GPT, an EGPT or a DeepGPT on instructions and their answers.

On one process, on the GPUs of one machine, and on several machines, as launchers/pretrain.py:

    python launchers/finetune.py --config configs/finetune_instructions.yaml
    deepspeed launchers/finetune.py --config configs/finetune_instructions.yaml
    torchrun --nproc_per_node 8 launchers/finetune.py --config configs/finetune_instructions.yaml

It starts from training.initialize_from: a run of this project or its weights, a model in Hugging
Face's form or a GGUF file, or its name (smollm2-135m, gpt2). The weights say what the model is. The
records are tasks of Alpaca's form (instruction, input, output) or Dolly's (instruction, context,
response), or conversations of OpenAI's or ShareGPT's, in JSON or JSON Lines:

    python launchers/finetune.py --config configs/finetune_instructions.yaml \\
        training.initialize_from=runs/gpt 'data.instructions.train=[alpaca.json, dolly.jsonl]'

Checkpoints, --resume, --dry-run, --exit-minutes, signals and exit codes are those of
launchers/pretrain.py.
What it has learned: tools/generate.py --checkpoint ... --instruction "..."
"""

from __future__ import annotations

import time
from pathlib import Path

from megaegpt.config.run import RunConfig
from megaegpt.errors import CheckpointError, exits_cleanly
from megaegpt.training.launching import Preview, Train, launch

_STARTED = time.monotonic()


@exits_cleanly
def main() -> None:
    """Fine-tune as told on the command line."""
    launch(__doc__, _STARTED, _find_train, _preview)


def _find_train() -> Train:
    from megaegpt.training.finetuning import finetune

    return finetune


def _preview(config: RunConfig) -> Preview:
    """What is not on this machine yet is said, and not fetched."""
    from megaegpt.interop.hub import find_model, is_model_name
    from megaegpt.parallel.grid import ProcessGrid
    from megaegpt.training.finetuning import InstructionData, finetuning_config, planned_config

    source = str(config.training.initialize_from)
    if is_model_name(source):
        try:
            find_model(source, only_here=True)
        except CheckpointError:
            config = planned_config(config)
            return _unread(config, f"the weights {source} are not on this machine yet")
    config = finetuning_config(config, ProcessGrid())
    records = (*config.data.instructions.train, *config.data.instructions.validation)
    if missing := [name for name in records if not Path(name).exists()]:
        return _unread(config, f"there are no records yet: {', '.join(missing)}")
    data = InstructionData(config)
    samples = config.batches.samples_before(config.training.steps)
    lines = [f"{'data':<11}{data.describe(samples)}"]
    return Preview(config, lines, data.tokens_per_sample, data.longest_sample)


def _unread(config: RunConfig, reason: str) -> Preview:
    return Preview(
        config,
        [
            f"notice: {reason}. The step and its memory are those of records of "
            f"{config.model.sample_len:,} tokens, the longest that the model takes"
        ],
    )


if __name__ == "__main__":
    main()
