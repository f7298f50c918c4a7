"""Downloading over a line that breaks, and unpacking archives that want out of their folder."""

from __future__ import annotations

import hashlib
import http.server
import io
import multiprocessing
import random
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_memtrain.recipes.download import ChecksumError, download, locked, unpack

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves one content to every path, with the faults that a test asks for."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.first_content = content  # what the first answer sends instead
        self.honours_range = True
        self.shifts_range_by = 0
        self.sends_at_most = len(content)  # bytes before the connection breaks
        self.says_length = True
        self.refuses = False
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/data.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if server.refuses:
            self.send_error(403)
            return
        content = server.first_content if len(server.ranges) == 1 else server.content
        start = 0
        if asked and server.honours_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + server.shifts_range_by  # type: ignore[index]
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + server.sends_at_most])

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(content: bytes = CONTENT) -> Iterator[Server]:
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "data.tar.gz"


def part_of(path: Path) -> Path:
    return path.with_name("data.tar.gz.part")


def test_downloads_in_one_piece(server: Server, path: Path) -> None:
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None]
    assert [file.name for file in path.parent.iterdir()] == ["data.tar.gz"]


def test_a_file_without_a_published_checksum_is_taken_as_it_comes(server: Server, path: Path) -> None:
    server.sends_at_most = 100_000
    download(server.url, path, sha256=None)
    assert path.read_bytes() == CONTENT


def test_goes_on_where_the_connection_broke(server: Server, path: Path) -> None:
    server.sends_at_most = 100_000
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_goes_on_where_an_earlier_run_stopped(server: Server, path: Path) -> None:
    path.parent.mkdir()
    part_of(path).write_bytes(CONTENT[:250_000])
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=250000-"]


def test_a_complete_part_needs_no_bytes(server: Server, path: Path) -> None:
    path.parent.mkdir()
    part_of(path).write_bytes(CONTENT)
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-"]


def test_a_server_that_ignores_the_range_starts_over(server: Server, path: Path) -> None:
    server.honours_range = False
    path.parent.mkdir()
    part_of(path).write_bytes(CONTENT[:250_000])
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=250000-"]


def test_a_server_that_sends_another_range_is_asked_for_everything(server: Server, path: Path) -> None:
    server.shifts_range_by = 10
    path.parent.mkdir()
    part_of(path).write_bytes(CONTENT[:250_000])
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=250000-", None]


def test_a_server_that_says_no_length(server: Server, path: Path) -> None:
    server.says_length = False
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"not the beginning of it", b"x" * 300_000, b"x" * 400_000])
def test_a_wrong_part_is_thrown_away_once(server: Server, path: Path, part: bytes) -> None:
    path.parent.mkdir()
    part_of(path).write_bytes(part)
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(part)}-", None]


def test_a_file_that_changed_between_two_connections_is_downloaded_again(server: Server, path: Path) -> None:
    server.first_content = bytes(300_000)
    server.sends_at_most = 200_000
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=200000-", None, "bytes=200000-"]


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(server: Server, path: Path) -> None:
    wrong = "0" * 64
    message = rf"{server.url} must have the SHA-256 checksum {wrong}, but what arrived has {SHA256}"
    with pytest.raises(ChecksumError, match=message):
        download(server.url, path, sha256=wrong)
    assert list(path.parent.iterdir()) == []
    assert server.ranges == [None]


def test_a_wrong_checksum_after_a_resumed_download_is_tried_once_more_from_the_start(
    server: Server, path: Path
) -> None:
    server.sends_at_most = 200_000
    with pytest.raises(ChecksumError):
        download(server.url, path, sha256="0" * 64)
    assert list(path.parent.iterdir()) == []
    assert server.ranges == [None, "bytes=200000-"] * 2


def test_a_connection_that_brings_nothing_more_ends_it_and_keeps_what_arrived(
    server: Server, path: Path
) -> None:
    path.parent.mkdir()
    part_of(path).write_bytes(CONTENT[:1_000])
    server.sends_at_most = 0
    with pytest.raises(ConnectionError, match="closed the connection early"):
        download(server.url, path, sha256=SHA256)
    assert part_of(path).read_bytes() == CONTENT[:1_000]
    assert not path.exists()


def test_no_server(path: Path) -> None:
    with serve() as gone:
        url = gone.url
    with pytest.raises(OSError, match="refused"):
        download(url, path, sha256=SHA256)
    assert not path.exists()


def test_a_server_that_refuses(server: Server, path: Path) -> None:
    server.refuses = True
    with pytest.raises(OSError, match="HTTP Error 403: Forbidden"):
        download(server.url, path, sha256=SHA256)
    assert not path.exists()
    assert server.ranges == [None]


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


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_unpacks_files_and_folders(tmp_path: Path) -> None:
    members = [member("data", kind=tarfile.DIRTYPE), member("data/a", b"1"), member("data/deep/b", b"22")]
    archive = make_archive(tmp_path / "a.tar.gz", *members)
    unpack(archive, "data", tmp_path / "into")
    assert files_below(tmp_path / "into") == ["data", "data/a", "data/deep", "data/deep/b"]
    assert (tmp_path / "into" / "data" / "deep" / "b").read_bytes() == b"22"


@pytest.mark.parametrize(
    "bad",
    [
        member("../escaped"),
        member("data/../../escaped"),
        member("data/../data/escaped"),
        member("/tmp/escaped-absolute"),
        member("elsewhere/escaped"),
        member("data\\..\\escaped"),
        member("data/link", kind=tarfile.SYMTYPE, link="/etc"),
        member("data/link", kind=tarfile.SYMTYPE, link="a"),
        member("data/link", kind=tarfile.LNKTYPE, link="../../outside"),
        member("data/device", kind=tarfile.CHRTYPE),
        member("data/pipe", kind=tarfile.FIFOTYPE),
    ],
    ids=lambda bad: f"{bad[0].name} {bad[0].linkname}",
)
def test_an_archive_that_wants_out_is_refused_whole(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes]
) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", member("data/a"), bad, member("data/b"))
    before = files_below(tmp_path)
    message = rf"must hold only files and folders below `data`, but has `{re.escape(bad[0].name)}`"
    with pytest.raises(ValueError, match=message):
        unpack(archive, "data", tmp_path / "into")
    assert files_below(tmp_path) == sorted([*before, "into"])
    assert not Path("/tmp/escaped-absolute").exists()


def test_writing_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    link = member("data/way-out", kind=tarfile.SYMTYPE, link=str(tmp_path / "outside"))
    archive = make_archive(tmp_path / "a.tar.gz", link, member("data/way-out/escaped"))
    with pytest.raises(ValueError, match=r"has `data/way-out` \(a link to `.*outside`\)"):
        unpack(archive, "data", tmp_path / "into")
    assert files_below(tmp_path / "outside") == []


def test_an_archive_without_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a folder `data`, but has none"):
        unpack(make_archive(tmp_path / "a.tar.gz"), "data", tmp_path / "into")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_archive_leaves_nothing(tmp_path: Path, kept: float) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", member("data/a", CONTENT))
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"`.*a.tar.gz` could not be unpacked"):
        unpack(archive, "data", tmp_path / "into")
    assert files_below(tmp_path / "into") == []


def test_the_checksum_that_an_archive_ends_with_is_looked_at(tmp_path: Path) -> None:
    # Not compressed, so that a changed byte is unpacked as any other, and only the checksum tells; with more
    # behind the folder than is read ahead.
    members = [member("data/a", CONTENT), member("data/b", bytes(100_000))]
    archive = make_archive(tmp_path / "a.tar.gz", *members, compresslevel=0)
    content = archive.read_bytes()
    changed = content.index(CONTENT[:100])
    archive.write_bytes(content[:changed] + bytes([content[changed] ^ 1]) + content[changed + 1 :])
    with pytest.raises(ValueError, match=r"could not be unpacked \(CRC check failed .*\)\. Delete it"):
        unpack(archive, "data", tmp_path / "into")
    assert files_below(tmp_path / "into") == []
    archive.write_bytes(content)
    unpack(archive, "data", tmp_path / "into")
    assert (tmp_path / "into" / "data" / "a").read_bytes() == CONTENT


def _hold(path: Path, held: Any, release: Any) -> None:
    with locked(path):
        held.set()
        release.wait(30)


def test_a_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", held, release))
    process.start()
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path / "lock"):
            entered.set()

    try:
        assert held.wait(30)
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
        release.set()
        assert entered.wait(30)
        thread.join()
    finally:
        release.set()
        process.join()
