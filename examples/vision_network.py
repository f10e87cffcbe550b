"""Narrows the blocks of a trained ResNet-18, saves it, and reloads it.

    python examples/vision_network.py --keep 0.5 --output out-vision/

The network is torchvision's ResNet-18 with 20 channels, trained on Fashion-MNIST; its weights are
in this clone. The images are a Debian package that is fetched once (`apt-get download`, no root). A
network of your own needs only the lines from `grail.compress` on.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import grail

sys.path.append(str(Path(__file__).parents[1]))  # bench is of this clone, not installed
from bench.quality import networks
from bench.tools.assets import fashion_mnist


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images [N, 1, 28, 28] whose largest output is that of the label."""
    with torch.no_grad():
        guesses = torch.cat([network(part).argmax(1) for part in images.split(500)])
    return float((guesses == labels).double().mean())


def main(arguments: Iterable[str] | None = None) -> dict[str, float]:
    """Returns the accuracies of the dense, the pruned and the compensated network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=float, default=0.5, help="share of channels (%(default)s)")
    parser.add_argument("--images", type=int, default=512, help="of calibration (%(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="images to test on (%(default)s)")
    parser.add_argument("--cache", default=".assets", help="folder of the images (%(default)s)")
    parser.add_argument("--output", default="out-vision", help="folder to create (%(default)s)")
    options = parser.parse_args(None if arguments is None else list(arguments))

    data = fashion_mnist(options.cache)
    test = networks.fashion_inputs(data.test_images[: options.test])
    labels = data.test_labels[: options.test]
    batches = networks.fashion_inputs(data.train_images[: options.images]).split(64)  # no labels

    found = {"dense": accuracy(networks.resnet18_fashion(), test, labels)}
    for name, compensate in {"pruned": False, "compensated": True}.items():
        network = networks.resnet18_fashion()
        grail.compress(network, batches, options.keep, compensate=compensate)
        found[name] = accuracy(network, test, labels)

    grail.save(network, options.output)
    again = grail.load(options.output, networks.new_resnet18)
    with torch.no_grad():
        assert torch.equal(again(test[:8]), network(test[:8]))
    for name, share in found.items():
        print(f"{name}: {share:.1%}")
    return found


if __name__ == "__main__":
    main()
