"""Opens a page in headless Chromium, runs a script in it and tells what it saw."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--enable-logging=stderr",
)
# In real time: where Chromium lets timers run ahead (--virtual-time-budget), a page may see seconds go by
# without a single frame, and so without a chart that follows a change of its size.
_PROBE = """<script>(async () => {
  const settle = () => new Promise((done) => setTimeout(done, 50));
  async function until(holds) {
    for (const end = performance.now() + 30000; !holds();) {
      if (performance.now() > end) throw new Error(`waited 30 s in vain until ${holds}`);
      await settle();
    }
  }
  // Charts draw themselves for their width, at least 240 pixels, in a frame of the browser's choosing.
  const drawnWidth = (chart) => chart.querySelector("svg")?.viewBox.baseVal.width;
  const fits = (chart) => drawnWidth(chart) === Math.max(240, chart.clientWidth);
  const drawn = (page) => [...page.querySelectorAll(".chart")].every(fits);
  const text = (selector) => document.querySelector(selector).textContent;
  const texts = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
  const seen = { answer: null, error: null };
  try {
    await until(() => drawn(document));
    seen.answer = await (async () => { %s })() ?? null;
  } catch (error) { seen.error = String(error); }
  await settle();
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  console.log(`probe:${encodeURIComponent(JSON.stringify(seen))}:end`);
})();</script>"""
_SEEN = re.compile(r"probe:(\S+):end")
_LIMIT_SECONDS = 120


@dataclass(frozen=True)
class Visit:
    """What came of opening a page.

    Args:
        answer: what the script returned.
        requests: addresses of all resources that the page asked for.
        console: every line in the browser's console: errors, and requests refused by the page's policy.
    """

    answer: Any
    requests: list[str]
    console: list[str]


def visit(page: str, folder: Path, script: str = "", width: int = 1200) -> Visit:
    """Open a page from disk and run a script in it; skips the test where there is no Chromium.

    Args:
        page: the whole document.
        folder: an empty folder for the page, the browser's profile and its log.
        script: body of an async function; ``text`` and ``texts`` read selectors, ``until`` waits until a
            function returns true, e.g. ``() => drawn(document)``: all charts are drawn for their width.
        width: width of the window in pixels.

    Returns:
        What the page and the script did.
    """
    browser = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(_NAMES)})")
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"{_PROBE % script}</body>"), encoding="utf-8")
    command = [
        browser,
        *_QUIET,
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},1600",
        path.as_uri(),
    ]
    log = _log_until_seen(command, folder / "browser.log")
    found = _SEEN.search(log)
    assert found is not None, f"the page's scripts did not end: {log[-2000:]}"
    seen = json.loads(unquote(found.group(1)))
    assert seen["error"] is None, seen["error"]
    console = [line for line in log.splitlines() if "CONSOLE" in line and not _SEEN.search(line)]
    return Visit(answer=seen["answer"], requests=seen["requests"], console=console)


def _log_until_seen(command: list[str], path: Path) -> str:
    """Run a browser until the page says in its console what it saw, or the browser or the time ends."""
    # What the browser leaves in the temporary folder goes with it. Its socket there needs a short path.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, path.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, "TMPDIR": scratch},
            start_new_session=True,
        )
        end = time.monotonic() + _LIMIT_SECONDS
        try:
            while True:
                last_look = process.poll() is not None or time.monotonic() > end
                log = path.read_text(encoding="utf-8", errors="replace")
                if last_look or _SEEN.search(log):
                    return log
                time.sleep(0.02)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
