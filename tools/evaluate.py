"""Measure a trained GPT, EGPT or DeepGPT: on text, on tasks, and on what its history is worth.

    python tools/evaluate.py --checkpoint runs/egpt --data data/war_and_peace/validation
    python tools/evaluate.py --checkpoint gpt2 --text book.txt --stride 512
    python tools/evaluate.py --checkpoint runs/egpt --data data/war_and_peace/validation --histories
    python tools/evaluate.py --checkpoint runs/gpt --lambada lambada_test.jsonl
    python tools/evaluate.py --checkpoint runs/gpt --hellaswag hellaswag_val.jsonl
    python tools/evaluate.py --checkpoint runs/gpt --harness arc_easy,piqa
    torchrun --nproc_per_node 8 tools/evaluate.py --checkpoint runs/egpt --text book.txt

--checkpoint is what tools/generate.py takes: a run's folder or its checkpoints (the latest is
taken), one checkpoint, a weights folder, one in Hugging Face's form, or a GGUF file.

Text is cut into windows of the length the model was trained with; with --stride they overlap, and
every token has at least the rest of a window before it. A file of --text begins behind an
end-of-text token, so every byte of it counts. Losses compare between models on the same text; bits
per byte compare between tokenizers too.

--histories shows an EGPT's loss by chunk of the window with what is kept of the chunks before it,
with what is kept of another window half the text away, and with nothing.

--memory-tokens lets the token memory of an EGPT go on over the whole text: each chunk sees the last
N tokens before it, in whole chunks, and the oldest leave. It says how much that is.

Processes share the work; the result does not depend on their number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaegpt.arguments import ArgumentParser, input_name, integer, path
from megaegpt.errors import ConfigError, exits_cleanly
from megaegpt.files import is_same_file, write_whole
from megaegpt.generation.model_options import add_model_options, load_model

if TYPE_CHECKING:  # torch is imported once the command line is right
    import torch

    from megaegpt.data.tokens.windows import TokenSource
    from megaegpt.evaluation.scorer import Scorer
    from megaegpt.evaluation.text_loss import Evaluation
    from megaegpt.generation.trained import LoadedModel
    from megaegpt.parallel.grid import ProcessGrid

Result = tuple[str, dict[str, Any]]
"""Lines for people, and the numbers for ``--json``."""


@exits_cleanly
def main() -> None:
    """Evaluate as told on the command line."""
    arguments = _parse_arguments()
    from megaegpt.parallel.launch import joined_processes
    from megaegpt.parallel.together import raising_together
    from megaegpt.precision import inference_dtype

    with joined_processes(arguments.tensor_parallel_size) as grid:
        loaded = load_model(arguments, grid)
        dtype = inference_dtype(arguments.dtype, grid.device)
        shown, numbers = _measure(arguments, loaded, grid, dtype)
        with raising_together(grid):
            if grid.is_main:
                print(shown)
                if arguments.json is not None:
                    write_whole(arguments.json, (json.dumps(numbers, indent=1) + "\n").encode())


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    _add_tasks(parser)
    parser.add_argument(
        "--batch-size", type=integer(1), default=4, help="rows at once (default: 4)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=integer(1), default=1, help="processes a model is cut over"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    arguments = parser.parse_args()
    if arguments.histories and arguments.stride is not None:
        parser.error("--histories compares windows that do not overlap: leave --stride out")
    if arguments.memory_dtype is not None and arguments.memory_tokens is None:
        parser.error("--memory-dtype belongs to --memory-tokens")
    if arguments.memory_tokens and (arguments.histories or arguments.stride):
        parser.error("--memory-tokens goes on over windows that do not overlap: leave the rest out")
    if arguments.harness is None and (
        arguments.tasks_folder is not None
        or arguments.num_fewshot is not None
        or arguments.limit is not None
    ):
        parser.error("--tasks-folder, --num-fewshot and --limit belong to --harness")
    if not (arguments.data or arguments.text) and (
        arguments.histories or arguments.stride or arguments.memory_tokens
    ):
        parser.error("--stride, --histories and --memory-tokens belong to --data or --text")
    read = [*(arguments.text or ()), arguments.lambada, arguments.hellaswag]
    if arguments.json is not None and any(is_same_file(arguments.json, file) for file in read):
        parser.error(f"--json {arguments.json} would replace what is evaluated: name another file")
    return arguments


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the evaluations, of which one is chosen, and the options of each."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="PREFIX", help="shards, without .bin and .idx")
    what.add_argument(
        "--text",
        nargs="+",
        type=input_name,
        metavar="FILE",
        help="texts, JSON Lines, or folders",
    )
    what.add_argument(
        "--lambada", type=path, metavar="FILE", help='last words: {"text": ...} a line'
    )
    what.add_argument(
        "--hellaswag",
        type=path,
        metavar="FILE",
        help="endings: activity_label, ctx_a, ctx_b, endings and label a line",
    )
    what.add_argument(
        "--harness",
        metavar="TASKS",
        help="tasks of lm-evaluation-harness, separated by commas (pip install lm_eval)",
    )
    text = parser.add_argument_group("for --data and --text")
    text.add_argument(
        "--stride",
        type=integer(1),
        metavar="N",
        help="tokens from window to window (default: a window)",
    )
    text.add_argument(
        "--histories", action="store_true", help="of an EGPT: true, shuffled and zero features"
    )
    text.add_argument(
        "--memory-tokens",
        type=integer(1),
        metavar="N",
        help="of an EGPT with token_memory: tokens held before a chunk, in whole chunks, also of "
        "earlier windows",
    )
    text.add_argument(
        "--memory-dtype",
        choices=("fp32", "fp16", "int8"),
        help="of its keys",
    )
    harness = parser.add_argument_group("for --harness")
    harness.add_argument("--tasks-folder", type=path, metavar="DIR", help="of further tasks' YAML")
    harness.add_argument(
        "--num-fewshot", type=integer(0), metavar="N", help="examples before a question"
    )
    harness.add_argument(
        "--limit", type=integer(1), metavar="N", help="first questions of a task only"
    )


def _measure(
    arguments: argparse.Namespace, loaded: LoadedModel, grid: ProcessGrid, dtype: torch.dtype
) -> Result:
    if arguments.data or arguments.text:
        return _measure_text(arguments, loaded, grid, dtype)
    if arguments.harness is not None:
        return _measure_harness(arguments, loaded, grid, dtype)
    from megaegpt.evaluation.scorer import Scorer
    from megaegpt.evaluation.tasks import (
        read_hellaswag,
        read_lambada,
        score_hellaswag,
        score_lambada,
    )

    scorer = Scorer(loaded, grid, arguments.batch_size, dtype)
    if arguments.lambada is not None:
        return _measure_task(read_lambada, score_lambada, arguments.lambada, scorer, grid)
    return _measure_task(read_hellaswag, score_hellaswag, arguments.hellaswag, scorer, grid)


def _measure_text(
    arguments: argparse.Namespace, loaded: LoadedModel, grid: ProcessGrid, dtype: torch.dtype
) -> Result:
    from megaegpt.evaluation.carried_memory import evaluate_with_memory
    from megaegpt.evaluation.history import compare_histories, history_table
    from megaegpt.evaluation.text import evaluate_text, inputs_of
    from megaegpt.model.egpt.held_tokens import MemoryLimits

    source = _source(arguments, loaded, grid)
    if arguments.histories:
        results = compare_histories(loaded, source, grid, arguments.batch_size, dtype)
        numbers = {name: _numbers(result) for name, result in results.items()}
        return history_table(results), numbers
    more = []
    if arguments.memory_tokens is not None:
        limits = MemoryLimits(arguments.memory_tokens, arguments.memory_dtype)
        result, held = evaluate_with_memory(loaded, source, grid, dtype, limits)
        more.append(f"  token memory at the end: {held.size()}")
    else:
        inputs, stride = inputs_of(loaded, dtype), arguments.stride
        result = evaluate_text(loaded, source, inputs, grid, arguments.batch_size, stride)
    bits = "n/a" if math.isnan(result.bits_per_byte) else f"{result.bits_per_byte:.4f}"
    lines = [f"{result}, {bits} bits/byte", *more]
    if not loaded.is_own_tokenizer:
        lines.append("  (the model has another tokenizer than this one: bytes are not known)")
    if not math.isfinite(result.loss):
        lines.append("  (the loss is not finite: the model gives no probabilities for this text)")
    place = "after {:2d} earlier chunks"
    if arguments.memory_tokens is not None:  # earlier ones of the whole text
        place = "behind {:2d} chunks of its window"
    lines += [
        f"  {place.format(chunk)}: {loss:.4f} nats/token"
        for chunk, loss in enumerate(result.loss_by_chunk)
        if math.isfinite(loss)
    ]
    return "\n".join(lines), _numbers(result)


def _source(arguments: argparse.Namespace, loaded: LoadedModel, grid: ProcessGrid) -> TokenSource:
    """The text that is evaluated, checked on all ranks together."""
    from megaegpt.data.tokens.corpus_manifest import verify_shards
    from megaegpt.data.tokens.shard_tokenizer import check_same_tokenizer
    from megaegpt.data.tokens.stream import TokenStream
    from megaegpt.data.tokens.token_ids import check_ids
    from megaegpt.evaluation.text import TextTokens
    from megaegpt.parallel.together import raising_together

    with raising_together(grid):
        if arguments.text:
            text = TextTokens(arguments.text, loaded.tokenizer)
            for line in text.left_out.lines() if grid.is_main else ():
                print(f"left out {line}", flush=True)
            return text
        stream = TokenStream(arguments.data)
        if loaded.is_own_tokenizer:
            check_same_tokenizer(stream.prefixes, loaded.tokenizer)
        verify_shards(stream.prefixes, rank=grid.rank, world_size=grid.world_size)
        check_ids(stream, loaded.model.config.vocab_size, grid.rank, grid.world_size)
        return stream


def _numbers(result: Evaluation) -> dict[str, Any]:
    values = dataclasses.asdict(result)
    values |= {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return _finite(values)


def _finite(values: Any) -> Any:
    """The same with None in place of what JSON cannot say: infinities and no numbers."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _measure_task(
    read: Callable[[Path], Any],
    score: Callable[[Scorer, Any], Any],
    path: Path,
    scorer: Scorer,
    grid: ProcessGrid,
) -> Result:
    from megaegpt.parallel.together import raising_together

    with raising_together(grid):
        examples = read(path)
    result = score(scorer, examples)
    return str(result), _finite(dataclasses.asdict(result))


def _measure_harness(
    arguments: argparse.Namespace, loaded: LoadedModel, grid: ProcessGrid, dtype: torch.dtype
) -> Result:
    try:
        from megaegpt.evaluation import harness
    except ModuleNotFoundError as error:
        raise ConfigError(f"--harness needs `pip install lm_eval`: {error}") from None
    found = harness.run_harness(
        harness.HarnessModel(loaded, grid, arguments.batch_size, dtype),
        arguments.harness.split(","),
        arguments.tasks_folder,
        arguments.num_fewshot,
        arguments.limit,
    )
    numbers = {task: harness.measures(result) for task, result in found.items()}
    lines = [
        f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        for task, values in numbers.items()
    ]
    return "\n".join(lines), _finite(numbers)


if __name__ == "__main__":
    main()
