"""A model of ours for EleutherAI's lm-evaluation-harness, which ``pip install lm_eval`` brings.

Importing this module needs that package.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megaegpt.bars import progress_bar
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import ConfigError, DataError
from megaegpt.evaluation.generation_options import GenerationOptions, read_options
from megaegpt.evaluation.scorer import Pair, Scorer, encode_pair
from megaegpt.generation.generator import TextAssembler, TextGenerator
from megaegpt.generation.sampling import check_sampling
from megaegpt.generation.trained import LoadedModel
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_gather_object


class HarnessTokenizer:
    """Tokens as the harness' own model has them: the name of a special token in a text, such as
    ``<|endoftext|>``, is this token, where other texts take it for characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        named = tokenizer.bos_token
        self.first_token = tokenizer.eot_token if named is None else named

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return self._tokenizer.encode_with_special_tokens(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of ``text`` as the begin of a whole one: behind a BOS where that is the tokenizer's
        rule and the text has none itself.
        """
        ids = self.encode(text)
        return [self.first_token, *ids] if self._adds_bos(ids) else ids

    def _adds_bos(self, ids: list[int]) -> bool:
        return self._tokenizer.adds_bos and ids[:1] != [self.first_token]


class HarnessModel(LM):
    """A GPT, EGPT or DeepGPT, which answers as the harness' own transformers model does.

    Every rank runs the harness on all requests, and the ranks share them out here: to the harness
    there is one process.

    Args:
        loaded: the model.
        grid: its place.
        batch_size: pairs scored, or texts continued, at once.
        dtype: what the model computes in.
    """

    def __init__(
        self, loaded: LoadedModel, grid: ProcessGrid, batch_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._grid, self._batch_size = grid, batch_size
        self._tokenizer = HarnessTokenizer(loaded.tokenizer)
        self._decoding = loaded.tokenizer
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
            tokens = self._tokenizer.encode_prompt(request.args[0])
            windows = rolling_pairs(tokens, self._tokenizer.first_token, self._scorer.max_len)
            pairs += windows
            pieces.append(len(windows))
        scores = iter(self._scorer.score(pairs, "windows"))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in pieces]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Of (context, options): what follows, up to one of the texts ``until``.

        A context is cut on the left to leave room for all that may be written. Requests with the
        same options are continued together, those of like length; request n draws with a seed of
        its own, so that its text depends on no other (and a question that is asked repeatedly
        gets several answers).

        Raises:
            ConfigError: an option is not known, or not offered.
        """
        grid = self._grid
        end = self._decoding.end_of_text
        options = [read_options(request.args[1], end) for request in requests]
        prompts = [
            self._prompt(request.args[0], option)
            for request, option in zip(requests, options, strict=True)
        ]
        batches = self._batches(prompts, options)
        written: dict[int, str] = {}
        own = batches[grid.replica_rank :: grid.replica_size]
        for numbers in progress_bar(own, "texts", unit="batch", disable=not grid.is_main):
            texts = self._write([prompts[n] for n in numbers], options[numbers[0]], numbers)
            written.update(zip(numbers, texts, strict=True))
        every = {
            number: text
            for part in all_gather_object(written, grid)
            for number, text in part.items()
        }
        return [every[number] for number in range(len(requests))]

    def _prompt(self, context: str, options: GenerationOptions) -> list[int]:
        new, longest = options.config.max_new_tokens, self._scorer.max_len
        check_sampling(options.config, [])
        if new >= longest:
            raise ConfigError(
                f"the task asks for up to {new} new tokens (max_gen_toks), and the model sees "
                f"{longest} with the context: give the task a smaller max_gen_toks, in a copy of "
                "its file in --tasks-folder"
            )
        tokens = self._tokenizer.encode_prompt(context) or [self._tokenizer.first_token]
        return tokens[new - longest :]

    def _batches(
        self, prompts: list[list[int]], options: list[GenerationOptions]
    ) -> list[list[int]]:
        """Numbers of requests that are continued together: the longest first, as the harness does,
        so that what does not fit into memory fails at the beginning.
        """
        by_options = defaultdict(list)
        for number in sorted(range(len(prompts)), key=lambda n: len(prompts[n]), reverse=True):
            by_options[options[number]].append(number)
        size = self._batch_size
        return [
            numbers[first : first + size]
            for numbers in by_options.values()
            for first in range(0, len(numbers), size)
        ]

    def _write(
        self, prompts: list[list[int]], options: GenerationOptions, numbers: list[int]
    ) -> list[str]:
        """The texts that follow ``prompts``, which are of the requests ``numbers``."""
        assemblers = [TextAssembler(self._decoding) for _ in prompts]
        texts = [""] * len(prompts)
        running = set(range(len(prompts)))
        seed = options.config.seed
        for step in self._generator.stream_batch(
            prompts,
            options.config,
            stop=self._decoding.end_tokens,
            seeds=[seed + number for number in numbers],
        ):
            for row in sorted(running):
                if (token := step[row]) is None:
                    running.discard(row)
                    continue
                new = assemblers[row].add(token)
                texts[row] += new
                if options.ends(texts[row], len(new)):
                    running.discard(row)
            if not running:
                break
        return [
            options.cut(text + assembler.end())
            for text, assembler in zip(texts, assemblers, strict=True)
        ]


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
    """The numbers of a task, given as ``measure,filter``, by measure and without their errors.

    Where several filters find a measure, the name of each but ``none`` is told with it, as
    ``exact_match (strict-match)``.
    """
    found = {
        name: value
        for name, value in result.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }
    times = Counter(name.split(",")[0] for name in found)
    numbers = {}
    for name, value in found.items():
        measure, _, chosen_by = name.partition(",")
        alone = chosen_by == "none" or times[measure] == 1
        numbers[measure if alone else f"{measure} ({chosen_by})"] = value
    return numbers


__all__ = ["HarnessModel", "measures", "rolling_pairs", "run_harness"]
