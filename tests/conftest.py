"""What several test files need: the repository's root on the path, the scripts by name, small image
folders, and what a run wrote or said."""
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bi_tuning
import bissl
import byol
import coin
import core_tuning
import finetune
import simclr

SCRIPTS = {"simclr": simclr, "byol": byol, "coin": coin, "bissl": bissl,
           "finetune": finetune, "core_tuning": core_tuning, "bi_tuning": bi_tuning}
FINE_TUNING = ("finetune", "core_tuning", "bi_tuning")

# These files take as long as all the others together.
OTHER_HALF = ("test_assignment", "test_bad_input", "test_benches", "test_byol", "test_distributed",
              "test_scripts")

# Models this small lose time with more threads, which wait for each other; and the order in which
# numbers are added, so the last bit of a resumed run, depends on how many there are.
torch.set_num_threads(1)


def pytest_cmdline_main(config):
    """The whole suite, `pytest -q tests`, in two processes, since a test keeps one core busy; what
    the second says is printed behind the first. Anything else runs as pytest runs it."""
    if config.invocation_params.args != ("-q", "tests") or (os.cpu_count() or 1) < 2:
        return None
    here = Path(__file__).resolve().parent
    halves = [], []
    for path in sorted(here.glob("test_*.py")):
        halves[path.stem in OTHER_HALF].append(str(path))
    pytest_of = [sys.executable, "-m", "pytest", "-q"]
    with tempfile.TemporaryFile("w+") as said:
        other = subprocess.Popen([*pytest_of, *halves[1]], stdout=said, stderr=subprocess.STDOUT)
        first = subprocess.run([*pytest_of, *halves[0]])
        other.wait()
        said.seek(0)
        print(said.read())
    return first.returncode or other.returncode


def write_folder(root, classes=("a", "b", "c"), per_class=12, side=20, splits=("train", "test")):
    """An ImageFolder of noise pictures, each class around a colour of its own."""
    rng = np.random.default_rng(0)
    for split in splits:
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(per_class):
                noise = rng.integers(0, 120, (side, side, 3))
                pixels = (noise + [(60 * i) % 130, (90 * i) % 130, 40]).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


@pytest.fixture
def here(folder, monkeypatch):
    """The current folder, empty but for pictures/: 36 to train on and 36 to test on, of 3
    classes."""
    monkeypatch.chdir(folder.parent)
    return folder.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def any_copy(monkeypatch):
    """torchvision takes small copies of its data sets for whole ones: what exists has the right
    checksum."""
    for name in ("cifar", "stl10", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.check_integrity",
                            lambda path, md5=None: Path(path).exists())


def draw_nothing(patch):
    """For runs that are shorter than the drawing of their figures."""
    for script in SCRIPTS.values():
        patch.setattr(script, "draw", lambda *ignored: None, raising=False)


def options(data, root, image_size=16, **more):
    """The flags that reading data takes."""
    return Namespace(data=str(data), root=str(root), image_size=image_size, device="cpu", **more)


def backbone_flags(ckpt, arch=None, image_size=64, prefix=None):
    """The flags that starting a backbone from a checkpoint takes."""
    return Namespace(ckpt=str(ckpt), arch=arch, image_size=image_size, prefix=prefix, seed=0,
                     device="cpu", precision="float32", compile=False)


def error_line(capsys, function, *args, **named):
    """The one line on stderr with which function ends the program, as bad input does."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args, **named)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.endswith("\n"), message
    lines = message.splitlines()
    assert len(lines) == 1, message
    return lines[0]


def files(place):
    """The bytes of each file below a folder, by its path from there."""
    found = {}
    for path in place.rglob("*"):
        if path.is_file():
            found[path.relative_to(place).as_posix()] = path.read_bytes()
    return found


def json_lines(path):
    """What OUT.jsonl holds: a dict for each line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
