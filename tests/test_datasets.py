import shutil
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from sklearn_backdoor import datasets
from tests.common import needs_shared


def test_digits_are_scikit_learns():
    data = datasets.load_digits(image_size=8)
    assert data.X_train.dtype == np.uint8
    assert data.X_train.shape[1:] == (1, 8, 8)
    assert len(data.X_train) + len(data.X_test) == 1797
    ours = np.sort(np.concatenate([data.X_train, data.X_test]).reshape(1797, -1), 0)
    theirs = np.sort(np.rint(sklearn_digits().data / 16 * 255).astype(np.uint8), 0)
    np.testing.assert_array_equal(ours, theirs)
    assert datasets.load_digits().X_test.shape == (899, 1, 16, 16)


@pytest.fixture
def people(tmp_path):
    """Make up PubFig's layout: 20 people, sizes as asked."""
    rng = np.random.default_rng(0)
    for person in range(20):
        folder = tmp_path / "pubfig" / f"person {person:02}"
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, size=(12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "pubfig"


def test_a_folder_a_class_gives_images_and_labels(people):
    data = datasets.load_image_folder(people)
    assert data.X.shape == (160, 3, 12, 10) and data.X.dtype == np.uint8
    np.testing.assert_array_equal(data.y, np.repeat(np.arange(20), 8))
    assert data.target_names[3] == "person 03"
    first = np.asarray(Image.open(people / "person 00" / "0.png"))
    np.testing.assert_array_equal(data.X[0], first.transpose(2, 0, 1))
    assert datasets.load_image_folder(people, image_size=(6, 5)).X.shape[2:] == (6, 5)
    assert datasets.load_image_folder(people, n_channels=1).X.shape[1] == 1


def test_pubfigs_defense_has_five_a_class(people):
    data = datasets.load_image_folder(people)
    X_defense, X_test, y_defense, _ = datasets.split_defense(
        data.X, data.y, n_per_class=5
    )
    assert np.all(np.bincount(y_defense) == 5)
    assert len(X_test) == 60


def test_broken_folders_say_what_is_wrong(people, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no images in folders"):
        datasets.load_image_folder(tmp_path / "nothing")
    Image.new("RGB", (3, 3)).save(people / "person 04" / "odd.png")
    with pytest.raises(ValueError, match="odd.png.*Give image_size"):
        datasets.load_image_folder(people)
    (people / "person 04" / "odd.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="odd.png.*no readable image"):
        datasets.load_image_folder(people)


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    header += struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    "load, folder",
    [
        (datasets.load_mnist, "MNIST"),
        (datasets.load_fashion_mnist, "FashionMNIST"),
    ],
)
def test_torchvisions_layout_is_read(tmp_path, load, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, size=(7, 28, 28))
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(7))
    data = load(tmp_path)
    np.testing.assert_array_equal(data.X_test[:, 0], images)
    np.testing.assert_array_equal(data.y_train, np.arange(7))
    assert data.X_train.shape == (7, 1, 28, 28)


def test_cifar_is_read_from_a_folder_a_class(tmp_path):
    for part in ("train", "test"):
        for name in ("airplane", "truck"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (255, 0, 0)).save(
                tmp_path / part / name / "1.jpg"
            )
    data = datasets.load_cifar10(tmp_path)
    assert data.X_train.shape == (2, 3, 32, 32)
    assert data.target_names == ["airplane", "truck"]
    shutil.rmtree(tmp_path / "test" / "truck")
    with pytest.raises(ValueError, match="Both need the same folders"):
        datasets.load_cifar10(tmp_path)


def test_an_empty_data_dir_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST/raw.*train/<class>/"):
        datasets.load_mnist(tmp_path)


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_no_network_says_to_give_data_dir(monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    with pytest.raises(OSError, match="no route to host.*give data_dir"):
        datasets.load_mnist()


def test_real_mnist_and_fashion_mnist_are_whole():
    root = needs_shared("data")
    for load in (datasets.load_mnist, datasets.load_fashion_mnist):
        data = load(root)
        assert data.X_train.shape == (60_000, 1, 28, 28)
        assert data.X_test.shape == (10_000, 1, 28, 28)
        assert np.all(np.bincount(data.y_test) > 800)


def test_split_defense_takes_a_number_a_class_and_leaves_the_rest():
    data = datasets.load_digits()
    X_defense, X_test, y_defense, y_test = datasets.split_defense(
        data.X_test, data.y_test, n_per_class=20
    )
    assert np.all(np.bincount(y_defense) == 20)
    assert len(X_defense) == 200 and len(X_test) == 699 == len(y_test)
    together = np.concatenate([X_defense, X_test]).reshape(899, -1)
    np.testing.assert_array_equal(
        np.sort(together, 0), np.sort(data.X_test.reshape(899, -1), 0)
    )
    again = datasets.split_defense(data.X_test, data.y_test, n_per_class=20)[0]
    np.testing.assert_array_equal(X_defense, again)
    with pytest.raises(ValueError, match="at least 501 clean image"):
        datasets.split_defense(data.X_test, data.y_test, n_per_class=500)
