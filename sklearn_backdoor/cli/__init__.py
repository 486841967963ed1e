"""The command line, one module a command; what is heavy is imported by a command."""

import click

from sklearn_backdoor.cli._outcome import Group
from sklearn_backdoor.cli.demo import demo
from sklearn_backdoor.cli.scan import scan


@click.group(cls=Group)
def main():
    """Find backdoors in image classifiers, and guard them in flight."""


for _command in (scan, demo):
    main.add_command(_command)
