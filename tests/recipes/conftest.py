"""Fixtures of the recipes' tests: CIFAR-10 in miniature, a server, and fairseq in double precision."""

from __future__ import annotations

import http.server
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pooch  # noqa: F401  its logger keeps the stderr of the moment: not one of a single test
import pytest
import torch

from lightning_memtrain.recipes import download

NUM_PER_FILE = 8
FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_batch(path: Path, protocol: int = 4, **changes: object) -> None:
    rng = np.random.default_rng(FILES.index(path.name) if path.name in FILES else 99)
    content: dict[bytes, object] = {
        b"batch_label": b"a small batch",
        b"labels": rng.integers(0, 10, NUM_PER_FILE).tolist(),
        b"data": rng.integers(0, 256, (NUM_PER_FILE, 3072), dtype=np.uint8),
        b"filenames": [f"{i}.png".encode() for i in range(NUM_PER_FILE)],
    }
    content.update({key.encode(): value for key, value in changes.items()})
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_folder(parent: Path) -> Path:
    folder = parent / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in FILES:
        write_batch(folder / name)
    return folder


@pytest.fixture
def batch_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a batch file, with some entries changed."""

    def write(**changes: object) -> Path:
        write_batch(tmp_path / "data_batch_1", **changes)  # type: ignore[arg-type]
        return tmp_path / "data_batch_1"

    return write


@pytest.fixture
def mini_cifar10(tmp_path: Path) -> Path:
    """A folder that holds ``cifar-10-batches-py`` with 8 images in each of its 6 files."""
    write_folder(tmp_path / "mini")
    return tmp_path / "mini"


@pytest.fixture(autouse=True)
def _no_data_but_the_tests_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEMTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "NUM_RETRIES", 0)  # pooch waits between them


class Server(http.server.ThreadingHTTPServer):
    """Serves one content to every path, with the faults that a test asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""
        self.num_broken = 0  # answers that break off, ...
        self.breaks_after = 0  # ... after so many bytes
        self.says_length = True
        self.refuses = False
        self.waits_for: threading.Event | None = None  # in the middle of an answer
        self.asked_for: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/data.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked_for.append(self.path)
        if server.refuses:
            self.send_error(403)
            return
        self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        first = server.breaks_after
        self.wfile.write(server.content[:first])
        if server.waits_for is not None:
            server.waits_for.wait(30)
        if len(server.asked_for) > server.num_broken:
            self.wfile.write(server.content[first:])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    """A server in a thread of this process."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture
def softmax_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Double precision throughout: fairseq's attention takes its softmax in float32 even then.

    How that rounds depends on the CPU and on the number of sentences in a chunk.
    """
    utils = pytest.importorskip("fairseq.utils")
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim))
