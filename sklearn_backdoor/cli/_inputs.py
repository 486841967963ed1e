"""What commands read: clean images, the suspect network, and what they came from."""

from sklearn_backdoor.cli._outcome import say


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

    say(f"load images from {options['images'] or options['dataset']}", err=True)
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
    from sklearn_backdoor._weights import file_digest, load_network

    say(f"load {options['weights']}", err=True)
    network = load_network(options["architecture"], options["weights"])
    return network, file_digest(options["weights"])
