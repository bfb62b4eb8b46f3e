"""Downloads that resume, are checked, and appear whole or not at all."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from megaegpt.errors import DataError
from megaegpt.files import naming_failures, publish, sha256_of_file

_BLOCK = 1 << 18


def download(
    url: str,
    target: Path,
    sha256: str | None = None,
    timeout: float = 10.0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Fetch ``url`` to ``target``, continuing a part left by an earlier attempt.

    Args:
        url: http(s) address.
        target: final name; ``target.part`` holds the bytes until they are complete.
        sha256: expected checksum of the file in hexadecimal; None: only the length is checked.
        timeout: seconds without a byte before giving up.
        progress: called with bytes so far and bytes in all (None when the server does not say).

    Raises:
        DataError: offline, refused, cut short (the part is kept for the next attempt), or of
            another content than expected (the part is removed); or the folder cannot be made.
    """
    if target.exists() and (sha256 is None or sha256_of_file(target) == sha256):
        return target
    with naming_failures(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        _fetch(url, part, timeout, progress)
    except urllib.error.HTTPError as error:
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        hint = "; run again to continue" if part.exists() else ""
        raise DataError(f"{url}: cannot be downloaded ({reason}){hint}") from error
    if sha256 is not None and (found := sha256_of_file(part)) != sha256:
        _discard(part)
        raise DataError(f"{url}: sha256 is {found}, expected {sha256}; nothing was kept")
    publish(part, target)
    _discard(part)
    return target


def _fetch(
    url: str,
    part: Path,
    timeout: float,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Append to ``part`` what is missing of ``url``; start over if the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "megaegpt"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version := _version_file(part).read_text() if _version_file(part).exists() else "":
            headers["If-Range"] = version  # a file that has changed since is sent whole
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout
        )
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part is as long as the file or longer: not trustworthy
            _discard(part)
            return _fetch(url, part, timeout, progress)
        raise
    with response:
        resumed = response.status == 206
        done = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        if not resumed:
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            _version_file(part).write_text("" if (version or "W/").startswith("W/") else version)
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                done += len(block)
                if progress:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise OSError(f"connection lost after {done:,} of {total:,} bytes")


def _version_file(part: Path) -> Path:
    """Holds what the server calls the version that ``part`` is a part of."""
    return part.with_name(part.name + "-version")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)
