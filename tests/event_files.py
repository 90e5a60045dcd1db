"""TensorBoard's event files, read as TensorBoard does."""

import struct

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15) | (crc << 17)) + 0xA282EAD8 & 0xFFFFFFFF


def events(workdir):
    """All events of all files, in the order in which TensorBoard reads them: TFRecords of Event messages."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        assert "tfevents" in path.name  # what TensorBoard looks for
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            payload = data[12 : 12 + size]
            checks = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + size : 16 + size])
            assert checks == (masked(data[:8]), masked(payload))
            found.append(Event.FromString(payload))
            data = data[16 + size :]
    return found


def visible(workdir):
    """{tag: [(step, value)]} after TensorBoard's rule: a session's start drops the points at and after its step."""
    kept = []
    for event in events(workdir):
        if event.session_log.status == SessionLog.START:
            kept = [older for older in kept if older.step < event.step]
        elif event.HasField("summary"):
            kept.append(event)
    curves = {}
    for event in kept:
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves
