"""Puts the repository's root on the path, and makes small image folders for the tests."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Models this small lose time with more threads, which wait for each other; and the order in which numbers are added, so the
# last bit of a resumed run, depends on how many there are.
torch.set_num_threads(1)


def write_folder(root, classes=("a", "b", "c"), per_class=12, side=20, splits=("train", "test")):
    """An ImageFolder of noise pictures, each class around a colour of its own."""
    rng = np.random.default_rng(0)
    for split in splits:
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(per_class):
                pixels = (rng.integers(0, 120, (side, side, 3)) + [(60 * i) % 130, (90 * i) % 130, 40]).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def any_copy(monkeypatch):
    """torchvision takes small copies of its data sets for whole ones: what exists has the right checksum."""
    for name in ("cifar", "stl10", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.check_integrity", lambda path, md5=None: Path(path).exists())
