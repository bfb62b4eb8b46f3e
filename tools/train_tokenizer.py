"""Learn a tokenizer, a byte-level BPE, from files of any kind that tools/preprocess.py reads.

    python tools/train_tokenizer.py corpus/ --vocab-size 32000 --output tokenizers/mine
    python tools/train_tokenizer.py pages.jsonl.zst --vocab-size 65536 --output tokenizers/chat \\
        --special-token '<|im_start|>' --special-token '<|im_end|>'
    python tools/train_tokenizer.py maildir --format enron --vocab-size 16000 --output mail

The output is a folder with tokenizer.json and tokenizer_config.json, which transformers'
AutoTokenizer loads and data.vocabulary and --vocabulary take. It appears whole or not at all, and
the same documents give the same files. <|endoftext|> ends documents and is the first special token;
bytes, and so all texts, are in the vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megaegpt.arguments import ArgumentParser, input_name, integer, path
from megaegpt.bars import progress_bar
from megaegpt.data.preprocess.jobs import STDIN, check_text_key, find_inputs
from megaegpt.data.readers import (
    READERS,
    Option,
    parse_reader_options,
    read_documents,
    reader_suffixes,
)
from megaegpt.data.readers.documents import Document, LeftOut, Problems
from megaegpt.data.readers.inputs import expand
from megaegpt.data.tokenizers.bpe_training import train_byte_level_bpe
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.errors import ConfigError, exits_cleanly
from megaegpt.files import whole_folder


@exits_cleanly
def main() -> None:
    """Run the command line."""
    arguments = _parse_arguments()
    with whole_folder(arguments.output) as folder:  # refuses before it reads
        # It may lie among the input, out of sight.
        left_out = LeftOut(written=lambda path: path.name == folder.name)
        problems = Problems(arguments.on_bad_input, left_out=left_out)
        texts = _Texts(arguments, problems)
        definition = train_byte_level_bpe(
            texts, arguments.output.name, arguments.vocab_size, arguments.special_token
        )
        tokenizer = HuggingFaceTokenizer(definition)
        save_tokenizer(tokenizer, folder)
    if problems.count:
        print(problems.summary())
    for line in problems.left_out.lines():
        print(f"left out    {line}")
    print(f"text        {texts.documents:,} documents, {texts.bytes / 1e6:,.1f} MB")
    special = len(tokenizer.special_tokens)
    print(f"vocabulary  {tokenizer.vocab_size:,} ids, {special} of them special")
    if tokenizer.vocab_size < arguments.vocab_size:
        print(f"warning: the text has no pairs for {arguments.vocab_size:,}: give more of it")
    print(f"tokenizer   {arguments.output}: runs on {tokenizer.runs_on}")


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=input_name, metavar="INPUT", help="files, folders, or globs")
    add("--output", type=path, required=True, metavar="FOLDER", help="a new folder")
    add("--vocab-size", type=integer(258, 1 << 24), required=True, metavar="N", help="ids in all")
    add(
        "--special-token",
        action="append",
        default=[],
        metavar="NAME",
        help="besides <|endoftext|>; may be repeated",
    )
    add("--format", choices=READERS, help="of the inputs (default: text or jsonl by their names)")
    add("--text-key", metavar="NAME", help="key or column of the text (default: text)")
    add(
        "--reader-option",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="option of the format, such as keep_quoted for enron; may be repeated",
    )
    add(
        "--on-bad-input",
        choices=["fail", "skip"],
        default="fail",
        help="stop at the first bad input, or leave it out and count (default: fail)",
    )
    add("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    if STDIN in arguments.inputs:
        parser.error("standard input (-) is not learned from: write it to a file first")
    return arguments


class _Texts:
    """The texts of all inputs, counted as they pass."""

    def __init__(self, arguments: argparse.Namespace, problems: Problems) -> None:
        self._options = _reader_options(arguments)
        self._files = find_inputs(
            arguments.inputs, arguments.format, self._options, problems.left_out
        )
        if arguments.text_key is not None:
            check_text_key(arguments.text_key, self._files)
        self._problems, self._quiet = problems, arguments.quiet
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        with progress_bar(unit="B", unit_scale=True, disable=self._quiet, title="reading") as bar:
            for document in self._read():
                try:
                    size = len(document.text.encode())
                except UnicodeEncodeError:
                    what = "holds half of a surrogate pair, which is no character"
                    self._problems.report(document.where, what)
                    continue
                self.documents += 1
                self.bytes += size
                bar.update(size)
                yield document.text
            bar.set_description("merging", refresh=True)

    def _read(self) -> Iterator[Document]:
        known = LeftOut()  # told already, when the inputs were found
        for file in self._files:
            options = self._options if file.kind != "text" else {}
            paths = expand([Path(file.path)], reader_suffixes(file.kind), known)
            yield from read_documents(file.kind, paths, self._problems, **options)


def _reader_options(arguments: argparse.Namespace) -> dict[str, Option]:
    kind = arguments.format or "jsonl"
    assignments = list(arguments.reader_option)
    if arguments.text_key is not None:
        assignments.append(f"text_column={arguments.text_key}")
    if kind == "text":  # its --text-key is refused with the inputs
        if arguments.reader_option:
            raise ConfigError("--reader-option is not for text files: leave it out")
        return {}
    return parse_reader_options(kind, assignments)


if __name__ == "__main__":
    main()
