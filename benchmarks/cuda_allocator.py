"""The model of torch's caching allocator beside what real devices did.

    python -m benchmarks.cuda_allocator [--json] [--write NAME] TRACE...

A trace is what ``torch.cuda.memory._dump_snapshot`` wrote, or its events and segments as compact JSON
(.json.xz: ``events`` of [action, address, size, stream], ``segments`` with ``blocks`` of [address, size,
requested size, state]). The model is told what was asked for and freed, and when memory went back to the
device, and has to find each address, each new segment, and which segments go back. Where the driver puts a
segment is taken from the trace. Time is that of the model alone, the fastest of three.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from lightning_memtrain.core import MIB
from lightning_memtrain.report.cuda_snapshot import DeviceSnapshot, load_snapshot
from lightning_memtrain.tracing.allocator import (
    AllocatorEvent,
    AllocatorSettings,
    BlockRecord,
    SegmentRecord,
    replay,
    settings_of,
)

_REPEATS = 3


def compact_trace(path: Path) -> tuple[DeviceSnapshot, Mapping[str, Any]]:
    """The events and segments of a compact trace, and the allocator's settings."""
    trace = json.loads(lzma.decompress(path.read_bytes()))
    segments = tuple(
        SegmentRecord(
            segment["address"],
            segment["total_size"],
            segment["stream"],
            segment["segment_type"] == "small",
            bool(segment.get("is_expandable")),
            tuple(BlockRecord(*block) for block in segment["blocks"]),
        )
        for segment in trace["segments"]
    )
    events = tuple(AllocatorEvent(*event) for event in trace["events"])
    return DeviceSnapshot(0, events, segments=segments), trace.get("allocator_settings") or {}


def devices(path: Path) -> Iterator[tuple[str, DeviceSnapshot, Mapping[str, Any]]]:
    """Each device of a file that has events, by a name."""
    if path.name.endswith(".json.xz"):
        device, settings = compact_trace(path)
        yield path.name.removesuffix(".json.xz"), device, settings
        return
    snapshot = load_snapshot(path)
    for device in snapshot.devices:
        name = path.stem if len(snapshot.devices) == 1 else f"{path.stem} cuda:{device.index}"
        yield name, device, snapshot.allocator_settings


def measure(device: DeviceSnapshot, settings: AllocatorSettings) -> dict[str, Any]:
    seconds = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        comparison = replay(device.events, device.segments, settings)
        seconds = min(seconds, time.perf_counter() - start)
    return {
        "events": comparison.num_events,
        "allocations": comparison.num_allocations,
        "same_address": comparison.num_same_address,
        "same_address_share": comparison.same_address_share,
        "real_peak_reserved_bytes": comparison.real_peak_reserved_bytes,
        "model_peak_reserved_bytes": comparison.model_peak_reserved_bytes,
        "real_end_reserved_bytes": comparison.real_end_reserved_bytes,
        "model_end_reserved_bytes": comparison.model_end_reserved_bytes,
        "seconds": round(seconds, 4),
        "seconds_per_10000_events": round(seconds / max(comparison.num_events, 1) * 10_000, 4),
    }


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Reserved bytes are in MiB, each real and modelled."""
    line = "{:{width}}{:>13}{:>12}{:>11}{:>11}{:>11}{:>11}{:>14}"
    width = max(map(len, results), default=0)
    print(line.format("", "", "at their", "peak MiB", "peak MiB", "end MiB", "end MiB", "s per", width=width))
    head = ("trace", "allocations", "address", "real", "model", "real", "model", "10,000 events")
    print(line.format(*head, width=width))
    for name, row in results.items():
        reserved = [
            f"{row[f'{whose}_{when}_reserved_bytes'] / MIB:,.0f}"
            for when in ("peak", "end")
            for whose in ("real", "model")
        ]
        share, seconds = f"{row['same_address_share']:.2%}", f"{row['seconds_per_10000_events']:.3f}"
        print(line.format(name, f"{row['allocations']:,}", share, *reserved, seconds, width=width))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("traces", metavar="TRACE", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON, by the traces' names")
    parser.add_argument(
        "--write", metavar="NAME", help="write the figures to benchmarks/results/NAME.json, too"
    )
    options = parser.parse_args()
    results, failed = {}, False
    for path in options.traces:
        try:
            for name, device, recorded in devices(path):
                settings, missing = settings_of(device.events, device.segments, recorded)
                if missing:
                    print(f"{path}: {missing}", file=sys.stderr)
                results[name] = measure(device, settings)
        except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
            failed = True
            print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results)
    if options.write:
        write_results(options.write, results)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
