"""How a command ends: lines that no terminal obeys, a status, never a traceback."""

import os
import sys
import traceback
import warnings
from contextlib import contextmanager

import click

from sklearn_backdoor._text import printable

BAD_INPUT = (ValueError, TypeError, OSError, ImportError)  # what bad input raises


class Refused(click.ClickException):
    """Bad input, or an output that cannot be written."""

    exit_code = 2


class Interrupted(click.ClickException):
    """Ctrl-C, with what to do next."""

    exit_code = 130


class Command(click.Command):
    """A command that shows tracebacks with ``--debug`` alone."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        option = click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            help="Show the traceback of an error.",
        )
        self.params.append(option)

    def invoke(self, ctx):
        """Run; a ``sys.exit`` of code that was called is an error like others."""
        try:
            super().invoke(ctx)
        except SystemExit as error:
            raise RuntimeError(f"SystemExit: {error}") from error


class Group(click.Group):
    """Commands that end with one line and a status, whatever goes wrong."""

    command_class = Command
    group_class = type

    def main(self, args=None, prog_name=None, **extra):  # type: ignore[override]
        """Run a command line, and leave with its status."""
        debug = "--debug" in (sys.argv if args is None else args)
        extra["standalone_mode"] = False  # click's own would end errors with status 1
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                status = super().main(args, prog_name, **extra)
            except BaseException as error:
                status = _explain(error, debug)
        sys.exit(status or 0)


@contextmanager
def refusing(kinds=BAD_INPUT):
    """Turn what bad input raises into an error with status 2.

    Parameters
    ----------
    kinds : type or tuple of types
        Exceptions.
    """
    try:
        yield
    except kinds as error:
        raise Refused(str(error)) from error


@contextmanager
def resumable(checkpoint_dir):
    """Say at Ctrl-C how a search goes on.

    Parameters
    ----------
    checkpoint_dir : path-like or None
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "Interrupted: run the same command to resume."
            if checkpoint_dir
            else "Interrupted. With --checkpoint-dir FOLDER the search would be kept, "
            "and the same command would resume it."
        ) from None


def name_of(path):
    """Return a path of unknown origin for `say`, on one line."""
    return printable(path, None)


def say(text, err=False):
    """Print lines that no terminal obeys and no closed pipe turns into status 1.

    Parameters
    ----------
    text : str
    err : bool, default=False
        On standard error.
    """
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = "\n".join(printable(line, None) for line in text.split("\n"))
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        click.echo(text, err=err)
    except BrokenPipeError:  # the exit status tells the verdict all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _explain(error, debug):
    """Say in one line what went wrong; return the exit status: never 1."""
    if isinstance(error, SystemExit):  # click's answer to a closed pipe
        return 0
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        say(error.format_message(), err=True)
        return 2
    if debug:
        for line in traceback.format_exc().splitlines():
            say(line, err=True)
    message, status = _in_words(error)
    say(" ".join(message.split()), err=True)
    return status


def _in_words(error):
    if isinstance(error, Interrupted):
        return error.message, error.exit_code
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "sklearn-backdoor"
        return f"Error: {error.format_message()} Try '{where} --help'.", 2
    if isinstance(error, click.ClickException):
        return f"Error: {error.format_message()}", 2
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "Interrupted.", 130
    if _is_out_of_memory(error):
        return (
            "Error: out of memory. Give fewer or smaller images (--per-class, "
            "--image-size), or fewer --jobs.",
            3,
        )
    words = f"{type(error).__name__}: {error}"
    return f"Internal error: {words} (please file this, with the output of --debug)", 3


def _is_out_of_memory(error):
    """Return whether Python or torch, which raises RuntimeError, lacked memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    )


def _show_warning(message, category, filename, lineno, file=None, line=None):
    say(f"Warning: {' '.join(str(message).split())}", err=True)
