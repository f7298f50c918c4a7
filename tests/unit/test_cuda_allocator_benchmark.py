"""`benchmarks.cuda_allocator` on recordings of the model itself."""

from __future__ import annotations

import json
import lzma
import pickle
import sys
from pathlib import Path

import pytest

from benchmarks import cuda_allocator
from lightning_memtrain.core import MIB
from tests.helpers.snapshots import snapshot_data


@pytest.fixture
def traces(tmp_path: Path) -> list[str]:
    """One recording in both forms."""
    data = snapshot_data()
    snapshot = tmp_path / "snapshot.pickle"
    snapshot.write_bytes(pickle.dumps(data))
    events = [[e["action"], e.get("addr"), e["size"], e["stream"]] for e in data["device_traces"][0]]
    blocks = ("address", "size", "requested_size", "state")
    segments = [
        {**segment, "blocks": [[block[name] for name in blocks] for block in segment["blocks"]]}
        for segment in data["segments"]
    ]
    compact = tmp_path / "compact.json.xz"
    compact.write_bytes(lzma.compress(json.dumps({"events": events, "segments": segments}).encode()))
    return [str(snapshot), str(compact)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["cuda_allocator", *arguments])
    with pytest.raises(SystemExit) as end:
        cuda_allocator.main()
    return end.value.code


def test_the_figures_as_json(
    traces: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--json", *traces) == 0
    results = json.loads(capsys.readouterr().out)
    assert set(results) == {"snapshot", "compact"}
    for row in results.values():
        assert (row["allocations"], row["same_address"], row["same_address_share"]) == (4, 4, 1)
        assert row["real_peak_reserved_bytes"] == row["model_peak_reserved_bytes"] == 98 * MIB
        assert row["real_end_reserved_bytes"] == row["model_end_reserved_bytes"] == 52 * MIB
        assert row["seconds"] < 0.2


def test_the_figures_as_a_table(
    traces: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *traces) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:7] for row in rows] == [
        [name, "4", "100.00%", "98", "98", "52", "52"] for name in ("snapshot", "compact")
    ]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_shown(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json.xz"
    bad.write_bytes(b"no xz")
    assert run(monkeypatch, "--json", str(bad), *traces) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{bad}: LZMAError: ")
    assert len(json.loads(printed.out)) == 2
