"""The command line, one module a command; what is heavy is imported by a command."""

import click

from sklearn_backdoor.cli._outcome import Group
from sklearn_backdoor.cli.convert import convert
from sklearn_backdoor.cli.demo import demo
from sklearn_backdoor.cli.guard import guard
from sklearn_backdoor.cli.info import info
from sklearn_backdoor.cli.report import report
from sklearn_backdoor.cli.scan import scan


@click.group(cls=Group)
@click.version_option(package_name="sklearn-backdoor")
def main():
    """Find backdoors in image classifiers, and guard them in flight.

    A network, some clean images of every class: `scan` says whether it is backdoored,
    `guard fit` keeps a guard against it, `guard check` judges images.
    """


for _command in (scan, guard, report, convert, info, demo):
    main.add_command(_command)
