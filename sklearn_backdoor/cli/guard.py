"""``guard fit``: a guard by one search, to keep."""

from pathlib import Path

import click

from sklearn_backdoor.cli._files import check_folder
from sklearn_backdoor.cli._options import (
    check_options,
    image_options,
    network_options,
    report_option,
    search_options,
)
from sklearn_backdoor.cli._outcome import Command, Group, name_of, refusing, say
from sklearn_backdoor.cli._search import (
    check_outputs,
    make_guard,
    provenance_of,
    report_search,
    search,
)
from sklearn_backdoor.cli.check import check


@click.group(cls=Group)
def guard():
    """Fit a guard for a suspect network, and check images by it."""


@guard.command(cls=Command)
@network_options
@image_options
@search_options
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False),
    help="Folder for the guard: new, empty, or with a guard, which is replaced.",
)
@report_option
def fit(**options):
    """Search for a backdoor, and keep a guard against it.

    Where nothing is flagged, the guard passes every label of the network through.

    \b
    Exit status:
      0  nothing found (not proof of being clean)
      1  backdoor found, and a guard against it written
      2  usage, unreadable or unsafe input
      3  internal error
      4  inconclusive

    \b
    Examples:
      python -m sklearn_backdoor guard fit --architecture resnet18 \\
          --weights suspect.safetensors --images clean/ --out guard
      python -m sklearn_backdoor guard fit --architecture torchvision:resnet18 \\
          --weights suspect.pt --images clean/ --image-size 64 --out guard \\
          --checkpoint-dir search --report report.html
    """  # noqa: D301
    from sklearn_backdoor.scan import screen

    check_options(options)
    with refusing():
        check_outputs(options)
        _check_place(Path(options["out"]))
        found = search(options, guarded=True)
    say(screen(found))
    with refusing():
        fitted = make_guard(found)
        fitted.save(options["out"], provenance=provenance_of(found))
    say(f"  guard     {name_of(options['out'])}, {_what(fitted)}")
    if options["report"]:
        with refusing():
            report_search(options, found, fitted)
    click.get_current_context().exit(found.status)


def _check_place(folder):
    check_folder(folder)
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not (folder / "guard.json").exists()
    ):
        raise FileExistsError(
            f"{folder} holds something else than a guard, and is left as it is. Give a "
            "new or empty folder."
        )


def _what(fitted):
    targets = [str(label) for label in fitted.target_classes_]
    if not targets:
        return "which passes all labels through: nothing was flagged"
    return f"of target class {', '.join(targets[:3])}" + " and more" * (
        len(targets) > 3
    )


guard.add_command(check)
