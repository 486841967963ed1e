"""``scan``: look for a backdoor in a suspect network."""

import datetime
import json
import re
from pathlib import Path

import click

from sklearn_backdoor.cli._files import as_path, write_whole
from sklearn_backdoor.cli._options import (
    check_options,
    image_options,
    network_options,
    report_option,
    search_options,
)
from sklearn_backdoor.cli._outcome import Command, name_of, refusing, say
from sklearn_backdoor.cli._search import (
    check_outputs,
    make_guard,
    report_search,
    search,
)


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
@report_option
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
      python -m sklearn_backdoor scan --architecture torchvision:resnet50 \\
          --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
          --weights suspect.pt --images clean/ --image-size 224 \\
          --checkpoint-dir search --report report.html
      python -m sklearn_backdoor scan --architecture my_nets:LeNet \\
          --weights suspect.safetensors --dataset mnist --data-dir data \\
          --checkpoint-dir search --json verdict.json
    """  # noqa: D301
    from sklearn_backdoor.scan import screen

    check_options(options)
    with refusing():
        picture = _picture(options)
        json_file = as_path(options["json_file"])
        check_outputs(options, picture, json_file)
        found = search(options)
    say(screen(found))
    with refusing(OSError):
        _write(found, picture, json_file)
    if options["report"]:
        with refusing():
            report_search(options, found, make_guard(found))
    click.get_current_context().exit(found.status)


def _picture(options):
    stem = re.sub(r"[^\w.-]", "-", Path(options["weights"]).stem)[:80]
    return Path(options["out"]) / f"{stem}.png"


def _write(found, picture, json_file):
    from sklearn_backdoor._scan_picture import picture_png
    from sklearn_backdoor.scan import to_json

    pictures: list[str] = []
    try:
        write_whole(picture, picture_png(found))
        pictures.append(str(picture))
        say(f"  picture   {name_of(picture)}")
    finally:  # a picture that fails must not cost the figures
        if json_file:
            figures = to_json(found)
            figures["pictures"] = pictures
            figures["date"] = datetime.datetime.now(datetime.UTC).isoformat()
            content = json.dumps(figures, indent=1, allow_nan=False)
            write_whole(json_file, content.encode() + b"\n")
            say(f"  figures   {name_of(json_file)}")
