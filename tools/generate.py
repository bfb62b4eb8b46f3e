"""Continue a text with a trained GPT, EGPT or DeepGPT, shown as it is written.

    python tools/generate.py --checkpoint runs/egpt --prompt "Well, Prince,"
    python tools/generate.py --checkpoint runs/gpt/checkpoints --prompt-file story.txt --top-p 0.9
    echo "It was" | python tools/generate.py --checkpoint weights --prompt-file - --temperature 0
    python tools/generate.py --checkpoint runs/finetune_instructions --instruction "Name a colour."
    torchrun --nproc_per_node 2 tools/generate.py --checkpoint runs/egpt --prompt "..."

--checkpoint is a run's folder or its checkpoints (the latest is taken), one checkpoint, a weights
folder, a folder in Hugging Face's form, a GGUF file, or smollm2-135m, gpt2, gpt2-medium,
gpt2-large, gpt2-xl, or hf:OWNER/NAME. An EGPT or DeepGPT finds its encoder by itself; if that was
moved, give --encoder.

Text goes to stdout, everything else to stderr. Under torchrun the processes are one
tensor-parallel group. A text ends at --max-new-tokens, or where the model ends the document, an
answer to --instruction also where the model's chat template ends one. The same seed, prompt and
machine give the same text; sample k of --num-samples has the seed `--seed + k - 1`. Samples are
written 32 at a time.

A prompt file is UTF-8 with or without a byte-order mark. Its line ends become LF, as those of
training text do, and the last one is not part of the prompt. Of a prompt that is longer than a
GPT's context the model sees the end, and stderr says how much.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megaegpt.arguments import ArgumentParser
from megaegpt.config import GenerationConfig
from megaegpt.errors import ConfigError, DataError, exits_cleanly
from megaegpt.generation.model_options import (
    add_memory_options,
    add_model_options,
    add_sampling_options,
    load_model,
    memory_limits,
    sampling_config,
)

if TYPE_CHECKING:  # torch is imported once the command line is right
    from megaegpt.data.instruction.records import Instruction
    from megaegpt.data.tokenizer import Tokenizer
    from megaegpt.model.build import Model
    from megaegpt.model.egpt.held_tokens import MemoryLimits
    from megaegpt.model.encoder import FrozenEncoder
    from megaegpt.parallel.grid import ProcessGrid
    from megaegpt.serving.text_stream import TextStream

_DEFAULTS = GenerationConfig(max_new_tokens=256)
SAMPLES_AT_ONCE = 32
"""Any number of samples takes the memory of so many."""


@exits_cleanly
def main() -> None:
    """Generate as told on the command line."""
    arguments = _parse_arguments()
    config = sampling_config(arguments)
    from megaegpt.generation.sampling import check_sampling
    from megaegpt.parallel.launch import joined_processes

    check_sampling(config, range(config.seed, config.seed + arguments.num_samples))
    with joined_processes(None) as grid:
        _generate(arguments, config, grid)


def _generate(arguments: argparse.Namespace, config: GenerationConfig, grid: ProcessGrid) -> None:
    from megaegpt.generation.chat import Chat
    from megaegpt.generation.generator import TextGenerator

    prompt = _read_prompt(arguments, grid)
    loaded = load_model(arguments, grid)
    model, encoder, tokenizer = loaded.model, loaded.encoder, loaded.tokenizer
    compiled = arguments.compile and _can_compile(model, encoder, grid, arguments)
    limits = _memory_limits(arguments, model)
    generator = TextGenerator(
        model, encoder, tokenizer.vocab_size, compiled=compiled, limits=limits
    )
    answers = arguments.instruction is not None
    shown = "" if arguments.only_new or answers else prompt
    tokens, stop = tokenizer.encode_prompt(prompt), tokenizer.end_tokens
    stop_texts: tuple[str, ...] = ()
    if answers and loaded.asked_in_chats and loaded.chat_template is not None:
        chat = Chat(tokenizer, loaded.chat_template)
        tokens = chat.encode(_task(arguments).conversation[:1])
        stop, stop_texts = chat.end_tokens, chat.end_texts
    if grid.is_main:
        _warn_of_unseen(model, len(tokens))
    writer = SampleWriter(
        tokenizer, arguments.num_samples, config.seed, grid.is_main, compiled, stop_texts
    )
    for first in range(0, arguments.num_samples, SAMPLES_AT_ONCE):
        count = min(SAMPLES_AT_ONCE, arguments.num_samples - first)
        writer.begin(shown, first, count)
        for step in generator.stream_batch(
            [tokens] * count,
            config,
            stop=stop,
            use_cache=not arguments.no_cache,
            seeds=range(config.seed + first, config.seed + first + count),
        ):
            writer.add(step)
            if writer.all_ended:
                break
        writer.end()
    writer.report(len(tokens))


def _memory_limits(arguments: argparse.Namespace, model: Model) -> MemoryLimits:
    """Raises:
    ConfigError: the model has no token memory, or what is asked for needs the cache.
    """
    from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING

    limits = memory_limits(arguments, model)
    if arguments.no_cache and limits != AS_IN_TRAINING:
        raise ConfigError("--no-cache recomputes a training window: leave --memory-tokens out")
    return limits


def _warn_of_unseen(model: Model, prompt_tokens: int) -> None:
    """Say how much of a prompt is not seen; a GPT's context bounds it."""
    from megaegpt.model.decoding import context_start

    if model.config.needs_encoder:
        return
    unseen = context_start(prompt_tokens, model.config.max_seq_len)
    if unseen:
        print(
            f"the prompt has {prompt_tokens} tokens: the model sees the last "
            f"{prompt_tokens - unseen}, its context is {model.config.max_seq_len}",
            file=sys.stderr,
        )


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    _add_prompt_options(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=_DEFAULTS.max_new_tokens,
        metavar="N",
        help="length of the continuation in tokens (default: %(default)s)",
    )
    add_sampling_options(parser, _DEFAULTS)
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations (default: 1)",
    )
    parser.add_argument(
        "--only-new", action="store_true", help="do not repeat the prompt before its continuation"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step from token to token, on a GPU into one CUDA graph: tens of seconds "
        "first, for long texts or several samples (on a CPU for few)",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compute every token from the beginning: slow, the same text; to check the caches",
    )
    add_memory_options(parser)
    arguments = parser.parse_args()
    if arguments.num_samples < 1:
        parser.error("--num-samples must be at least 1")
    if arguments.input and arguments.instruction is None:
        parser.error("--input belongs to an --instruction")
    return arguments


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        default=_DEFAULTS.prompt,
        metavar="TEXT",
        help="text to continue; '' begins a new document (default: a line break)",
    )
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="file with the text to continue; - is stdin"
    )
    prompt.add_argument(
        "--instruction",
        metavar="TEXT",
        help="a task for a model from launchers/finetune.py, put into the format that it was "
        "trained with; for another model, into its chat template (without one: Alpaca's prompt); "
        "the answer alone is shown",
    )
    parser.add_argument(
        "--input", default="", metavar="TEXT", help="what the --instruction is about, if anything"
    )


def _can_compile(
    model: Model, encoder: FrozenEncoder | None, grid: ProcessGrid, arguments: argparse.Namespace
) -> bool:
    """Say so if not."""
    from megaegpt.generation.compiled import uncompilable
    from megaegpt.model.build import gpt_of
    from megaegpt.parallel import compiling
    from megaegpt.parallel.matmul import MOST_GENERATED_ROWS

    problem = uncompilable(gpt_of(model, encoder)) or compiling.compile_problem(grid.device.type)
    if grid.device.type == "cpu" and arguments.num_samples > MOST_GENERATED_ROWS:
        problem = f"on a CPU more than {MOST_GENERATED_ROWS} texts at once are faster as they are"
    if arguments.no_cache:
        problem = "without the cache (--no-cache) there is no step from token to token"
    if problem and grid.is_main:
        print(f"not compiled: {problem}", file=sys.stderr)
    return problem is None


def _read_prompt(arguments: argparse.Namespace, grid: ProcessGrid) -> str:
    """The prompt, read by rank 0 and given to all; a file's last line break is not part of it."""
    from megaegpt.parallel.together import broadcast_object

    if arguments.instruction is not None:
        return _task(arguments).prompt
    name = arguments.prompt_file
    return arguments.prompt if name is None else broadcast_object(lambda: _read_text(name), grid)


def _task(arguments: argparse.Namespace) -> Instruction:
    from megaegpt.data.instruction.records import Instruction

    return Instruction(arguments.instruction, arguments.input, "")


def _read_text(name: str) -> str:
    from megaegpt.data.readers.inputs import MAX_DOCUMENT_BYTES, read_whole

    try:
        with sys.stdin.buffer if name == "-" else open(name, "rb") as file:
            content = read_whole(file, name, MAX_DOCUMENT_BYTES)
        text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig").read()  # line ends become LF
        return text.removesuffix("\n")
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: {error.reason} at {error.start}") from None


class SampleWriter:
    """The first sample of each batch on the terminal as it comes, the batch's others after it; the
    speed at the end.

    Where the step from token to token is compiled, the first or the second token waits for that.
    Each of ``stops`` ends a sample and is not shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        samples: int,
        seed: int,
        speaks: bool,
        compiled: bool,
        stops: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._samples = tokenizer, samples
        self._seed, self._speaks = seed, speaks
        self._prompt, self._first = "", 0
        self._stops = stops
        self._texts: list[TextStream] = []
        self._later: list[str] = []
        self._ended: set[int] = set()
        self._tokens = 0
        self._compiled = compiled
        self._first_steps = 2 if compiled else 1  # still to come of those timed by themselves
        self._marks = [(time.perf_counter(), 0)]  # begin, end of the first steps, end; tokens then

    def begin(self, prompt: str, first: int, count: int) -> None:
        """Show the prompt of the ``count`` samples from number ``first`` on."""
        self._prompt, self._first = prompt, first
        from megaegpt.serving.text_stream import TextStream

        self._texts = [TextStream(self._tokenizer, self._stops) for _ in range(count)]
        self._later, self._ended = [""] * count, set()
        self._write(self._title(0) + prompt)

    def add(self, step: list[int | None]) -> None:
        """One token of each sample, None where it has ended."""
        for sample, token in enumerate(step):
            if token is None or sample in self._ended:
                self._ended.add(sample)
                continue
            self._tokens += 1
            text = self._texts[sample].add(token)
            if self._texts[sample].stopped:
                self._ended.add(sample)
            if sample == 0:
                self._write(text)
            else:
                self._later[sample] += text
        self._first_steps -= 1
        if self._first_steps == 0:
            self._marks.append((time.perf_counter(), self._tokens))

    @property
    def all_ended(self) -> bool:
        """Whether every sample of the batch has ended, by a token or by a stop text."""
        return len(self._ended) == len(self._texts)

    def end(self) -> None:
        """Show the other samples of the batch."""
        self._write(self._texts[0].end() + "\n")
        for sample, text in list(enumerate(self._later))[1:]:
            rest = self._texts[sample].end()
            self._write(f"{self._title(sample)}{self._prompt}{text}{rest}\n")

    def report(self, prompt_tokens: int) -> None:
        """Show on stderr how fast it went."""
        self._marks.append((time.perf_counter(), self._tokens))
        if self._speaks:
            print(self._report(prompt_tokens), file=sys.stderr)

    def _report(self, prompt_tokens: int) -> str:
        times, tokens = zip(*self._marks, strict=True)
        seconds = [end - start for start, end in itertools.pairwise(times)]
        also = " and compiling" if self._compiled else ""
        report = f"prompt: {prompt_tokens} tokens{also} in {seconds[0]:.2f} s"
        if tokens[-1] > tokens[-2] > 0:
            report += f"; then {(tokens[-1] - tokens[-2]) / seconds[-1]:.1f} tokens/s"
        return f"{report}; {self._tokens} new tokens"

    def _title(self, sample: int) -> str:
        if self._samples == 1:
            return ""
        number = self._first + sample
        return f"=== sample {number + 1}, seed {self._seed + number} ===\n"

    def _write(self, text: str) -> None:
        if self._speaks:
            sys.stdout.write(text)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
