from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_memtrain.core import MIB, TechniqueRecord
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.report.memory_report import SCHEMA_VERSION, LargestHolder, MemoryReport, StepPeak
from tests.helpers.reports import deep_report, out_of_memory_report, tiny_report


def empty_report() -> MemoryReport:
    return MemoryReport(
        model="M", num_parameters=1, created="2026-01-02T03:04:05+00:00", environment={}, stages={}
    )


def technique_report() -> MemoryReport:
    fit = tiny_report().stages["fit"]
    fit = fit.with_allocator_peak(fit.allocator_peak_bytes, reserved_bytes=64 * MIB, num_alloc_retries=2)
    record = TechniqueRecord("Microbatching", {"microbatch_size": 16, "budget": None}, ("step 3: halved",))
    return replace(tiny_report(), stages={"fit": fit}, techniques=(record, TechniqueRecord("RigL")))


@pytest.mark.parametrize(
    "make", [tiny_report, out_of_memory_report, deep_report, empty_report, technique_report]
)
def test_saved_report_loads_equal(make, tmp_path: Path) -> None:
    report = make()
    path = tmp_path / "new" / "folder" / "memory_report.json"
    report.save(path)
    assert MemoryReport.load(path) == report
    assert os.listdir(path.parent) == ["memory_report.json"]


def test_json_holds_plain_names_and_bytes() -> None:
    data = json.loads(json.dumps(out_of_memory_report().to_dict()))
    assert data["schema_version"] == SCHEMA_VERSION == 1
    assert data["stages"]["fit"]["at_peak"]["activations"] == 32 * MIB
    assert data["stages"]["fit"]["allocator_peak_bytes"] == 56 * MIB
    assert data["steps"][1] == {"step": 1, "stage": "fit", "peak_bytes": 55 * MIB, "ledger": False}
    assert data["growth"]["fit"][0] == {"module": "head", "num_bytes": 3 * MIB, "num_storages": 12}
    assert data["out_of_memory"]["holders"][0]["name"] == "activations"
    assert data["ranks"] == {"world_size": 2, "max_peak_bytes": 56 * MIB, "min_peak_bytes": 55 * MIB}


def test_json_holds_techniques_and_what_the_allocator_reserved() -> None:
    data = json.loads(json.dumps(technique_report().to_dict()))
    settings = {"microbatch_size": 16, "budget": None}
    assert data["techniques"] == [
        {"name": "Microbatching", "settings": settings, "events": ["step 3: halved"]},
        {"name": "RigL", "settings": {}, "events": []},
    ]
    fit = data["stages"]["fit"]
    assert (fit["reserved_bytes"], fit["num_alloc_retries"]) == (64 * MIB, 2)
    assert tiny_report().to_dict()["stages"]["fit"]["reserved_bytes"] is None


def test_an_older_file_without_these_entries_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "memory_report.json"
    data = tiny_report().to_dict()
    del data["techniques"]
    for stage in data["stages"].values():
        del stage["reserved_bytes"], stage["num_alloc_retries"]
    path.write_text(json.dumps(data))
    assert MemoryReport.load(path) == tiny_report()


def test_loaded_rows_have_their_types(tmp_path: Path) -> None:
    path = tmp_path / "memory_report.json"
    out_of_memory_report().save(path)
    report = MemoryReport.load(path)
    assert report.steps[0] == StepPeak(step=0, stage="fit", peak_bytes=56 * MIB, ledger=True)
    assert isinstance(report.out_of_memory.holders[0], LargestHolder)
    assert report.peak_stage == "fit"
    assert empty_report().peak_stage is None


def test_another_schema_version_is_refused_with_the_writer_and_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "memory_report.json"
    data = tiny_report().to_dict()
    data["schema_version"] = 2
    data["environment"]["lightning_memtrain"] = "9.8.7"
    path.write_text(json.dumps(data))
    with pytest.raises(
        ValueError, match=r"schema_version=1, but got schema_version=2, written by lightning_memtrain 9\.8\.7"
    ) as caught:
        MemoryReport.load(path)
    assert "open the memory_report.html beside it" in str(caught.value)
    assert str(path) in str(caught.value)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory_report.json"
    tiny_report().save(path)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"is not valid JSON .*: it was cut off or is another kind of file"):
        MemoryReport.load(path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory_report.json"
    path.write_bytes(b"\xff\xfe\x00weights")
    with pytest.raises(ValueError, match="is not valid JSON"):
        MemoryReport.load(path)


@pytest.mark.parametrize(
    ("content", "described"),
    [
        ('{"learning_rate": 0.1}', r"an object with the entries \['learning_rate'\]"),
        ("[1, 2]", "list data"),
    ],
)
def test_other_json_is_refused(content: str, described: str, tmp_path: Path) -> None:
    path = tmp_path / "hparams.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"Expected a memory report .* but got {described}"):
        MemoryReport.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("steps"),
        lambda data: data["stages"]["fit"].update(unknown=1),
        lambda data: data["stages"]["fit"]["at_peak"].update(unknown=1),
        lambda data: data.update(environment="linux"),
        lambda data: data.update(stages=[]),
        lambda data: data.update(techniques=[{"name": "T", "settings": {}}]),
        lambda data: data.update(techniques=[{"name": "T", "settings": {"a": []}, "events": []}]),
        lambda data: data.update(techniques=None),
    ],
)
def test_damaged_entry_is_refused(damage, tmp_path: Path) -> None:
    path = tmp_path / "memory_report.json"
    data = tiny_report().to_dict()
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"an entry is missing or wrong: .* run the profiler again"):
        MemoryReport.load(path)


def test_missing_file_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"there is no such file\. `MemoryProfiler` writes memory_report"
    ):
        MemoryReport.load(tmp_path / "memory_report.json")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        MemoryReport.load(tmp_path)


def test_interrupted_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory_report.json"
    write_atomically(path, "older")

    def disk_full(self: Path, *args: object, **kwargs: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "newer")
    assert path.read_text() == "older"
    assert os.listdir(tmp_path) == ["memory_report.json"]
