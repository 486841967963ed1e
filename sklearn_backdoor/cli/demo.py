"""``demo``: poison, train, find, guard."""

import io
import json
from pathlib import Path

import click

from sklearn_backdoor.cli._files import check_writable, write_whole
from sklearn_backdoor.cli._outcome import Command, name_of, refusing, say


@click.command(cls=Command)
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
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
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

    sources = _sources(source_classes, range(10), TARGET_CLASS)
    picture = Path(out) / f"{dataset}-{attack}.png"
    figures = Path(json_file) if json_file else None
    with refusing():
        check_writable(picture, figures)  # before the work, not after it
        story = run_demo(dataset, attack, sources, data_dir, seed, epochs)
    say(screen(story))
    content = io.BytesIO()
    draw_story(story).savefig(content, format="png", dpi=150)
    with refusing(OSError):
        write_whole(picture, content.getvalue())
        say(f"  picture      {name_of(picture)}")
        if figures:
            write_whole(figures, json.dumps(story.figures, indent=1).encode() + b"\n")
            say(f"  figures      {name_of(figures)}")


def _sources(text, classes, target):
    """Return the labels that an option names, or "all"."""
    if text == "all":
        return text
    try:
        sources = sorted({int(label) for label in text.split(",")})
    except ValueError:
        raise click.BadParameter(
            f"{text!r}, expected 'all' or labels such as 0 or 0,1.",
            param_hint="--source-classes",
        ) from None
    if not set(sources) <= set(classes) - {target}:
        raise click.BadParameter(
            f"{sources}, expected labels from 0 to {max(classes)} without the target "
            f"{target}.",
            param_hint="--source-classes",
        )
    return sources
