"""Downloading over a line that breaks, by several processes, and unpacking archives that want out."""

from __future__ import annotations

import gzip
import hashlib
import io
import multiprocessing
import random
import re
import resource
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_memtrain.recipes import download as download_module
from lightning_memtrain.recipes.download import download, find_or_download, unpack

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _content(server: Any) -> None:
    server.content = CONTENT


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "scratch"


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_downloads_and_shows_how_far_it_is(server: Any, scratch: Path, capsys: Any) -> None:
    assert download(server.url, scratch, sha256=SHA256) == scratch / "data.tar.gz"
    assert (scratch / "data.tar.gz").read_bytes() == CONTENT
    assert len(server.asked_for) == 1
    assert files_below(scratch) == ["data.tar.gz"]
    assert re.search(r"100%.* 300k/300k ", capsys.readouterr().err)


def test_a_file_without_a_published_checksum_is_taken_as_it_comes(server: Any, scratch: Path) -> None:
    assert download(server.url, scratch, sha256=None).read_bytes() == CONTENT


def test_a_connection_that_breaks_is_tried_again(
    server: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "NUM_RETRIES", 1)
    server.num_broken, server.breaks_after = 1, 100_000
    assert download(server.url, scratch, sha256=SHA256).read_bytes() == CONTENT
    assert len(server.asked_for) == 2


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_file_that_arrived_in_part_is_never_taken(server: Any, scratch: Path, sha256: str | None) -> None:
    server.num_broken, server.breaks_after = 9, 100_000
    with pytest.raises(OSError, match=r"IncompleteRead\(100000 bytes read, 200000 more expected\)"):
        download(server.url, scratch, sha256=sha256)
    assert files_below(scratch) == []


def test_a_part_is_told_by_its_checksum_where_the_server_says_no_length(server: Any, scratch: Path) -> None:
    server.says_length = False
    assert download(server.url, scratch / "whole", sha256=SHA256).read_bytes() == CONTENT
    server.num_broken, server.breaks_after = 9, 100_000
    part = hashlib.sha256(CONTENT[:100_000]).hexdigest()
    with pytest.raises(ValueError, match=rf"expected {SHA256} but got {part}\. Deleted download"):
        download(server.url, scratch / "part", sha256=SHA256)
    assert files_below(scratch / "part") == []


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(server: Any, scratch: Path) -> None:
    with pytest.raises(ValueError, match=rf"SHA256 hash .* expected {'0' * 64} but got {SHA256}"):
        download(server.url, scratch, sha256="0" * 64)
    assert files_below(scratch) == []


def test_no_server(scratch: Path) -> None:
    with pytest.raises(OSError, match="refused"):  # port 9 discards; nothing listens there
        download("http://127.0.0.1:9/data.tar.gz", scratch, sha256=SHA256)
    assert files_below(scratch) == []


def test_a_server_that_refuses(server: Any, scratch: Path) -> None:
    server.refuses = True
    with pytest.raises(OSError, match="403 Client Error: Forbidden"):
        download(server.url, scratch, sha256=SHA256)
    assert files_below(scratch) == []


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_file_that_someone_put_there_needs_no_server(
    server: Any, scratch: Path, sha256: str | None
) -> None:
    scratch.parent.mkdir()
    by_hand = scratch.parent / "data.tar.gz"
    by_hand.write_bytes(CONTENT)
    assert download(server.url, scratch, sha256=sha256) == by_hand
    assert server.asked_for == []


def test_half_a_file_put_there_by_hand_is_refused_and_kept(server: Any, scratch: Path) -> None:
    scratch.parent.mkdir()
    by_hand = scratch.parent / "data.tar.gz"
    by_hand.write_bytes(CONTENT[:100_000])
    message = (
        rf"`{by_hand}` must have the SHA-256 .* has [0-9a-f]{{64}}: delete it, .*`curl -C - -LO {server.url}`"
    )
    with pytest.raises(ValueError, match=message):
        download(server.url, scratch, sha256=SHA256)
    assert by_hand.read_bytes() == CONTENT[:100_000]
    assert server.asked_for == []


def fetch(url: str, scratch: Path) -> Path:
    file = download(url, scratch, sha256=SHA256)
    (scratch / "data").mkdir()
    return file.rename(scratch / "data" / "file").parent


def find(place: Path) -> Path | None:
    return place / "data" if (place / "data").is_dir() else None


def obtain(place: Path, url: str) -> Path:
    return find_or_download("Data", [place], find, url, fetch, cure="look elsewhere")


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing(server: Any, tmp_path: Path) -> None:
    with no_file_above(200_000), pytest.raises(FileNotFoundError) as caught:
        obtain(tmp_path, server.url)
    message = (
        rf"Data was not found in `{tmp_path}`, and the download from {server.url} failed "
        r"\(\[Errno \d+\] File too large\): look elsewhere, or name such a folder in \$MEMTRAIN_DATA_DIR\."
    )
    assert re.fullmatch(message, str(caught.value))
    assert files_below(tmp_path) == [".Data.lock"]
    assert obtain(tmp_path, server.url) == tmp_path / "data"


def _obtain(place: Path, url: str) -> None:
    assert obtain(place, url) == place / "data"


def comes_true(condition: Callable[[], object]) -> bool:
    """Waits for it, up to half a minute."""
    deadline = time.monotonic() + 30
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(true)


def test_of_several_processes_one_downloads_for_all(server: Any, tmp_path: Path) -> None:
    server.waits_for = threading.Event()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_obtain, args=(tmp_path, server.url)) for _ in range(3)]
    for process in processes:
        process.start()
    try:
        assert comes_true(lambda: server.asked_for)
        time.sleep(0.3)  # for the others to come to the lock
        assert len(server.asked_for) == 1
    finally:
        server.waits_for.set()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.asked_for) == 1
    assert files_below(tmp_path) == [".Data.lock", "data", "data/file"]


def test_what_a_killed_process_left_is_thrown_away(server: Any, tmp_path: Path) -> None:
    server.waits_for, server.breaks_after = threading.Event(), 100_000
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_obtain, args=(tmp_path, server.url))
    process.start()
    scratch = tmp_path / ".Data.download"
    try:
        assert comes_true(lambda: files_below(scratch))
    finally:
        process.kill()
        process.join()
        server.waits_for.set()
    assert len(files_below(scratch)) == 1, "the process left nothing, so the test shows nothing"
    (scratch / "data").mkdir()  # as if killed a little later
    obtain(tmp_path, server.url)
    assert (tmp_path / "data" / "file").read_bytes() == CONTENT
    assert files_below(tmp_path) == [".Data.lock", "data", "data/file"]


def make_archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], compresslevel: int = 9) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=compresslevel) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(
    name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, content if kind == tarfile.REGTYPE else b""


def test_unpacks_files(tmp_path: Path) -> None:
    members = [member("data", kind=tarfile.DIRTYPE), member("data/a", b"1"), member("data/b", b"22")]
    archive = make_archive(tmp_path / "a.tar.gz", *members)
    assert unpack(archive, "data", tmp_path / "into") == tmp_path / "into" / "data"
    assert files_below(tmp_path / "into") == ["data", "data/a", "data/b"]
    assert (tmp_path / "into" / "data" / "b").read_bytes() == b"22"
    (tmp_path / "ordinary").write_bytes(b"")
    assert (tmp_path / "into" / "data" / "b").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    "bad",
    [
        member("../escaped"),
        member("data/../../escaped"),
        member("data/../data/escaped"),
        member("data/.."),
        member("/tmp/escaped-absolute"),
        member("elsewhere/escaped"),
        member("data\\..\\escaped"),
        member("data/..\\escaped"),
        member("data/link", kind=tarfile.SYMTYPE, link="/etc"),
        member("data/link", kind=tarfile.SYMTYPE, link="a"),
        member("data/link", kind=tarfile.LNKTYPE, link="../../outside"),
        member("data/device", kind=tarfile.CHRTYPE),
        member("data/pipe", kind=tarfile.FIFOTYPE),
    ],
    ids=lambda bad: f"{bad[0].name} {bad[0].linkname}",
)
def test_what_wants_out_of_an_archive_is_not_written(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes]
) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", member("data/a"), bad, member("data/b"))
    before = files_below(tmp_path)
    unpack(archive, "data", tmp_path / "into")
    assert files_below(tmp_path) == sorted([*before, "into", "into/data", "into/data/a", "into/data/b"])
    assert not Path("/tmp/escaped-absolute").exists()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    links = [
        member("data/way-out", kind=tarfile.SYMTYPE, link=str(tmp_path / "outside")),
        member("data/way-out/escaped"),
        member("data/file", kind=tarfile.SYMTYPE, link=str(tmp_path / "outside" / "escaped")),
        member("data/file", b"y"),
    ]
    unpack(make_archive(tmp_path / "a.tar.gz", *links), "data", tmp_path / "into")
    assert files_below(tmp_path / "outside") == []
    assert files_below(tmp_path / "into") == ["data", "data/file"]
    assert (tmp_path / "into" / "data" / "file").read_bytes() == b"y"


@pytest.mark.parametrize("members", [(), (member("data", kind=tarfile.DIRTYPE), member("data/deep/a"))])
def test_an_archive_without_files_in_the_folder(tmp_path: Path, members: Any) -> None:
    with pytest.raises(ValueError, match=r"a.tar.gz` must hold files in a folder `data`, but has none"):
        unpack(make_archive(tmp_path / "a.tar.gz", *members), "data", tmp_path / "into")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_archive_is_refused(tmp_path: Path, kept: float) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", member("data/a", CONTENT))
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"`.*a.tar.gz` could not be unpacked: "):
        unpack(archive, "data", tmp_path / "into")


def test_the_checksum_that_an_archive_ends_with_is_looked_at(tmp_path: Path) -> None:
    # Not compressed, so that a changed byte is unpacked as any other, and only the checksum tells; with more
    # behind the folder than is read ahead.
    members = [member("data/a", CONTENT), member("data/b", bytes(100_000))]
    archive = make_archive(tmp_path / "a.tar.gz", *members, compresslevel=0)
    content = archive.read_bytes()
    changed = content.index(CONTENT[:100])
    archive.write_bytes(content[:changed] + bytes([content[changed] ^ 1]) + content[changed + 1 :])
    with pytest.raises(ValueError, match=r"could not be unpacked: CRC check failed"):
        unpack(archive, "data", tmp_path / "changed")
    archive.write_bytes(content)
    assert (unpack(archive, "data", tmp_path / "into") / "a").read_bytes() == CONTENT


def test_an_archive_that_cannot_be_unpacked_leaves_nothing(server: Any, tmp_path: Path) -> None:
    server.content = gzip.compress(b"no tar archive")

    def fetch(url: str, scratch: Path) -> Path:
        return unpack(download(url, scratch, sha256=None), "data", scratch)

    with pytest.raises(FileNotFoundError, match=r"failed \(`.*` could not be unpacked: .*\): look"):
        find_or_download("Data", [tmp_path], find, server.url, fetch, cure="look elsewhere")
    assert files_below(tmp_path) == [".Data.lock"]
