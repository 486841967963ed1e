"""The command line: ``python -m sklearn_backdoor``."""

import json
from pathlib import Path

import click


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


if __name__ == "__main__":
    main()
