"""Random bytes at the roll call's port: the processes still find each other."""

import socket
import threading
import time

from mutations import damage_bytes, damage_json, pick

from lcm_jax.parallel.roll_call import RollCall

HELLO = {"process": 1, "of": 2, "host": "b"}
MESSAGES = [HELLO, {**HELLO, "process": 99}, {**HELLO, "process": 1.0}, {"done": True}, {"failed": "x"}, {"all": True}]


def test_roll_call(fuzz, monkeypatch):
    broken = []
    monkeypatch.setattr(threading, "excepthook", lambda seen: broken.append(repr(seen.exc_value)))

    def case(rng, place):
        text, what = damage_json(rng, pick(rng, MESSAGES))
        data = text.encode("utf-8", "surrogatepass") + b"\n"
        if rng.random() < 0.5:
            data, what = damage_bytes(rng, data)
        yield f"{what}: {data[:80]!r}"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        ends = []
        first = threading.Thread(target=lambda: ends.append(join(port, 0)))
        first.start()
        send(port, data + pick(rng, [b"", b"\n"]))
        ends.append(join(port, 1))
        first.join()
        assert not broken, broken.pop()
        assert ends == ["", ""], ends

    fuzz(case, share=0.05)


def join(port, process) -> str:
    """Takes part as one of two processes. Returns the error, "" for none."""
    try:
        RollCall(f"127.0.0.1:{port}", process, 2, wait=3, say=print, how="", on_loss=print).leave()
    except Exception as error:
        return repr(error)
    return ""


def send(port, data) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
                connection.sendall(data)
                return
        except (ConnectionError, TimeoutError):  # not open yet; or closed on what is too long
            if time.monotonic() > deadline or threading.active_count() < 2:
                return
            time.sleep(0.01)
