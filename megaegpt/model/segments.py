"""Several texts, or padding, in one row: every token has a segment number.

Tokens see each other only inside a segment, and a segment's positions count from its start.
Tokens of a negative segment are padding: nothing sees them, and they see themselves alone (so that
no softmax is empty). Segment numbers of one row must not come back once they have ended.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaegpt.labels import PADDING


def padding_segments(real: Tensor) -> Tensor:
    """Segments of a padded batch: (B, T) True at real tokens -> 0 there and -1 at padding."""
    return real.to(torch.int64) - 1


def document_segments(tokens: Tensor, end_of_text: int, first: Tensor | None = None) -> Tensor:
    """Segments of packed documents, each ended by ``end_of_text`` (which belongs to it).

    Args:
        tokens: (B, T) ids.
        end_of_text: the id after which a new document begins.
        first: (B,) number of the document the first token is in; 0 by default.

    Example:
        >>> document_segments(torch.tensor([[5, 6, 0, 7, 0, 8]]), end_of_text=0)
        tensor([[0, 0, 0, 1, 1, 2]])
    """
    ends = (tokens == end_of_text).to(torch.int64)
    ended_before = ends.cumsum(1) - ends
    return ended_before if first is None else ended_before + first.unsqueeze(1)


def segment_positions(
    segments: Tensor, first_segment: Tensor | None = None, first_position: Tensor | None = None
) -> Tensor:
    """Position of every token in its segment, (B, T) -> (B, T); 0 at padding.

    Args:
        segments: (B, T).
        first_segment: (B,) segment that was open before these tokens ...
        first_position: (B,) ... and how many tokens it already had.

    Example:
        >>> segment_positions(torch.tensor([[-1, -1, 0, 0, 1]]))
        tensor([[0, 0, 0, 1, 0]])
    """
    columns = torch.arange(segments.shape[1], device=segments.device)
    open_before = (
        torch.full_like(segments[:, 0], PADDING) if first_segment is None else first_segment
    )
    previous = torch.cat([open_before.unsqueeze(1), segments[:, :-1]], dim=1)
    starts = torch.where(previous != segments, columns, -(2**62))
    held = torch.zeros_like(open_before) if first_position is None else first_position
    starts[:, 0] = torch.where(open_before == segments[:, 0], -held, 0)
    return (columns - starts.cummax(1).values).masked_fill(segments < 0, 0)


def same_segment(queries: Tensor, keys: Tensor) -> Tensor:
    """(B, T) and (B, S) segments -> (B, T, S): True where both are real tokens of one segment."""
    rows = queries.unsqueeze(2)
    return (rows == keys.unsqueeze(1)) & (rows >= 0)
