"""``memtrain report`` with a snapshot of CUDA memory."""

from __future__ import annotations

import pickle
import webbrowser
from pathlib import Path

import pytest

from lightning_memtrain.cli.app import main
from tests.helpers.snapshots import snapshot_data


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "oom.pickle"
    path.write_bytes(pickle.dumps(snapshot_data()))
    return path


def test_the_table_is_printed_and_nothing_written(snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(snapshot)]) == 0
    assert "cuda:0: peak 73.00 MiB allocated, 98.00 MiB reserved" in capsys.readouterr().out
    assert [path.name for path in snapshot.parent.iterdir()] == ["oom.pickle"]


def test_a_snapshot_is_known_by_its_first_byte(snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = snapshot.rename(snapshot.with_name("snapshot"))
    assert main(["report", str(renamed)]) == 0
    assert "73.00 MiB allocated" in capsys.readouterr().out


def test_the_page_is_opened(
    snapshot: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert main(["report", str(snapshot), "--open"]) == 0
    page = snapshot.with_name("oom_report.html")
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert opened == [page.as_uri()]
    assert "73.00 MiB" in page.read_text()


def test_a_snapshot_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(b"{}")
    assert main(["report", str(path)]) == 1
    assert capsys.readouterr().err.startswith("memtrain: error: Expected a snapshot of CUDA memory in ")
    path.unlink()
    assert main(["report", str(path)]) == 1
    assert "but there is no such file" in capsys.readouterr().err
