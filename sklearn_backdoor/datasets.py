"""Data sets as Bunches of uint8 images, and the split that the defence needs."""

from pathlib import Path

import numpy as np
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_digits as _load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch, check_random_state

from sklearn_backdoor._image_files import find_classes, read_images
from sklearn_backdoor._validation import check_images, check_labels, check_number


def _bunch(X_train, y_train, X_test, y_test, target_names, data_source):
    return Bunch(
        X_train=X_train,
        y_train=np.asarray(y_train),
        X_test=X_test,
        y_test=np.asarray(y_test),
        target_names=[str(name) for name in target_names],
        data_source=data_source,
    )


def load_digits(*, image_size=16, random_state=0):
    """Load scikit-learn's digits: 1797 grey images that need no download.

    Parameters
    ----------
    image_size : int, default=16
        Side in pixels, by bilinear interpolation; the originals have 8. On 8x8 images
        a 3x3 trigger is no smaller than a digit's own strokes.
    random_state : int, RandomState instance or None, default=0
        The stratified split into halves for training and testing.

    Returns
    -------
    Bunch
        ``X_train, y_train, X_test, y_test`` (images ``uint8`` of shape
        (n, 1, image_size, image_size)), ``target_names`` and ``data_source``.
    """
    check_number(image_size, "image_size", 8, integer=True)
    digits = _load_digits()
    originals = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    resized = [
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        for image in originals
    ]
    images = np.stack(resized)[:, None]
    X_train, X_test, y_train, y_test = train_test_split(
        images,
        digits.target,
        test_size=0.5,
        stratify=digits.target,
        random_state=random_state,
    )
    source = f"scikit-learn load_digits at {image_size}x{image_size}"
    return _bunch(X_train, y_train, X_test, y_test, digits.target_names, source)


def load_mnist(data_dir=None):
    """Load MNIST: 60 000 + 10 000 grey images, 28x28.

    Parameters
    ----------
    data_dir : path-like, default=None
        A folder in torchvision's layout (``MNIST/raw``), or of ``train`` and ``test``
        with a folder a class. None downloads through torchvision.

    Returns
    -------
    Bunch
        As `load_digits`, images of shape (n, 1, 28, 28).
    """
    return _load_torchvision("MNIST", data_dir, "MNIST/raw", grey=True)


def load_fashion_mnist(data_dir=None):
    """Load Fashion-MNIST: 60 000 + 10 000 grey images, 28x28.

    Parameters
    ----------
    data_dir : path-like, default=None
        As in `load_mnist`, with ``FashionMNIST/raw``.

    Returns
    -------
    Bunch
        As `load_digits`, images of shape (n, 1, 28, 28).
    """
    return _load_torchvision("FashionMNIST", data_dir, "FashionMNIST/raw", grey=True)


def load_cifar10(data_dir=None):
    """Load CIFAR-10: 50 000 + 10 000 colour images, 32x32.

    Parameters
    ----------
    data_dir : path-like, default=None
        As in `load_mnist`, with ``cifar-10-batches-py``.

    Returns
    -------
    Bunch
        As `load_digits`, images of shape (n, 3, 32, 32).
    """
    return _load_torchvision("CIFAR10", data_dir, "cifar-10-batches-py", grey=False)


def _load_torchvision(name, data_dir, marker, grey):
    if data_dir is None:
        root = Path.home() / ".cache" / "sklearn_backdoor"
    else:
        root = Path(data_dir)
        if (root / "train").is_dir() and (root / "test").is_dir():
            return _load_train_and_test(root, grey)
        if not (root / marker).is_dir():
            raise FileNotFoundError(
                f"data_dir={str(root)!r} holds neither {marker} (torchvision's layout) "
                "nor train/<class>/ and test/<class>/. Give the folder above these, or "
                "leave data_dir out to download."
            )
    parts: list = []
    for train in (True, False):
        maker = getattr(torchvision.datasets, name)
        try:
            part = maker(str(root), train=train, download=data_dir is None)
        except (OSError, RuntimeError) as error:  # torchvision raises both
            raise OSError(
                f"{name} could not be read from {root} ({error}). Where there is no "
                f"network, give data_dir, a folder that holds a whole {marker}."
            ) from error
        images = np.asarray(part.data)
        images = images[:, None] if grey else images.transpose(0, 3, 1, 2)
        parts += [np.ascontiguousarray(images), np.asarray(part.targets)]
    X_train, y_train, X_test, y_test = parts
    source = f"torchvision {name}"
    return _bunch(X_train, y_train, X_test, y_test, part.classes, source)


def _load_train_and_test(root, grey):
    channels = 1 if grey else 3
    train = load_image_folder(root / "train", n_channels=channels)
    test = load_image_folder(root / "test", n_channels=channels)
    if train.target_names != test.target_names:
        raise ValueError(
            f"{root}/train has classes {train.target_names}, but {root}/test has "
            f"{test.target_names}. Both need the same folders."
        )
    source = f"image folders {root.name}"
    return _bunch(train.X, train.y, test.X, test.y, train.target_names, source)


def load_image_folder(folder, *, image_size=None, n_channels=3):
    """Load a folder of images, one folder a class (PubFig, or a user's own).

    Parameters
    ----------
    folder : path-like
        ``folder/<class>/<image>``, or folders of images within a class; classes in
        alphabetical order.
    image_size : tuple (height, width), default=None
        Resize to this (bilinear). None takes images as they are: all of one size.
    n_channels : {1, 3}, default=3
        Grey or RGB.

    Returns
    -------
    Bunch
        ``X`` (``uint8``, (n, n_channels, height, width)), ``y``, ``target_names``,
        ``filenames`` and ``data_source``.

    Raises
    ------
    FileNotFoundError
        If there are no images.
    ValueError
        If a file is no readable image, or sizes differ and no ``image_size`` is given.
    """
    found = find_classes(folder)
    paths = [path for own in found.values() for path in own]
    return Bunch(
        X=read_images(paths, n_channels, image_size),
        y=np.repeat(np.arange(len(found)), [len(own) for own in found.values()]),
        target_names=list(found),
        filenames=paths,
        data_source=f"image folder {Path(folder).name}",
    )


def split_defense(X, y, *, n_per_class=100, random_state=0):
    """Draw D_Defense from the test set; the rest is D_Test (§5.1).

    Parameters
    ----------
    X : array-like of shape (n_samples, *image_shape)
        Clean images that the network was not trained on.
    y : array-like of shape (n_samples,)
        Their labels.
    n_per_class : int, default=100
        Images a class for the defence; the paper takes 5 on PubFig.
    random_state : int, RandomState instance or None, default=0
        Which images are drawn.

    Returns
    -------
    X_defense, X_test, y_defense, y_test : ndarray
        In the order of scikit-learn's ``train_test_split``.

    Raises
    ------
    ValueError
        If a class has ``n_per_class`` images or fewer, so that none is left to test.
    """
    X = check_images(X)
    check_number(n_per_class, "n_per_class", 1, integer=True)
    fewest = n_per_class + 1
    y = check_labels(y, None, len(X), all_present=True, min_per_class=fewest)
    classes = np.unique(y)
    random_state = check_random_state(random_state)
    defense = np.zeros(len(y), dtype=bool)
    for label in classes:
        rows = np.flatnonzero(y == label)
        defense[random_state.choice(rows, n_per_class, replace=False)] = True
    return X[defense], X[~defense], y[defense], y[~defense]
