"""``convert``: a state dict of torch.save as a safetensors file."""

import click

from sklearn_backdoor.cli._files import check_writable
from sklearn_backdoor.cli._outcome import Command, name_of, refusing, say


@click.command(cls=Command)
@click.argument("source", metavar="IN.pt", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", metavar="OUT.safetensors", type=click.Path(dir_okay=False))
def convert(source, out):
    """Turn a state dict that torch.save wrote into a safetensors file.

    The file is looked at from outside, then read by a process of its own with limits on
    memory and time. Nothing in it is run; what cannot be read so is refused.

    \b
    Exit status:
      0  written
      2  usage, unreadable or unsafe input
      3  internal error

    \b
    Example:
      python -m sklearn_backdoor convert suspect.pt suspect.safetensors
    """  # noqa: D301
    from sklearn_backdoor import io

    with refusing():
        if not str(out).lower().endswith(".safetensors"):
            raise ValueError(f"{out} does not end in .safetensors. Give such a name.")
        check_writable(out, inputs=[source])
        found = io.convert(source, out)
    say(f"  weights   {name_of(out)}")
    say(
        f"            {found['n_tensors']:,} tensors, {found['n_parameters']:,} numbers"
    )
    say(f"  SHA-256   {found['sha256_out']}")
    say(f"  before    {found['sha256_in']}")
    for note in found["notes"]:
        say(f"  note      {note}")
