"""Event files of TensorBoard, read back."""

from pathlib import Path
from typing import Any


def tensorboard_events(path: Path) -> list[Any]:
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data, events, at = path.read_bytes(), [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        assert int.from_bytes(data[at + 8 : at + 12], "little") == masked(data[at : at + 8])
        payload = data[at + 12 : at + 12 + length]
        assert int.from_bytes(data[at + 12 + length : at + 16 + length], "little") == masked(
            payload
        )
        events.append(Event.FromString(payload))
        at += 16 + length
    return events


def read_back(logs: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step of all event files, as TensorBoard shows them after resumes."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(logs.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in tensorboard_events(path):
            if event.HasField("session_log"):  # START: what was logged from this step on is void
                for tag, points in found.items():
                    found[tag] = {s: v for s, v in points.items() if s < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    assert event.step not in found.get(value.tag, {}), "a point is there twice"
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def texts(logs: Path) -> dict[str, list[str]]:
    """Texts by tag of all event files."""
    found: dict[str, list[str]] = {}
    for path in sorted(logs.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in tensorboard_events(path):
            for value in event.summary.value:
                if value.tensor.string_val:
                    name = value.tag.removesuffix("/text_summary")
                    found.setdefault(name, []).append(value.tensor.string_val[0].decode())
    return found
