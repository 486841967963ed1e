"""Command line of the benchmarks: ``python -m benchmarks COMMAND``."""

from pathlib import Path

import click

from benchmarks.recipes import BUDGETS
from benchmarks.results import RESULTS
from benchmarks.victims import LOADERS, VICTIMS

DOCS = Path(__file__).parents[1] / "docs"

_dataset = click.option(
    "--dataset", type=click.Choice(sorted(LOADERS)), default="fashion-mnist"
)
_data_dir = click.option("--data-dir", type=click.Path(exists=True), default=None)
_seeds = click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
_victims = click.option("--victims", type=click.Path(), default=VICTIMS)
_epochs = click.option("--epochs", default=10, show_default=True)
_lr = click.option("--lr", default=1e-3, show_default=True)
_results = click.option("--results", type=click.Path(), default=RESULTS)


@click.group()
def main():
    """Measure the library; every figure is appended to a JSON lines file."""


@main.command()
@_dataset
@_data_dir
@_seeds
@_victims
@_results
@_epochs
@_lr
def quality(dataset, data_dir, seeds, victims, results, epochs, lr):
    """TPR, FPR and SIA on LeNet-5, white box, guard beside the paper's pipeline."""
    from benchmarks.quality import quality as run

    run(dataset, data_dir, seeds, victims, results, epochs=epochs, lr=lr)


@main.command()
@_dataset
@_data_dir
@_seeds
@_victims
@_epochs
@_lr
def settings(dataset, data_dir, seeds, victims, epochs, lr):
    """Rank density settings by cross-validated log-loss on D_Defense alone."""
    from benchmarks.quality import settings as run

    memory = Path(victims) / "passes"
    run(dataset, data_dir, seeds, victims, memory, epochs=epochs, lr=lr)


@main.command()
@_results
def overhead(results):
    """Guard against the bare network, fused scoring against a loop; same run."""
    from benchmarks.overhead import overhead as run

    run(results)


@main.command()
@_results
@click.option("--folder", type=click.Path(exists=True), help="For 3 GB, sparse.")
@click.option("--images", type=click.IntRange(1), help="A million unless given.")
def streaming(results, folder, images):
    """Peak memory of the guard over a million memory-mapped images."""
    from benchmarks.streaming import N_MANY
    from benchmarks.streaming import streaming as run

    run(results, n_many=images or N_MANY, folder=folder)


@main.command()
@click.option("--part", "parts", multiple=True, help="All parts unless named.")
@_data_dir
@click.option("--shared", type=click.Path(exists=True), help="Victims of other code.")
@click.option("--cifar10", type=click.Path(exists=True), help="Test images, by class.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@_victims
@_results
def scan(parts, data_dir, shared, cifar10, seeds, victims, results):
    """Reverse engineers on a population of victims; resumes where it was stopped."""
    from benchmarks.scan import PARTS, Bench
    from benchmarks.scan import scan as run

    unknown = set(parts) - set(PARTS)
    if unknown:
        raise click.BadParameter(f"{sorted(unknown)}, expected some of {PARTS}")
    needed = {"shared", "budget"}
    if shared is None or cifar10 is None:
        if needed & set(parts):
            raise click.UsageError("the shared victims need --shared and --cifar10")
        parts = parts or [part for part in PARTS if part not in needed]
    run(parts or PARTS, Bench(data_dir, shared, cifar10, victims, results, seeds))


_of_tables = [
    _data_dir,
    click.option(
        "--cifar10", type=click.Path(exists=True), help="Folders of CIFAR-10."
    ),
    _results,
    click.option("--cells", multiple=True, help="Patterns such as 'mnist-*'."),
    click.option("--seeds", default="0", show_default=True, help="As 0-4 or 1,3."),
    click.option("--n-per-class", multiple=True, type=click.IntRange(3)),
    click.option("--budget", type=click.Choice(BUDGETS), default="cpu"),
    click.option("--victims", type=click.Path(exists=True), help="Ready victims."),
    click.option("--cache", type=click.Path(), default=VICTIMS, show_default=True),
    click.option("--device", default="cpu", show_default=True),
    click.option("--epochs", type=click.IntRange(1), help="For a quick look."),
    click.option(
        "--start-from",
        type=click.Path(exists=True, dir_okay=False),
        help="Clean weights that the attacker fine-tunes, for a tenth of the epochs.",
    ),
    click.option("--image-size", default=224, show_default=True, help="Of PubFig."),
]


def _runs_cells(name, help_text, run):
    """Make a command of a function (bench, seeds, select, n_per_class)."""

    def command(cells, seeds, n_per_class, **options):
        from benchmarks.cases import Data
        from benchmarks.tables import Bench

        data = Data(
            options["data_dir"],
            cifar10=options["cifar10"],
            image_size=options["image_size"],
        )
        bench = Bench(
            data,
            options["results"],
            options["cache"],
            ready=options["victims"],
            budget=options["budget"],
            device=options["device"],
            epochs=options["epochs"],
            start=options["start_from"],
            log=click.echo,
        )
        try:
            run(bench, _numbers(seeds), cells, n_per_class)
        except ValueError as error:
            if "no cell matches" not in str(error):
                raise
            raise click.BadParameter(str(error)) from None

    for option in reversed(_of_tables):
        command = option(command)
    main.command(name, help=help_text)(command)


def _table(number):
    def run(bench, seeds, select, n_per_class):
        from benchmarks.tables import run_table

        run_table(
            number,
            bench,
            seeds=seeds,
            select=select,
            n_per_class=n_per_class or (None,),
        )

    return run


def _levers(bench, seeds, select, n_per_class):
    from benchmarks.levers import levers, rank

    levers(
        bench,
        seeds=seeds,
        select=select or ("*-lenet5-*",),
        n_per_class=n_per_class or (100,),
    )
    click.echo(rank(bench.results).round(4).to_string())


for _number in (1, 2, 3, 4):
    _runs_cells(
        f"table{_number}", f"Table {_number} of the paper; resumes.", _table(_number)
    )
_runs_cells("levers", "Log-loss on D_Defense of what could be the default.", _levers)


def _numbers(text):
    """Read "0-4" or "1,3"."""
    try:
        parts = [part.partition("-") for part in text.split(",")]
        numbers = [
            number
            for low, _, high in parts
            for number in range(int(low), int(high or low) + 1)
        ]
        if not numbers:
            raise ValueError
        return numbers
    except ValueError:
        raise click.BadParameter(f"{text!r}, expected such as 0-4 or 1,3") from None


@main.command()
@_results
@click.option("--docs", type=click.Path(), default=DOCS, show_default=True)
def report(results, docs):
    """Print the README's tables; write benchmarks.md and the pictures to DOCS."""
    from benchmarks.report import report as run
    from benchmarks.report_few import draw_few
    from benchmarks.report_scan import draw_scan_results
    from benchmarks.report_tables import report_tables

    click.echo(run(results))
    folder = Path(docs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.md").write_text(report_tables(results))
    for name, draw in (("scan", draw_scan_results), ("few_images", draw_few)):
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
