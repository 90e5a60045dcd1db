"""Processes that wait for each other, reject each other, and detect lost ones; here as threads."""

import contextlib
import re
import socket
import threading
import time

import pytest

from lcm_jax.errors import Unavailable, UserError
from lcm_jax.parallel import roll_call, roll_list
from lcm_jax.parallel.processes import ROLL_CALL, Place, Processes
from lcm_jax.parallel.roll_call import RollCall
from lcm_jax.parallel.roll_list import proof


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Member(threading.Thread):
    """One process: its printed lines, its error, and the messages about lost processes."""

    def __init__(self, address, process, count, wait=20.0, token=""):
        super().__init__(daemon=True)
        self.given = (address, process, count)
        self.wait, self.said, self.lost, self.error, self.call, self.token = wait, [], [], None, None, token
        self.heard = threading.Event()
        self.start()

    def run(self):
        try:
            self.call = RollCall(
                *self.given,
                wait=self.wait,
                say=self.said.append,
                how="Start it.",
                on_loss=self.on_loss,
                token=self.token,
            )
        except UserError as error:
            self.error = str(error)

    def on_loss(self, why):
        self.lost.append(why)
        self.heard.set()


def together(address, count, **options):
    members = [Member(address, i, count, **options) for i in range(count)]
    for member in members:
        member.join(20)
        assert member.call, member.error
    return members


def test_all_come_and_leave_in_any_order(address):
    members = together(address, 4)
    leaving = [threading.Thread(target=members[i].call.leave) for i in (2, 0, 3, 1)]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(20)
        assert not thread.is_alive()
    time.sleep(0.1)
    assert [member.lost for member in members] == [[]] * 4


def test_a_coordinator_of_jax_that_can_not_be_reached_is_told_to_all(address):
    host, _, port = address.rpartition(":")
    first = Member(address, 0, 2)
    said = "JAX can't connect to .*: Connection refused; process 0 is running, so is its port"
    with pytest.raises(Unavailable, match=said):
        Processes(Place(f"{host}:{int(port) + ROLL_CALL}", 1, 2), wait=1)
    assert first.heard.wait(20)
    assert re.search(f"process 1 on .* has ended: {said}", first.lost[0])


def test_who_is_missing_is_said(address, monkeypatch):
    monkeypatch.setattr(roll_call, "SAY_EVERY", 0.2)
    late = [Member(address, i, 4) for i in (3, 0)]
    time.sleep(1.5)
    said = late[1].said[-1]
    assert said.startswith("Waiting for 2 of 4 processes: 1, 2 (connected: 0 on ")
    assert ", 3 on " in said
    assert said.endswith("). Start it.")
    assert "process 0 prints which" in late[0].said[-1]
    late += [Member(address, i, 4) for i in (1, 2)]
    for member in late:
        member.join(20)
        assert member.call, member.error


def test_waiting_in_vain_ends_in_one_line(address):
    alone = Member(address, 0, 3, wait=0.5)
    alone.join(20)
    assert alone.error.startswith("timed out waiting for 2 of 3 processes: 1, 2 (connected: 0 on ")


def test_a_list_that_does_not_answer_is_named(address):
    nobody = Member(address, 1, 2, wait=0.1)
    nobody.join(20)
    assert nobody.error.startswith("process 0 at 127.0.0.1, port ")
    assert "does not answer (Connection refused); is it running, and is the port open?" in nobody.error


def test_a_port_that_is_taken_is_one_line(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        first = Member(address, 0, 2, wait=0.1)
        first.join(20)
    assert "can't be opened here: Address already in use; is an old run still running?" in first.error


@pytest.mark.parametrize(
    ("process", "count", "said"),
    [
        (1, 3, "it expects 3 processes, process 0 expects 2; give all the same number"),
        (0, 2, "has that number; give each its own"),
        (99, 2, "process 0 refused process 99 on .*: its number must be in 0..1, since the run has 2 processes"),
        (1.0, 2, "process 0 received an invalid message: a message: process is 1.0; supported: a whole number"),
        ("1", 2, "process is '1'; supported: a whole number"),
    ],
)
def test_one_that_does_not_belong_there_is_refused(address, monkeypatch, process, count, said):
    Member(address, 0, 2)
    time.sleep(0.3)
    monkeypatch.setattr(roll_call, "RollList", lambda *_: None)  # a second process 0 is on another host
    stranger = Member(address, process, count)
    stranger.join(20)
    assert re.search(said, stranger.error)


def test_whatever_else_connects_does_no_harm(address, monkeypatch):
    monkeypatch.setattr(roll_list, "INTRODUCE", 0.5)
    monkeypatch.setattr(roll_list, "STRANGERS", 8)
    first = Member(address, 0, 2)
    time.sleep(0.3)
    deep = b"[" * 100_000
    named = b'{"process": 1, "of": 2, "host": "%s", "proof": "%s"}\n'
    idle = []
    for sent in (
        *(b"GET / HTTP/1.1\r\n\r\n", b'{"process": "x"}\n', b"[]\n", b"", b"\xff\n", b"{}\n", b'{"done": true}\n'),
        *(deep, deep + b"\n", b"x" * 2**20, b"\n" * 5000, b"[" * 3000 + b"\n", b'{"process": 1e999}\n'),
        *(named % (b"\\ud800\\u001b", b"x"), named % (b"h" * 5000, b"x"), b'{"process": %s}\n' % (b"9" * 1000)),
    ):
        connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        idle.append(socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))))
    for connection in idle:  # as soon as they are too many, or are silent for too long
        connection.settimeout(20)
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass
        connection.close()
    second = Member(address, 1, 2)
    for member in (first, second):
        member.join(20)
        assert member.call, member.error
    for junk in (b"junk", b"[" * 100_000):  # when all are there, neither a stranger nor a broken process ends the list
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            connection.sendall(junk + b"\n")
    assert not first.lost
    assert first.call._list.is_alive()
    second.call._socket.sendall(b'{"else": 1}\n')
    assert first.heard.wait(20)
    assert first.lost[0].startswith("process 1 on ")


def test_a_line_without_an_end_is_not_kept(address):
    Member(address, 0, 2)
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.settimeout(5)  # before it has been silent for too long
        connection.sendall(b"[" * (roll_list.LINE + 1))
        lines = connection.makefile("rb")
        assert b"challenge" in lines.readline()
        assert b"process 0 received an invalid message: a message is longer than 8192 bytes" in lines.readline()


@pytest.mark.parametrize(("token", "its"), [("secret", ""), ("", "secret"), ("secret", "Secret")])
def test_one_without_the_token_of_the_job_is_refused(address, token, its):
    first = Member(address, 0, 2, token=token)
    time.sleep(0.3)
    stranger = Member(address, 1, 2, token=its)
    stranger.join(20)
    assert (
        "its LCM_JAX_JOB_TOKEN differs from that of process 0; set the same in all processes of a run" in stranger.error
    )
    assert "ecret" not in stranger.error
    second = Member(address, 1, 2, token=token)
    for member in (first, second):
        member.join(20)
        assert member.call, member.error


def test_a_proof_is_good_for_one_challenge_and_one_introduction():
    given = ("secret", "challenge", 1, 2, "host")
    proofs = {proof(*given)} | {proof(*given[:i], other, *given[i + 1 :]) for i, other in enumerate("abcde")}
    assert len(proofs) == 6


@pytest.mark.parametrize(
    ("host", "where", "why"),
    [
        ("127.0.0.1", ["127.0.0.1"], ""),
        ("192.0.2.1", ["0.0.0.0"], "192.0.2.1 is not an address of this machine (NAT, a container?)"),
        ("no-such-host.invalid", ["0.0.0.0"], "no-such-host.invalid can't be resolved on this machine"),
        ("me", ["0.0.0.0"], "me resolves to a loopback address on this machine"),
    ],
)
def test_it_listens_where_the_coordinator_is(monkeypatch, host, where, why):
    if host == "me":  # /etc/hosts of Debian
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    servers, reason = roll_list.listen(host, 0)
    assert [server.getsockname()[0] for server in servers] == where
    assert reason == why
    for server in servers:
        server.close()


def test_a_lost_process_is_told_to_all_others(address):
    members = together(address, 3)
    members[1].call._socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a killed one
    for i in (0, 2):
        assert members[i].heard.wait(20)
        assert members[i].lost[0].startswith("process 1 on ")
        assert members[i].lost[0].endswith(" was lost without an error message (killed?)")


def test_why_a_process_ended_is_told(address):
    members = together(address, 3)
    members[2].call.leave("its disk is full")
    for i in (0, 1):
        assert members[i].heard.wait(20)
        assert members[i].lost[0].endswith(" has ended: its disk is full")
    assert members[2].lost == []


def test_one_that_leaves_before_all_are_there_may_come_again(address):
    first = Member(address, 0, 3)
    Member(address, 1, 3, wait=0.3).join(20)
    time.sleep(0.2)
    again = [Member(address, i, 3) for i in (1, 2)]
    for member in (first, *again):
        member.join(20)
        assert member.call, member.error
