"""Options that several commands share, and what they become."""

import re

import click

_METHODS = "auto patch additive neurons batch-norm weights tabor b3d".split()


class Size(click.ParamType):
    """Height and width in pixels: 32x48, "32 48", or 32 for a square."""

    name = "HxW"

    def convert(self, value, param, ctx):
        """Return (height, width)."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(
            r"([1-9]\d{0,4})(?:\s*[xX, ]\s*([1-9]\d{0,4}))?", value.strip(), re.ASCII
        )
        if not found:
            self.fail(f"{value!r}, expected height and width such as 32x48.")
        height, width = found.groups()
        return int(height), int(width or height)


class Numbers(click.ParamType):
    """Finite numbers separated by commas: 0.5, or 0.49,0.48,0.45."""

    name = "NUMBERS"

    def convert(self, value, param, ctx):
        """Return one number, or a tuple of several."""
        if isinstance(value, float | tuple):
            return value
        try:
            found = tuple(float(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or not all(abs(number) < 1e6 for number in found):
            self.fail(f"{value!r}, expected numbers such as 0.5 or 0.49,0.48,0.45.")
        return found[0] if len(found) == 1 else found


def network_options(command):
    """Add what makes the suspect network."""
    return _add(
        command,
        click.option(
            "--architecture",
            required=True,
            metavar="NAME",
            help="lenet5, resnet18, vgg16, torchvision:NAME, timm:NAME, or "
            "package.module:factory: a class or function that, called without "
            "arguments, returns the network. Its code runs: name only code that you "
            "trust.",
        ),
        click.option(
            "--weights",
            required=True,
            type=click.Path(exists=True, dir_okay=False),
            help="The suspect weights: a .safetensors file, or a state dict that "
            "torch.save wrote, looked into before it is read in a process of its own.",
        ),
        click.option(
            "--n-classes",
            type=click.IntRange(2, 1_000_000),
            help="Logits of the network; without it, read off the weights.",
        ),
        click.option(
            "--mean",
            type=Numbers(),
            help="Mean of the network's normalisation, one number or one a channel, "
            "for pixels in 0...1. Without it the network takes pixels as they are, or "
            "normalises them itself.",
        ),
        click.option(
            "--std", type=Numbers(), help="Standard deviation, as --mean; above 0."
        ),
    )


def image_options(command):
    """Add where the clean images are."""
    return _add(
        command,
        click.option(
            "--images",
            type=click.Path(file_okay=False),
            help="Clean images, one folder a class; class names are the folders' "
            "names.",
        ),
        click.option(
            "--classes",
            help="Class names in logit order, separated by commas; without it folders "
            "are taken in alphabetical order.",
        ),
        click.option("--image-size", type=Size(), help="Resize images to this."),
        click.option(
            "--channels", type=click.Choice(["1", "3"]), help="Grey or RGB (default)."
        ),
        click.option(
            "--dataset",
            type=click.Choice(["digits", "mnist", "fashion-mnist", "cifar10"]),
            help="Clean test images of a public data set, in place of --images.",
        ),
        click.option(
            "--data-dir",
            type=click.Path(exists=True, file_okay=False),
            help="Where the data set lies; without it, it is downloaded.",
        ),
        click.option(
            "--per-class",
            type=click.IntRange(2),
            default=100,
            show_default=True,
            help="Clean images a class at most.",
        ),
        seed_option,
    )


def search_options(command):
    """Add how triggers are searched."""
    return _add(
        command,
        click.option(
            "--method",
            type=click.Choice(_METHODS),
            default="auto",
            show_default=True,
            help="auto searches patches, additive perturbations and neurons, and asks "
            "the statistics of batch-norm or the weights.",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(1, 1024),
            default=1,
            show_default=True,
            help="Groups of classes that are searched at once.",
        ),
        click.option(
            "--checkpoint-dir",
            type=click.Path(file_okay=False),
            help="Keeps the search while it runs; the same command resumes it.",
        ),
    )


report_option = click.option(
    "--report",
    type=click.Path(dir_okay=False),
    metavar="FILE.html",
    help="Fits a guard by the finished search and writes a report: one HTML file, to "
    "show to others.",
)

seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of all that is drawn at random.",
)


def check_options(options):
    """Refuse options that contradict each other; split the names of the classes.

    Parameters
    ----------
    options : dict
        Of a command with `network_options` and `image_options`; altered in place.

    Raises
    ------
    click.UsageError
    """
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


def _add(command, *options):
    for option in reversed(options):
        command = option(command)
    return command
