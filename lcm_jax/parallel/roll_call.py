"""The processes of a run find each other before JAX starts, and learn at once when one of them is lost.

JAX itself waits for missing processes without a word, and ends minutes after a lost one with a stack dump. Here
process 0 keeps a list: each process connects to it, says its number and host, and stays connected until it is done.
Messages are JSON, one a line:

    {"process": 3, "of": 4, "host": "b"}     from each process, at first
    {"refused": "why"}                       the list's answer to one that does not belong to it
    {"all": true}                            to each process, when all are there
    {"done": true} or {"failed": "why"}      from a process before it leaves; without it, it was lost
    {"lost": "who and why"}                  to all others then
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from lcm_jax.errors import Unavailable, UserError

SAY_EVERY = 15.0  # seconds between lines that say who is missing
Say = Callable[[str], None]


class RollCall:
    """One process's place in the list; process 0 keeps the list as well."""

    def __init__(
        self, address: str, process: int, count: int, *, wait: float, say: Say, how: str, on_loss: Say
    ) -> None:
        """Waits until all processes are there.

        Args:
          address: HOST:PORT of the list, on process 0's host.
          process, count: number of this process, and of all.
          wait: seconds.
          say: prints a line.
          how: to start a process that is missing.
          on_loss: called once all are there, in a thread of its own, with one line about a process that is lost.

        Raises:
          UserError: some are missing after that time; the list refuses this process; its port is taken.
        """
        self._on_loss, self._leaving = on_loss, False
        self._list = _List(address, count, how) if process == 0 else None
        if self._list:
            self._list.start()
        host, _, port = address.rpartition(":")
        self._socket = _connect((host, int(port)), wait, say)
        self._lines = self._socket.makefile(encoding="utf-8")
        self._send({"process": process, "of": count, "host": socket.gethostname()})
        try:
            self._wait(time.monotonic() + wait, say)
        except BaseException:
            self.leave("it waited no longer for others")
            self._close()
            raise
        self._socket.settimeout(None)
        threading.Thread(target=self._watch, daemon=True).start()

    def _wait(self, deadline: float, say: Say) -> None:
        while True:
            self._socket.settimeout(max(0.01, min(SAY_EVERY, deadline - time.monotonic())))
            try:
                answer = self._receive()
            except TimeoutError:
                missing = self._list.missing() if self._list else "some of the processes; process 0 says which"
                if time.monotonic() >= deadline:
                    raise Unavailable(f"waited in vain for {missing}") from None
                say(f"Waiting for {missing}")
                self._lines.close()  # of no use after a timeout; the list writes whole lines, and seldom
                self._lines = self._socket.makefile(encoding="utf-8")
                continue
            if "all" in answer:
                return
            raise UserError(answer.get("refused") or answer.get("lost") or "process 0 ended while others were awaited")

    def leave(self, failed: str = "") -> None:
        """Leaves the list: done, or failed for this reason, which the others are told."""
        self._leaving = True
        with contextlib.suppress(OSError):  # the list may be gone already
            self._send({"failed": failed} if failed else {"done": True})
            self._socket.shutdown(socket.SHUT_WR)
        if self._list:
            self._list.join(5.0 if failed else None)

    def _close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _send(self, message: dict[str, Any]) -> None:
        _send(self._socket, message)

    def _receive(self) -> dict[str, Any]:
        """The next message; {} when the list is gone."""
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise
        except OSError:
            line = ""
        return json.loads(line) if line.endswith("\n") else {}

    def _watch(self) -> None:
        message = self._receive()
        self._close()
        if not self._leaving:
            self._on_loss(message.get("lost", "process 0 is gone, without a word (killed?)"))


class _List(threading.Thread):
    """What process 0 knows of the others; one thread that waits for what they say."""

    def __init__(self, address: str, count: int, how: str) -> None:
        super().__init__(daemon=True)
        self._count, self._how = count, how
        self._selector = selectors.DefaultSelector()
        self._hosts: dict[int, str] = {}
        self._left: set[int] = set()
        self._called = False
        port = int(address.rpartition(":")[2])
        try:
            self._server = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            raise Unavailable(
                f"port {port} can't be opened here: {os.strerror(error.errno or 0)}; is an old run alive?"
            ) from None
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)

    def missing(self) -> str:
        """Which processes are missing, who is there, and how to start one."""
        missing = [i for i in range(self._count) if i not in self._hosts]
        here = ", ".join(f"{i} on {host}" for i, host in sorted(self._hosts.items())[:8])
        more = ", …" if len(self._hosts) > 8 else ""
        numbers = ", ".join(map(str, missing[:16])) + (", …" if len(missing) > 16 else "")
        return f"{len(missing)} of {self._count} processes: {numbers} (here: {here}{more}). {self._how}"

    def run(self) -> None:
        """Ends when all have left."""
        while len(self._left) < self._count:
            for key, _ in self._selector.select():
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.data)
        for peer in self._peers():
            peer.socket.close()
        self._server.close()
        self._selector.close()

    def _peers(self) -> list["_Peer"]:
        return [key.data for key in list(self._selector.get_map().values()) if key.data]

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        _keep_alive(connection)
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: "_Peer") -> None:
        try:
            for message in peer.read():
                if peer.process is None:
                    self._enter(peer, message["process"], message["of"], message["host"])
                elif "failed" in message:
                    peer.reason = message["failed"]
                else:
                    self._left.add(peer.process)
        except (ValueError, KeyError, TypeError):
            peer.open = False  # none of ours: whatever looks for open ports
        if peer.open:
            return
        self._selector.unregister(peer.socket)
        peer.socket.close()
        if peer.process is None or peer.process in self._left:
            return
        host = self._hosts.pop(peer.process)
        if self._called:
            self._left.add(peer.process)
            why = f"has ended: {peer.reason}" if peer.reason else "is gone, without a word (killed?)"
            for other in self._peers():
                _try_send(other.socket, {"lost": f"process {peer.process} on {host} {why}"})

    def _enter(self, peer: "_Peer", process: int, count: int, host: str) -> None:
        if count != self._count:
            why = f"it is one of {count} processes, process 0 one of {self._count}; give all the same number"
        elif process in self._hosts:
            why = f"there is another one of that number, on {self._hosts[process]}; give each its own"
        else:
            peer.process = process
            self._hosts[process] = host
            if len(self._hosts) == self._count:
                self._called = True
                for other in self._peers():
                    _try_send(other.socket, {"all": True})
            return
        _try_send(peer.socket, {"refused": f"process {process} on {host} is refused by process 0: {why}"})


class _Peer:
    """A connection of the list."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.open = connection, True
        self.process: int | None = None
        self.reason = ""
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """The whole lines that are there."""
        try:
            received = self.socket.recv(65536)
        except OSError:
            received = b""
        self.open = bool(received)
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(line) for line in lines]


def _connect(address: tuple[str, int], wait: float, say: Say) -> socket.socket:
    deadline, said = time.monotonic() + wait, time.monotonic()
    while True:
        try:
            connection = socket.create_connection(address, timeout=5)
        except OSError as error:
            reason = error.strerror or str(error)
            where = f"process 0 at {address[0]}, port {address[1]}"
            if time.monotonic() >= deadline:
                raise Unavailable(f"{where} does not answer ({reason}); does it run, and is the port open?") from None
            if time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                say(f"Waiting for {where} ({reason})")
            time.sleep(0.5)
        else:
            _keep_alive(connection)
            return connection


def _keep_alive(connection: socket.socket) -> None:
    """A host that is gone without a word is noticed after 45 seconds of silence."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _try_send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a lost one is noticed where it is read from
        _send(connection, message)
