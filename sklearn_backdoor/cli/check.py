"""``guard check``: which images carry the trigger, and what they really are."""

import sys

import click

from sklearn_backdoor._text import printable
from sklearn_backdoor.cli._files import as_path, check_writable
from sklearn_backdoor.cli._inputs import load_guard
from sklearn_backdoor.cli._options import network_options
from sklearn_backdoor.cli._outcome import Command, Refused, name_of, refusing, say


@click.command(cls=Command)
@click.argument("guard_dir", type=click.Path(exists=True, file_okay=False))
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True))
@network_options
@click.option(
    "--resize", is_flag=True, help="Resize images to the size that the guard knows."
)
@click.option(
    "--csv", "csv_file", type=click.Path(dir_okay=False), help="A row an image."
)
@click.option(
    "--jsonl", "jsonl_file", type=click.Path(dir_okay=False), help="A line an image."
)
@click.option(
    "--strict", is_flag=True, help="End with status 2 if any file is unreadable."
)
def check(guard_dir, images, resize, csv_file, jsonl_file, strict, **options):
    """Tell which IMAGES carry the trigger, and what they really show.

    GUARD_DIR is what `guard fit` wrote. IMAGES are files, and folders with images in
    them or in folders below. In the tables, verdict is "trigger" (source_class is what
    the image really shows), "accepted" (sent to a guarded class, and rightly), "not
    guarded" (sent to another class; that label passes) or "error". Cells that a
    spreadsheet could run start with an apostrophe.

    \b
    Exit status:
      0  no image carries the trigger
      1  at least one does
      2  usage, unreadable or unsafe input; no image at all; any with --strict
      3  internal error

    \b
    Examples:
      python -m sklearn_backdoor guard check guard/ incoming/ --csv verdicts.csv \\
          --architecture resnet18 --weights suspect.safetensors
      python -m sklearn_backdoor guard check guard/ a.png b.png --resize --strict \\
          --jsonl verdicts.jsonl --architecture resnet18 --weights suspect.safetensors
    """  # noqa: D301
    from sklearn_backdoor.cli._verdicts import Tally, files_of, judge_files

    files = [as_path(csv_file), as_path(jsonl_file)]
    with refusing():
        check_writable(*files, inputs=[options["weights"], *images])
        guard = load_guard(guard_dir, options)
    tally = Tally()
    _stream(judge_files(guard, files_of(images), resize), tally, files)
    say(screen(guard, tally))
    for path in filter(None, files):
        say(f"  verdicts      {name_of(path)}")
    if strict and tally.counts["error"]:
        raise Refused(f"--strict: {tally.counts['error']} files could not be read.")
    click.get_current_context().exit(int(tally.counts["trigger"] > 0))


def _stream(batches, tally, files):
    """Write and count the rows; with nothing read, leave no file."""
    from tqdm import tqdm

    from sklearn_backdoor.cli._verdicts import writing_rows

    with (
        refusing(OSError),
        writing_rows(*files) as write,
        tqdm(desc="check", unit="img", disable=None, file=sys.stderr) as progress,
    ):
        for rows in batches:
            tally.add(rows)
            write(rows)
            progress.update(len(rows))
        if not tally.n_read:
            first = tally.errors[0]["error"] if tally.errors else "there are none"
            raise Refused(f"none of the images could be read: {first}")


def screen(guard, tally):
    """Return the outcome as one screen of text.

    Parameters
    ----------
    guard : BackdoorGuard
    tally : Tally

    Returns
    -------
    str
    """
    counts = tally.counts
    lines = ["", f"  {_headline(guard, tally)}", ""]
    for verdict, what in (
        ("trigger", "sent to a guarded class by the trigger"),
        ("accepted", "sent to a guarded class, and accepted"),
        ("not guarded", "sent to other classes, whose labels pass"),
        ("error", "files could not be read"),
    ):
        if counts[verdict] or verdict != "error":
            lines.append(f"  {verdict:<12}{counts[verdict]:>9,}  {what}")
    if tally.flagged:
        lines += ["", "    network says  really shows        score  file"]
    for row in tally.flagged:
        said, source = (
            printable(row[name], 12) for name in ("victim_label", "source_class")
        )
        name = printable(row["file"], None)
        name = name if len(name) <= 60 else f"…{name[-59:]}"
        lines.append(f"  ! {said:<14}{source:<14}{row['score']:>11,.1f}  {name}")
    n_more = counts["trigger"] - len(tally.flagged)
    if n_more:
        lines.append(f"    and {n_more:,} more, in the table of --csv or --jsonl")
    for row in tally.errors[:3]:
        lines.append(f"  error     {printable(row['error'], 240)}")
    return "\n".join([*lines, ""])


def _headline(guard, tally):
    if not len(guard.target_classes_):
        return (
            f"NOTHING IS GUARDED: the search's verdict was {guard.verdict_!r}, so all "
            "labels pass"
        )
    names = [printable(label) for label in guard.target_classes_[:3]]
    more = " and more" * (len(guard.target_classes_) > 3)
    n_trigger = tally.counts["trigger"]
    what = f"TRIGGER in {n_trigger:,}" if n_trigger else "NO TRIGGER"
    of = "of" if n_trigger else "in"
    return (
        f"{what} {of} {tally.n_read:,} images (guarded: class {', '.join(names)}{more})"
    )
