"""The list of a run's processes, which process 0 keeps for `roll_call.py`.

Its port is open to anyone, so input is not trusted: the length of lines and the types of values are checked, and
connections that do not introduce themselves are closed, without effect on the run. If the launcher sets a token, a
process must prove that it knows it; the token itself is never sent.
"""

import contextlib
import errno
import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import threading
import time
from typing import Any

from lcm_jax.errors import Unavailable, UserError, plain
from lcm_jax.host import json_file

TOKEN = "LCM_JAX_JOB_TOKEN"  # environment variable: the same in all processes of a run, or unset in all
LINE = 8192  # maximum bytes per message; fits 500 characters, each of up to 12 bytes in JSON
INTRODUCE = 10.0  # seconds within which a connection must identify its process
STRANGERS = 64  # unidentified connections, in addition to one for each missing process
KINDS = {
    **{"process": json_file.INTEGER, "of": json_file.INTEGER, "host": json_file.TEXT, "proof": json_file.TEXT},
    **{"failed": json_file.TEXT, "done": json_file.BOOLEAN, "all": json_file.BOOLEAN},
    **dict.fromkeys(("challenge", "refused", "busy", "lost"), json_file.TEXT),
}


def proof(token: str, challenge: str, process: int, count: int, host: str) -> str:
    """Returns an HMAC-SHA256 with the token over challenge and introduction, which proves knowledge of the token."""
    text = json.dumps([challenge, process, count, host])
    return hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()


def parse(line: bytes) -> dict[str, Any]:
    """Parses a line as a message; raises UserError if it is invalid."""
    if len(line) > LINE:
        raise UserError(f"a message is longer than {LINE} bytes")
    return json_file.parse(line, "a message", KINDS)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message as one line of JSON; raises OSError."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def keep_alive(connection: socket.socket) -> None:
    """Enables TCP keepalive, which detects a dead host after 45 seconds of silence."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # not available on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(host: str, port: int) -> tuple[list[socket.socket], str]:
    """Opens a port on the interfaces that have the addresses of `host`, or on all of them if that is not possible.

    Returns: (sockets, why it listens on all interfaces, or "").
    Raises: Unavailable if the port can't be opened, for example because it is in use.
    """
    try:
        found = {info[4][0]: info[0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        return [_open("", port)], f"{host} can't be resolved on this machine"
    local = all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
    if local and host != "localhost" and host not in found:  # Debian's /etc/hosts maps the machine's name to loopback
        return [_open("", port)], f"{host} resolves to a loopback address on this machine"
    opened = []
    for address, family in found.items():
        try:
            opened.append(_open(str(address), port, family))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    if not opened or (len(opened) < len(found) and not local):
        for server in opened:
            server.close()
        return [_open("", port)], f"{host} is not an address of this machine (NAT, a container?)"
    return opened, ""


def _open(address: str, port: int, family: int = socket.AF_INET) -> socket.socket:
    try:
        server = socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
        why = os.strerror(error.errno or 0)
        raise Unavailable(f"port {port} can't be opened here: {why}; is an old run still running?") from None
    server.setblocking(False)
    return server


class RollList(threading.Thread):
    """Thread that tracks which processes have connected and which have left.

    Attributes:
      everywhere: why it listens on all interfaces; "" if it does not.
      interface: the only IPv4 address that it listens on; "" if there is none or several.
    """

    def __init__(self, address: str, count: int, how: str, token: str = "") -> None:
        """Args: HOST:PORT; the number of processes; how to start a missing one, for messages; the job's token."""
        super().__init__(daemon=True)
        self._count, self._how, self._token = count, how, token
        self._selector = selectors.DefaultSelector()
        self._hosts: dict[int, str] = {}
        self._left: set[int] = set()
        self._strangers: dict[_Peer, float] = {}  # unidentified connections and their deadlines, oldest first
        self._called = self._over = False
        host, _, port = address.rpartition(":")
        self._servers, self.everywhere = listen(host, int(port))
        one = len(self._servers) == 1 and self._servers[0].family == socket.AF_INET and not self.everywhere
        self.interface = self._servers[0].getsockname()[0] if one else ""
        for server in self._servers:
            self._selector.register(server, selectors.EVENT_READ)

    def missing(self) -> str:
        """Returns a text: which processes are missing, which have connected, and how to start one."""
        missing = [i for i in range(self._count) if i not in self._hosts]
        here = ", ".join(f"{i} on {host}" for i, host in sorted(self._hosts.items())[:8])
        more = ", …" if len(self._hosts) > 8 else ""
        numbers = ", ".join(map(str, missing[:16])) + (", …" if len(missing) > 16 else "")
        return f"{len(missing)} of {self._count} processes: {numbers} (connected: {here}{more}). {self._how}"

    def run(self) -> None:
        """Serves until all processes have left, or process 0 has left before all had connected."""
        while len(self._left) < self._count and not self._over:
            for key, _ in self._selector.select(self._patience()):
                if key.data is None:
                    self._accept(key.fileobj)
                elif key.data.open:
                    self._read(key.data)
            while self._patience() == 0:
                self._close(next(iter(self._strangers)))
        for peer in self._peers():
            peer.socket.close()
        for server in self._servers:
            server.close()
        self._selector.close()

    def _patience(self) -> float | None:
        """Returns seconds until the next deadline of an unidentified connection; None if there is none."""
        return max(0.0, next(iter(self._strangers.values())) - time.monotonic()) if self._strangers else None

    def _peers(self) -> list["_Peer"]:
        return [key.data for key in list(self._selector.get_map().values()) if key.data]

    def _accept(self, server: Any) -> None:
        if len(self._strangers) >= STRANGERS + self._count - len(self._hosts):
            self._close(next(iter(self._strangers)))  # the oldest: real processes introduce themselves at once
        try:
            connection, _ = server.accept()
            connection.setblocking(False)  # the socket's buffer holds all that is ever sent to it
            keep_alive(connection)
        except OSError:  # already closed, or the limit of open files is reached
            time.sleep(0.01)
            return
        peer = _Peer(connection)
        self._strangers[peer] = time.monotonic() + INTRODUCE
        self._selector.register(connection, selectors.EVENT_READ, peer)
        peer.send({"challenge": peer.challenge})

    def _read(self, peer: "_Peer") -> None:
        try:
            for message in peer.read():
                if peer.process is None:
                    if not self._enter(peer, message):
                        break
                elif "failed" in message:
                    peer.reason = plain(message["failed"])
                elif message.get("done"):
                    self._left.add(peer.process)
                else:
                    raise UserError("it is not a message of a process")
        except UserError as error:  # not a process of a run, perhaps a port scanner
            peer.refuse(f"process 0 received an invalid message: {error}")
        if not peer.open:
            self._close(peer)

    def _close(self, peer: "_Peer") -> None:
        peer.open = False
        self._strangers.pop(peer, None)
        self._selector.unregister(peer.socket)
        peer.socket.close()
        if peer.process is None or peer.process in self._left:
            return
        host = self._hosts.pop(peer.process)
        self._over = peer.process == 0 and not self._called
        if self._called:
            self._left.add(peer.process)
            why = f"has ended: {peer.reason}" if peer.reason else "was lost without an error message (killed?)"
            self._tell_all({"lost": f"process {peer.process} on {host} {why}"})

    def _tell_all(self, message: dict[str, Any]) -> None:
        for peer in self._peers():
            if peer.process is not None:
                peer.send(message)

    def _enter(self, peer: "_Peer", message: dict[str, Any]) -> bool:
        """Adds a process to the list, or refuses it; returns whether it was added."""
        if missing := {"process", "of", "host", "proof"} - message.keys():
            raise UserError(f"the introduction lacks {min(missing)!r}")
        process, count, host = message["process"], message["of"], message["host"]
        shown, expected = plain(host, 64), proof(self._token, peer.challenge, process, count, host)
        answer, why = "refused", ""
        if not hmac.compare_digest(expected.encode(), message["proof"].encode(errors="replace")):
            why = f"its {TOKEN} differs from that of process 0; set the same in all processes of a run, or none"
        elif count != self._count:
            why = f"it expects {count} processes, process 0 expects {self._count}; give all the same number"
        elif not 0 <= process < self._count:
            why = f"its number must be in 0..{self._count - 1}, since the run has {self._count} processes"
        elif process in self._hosts:
            why = f"another process on {self._hosts[process]} has that number; give each its own"
        elif self._called:
            answer, why = "busy", "the run has lost that process and is ending; restart the run"
        if why:
            peer.refuse(f"process 0 refused process {plain(process, 20)} on {shown}: {why}", answer)
            return False
        peer.process = process
        self._strangers.pop(peer)
        self._hosts[process] = shown
        if len(self._hosts) == self._count:
            self._called = True
            self._tell_all({"all": True})
        return True


class _Peer:
    """A connection to the list."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.open = connection, True
        self.challenge = secrets.token_hex(16)
        self.process: int | None = None
        self.reason = ""
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """Returns the messages of the complete lines received; raises UserError for an invalid one."""
        try:
            received = self.socket.recv(LINE)
        except BlockingIOError:
            return []
        except OSError:
            received = b""
        self.open = bool(received)
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > LINE:
            raise UserError(f"a message is longer than {LINE} bytes")
        return [parse(line) for line in lines]

    def refuse(self, why: str, answer: str = "refused") -> None:
        """Sends the answer and marks the connection to be closed."""
        self.send({answer: why})
        self.open = False

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # reading detects a lost connection
            send(self.socket, message)
