"""Files and machines as people have them: each row was reported to a neighbouring project, or is of
the same kind. It works and is right, or one line says what to do."""
import argparse
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import coin
import common
import finetune
import simclr
from conftest import (FINE_TUNING, ROOT, SCRIPTS, backbone_flags, draw_nothing, error_line, files,
                      json_lines, options, write_folder)

TINY = ["--device", "cpu", "--precision", "float32", "--image-size", "16", "--batch-size", "8"]
FAST = [*TINY, "--data", "pictures", "--root", "root", "--epochs", "1"]


# ------------------------------------------------------------------------- A. another network fits

def with_extra(**extra):
    """The weights of a small ResNet, and something beside them."""
    return {**common.build_backbone("resnet10", False).state_dict(), **extra}


def resnet152():
    """Its state dict, of tensors that repeat one number: no file of 240 MB."""
    with torch.device("meta"):
        state = torchvision.models.resnet152().state_dict()
    return {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}


OTHER_NETWORKS = {  # a state dict, and the tensor that gives it away
    "resnet152": (resnet152, "layer2.4."),
    "more stages": (lambda: with_extra(**{"layer5.0.conv1.weight": torch.zeros(1)}), "layer5."),
    "squeeze and excitation": (
        lambda: with_extra(**{"layer1.0.se.fc1.weight": torch.zeros(1)}), "layer1.0.se."),
    "a deeper stem": (lambda: with_extra(**{"conv2.weight": torch.zeros(1)}), "conv2.weight"),
    "another pooling": (lambda: with_extra(**{"attnpool.weight": torch.zeros(1)}), "attnpool."),
    "a learnt pooling": (lambda: with_extra(**{"avgpool.p": torch.zeros(1)}), "avgpool.p"),
    "an activation with weights": (lambda: with_extra(**{"relu.weight": torch.ones(1)}), "relu."),
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_another_network_is_no_fit(tmp_path, capsys, name):
    make, tensor = OTHER_NETWORKS[name]
    torch.save(make(), tmp_path / "in.pt")
    line = error_line(capsys, common.start_backbone, backbone_flags(tmp_path / "in.pt"))
    assert tensor in line and "another network" in line


@pytest.mark.parametrize("head", ["fc.weight", "fc.0.weight", "head.weight", "classifier.1.bias",
                                  "projector.0.weight", "prototypes.weight", "queue"])
def test_a_head_beside_the_backbone_is_left_out(tmp_path, capsys, head):
    torch.save(with_extra(**{head: torch.zeros(2)}), tmp_path / "in.pt")
    common.start_backbone(backbone_flags(tmp_path / "in.pt"))
    assert f"backbone tensors matched, left out {head}" in capsys.readouterr().out


def small_stem_resnet(padding=1):
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    model.maxpool, model.fc = nn.Identity(), nn.Identity()
    return model


def test_what_is_assumed_of_the_stem_is_said(tmp_path, capsys):
    torch.save(small_stem_resnet().state_dict(), tmp_path / "small.pt")
    common.start_backbone(backbone_flags(tmp_path / "small.pt"))
    assert "3x3 stem: stride 1, padding 1, no max-pool" in capsys.readouterr().out
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "large.pt")
    common.start_backbone(backbone_flags(tmp_path / "large.pt"))
    assert "7x7 stem: stride 2, padding 3, max-pool" in capsys.readouterr().out
    line = error_line(capsys, common.start_backbone,
                      backbone_flags(tmp_path / "large.pt", image_size=16))
    assert "too small for the stem" in line and "17 or more" in line


def solo_learn_file(path, flags):
    """A checkpoint with solo-learn's names and stem: -> its network."""
    model = small_stem_resnet(padding=2)
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": flags}, path)
    return model


@pytest.mark.parametrize("flags", [None, ["--lr", "1"], {"data": None}])
def test_hyper_parameters_of_another_kind_tell_nothing(flags):
    assert common.stem_padding({"hyper_parameters": flags}) == 1


@pytest.mark.parametrize("flags", [
    {"dataset": "cifar10"}, argparse.Namespace(dataset="cifar100"),
    {"data": {"dataset": "cifar10"}, "method": "simclr"}])
def test_solo_learns_cifar_stem_is_recognised(tmp_path, capsys, flags):
    solo_learn_file(tmp_path / "in.pt", flags)
    common.start_backbone(backbone_flags(tmp_path / "in.pt"))
    assert "3x3 stem: stride 1, padding 2" in capsys.readouterr().out


def test_solo_learns_cifar_stem_stays_in_the_chain(tmp_path, monkeypatch, capsys):
    draw_nothing(monkeypatch)
    model = solo_learn_file(tmp_path / "in.pt", {"dataset": "cifar10"})
    write_folder(tmp_path / "pictures", per_class=4)
    argv = [*TINY, "--data", str(tmp_path / "pictures"), "--root", str(tmp_path / "root"),
            "--epochs", "2", "--ckpt", str(tmp_path / "in.pt"), "--out", str(tmp_path / "coin"),
            "--lr", "1e-12", "--alpha", "0.5"]
    coin.main(argv)
    assert "3x3 stem: stride 1, padding 2" in capsys.readouterr().out
    after, _ = common.start_backbone(backbone_flags(tmp_path / "coin.pt", image_size=None))
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(after.train()(x), model.train()(x), atol=1e-4)


# --------------------------------------------------- B. weights in other containers and with flags

HARMLESS = {
    "Namespace": argparse.Namespace(lr=0.1), "path": pathlib.PurePosixPath("/a"),
    "numpy number": np.float64(1.5), "numpy integer": np.int64(3), "numpy truth": np.bool_(True),
    "numpy text": np.str_("a"), "numpy array": np.arange(3), "random state": np.random.get_state(),
    "simple namespace": types.SimpleNamespace(a=1), "time": datetime(2020, 1, 2),
    "a path of this system": Path("/a/b"), "set": {1, 2}, "device": torch.device("cpu"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_types_beside_the_weights_are_read(tmp_path, name, zipped):
    model = common.build_backbone("resnet10", True)
    content = {"state_dict": model.state_dict(), "args": HARMLESS[name]}
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    backbone, _ = common.start_backbone(backbone_flags(tmp_path / "in.pt"))
    assert torch.equal(backbone.conv1.weight, model.conv1.weight)


class Unknown:
    """A type that nobody has allowed."""


def test_the_type_that_is_not_run_is_named(tmp_path, capsys):
    torch.save({"state_dict": with_extra(), "x": Unknown()}, tmp_path / "in.pt")
    line = error_line(capsys, common.start_backbone, backbone_flags(tmp_path / "in.pt"))
    assert "Unknown" in line and "would run code" in line


def write_safetensors(path, tensors):
    """As the format is described: length, JSON header, bytes."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    names = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
    for name, value in tensors.items():
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_are_read_without_a_package(tmp_path, dtype):
    backbone = common.build_backbone("resnet10", True)
    state = {}
    for key, value in backbone.state_dict().items():
        state[key] = value.to(dtype) if value.is_floating_point() else value
    write_safetensors(tmp_path / "in.safetensors", state)
    read, _ = common.start_backbone(backbone_flags(tmp_path / "in.safetensors"))
    for key, value in read.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype))


def scripted(path):
    torch.jit.script(nn.Linear(2, 2)).save(str(path))


@pytest.mark.parametrize("name, write, said", [
    ("cut.safetensors", lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "safetensors"),
    ("none.safetensors", lambda path: None, "no checkpoint"),
    ("program.pt", scripted, "TorchScript"),
    ("text.pt", lambda path: path.write_text("hello"), "no checkpoint"),
    ("page.pth", lambda path: path.write_text("<html>not found</html>"), "no checkpoint"),
    ("pointer.pt", lambda path: path.write_text("version https://git-lfs"), "no checkpoint"),
    ("plain.pt", lambda path: path.write_bytes(pickle.dumps({"a": 1})), "plain pickle"),
    ("module.pt", lambda path: torch.save(nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
    ("number.pt", lambda path: torch.save(3, path), "no ResNet backbone"),
    ("list.pt", lambda path: torch.save([torch.zeros(2)], path), "no ResNet backbone"),
])
@pytest.mark.filterwarnings("ignore")
def test_other_files_are_called_what_they_are(tmp_path, capsys, name, write, said):
    write(tmp_path / name)
    assert said in error_line(capsys, common.start_backbone, backbone_flags(tmp_path / name))


TWO = {
    "timm's average": ({"ema_model": 0, "model": 1}, "ema_model.", "model."),
    "DINO": ({"student": 0, "teacher": 1}, "student.", "teacher."),
}


@pytest.mark.parametrize("name", TWO)
def test_of_several_networks_the_line_says_which_and_how_to_take_the_other(
        tmp_path, capsys, name):
    places, taken, other = TWO[name]
    models = common.build_backbone("resnet10", True), common.build_backbone("resnet10", True)
    torch.save({key: models[i].state_dict() for key, i in places.items()}, tmp_path / "in.pt")
    first, _ = common.start_backbone(backbone_flags(tmp_path / "in.pt"))
    said = capsys.readouterr().out
    assert f"under {taken}" in said and f"--prefix {other}" in said
    assert torch.equal(first.conv1.weight, models[0].conv1.weight)
    second, _ = common.start_backbone(backbone_flags(tmp_path / "in.pt", prefix=other))
    assert torch.equal(second.conv1.weight, models[1].conv1.weight)
    args = backbone_flags(tmp_path / "in.pt", prefix="no.")
    line = error_line(capsys, common.start_backbone, args)
    assert taken in line and other in line


def test_lightlys_own_resnet_is_read(tmp_path):
    """Its children are numbered 0, 1, 2 to 5, and it says shortcut for downsample."""
    model, state = small_stem_resnet(), {}
    numbers = dict(conv1="0", bn1="1", layer1="2", layer2="3", layer3="4", layer4="5")
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        rest = rest.replace("downsample", "shortcut")
        state[f"backbone.{numbers[part]}.{rest}"] = value
    torch.save({"state_dict": state}, tmp_path / "in.pt")
    backbone, _ = common.start_backbone(backbone_flags(tmp_path / "in.pt"))
    for key, value in model.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key


# ----------------------------------------------------------------- C. a picture reads as it looks

def arrow(side=24):
    """A picture of which every turn and mirror image looks different."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[: side // 2, : side // 2] = 255, 0, 0
    pixels[: side // 2, side // 2:] = 0, 255, 0
    pixels[side // 2:, : side // 2] = 0, 0, 255
    return Image.fromarray(pixels)


# How a camera stores the upright picture under each EXIF orientation.
STORED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_photo_is_turned_as_its_camera_was(tmp_path, orientation, ending):
    stored, exif = arrow().transpose(STORED[orientation]), Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{ending}", exif=exif, quality=100)
    read = np.asarray(common.read_image(tmp_path / f"x.{ending}"), dtype=int)
    assert np.abs(read - np.asarray(arrow(), dtype=int))[2:10, 2:10].max() < 60
    assert np.abs(read - np.asarray(arrow(), dtype=int))[14:, 2:10].max() < 60


def of_mode(mode, colour):
    return Image.new(mode, (8, 8), colour)


def from_array(value, dtype):
    return Image.fromarray(np.full((8, 8), value, dtype))


MODES = {  # picture, ending, colour; None: refused, since black and white are not defined
    "1": (of_mode("1", 1), "png", (255, 255, 255)),
    "L": (of_mode("L", 100), "png", (100, 100, 100)),
    "LA": (of_mode("LA", (100, 0)), "png", (255, 255, 255)),
    "P": (of_mode("RGB", (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), "png",
          (10, 200, 30)),
    "RGB": (of_mode("RGB", (10, 200, 30)), "png", (10, 200, 30)),
    "RGBA": (of_mode("RGBA", (10, 200, 30, 0)), "png", (255, 255, 255)),
    "CMYK": (of_mode("CMYK", (0, 255, 255, 0)), "tiff", (255, 0, 0)),
    "YCbCr": (of_mode("RGB", (255, 0, 0)).convert("YCbCr"), "tiff", (255, 0, 0)),
    "LAB": (of_mode("LAB", (255, 128, 128)), "tiff", (255, 255, 255)),
    "I;16 png": (from_array(32896, np.uint16), "png", (128, 128, 128)),
    "I;16 tiff": (from_array(65535, np.uint16), "tiff", (255, 255, 255)),
    "I;16B tiff": (Image.frombytes("I;16B", (8, 8), b"\x80\x80" * 64), "tiff", (128, 128, 128)),
    "16-bit pgm": (from_array(32896, np.uint16), "pgm", (128, 128, 128)),
    "I tiff": (from_array(100, np.int32), "tiff", None),
    "F tiff": (from_array(0.5, np.float32), "tiff", None),
    "F tiff to 255": (from_array(255, np.float32), "tiff", None),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_of_pillow_is_decided(tmp_path, name):
    picture, ending, colour = MODES[name]
    picture.save(tmp_path / f"x.{ending}")
    if colour is None:
        with pytest.raises(ValueError, match=f"x.{ending}"):
            common.read_image(tmp_path / f"x.{ending}")
        return
    read = np.asarray(common.read_image(tmp_path / f"x.{ending}"), dtype=int)
    assert np.abs(read - colour).max() <= 4


def png_of_16_bit(path, value):
    """A PNG of 16 bit a colour, which Pillow does not write."""
    row = b"\0" + struct.pack(">H", value) * 3 * 8
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
                       (b"IDAT", zlib.compress(8 * row)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


@pytest.mark.parametrize("value, is_said", [(4095, True), (40_000, False)])
@pytest.mark.parametrize("kind", ["grey.png", "grey.tiff", "colour.png"])
def test_16_bit_of_which_few_are_used_are_said(tmp_path, capsys, kind, value, is_said):
    common.tell_once.cache_clear()
    for name in ("1", "2"):
        if kind == "colour.png":
            png_of_16_bit(tmp_path / f"{name}{kind}", value)
        else:
            from_array(value, np.uint16).save(tmp_path / f"{name}{kind}")
        read = np.asarray(common.read_image(tmp_path / f"{name}{kind}"), dtype=int)
        assert np.abs(read - value / 257).max() <= 1
    assert capsys.readouterr().out.count("read as nearly black") == is_said


def test_a_picture_without_a_range_ends_the_run_in_a_line(here, capsys):
    from_array(0.5, np.float32).save("pictures/train/a/x.tiff")
    line = error_line(capsys, finetune.main, [*FAST, "--arch", "resnet10"])
    assert "x.tiff" in line and "mode F" in line


# --------------------------------------------------------------- D. foreign entries are not data

def hidden_copies(place):
    (place / "train" / ".ipynb_checkpoints").mkdir()
    (place / "train" / "a" / ".ipynb_checkpoints").mkdir()
    for target in (".ipynb_checkpoints/0-checkpoint.png", "a/.ipynb_checkpoints/0-copy.png",
                   "a/._0.png"):
        (place / "train" / target).write_bytes((place / "train" / "a" / "0.png").read_bytes())
    (place / "train" / ".DS_Store").write_bytes(b"x")
    (place / "train" / "a" / ".DS_Store").write_bytes(b"x")


def link_to_parent(place):
    (place / "train" / "b" / "up").symlink_to(place / "train")


def link_to_own_folder(place):
    (place / "train" / "a" / "again").symlink_to(place / "train" / "a")


def link_to_a_picture(place):
    (place / "train" / "a" / "00.png").symlink_to(place / "train" / "c" / "3.png")


def link_of_a_class(place):
    (place / "train" / "a" / "more").symlink_to(place / "train" / "b")


def other_endings(place):
    (place / "train" / "a" / "notes.txt").write_text("x")
    (place / "train" / "labels.csv").write_text("x")


@pytest.mark.parametrize("add", [hidden_copies, link_to_parent, link_to_own_folder,
                                 link_to_a_picture, link_of_a_class, other_endings])
def test_what_is_no_data_changes_nothing(folder, tmp_path, add):
    before = common.load_data(options(folder, tmp_path / "one"), "trainval")
    add(folder)
    after = common.load_data(options(folder, tmp_path / "two"), "trainval")
    assert after.classes == before.classes == ["a", "b", "c"]
    assert torch.equal(after.labels, before.labels)
    assert torch.equal(after.images[after.rows], before.images[before.rows])


def test_links_to_pictures_elsewhere_are_data(folder, tmp_path):
    before = common.load_data(options(folder, tmp_path / "one"), "trainval")
    pool = tmp_path / "pool"
    pool.mkdir()
    for path in sorted((folder / "train").rglob("*.png")):
        stored = pool / f"{path.parent.name}-{path.name}"
        path.rename(stored)
        path.symlink_to(stored)
    after = common.load_data(options(folder, tmp_path / "two"), "trainval")
    assert torch.equal(after.labels, before.labels)
    assert torch.equal(after.images[after.rows], before.images[before.rows])


def test_files_that_are_left_out_for_their_ending_are_counted(folder, tmp_path, capsys):
    for name in ("one.txt", "two.gif"):
        (folder / "train" / "b" / name).write_text("x")
    common.load_data(options(folder, tmp_path), "train")
    said = capsys.readouterr().out
    assert "2 files are no pictures by their ending: one.txt, two.gif" in said


# ------------------------------- E. whatever is raised where the world comes in, as real commands

PYTHON = f"{sys.executable} {ROOT}"
SIMCLR = (f"{PYTHON}/simclr.py --data pictures --root root --epochs 1 --device cpu "
          "--image-size 16 --batch-size 8 --out out")
FINETUNE = SIMCLR.replace("simclr.py", "finetune.py --arch resnet10")


def add_a_picture_in_latin_1(place):
    with open(os.fsencode(place) + b"/pictures/train/a/caf\xe9.png", "wb") as file:
        file.write((place / "pictures/train/a/0.png").read_bytes())


def name_a_picture_and_a_class_in_latin_1(place):
    add_a_picture_in_latin_1(place)
    for split in ("train", "test"):
        folder = os.fsencode(place / "pictures" / split)
        os.rename(folder + b"/b", folder + b"/caf\xe9")


def name_the_folder_in_chinese(place):
    (place / "pictures").rename(place / "图片")


def nothing(place):
    """The folder stays as it is."""


COMMANDS = {  # what happens to the folder, and the command that is typed there
    "full disk": (nothing, f"ulimit -f 900 && {SIMCLR}"),
    "full disk of the cache": (nothing, f"ulimit -f 8 && {SIMCLR}"),
    "closed pipe": (nothing, f"{SIMCLR} | head -1"),
    "closed pipe of help": (nothing, f"{PYTHON}/simclr.py --help | head -1"),
    "full screen": (nothing, f"{SIMCLR} > /dev/full"),
    "no screen": (nothing, f"{SIMCLR} >&-"),
    "Latin-1": (name_a_picture_and_a_class_in_latin_1, FINETUNE),
    "Chinese": (name_the_folder_in_chinese,
                "export PYTHONIOENCODING=cp1252; "
                f"{SIMCLR.replace('--data pictures', '--data 图片').replace(' out', ' 结果')} && "
                f"{PYTHON}/finetune.py --ckpt 结果.pt --data 图片 --root root --epochs 1"),
}


@pytest.fixture(scope="module", autouse=True)
def commands(tmp_path_factory):
    """All of them run beside the other tests of this file, since a new Python takes seconds to
    start: of each, its folder and what it will have printed."""
    def run(place, command):
        return subprocess.run(command, shell=True, executable="/bin/bash", cwd=place,
                              capture_output=True, text=True)

    running = {}
    with ThreadPoolExecutor(2) as pool:
        for name, (prepare, command) in COMMANDS.items():
            place = tmp_path_factory.mktemp("typed")
            write_folder(place / "pictures")
            (place / "out.pt").write_text("of an older run")
            prepare(place)
            running[name] = place, pool.submit(run, place, command)
        yield running


def assert_one_line(done, said):
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense", "xpu", "cpu:x"])
def test_a_device_that_cannot_compute_is_refused(here, capsys, device):
    line = error_line(capsys, simclr.main, [*FAST, "--device", device])
    assert device in line


# ---------------------------------------------------------------------- F. text beyond plain ASCII

def test_an_accent_is_the_same_composed_or_not(tmp_path):
    write_folder(tmp_path / "x", classes=("\u00e9", "b"), splits=("train",))
    write_folder(tmp_path / "x", classes=("e\u0301", "b"), side=24, splits=("test",))
    train = common.load_data(options(tmp_path / "x", tmp_path), "trainval")
    test = common.load_data(options(tmp_path / "x", tmp_path), "test")
    assert train.classes == test.classes == ["b", "\u00e9"]


@pytest.mark.parametrize("add, said", [
    (lambda place: write_folder(place, splits=["valid"]), "not read: valid"),
    (lambda place: write_folder(place, ["any"], splits=["unlabelled"]), "not read: unlabelled"),
    (lambda place: Image.new("RGB", (9, 9)).save(place / "train" / "loose.png"),
     "train: 1 pictures lie in no folder of a class and are left out: loose.png")])
def test_what_lies_beside_the_layout_is_said(folder, tmp_path, capsys, add, said):
    add(folder)
    assert len(common.load_data(options(folder, tmp_path), "trainval")) == 36
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("link, target", [
    ("test", "val"), ("test", "train"), ("val", "train"), ("unlabeled", "test")])
def test_a_split_that_a_link_leads_into_another_is_refused(tmp_path, capsys, link, target):
    place = write_folder(tmp_path / "pictures", splits=sorted({"train", target}), per_class=2)
    (place / link).symlink_to(target)
    line = error_line(capsys, common.load_data, options(place, tmp_path), link)
    assert f"{target} and {link} share 6 pictures" in line


@pytest.mark.parametrize("copy, target", [("test", "val"), ("test", "train"), ("val", "train")])
def test_a_split_that_is_a_copy_of_another_is_refused(tmp_path, capsys, copy, target):
    place = write_folder(tmp_path / "pictures", splits=sorted({"train", target}), per_class=2)
    shutil.copytree(place / target, place / copy)
    line = error_line(capsys, common.load_data, options(place, tmp_path), copy)
    assert f"{target} and {copy} share 6 pictures" in line
    for path in (place / copy).rglob("*.png"):
        Image.open(path).rotate(90).save(path)  # of their names, and no copies
    assert len(common.load_data(options(place, tmp_path), copy)) == 6


def test_a_folder_of_pictures_that_may_not_be_read_ends_the_run(folder, tmp_path, capsys,
                                                                 monkeypatch):
    def refuse(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    line = error_line(capsys, common.load_data, options(folder, tmp_path), "test")
    assert "Permission denied" in line and str(folder) in line


def test_resume_notices_that_the_classes_are_others(here, capsys, monkeypatch):
    draw_nothing(monkeypatch)
    argv = [*FAST, "--epochs", "2", "--out", "run", "--resume"]
    finetune.main(argv)
    assert "there is no run.pt yet" in capsys.readouterr().out
    for split in ("train", "test"):
        os.rename(f"pictures/{split}/a", f"pictures/{split}/z")
    ckpt = torch.load("run.pt", weights_only=True)
    history, ckpt["resume"]["results"] = ckpt["resume"]["history"], []
    del history[1:]
    torch.save(ckpt, "run.pt")  # as if it had been stopped after its first epoch
    assert "other classes" in error_line(capsys, finetune.main, argv)


def test_a_folder_is_known_again_from_elsewhere_and_after_it_has_moved(here, capsys, monkeypatch):
    draw_nothing(monkeypatch)
    coin.main([*FAST, "--epochs", "3", "--alpha", "0.7", "--out", "coin"])
    (here / "inside").mkdir()
    monkeypatch.chdir(here / "inside")
    root = ["--root", "../root"]
    finetune.main([*TINY, *root, "--data", "../pictures", "--ckpt", "../coin.pt"])
    assert "1 of 3 epochs are left of the budget" in capsys.readouterr().out
    os.rename("../pictures", "pictures")
    finetune.main([*TINY, *root, "--data", "pictures", "--ckpt", "../coin.pt", "--epochs", "1",
                   "--out", "moved"])
    assert "here a new one begins" in capsys.readouterr().out
    finetune.main([*TINY, *root, "--data", "pictures", "--ckpt", "../coin.pt", "--epochs", "1",
                   "--out", "moved", "--resume"])


def test_what_a_run_learns_from_is_said(here, capsys, monkeypatch):
    draw_nothing(monkeypatch)
    common.tell_once.cache_clear()
    simclr.main([*FAST, "--out", "simclr"])
    said = capsys.readouterr().out
    assert "cpu, float32, resnet10 at 16 px" in said
    assert "36 images of pictures, train and val" in said
    finetune.main([*FAST, "--ckpt", "simclr.pt", "--out", "tuned"])
    said = capsys.readouterr().out
    assert "simclr.pt: simclr on pictures; all" in said and "resnet10 at 16 px" in said
    assert "36 labelled images of pictures, 3 classes" in said
    finetune.main([*FAST, "--ckpt", "tuned.pt", "--out", "again"])
    assert "tuned.pt: its classifier is left out, and a new one begins" in capsys.readouterr().out


def test_a_checkpoint_of_an_unfinished_run_is_called_so(here, capsys, monkeypatch):
    draw_nothing(monkeypatch)
    save, saved = common.Run.save, []

    def stop(run):
        save(run)
        saved.append(run)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "save", stop)
    with pytest.raises(SystemExit):
        finetune.main([*FAST, "--epochs", "2", "--out", "run"])
    for said in (True, False):
        finetune.main([*TINY, "--data", "pictures", "--root", "root", "--ckpt", "run.pt", "--eval"])
        assert ("of a run that has not finished" in capsys.readouterr().out) == said
        finetune.main([*FAST, "--epochs", "2", "--out", "run", "--resume"])


def test_eval_needs_no_place_to_write(here, monkeypatch):
    draw_nothing(monkeypatch)
    finetune.main([*FAST, "--out", "run"])
    before = files(here)
    finetune.main([*TINY, "--data", "pictures", "--root", "root", "--ckpt", "run.pt", "--eval",
                   "--out", "newly/made"])
    assert files(here) == before and not Path("newly").exists()


def test_test_pictures_of_one_class_are_drawn_too(here, monkeypatch):
    for name in ("b", "c"):
        for path in Path(f"pictures/test/{name}").iterdir():
            path.unlink()
    finetune.main([*FAST, "--out", "run"])
    assert Path("run.png").exists()
    coin.main([*FAST, "--epochs", "2", "--alpha", "0.5", "--labels-per-class", "0", "--out", "one"])
    assert Path("one.png").exists()


def test_a_class_whose_name_looks_like_a_formula_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pictures", classes=("$\\no$", "b"), per_class=4)
    finetune.main([*FAST, "--arch", "resnet10"])
    assert (tmp_path / "finetune.png").exists()


# ------------------------------------------------------------------- G. paths are checked as used

@pytest.mark.parametrize("out", [
    "runs/", ".", "..", "runs/..", "", "taken", "x" * 250, "blocked/x", "run.pt", "a/run.png"])
def test_out_is_checked_before_any_work(here, capsys, monkeypatch, out):
    (here / "taken.png").mkdir()
    (here / "blocked").write_text("a file")
    monkeypatch.setattr(common, "start_backbone", None)
    before = files(here)
    line = error_line(capsys, simclr.main, [*FAST, "--out", out])
    assert "--out" in line
    assert files(here) == before


def test_the_tilde_is_a_home_after_an_equals_sign_too(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    args = simclr.parser().parse_args(
        ["--device=cpu", "--data=~/pictures", "--root=~/root", "--out=~/runs/a"])
    assert args.data == f"{here}/pictures" and args.root == f"{here}/root"
    assert args.out == f"{here}/runs/a"
    simclr.main([*FAST, "--out=~/a", "--data=~/pictures"])
    assert (here / "a.pt").exists()
    assert finetune.parser().parse_args(["--device=cpu", "--ckpt=~/a.pt"]).ckpt == f"{here}/a.pt"


# ----------------------------------------------------------- I. a hold-out or share without images

@pytest.fixture
def singles(here):
    """One image per class to train on, and no val."""
    for path in sorted((here / "pictures" / "train").rglob("*.png")):
        if path.name != "0.png":
            path.unlink()
    return here


@pytest.mark.parametrize("script", FINE_TUNING)
def test_where_val_would_be_empty_but_is_needed_one_line_says_so(singles, capsys, script):
    flags = [*FAST, "--arch", "resnet10", "--search", "1"]
    assert "judged on val" in error_line(capsys, SCRIPTS[script].main, flags)


def test_where_val_is_only_watched_it_may_be_empty(singles, monkeypatch):
    draw_nothing(monkeypatch)
    finetune.main([*FAST, "--arch", "resnet10", "--batch-size", "4", "--labels-per-class", "1"])
    assert json_lines("finetune.jsonl")[0]["val_top1"] is None


@pytest.mark.parametrize("script", ["simclr", "byol", "finetune", "core_tuning", "bi_tuning"])
def test_one_image_a_class_is_enough_where_no_val_is_needed(singles, monkeypatch, script):
    draw_nothing(monkeypatch)
    flags = [*FAST, "--arch", "resnet10", "--batch-size", "4"]
    if script in ("simclr", "byol"):
        flags = [*flags, "--data", "four"]
        write_folder(singles / "four", classes=("a", "b", "c", "d"), per_class=1)
    SCRIPTS[script].main(flags)


def test_a_class_of_one_image_stays_in_train_and_val_says_what_it_lacks(folder, tmp_path, capsys):
    for path in sorted((folder / "train" / "b").iterdir())[1:]:
        path.unlink()
    train = common.load_data(options(folder, tmp_path), "train")
    val = common.load_data(options(folder, tmp_path), "val")
    assert 1 in train.labels and 1 not in val.labels
    assert f"{folder} val has no image of 1 of 3 classes: b" in capsys.readouterr().out


def test_a_class_without_a_test_image_is_said(here, capsys):
    for path in (here / "pictures" / "test" / "c").iterdir():
        path.unlink()
    finetune.main([*FAST, "--arch", "resnet10"])
    assert "test has no image of 1 of 3 classes: c" in capsys.readouterr().out


# ------------------------------------------------------------------ J. numbers that are not finite

def test_constant_pictures_give_a_log_that_json_readers_take(here, monkeypatch):
    for path in (here / "pictures").rglob("*.png"):
        side = 20 if "train" in path.parts else 24  # a test of train's own pictures is refused
        Image.new("RGB", (side, side), "grey").save(path)
    coin.main([*FAST, "--epochs", "2", "--alpha", "0.5", "--arch", "resnet10"])

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    for line in (here / "coin.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert "s_dbw_before" in json_lines(here / "coin.jsonl")[-1]


@pytest.mark.parametrize("tensor, value", [
    ("conv1.weight", torch.nan), ("bn1.running_var", torch.inf), ("layer4.0.bn2.bias", -torch.inf)])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
def test_a_checkpoint_that_is_not_finite_names_the_tensor_at_once(
        here, capsys, tensor, value, ours):
    state = common.build_backbone("resnet10", True).state_dict()
    state[tensor][0] = value
    content = state
    if ours:
        content = dict(method="simclr", arch="resnet10", image_size=16, backbone=state, head=None,
                       classes=["a"], config={}, resume=None)
    torch.save(content, "in.pt")
    line = error_line(capsys, finetune.main, [*FAST, "--ckpt", "in.pt"])
    assert "in.pt" in line and tensor in line and "not finite" in line
    assert not (here / "finetune.pt").exists()


def test_a_broken_cache_says_how_to_get_a_whole_one(here, capsys, monkeypatch):
    draw_nothing(monkeypatch)
    flags = [*FAST, "--arch", "resnet10"]
    finetune.main(flags)
    for path in Path("root/cache").iterdir():
        path.write_bytes(b"half of it")
    common.shared_images.cache_clear()
    assert "delete it, and it is built anew" in error_line(capsys, finetune.main, flags)
    for path in Path("root/cache").iterdir():
        path.unlink()
    finetune.main(flags)


# ------------------------------------------------------------------------------ which data is meant

def test_a_folder_named_like_a_data_set_is_reached_by_its_path(here, monkeypatch, capsys):
    draw_nothing(monkeypatch)
    (here / "pictures").rename(here / "flowers")
    finetune.main([*FAST, "--arch", "resnet10", "--data", "./flowers"])
    assert common.load_checkpoint("finetune.pt")["classes"] == ["a", "b", "c"]
    monkeypatch.setattr(common.sets, "Flowers102", None)
    line = error_line(capsys, finetune.main, [*FAST, "--arch", "resnet10", "--data", "flowers"])
    assert "flowers" in line


def test_data_that_could_be_either_says_which_one_it_is(here, monkeypatch, capsys):
    (here / "petals").mkdir()
    common.load_data(argparse.Namespace(data="petals", image_size=8, device="cpu"), "test")
    assert "--data ./petals would be the folder here" in capsys.readouterr().out


# --------------------------------------------------------------- what the commands above have done

def test_a_full_disk_leaves_the_old_checkpoint(commands):
    place, done = commands["full disk"]
    assert_one_line(done.result(), "out.pt")
    assert (place / "out.pt").read_text() == "of an older run"
    assert not list(place.glob("*.tmp"))


def test_a_full_disk_while_images_are_decoded(commands):
    place, done = commands["full disk of the cache"]
    assert_one_line(done.result(), "root")
    assert not list((place / "root").rglob("*.npy"))


@pytest.mark.parametrize("name", ["closed pipe", "closed pipe of help"])
def test_a_closed_pipe_is_a_quiet_end(commands, name):
    done = commands[name][1].result()
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_a_screen_that_cannot_be_written_is_not_blamed_on_the_cache(commands):
    assert_one_line(commands["full screen"][1].result(), "cannot print")


def test_without_a_screen_a_run_goes_on(commands):
    place, done = commands["no screen"]
    assert done.result().returncode == 0 and done.result().stderr == ""
    assert len(json_lines(place / "out.jsonl")) == 1


def test_a_picture_and_a_class_named_in_latin_1_are_read(commands):
    place, done = commands["Latin-1"]
    assert done.result().returncode == 0, done.result().stderr
    assert len(np.load(next((place / "root" / "cache").glob("*-train-*.npy")))) == 37
    assert common.load_checkpoint(place / "out.pt")["classes"] == ["a", "c", "caf\\xe9"]
    assert "\r" not in done.result().stdout  # no line is rewritten in a pipe


def test_a_screen_that_lacks_letters_shows_their_numbers(commands):
    place, done = commands["Chinese"]
    assert done.result().returncode == 0, done.result().stderr
    assert "\\u7ed3\\u679c.pt: simclr" in done.result().stdout
    assert (place / "结果.pt").exists() and (place / "finetune.pt").exists()
