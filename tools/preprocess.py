"""Tokenise text into Megatron-compatible shards (.bin/.idx) for training.

    python tools/preprocess.py book.txt --output data/book --split-tokens 0.8
    python tools/preprocess.py corpus/ --output data/web --shards 8 --validation-fraction 0.001
    python tools/preprocess.py pages_by_date.jsonl --output data/pages --shuffle-documents 1
    zcat pages.jsonl.gz | python tools/preprocess.py - --output data/pages --text-key content
    python tools/preprocess.py --from-nanogpt train.bin val.bin --output data/openwebtext

Inputs are text files (one document each) and JSON Lines, plain or compressed (.gz, .bz2, .xz,
.zst), folders of them, globs, or - for JSON Lines on standard input. --format reads the native
forms of other corpora: --format wikipedia enwiki-pages-articles.xml.bz2, --format enron maildir.

The shards depend on the input and the options, never on the number of workers. An interrupted run
goes on where the last complete shard ended: repeat the command.
"""

from __future__ import annotations

import argparse
import os

from megaegpt.arguments import ArgumentParser, input_name, integer, path, seed
from megaegpt.data.preprocess.corpus import PreprocessOptions, Report, preprocess
from megaegpt.data.preprocess.encode import EncodeOptions
from megaegpt.data.preprocess.nanogpt import import_files
from megaegpt.data.readers import READERS, Option, parse_reader_options
from megaegpt.errors import ConfigError, exits_cleanly

_OF_IMPORT = {"from_nanogpt", "inputs", "output", "overwrite", "quiet"}


@exits_cleanly
def main() -> None:
    """Run the command line."""
    arguments = parse_arguments()
    if arguments.from_nanogpt:
        _import_nanogpt(arguments)
        return
    report = preprocess(options_of(arguments), show_progress=not arguments.quiet)
    _print_report(report, arguments)


def options_of(arguments: argparse.Namespace) -> PreprocessOptions:
    """The preprocessing that the command line asks for.

    Raises:
        ConfigError: a reader option that does not exist, or no reader that would take it.
    """
    return PreprocessOptions(
        output=arguments.output,
        inputs=tuple(arguments.inputs),
        validation=tuple(arguments.validation),
        kind=arguments.format,
        reader_options=_reader_options(arguments),
        encode=EncodeOptions(
            text_key="text" if arguments.text_key is None else arguments.text_key,
            append_eod=arguments.append_eod,
            min_chars=arguments.min_chars,
            vocabulary=arguments.vocabulary,
            backend=arguments.tokenizer_backend,
        ),
        shards=arguments.shards,
        validation_fraction=arguments.validation_fraction,
        split_tokens=arguments.split_tokens,
        deduplicate=arguments.deduplicate,
        on_bad_input=arguments.on_bad_input,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        shuffle_seed=arguments.shuffle_documents,
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line, or end the program with a line on what is wrong with it."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_input_options(parser)
    _add_split_options(parser)
    _add_choice_of_documents(parser)
    parser.add_argument("--shuffle-documents", type=seed, metavar="SEED",
        help="write the documents of each split in the random order of this seed, over all shards; "
        "needs the space of the shards twice (default: the order of the input)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace shards of another run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--from-nanogpt", nargs="+", type=path, metavar="BIN",
        help="import nanoGPT token files instead: train.bin, val.bin")  # fmt: skip
    arguments = parser.parse_args()
    if bool(arguments.inputs) == bool(arguments.from_nanogpt):
        parser.error("give inputs, or --from-nanogpt and token files")
    if arguments.from_nanogpt:
        _refuse_options_of_text(parser, arguments)
    return arguments


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    of_inputs = "files, folders, globs, or - for stdin"
    add("inputs", nargs="*", type=input_name, metavar="INPUT", help=of_inputs)
    add("--output", type=path, required=True, metavar="DIR", help="folder of the shards")
    add("--format", choices=READERS, help="of the inputs (default: text or jsonl by their names)")
    add("--text-key", metavar="NAME", help="key or column of the text (default: text)")
    add("--reader-option", action="append", default=[], metavar="NAME[=VALUE]",
        help="option of the format, such as keep_quoted for enron; may be repeated")  # fmt: skip
    add(
        "--vocabulary",
        metavar="PLACE",
        help="tokenizer: a folder with tokenizer.json or vocab.json and merges.txt, a .json, .gguf "
        "or .tiktoken file, cl100k_base, o200k_base (default: GPT-2's)",
    )
    add("--tokenizer-backend", choices=["tiktoken", "gigatoken"], default="tiktoken",
        help="gigatoken (optional package): the same tokens, many times faster")  # fmt: skip
    add(
        "--workers",
        type=int,
        default=_cpus(),
        help="processes (default: all cores, here %(default)s)",
    )
    add("--shards", type=int, default=1, help="shards of each split (default: 1)")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end every document with <|endoftext|> (default: yes)")  # fmt: skip


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validation split (at most one of these)").add_argument
    add(
        "--validation",
        nargs="+",
        type=input_name,
        default=[],
        metavar="INPUT",
        help="inputs of the validation split",
    )
    add("--validation-fraction", type=float, default=0.0, metavar="F",
        help="share of the documents, chosen by a hash of the text")  # fmt: skip
    add("--split-tokens", type=float, metavar="F",
        help="share of the tokens, from the start, that is for training: for one book")  # fmt: skip


def _add_choice_of_documents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("choice of documents").add_argument
    add("--on-bad-input", choices=["fail", "skip"], default="fail",
        help="stop at the first bad input, or leave it out and count (default: fail)")  # fmt: skip
    add("--min-chars", type=integer(0), default=0, metavar="N", help="leave out shorter documents")
    add("--deduplicate", action="store_true", help="leave out exact repetitions of a document")


def _refuse_options_of_text(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Tokens are imported as they are: an option that would say otherwise must not pass unused."""
    useless = [
        "--" + name.replace("_", "-")
        for name, value in vars(arguments).items()
        if name not in _OF_IMPORT and value != parser.get_default(name)
    ]
    if useless:
        parser.error(f"--from-nanogpt takes tokens as they are: leave out {', '.join(useless)}")


def _reader_options(arguments: argparse.Namespace) -> dict[str, Option]:
    """Of a format that is read in the main process."""
    if arguments.format in (None, "text", "jsonl"):
        if arguments.reader_option:
            raise ConfigError("--reader-option needs a --format that is neither text nor jsonl")
        return {}
    assignments = list(arguments.reader_option)
    if arguments.text_key is not None:
        assignments.append(f"text_column={arguments.text_key}")
    return parse_reader_options(arguments.format, assignments)


def _cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_report(report: Report, arguments: argparse.Namespace) -> None:
    counts = report.manifest.counts
    print(f"documents   {counts['documents']:,}")
    print(f"tokens      {counts['tokens']:,}")
    print(f"text        {counts['text_bytes'] / 1e6:,.1f} MB, "
          f"{counts['text_bytes'] / max(1, counts['tokens']):.2f} bytes/token")  # fmt: skip
    for name, count in [("duplicates", "duplicates"), ("too short", "too_short")]:
        if counts[count]:
            print(f"{name:11} {counts[count]:,} left out")
    if counts["bad_inputs"]:
        print(f"bad inputs  {counts['bad_inputs']:,} left out")
        print("\n".join(report.problems.summary().splitlines()[1:]))
    for line in report.problems.left_out.lines():
        print(f"left out    {line}")
    backend = arguments.tokenizer_backend
    runs_on = backend if backend == "gigatoken" else report.tokenizer.runs_on
    print(f"tokenizer   {report.tokenizer.name}, on {runs_on}")
    if report.meter.counts.documents:
        print(f"speed       {report.meter.rates()}, {report.meter.seconds:.1f} s")
    else:
        print("speed       nothing to do: all documents were encoded before")
    for split, shards in report.manifest.splits.items():
        tokens = sum(shard.tokens for shard in shards)
        prefix = arguments.output / split
        print(f"{split:11} {prefix}: {tokens:,} tokens in {len(shards)} shard(s)")
        if not tokens:
            print(f"warning: no document fell into the {split} split")


def _import_nanogpt(arguments: argparse.Namespace) -> None:
    output = arguments.output
    manifest = import_files(arguments.from_nanogpt, output, arguments.overwrite)
    for split, (shard,) in manifest.splits.items():
        print(
            f"{split:11} {output / split}: {shard.tokens:,} tokens, {shard.documents:,} documents"
        )


if __name__ == "__main__":
    main()
