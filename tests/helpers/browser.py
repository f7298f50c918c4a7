"""Opens a page in headless Chromium, runs a script in it and tells what it saw."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

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
_PROBE = """<script>(async () => {
  const settle = () => new Promise((done) => setTimeout(done, 50));
  // Charts draw themselves in a frame of the browser's choosing.
  const drawn = () => [...document.querySelectorAll(".chart")].every((chart) => chart.querySelector("svg"));
  for (let tries = 0; tries < 40 && !drawn(); tries++) await settle();
  const text = (selector) => document.querySelector(selector).textContent;
  const texts = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
  let answer;
  try { answer = await (async () => { %s })(); } catch (error) { answer = { error: String(error) }; }
  await settle();
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = JSON.stringify({ answer: answer === undefined ? null : answer, requests });
  document.body.append(note);
})();</script>"""


@dataclass(frozen=True)
class Visit:
    """What came of opening a page.

    Args:
        answer: what the script returned.
        requests: addresses of all resources that the page asked for.
        console: every line in the browser's console: errors, and requests refused by the page's policy.
        dom: the document after its scripts ran.
    """

    answer: Any
    requests: list[str]
    console: list[str]
    dom: str


def visit(page: str, folder: Path, script: str = "", width: int = 1200) -> Visit:
    """Open a page from disk and run a script in it; skips the test where there is no Chromium.

    Args:
        page: the whole document.
        folder: an empty folder for the page and the browser's profile.
        script: body of an async function; ``text`` and ``texts`` read selectors, ``settle`` waits a little.
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
        "--virtual-time-budget=6000",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert probe is not None, f"the page's scripts did not run: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(**json.loads(unescape(probe.group(1))), console=console, dom=done.stdout)
