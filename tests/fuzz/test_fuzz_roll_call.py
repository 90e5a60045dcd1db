"""Bytes of strangers at the roll call's port: its processes find each other all the same."""

import socket
import threading

from mutations import damage_bytes, damage_json, pick

from lcm_jax.parallel.roll_call import RollCall

HELLO = {"process": 1, "of": 2, "host": "b"}
MESSAGES = [
    HELLO,
    {"done": True},
    {"failed": "why"},
    {"lost": "x"},
    {"all": True},
    {**HELLO, "process": 99},
    {**HELLO, "process": 1.0},
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_roll_call(fuzz, monkeypatch):
    broken = []
    monkeypatch.setattr(threading, "excepthook", lambda seen: broken.append(seen.exc_value))

    def case(rng, place):
        text, what = damage_json(rng, pick(rng, MESSAGES))
        data = text.encode("utf-8", "surrogatepass") + b"\n"
        if rng.random() < 0.5:
            data, what = damage_bytes(rng, data)
            data += pick(rng, [b"", b"\n"])
        yield f"{what}: {data[:80]!r}"
        address = f"127.0.0.1:{free_port()}"
        said = []
        first = threading.Thread(target=lambda: said.append(join(address, 0)), daemon=True)
        first.start()
        send(address, data)
        said.append(join(address, 1))
        first.join(5)
        assert not broken, f"{broken.pop()!r}"
        assert said == ["", ""], f"{said}"

    fuzz(case, share=0.05)


def join(address, process) -> str:
    try:
        RollCall(address, process, 2, wait=3, say=lambda _: None, how="", on_loss=lambda _: None).leave()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def send(address, data) -> None:
    host, port = address.split(":")
    for _ in range(100):
        try:
            with socket.create_connection((host, int(port)), timeout=2) as connection:
                connection.sendall(data)
                return
        except ConnectionError:
            threading.Event().wait(0.01)
