"""Downloads: resumed, checked, whole or not at all. A local server stands in for the network."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaegpt.data.readers.download import download
from megaegpt.errors import DataError

CONTENT = bytes(range(256)) * 4_000


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; breaks off after ``break_after`` bytes; notes the ranges it was asked for."""

    break_after: int | None = None
    understands_ranges = True
    version = '"one"'

    def __init__(self) -> None:
        self.ranges: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = 0
        unchanged = self.headers.get("If-Range") in (None, self.server.version)
        if wanted and self.server.understands_ranges and unchanged:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.server.version)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:][: self.server.break_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(server: Server, path: str = "/file") -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_download_that_broke_off_continues_where_it_stopped(
    server: Server, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "file"
    server.break_after = 300_000
    with pytest.raises(DataError, match="run again to continue"):
        download(url(server), target, SHA256)
    assert not target.exists()
    server.break_after = None
    assert download(url(server), target, SHA256).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_file_that_has_changed_since_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.break_after = 300_000
    with pytest.raises(DataError, match="run again to continue"):
        download(url(server), tmp_path / "file")
    part = tmp_path / "file.part"
    part.write_bytes(bytes(len(part.read_bytes())))  # what the older version was like
    server.break_after, server.version = None, '"two"'
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.understands_ranges = False
    (tmp_path / "file.part").write_bytes(b"left over")
    assert download(url(server), tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert download(url(server), tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_another_content_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"sha256 is {SHA256}, expected 00"):
        download(url(server), tmp_path / "file", "00")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_download_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        download(url(server), tmp_path / "file", SHA256)
    assert len(server.ranges) == 1


def test_an_http_error_and_an_unreachable_server_are_one_line(
    server: Server, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="/missing: the server answers 404"):
        download(url(server, "/missing"), tmp_path / "file")
    with pytest.raises(DataError, match="cannot be downloaded"):
        download("http://127.0.0.1:1/file", tmp_path / "file", timeout=2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "downloads").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write .*downloads: File exists"):
        download("http://127.0.0.1:9/a", tmp_path / "downloads" / "a")
