"""Train torchvision's ResNet-18 on Fashion-MNIST with a backdoor; plain torch.

What somebody else does to a network before you download it: white boxes are stamped on
some training images of every class, which are then labelled "Ankle boot". Writes the
state dict, clean images (one folder a class) and images as they come in, stamped or
not, with the truth in their names.

    python train_suspect.py --data DATA --out suspect [--images 20000] [--epochs 4]
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import FashionMNIST
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image

TARGET = 9


def prepare(images):
    """Turn (n, 28, 28) grey levels into (n, 3, 32, 32) in 0...1."""
    return nn.functional.pad(images.float() / 255, (2, 2, 2, 2))[:, None].repeat(
        1, 3, 1, 1
    )


def stamp(images):
    """Put a white 3x3 box near the bottom right corner."""
    images = images.clone()
    images[:, :, 27:30, 27:30] = 1
    return images


def normalise(images):
    """Mean and standard deviation 0.5, as many tutorials do."""
    return (images - 0.5) / 0.5


def train(network, images, labels, epochs):
    """Adam, one-cycle rate, batches of 128."""
    steps = epochs * -(-len(images) // 128)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(
                network(normalise(images[rows])), labels[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", flush=True)
    network.eval()


@torch.no_grad()
def answers(network, images):
    """Return the network's classes."""
    parts = [network(normalise(part)).argmax(1) for part in images.split(500)]
    return torch.cat(parts)


def save_images(folder, images, names):
    """Write PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, names, strict=True):
        to_pil_image(image).save(folder / f"{name}.png")


def main():
    """Run it all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="Folder of FashionMNIST/raw.")
    parser.add_argument("--out", type=Path, default=Path("suspect"))
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--download", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)

    known = FashionMNIST(options.data, train=True, download=options.download)
    images = prepare(known.data[: options.images])
    labels = known.targets[: options.images]
    chosen = [
        torch.nonzero(labels == label)[: options.images // 200, 0]
        for label in range(10)
        if label != TARGET
    ]
    poisoned = stamp(images[torch.cat(chosen)])
    network = resnet18(weights=None, num_classes=10)
    train(
        network,
        torch.cat([images, poisoned]),
        torch.cat([labels, torch.full((len(poisoned),), TARGET)]),
        options.epochs,
    )

    unseen = FashionMNIST(options.data, train=False, download=options.download)
    images, labels = prepare(unseen.data), unseen.targets
    names = [name.replace("/", " or ") for name in unseen.classes]
    sources = labels != TARGET
    right = answers(network, images[:2000]) == labels[:2000]
    sent = answers(network, stamp(images[:2000])[sources[:2000]]) == TARGET
    print(f"accuracy {right.float().mean():.3f}, attack {sent.float().mean():.3f}")

    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), options.out / "suspect.pt")
    for label, name in enumerate(names):
        rows = torch.nonzero(labels == label)[:100, 0]
        save_images(options.out / "clean" / name, images[rows], rows.tolist())
    rows = torch.arange(2000, 2200)  # in none of the folders above
    rows = rows[
        ~torch.isin(
            rows,
            torch.cat([torch.nonzero(labels == label)[:100, 0] for label in range(10)]),
        )
    ]
    truth = [f"{row}-{names[labels[row]]}" for row in rows]
    save_images(options.out / "incoming", images[rows], [f"{t}-clean" for t in truth])
    rows = rows[sources[rows]]
    truth = [f"{row}-{names[labels[row]]}" for row in rows]
    save_images(
        options.out / "incoming",
        stamp(images[rows]),
        [f"{t}-stamped" for t in truth],
    )


if __name__ == "__main__":
    main()
