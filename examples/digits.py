"""The handwritten digits that scikit-learn ships, and batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the images, split 4 : 1, always in the same way.

    Returns
    -------
    train_images, train_labels, test_images, test_labels : Tensor
        Images are float32 of shape (n, 64) in [0, 1], labels int64 of shape (n,); n is 1437 and 360.
    """
    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        (digits.data / 16.0).astype("float32"), digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return (
        torch.from_numpy(train_images),
        torch.from_numpy(train_labels),
        torch.from_numpy(test_images),
        torch.from_numpy(test_labels),
    )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Return rows of batches without end, shuffled anew each epoch; an incomplete last batch is left out."""
    if size > count:
        raise ValueError(f"a batch of {size} images does not fit into {count}")
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(count, generator=generator).split(size) for _ in itertools.count())
    return (rows for epoch in epochs for rows in epoch if len(rows) == size)
