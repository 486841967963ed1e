"""What commands read: clean images, the suspect network, and what they came from."""

from sklearn_backdoor.cli._outcome import name_of, say


def load_clean(options):
    """Load clean images by the options.

    Parameters
    ----------
    options : dict
        Of `image_options`.

    Returns
    -------
    CleanImages
    """
    from sklearn_backdoor._scan_input import load_dataset, load_folder

    place = options["images"] or options["dataset"]
    say(f"load images from {name_of(place)}", err=True)
    common = {name: options[name] for name in ("classes", "per_class", "seed")}
    if options["images"]:
        return load_folder(
            options["images"],
            image_size=options["image_size"],
            n_channels=int(options["channels"] or 3),
            **common,
        )
    return load_dataset(options["dataset"], options["data_dir"], **common)


def load_suspect(options, image_shape):
    """Load the suspect network by the options.

    Parameters
    ----------
    options : dict
        Of `network_options`.
    image_shape : tuple (n_channels, height, width)
        Of the images that it will see.

    Returns
    -------
    network : torch.nn.Module
    digest : str
        SHA-256 of the file of weights.
    """
    from sklearn_backdoor.io import file_digest, load_network

    say(f"load {name_of(options['weights'])}", err=True)
    names = ("n_classes", "mean", "std")
    settings = {name: options[name] for name in names}
    if _asks_for_shape(options["architecture"], image_shape):
        settings["image_shape"] = image_shape
    network = load_network(options["weights"], options["architecture"], **settings)
    return network, file_digest(options["weights"])


def _asks_for_shape(architecture, image_shape):
    """Return whether the file of weights may not tell the shape by itself.

    Where it does, its own is taken: images of another are then refused with the options
    that change them. A factory of the user's is called without.
    """
    if architecture == "lenet5":
        return image_shape[1] != image_shape[2] or image_shape[1] < 24
    return architecture.startswith(("torchvision:", "timm:"))


def load_guard(directory, options):
    """Load a guard that `guard fit` wrote, around the suspect network.

    Parameters
    ----------
    directory : path-like
    options : dict
        Of `network_options`.

    Returns
    -------
    BackdoorGuard
    """
    from sklearn_backdoor._guard_disk import read_files
    from sklearn_backdoor.guard import BackdoorGuard
    from sklearn_backdoor.victim import VictimNetwork

    say(f"load {name_of(directory)}", err=True)
    content, _ = read_files(directory)
    try:
        shape = tuple(int(size) for size in content["victim"]["image_shape"])
    except (KeyError, TypeError, ValueError):
        shape = (0, 0, 0)  # loading says what is wrong
    network, _ = load_suspect(options, shape)
    return BackdoorGuard.load(directory, VictimNetwork(network))
