"""Look into token shards: counts, lengths of documents, text, damage, differences.

python tools/inspect_shards.py data/web/train
python tools/inspect_shards.py show data/web/train --samples 3 --plot lengths.png
python tools/inspect_shards.py verify data/web/train
python tools/inspect_shards.py compare data/web/train data/other/train

Without a command the shards are shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megaegpt.arguments import ArgumentParser, path
from megaegpt.data.tokens.corpus_manifest import MANIFEST_NAME, Manifest
from megaegpt.data.tokens.shard_contents import LengthHistogram, first_difference
from megaegpt.data.tokens.shard_tokenizer import tokenizer_of_shards
from megaegpt.data.tokens.shards import Shard
from megaegpt.data.tokens.stream import resolve_prefixes
from megaegpt.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    """Run the command line."""
    arguments = parse_arguments()
    arguments.run(arguments)


def parse_arguments() -> argparse.Namespace:
    """Read the command line, or end the program with a line on what is wrong with it."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="counts, histogram of lengths, decoded samples")
    show.add_argument("prefixes", nargs="+", metavar="PREFIX")
    show.add_argument(
        "--samples", type=_count, default=3, metavar="N", help="documents (%(default)s)"
    )
    show.add_argument(
        "--tokens", type=_count, default=100, metavar="N", help="of each (%(default)s)"
    )
    show.add_argument(  # --png is its earlier name
        "--plot", "--png", type=path, metavar="FILE", help="draw the histogram (matplotlib)"
    )
    show.add_argument("--vocabulary", metavar="PLACE", help="tokenizer, if not the shards' own")
    show.set_defaults(run=_show)
    verify = commands.add_parser("verify", help="read everything; checksums where there are some")
    verify.add_argument("prefixes", nargs="+", metavar="PREFIX")
    verify.add_argument("--vocabulary", metavar="PLACE", help="tokenizer, if not the shards' own")
    verify.set_defaults(run=_verify)
    compare = commands.add_parser("compare", help="same documents? exit code 1 if not")
    compare.add_argument("first", metavar="PREFIX")
    compare.add_argument("second", metavar="PREFIX")
    compare.set_defaults(run=_compare)
    words = sys.argv[1:]
    if words and words[0] not in (*commands.choices, "-h", "--help"):
        words.insert(0, "show")
    return parser.parse_args(words)


def _count(text: str) -> int:
    """A number from 0 on, from the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _show(arguments: argparse.Namespace) -> None:
    shards = [Shard(prefix) for prefix in resolve_prefixes(arguments.prefixes)]
    for shard in shards:
        print(
            f"{shard.prefix}: {shard.num_documents:,} documents, {len(shard.tokens):,} tokens, "
            f"{shard.dtype.name}"
        )
    histogram = LengthHistogram(shards)
    mean = histogram.tokens / max(1, histogram.documents)
    print(
        f"{histogram.documents:,} documents, {histogram.tokens:,} tokens, "
        f"mean {mean:,.1f}, longest {histogram.longest:,}\n\n{histogram.text()}"
    )
    if arguments.plot:
        histogram.draw(arguments.plot)
        print(f"\nwrote {arguments.plot}")
    tokenizer = tokenizer_of_shards([s.prefix for s in shards], arguments.vocabulary)
    for number in _spread(arguments.samples, histogram.documents):
        shard, inside = _locate(shards, number)
        tokens = shard.document(inside)
        print(f"\n--- document {number:,} ({shard.prefix}), {len(tokens):,} tokens")
        print(tokenizer.decode(tokens[: arguments.tokens]))


def _spread(samples: int, documents: int) -> Iterator[int]:
    """Numbers of documents from the first to the last, evenly spread; all where they are fewer."""
    samples = min(samples, documents)
    for number in range(samples):
        yield number * (documents - 1) // max(1, samples - 1)


def _locate(shards: list[Shard], number: int) -> tuple[Shard, int]:
    """The shard of a document of the whole set, and its number there."""
    for shard in shards:
        if number < shard.num_documents:
            return shard, number
        number -= shard.num_documents
    raise IndexError(number)


def _verify(arguments: argparse.Namespace) -> None:
    prefixes = resolve_prefixes(arguments.prefixes)
    tokenizer = tokenizer_of_shards(prefixes, arguments.vocabulary)
    for prefix in prefixes:
        shard = Shard(prefix)
        shard.verify(tokenizer.vocab_size)
        print(f"{prefix}: whole, {shard.num_documents:,} documents, {len(shard.tokens):,} tokens")
    for folder in sorted({Path(prefix).parent for prefix in prefixes}):
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.load(folder)
            manifest.verify(folder)
            same = manifest.tokenizer.get("fingerprint") == tokenizer.fingerprint
            print(f"{folder / MANIFEST_NAME}: all checksums agree")
            if not same:
                print("warning: the manifest names another tokenizer than this one")


def _compare(arguments: argparse.Namespace) -> None:
    first, second = (
        [Shard(prefix) for prefix in resolve_prefixes([pattern])]
        for pattern in (arguments.first, arguments.second)
    )
    difference = first_difference(first, second)
    print(difference or "the same documents")
    if difference:
        sys.exit(1)


if __name__ == "__main__":
    main()
