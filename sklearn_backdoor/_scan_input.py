"""Clean images for a scan, with the names of the classes in logit order."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sklearn_backdoor import datasets
from sklearn_backdoor._image_files import find_classes, read_images


class CleanImages(NamedTuple):
    """D_Defense with the names of the classes in logit order."""

    X: np.ndarray
    y: np.ndarray
    classes: list
    source: str
    notes: list


def load_folder(
    folder, *, classes=None, per_class=100, seed=0, image_size=None, n_channels=3
):
    """Load clean images, one folder a class.

    Parameters
    ----------
    folder : path-like
        As in `load_image_folder`.
    classes : list of str, default=None
        Names of the folders in logit order; None for alphabetical order.
    per_class : int, default=100
        Images a class at most, drawn at random.
    seed : int, default=0
        Of the draw.
    image_size, n_channels
        As in `load_image_folder`.

    Returns
    -------
    CleanImages

    Raises
    ------
    OSError, ValueError
        If the folder or an image cannot be read, or ``classes`` are not its folders.
    """
    found = find_classes(folder)
    names, notes = list(found), []
    if classes is not None:
        _check_names(classes, names, folder)
    elif all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        notes.append(
            f"the folders are numbers, taken in alphabetical order: "
            f"{', '.join(names[:4])}, ... If the logits go by number, give --classes."
        )
    rng = np.random.default_rng(seed)
    kept = {  # drawn before they are read
        name: np.sort(rng.permutation(len(paths))[:per_class])
        for name, paths in found.items()
    }
    chosen = [found[name][row] for name, rows in kept.items() for row in rows]
    return CleanImages(
        read_images(chosen, n_channels, image_size),
        np.repeat(names, [len(rows) for rows in kept.values()]),
        list(classes or names),
        f"image folder {Path(folder).name}",
        notes,
    )


def _check_names(classes, names, folder):
    absent = [name for name in classes if name not in names]
    unnamed = [name for name in names if name not in classes]
    if absent or unnamed:
        raise ValueError(
            f"--classes has {absent[:5]} for which {folder} has no folder, and lacks "
            f"the folders {unnamed[:5]}. Name each folder once, in logit order."
        )


def load_dataset(name, data_dir=None, *, classes=None, per_class=100, seed=0):
    """Load clean test images of a public data set.

    Parameters
    ----------
    name : {"digits", "mnist", "fashion-mnist", "cifar10"}
    data_dir : path-like, default=None
        None downloads (digits need none).
    classes : list of str, default=None
        Names of the classes in logit order; None for the data set's own.
    per_class : int, default=100
        Images a class, drawn with `split_defense`; fewer where there are fewer.
    seed : int, default=0
        Of the draw.

    Returns
    -------
    CleanImages

    Raises
    ------
    OSError, ValueError
        If the data cannot be read, or ``classes`` are not ten different names.
    """
    if name == "digits":
        data = datasets.load_digits(random_state=seed)
    else:
        data = getattr(datasets, f"load_{name.replace('-', '_')}")(data_dir)
    names = [str(one) for one in classes or data.target_names]
    if len(names) != len(data.target_names):
        raise ValueError(
            f"--classes has {len(names)} names, but {name} has "
            f"{len(data.target_names)} classes. Name each once, in logit order."
        )
    most = int(np.bincount(data.y_test).min()) - 1
    X, _, y, _ = datasets.split_defense(
        data.X_test, data.y_test, n_per_class=min(per_class, most), random_state=seed
    )
    return CleanImages(X, np.array(names)[y], names, data.data_source, [])
