"""JSON that other programs wrote, read without trusting it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaegpt.errors import CheckpointError

_MOST_BYTES = 64 * 2**20
"""Far more than the index of any model; a file may be a device, or anything else by mistake."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file, with or without a byte-order mark.

    Raises:
        CheckpointError: the file is missing, no regular file, too large, or holds no JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file")
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path} is too large: {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{path} holds no JSON object, but a {kind}")
    return content
