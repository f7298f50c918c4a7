"""Finding data, getting it over a bad line, and unpacking it without trusting it: what the recipes share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import itertools
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

DATA_DIR_VARIABLE = "MEMTRAIN_DATA_DIR"
CHUNK_BYTES = 2**20
TIMEOUT_SECONDS = 30

# Called with the bytes that have arrived and, where the server says it, the bytes of the whole file.
Report = Callable[[int, int | None], None]


class ChecksumError(ValueError):
    """A complete download is not the file that was expected."""


def data_places(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Where data is looked for, in this order; what is downloaded goes into the first.

    Args:
        data_dir: what the user says; ``None`` to use the other places.

    Returns:
        That folder, the one that ``$MEMTRAIN_DATA_DIR`` names, and ``~/.cache/lightning_memtrain``.
    """
    named = (data_dir, os.environ.get(DATA_DIR_VARIABLE) or None, "~/.cache/lightning_memtrain")
    return [Path(place).expanduser() for place in named if place is not None]


def find_or_download(
    name: str,
    places: Sequence[Path],
    find: Callable[[Path], Path | None],
    url: str | None,
    fetch: Callable[[str, Path], None],
    *,
    cure: str,
) -> Path:
    """Find data in one of several places, or download it into the first.

    Several runs may start at once on an empty machine; the first one downloads for all.

    Args:
        name: of the data, for the message.
        places: where to look, in this order.
        find: the folder that holds the data, if a place is or holds it; else ``None``.
        url: where it can be downloaded; ``None`` for no download.
        fetch: downloads from a URL into a place.
        cure: what a user can do, for the message.

    Returns:
        The folder that holds the data.

    Raises:
        FileNotFoundError: if the data is in none of the places and was not downloaded.
    """

    def found() -> Path | None:
        return next((folder for place in places if (folder := find(place)) is not None), None)

    reason = "a download was not asked for"
    folder = found()
    if folder is None and url is not None:
        try:
            with locked(places[0] / f".{name}.lock"):
                if found() is None:
                    fetch(url, places[0])
            folder = found()
        except (OSError, ValueError) as error:
            reason = f"the download from {url} failed ({error})"
    if folder is None:
        looked_in = ", ".join(f"`{place}`" for place in places)
        raise FileNotFoundError(
            f"{name} was not found in {looked_in}, and {reason}: {cure}, or name such a folder in "
            f"${DATA_DIR_VARIABLE}."
        )
    return folder


def download(url: str, path: Path, *, sha256: str | None) -> None:
    """Download a file; go on where an earlier, broken download of it stopped.

    The bytes gather in ``<path>.part``, which becomes ``path`` in one step once its checksum is right. A
    connection that breaks is opened again for as long as every attempt brings something. If a file that
    was put together from several attempts has the wrong checksum, it is downloaded once more from the start.

    Args:
        url: where the file is.
        path: where it shall be; its folder is made.
        sha256: the file's SHA-256 checksum, in hexadecimal digits; ``None`` if its authors publish none, for
            a caller who checks what is in it.

    Raises:
        OSError: if the server cannot be reached, refuses, or sends nothing more. What arrived is kept.
        ChecksumError: if the complete file has another checksum. What arrived is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _progress(f"Downloading {path.name}") as report:
        in_one_piece = _fetch(url, part, report)
        if sha256 is not None and not in_one_piece and _sha256(part) != sha256:
            part.unlink()
            _fetch(url, part, report)
    if sha256 is not None and (found := _sha256(part)) != sha256:
        part.unlink()
        raise ChecksumError(
            f"The file at {url} must have the SHA-256 checksum {sha256}, but what arrived has {found}. "
            "It was deleted. Try again later, or get the file by other means."
        )
    os.replace(part, path)


def _fetch(url: str, part: Path, report: Report) -> bool:
    """Complete ``part`` over as many connections as bring something; whether one from byte 0 was enough."""
    for attempt in itertools.count():
        start = part.stat().st_size if part.exists() else 0
        reason: Exception = ConnectionError("the server closed the connection early")
        try:
            if _receive(url, part, start, report):
                return attempt == 0 and start == 0
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if not part.exists() or part.stat().st_size <= start:
            raise reason if isinstance(reason, OSError) else ConnectionError(repr(reason)) from reason
    raise AssertionError("unreachable")


def _receive(url: str, part: Path, start: int, report: Report) -> bool:
    """Append what one connection brings from byte ``start`` on; whether that was all the server has."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return True  # nothing lies beyond `start`: the checksum says whether it is the file
        raise
    with response:
        if start and response.status == http.HTTPStatus.PARTIAL_CONTENT:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                return _receive(url, part, 0, report)  # another range than was asked for
        else:
            start = 0  # the whole file, whatever was asked for
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with part.open("ab" if start else "wb") as file:
            # read1 returns what is there, so that little is lost when the connection breaks.
            while chunk := response.read1(CHUNK_BYTES):
                file.write(chunk)
                report(file.tell(), total)
            return total is None or file.tell() == total


def unpack(archive: Path, folder_name: str, into: Path) -> None:
    """Unpack one folder of a tar archive, in one step: it is there completely or not at all.

    Args:
        archive: a tar archive, compressed or not, which need not be trusted.
        folder_name: the archive's top-level folder.
        into: the folder that receives it.

    Raises:
        ValueError: if the archive is no tar archive, does not have the checksum that a compressed one ends
            with, has no such folder, or has a member that is neither a file nor a folder or that lies outside
            of ``folder_name``. Nothing of it remains.
    """
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into) as scratch:
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _check_member(archive, member, folder_name)
                    _write_member(tar, member, Path(scratch))
                # Compressed files end with a checksum, which is only looked at when all was read.
                while tar.fileobj is not None and tar.fileobj.read(CHUNK_BYTES):
                    pass
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise ValueError(
                f"`{archive}` could not be unpacked ({error}). Delete it and try again."
            ) from error
        unpacked = Path(scratch) / folder_name
        if not unpacked.is_dir():
            raise ValueError(
                f"`{archive}` must hold a folder `{folder_name}`, but has none. Delete it and try again."
            )
        os.replace(unpacked, into / folder_name)


def _check_member(archive: Path, member: tarfile.TarInfo, folder_name: str) -> None:
    # Stricter than tarfile's "data" filter, and the same on Python versions that lack it: names stay below
    # `folder_name` as written, and without links no name can lead elsewhere.
    parts = PurePosixPath(member.name).parts
    inside = parts[:1] == (folder_name,) and ".." not in parts and "\\" not in member.name
    if not inside or not (member.isreg() or member.isdir()):
        link = f" (a link to `{member.linkname}`)" if member.linkname else ""
        raise ValueError(
            f"`{archive}` must hold only files and folders below `{folder_name}`, "
            f"but has `{member.name}`{link}. "
            "Nothing was unpacked. Delete the archive and get it from a source you trust."
        )


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, scratch: Path) -> None:
    target = scratch / member.name
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None  # it is a regular file
    with source, target.open("xb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block, among those that name the same file.

    Args:
        path: an empty file that is made for the purpose and stays.

    Yields:
        Nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Report]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done_bytes, total_bytes: progress.update(task, completed=done_bytes, total=total_bytes)
