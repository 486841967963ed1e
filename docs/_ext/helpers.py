"""What the pages need beyond Sphinx: ``--help``, the gallery's order, the API."""

import click
from docutils import nodes
from docutils.parsers.rst import Directive

from sklearn_backdoor.cli import main

GALLERY = [
    "plot_five_minutes.py",
    "plot_feature_space.py",
    "plot_trigger_display.py",
    "plot_grid_search.py",
    "plot_rivals.py",
    "plot_source_confusion.py",
    "plot_bring_your_own_model.py",
    "plot_save_and_deploy.py",
    "plot_adaptive_attacker.py",
]


def gallery_order(name):
    """Return where an example stands: a file that is not listed is an error."""
    return GALLERY.index(name)


class CommandHelp(Directive):
    """``.. command-help:: scan`` shows what ``sklearn-backdoor scan --help`` prints."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self):
        """Return one literal block."""
        command = main
        width = {"terminal_width": 84, "max_content_width": 84}
        context = click.Context(command, info_name="sklearn-backdoor", **width)
        for name in " ".join(self.arguments).split():
            command = command.get_command(context, name)
            if command is None:
                raise self.error(f"sklearn-backdoor has no command {name!r}.")
            context = click.Context(command, context, info_name=name, **width)
        text = command.get_help(context)
        block = nodes.literal_block(text, text, language="text")
        return [block]


def skip_foreign(app, kind, name, member, skip, options):
    """Leave out what classes inherit from scikit-learn and torch.

    Their docstrings refer to pages of their own.
    """
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    module = getattr(function, "__module__", None) or ""
    foreign = callable(function) and not module.startswith("sklearn_backdoor")
    requested = name.startswith("set_") and name.endswith("_request")
    return True if foreign or requested else None


def escape_stars(app, kind, name, member, options, lines):
    """Let ``(n_samples, *image_shape)`` be read as a shape, not as emphasis."""
    lines[:] = [line.replace(" *image_shape", r" \*image_shape") for line in lines]


def setup(app):
    """Register directive and events."""
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("autodoc-process-docstring", escape_stars, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
