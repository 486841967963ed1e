"""``scan``: look for a backdoor in a suspect network."""

import datetime
import json
import re
from pathlib import Path

import click

from sklearn_backdoor.cli._files import check_folder, check_writable, write_whole
from sklearn_backdoor.cli._inputs import load_clean, load_suspect
from sklearn_backdoor.cli._options import (
    check_options,
    image_options,
    network_options,
    search_options,
)
from sklearn_backdoor.cli._outcome import Command, refusing, resumable, say


@click.command(cls=Command)
@network_options
@image_options
@search_options
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="scan",
    show_default=True,
    help="Folder for the picture, named like the weights.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), help="All figures."
)
def scan(**options):
    """Look for a backdoor in a suspect network, by clean images.

    \b
    Exit status:
      0  nothing found (not proof of being clean)
      1  backdoor found
      2  usage, unreadable or unsafe input
      3  internal error
      4  inconclusive

    \b
    Examples:
      python -m sklearn_backdoor scan --architecture resnet18 \\
          --weights suspect.safetensors --images clean/ --image-size 32x32
      python -m sklearn_backdoor scan --architecture my_nets:LeNet \\
          --weights suspect.safetensors --dataset mnist --data-dir data \\
          --checkpoint-dir search --json verdict.json
    """  # noqa: D301
    from sklearn_backdoor.scan import screen

    check_options(options)
    with refusing():
        picture, json_file = _outputs(options)
        found = search(options)
    say(screen(found))
    with refusing(OSError):
        _write(found, picture, json_file)
    click.get_current_context().exit(found.status)


def _outputs(options):
    """Return the files to write; find out before the search that they can be."""
    stem = re.sub(r"[^\w.-]", "-", Path(options["weights"]).stem)[:80]
    picture = Path(options["out"]) / f"{stem}.png"
    json_file = Path(options["json_file"]) if options["json_file"] else None
    check_writable(picture, json_file, inputs=[options["weights"]])
    if options["checkpoint_dir"]:
        check_folder(options["checkpoint_dir"])
    return picture, json_file


def search(options):
    """Load what the options name, and search a trigger for each class.

    Parameters
    ----------
    options : dict
        Of `network_options`, `image_options` and `search_options`.

    Returns
    -------
    Scan
    """
    from sklearn_backdoor.scan import run_scan

    clean = load_clean(options)
    network, digest = load_suspect(options, clean.X.shape[1:])
    say(f"search a trigger for each of {len(clean.classes)} classes", err=True)
    with resumable(options["checkpoint_dir"]):
        found = run_scan(
            network,
            clean.X,
            clean.y,
            clean.classes,
            method=options["method"],
            seed=options["seed"],
            jobs=options["jobs"],
            checkpoint_dir=options["checkpoint_dir"],
            verbose=True,
        )
    found.notes = clean.notes + found.notes
    skipped = ("out", "json_file")
    found.settings = {
        **{name: value for name, value in options.items() if name not in skipped},
        "data_source": clean.source,
        "weights_sha256": digest,
    }
    return found


def _write(found, picture, json_file):
    from sklearn_backdoor._scan_picture import picture_png
    from sklearn_backdoor.scan import to_json

    pictures: list[str] = []
    try:
        write_whole(picture, picture_png(found))
        pictures.append(str(picture))
        say(f"  picture   {picture}")
    finally:  # a picture that fails must not cost the figures
        if json_file:
            figures = to_json(found)
            figures["pictures"] = pictures
            figures["date"] = datetime.datetime.now(datetime.UTC).isoformat()
            content = json.dumps(figures, indent=1, allow_nan=False)
            write_whole(json_file, content.encode() + b"\n")
            say(f"  figures   {json_file}")
