"""A model of ours for EleutherAI's lm-evaluation-harness, which ``pip install lm_eval`` brings.

Importing this module needs that package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from megaegpt.config import GenerationConfig
from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import Pair, Scorer, encode_pair
from megaegpt.generation.generator import TextGenerator, encode_prompt
from megaegpt.generation.trained import LoadedModel
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_gather_object

_MAX_NEW_TOKENS = 256  # the harness' own default


class HarnessModel(LM):
    """A GPT, EGPT or DeepGPT.

    Every rank runs the harness on all requests, and the ranks share them out here: to the harness
    there is one process.

    Args:
        loaded: the model.
        grid: its place.
        batch_size: pairs scored at once.
        dtype: what the model computes in.
    """

    def __init__(
        self, loaded: LoadedModel, grid: ProcessGrid, batch_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._grid, self._tokenizer = grid, loaded.tokenizer
        self._scorer = Scorer(loaded, grid, batch_size, dtype)
        self._generator = TextGenerator(loaded.model, loaded.encoder, loaded.tokenizer.vocab_size)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of (context, continuation): nats, and whether greedy decoding writes it."""
        pairs = [encode_pair(self._tokenizer, *request.args) for request in requests]
        return list(self._scorer.score(pairs, "continuations"))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of (text,): nats of the whole, in windows of the model's length without overlap but the
        last, which is moved back to be full.
        """
        pairs: list[Pair] = []
        pieces = []
        for request in requests:
            tokens = self._tokenizer.encode(request.args[0])
            windows = rolling_pairs(tokens, self._tokenizer.eot_token, self._scorer.max_len)
            pairs += windows
            pieces.append(len(windows))
        scores = iter(self._scorer.score(pairs, "windows"))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in pieces]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Of (context, options): what follows, up to one of the texts ``until``."""
        grid = self._grid
        own = range(grid.dp_rank, len(requests), grid.dp_size)
        written = {
            number: self._write(*requests[number].args)
            for number in tqdm(own, "texts", disable=not grid.is_main)
        }
        every = {
            number: text
            for part in all_gather_object(written, grid)
            for number, text in part.items()
        }
        return [every[number] for number in range(len(requests))]

    def _write(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        sampling = options.get("do_sample", False) or options.get("temperature", 0.0) > 0
        config = GenerationConfig(
            max_new_tokens=options.get("max_gen_toks", _MAX_NEW_TOKENS),
            temperature=options.get("temperature", 1.0) if sampling else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
        )
        tokens: list[int] = []
        text = ""
        prompt = encode_prompt(context, self._tokenizer)
        for token in self._generator.stream(prompt, config, stop=self._tokenizer.eot_token):
            tokens.append(token)
            text = self._tokenizer.decode(tokens)
            ends = [place for end in until if (place := text.find(end)) >= 0]
            if ends:
                return text[: min(ends)]
        return text


def rolling_pairs(tokens: Sequence[int], first: int, room: int) -> list[Pair]:
    """A text as contexts and continuations that cover it once.

    Args:
        tokens: of the text.
        first: what is before it.
        room: most tokens that the model sees.

    Example:
        >>> rolling_pairs([1, 2, 3, 4, 5], first=0, room=3)
        [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    text = [first, *tokens]
    pairs: list[Pair] = []
    for start in range(0, len(tokens), room):
        end = min(start + room, len(tokens))
        pairs.append((text[max(end - room, 0) : start + 1], text[start + 1 : end + 1]))
    return pairs


def run_harness(
    model: HarnessModel,
    tasks: Sequence[str],
    folder: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures by task. Collective over all ranks.

    Args:
        tasks: names.
        folder: of further tasks' YAML files.
        num_fewshot: examples before each question; None: as the task says.
        limit: only the first of a task's questions.

    Raises:
        DataError: a task is not known, or its data cannot be had.
    """
    try:
        manager = _task_manager(tasks, folder)
        unknown = sorted(set(tasks) - set(manager.all_tasks))
        if unknown:
            raise DataError(f"the harness has no task {', '.join(unknown)}")
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise DataError(f"the harness cannot read a task's data: {error}") from None
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def _task_manager(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """Knows the tasks; the harness' own thousands are indexed only if need be."""
    if folder is None:
        return TaskManager()
    own = TaskManager(include_path=str(folder), include_defaults=False)
    known = set(tasks) <= set(own.all_tasks)
    return own if known else TaskManager(include_path=str(folder))


def measures(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task, given as ``measure,filter``, by measure and without their errors."""
    return {
        name.split(",")[0]: value
        for name, value in result.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }


__all__ = ["HarnessModel", "measures", "rolling_pairs", "run_harness"]
