"""One shard cut in two at a token: the split of a single book."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megaegpt.data.tokens.shards import Shard, ShardSummary, ShardWriter


def cut_shard(
    whole: Path, share: float, first: Path, second: Path, before_publishing: Callable[[], None]
) -> tuple[ShardSummary, ShardSummary]:
    """Write the first ``floor(share * tokens)`` tokens to one shard, the others to another.

    The document at the cut is divided; its first piece has no end-of-text token.

    Args:
        whole: prefix of the shard to cut.
        share: of the tokens, between 0 and 1.
        first: prefix of the one new shard.
        second: prefix of the other.
        before_publishing: see :meth:`ShardWriter.finish`.
    """
    shard = Shard(whole)
    left = int(len(shard.tokens) * share)
    with ShardWriter(first, shard.dtype) as head, ShardWriter(second, shard.dtype) as tail:
        for number in range(shard.num_documents):
            document = shard.document(number)
            pieces = document[:left], document[left:]
            left = max(0, left - len(document))
            for writer, piece in zip((head, tail), pieces, strict=True):
                if len(piece):
                    writer.add_document(piece)
        return head.finish(before_publishing), tail.finish()
