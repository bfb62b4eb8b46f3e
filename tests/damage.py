"""Random damage to files, for tests of what is said of it."""

from __future__ import annotations

import random


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A byte changed (to anything, or to what JSON is made of), a piece cut out or repeated, or
    the end missing. Never what it was.
    """
    place, length = draw.randrange(len(content)), draw.randrange(1, 40)
    changed = bytearray(content)
    kind = draw.randrange(5)
    if kind == 0:
        del changed[place:]
    elif kind == 1:
        del changed[place : place + length]
    elif kind == 2:
        changed[place:place] = content[place : place + length]
    else:
        choices = range(256) if kind == 3 else b'0123456789{}[],:"-'
        changed[place] = draw.choice([byte for byte in choices if byte != content[place]])
    return bytes(changed)
