"""Lets the processes of a run find each other before JAX starts, and detects lost processes at once.

JAX waits silently for missing processes, and ends with a stack dump minutes after a process is lost. Here process 0
keeps a list (`roll_list.py`): each process connects to it, sends its number and host, and stays connected until it is
done. Messages are JSON, one per line:

    {"challenge": "8f…"}                     from the list to each new connection
    {"process": 3, "of": 4, "host": "b", "proof": "…"}      the process's reply; proves that it knows the job's token
    {"refused": "why"} or {"busy": "why"}    from the list to a process that does not belong to it, or is too late
    {"all": true}                            from the list to each process, when all have connected
    {"done": true} or {"failed": "why"}      from a process before it leaves; without it, the process was lost
    {"lost": "who and why"}                  from the list to the others, when a process failed or was lost
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from lcm_jax.errors import Unavailable, UserError, plain
from lcm_jax.parallel.roll_list import LINE, RollList, keep_alive, parse, proof, send

SAY_EVERY = 15.0  # seconds between messages about missing processes
Say = Callable[[str], None]


class RollCall:
    """One process's connection to the list; process 0 also runs the list."""

    def __init__(
        self, address: str, process: int, count: int, *, wait: float, say: Say, how: str, on_loss: Say, token: str = ""
    ) -> None:
        """Waits until all processes have connected.

        Args:
          address: HOST:PORT of the list, on process 0's host.
          process, count: this process's number, and the number of processes.
          wait: timeout in seconds.
          say: prints a line.
          how: how to start a missing process, for messages.
          on_loss: called in a separate thread with one line about a process that is lost after all have connected.
          token: the job's token; the list refuses a process with a different one.

        Raises:
          UserError: processes are missing after `wait`; the list refuses this process; the list's port is taken.
        """
        self._on_loss, self._leaving = on_loss, False
        self._process, self._count, self._token = process, count, token
        self._list = RollList(address, count, how, token) if process == 0 else None
        if self._list:
            if self._list.everywhere:
                say(f"The roll call listens on all interfaces: {self._list.everywhere}")
            self._list.start()
        host, _, port = address.rpartition(":")
        self._socket = _connect((host, int(port)), wait, say)
        self._lines = self._socket.makefile("rb")
        try:
            self._wait(time.monotonic() + wait, say)
        except BaseException:
            self.leave("it stopped waiting for other processes")
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
                missing = self._list.missing() if self._list else "some of the processes; process 0 prints which"
                if time.monotonic() >= deadline:
                    raise Unavailable(f"timed out waiting for {missing}") from None
                say(f"Waiting for {missing}")
                self._lines.close()  # unusable after a timeout; the list's lines are rare and come complete
                self._lines = self._socket.makefile("rb")
                continue
            if "challenge" in answer:
                self._introduce(answer["challenge"])
            elif answer.get("all") is True:
                return
            elif "busy" in answer:
                raise Unavailable(answer["busy"])
            else:
                why = "process 0 ended while it waited for others, or another program answers at its port"
                raise UserError(answer.get("refused") or answer.get("lost") or why)

    def _introduce(self, challenge: str) -> None:
        host = socket.gethostname()
        shown = proof(self._token, challenge, self._process, self._count, host)
        with contextlib.suppress(OSError):  # reading detects a lost list
            self._send({"process": self._process, "of": self._count, "host": host, "proof": shown})

    @property
    def interface(self) -> str:
        """On process 0, the only address that it listens on; "" if there are several, and in other processes."""
        return self._list.interface if self._list else ""

    def leave(self, failed: str = "") -> None:
        """Leaves the list: done, or failed with this reason, which is sent to the other processes."""
        self._leaving = True
        with contextlib.suppress(OSError):  # the list may be gone already
            self._send({"failed": plain(failed)} if failed else {"done": True})
            self._socket.shutdown(socket.SHUT_WR)
        if self._list:
            self._list.join(5.0 if failed else None)

    def _close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _send(self, message: dict[str, Any]) -> None:
        send(self._socket, message)

    def _receive(self) -> dict[str, Any]:
        """Returns the next message; {} if the connection is lost or the message is invalid."""
        try:
            line = self._lines.readline(LINE)
        except TimeoutError:
            raise
        except OSError:
            line = b""
        try:
            return parse(line) if line.endswith(b"\n") else {}
        except UserError:  # not a message of the list
            return {}

    def _watch(self) -> None:
        message = self._receive()
        self._close()
        if not self._leaving:
            self._on_loss(message.get("lost", "process 0 was lost without an error message (killed?)"))


def _connect(address: tuple[str, int], wait: float, say: Say) -> socket.socket:
    deadline, said = time.monotonic() + wait, time.monotonic()
    while True:
        try:
            connection = socket.create_connection(address, timeout=5)
        except OSError as error:
            reason = error.strerror or str(error)
            where = f"process 0 at {address[0]}, port {address[1]}"
            if time.monotonic() >= deadline:
                raise Unavailable(f"{where} does not answer ({reason}); is it running, and is the port open?") from None
            if time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                say(f"Waiting for {where} ({reason})")
            time.sleep(0.5)
        else:
            keep_alive(connection)
            return connection
