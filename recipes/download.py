"""Finding data, or downloading it with pooch and unpacking it: what the recipes share.

pooch starts again after a break; ``curl -C -`` goes on, and what it brought into the folder is used.
Unpacking is our own: pooch's ``Untar`` checks no names before Python 3.12, and stops half-way if killed.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

DATA_DIR_VARIABLE = "MEMTRAIN_DATA_DIR"
CHUNK_BYTES = 2**20
TIMEOUT_SECONDS = 30
NUM_RETRIES = 2


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
    fetch: Callable[[str, Path], Path],
    *,
    cure: str,
) -> Path:
    """Find data in one of several places, or download it into the first.

    Several runs may start at once on an empty machine; the first one downloads for all. The data appears in
    one step, when all of it is there.

    Args:
        name: of the data, for the message.
        places: where to look, in this order.
        find: the folder that holds the data, if a place is or holds it; else ``None``.
        url: where it can be downloaded; ``None`` for no download.
        fetch: downloads from a URL into an empty folder inside of the first place, and returns the folder in
            there that holds the data.
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
        scratch = places[0] / f".{name}.download"
        try:
            places[0].mkdir(parents=True, exist_ok=True)
            with FileLock(places[0] / f".{name}.lock"):
                if found() is None:
                    # A process that was killed may have left it.
                    shutil.rmtree(scratch, ignore_errors=True)
                    try:
                        fetched = fetch(url, scratch)
                        os.replace(fetched, places[0] / fetched.name)
                    finally:
                        shutil.rmtree(scratch, ignore_errors=True)
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


def download(url: str, scratch: Path, *, sha256: str | None) -> Path:
    """Download a file, unless someone has put it beside the scratch folder already.

    A connection that breaks, or a file with another checksum, is tried again from the start, ``NUM_RETRIES``
    times. What is not the whole file, or not the right one, is deleted.

    Args:
        url: where the file is.
        scratch: the folder that receives it; is made.
        sha256: the file's SHA-256 checksum, in hexadecimal digits; ``None`` if its authors publish none, for
            a caller who checks what is in it.

    Returns:
        The file: in ``scratch``, or in the folder around it.

    Raises:
        OSError: if the server cannot be reached or refuses, the connection breaks, or the disk is full.
        ValueError: if the file has another checksum.
    """
    import pooch

    name = url.rsplit("/", 1)[-1]
    by_hand = scratch.parent / name
    if by_hand.is_file():
        if sha256 is not None and (found := pooch.file_hash(str(by_hand))) != sha256:
            raise ValueError(
                f"`{by_hand}` must have the SHA-256 checksum {sha256}, but has {found}: delete it, or go on "
                f"with it by `curl -C - -LO {url}`"
            )
        return by_hand
    over_http = pooch.HTTPDownloader(progressbar=True, chunk_size=CHUNK_BYTES, timeout=TIMEOUT_SECONDS)
    files = pooch.create(scratch, url, registry={name: sha256}, urls={name: url}, retry_if_failed=NUM_RETRIES)
    return Path(files.fetch(name, downloader=over_http))


def unpack(archive: Path, folder_name: str, into: Path) -> Path:
    """Unpack the files that lie directly in one folder of a tar archive, and nothing else of it.

    Args:
        archive: a tar archive, compressed or not, which need not be trusted.
        folder_name: the archive's top-level folder.
        into: the folder that receives it, which does not hold one of this name.

    Returns:
        The new folder.

    Raises:
        ValueError: if the archive is no tar archive, does not have the checksum that a compressed one ends
            with, or has no such file.
    """
    folder = into / folder_name
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                where, _, name = member.name.rpartition("/")
                # Only true files, and names of one part: none can lead elsewhere.
                if where == folder_name and member.isreg() and name != ".." and "\\" not in name:
                    source = tar.extractfile(member)
                    assert source is not None  # it is a regular file
                    with source, (folder / name).open("xb") as file:
                        shutil.copyfileobj(source, file, CHUNK_BYTES)
            # Compressed files end with a checksum, which is only looked at when all was read.
            while tar.fileobj is not None and tar.fileobj.read(CHUNK_BYTES):
                pass
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        reason = " ".join(str(error).split())  # tarfile's has a line for each kind of archive
        raise ValueError(f"`{archive}` could not be unpacked: {reason}") from error
    if not any(folder.iterdir()):
        raise ValueError(f"`{archive}` must hold files in a folder `{folder_name}`, but has none")
    return folder
