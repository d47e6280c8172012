"""The data sets by name in their real layouts, their metrics, their cache."""
import json
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat

import bi_tuning
import bissl
import coin
import common
import core_tuning
import finetune
import simclr
from benches import SCRIPTS
from conftest import error_line, json_lines, options, write_folder

pytestmark = pytest.mark.usefixtures("any_copy")
COLOURS = [  # of class 0, 1, ...
    (230, 40, 40),
    (40, 200, 60),
    (60, 60, 230),
    (220, 200, 40),
    (200, 60, 200),
]
USUAL = ["--device", "cpu", "--precision", "float32", "--image-size", "16", "--arch", "resnet10"]
SMALL = [*USUAL, "--epochs", "1", "--batch-size", "8"]


# ------------------------------------------------------------ small copies of the real layouts

def picture(path, label, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[label]).save(path, quality=95)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# Each writes its data set under root, `count` images of each class in a split, and returns its
# classes.


def flowers(root, count):
    base, labels, sets = root / "flowers-102", [], {"trnid": [], "valid": [], "tstid": []}
    for name in sets:
        for label in [0, 1] * count:
            labels.append(label + 1)
            sets[name].append(len(labels))
            picture(base / "jpg" / f"image_{len(labels):05d}.jpg", label)
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", sets)
    return ["pink primrose", "hard-leaved pocket orchid"]


def food(root, count):
    base, names = root / "food-101", ["apple_pie", "waffles"]
    for split in ("train", "test"):
        images = {name: [f"{name}/{split}{i}" for i in range(count)] for name in names}
        write(base / "meta" / f"{split}.json", json.dumps(images))
        for label, name in enumerate(names):
            for image in images[name]:
                picture(base / "images" / f"{image}.jpg", label)
    return names


def cifar(folder, files, meta, label_key, names_key):
    def make(root, count):
        base, names = root / folder, ["apple", "baby"]
        base.mkdir(parents=True)
        per_file = {True: 2 * count // (len(files) - 1), False: 2 * count}
        for file in files:
            labels = [i % 2 for i in range(per_file[file is not files[-1]])]
            colours = np.array(COLOURS, np.uint8)[labels]
            data = colours.repeat(1024, axis=1)  # reds, greens, blues
            (base / file).write_bytes(pickle.dumps({"data": data, label_key: labels}))
        (base / meta).write_bytes(pickle.dumps({names_key: names}))
        return names

    return make


def cub200(root, count):
    base, names = root / "CUB_200_2011", ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    rows = [(label, training, i) for training in (1, 0) for i in range(count) for label in (1, 0)]
    files = [f"{names[label]}/bird_{training}_{i}.jpg" for label, training, i in rows]
    for (label, _, _), file in zip(rows, files):
        picture(base / "images" / file, label)
    lines = lambda values: "".join(f"{i} {value}\n" for i, value in enumerate(values, 1))
    for name, values in (
        ("images", files),
        ("classes", names),
        ("image_class_labels", [label + 1 for label, _, _ in rows]),
        ("train_test_split", [training for _, training, _ in rows]),
    ):
        write(base / f"{name}.txt", lines(values))
    return names


def sun397(root, count):
    base, names = root / "SUN397", ["abbey", "airplane_cabin", "apse/indoor"]
    write(base / "ClassName.txt", "".join(f"/a/{name}\n" for name in names))
    for split in ("Training", "Testing"):
        files = [(f"/a/{name}/sun_{split}{i}.jpg", label) for i in range(count)
                 for label, name in enumerate(names)]
        write(base / f"{split}_01.txt", "".join(f"{file}\n" for file, _ in files))
        for file, label in files:
            picture(base / file[1:], label)
    picture(base / "a" / "abbey" / "sun_in_no_partition.jpg", 4)
    return names


def cars(root, count):
    base, names = root / "stanford_cars", ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    for split, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        annotations = base / file
        rows = [(f"{i:05d}.jpg", np.uint8(i % 2 + 1)) for i in range(2 * count)]
        annotations.parent.mkdir(parents=True, exist_ok=True)
        savemat(annotations,
                {"annotations": np.array(rows, dtype=[("fname", object), ("class", object)])})
        for file, label in rows:
            picture(base / f"cars_{split}" / file, label - 1)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    return names


def aircrafts(root, count):
    base, names = root / "fgvc-aircraft-2013b" / "data", ["707-320", "Cessna 172"]
    write(base / "variants.txt", "".join(f"{name}\n" for name in names))
    for k, split in enumerate(("train", "val", "test")):
        rows = [(f"{k}{i:06d}", i % 2) for i in range(2 * count)]
        write(base / f"images_variant_{split}.txt",
              "".join(f"{image} {names[label]}\n" for image, label in rows))
        for image, label in rows:
            picture(base / "images" / f"{image}.jpg", label)
    return names


# What an image of VOC shows: (class, difficult) of each object. The first class is the one whose
# colour it has.
VOC = [
    [("aeroplane", 0)],
    [("bicycle", 0), ("person", 1)],
    [("bird", 1), ("bird", 0)],
    [("boat", 0), ("aeroplane", 0)],
    [("bottle", 1)],
]


def voc07(root, count):
    base = root / "VOCdevkit" / "VOC2007"
    for k, split in enumerate(("train", "val", "test")):
        names = [f"{k}{i:05d}" for i in range(2 * count)]
        write(base / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{name}\n" for name in names))
        for i, name in enumerate(names):
            objects = ""
            for shown, difficult in VOC[i % 5]:
                objects += f"<object><name>{shown}</name><difficult>{difficult}</difficult>"
                objects += "<part><name>head</name></part></object>"
            write(base / "Annotations" / f"{name}.xml",
                  f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>")
            picture(base / "JPEGImages" / f"{name}.jpg", i % 5)
    return common.VOC_CLASSES


def dtd(root, count):
    base, names = root / "dtd" / "dtd", ["banded", "blotchy"]
    for split in ("train", "val", "test"):
        rows = [(f"{names[label]}/{names[label]}_{split}{i}.jpg", label) for i in range(count)
                for label in (0, 1)]
        write(base / "labels" / f"{split}1.txt", "".join(f"{file}\n" for file, _ in rows))
        write(base / "labels" / f"{split}2.txt", "blotchy/another_partition.jpg\n")
        for file, label in rows:
            picture(base / "images" / file, label)
    return names


def pets(root, count):
    base = root / "oxford-iiit-pet"
    for split in ("trainval", "test"):
        rows = [(f"{name}_{split}{i}", label) for i in range(count)
                for label, name in enumerate(("Abyssinian", "american_bulldog"))]
        write(base / "annotations" / f"{split}.txt",
              "".join(f"{image} {label + 1} {label + 1} 1\n" for image, label in rows))
        for image, label in rows:
            picture(base / "images" / f"{image}.jpg", label)
    return ["Abyssinian", "American Bulldog"]


def caltech101(root, count):
    base, names = root / "caltech101" / "101_ObjectCategories", ["Faces", "accordion"]
    for label, name in enumerate(names):
        for i in range(1, 30 + count + 1):
            picture(base / name / f"image_{i:04d}.jpg", label)
    picture(base / "BACKGROUND_Google" / "image_0001.jpg", 4)
    return names


def stl10(root, count):
    base = root / "stl10_binary"
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    write(base / "class_names.txt", "".join(f"{name}\n" for name in names))
    for split, colours in (
        ("train", [0, 1] * count),
        ("test", [0, 1] * count),
        ("unlabeled", [2] * 12),
    ):
        images = np.array(COLOURS, np.uint8)[colours][:, :, None, None].repeat(96, 2).repeat(96, 3)
        images.tofile(base / f"{split}_X.bin")
        if split != "unlabeled":
            (np.array(colours, np.uint8) + 1).tofile(base / f"{split}_y.bin")
    return names


def imagenet(root, count):
    base = root / "imagenet"
    wnids = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish", "Carassius auratus")}
    for split in ("train", "val"):
        for label, wnid in enumerate(wnids):
            for i in range(count):
                picture(base / split / wnid / f"ILSVRC2012_{split}_{i}.JPEG", label)
    torch.save((wnids, [wnid for wnid in wnids for _ in range(count)]), base / "meta.bin")
    return ["tench, Tinca tinca", "goldfish, Carassius auratus"]


CIFAR10 = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
           "test_batch"]
# How it is written, images per class and split, number of images in train, val and test, the metric
# that is printed first.
LAYOUTS = {
    "flowers": (flowers, 5, (10, 10, 10), "mean_class"),
    "food": (food, 5, (8, 2, 10), "top1"),
    "cifar10": (
        cifar("cifar-10-batches-py", CIFAR10, "batches.meta", "labels", "label_names"),
        5, (8, 2, 10), "top1"),
    "cifar100": (
        cifar("cifar-100-python", ["train", "test"], "meta", "fine_labels", "fine_label_names"),
        5, (8, 2, 10), "top1"),
    "cub200": (cub200, 5, (8, 2, 10), "top1"),
    "sun397": (sun397, 5, (12, 3, 15), "top1"),
    "cars": (cars, 5, (8, 2, 10), "top1"),
    "aircrafts": (aircrafts, 5, (10, 10, 10), "mean_class"),
    "voc07": (voc07, 5, (10, 10, 10), "map"),
    "dtd": (dtd, 5, (10, 10, 10), "top1"),
    "pets": (pets, 5, (8, 2, 10), "mean_class"),
    "caltech101": (caltech101, 4, (48, 12, 8), "mean_class"),
    "stl10": (stl10, 5, (8, 2, 10), "top1"),
    "imagenet": (imagenet, 5, (8, 2, 10), "top1"),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """(root, classes) of each data set, written when it is first asked for."""
    made = {}

    def root_of(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = root, LAYOUTS[name][0](root, LAYOUTS[name][1])
        return made[name]

    return root_of


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_every_named_data_set_is_tested():
    assert set(LAYOUTS) == set(common.DATASETS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_real_layout_gives_the_right_splits_labels_and_pixels(roots, no_network, name):
    root, classes = roots(name)
    for split, size in zip(("train", "val", "test"), LAYOUTS[name][2]):
        store = common.load_data(options(name, root), split)
        assert len(store) == size and list(store.classes[: len(classes)]) == list(classes)
        shown = store.images[store.rows].float().mean((2, 3))  # (n, 3): the colour is the class
        distance = (shown[:, None] - torch.tensor(COLOURS)).abs().amax(2)  # (n, 5)
        nearest, colour = distance.min(1)
        assert nearest.max() < 6
        if name != "voc07":
            assert store.labels.dtype == torch.int64 and torch.equal(colour, store.labels)
            continue
        for row, i in zip(store.labels, colour):
            expected = {shown: -1 for shown, _ in VOC[i]}
            expected |= {shown: 1 for shown, difficult in VOC[i] if not difficult}
            assert {classes[j]: row[j].item() for j in row.nonzero()[:, 0]} == expected


def test_an_imagenet_that_was_not_unpacked_to_the_end_is_refused(tmp_path, no_network, capsys):
    imagenet(tmp_path, 2)
    (tmp_path / "imagenet" / "train" / "n01443537.tar").touch()
    line = error_line(capsys, common.load_data, options("imagenet", tmp_path), "train")
    assert "imagenet/train was not unpacked to the end" in line


def test_a_test_split_of_other_classes_than_train_is_refused(tmp_path, no_network, capsys):
    """Caltech-101's come from its folders, and each split's cache keeps those of its own day."""
    caltech101(tmp_path, 4)
    common.load_data(options("caltech101", tmp_path), "test")
    folders = tmp_path / "caltech101" / "101_ObjectCategories"
    shutil.copytree(next(folders.iterdir()), folders / "zebra")
    line = error_line(capsys, finetune.main, [
        "--data", "caltech101", "--root", str(tmp_path), "--out", str(tmp_path / "run"), *SMALL])
    assert "train and test of caltech101 do not have the same classes" in line


@pytest.mark.parametrize("name", LAYOUTS)
def test_finetune_runs_on_it_and_prints_its_main_metric_first(
    roots, no_network, tmp_path, capsys, monkeypatch, name
):
    if name not in ("voc07", "food"):  # the figure takes a second
        monkeypatch.setattr(finetune, "draw", lambda *args: None)
    result = finetune.main(
        ["--data", name, "--root", str(roots(name)[0]), "--out", str(tmp_path / "run"), *SMALL,
         *([] if name == "voc07" else ["--labels-per-class", "0"])]
    )
    names = ["map", "top1"] if name == "voc07" else ["top1", "top5", "mean_class"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"test  {LAYOUTS[name][3]} ")
    assert all(f"{metric} " in line for metric in names)
    written = json_lines(tmp_path / "run.jsonl")[-1]
    for metric in names:
        assert 0 <= written[f"test_{metric}"] == result[f"test_{metric}"] <= 100


def test_simclr_learns_from_the_unlabeled_images_of_stl10(roots, tmp_path, monkeypatch):
    seen, batches = [], common.Batches

    def spy(store, *rest, **how):
        seen.append(store)
        return batches(store, *rest, **how)

    monkeypatch.setattr(common, "Batches", spy)
    simclr.main(["--data", "stl10", "--root", str(roots("stl10")[0]),
                 "--out", str(tmp_path / "run"), *SMALL])
    assert len(seen[0]) == 12
    assert (seen[0].images[:, 2] > seen[0].images[:, 0]).all()  # the third colour
    assert common.load_checkpoint(tmp_path / "run.pt")["resume"]["history"][-1]["knn"] is not None


@pytest.mark.parametrize("name", LAYOUTS)
def test_absent_files_without_a_network_are_one_line_with_folder_and_row(
    no_network, tmp_path, capsys, name
):
    line = error_line(
        capsys, finetune.main,
        ["--data", name, "--root", str(tmp_path / "root"), "--out", str(tmp_path / "x"), *SMALL])
    assert f"{tmp_path}/root/{common.DATASETS[name][2]}" in line
    assert f"the row {name} of the table under Data in README.md" in line


@pytest.mark.parametrize("name, file, named", [
    ("sun397", "SUN397/Training_01.txt", "Training_01.txt"),
    ("cifar10", "cifar-10-batches-py/data_batch_3", "row cifar10"),
    ("voc07", "VOCdevkit/VOC2007/Annotations/000003.xml", "000003.xml"),
    ("stl10", "stl10_binary/class_names.txt", "class_names"),
    ("dtd", "dtd/dtd/images/banded/banded_train2.jpg", "banded_train2"),
    ("pets", "oxford-iiit-pet/images/Abyssinian_trainval0.jpg", "trainval0")])
def test_a_missing_file_is_named(no_network, tmp_path, capsys, name, file, named):
    LAYOUTS[name][0](tmp_path, 5)
    (tmp_path / file).unlink()
    assert named in error_line(capsys, common.load_data, options(name, tmp_path), "train")


def test_a_dead_network_does_not_hang(tmp_path, monkeypatch, capsys):
    limits = []

    def dead(*args, **kwargs):
        limits.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", dead)
    error_line(capsys, common.load_data, options("dtd", tmp_path), "train")
    assert limits and 0 < limits[0] <= 60


def test_thirty_images_a_class_of_caltech_are_always_the_same_for_training(roots):
    first, second = (
        common.open_dataset("caltech101", roots("caltech101")[0], "train") for _ in range(2)
    )
    test = common.open_dataset("caltech101", roots("caltech101")[0], "test")
    assert first[0] == second[0] and np.bincount(first[1]).tolist() == [30, 30]
    assert not set(first[0]) & set(test[0])
    assert [int(path[-8:-4]) for path in first[0][:30]] != list(range(1, 31))


def test_stray_files_among_caltechs_pictures_change_nothing(tmp_path):
    for place in ("clean", "stray"):
        caltech101(tmp_path / place, 4)
    folder = tmp_path / "stray" / "caltech101" / "101_ObjectCategories"
    for name in (".DS_Store", "Faces/.DS_Store", "Faces/._image_0001.jpg",
                 "Faces/.ipynb_checkpoints/image_0001-checkpoint.jpg", "notes.txt"):
        write(folder / name, "no picture")
    for split in ("train", "test"):
        clean = common.open_dataset("caltech101", tmp_path / "clean", split)
        stray = common.open_dataset("caltech101", tmp_path / "stray", split)
        assert stray[1:] == clean[1:]
        assert [path[-20:] for path in stray[0]] == [path[-20:] for path in clean[0]]


# ------------------------------------------------------------ the commands of the papers' scale

RESULTS = (Path(__file__).parent / "results/README.md").read_text()
SECTION = RESULTS.split("## The papers' own numbers beside ours")[-1].split("\n## ")[0]
CHAINS = {part.splitlines()[0]: re.findall(r"^    python (\w+)\.py (.+)$", part, re.M)
          for part in SECTION.split("### ")[1:]}


def moco(path):
    """Weights as MoCo's authors publish theirs, of a ResNet-10."""
    state = common.build_backbone("resnet10", True).state_dict()
    named = {f"module.encoder_q.{name}": value for name, value in state.items()}
    torch.save({"epoch": 200, "arch": "resnet10", "state_dict": named}, path)


@pytest.mark.parametrize("paper", CHAINS)
def test_the_commands_of_the_papers_scale_run_on_a_small_copy(
        no_network, tmp_path, monkeypatch, paper):
    monkeypatch.chdir(tmp_path)
    for name in ("moco_v1_200ep_pretrain.pth.tar", "moco_v2_800ep_pretrain.pth.tar"):
        moco(name)
    for name in ("imagenet", "flowers", "cifar100", "cub200"):
        if any(f"--data {name} " in flags for _, flags in CHAINS[paper]):
            LAYOUTS[name][0](tmp_path / "data", 20)
    small = "--image-size 16 --device cpu --precision float32 --batch-size 8"
    more = dict.fromkeys(SCRIPTS, "--epochs 1")
    more["coin"] = "--epochs 2"
    more["bissl"] = ("--alternations 1 --lower-steps 1 --upper-steps 1 --head-epochs 1 "
                     "--pretext-batch-size 8")
    assert CHAINS[paper]
    for script, flags in CHAINS[paper]:
        flags = flags.replace("resnet50", "resnet10").replace("--search 100 --seeds 10",
                                                              "--search 1 --seeds 1")
        if "after-coin" not in flags:  # has what is left of COIN's budget
            flags = f"{flags} {small} {more[script]}"
        SCRIPTS[script].main(flags.replace("--seeds 3", "").split())


# ------------------------------------------------------------ several labels per image

@pytest.mark.parametrize("script, flags", [
    (coin, ["--epochs", "2", "--alpha", "0.5"]),
    (core_tuning, []),
    (bi_tuning, []),
    (finetune, ["--eta", "0.1"]),
    (core_tuning, ["--fraction", "0.5"])])
def test_what_needs_one_label_an_image_says_so(roots, tmp_path, capsys, script, flags):
    line = error_line(capsys, script.main, ["--data", "voc07", "--root", str(roots("voc07")[0]),
                                            "--out", str(tmp_path / "x"), *SMALL, *flags])
    assert "several classes" in line


def test_two_images_of_each_class_that_voc_shows_can_be_asked_for(roots):
    args = options("voc07", roots("voc07")[0], labels_per_class=2, fraction=None)
    every, few = common.load_data(args, "train"), common.load_labelled(args, seed=0)
    shown = (every.labels == 1).sum(0)
    assert ((few.labels == 1).sum(0) >= shown.clamp(max=2)).all() and len(few) < len(every)


def test_a_fraction_of_voc_and_bissl_and_a_search_work(roots, tmp_path, monkeypatch):
    usual = ["--data", "voc07", "--root", str(roots("voc07")[0]), "--batch-size", "4", *USUAL]
    monkeypatch.setattr(simclr, "draw", lambda *args: None)
    simclr.main([*usual, "--epochs", "1", "--out", str(tmp_path / "simclr")])
    result = bissl.main(
        [*usual, "--ckpt", str(tmp_path / "simclr.pt"), "--out", str(tmp_path / "bissl"),
         "--alternations", "1", "--lower-steps", "1", "--upper-steps", "1", "--head-epochs", "1",
         "--pretext-batch-size", "8", "--fraction", "0.5"]
    )
    assert 0 < result["upper_phi"] < 5 and result["knn"] is None
    monkeypatch.setattr(finetune, "draw", lambda *args: None)
    finetune.main([*usual, "--epochs", "1", "--search", "2", "--fraction", "0.5",
                   "--out", str(tmp_path / "run")])
    runs = json_lines(tmp_path / "run.jsonl")[-1]["runs"]
    best = max(runs[:2], key=lambda run: run["map"])
    assert runs[2]["lr"] == best["lr"]


def test_the_search_goes_by_the_main_metric(roots, tmp_path, monkeypatch):
    scores = iter(
        [dict(top1=90.0, top5=90.0, mean_class=10.0), dict(top1=10.0, top5=90.0, mean_class=90.0)]
        + [dict.fromkeys(("top1", "top5", "mean_class"), 50.0)] * 9
    )
    monkeypatch.setattr(finetune, "draw", lambda *args: None)
    monkeypatch.setattr(finetune, "evaluate", lambda *args: (next(scores), None))
    finetune.main(["--data", "pets", "--root", str(roots("pets")[0]),
                   "--out", str(tmp_path / "run"), *SMALL, "--search", "2"])
    runs = json_lines(tmp_path / "run.jsonl")[-1]["runs"]
    assert runs[2]["lr"] == runs[1]["lr"] != runs[0]["lr"]


def test_task_loss_against_a_slow_loop():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(7, 5)) * 3, requires_grad=True)
    y = torch.tensor(rng.choice([-1, 0, 1], (7, 5)))
    terms = []
    for i in range(7):
        for c in range(5):
            if y[i, c] >= 0:
                sign = 1 if y[i, c] == 1 else -1
                terms.append(-torch.log(torch.sigmoid(sign * logits[i, c])))
    loss = finetune.label_loss(logits, y)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[y < 0] == 0).all() and (gradient[y >= 0] != 0).all()
    assert finetune.label_loss(logits, -torch.ones_like(y)) == 0
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    assert torch.equal(finetune.label_loss(logits, labels), F.cross_entropy(logits, labels))
    assert finetune.label_loss(logits.bfloat16(), y).dtype == torch.float32


def test_a_probe_of_huge_data_uses_a_part(tmp_path, monkeypatch):
    write_folder(tmp_path / "pictures", per_class=12)
    monkeypatch.setattr(common, "PROBE_IMAGES", (10, 4))
    first, again = (common.load_probe(options(tmp_path / "pictures", tmp_path)) for _ in range(2))
    assert [len(store) for store in first] == [10, 4] and torch.equal(first[0].rows, again[0].rows)


def test_voc_has_no_probe(roots):
    assert common.load_probe(options("voc07", roots("voc07")[0])) is None


# ------------------------------------------------------------ the cache

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """120 JPEGs of smooth noise, 240 x 180."""
    folder, rng = tmp_path_factory.mktemp("many") / "pictures", np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "test" / name).mkdir(parents=True)
        for i in range(60):
            noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            noise = noise.resize((240, 180), Image.Resampling.BICUBIC)
            noise.save(folder / "test" / name / f"{i}.jpg", quality=90)
    return folder


def cache_files(root):
    return sorted(path.name.split("-")[-1].split(".", 1)[1] for path in (root / "cache").iterdir())


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The bytes of an uninterrupted decoding in one chunk."""
    store = common.load_data(options(pictures, tmp_path_factory.mktemp("whole")), "test")
    return store.images.numpy().tobytes()


def test_many_chunks_are_the_same_bytes_as_one(pictures, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr(common, "DECODE_CHUNK", 7)
    assert common.load_data(options(pictures, tmp_path), "test").images.numpy().tobytes() == whole
    assert cache_files(tmp_path) == ["npy", "pt"]
    assert re.search(r"decoded 120/120  [\d,]+ images/s", capsys.readouterr().out)


def start_slow_run(pictures, tmp_path, log):
    """The id of a forked process that decodes 5 images at once, 20 ms each; logs what it prints."""
    child = os.fork()
    if child:
        return child
    read, sys.stdout, common.DECODE_CHUNK = common.read_image, open(log, "w"), 5

    def slowly(path, side):
        time.sleep(0.02)
        return read(path, side)

    common.read_image = slowly
    print(len(common.load_data(options(pictures, tmp_path), "test")), flush=True)
    os._exit(0)


def lines(path):
    return path.read_text().splitlines()


def test_of_two_runs_at_once_both_decode_and_end_right(pictures, tmp_path, whole):
    logs = [tmp_path / "a", tmp_path / "b"]
    runs = [start_slow_run(pictures, tmp_path, log) for log in logs]
    assert [os.waitpid(run, 0)[1] for run in runs] == [0, 0]
    for log in logs:
        assert lines(log)[0].startswith("decoding 120 images") and lines(log)[-1] == "120"
    assert np.load(next((tmp_path / "cache").glob("*.npy"))).tobytes() == whole
    assert cache_files(tmp_path) == ["npy", "pt"]


def test_a_killed_run_leaves_nothing_that_the_next_one_takes(pictures, tmp_path, whole):
    run = start_slow_run(pictures, tmp_path, tmp_path / "log")
    while not list(tmp_path.glob("cache/*/*")):
        time.sleep(0.02)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert not list(tmp_path.glob("cache/*.npy"))
    store = common.load_data(options(pictures, tmp_path), "test")
    assert store.images.numpy().tobytes() == whole


@pytest.mark.parametrize("name", ["cifar10", "voc07", "dtd", "stl10"])
def test_a_finished_cache_of_a_published_set_opens_no_data_set(tmp_path, monkeypatch, name):
    LAYOUTS[name][0](tmp_path, 5)
    splits = ("unlabeled", "train", "val", "trainval", "test")
    first = [common.load_data(options(name, tmp_path), split) for split in splits]
    common.shared_images.cache_clear()  # as in another run
    monkeypatch.setattr(common, "open_dataset", lambda *args: 1 / 0)
    for path in tmp_path.iterdir():
        if path.name != "cache":
            shutil.rmtree(path)
    for split, before in zip(splits, first):
        after = common.load_data(options(name, tmp_path), split)
        assert torch.equal(after.images, before.images) and torch.equal(after.rows, before.rows)
        assert torch.equal(after.labels, before.labels) and after.classes == before.classes


def test_a_cache_of_a_published_set_is_named_by_name_split_and_side(roots, tmp_path):
    LAYOUTS["dtd"][0](tmp_path, 5)
    for split in ("train", "test"):
        common.load_data(options("dtd", tmp_path), split)
    common.load_data(options("dtd", tmp_path, image_size=32), "test")
    names = ["dtd-test-20", "dtd-test-40", "dtd-train-val-20"]
    expected = [f"{name}.{ending}" for name in names for ending in ("npy", "pt")]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == expected


def test_a_published_set_has_a_cache_of_its_own_whatever_links_are_here(tmp_path, monkeypatch):
    (tmp_path / "pool").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "cifar100"):
        (tmp_path / name).symlink_to("pool")
        cache = common.cache_path(options(name, tmp_path), ["test"])
        assert cache.name == f"{name}-test-20.npy"


def test_of_several_processes_the_first_builds_and_the_others_wait(pictures, tmp_path, monkeypatch):
    meetings = []

    def first_builds():  # what process 0 does while process 1 waits at the barrier
        meetings.append(sorted(path.suffix for path in tmp_path.glob("cache/*.*")))
        if common.rank() == 1:
            monkeypatch.setattr(common, "rank", lambda: 0)
            common.load_data(options(pictures, tmp_path), "test")
            monkeypatch.setattr(common, "rank", lambda: 1)

    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common, "rank", lambda: 1)
    monkeypatch.setattr(common.dist, "barrier", first_builds)
    assert len(common.load_data(options(pictures, tmp_path), "test")) == 120
    assert meetings == [[], [".npy", ".pt"]]


@pytest.mark.parametrize("chunk", [256, 5])
def test_a_broken_picture_in_any_chunk_is_one_line(tmp_path, monkeypatch, capsys, chunk):
    folder = write_folder(tmp_path / "pictures", splits=("test",))
    monkeypatch.setattr(common, "DECODE_CHUNK", chunk)
    (folder / "test" / "b" / "3.png").write_bytes(b"no picture")
    line = error_line(capsys, common.load_data, options(folder, tmp_path), "test")
    assert "broken image file" in line and "b/3.png" in line
    Image.new("RGB", (20, 20)).save(folder / "test" / "b" / "3.png")
    assert len(common.load_data(options(folder, tmp_path), "test")) == 36


def test_a_reduced_jpeg_differs_little_from_the_full_one(tmp_path):
    """Measured: 1.3 of 255, mean over all pixels, the worst of 8 pictures with detail of 4 pixels
    decoded at a quarter."""
    rng, worst = np.random.default_rng(0), 0
    for i in range(8):
        rough = 0
        for h in (6, 24, 90):
            noise = Image.fromarray(rng.integers(0, 256, (h, h * 4 // 3, 3), dtype=np.uint8))
            noise = noise.resize((500, 375), Image.Resampling.BICUBIC)
            rough = rough + np.asarray(noise, dtype=float) / 3
        Image.fromarray(rough.astype(np.uint8)).save(tmp_path / "x.jpg", quality=90)
        reduced = common.read_image(tmp_path / "x.jpg", 40)
        full = common.read_image(tmp_path / "x.jpg")
        assert min(reduced.size) < min(full.size) and min(reduced.size) >= 80
        small = []
        for image in (reduced, full):
            image = common.ImageOps.fit(image, (40, 40), Image.Resampling.BICUBIC)
            small.append(np.asarray(image, dtype=float))
        worst = max(worst, np.abs(small[0] - small[1]).mean())
    assert 0 < worst < 2


@pytest.mark.parametrize("size, side, expected", [
    ((500, 375), 80, (250, 188)),
    ((500, 375), 94, (500, 375)),
    ((640, 480), 60, (160, 120)),
    ((640, 480), 61, (320, 240)),
    ((100, 60), 40, (100, 60))])
def test_a_jpeg_is_reduced_only_where_twice_the_side_is_left(tmp_path, size, side, expected):
    Image.new("RGB", size).save(tmp_path / "x.jpg")
    assert common.read_image(tmp_path / "x.jpg", side).size == expected


def test_the_cache_is_mapped_read_only_and_no_memory_of_the_process(pictures, tmp_path, recwarn):
    images = common.load_data(options(pictures, tmp_path), "test").images
    maps = Path("/proc/self/maps")
    mapped = []
    if maps.exists():
        mapped = [line.split() for line in lines(maps) if str(tmp_path) in line]
    assert all(fields[1].startswith("r-") for fields in mapped) and images.dtype == torch.uint8
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
