"""Networks from code that the user trusts: ``package.module:factory``."""

import importlib
import os
import sys

from torch import nn

from sklearn_backdoor._text import printable


def call_factory(factory, **options):
    """Import a callable by its name, and return the network that it makes.

    Parameters
    ----------
    factory : str
        ``"package.module:name"``. The module is imported, from the current directory
        too: its code runs.
    **options
        Passed on.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ImportError
        If the module or the name in it cannot be imported.
    TypeError
        If the name is no callable that returns a network.
    ValueError
        If the call fails.
    """
    make = _find(factory)
    if isinstance(make, nn.Module) or not callable(make):
        raise TypeError(
            f"{factory} is {type(make).__name__}, expected a class or function that, "
            "called without arguments, returns the network."
        )
    try:
        network = make(**options)
    except (Exception, SystemExit) as error:
        given = ", ".join(options)
        how = f"with {given}, as given" if given else "without arguments"
        raise ValueError(
            f"{factory}() raised {type(error).__name__}: {printable(error, 300)}. It "
            f"is called {how}: write a function that passes those needed."
        ) from error
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{factory}() returned {type(network).__name__}, expected a "
            "torch.nn.Module."
        )
    return network


def _find(factory):
    module_name, _, name = factory.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # and stays, for the processes of a parallel search
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{factory}: {error}. Start the command in the folder that holds "
            f"{module_name.split('.')[0]}, or install what is missing."
        ) from error
    except (Exception, SystemExit) as error:
        raise ImportError(
            f"{factory}: importing {module_name} raised {type(error).__name__}: "
            f"{printable(error, 300)}. Repair that file first."
        ) from error
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ImportError(
                f"{module_name} has no {name!r}. Give the name of a class or function "
                "in it that makes the network."
            )
        found = getattr(found, part)
    return found
