"""Headless Chromium, for pages that a real browser has to judge."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
_SECONDS = 120  # a busy machine starts it slowly


def dump_dom(page, *, width=1400, height=1000):
    """Return the HTML of a file as the browser has understood it."""
    return _run(page, "--dump-dom", f"--window-size={width},{height}")


def screenshot(page, picture, *, width=1400, height=1000, dark=False):
    """Write what a file looks like to a PNG file."""
    options = [f"--screenshot={picture}", f"--window-size={width},{height}"]
    if dark:
        options.append("--blink-settings=preferredColorScheme=0")
    _run(page, *options)


def _run(page, *options):
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(_NAMES)} is on the PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [found, *_OPTIONS, f"--user-data-dir={profile}", *options]
        done = subprocess.run(
            [*command, Path(page).resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout
