"""Reads the transaction log of an offline W&B run, without a server.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB whose chunks each carry a checksum, a
length and a type (whole, first, middle or last piece of a record).
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
# How often a file that has no end yet is looked at, and what is waited between.
_MOST_LOOKS, _LOOK_SECONDS = 100, 0.1


@dataclass
class WandbLog:
    """What a run logged.

    Args:
        history: one dictionary per ``log`` call, in order.
        summary: last state of the run's summary.
        config: last state of the run's configuration, W&B's own entries under ``"_wandb"``.
        step_metrics: axis of each defined metric or pattern, by name.
        artifacts: type of each artifact by name.
        artifact_files: local path of each file of the artifacts, by artifact and file name.
        folder: the run's ``files`` folder, to which media paths are relative.
    """

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    artifact_files: dict[tuple[str, str], Path] = field(default_factory=dict)

    def series(self, key: str) -> list[Any]:
        """All values that were logged under ``key``, in order."""
        return [row[key] for row in self.history if key in row]

    def media(self, key: str) -> str:
        """The text of the one media file (page or table) that was logged under ``key``."""
        (entry,) = self.series(key)
        return (self.folder / entry["path"]).read_text(encoding="utf-8")


def read_wandb_log(root: Path) -> WandbLog:
    """Read the one offline run below ``root``, after it was finished."""
    from wandb.proto import wandb_internal_pb2

    (path,) = root.glob("**/run-*.wandb")
    log = WandbLog(folder=path.parent / "files")
    for record in _finished_records(path, wandb_internal_pb2.Record):
        match record.WhichOneof("record_type"):
            case "history":
                log.history.append(_items(record.history.item))
            case "summary":
                _merge(log.summary, _items(record.summary.update))
            case "config":
                _merge(log.config, _items(record.config.update))
            case "metric":
                metric = record.metric
                log.step_metrics[metric.name or metric.glob_name] = metric.step_metric
            case "artifact":
                artifact = record.artifact
                log.artifacts[artifact.name] = artifact.type
                for entry in artifact.manifest.contents:
                    log.artifact_files[artifact.name, entry.path] = Path(entry.local_path)
    return log


def _finished_records(path: Path, kind: Any) -> list[Any]:
    """All records; W&B's own process may still write the last ones when `finish` has returned."""
    for _ in range(_MOST_LOOKS):
        records = [kind.FromString(payload) for payload in _payloads(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(_LOOK_SECONDS)
    raise AssertionError(f"{path} has no record of the end of the run")


def _items(items: Any) -> dict[str, Any]:
    """Keys and values; W&B writes a dictionary as one item per entry, which is undone here."""
    read: dict[str, Any] = {}
    for item in items:
        *outer, last = [item.key] if item.key else item.nested_key
        place = read
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return read


def _merge(into: dict[str, Any], update: dict[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", f"not a W&B log: {data[:8]!r}"
    position, pieces = _HEADER_BYTES, b""
    while position + _HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + _HEADER_BYTES])
        position += _HEADER_BYTES
        piece = data[position : position + length]
        position += length
        if len(piece) < length:  # the rest is still to be written
            return
        if kind == 0:
            continue
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum, "damaged W&B log"
        pieces = piece if kind in (_WHOLE, _FIRST) else pieces + piece
        if kind in (_WHOLE, _LAST):
            yield pieces
