"""One rank's end is every rank's end, at once and with one message.

A rank that raises, is killed or loses its machine leaves the others waiting in a collective for
the back-end's timeout, and then each of them complains. Here every rank holds a connection to rank
0 that is silent while all is well. The operating system closes a dead process's connections, and
probes those to a lost machine, so no rank has to prove that it is alive: one that computes or
writes for minutes is never taken for dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from megaegpt.errors import LaunchError, MegaEGPTError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.network import address_towards
from megaegpt.parallel.together import OtherRankError, broadcast_object, raising_together

GRACE_S = 10.0
"""Seconds that a rank has to leave by itself after it has heard of another's end."""

_HEARING_S = 5.0  # for a report to rank 0 and its answer
_CONNECTING_S = 60.0
_LINGERING_S = 0.5
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a lost machine: 25 s
_LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|gloo|nccl|timed out", re.I)


class RankWatch:
    """A context manager around what all ranks do together; collective at its beginning.

    An exception inside ends all ranks. The first rank that raises keeps its exception; on the
    others, whatever they run into because of it, the context raises :class:`SystemExit` without a
    word, or ends the process after :data:`GRACE_S` if it is stuck. If a rank dies without an
    exception, rank 0 says so (without rank 0, the next rank of each machine does).

    Raises:
        LaunchError: a rank cannot connect to rank 0.
    """

    def __init__(self, grid: ProcessGrid) -> None:
        self._grid = grid
        self._verdict = threading.Event()
        self._lock = threading.Lock()
        self._leaving = False
        self._speaker: int | None = None
        """The rank whose message is shown, once there is one; -1: it was shown for a dead rank."""
        self._peers: dict[socket.socket, int] = {}
        self._listener = threading.Thread(target=self._listen, name="rank watch", daemon=True)

    def __enter__(self) -> RankWatch:
        if self._grid.world_size == 1:
            return self
        if self._grid.is_main:
            self._accept_all()
        else:
            self._connect()
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._grid.world_size == 1:
            return
        if error is None:
            self._leaving = True
            self._tell_all({"left": self._grid.rank})
            return
        may_speak = self._may_speak(error)
        if self._grid.is_main:
            # What another rank says now must be read: a connection closed before that takes back
            # what was sent over it, and the rank would miss who speaks.
            self._listener.join(_LINGERING_S)
        if not may_speak:
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
        if not isinstance(error, MegaEGPTError | SystemExit | KeyboardInterrupt):
            error.add_note(f"on rank {self._grid.rank} of {self._grid.world_size}, {_host()}")

    # -- connections ------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        token = secrets.token_hex(16)
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(
            ("", 0),
            family=family,
            dualstack_ipv6=family == socket.AF_INET6,
            backlog=self._grid.world_size,
        )
        # Where torchrun's rendezvous is on another machine, MASTER_ADDR is not that of rank 0.
        own = address_towards(os.environ["MASTER_ADDR"]) or socket.gethostname()
        broadcast_object(lambda: (own, server.getsockname()[1], token), self._grid)
        server.settimeout(_CONNECTING_S)
        with server, raising_together(self._grid):
            while len(self._peers) < self._grid.world_size - 1:
                try:
                    peer = _probed(server.accept()[0])
                except TimeoutError:
                    connected = {0, *self._peers.values()}
                    missing = sorted(set(range(self._grid.world_size)) - connected)
                    raise LaunchError(f"ranks {missing} did not connect to rank 0") from None
                greeting = _read_line(peer)
                if greeting.get("token") == token:
                    self._peers[peer] = greeting["rank"]
                else:
                    peer.close()

    def _connect(self) -> None:
        address, port, token = broadcast_object(lambda: ("", 0, ""), self._grid)
        with raising_together(self._grid):
            peer = _first_connection((os.environ["MASTER_ADDR"], address), port)
            self._peers[_probed(peer)] = 0
            _send(peer, {"token": token, "rank": self._grid.rank})

    def _listen(self) -> None:
        """React to the messages of all connections, until every one of them has ended."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._heard(key.data, _read_line(key.data)):
                        selector.unregister(key.data)

    def _heard(self, peer: socket.socket, message: dict[str, Any]) -> bool:
        """React; False if nothing more comes from there."""
        rank = self._peers[peer]
        if "failed" in message:  # rank 0 hears it and decides
            self._decide(rank)
        elif "speaker" in message:  # the others hear what it has decided
            self._settle(message["speaker"])
        elif "left" not in message:
            self._lost(rank)
        return "failed" in message or "speaker" in message

    def _lost(self, rank: int) -> None:
        """A connection ended without a farewell."""
        if self._leaving or self._speaker is not None:
            return
        message = (
            f"error: rank {rank} of {self._grid.world_size} ended without a message: killed, out "
            "of memory, or its machine is gone; --resume goes on from the last checkpoint"
        )
        if self._grid.is_main:
            self._decide(-1, message)
            return
        if self._grid.rank == 1 or os.environ.get("LOCAL_RANK") == "0":
            print(message, file=sys.stderr, flush=True)
        self._settle(-1)

    # -- who speaks -------------------------------------------------------------------------------

    def _may_speak(self, error: BaseException) -> bool:
        """Whether ``error`` is what the user should see, and this the rank to show it."""
        rank = self._grid.rank
        consequence = isinstance(error, OtherRankError) or (
            isinstance(error, RuntimeError | OSError) and bool(_LOST_PEER.search(str(error)))
        )
        if consequence:  # the rank at fault is about to be heard of
            self._verdict.wait(_HEARING_S)
        if self._grid.is_main:
            self._decide(0)
        elif self._speaker is None:
            self._tell_all({"failed": rank})
            self._verdict.wait(_HEARING_S)
        if getattr(error, "on_every_rank", False):
            return True  # the program lets rank 0 alone show it
        return self._speaker in (rank, None)

    def _decide(self, speaker: int, message: str = "") -> None:
        """On rank 0: the first that asks is the speaker, and everyone is told."""
        with self._lock:
            if self._speaker is not None:
                return
            self._speaker = speaker
        if message:
            print(message, file=sys.stderr, flush=True)
        self._tell_all({"speaker": speaker})
        self._settle(speaker)

    def _settle(self, speaker: int) -> None:
        self._speaker = speaker
        self._verdict.set()
        if not self._leaving:
            timer = threading.Timer(GRACE_S, _end_process)
            timer.daemon = True
            timer.start()

    def _tell_all(self, message: dict[str, Any]) -> None:
        for peer in self._peers:
            _send(peer, message)


def _end_process() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _first_connection(addresses: Iterable[str], port: int) -> socket.socket:
    failures = []
    for address in dict.fromkeys(addresses):
        try:
            return socket.create_connection((address, port), timeout=_CONNECTING_S / 3)
        except OSError as error:
            failures.append(f"{address}:{port} ({error})")
    raise LaunchError(f"{_host()} cannot reach rank 0 at {' nor at '.join(failures)}")


def _probed(peer: socket.socket) -> socket.socket:
    """Let the operating system find out if the other machine is still there."""
    peer.settimeout(_HEARING_S)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # gone, which the listener learns too
        peer.sendall(json.dumps(message).encode() + b"\n")


def _read_line(peer: socket.socket) -> dict[str, Any]:
    """The next message; empty if the connection has ended or talks nonsense."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = peer.recv(1)
            if not byte or len(line) > 1000:
                return {}
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _host() -> str:
    return socket.gethostname()
