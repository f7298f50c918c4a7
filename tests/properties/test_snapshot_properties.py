"""Whatever is in a file, it is read and shown, or refused with a ValueError."""

import io
import pickle
from contextlib import suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_memtrain.report.cuda_snapshot import (
    load_snapshot,
    parse_snapshot,
    print_snapshot_table,
    render_snapshot_page,
)
from tests.helpers.snapshots import snapshot_data

NUMBERS = st.integers(-2, 2**41) | st.sampled_from([0, 512, 2**20, 2**21, 20 * 2**20])
VALUES = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
ACTIONS = ["alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map"]
ENTRY = st.fixed_dictionaries(
    {
        "action": st.sampled_from([*ACTIONS, "segment_unmap", "oom", "snapshot"]),
        "addr": NUMBERS,
        "size": NUMBERS,
        "stream": st.integers(0, 2),
    },
    optional={"device_free": NUMBERS, "frames": st.just([])},
)


def show(data):
    try:
        snapshot = parse_snapshot(data)
        print_snapshot_table(snapshot, io.StringIO())
    except ValueError:
        return
    assert "</html>" in render_snapshot_page(snapshot)


@given(st.data())
def test_an_entry_that_was_changed(data):
    snapshot = snapshot_data()
    entries = [*snapshot["device_traces"][0], *snapshot["segments"]]
    entries += [block for segment in snapshot["segments"] for block in segment["blocks"]]
    for _ in range(data.draw(st.integers(1, 3))):
        entry = data.draw(st.sampled_from(entries))
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(VALUES)
    show(snapshot)


@given(st.lists(ENTRY, max_size=12), st.booleans())
def test_events_that_make_no_sense(events, with_segments):
    show({"segments": snapshot_data()["segments"] if with_segments else [], "device_traces": [events]})


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_were_changed(tmp_path, data):
    content = bytearray(pickle.dumps(snapshot_data()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content)
    with suppress(ValueError):
        print_snapshot_table(load_snapshot(path), io.StringIO())
