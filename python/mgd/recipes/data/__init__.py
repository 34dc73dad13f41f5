"""Data sets that are already on this machine; nothing is downloaded. `make data` installs those that it can."""

from mgd.recipes.data.images import Images, cifar10, digits, fashion_mnist, installed, load, read_idx

__all__ = ["Images", "cifar10", "digits", "fashion_mnist", "installed", "load", "read_idx"]
