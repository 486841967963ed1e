"""Text of unknown origin, so that nothing obeys it."""

import unicodedata


def printable(text, limit=40):
    r"""Return text of unknown origin so that no terminal obeys it.

    Parameters
    ----------
    text : object
        Taken as its ``str``.
    limit : int or None, default=40
        Longer text is cut, with an ellipsis; None cuts nothing.

    Returns
    -------
    str
        One line. Control characters, marks of direction and what Unicode does not
        know are written as escapes such as ``\x1b``.

    Examples
    --------
    >>> from sklearn_backdoor._text import printable
    >>> print(printable("cat" + chr(27) + "[31m" + chr(0x202E)))
    cat\x1b[31m\u202e
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(
        char
        if unicodedata.category(char)[0] != "C"
        and unicodedata.category(char) not in ("Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for char in text
    )
