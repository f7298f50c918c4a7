"""Snapshots of torch's CUDA memory: read without trust, shown, and written from a timeline of ours."""

from lightning_memtrain.report.cuda_snapshot.document import CudaSnapshot, DeviceSnapshot, Frame
from lightning_memtrain.report.cuda_snapshot.page import render_snapshot_page, save_snapshot_page
from lightning_memtrain.report.cuda_snapshot.reading import load_snapshot, parse_snapshot
from lightning_memtrain.report.cuda_snapshot.summary import SnapshotSummary, summarize
from lightning_memtrain.report.cuda_snapshot.table import print_snapshot_table, render_snapshot_table
from lightning_memtrain.report.cuda_snapshot.writing import (
    snapshot_of_breakdown,
    snapshot_of_events,
    write_snapshot,
)

__all__ = [
    "CudaSnapshot",
    "DeviceSnapshot",
    "Frame",
    "SnapshotSummary",
    "load_snapshot",
    "parse_snapshot",
    "print_snapshot_table",
    "render_snapshot_page",
    "render_snapshot_table",
    "save_snapshot_page",
    "snapshot_of_breakdown",
    "snapshot_of_events",
    "summarize",
    "write_snapshot",
]
