"""How a file is refused: what it is, and what to do."""

from sklearn_backdoor._text import printable

REMEDY = (
    "Weights are read from safetensors, or from a state dict alone, since a pickle can "
    "run any code. Have it saved again by whom you have it from, or where it can do no "
    "harm: safetensors.torch.save_file(network.state_dict(), 'weights.safetensors')."
)
_HANDFUL = 5


class UnsafeFileError(ValueError):
    """A file of weights is unsafe, damaged, or of a kind that is not read."""


def refused(path, what):
    """Return the error for a file that is not read as it is.

    Parameters
    ----------
    path : path-like
    what : str
        Goes on after the path: "is a pickle".

    Returns
    -------
    UnsafeFileError
    """
    return UnsafeFileError(f"{printable(path, None)} {what}. {REMEDY}")


def damaged(path, why, what="safetensors file"):
    """Return the error for a file that is broken.

    Parameters
    ----------
    path : path-like
    why : str
    what : str, default="safetensors file"
        What it claims to be.

    Returns
    -------
    UnsafeFileError
    """
    return UnsafeFileError(
        f"{printable(path, None)} is damaged, or no {what}: {why}. Get the file again; "
        "if it is the same then, refuse it."
    )


def handful(names, limit=40):
    """Return the first few of many names of unknown origin, so that all are counted.

    Parameters
    ----------
    names : list of str
    limit : int or None, default=40
        Longer names are cut.

    Returns
    -------
    str
    """
    shown = ", ".join(printable(name, limit) for name in names[:_HANDFUL])
    more = len(names) - _HANDFUL
    return shown + (f" and {more} more" if more > 0 else "")
