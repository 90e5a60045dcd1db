"""The processes of a run find each other before JAX starts, and learn at once when one of them is lost.

JAX itself waits for missing processes without a word, and ends minutes after a lost one with a stack dump. Here
process 0 keeps a list (`roll_list.py`): each process connects to it, says its number and host, and stays connected
until it is done. Messages are JSON, one a line:

    {"challenge": "8f…"}                     the list's first words to whatever connects
    {"process": 3, "of": 4, "host": "b", "proof": "…"}      from each process then; the proof is of the job's token
    {"refused": "why"} or {"busy": "why"}    the list's answer to one that does not belong to it, or comes too late
    {"all": true}                            to each process, when all are there
    {"done": true} or {"failed": "why"}      from a process before it leaves; without it, it was lost
    {"lost": "who and why"}                  to all others then
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from lcm_jax.errors import Unavailable, UserError, plain
from lcm_jax.parallel.roll_list import LINE, RollList, keep_alive, parse, proof, send

SAY_EVERY = 15.0  # seconds between lines that say who is missing
Say = Callable[[str], None]


class RollCall:
    """One process's place in the list; process 0 keeps the list as well."""

    def __init__(
        self, address: str, process: int, count: int, *, wait: float, say: Say, how: str, on_loss: Say, token: str = ""
    ) -> None:
        """Waits until all processes are there.

        Args:
          address: HOST:PORT of the list, on process 0's host.
          process, count: number of this process, and of all.
          wait: seconds.
          say: prints a line.
          how: to start a process that is missing.
          on_loss: called once all are there, in a thread of its own, with one line about a process that is lost.
          token: of the job; the list refuses a process that has another.

        Raises:
          UserError: some are missing after that time; the list refuses this process; its port is taken.
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
                self._lines = self._socket.makefile("rb")
                continue
            if "challenge" in answer:
                self._introduce(answer["challenge"])
            elif answer.get("all") is True:
                return
            elif "busy" in answer:
                raise Unavailable(answer["busy"])
            else:
                why = "process 0 ended while others were awaited, or something else answers at its port"
                raise UserError(answer.get("refused") or answer.get("lost") or why)

    def _introduce(self, challenge: str) -> None:
        host = socket.gethostname()
        shown = proof(self._token, challenge, self._process, self._count, host)
        with contextlib.suppress(OSError):  # a lost list is noticed where it is read from
            self._send({"process": self._process, "of": self._count, "host": host, "proof": shown})

    @property
    def interface(self) -> str:
        """The address that process 0 listens on, on process 0 itself; "" for several."""
        return self._list.interface if self._list else ""

    def leave(self, failed: str = "") -> None:
        """Leaves the list: done, or failed for this reason, which the others are told."""
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
        """The next message; {} when the list is gone."""
        try:
            line = self._lines.readline(LINE)
        except TimeoutError:
            raise
        except OSError:
            line = b""
        try:
            return parse(line) if line.endswith(b"\n") else {}
        except UserError:  # nothing that a list says
            return {}

    def _watch(self) -> None:
        message = self._receive()
        self._close()
        if not self._leaving:
            self._on_loss(message.get("lost", "process 0 is gone, without a word (killed?)"))


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
            keep_alive(connection)
            return connection
