"""The paper's own figures, to stand beside ours.

Li, Xiang, Miller, Kesidis: Test-time detection of backdoor triggers for poisoned deep
neural networks, tables 1 to 4.
"""

# by cell: ACC, ASR of the true trigger, ASR of the estimated one
TABLE_1 = {
    "cifar10-resnet18-chessboard-single": (0.9360, 0.9955, 1.0000),
    "cifar10-resnet18-single-pixel-single": (0.9354, 0.9488, 0.9900),
    "cifar10-resnet18-white-box-single": (0.9324, 0.9411, 0.9970),
    "cifar10-resnet18-chessboard-multi": (0.9381, 0.9954, 0.9876),
    "cifar10-resnet18-single-pixel-multi": (0.9337, 0.9565, 0.9953),
    "cifar10-resnet18-white-box-multi": (0.9340, 0.9497, 0.9354),
}
_TABLE_2_CELLS = tuple(TABLE_1)
# TPR, FPR, SIA; rivals at an FPR of about 0.05 by thresholds over the test images
TABLE_2 = {
    "in-flight defence": (
        (0.9922, 0, 0.8392),
        (0.9813, 0, 0.7728),
        (0.9847, 0, 0.8607),
        (0.9997, 0, 0.6946),
        (0.9454, 0, 0.632),
        (0.9992, 0, 0.8945),
    ),
    "NC": (
        (0.9855, 0.0488, 0.9444),
        (0.8088, 0.0544, 0.8833),
        (0, 0.0522, 0.8667),
        (0.9962, 0.0533, 0.8765),
        (0.9043, 0.0511, 0.8963),
        (0.8644, 0.0522, 0.8086),
    ),
    "B3D": (
        (0.0788, 0.0511, None),
        (0.5333, 0.1066, None),
        (0.0011, 0.0500, None),
        (0.9872, 0.9955, None),
        (0.1814, 0.0522, None),
        (0.0535, 0.0511, None),
    ),
    "STRIP": (
        (0.0822, 0.0533, None),
        (0.1333, 0.0588, None),
        (0.0088, 0.0588, None),
        (0.0218, 0.0555, None),
        (0.1555, 0.0588, None),
        (0.0011, 0.0633, None),
    ),
}
# SIA of NC patching by fine-tuning rate; multi-class white box on CIFAR-10
TABLE_3 = {
    10: 0.1114,
    1: 0.4291,
    1e-1: 0.6033,
    1e-2: 0.8086,
    1e-3: 0.7103,
    1e-4: 0.6348,
}
TABLE_4 = {
    "pubfig-vgg16-trojan-square-multi": (0.9856, 0.1428, 0.7194),
    "pubfig-vgg16-trojan-watermark-multi": (1.0, 0.1428, 0.5507),
    "mnist-lenet5-chessboard-multi": (1.0, 0.0033, 0.9413),
    "mnist-lenet5-white-box-multi": (1.0, 0.0022, 0.9764),
    "fashion-mnist-lenet5-chessboard-multi": (1.0, 0.0023, 0.6948),
    "fashion-mnist-lenet5-white-box-multi": (0.9951, 0.0127, 0.8039),
}
# images behind a TPR (and SIA) and an FPR, before the victim's own errors: 100 a class
# of the test set are the defence's; PubFig has 20 test images a person, 5 of them
SAMPLES = {"pubfig": (285, 15), "single": (900, 900), "multi": (8100, 900)}


def figures_of(name, method="in-flight defence"):
    """Return TPR, FPR and SIA of a cell, or None.

    Parameters
    ----------
    name : str
        Of the cell.
    method : str, default="in-flight defence"
        A key of ``TABLE_2``.

    Returns
    -------
    tuple of float, or None
    """
    if name in TABLE_4 and method == "in-flight defence":
        return TABLE_4[name]
    if name in _TABLE_2_CELLS:
        return TABLE_2[method][_TABLE_2_CELLS.index(name)]
    return None


def samples_of(name):
    """Return how many triggered and clean images the paper's rates are over.

    Returns
    -------
    tuple of int
    """
    if name.startswith("pubfig"):
        return SAMPLES["pubfig"]
    return SAMPLES["single" if name.endswith("single") else "multi"]
