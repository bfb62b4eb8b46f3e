"""Loss of a trained GPT, EGPT or DeepGPT on token shards, every token once.

    python tools/evaluate.py --checkpoint runs/egpt --data data/wap/validation
    torchrun --nproc_per_node 8 tools/evaluate.py --checkpoint runs/egpt --data data/wap/validation

--checkpoint is a run's folder or its checkpoints (the latest is taken), one checkpoint, or a
weights folder. The text is cut into windows of the length the model was trained with. Processes
share the windows; the result does not depend on their number. Losses compare between models on the
same text; nats per byte compare between tokenizers too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist

from megaegpt.data.evaluation import EvaluationWindows
from megaegpt.data.files import write_whole
from megaegpt.data.stream import TokenStream
from megaegpt.errors import exits_cleanly
from megaegpt.generation.loading import LoadedModel, inference_grid, load_for_inference
from megaegpt.parallel.agreement import raising_together
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.evaluation import Evaluation, Evaluator
from megaegpt.training.inputs import ChunkInputs, ModelInputs, SequenceInputs

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@exits_cleanly
def main() -> None:
    """Evaluate as told on the command line."""
    arguments = _parse_arguments()
    device = inference_grid().device  # joins the processes that a launcher started
    grid = ProcessGrid.create(arguments.tensor_parallel_size, device)
    name = arguments.dtype or ("bf16" if grid.device.type == "cuda" else "fp32")
    loaded = load_for_inference(
        arguments.checkpoint, grid, _DTYPES[name], encoder_source=arguments.encoder
    )
    with raising_together(grid):
        stream = TokenStream(arguments.data)
    result = _evaluate(loaded, stream, grid, _DTYPES[name], arguments.batch_size)
    with raising_together(grid):
        if grid.is_main:
            _show(result)
            if arguments.json is not None:
                _write(result, arguments.json)
    if dist.is_initialized():
        dist.destroy_process_group()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="what to evaluate")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="PREFIX", help="shards, without .bin and .idx"
    )
    parser.add_argument("--encoder", metavar="DIR", help="of an EGPT or DeepGPT, if it was moved")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once (default: 4)")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="processes a model is cut over"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    return parser.parse_args()


def _evaluate(
    loaded: LoadedModel,
    stream: TokenStream,
    grid: ProcessGrid,
    dtype: torch.dtype,
    batch_size: int,
) -> Evaluation:
    config = loaded.model.config
    inputs: ModelInputs = SequenceInputs()
    if loaded.encoder is not None:
        inputs = ChunkInputs(config, loaded.encoder, dtype)
    num_chunks = 1 if config.kind == "gpt" else config.egpt.num_chunks
    evaluator = Evaluator(
        EvaluationWindows(stream, config.sample_len, num_chunks),
        num_chunks=num_chunks,
        inputs=inputs,
        grid=grid,
        batch_size=batch_size,
        token_byte_lengths=loaded.tokenizer.token_byte_lengths,
    )
    return evaluator.evaluate(loaded.model)


def _show(result: Evaluation) -> None:
    print(result)
    for chunk, loss in enumerate(result.loss_by_chunk):
        if math.isfinite(loss):
            print(f"  after {chunk:2d} earlier chunks: {loss:.4f} nats/token")


def _write(result: Evaluation, path: Path) -> None:
    values = dataclasses.asdict(result)
    values["loss_by_chunk"] = [x if math.isfinite(x) else None for x in result.loss_by_chunk]
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
