"""One row a checked file: judged in batches, counted, written as CSV or JSON lines."""

import csv
import io
import json
import os
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import islice

import numpy as np

from sklearn_backdoor._image_files import find_images, read_image
from sklearn_backdoor._text import printable
from sklearn_backdoor.cli._files import writing

FIELDS = ("file", "victim_label", "verdict", "source_class", "score", "label", "error")
_N_SHOWN = 10
_BATCH_BYTES, _MOST_IN_BATCH = 2**25, 256
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def files_of(places):
    """Find the files that a command line names.

    Parameters
    ----------
    places : iterable of path-like
        Files, taken whatever their names end in, and folders, looked into.

    Yields
    ------
    path : str
    error : str or None
        Why it cannot be looked into.
    """
    for place in places:
        if not os.path.isdir(place):
            yield os.fspath(place), None
            continue
        failed: list[OSError] = []
        for path in find_images(place, failed.append):
            yield path, None
        for error in failed:
            yield str(error.filename), error.strerror or type(error).__name__


def judge_files(guard, files, resize=False):
    """Judge image files, a batch in memory at a time.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted.
    files : iterable of (path, error)
        As `files_of` yields.
    resize : bool, default=False
        To the guard's image size; else other sizes are errors.

    Yields
    ------
    list of dict
        One a file, in order, with ``FIELDS``; None where a field has no meaning.
    """
    shape = guard.victim_.image_shape_
    size = max(1, min(_MOST_IN_BATCH, _BATCH_BYTES // int(np.prod(shape))))
    files = iter(files)
    while batch := list(islice(files, size)):
        rows, images = [], []
        for path, error in batch:
            row = dict.fromkeys(FIELDS) | {"file": path}
            try:
                if error:
                    raise ValueError(error)
                images.append(read_fitting(path, shape, resize))
            except ValueError as wrong:
                row |= {"verdict": "error", "error": str(wrong)}
            rows.append(row)
        if images:
            read = [row for row in rows if row["error"] is None]
            for row, judged in zip(read, _judge(guard, images), strict=True):
                row |= judged
        yield rows


def read_fitting(path, shape, resize=False):
    """Read an image of a guard's shape.

    Parameters
    ----------
    path : path-like
    shape : tuple (n_channels, height, width)
    resize : bool, default=False
        Make it fit.

    Returns
    -------
    ndarray of shape ``shape``, uint8

    Raises
    ------
    ValueError
        If it cannot be read, or has another size.
    """
    image = read_image(path, shape[0], tuple(shape[1:]) if resize else None)
    if image.shape != tuple(shape):
        found, fits = ("x".join(map(str, one[1:])) for one in (image.shape, shape))
        raise ValueError(
            f"{os.fspath(path)!r} has {found} pixels (height x width), the guard was "
            f"fitted on {fits}. Give --resize, if the network gets resized images."
        )
    return image


def _judge(guard, images):
    table = guard.inspect(np.stack(images))
    guarded = np.isin(table["victim_label"], guard.target_classes_)
    for known, one in zip(guarded, table.to_dict("records"), strict=True):
        label, trigger = str(one["label"]), bool(one["is_trigger"])
        yield {
            "victim_label": str(one["victim_label"]),
            "verdict": "trigger" if trigger else "accepted" if known else "not guarded",
            "source_class": label if trigger else None,
            "score": float(one["trigger_score"]) if known else None,
            "label": label,
        }


class Tally:
    """Counts of verdicts, and the first rows worth a look.

    Attributes
    ----------
    counts : Counter
        By verdict.
    flagged, errors : list of dict
        The first few.
    """

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.flagged: list[dict] = []
        self.errors: list[dict] = []

    def add(self, rows):
        """Count rows of `judge_files`."""
        self.counts.update(row["verdict"] for row in rows)
        for verdict, kept in (("trigger", self.flagged), ("error", self.errors)):
            some = (row for row in rows if row["verdict"] == verdict)
            kept += islice(some, _N_SHOWN - len(kept))

    @property
    def n_read(self):
        """How many files were images."""
        return self.counts.total() - self.counts["error"]


@contextmanager
def writing_rows(csv_file=None, jsonl_file=None):
    """Open the tables of verdicts; they appear whole, at the end, or not at all.

    Parameters
    ----------
    csv_file, jsonl_file : Path or None

    Yields
    ------
    callable
        Takes a list of rows.
    """
    with ExitStack() as stack:
        writers = []
        if csv_file:
            file = _text_file(stack, csv_file)
            table = csv.writer(file, lineterminator="\n")
            table.writerow(FIELDS)
            writers.append(
                lambda row: table.writerow([cell(row[name]) for name in FIELDS])
            )
        if jsonl_file:
            lines = _text_file(stack, jsonl_file)
            writers.append(
                lambda row: lines.write(json.dumps(row, allow_nan=False) + "\n")
            )

        def write(rows):
            for row in rows:
                for writer in writers:
                    writer(row)

        yield write


def cell(value):
    """Return a value for a CSV file that no spreadsheet takes for a formula.

    Parameters
    ----------
    value : str, float or None

    Returns
    -------
    str or float
        Text of unknown origin has its control characters escaped, and an apostrophe in
        front where a formula could start.
    """
    if value is None or isinstance(value, float):
        return "" if value is None else value
    text = printable(value, None)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _text_file(stack, path):
    binary = stack.enter_context(writing(path))
    file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
    stack.callback(file.detach)  # flushes, before the file gets its name
    return file
