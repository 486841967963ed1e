"""``report``: one HTML file on a guard, its search, and images that it checked."""

from pathlib import Path

import click

from sklearn_backdoor.cli._files import check_writable, folder_of
from sklearn_backdoor.cli._inputs import load_clean, load_guard
from sklearn_backdoor.cli._options import check_options, image_options, network_options
from sklearn_backdoor.cli._outcome import Command, Refused, name_of, refusing, say


@click.command(cls=Command)
@click.argument("guard_dir", type=click.Path(exists=True, file_okay=False))
@network_options
@image_options
@click.option(
    "--check",
    "checked",
    multiple=True,
    type=click.Path(exists=True),
    help="Images to check: a file, or a folder. Can be given again. With --image-size "
    "they are resized as well.",
)
@click.option(
    "--most",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="Of the images to check; of more, so many are drawn.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    default="report.html",
    show_default=True,
)
def report(guard_dir, checked, most, out, **options):
    """Write a report on a guard: one offline HTML file, to show to others.

    GUARD_DIR is what `guard fit` wrote; give the same network and clean images as
    there.

    \b
    Exit status:
      0  the report is written, whatever it says
      2  usage, unreadable or unsafe input
      3  internal error

    \b
    Examples:
      python -m sklearn_backdoor report guard/ --architecture resnet18 \\
          --weights suspect.safetensors --images clean/
      python -m sklearn_backdoor report guard/ --architecture resnet18 \\
          --weights suspect.safetensors --images clean/ --check incoming/ \\
          --out report.html
    """  # noqa: D301
    from sklearn_backdoor.report import write_report

    check_options(options)
    with refusing():
        check_writable(out, inputs=[options["weights"], *checked])
        guard = load_guard(guard_dir, options)
        clean = load_clean(options)
        shape = tuple(guard.victim_.image_shape_)
        if clean.X.shape[1:] != shape:
            raise Refused(
                f"the clean images have shape {clean.X.shape[1:]}, the guard was "
                f"fitted on {shape}. Give the --image-size and --channels of guard fit."
            )
        resize = options["image_size"] is not None
        names, X = _load_checked(checked, shape, resize, most, options["seed"])
        settings = {"X_check": X, "check_names": names} if checked else {}
        settings["provenance"] = {"data_source": clean.source}
        with folder_of(Path(out)):
            write_report(out, guard, clean.X, clean.y, **settings)
    say(f"  report    {name_of(out)}")


def _load_checked(places, shape, resize, most, seed):
    """Return names and pixels of the images to check, without those unreadable."""
    import numpy as np

    from sklearn_backdoor.cli._verdicts import files_of, read_fitting

    files = list(files_of(places))
    if len(files) > most:
        say(f"draw {most} of {len(files)} images to check", err=True)
        rows = np.random.default_rng(seed).permutation(len(files))[:most]
        files = [files[row] for row in np.sort(rows)]
    names, images, wrong = [], [], []
    for path, error in files:
        try:
            if error:
                raise ValueError(f"{path!r}: {error}")
            images.append(read_fitting(path, shape, resize))
            names.append(path)
        except ValueError as why:
            wrong.append(str(why))
    if places and not images:
        first = wrong[0] if wrong else "there are none"
        raise Refused(f"none of the images to check could be read: {first}")
    for one in wrong[:3]:
        say(f"Left out: {name_of(one)}", err=True)
    if len(wrong) > 3:
        say(f"Left out: {len(wrong) - 3} more", err=True)
    return names, np.array(images, dtype=np.uint8).reshape(-1, *shape)
