"""The command line: ``python -m sklearn_backdoor``."""

import datetime
import json
import os
import re
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import click

_INPUT = (ValueError, TypeError, OSError, ImportError)  # what bad input raises


@click.group()
def main():
    """Find backdoors in image classifiers, and guard them in flight."""


@main.command()
@click.option(
    "--dataset",
    type=click.Choice(["digits", "mnist", "fashion-mnist", "cifar10"]),
    default="digits",
    show_default=True,
    help="digits come with scikit-learn; cifar10 trains a ResNet-18, hours on a CPU.",
)
@click.option(
    "--attack",
    type=click.Choice(
        [
            "white-box",
            "single-pixel",
            "chessboard",
            "blended",
            "trojan-square",
            "trojan-watermark",
        ]
    ),
    default="white-box",
    show_default=True,
)
@click.option(
    "--source-classes",
    default="all",
    show_default=True,
    help="all, or labels separated by commas: 0 is the paper's single-class attack.",
)
@click.option(
    "--data-dir",
    type=click.Path(exists=True, file_okay=False),
    help="Where the data lie; without it they are downloaded.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--epochs", type=click.IntRange(1), help="Of the victim's training.")
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="demo",
    show_default=True,
    help="Folder for the picture.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False))
def demo(dataset, attack, source_classes, data_dir, seed, epochs, out, json_file):
    """Poison real images, train a victim, find its backdoor and guard it.

    Ends with status 0 whatever the verdict is.

    \b
    Examples:
      python -m sklearn_backdoor demo
      python -m sklearn_backdoor demo --dataset fashion-mnist --data-dir data
      python -m sklearn_backdoor demo --attack single-pixel --json result.json
    """  # noqa: D301
    from sklearn_backdoor._picture import draw_story
    from sklearn_backdoor.demo import TARGET_CLASS, run_demo, screen

    sources = source_classes
    if source_classes != "all":
        try:
            sources = sorted({int(label) for label in source_classes.split(",")})
        except ValueError:
            raise click.BadParameter(
                f"{source_classes!r}, expected 'all' or labels such as 0 or 0,1.",
                param_hint="--source-classes",
            ) from None
        if not set(sources) <= set(range(10)) - {TARGET_CLASS}:
            raise click.BadParameter(
                f"{sources}, expected labels from 0 to 9 without the target "
                f"{TARGET_CLASS}.",
                param_hint="--source-classes",
            )
    folder = Path(out)
    try:  # before the work, not after it
        folder.mkdir(parents=True, exist_ok=True)
        if json_file:
            Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        story = run_demo(dataset, attack, sources, data_dir, seed, epochs)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    click.echo(screen(story))
    picture = folder / f"{dataset}-{attack}.png"
    draw_story(story).savefig(picture, dpi=150)
    click.echo(f"  picture      {picture}")
    if json_file:
        Path(json_file).write_text(json.dumps(story.figures, indent=1) + "\n")
        click.echo(f"  figures      {json_file}")


class _Size(click.ParamType):
    """Height and width in pixels: 32x48, "32 48", or 32 for a square."""

    name = "HxW"

    def convert(self, value, param, ctx):
        """Return (height, width)."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d*)(?:\s*[xX, ]\s*([1-9]\d*))?", value.strip())
        if not found:
            self.fail(f"{value!r}, expected height and width such as 32x48.")
        height, width = found.groups()
        return int(height), int(width or height)


@main.command()
@click.option(
    "--network",
    required=True,
    metavar="PACKAGE.MODULE:FACTORY",
    help="Class or function that, called without arguments, returns the torch network. "
    "Its code runs: name only code that you trust.",
)
@click.option(
    "--weights",
    required=True,
    type=click.Path(dir_okay=False),
    help="The suspect weights, a .safetensors file. Nothing is unpickled.",
)
@click.option(
    "--images",
    type=click.Path(file_okay=False),
    help="Clean images, one folder a class; class names are the folders' names.",
)
@click.option(
    "--classes",
    help="Class names in logit order, separated by commas; without it folders are "
    "taken in alphabetical order.",
)
@click.option("--image-size", type=_Size(), help="Resize images to this.")
@click.option(
    "--channels", type=click.Choice(["1", "3"]), help="Grey or RGB (default)."
)
@click.option(
    "--dataset",
    type=click.Choice(["digits", "mnist", "fashion-mnist", "cifar10"]),
    help="Clean test images of a public data set, in place of --images.",
)
@click.option(
    "--data-dir",
    type=click.Path(exists=True, file_okay=False),
    help="Where the data set lies; without it, it is downloaded.",
)
@click.option(
    "--per-class",
    type=click.IntRange(2),
    default=100,
    show_default=True,
    help="Clean images a class at most.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "patch", "additive", "tabor", "b3d"]),
    default="auto",
    show_default=True,
    help="auto runs searches for patches and for additive perturbations.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Groups of classes that are searched at once.",
)
@click.option(
    "--checkpoint-dir",
    type=click.Path(file_okay=False),
    help="Keeps the search while it runs; the same command resumes it.",
)
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
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
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
      python -m sklearn_backdoor scan --network my_nets:make_resnet \\
          --weights suspect.safetensors --images clean/ --image-size 32x32
      python -m sklearn_backdoor scan --network my_nets:LeNet \\
          --weights suspect.safetensors --dataset mnist --data-dir data \\
          --checkpoint-dir search --json verdict.json
    """  # noqa: D301
    from sklearn_backdoor.scan import screen

    _check_options(options)
    with _statuses(options, _INPUT):
        picture, json_file = _open_outputs(options)
        found = _scan(options)
    with _statuses(options, OSError):
        _say(screen(found))
        _write(found, picture, json_file)
    click.get_current_context().exit(found.status)


def _check_options(options):
    if (options["images"] is None) == (options["dataset"] is None):
        raise click.UsageError("Give either --images FOLDER or --dataset NAME.")
    wrong = ["data_dir"] if options["images"] else ["image_size", "channels"]
    for name in wrong:
        if options[name] is not None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} goes with "
                f"{'--dataset' if options['images'] else '--images'} only."
            )
    if options["classes"] is not None:
        names = [name.strip() for name in options["classes"].split(",")]
        if "" in names:
            raise click.UsageError(
                "--classes has an empty name. Separate names by single commas."
            )
        options["classes"] = names


def _open_outputs(options):
    """Return the files to write; find out before the search that they can be."""
    stem = re.sub(r"[^\w.-]", "-", Path(options["weights"]).stem)[:80]
    picture = Path(options["out"]) / f"{stem}.png"
    files = [picture]
    if options["json_file"]:
        files.append(Path(options["json_file"]))
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no regular file. Give another name.")
        if path.exists() and path.samefile(options["weights"]):
            raise ValueError(f"{path} holds the weights. Give another name.")
        part = _part(path)
        part.write_bytes(b"")
        part.unlink()
    return picture, files[1] if len(files) > 1 else None


def _part(path):
    return path.with_name(f".{path.name[:80]}.{os.getpid()}.part")


def _replace(path, content):
    """Write a file whole or not at all."""
    part = _part(path)
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            f"the verdict above holds, but {path} could not be written ({error})."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _scan(options):
    from sklearn_backdoor._scan_input import load_dataset, load_folder
    from sklearn_backdoor._weights import file_digest, load_network
    from sklearn_backdoor.scan import run_scan

    _say(f"[1/3] load {options['weights']}", err=True)
    network = load_network(options["network"], options["weights"])
    digest = file_digest(options["weights"])
    _say(f"[2/3] load images from {options['images'] or options['dataset']}", err=True)
    common = {name: options[name] for name in ("classes", "per_class", "seed")}
    if options["images"]:
        clean = load_folder(
            options["images"],
            image_size=options["image_size"],
            n_channels=int(options["channels"] or 3),
            **common,
        )
    else:
        clean = load_dataset(options["dataset"], options["data_dir"], **common)
    _say(f"[3/3] search a trigger for each of {len(clean.classes)} classes", err=True)
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
    skipped = ("debug", "out", "json_file")
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
        _replace(picture, picture_png(found))
        pictures.append(str(picture))
        _say(f"  picture   {picture}")
    finally:  # a picture that fails must not cost the figures
        if json_file:
            figures = to_json(found)
            figures["pictures"] = pictures
            figures["date"] = datetime.datetime.now(datetime.UTC).isoformat()
            content = json.dumps(figures, indent=1, allow_nan=False)
            _replace(json_file, content.encode() + b"\n")
            _say(f"  figures   {json_file}")


@contextmanager
def _statuses(options, bad_input):
    """Turn what goes wrong into one line and an exit status: never into 1."""
    try:
        yield
    except KeyboardInterrupt:
        _fail(
            "Interrupted: run the same command to resume."
            if options["checkpoint_dir"]
            else "Interrupted. With --checkpoint-dir FOLDER the search would be kept, "
            "and the same command would resume it.",
            130,
            debug=False,
        )
    except bad_input as error:
        _fail(f"Error: {error}", 2, options["debug"])
    except (Exception, SystemExit) as error:
        _fail(
            f"Internal error: {type(error).__name__}: {error} (please "
            "file this, with the output of --debug)",
            3,
            options["debug"],
        )


def _fail(message, status, debug):
    if debug:
        for line in traceback.format_exc().splitlines():
            _say(line, err=True)
    _say(" ".join(message.split()), err=True)
    raise click.exceptions.Exit(status) from None


def _say(text, err=False):
    """Print lines that no terminal obeys and no closed pipe turns into status 1."""
    from sklearn_backdoor._text import printable

    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = "\n".join(printable(line, None) for line in text.split("\n"))
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        click.echo(text, err=err)
    except BrokenPipeError:  # the exit status tells the verdict all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
