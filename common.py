"""What every stage shares and no paper is about: command line, processes, data, views, backbone, optimisers, checkpoints, logs.

Images travel as uint8 (B, 3, S, S), S being a quarter more than the training side; augment() turns them into normalised
floats (B, 3, size, size). What a view looks like is drawn on the CPU, so that no step waits for the device to learn how many
images an operation is for; each epoch seeds the draws anew, so that a resumed run repeats them.

Under torchrun every process holds the same weights and makes the same random draws; of each batch it takes its share. What
a process computes on its share becomes the whole batch's by gather() (rows) and average_gradients().
"""
import argparse
import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import shlex
import socket
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

try:
    import fcntl
except ImportError:  # Windows has no file locks
    fcntl = None

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every published backbone expects
GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma


# ------------------------------------------------------------------------------------------------- command line

def fail(message):
    """End the program as for any bad input: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float within bounds."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            bounds = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


COUNT, FROM_ZERO, SHARE = number(int, 1), number(int, 0), number(float, 0, 1)
POSITIVE, NOT_NEGATIVE = number(float, 1e-12, 1e12), number(float, 0, 1e12)


class Parser(argparse.ArgumentParser):
    """The flags that all scripts share. `petals` and `others` hold the defaults that depend on --data; with finishes_budget, a
    checkpoint's config["rest"] (COIN's) replaces them for the epochs that are left of its budget."""

    def __init__(self, script, doc, petals, others, finishes_budget=False):
        super().__init__(prog=script, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.petals, self.others, self.finishes_budget = petals, others, finishes_budget
        self.option("--data", str, f"{', '.join(KNOWN_DATA)}, or a folder with train/CLASS/*.png and test/CLASS/*.png", "petals")
        self.option("--root", str, "folder of the data sets, downloaded if need be, and of the cache of decoded images", "data")
        self.option("--image-size", number(int, 8), "side in pixels that the network sees; with --ckpt, the checkpoint's")
        self.option("--arch", str, f"{', '.join(ARCHS)}; with --ckpt, the checkpoint's", choices=ARCHS, metavar="ARCH")
        self.option("--ckpt", str, "checkpoint to start from: any script's, or a foreign ResNet's")
        self.option("--out", str, "writes OUT.pt, OUT.jsonl and OUT.png", Path(script).stem)
        if "epochs" in petals:
            self.option("--epochs", COUNT, "passes over the images" + "; after coin.py: those it left" * finishes_budget)
        self.option("--batch-size", number(int, 4), "images a step; BatchNorm needs a few")
        self.option("--lr", POSITIVE, "peak learning rate")
        self.option("--weight-decay", NOT_NEGATIVE, "L2 penalty; never on biases and BatchNorm")
        self.option("--seed", number(int, 0, 2**32 - 1), "seeds weights, order and views", 0)
        self.option("--device", str, "cpu, cuda, cuda:1, ...", "cuda" if torch.cuda.is_available() else "cpu")
        self.option("--precision", str, "float32 or bfloat16 for the forward pass; None is bfloat16 on a GPU that has it, else "
                    "float32, since a CPU without bfloat16 is slow at it", choices=("float32", "bfloat16"), metavar="TYPE")
        self.add_argument("--compile", action="store_true",
                          help="compile the backbones that are trained: minutes at the start, faster steps after that")
        self.add_argument("--resume", action="store_true", help="go on from OUT.pt where a stopped run left it")

    def option(self, flag, type, help, default=None, metavar=None, **kwargs):
        name = flag.strip("-").replace("-", "_")
        if name in self.petals:
            default_of = self.petals[name], self.others[name]
            shown = default_of[0] if default_of[0] == default_of[1] else "{} on petals, else {}".format(*default_of)
        else:
            shown = default
        self.add_argument(flag, type=type, default=default, metavar=metavar or type.__name__.upper(),
                          help=f"{help} (default: {shown})".replace("%", "%%"), **kwargs)

    def label_options(self):
        self.option("--labels-per-class", FROM_ZERO, "labelled images a class to train on (all where there are fewer); 0: all")
        self.option("--fraction", number(float, 1e-9, 1), "share of each class's labelled images to train on")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        defaults = dict(self.petals if args.data == "petals" else self.others)
        if args.ckpt:  # it tells its architecture and image size, and, where it leaves a budget unfinished, how to go on
            if not getattr(args, "eval", False) and Path(args.ckpt).resolve() == Path(f"{args.out}.pt").resolve():
                fail(f"--ckpt {args.ckpt} is the file that this run writes: give another --out")
            defaults.update(arch=None, image_size=None)
            config = load_checkpoint(args.ckpt)["config"]
            if self.finishes_budget and Path(config.get("data", "")) == Path(args.data):
                defaults.update(config.get("rest", {}))
        given = [name for name in ("labels_per_class", "fraction") if getattr(args, name, None) is not None]
        if len(given) == 2:
            self.error("--labels-per-class and --fraction ask for different subsets: give one of them")
        if given:  # what was asked for, and not the other one by default
            defaults.update(labels_per_class=None, fraction=None)
        for name, value in defaults.items():
            if getattr(args, name, value) is None:  # what a script has no flag for is left out
                setattr(args, name, value)
        try:
            args.device = str(torch.empty(0, device=join_processes(args.device)).device)
        except (RuntimeError, AssertionError) as error:
            fail(f"--device {args.device} is not to be had here: {str(error).splitlines()[0]}")
        for name in ("batch_size", "pretext_batch_size", "hessian_batch"):
            if (size := getattr(args, name, None) or 0) % world() or 0 < size < 2 * world():
                fail(f"--{name.replace('_', '-')} {size} cannot be shared by {world()} processes, each with two images or more")
        if args.precision is None:
            half = args.device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
            args.precision = "bfloat16" if half else "float32"
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(args.out).parent).close()
        except OSError as error:
            fail(f"cannot write to --out {args.out}: {error.strerror}")
        return args

    def error(self, message):
        fail(f"{message} (python {self.prog} --help explains each option)")


@contextlib.contextmanager
def resumable(script, args, argv):
    """Ctrl-C, or the loss of another process, ends with how to go on; running out of device memory ends as bad input does."""
    stopped = f"stopped; {args.out}.pt holds the last finished epoch, if any. Go on with"
    try:
        yield
        if dist.is_torchelastic_launched():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        command = shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv), "--resume"])
        print(f"\n{stopped}: {command if world() == 1 else 'the same torchrun command and --resume'}", file=sys.stderr)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        fail(f"out of memory on {args.device}: lower --batch-size or --image-size ({str(error).split('.')[0]})")
    except RuntimeError as error:
        if "loading state_dict" in str(error):
            fail(f"a checkpoint does not fit the model that the code makes: {str(error).splitlines()[-1].strip()}")
        if "allocate memory" in str(error):  # a CPU's has no type of its own
            fail(f"out of memory on {args.device}: lower --batch-size or --image-size")
        if world() == 1 or not (isinstance(error, dist.DistError) or "connection" in str(error).lower()):
            raise
        fail(f"another process of this run has {stopped} --resume, with any number of processes")


# ---------------------------------------------------------------------------------------------- several devices

def world():
    """Number of processes that work on this run: 1, or what `torchrun --nproc-per-node` says."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number among them; 0 alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_processes(device):
    """Under torchrun, meet the other processes (nccl on GPUs, gloo on CPUs); returns the device of this one."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.device(device).type == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def place(module, device):
    """The module on its device; with several GPUs, BatchNorm takes its statistics over the whole batch."""
    if world() > 1 and torch.device(device).type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module.to(device)


def share(rows):
    """This process's rows (n // world) of a batch (n, ...) that all know: every world-th; an uneven rest is left out."""
    return rows[:len(rows) - len(rows) % world()][rank()::world()]


def all_sum(x):
    """Sum of a tensor over all processes, without a graph."""
    if world() > 1:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
    return x


class AllSum(torch.autograd.Function):
    """all_sum() with a graph, for losses that reach over processes: its derivative is the sum of all gradients, of any order."""

    @staticmethod
    def forward(ctx, x):
        return all_sum(x)

    @staticmethod
    def backward(ctx, gradient):
        return AllSum.apply(gradient)


def gather(own):
    """share() undone: rows (b, ...) of each process -> those of the whole batch (b world, ...) on every one, with a graph."""
    if world() == 1:
        return own
    rows = [own if number == rank() else torch.zeros_like(own) for number in range(world())]
    return AllSum.apply(torch.stack(rows, 1).flatten(0, 1))


def average(tensors):
    """Each tensor's mean over all processes, sent as one message."""
    if world() == 1 or not tensors:
        return tuple(tensors)
    parts = (all_sum(torch.cat([t.flatten() for t in tensors])) / world()).split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors))


@torch.no_grad()
def average_gradients(module):
    """After backward(): losses are means over a process's share, so the mean of the gradients is the whole batch's."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    for gradient, mean in zip(gradients, average(gradients)):
        gradient.copy_(mean)


@torch.no_grad()
def average_statistics(module):
    """BatchNorm's running statistics, which on CPUs are those of a process's own images, become the same everywhere."""
    statistics = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    for statistic, mean in zip(statistics, average(statistics)):
        statistic.copy_(mean)


# --------------------------------------------------------------------------------------------------------- data

@dataclass
class Store:
    """Decoded images in memory. Image i of the store is images[rows[i]] with label labels[i]."""
    images: torch.Tensor  # uint8 (N, 3, S, S): on the device where it fits, else on the host (perhaps memory-mapped)
    labels: torch.Tensor  # int64 (n,) on the device; voc07's (n, 20): 1 present, 0 absent, -1 ignored
    rows: torch.Tensor    # int64 (n,) on the CPU
    classes: list

    def __len__(self):
        return len(self.rows)

    def subset(self, keep):
        return replace(self, rows=self.rows[keep], labels=self.labels[keep.to(self.labels.device)])


def store_side(image_size):
    """Side of the stored images: a quarter more than the network sees, room for crops to differ."""
    return round(1.25 * image_size)


PETAL_COUNTS, PETAL_FORMS = (3, 4, 5, 6, 8), ("round", "pointed")
PETAL_SPLITS = {"unlabeled": 8192, "train": 2000, "val": 1000, "test": 2000}


@cache
def petals(count, side, seed):
    """Procedural blossoms: class = petal count x petal form; hue, size, tilts, places and background vary freely.

    Four blooms of one species an image, so that any crop still shows it, in a loose grid and of one hue on a grey ground: what
    tells two images apart should be the petals (README). Returns uint8 (count, 3, side, side) and int64 (count,), as many of
    each class as can be. Drawn on the CPU in float64, so that rounding gives the same bytes on every machine.
    """
    rng = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, 1, 1, generator=rng, dtype=torch.float64)
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1  # -1 .. 1
    corner = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]], dtype=torch.float64).view(4, 2, 1, 1)
    labels = (torch.arange(count) % (len(PETAL_COUNTS) * len(PETAL_FORMS)))[torch.randperm(count, generator=rng)]
    images = []
    for label in labels.view(-1, 1, 1, 1).split(128):
        n = len(label)
        petal_count, form = torch.tensor(PETAL_COUNTS)[label % len(PETAL_COUNTS)], label // len(PETAL_COUNTS)
        centre = corner + 0.3 * rand(n, 4, 2) - 0.15                                       # (n, 4, 2, 1, 1)
        dy, dx = axis[:, None] - centre[:, :, 0], axis[None, :] - centre[:, :, 1]          # (n, 4, side, side)
        radius, tilt = 0.42 + 0.2 * rand(n, 1), 2 * math.pi * rand(n, 4)
        r, angle = torch.hypot(dx, dy) / radius, torch.atan2(dy, dx) + tilt
        wave = (petal_count * angle / 2).cos().abs()                                       # 1 on a petal's axis, else less
        outline = 0.25 + 0.75 * torch.where(form == 0, wave.sqrt(), 1 - wave.acos() * 2 / math.pi)  # round, pointed
        cover = ((outline - r) * radius * side / 2 + 0.5).clamp(0, 1)                      # anti-aliased over one pixel
        disc = ((0.22 - r) * radius * side / 2 + 0.5).clamp(0, 1)
        image = (0.5 * rand(n, 1)).expand(n, 1, side, side)
        for i in range(3):  # clutter: grey specks
            speck = torch.hypot(axis[:, None] - 2 * rand(n, 1) + 1, axis[None, :] - 2 * rand(n, 1) + 1)
            speck = ((0.05 + 0.1 * rand(n, 1) - speck) * side / 2 + 0.5).clamp(0, 1)
            image = image + speck * (0.6 * rand(n, 1) - image)
        petal = rand(n, 3)
        petal = petal / petal.amax(1, keepdim=True)                                        # a bright colour of any hue
        for i in range(4):
            image = image + cover[:, i, None] * (petal * (1 - 0.45 * r[:, i, None].clamp(0, 1)) - image)
            image = image + disc[:, i, None] * (0.4 * petal - image)
        images.append((image * 255).round().to(torch.uint8))
    return torch.cat(images), labels


def read_image(path, side=None):
    """Any picture as 8-bit RGB: transparency laid on white, 16-bit scaled. A broken file is named.

    side: what its short side will be resized to. A JPEG decodes at 1/2, 1/4 or 1/8 much faster; twice the side has to be left.
    """
    try:
        with Image.open(path) as image:
            if side:
                image.draft(None, (2 * side, 2 * side))  # does nothing to other formats
            if image.mode.startswith(("I", "F")):  # 16-bit grey: Pillow's own conversion would clip it at 255
                image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"broken image file {path}: {error}") from None


sets, OXFORD = torchvision.datasets, "https://www.robots.ox.ac.uk/~vgg/data"
CUB200 = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
SUN397 = "https://vision.princeton.edu/projects/2010/SUN"
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
               "sheep sofa train tvmonitor").split()


def listed(dataset):
    """(paths, labels, classes) of a data set that gives paths. ImageNet's classes have several names each."""
    paths, labels = zip(*(dataset[i] for i in range(len(dataset))))
    return paths, labels, [name if isinstance(name, str) else ", ".join(name) for name in dataset.classes]


def plain(published, **how):
    """The reader of a data set of torchvision's that has the splits and gives, with loader=str, paths for images."""
    return lambda root, split: listed(published(root, split, loader=str, **how))


def read_cub200(root, split):
    folder = root / "CUB_200_2011"
    if not folder.exists():
        sets.utils.download_and_extract_archive(CUB200, root, md5="97eceeb196236b17998738112f37df78")
    files, labels, training, classes = (  # a line: a number and what it stands for
        dict(line.split() for line in (folder / f"{name}.txt").read_text().splitlines())
        for name in ("images", "image_class_labels", "train_test_split", "classes"))
    chosen = [i for i in files if training[i] == ("1" if split == "train" else "0")]
    return [folder / "images" / files[i] for i in chosen], [int(labels[i]) - 1 for i in chosen], list(classes.values())


def read_sun397(root, split):
    """The first of the official partitions, 50 + 50 images a class; torchvision has none."""
    paths, labels, classes = listed(sets.SUN397(root, loader=str, download=True))
    folder, label = root / "SUN397", dict(zip(paths, labels))
    if not (folder / "Testing_01.txt").exists():
        sets.utils.download_and_extract_archive(f"{SUN397}/download/Partitions.zip", folder)
    lines = (folder / f"{split.title()}ing_01.txt").read_text().split()  # /a/abbey/sun_x.jpg
    return [f"{folder}{line}" for line in lines], [label[f"{folder}{line}"] for line in lines], classes


def read_voc07(root, split):
    """Labels 1 present, 0 absent, -1 ignored: all objects of the class in the image are marked difficult."""
    there, labels = (root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt").exists(), []
    data = sets.VOCDetection(root, "2007", split, download=not there)  # it would unpack its archive each time
    for file in data.annotations:
        found = {(o.findtext("name"), o.findtext("difficult") == "1") for o in xml.etree.ElementTree.parse(file).iter("object")}
        labels.append([1 if (name, False) in found else -1 if (name, True) in found else 0 for name in VOC_CLASSES])
    return data.images, labels, VOC_CLASSES


def read_caltech101(root, split):
    """30 images a class, drawn once and for all, are train, the others test."""
    data = sets.Caltech101(root, download=True)
    train = labelled_subset(torch.tensor(data.y), seed=0, per_class=30).sort().values.numpy()
    chosen = train if split == "train" else np.setdiff1d(np.arange(len(data)), train)
    folders = [f"{data.root}/101_ObjectCategories/{name}" for name in data.categories]
    return [f"{folders[data.y[i]]}/image_{data.index[i]:04d}.jpg" for i in chosen], [data.y[i] for i in chosen], data.categories


def read_cifar(published, root, split):
    data = published(root, split == "train", download=True)
    return data.data, data.targets, data.classes


def read_stl10(root, split):
    data = sets.STL10(root, split, download=True)
    return data.data.transpose(0, 2, 3, 1), data.labels, data.classes


def read_pets(root, split):
    data = sets.OxfordIIITPet(root, "trainval" if split == "train" else split, download=True)
    return data._images, data._labels, data.classes


# name: (root, split) -> pictures, labels, classes as in open_dataset; its splits; its folder under root; what is unpacked there
DATASETS = {
    "flowers": (plain(sets.Flowers102, download=True), "train val test", "flowers-102",
                f"102flowers.tgz (the folder jpg), imagelabels.mat and setid.mat of {OXFORD}/flowers/102"),
    "food": (plain(sets.Food101, download=True), "train test", "food-101", "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"),
    "cifar10": (partial(read_cifar, sets.CIFAR10), "train test", "cifar-10-batches-py", sets.CIFAR10.url),
    "cifar100": (partial(read_cifar, sets.CIFAR100), "train test", "cifar-100-python", sets.CIFAR100.url),
    "cub200": (read_cub200, "train test", "CUB_200_2011", CUB200),
    "sun397": (read_sun397, "train test", "SUN397", f"SUN397.tar.gz of {SUN397} and {SUN397}/download/Partitions.zip"),
    "cars": (plain(sets.StanfordCars), "train test", "stanford_cars",
             "cars_train, cars_test, devkit, cars_test_annos_withlabels.mat of https://github.com/pytorch/vision/issues/7545"),
    "aircrafts": (plain(sets.FGVCAircraft, annotation_level="variant", download=True), "train val test", "fgvc-aircraft-2013b",
                  f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"),
    "voc07": (read_voc07, "train val test", "VOCdevkit/VOC2007",
              "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2007"),
    "dtd": (plain(sets.DTD, partition=1, download=True), "train val test", "dtd/dtd", f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz"),
    "pets": (read_pets, "train test", "oxford-iiit-pet", f"images.tar.gz and annotations.tar.gz of {OXFORD}/pets/data"),
    "caltech101": (read_caltech101, "train test", "caltech101",
                   "101_ObjectCategories.tar.gz in https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"),
    "stl10": (read_stl10, "unlabeled train test", "stl10_binary", f"{sets.STL10.url} (*.bin and class_names.txt)"),
    "imagenet": (lambda root, split: plain(sets.ImageNet)(root / "imagenet", "val" if split == "test" else split), "train test",
                 "imagenet", "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, left packed, of "
                 "https://image-net.org/download-images"),
}
KNOWN_DATA = ("petals", *DATASETS)


def open_dataset(name, root, split):
    """One split: pictures (n paths, or uint8 (n, H, W, 3)), labels (n,), of voc07 (n, 20), and the list of classes.

    What is absent is downloaded; where that cannot be, one line says what to put where by hand.
    """
    if name not in DATASETS:
        if not (folder := Path(name) / split).is_dir():
            fail(f"no folder {folder}: {name} must hold train/CLASS/*.png and test/CLASS/*.png")
        return listed(sets.ImageFolder(folder, loader=str))
    read, _, folder, contents = DATASETS[name]
    socket.setdefaulttimeout(20)  # seconds: a dead network is no reason to hang
    try:
        return read(Path(root), split)
    except Exception as error:  # whatever the network or the files did, the way out is the same
        fail(f"{name} is not whole and cannot be downloaded ({error}): unpack as {root}/{folder} {contents}")


DECODE_CHUNK = 256  # images that are held decoded until they are written


def build_cache(path, pictures, side):
    """Decode the pictures into an .npy file, uint8 (n, 3, side, side), on all cores: Pillow lets other threads run meanwhile.

    They are appended to PATH.part, renamed when it is whole: a run goes on where a killed one was. Raises ValueError, OSError.
    """
    def decoded(picture):  # short side resized, the centre cut out
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else read_image(picture, side)
        return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1).tobytes()

    part, n, size = Path(f"{path}.part"), len(pictures), 3 * side * side
    part.touch()
    with open(part, "r+b") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(n, 3, side, side)))
        header, end = file.tell(), file.seek(0, os.SEEK_END)
        first = (end - header) // size  # a torn image is written anew
        file.seek(header + first * size)
        started = shown = time.perf_counter()
        for i in range(first, n, DECODE_CHUNK):
            file.writelines(pool.map(decoded, pictures[i:i + DECODE_CHUNK]))
            now, ready = time.perf_counter(), min(i + DECODE_CHUNK, n)
            if now - shown > 5 or ready == n:
                shown, speed = now, (ready - first) / (now - started)
                left = timedelta(seconds=int((n - ready) / speed))
                print(f"decoded {ready:,}/{n:,}  {speed:,.0f} images/s  left {left}", flush=True)
    os.replace(part, path)


@contextlib.contextmanager
def one_at_a_time(lock):
    """Runs that start together wait for each other here. The kernel lets go of a killed run's lock. The empty file stays: if it
    went, one that waits for it and one that comes later would hold two different locks."""
    with open(lock, "w") as file:
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another run is getting these images ready: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: let the first run get ready alone
            pass
        yield


def map_images(path):
    """The array in an .npy file, mapped read-only: its pages are given up where memory is needed."""
    array = np.load(path, mmap_mode="r")
    if array.nbytes > 0.5 * memory("cpu") and hasattr(mmap, "MADV_RANDOM"):
        array.base.madvise(mmap.MADV_RANDOM)  # else megabytes around each image are read and soon dropped again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nobody must write to it, and nobody does
        return torch.from_numpy(array)


def decode(args, splits):
    """Path of the cached images uint8 (n, 3, S, S) of these splits, one after the other; labels int64 (n,) or (n, 20); the
    splits' sizes; the classes. Where there is no cache yet, one run makes it while others wait."""
    name, root, side = Path(args.data).resolve().name, Path(args.root), store_side(args.image_size)
    try:
        (root / "cache").mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root / f"{name}.lock") if os.access(root, os.W_OK) else contextlib.nullcontext():
            opened = [open_dataset(args.data, args.root, split) for split in splits]
            classes, pictures = opened[0][2], [picture for part in opened for picture in part[0]]
            for split, part in zip(splits, opened):
                check_classes(args, part[2], classes, split)
                if not len(part[1]):
                    fail(f"{args.data} has no images for {split}")
            decoded = isinstance(pictures[0], np.ndarray)
            files = sorted((root / DATASETS[args.data][2]).rglob("*")) if decoded else pictures
            key = hashlib.sha256()  # another source or another side is another file
            for file in files:
                stat = os.stat(file)
                key.update(f"{file} {stat.st_mtime_ns} {stat.st_size}\n".encode())
            path = root / "cache" / f"{name}-{'-'.join(splits)}-{side}-{key.hexdigest()[:12]}.npy"
            if not path.exists():
                print(f"decoding {len(pictures):,} images of {name} {' and '.join(splits)} to {side} px", flush=True)
                build_cache(path, pictures, side)
    except (OSError, ValueError) as error:
        fail(f"{args.data} and its cache under --root {args.root}: {error}")
    labels = torch.from_numpy(np.concatenate([np.asarray(part[1], np.int64) for part in opened]))
    return path, labels, [len(part[1]) for part in opened], classes


@cache
def shared_images(path, device):
    """The images in a cache file, once for all splits and runs that take rows of them."""
    return fit_on(device, map_images(path))


def fit_on(device, images):
    """On a GPU where half of its free memory holds them, else on the host."""
    return images.to(device) if device.type == "cuda" and images.nbytes < 0.5 * memory(device) else images


def load_data(args, split):
    """A Store of one split: unlabeled, train, val, trainval or test.

    Without a val of the data's own, it is a seeded, stratified fifth of train; without unlabeled, it is trainval.
    """
    name, device = args.data, torch.device(args.device)
    if name not in KNOWN_DATA and not Path(name).is_dir():
        fail(f"unknown data set {name}: one of {', '.join(KNOWN_DATA)}, or a folder with train/CLASS/*.png, test/CLASS/*.png")
    own = (list(PETAL_SPLITS) if name == "petals" else DATASETS[name][1].split() if name in DATASETS else
           [part.name for part in Path(name).iterdir()])
    if split == "unlabeled" and "unlabeled" not in own:
        split = "trainval"
    # train, val and trainval are rows of one array: no image is in two
    splits = [split] if split in ("unlabeled", "test") else ["train", "val"] if "val" in own else ["train"]
    if name == "petals":
        drawn = [petals(PETAL_SPLITS[part], store_side(args.image_size), seed=1 + own.index(part)) for part in splits]
        images, labels = map(torch.cat, zip(*drawn))
        images, sizes = fit_on(device, images), [PETAL_SPLITS[part] for part in splits]
        classes = [f"{count} {form}" for form in PETAL_FORMS for count in PETAL_COUNTS]
    else:
        path, labels, sizes, classes = decode(args, splits)
        images = shared_images(path, device)
    rows = torch.arange(len(labels))
    if split in ("train", "val"):
        held_out = rows[sizes[0]:] if "val" in own else labelled_subset(labels, seed=0, fraction=0.2)
        rows = held_out if split == "val" else torch.from_numpy(np.setdiff1d(rows.numpy(), held_out.numpy()))
    return Store(images, labels[rows].to(device), rows, classes)


def check_classes(args, classes, expected, split):
    """Labels are positions in the list of classes: a split that lacks a class would shift them."""
    if classes != expected:
        odd = sorted(set(classes) ^ set(expected))
        more = " ..." if len(odd) > 4 else ""
        fail(f"{args.data}: {split} does not have the classes of the other splits: {', '.join(odd[:4])}{more}")


def load_unlabeled(args, flag="batch_size"):
    """The images of a pretext task: at least a batch of them, since its batches are all whole."""
    data, batch_size = load_data(args, "unlabeled"), getattr(args, flag)
    if len(data) < batch_size:
        fail(f"--{flag.replace('_', '-')} {batch_size} is more than the {len(data)} images: lower it")
    return data


PROBE_IMAGES = 50_000, 10_000  # at most, of train and of val


def load_probe(args):
    """train and val for a probe on held-out labels, of huge data a random part; None without labels, or with several an image."""
    if args.data not in KNOWN_DATA and not (Path(args.data) / "train").is_dir():
        return None
    probe = load_data(args, "train"), load_data(args, "val")
    check_classes(args, probe[1].classes, probe[0].classes, "val")
    if len(probe[0].classes) < 2 or probe[0].labels.ndim == 2:
        return None
    rng = torch.Generator().manual_seed(0)
    return tuple(store.subset(torch.randperm(len(store), generator=rng)[:most]) if len(store) > most else store
                 for store, most in zip(probe, PROBE_IMAGES))


def labelled_subset(labels, seed, per_class=None, fraction=None):
    """Indices of a seeded subset: per_class images of each class, or that fraction of it (at least one). Images with several
    labels (n, C) belong to no one class: they are not stratified."""
    rng = torch.Generator().manual_seed(seed)
    if labels.ndim == 2:
        if per_class is not None:
            fail("--labels-per-class wants one class an image, and these have several: use --fraction")
        return torch.randperm(len(labels), generator=rng)[:max(1, round(fraction * len(labels)))]
    labels, keep = labels.cpu(), []
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    if per_class is not None and per_class > max(map(len, members)):
        fail(f"--labels-per-class {per_class} is more than any class has: the largest has {max(map(len, members))} images")
    for rows in members:
        number = min(per_class, len(rows)) if per_class is not None else max(1, round(fraction * len(rows)))
        keep.append(rows[torch.randperm(len(rows), generator=rng)[:number]])
    return torch.cat(keep)


def few_labels(args):
    """Whether the flags ask for a subset of the labelled images; val is then not trained on."""
    return bool(args.labels_per_class) or args.fraction is not None


def load_labelled(args, seed, hold_out=False):
    """The labelled images to train on: with --labels-per-class or --fraction a subset of train drawn by the seed, else all of
    train and val. hold_out keeps val out, for a search that is judged on it."""
    few = few_labels(args)
    store = load_data(args, "train" if few or hold_out else "trainval")
    if len(store.classes) < 2:
        fail(f"{args.data} has only one class, {store.classes[0]}: there is nothing to tell apart")
    return store.subset(labelled_subset(store.labels, seed, args.labels_per_class, args.fraction)) if few else store


def need_one_label(args, data):
    if data.labels.ndim == 2:
        fail(f"{args.data} has several classes an image, and this loss needs one: finetune.py without --supcon takes it")


def load_held_out(args, data):
    """val for the probe of a stage that trains on the labelled `data`, or None where all labels are asked for, val's among them,
    or an image has several."""
    if not few_labels(args) or data.labels.ndim == 2:
        return None
    val = load_data(args, "val")
    check_classes(args, val.classes, data.classes, "val")
    return val


def batches(store, batch_size, shuffle=True, whole_only=False):
    """Yields images uint8 (b, 3, S, S) and labels (b,) on the device: every image once, of each batch this process's share.

    whole_only drops a rest that does not fill a batch (a pretext task wants as many negatives each step); else the images are
    spread evenly over the batches, because BatchNorm cannot work on a rest of one.
    """
    n = len(store)
    order = torch.randperm(n) if shuffle else torch.arange(n)
    if whole_only:
        return feed(store, share(order[:n - n % batch_size]).split(batch_size // world()))
    return feed(store, share(order).tensor_split(-(-n // batch_size)))


def feed(store, parts):
    """Yields images and labels, on the device, of each index tensor in `parts`. What is on the host is read a batch ahead."""
    device = store.labels.device
    if store.images.is_cuda:
        for part in parts:
            yield store.images[store.rows[part].to(device, non_blocking=True)], store.labels[part.to(device, non_blocking=True)]
        return
    side = torch.cuda.Stream(device) if store.labels.is_cuda else None  # copies beside the computation

    def read(part):
        images = torch.empty(len(part), *store.images.shape[1:], dtype=torch.uint8, pin_memory=store.labels.is_cuda)
        return torch.index_select(store.images, 0, store.rows[part], out=images)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, parts[0])
        for part, following in zip(parts, [*parts[1:], None]):
            images = ahead.result()
            if following is not None:
                ahead = reader.submit(read, following)
            with torch.cuda.stream(side):  # without a GPU this does nothing
                images = images.to(device, non_blocking=True)
            if side:
                torch.cuda.current_stream(device).wait_stream(side)
                images.record_stream(torch.cuda.current_stream(device))
            yield images, store.labels[part.to(device, non_blocking=True)]


# ----------------------------------------------------------------------------------------------- augmentations

def resample(x, box, flip, size):
    """Crop, resize and flip as one anti-aliased bilinear resampling, equal to torchvision's resized_crop image by image.

    x (B, 3, S, S) float; box (B, 4) top, left, height, width in whole pixels; flip (B,) bool -> (B, 3, size, size). Separable:
    a matrix an axis and image, each row a triangle as wide as the scale where that shrinks, cut off at the crop's edge.
    """
    def weights(start, length):  # (B,), (B,) -> (B, size, S)
        scale = (length / size)[:, None, None]
        centre = (torch.arange(size, device=x.device) + 0.5)[None, :, None] * scale
        pixel = torch.arange(x.shape[-1], device=x.device) - start[:, None, None]  # (B, 1, S), 0 at the crop's edge
        height = torch.zeros_like(pixel).masked_fill_((pixel < 0) | (pixel >= length[:, None, None]), -torch.inf) + 1
        w = (pixel + 0.5 - centre).abs_().div_(-scale.clamp(min=1)).add_(height).clamp_(min=0)  # 1 - |distance| / width
        return w.div_(w.sum(-1, keepdim=True))

    top, left, height, width = box.to(x.dtype).unbind(1)
    rows, columns = weights(top, height), weights(left, width)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    x = (x.flatten(1, 2) @ columns.mT).unflatten(1, (3, -1))  # (B, 3, S, size)
    return rows[:, None] @ x                                  # (B, 3, size, size)


def constants(values, x):
    """Numbers a channel (3, 1, 1) with the dtype and device of x, sent there without waiting for the device."""
    return torch.tensor(values, dtype=x.dtype).view(3, 1, 1).to(x.device, non_blocking=True)


def grey(x):
    """(B, 3, H, W) -> (B, 1, H, W)"""
    return GREY[0] * x[:, :1] + GREY[1] * x[:, 1:2] + GREY[2] * x[:, 2:]


def blend(x, other, factor):
    """factor x + (1 - factor) other, factor (B,): what brightness, contrast and saturation are made of."""
    return torch.lerp(other, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def brightness(x, factor):
    return blend(x, x.new_zeros(()), factor)


def contrast(x, factor):
    return blend(x, grey(x).mean((1, 2, 3), keepdim=True), factor)


def saturation(x, factor):
    return blend(x, grey(x), factor)


def hue(x, shift):
    """Turn the hue of x (B, 3, H, W) in 0..1 by shift (B,), in full turns, in HSV space."""
    r, g, b = x.split(1, dim=1)  # (B, 1, H, W)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma, red, green = high - low, (high == r).to(x.dtype), (high == g).to(x.dtype)
    # g - b where red is highest, 2 chroma + b - r where green is, else 4 chroma + r - g; lerp is faster here than where
    sixth = torch.lerp(torch.add(r - g, chroma, alpha=4), torch.add(b - r, chroma, alpha=2), green).lerp_(g - b, red)
    sixth = sixth.div_(chroma.clamp(min=1e-12)).add_((6 * shift).view(-1, 1, 1, 1))  # hue in sixths of a turn
    sixth = sixth.sub_((sixth / 6).floor_(), alpha=6)  # 0 .. 6
    ramp = (sixth - constants((3, 2, 4), x)).abs_()  # |h - 3| - 1, 2 - |h - 2|, 2 - |h - 4|
    ramp = ramp.mul_(constants((1, -1, -1), x)).add_(constants((-1, 2, 2), x)).clamp_(0, 1)
    return torch.addcmul(low, chroma, ramp)


def blur(x, sigma, kernel):
    """Gaussian blur of x (B, 3, H, H) by sigma (B,) in pixels, `kernel` taps (odd), mirrored at the edges."""
    side, reach = x.shape[-1], kernel // 2
    taps = torch.arange(-reach, reach + 1, device=x.device)
    weight = (-0.5 * (taps / sigma[:, None]) ** 2).exp()
    weight = weight / weight.sum(1, keepdim=True)  # (B, kernel)
    source = torch.arange(side, device=x.device)[:, None] + taps
    source = (side - 1) - ((side - 1) - source.abs()).abs()  # (side, kernel), mirrored
    matrix = x.new_zeros(len(x), side, side)
    matrix.scatter_add_(2, source.expand(len(x), -1, -1), weight[:, None].expand(-1, side, -1).to(x.dtype))
    return matrix[:, None] @ ((x.flatten(1, 2) @ matrix.mT).view_as(x))


def normalise(x, out=None):
    """0..1 -> ImageNet's mean 0 and deviation 1, in the layout that convolutions are fastest in."""
    out = torch.empty_like(x, memory_format=torch.channels_last) if out is None else out
    return torch.sub(x, constants(MEAN, x), out=out).div_(constants(STD, x))


def crop_boxes(count, side, scale, ratio=(3 / 4, 4 / 3), tries=10):
    """RandomResizedCrop's boxes (count, 4): the first of ten draws that fits, else the whole image."""
    area = side * side * torch.empty(count, tries).uniform_(*scale)
    aspect = torch.empty(count, tries).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (height <= side) & (width <= side) & (height > 0) & (width > 0)
    first = fits.int().argmax(1, keepdim=True)
    height, width = (torch.where(fits.any(1, keepdim=True), v.gather(1, first), side)[:, 0] for v in (height, width))
    top, left = ((torch.rand(count) * (side - v + 1)).floor() for v in (height, width))
    return torch.stack([top, left, height, width], 1)


def augment(x, size, crop=(0.08, 1), jitter=(0, 0, 0, 0), jitter_p=0.8, grey_p=0, blur_p=0, solarise_p=0):
    """One random view of every image: uint8 (B, 3, S, S) -> normalised float32 (B, 3, size, size). Crop with flip, colour jitter
    (brightness, contrast, saturation, hue; in an order drawn once a batch), grey, blur (sigma 0.1 to 2 pixels), solarise."""
    count = len(x) * world()  # views are drawn for the whole batch, so that they do not depend on the number of processes
    uniform = lambda low, high: torch.empty(count).uniform_(low, high)
    view = dict(box=crop_boxes(count, x.shape[-1], crop), flip=torch.rand(count) < 0.5)
    order = torch.randperm(4).tolist() if any(jitter) else []
    if any(jitter):
        view["jittered"] = torch.rand(count) < jitter_p
        view["factors"] = torch.stack([uniform(max(0, 1 - v), 1 + v) for v in jitter[:3]] + [uniform(-jitter[3], jitter[3])], 1)
    for name, p in (("grey", grey_p), ("blurred", blur_p), ("solarised", solarise_p)):
        if p:
            view[name] = torch.rand(count) < p
    if blur_p:
        view["sigma"] = uniform(0.1, 2)
    view = {name: share(values) for name, values in view.items()}
    out = torch.empty(len(x), 3, size, size, device=x.device, memory_format=torch.channels_last)
    at_once = 64 if x.device.type == "cpu" else max(1, len(x))  # parts that fit the processor's cache: twice as fast
    for part in (slice(i, i + at_once) for i in range(0, len(x), at_once)):
        make_view(x[part], {name: values[part] for name, values in view.items()}, [i for i in order if jitter[i]], out[part])
    return out


def make_view(x, view, order, out):
    """What augment() has drawn for the images x, done to them; order: of the colour operations, by number."""
    size, send = out.shape[-1], lambda values: values.to(x.device, non_blocking=True)

    def change(drawn, operation, *parameters):
        """operation() on the images drawn for it. Which they are is found out on the CPU: the device is not waited for."""
        if drawn in view:
            rows = view[drawn].nonzero()[:, 0]
            parameters, rows = [send(view[name][rows]) for name in parameters], send(rows)
            x[rows] = operation(x[rows], *parameters)

    def jitter(x, factors):
        for i in order:
            x = (brightness, contrast, saturation, hue)[i](x, factors[:, i])
        return x

    x = resample(x.float(), send(view["box"]), send(view["flip"]), size).div_(255)
    change("jittered", jitter, "factors")
    change("grey", lambda x: grey(x).expand(-1, 3, -1, -1))
    change("blurred", lambda x, sigma: blur(x, sigma, max(3, size // 10 // 2 * 2 + 1)), "sigma")
    change("solarised", lambda x: torch.where(x >= 0.5, 1 - x, x))
    normalise(x, out)


def test_crop(x, size):
    """The view that every evaluation uses: the centre 0.875 of the image, resized. Shapes as in augment()."""
    side = round(0.875 * x.shape[-1])
    edge = round((x.shape[-1] - side) / 2)
    box = torch.tensor([[edge, edge, side, side]]).expand(len(x), 4).to(x.device, non_blocking=True)
    return normalise(resample(x.float(), box, torch.zeros(len(x), dtype=torch.bool, device=x.device), size) / 255)


# ----------------------------------------------------------------------------------------------------- backbone

ARCHS = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
         "resnet34": (BasicBlock, [3, 4, 6, 3]), "resnet50": (Bottleneck, [3, 4, 6, 3]),
         "resnet101": (Bottleneck, [3, 4, 23, 3]), "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3]),
         "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3])}


def build_backbone(arch, small_stem):
    """torchvision's ResNet without its last layer: (B, 3, H, W) -> (B, num_features). small_stem, for images of 40 px and less:
    3x3 convolution of stride 1 and no max-pool (SimCLR, appendix B.9). resnet10 is for small machines: half the channels, and a
    stride of 2 in its small stem."""
    block, layers = ARCHS[arch]
    model = ResNet(block, layers, width_per_group=128 if arch.startswith("wide") else 64)
    narrow = arch == "resnet10"
    width = model.inplanes = 32 if narrow else 64
    if small_stem:
        model.conv1, model.maxpool = nn.Conv2d(3, width, 3, 2 if narrow else 1, 1, bias=False), nn.Identity()
    elif narrow:
        model.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    if narrow:
        model.bn1 = nn.BatchNorm2d(width)
        for i in range(4):
            setattr(model, f"layer{i + 1}", model._make_layer(block, width << i, 1, stride=1 if i == 0 else 2))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.fc, model.num_features = nn.Identity(), model.fc.in_features if not narrow else 8 * width
    return model.to(memory_format=torch.channels_last)


def start_backbone(args, say=True):
    """Backbone on the device, from --ckpt or fresh, and the checkpoint (None if fresh). Settles args.arch and image_size."""
    torch.manual_seed(args.seed)
    ckpt = load_checkpoint(args.ckpt) if args.ckpt else None
    backbone = load_backbone(ckpt, args, say) if ckpt else build_backbone(args.arch, args.image_size <= 40)
    backbone = place(backbone, args.device)
    if args.compile:
        backbone.compile()
    return backbone, ckpt


def load_backbone(ckpt, args, say):
    """The checkpoint's backbone. Every tensor but BatchNorm's counts has to be there in the right shape."""
    args.image_size = args.image_size or ckpt["image_size"]
    if args.image_size is None:
        fail(f"{args.ckpt} does not say for which image size: give --image-size")
    found, small_stem = shapes(ckpt["backbone"]), ckpt["backbone"]["conv1.weight"].shape[-1:] == (3,)
    if args.arch is None:
        with torch.device("meta"):  # shapes without memory
            difference = lambda arch: len(shapes(build_backbone(arch, small_stem).state_dict()).items() ^ found.items())
            args.arch = ckpt["arch"] or min(ARCHS, key=difference)
    backbone = build_backbone(args.arch, small_stem)
    needed = shapes(backbone.state_dict())
    for key, shape in needed.items():
        if found.get(key) != shape:
            problem = f"has shape {tuple(found[key])}" if key in found else "is missing"
            fail(f"{args.ckpt} does not fit --arch {args.arch}: {key} {problem}, should be {tuple(shape)}")
    kept = {key: value for key, value in ckpt["backbone"].items() if key in backbone.state_dict()}
    backbone.load_state_dict({**backbone.state_dict(), **kept})
    if say:
        left = [key for key in found if key not in needed]
        print(f"{args.ckpt}: {ckpt['method']}, {args.arch}; all {len(needed)} backbone tensors matched"
              + (f", left out {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}" if left else ""), flush=True)
    return backbone


def shapes(state):
    return {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}


@contextlib.contextmanager
def frozen_statistics(model, second_order=False):
    """BatchNorm uses the batch's own statistics as in training, but leaves its running averages as they are.

    second_order: leave out what has no second derivative, torch.compile and statistics over several processes.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
        if second_order:
            layer.forward = partial(_BatchNorm.forward, layer)  # instead of SyncBatchNorm's
    try:
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if second_order and compiled else contextlib.nullcontext():
            yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
            layer.__dict__.pop("forward", None)


def memory(device):
    """Bytes that are free on a GPU; for a CPU, all that the machine has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def autocast(device, precision):
    """For forward passes only: losses and second derivatives are computed outside."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def upcast(x):
    """Half types to float32; float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def task_loss(logits, y):
    """Mean cross-entropy for y (B,). For y (B, C) of 1 present, 0 absent, -1 ignored: binary cross-entropy, mean over the
    entries that count. logits (B, C) -> scalar, in float32 or better."""
    logits = upcast(logits)
    if y.ndim == 1:
        return F.cross_entropy(logits, y)
    counts = (y >= 0).to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, y.clamp(min=0).to(logits.dtype), counts, reduction="sum")
    return total * world() / all_sum(counts.sum()).clamp(min=1)


@torch.no_grad()
def features(backbone, store, args):
    """Backbone features float32 (n, D) and labels (n,) of a store, in evaluation mode, in the store's order."""
    training, out = backbone.training, []
    backbone.eval()
    for x, _ in feed(store, torch.arange(rank(), len(store), world()).split(512)):
        with autocast(args.device, args.precision):
            out.append(upcast(backbone(test_crop(x, args.image_size))))
    backbone.train(training)
    own = torch.cat(out)
    every = own.new_zeros(len(store), own.shape[1])
    every[rank()::world()] = own
    return all_sum(every), store.labels


def knn_accuracy(memory, memory_labels, query, query_labels, k=20, temperature=0.1):
    """Weighted k-NN on cosine similarity (Wu et al. 2018, arXiv 1805.01978, section 3.4), in per cent.

    memory (N, D), query (M, D); each of the k nearest votes exp(similarity / temperature) for its class.
    """
    memory, query, hits = F.normalize(memory, dim=1), F.normalize(query, dim=1), 0
    for part, label in zip(query.split(1024), query_labels.split(1024)):
        similarity, nearest = (part @ memory.T).topk(min(k, len(memory)))  # (b, k)
        votes = part.new_zeros(len(part), int(memory_labels.max()) + 1)
        votes.scatter_add_(1, memory_labels[nearest], (similarity / temperature).exp())
        hits += (votes.argmax(1) == label).sum()
    return 100 * hits.item() / len(query)


def knn_probe(backbone, memory, query, args):
    return knn_accuracy(*features(backbone, memory, args), *features(backbone, query, args))


# ------------------------------------------------------------------------------------------------- optimisation

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888) with momentum, as SimCLR uses it.

    g <- g + wd w;  g <- g eta ||w|| / (||g_raw|| + wd ||w||);  v <- momentum v + g;  w <- w - lr v.
    Groups with adapt=False (biases, BatchNorm) keep their gradient as it is.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            decay, steps = group["weight_decay"], [p.grad for p in params]
            if decay:
                steps = torch._foreach_add(steps, params, alpha=decay)
            if group["adapt"]:
                w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, [p.grad for p in params]))
                trust = torch.where((w > 0) & (g > 0), group["eta"] * w / (g + decay * w), torch.ones_like(w))
                steps = torch._foreach_mul(steps, list(trust.unbind()))
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            speeds = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(speeds, group["momentum"])
            torch._foreach_add_(speeds, steps)
            torch._foreach_add_(params, speeds, alpha=-group["lr"])


OPTIMIZERS = ("adamw", "lars", "sgd")


def make_optimizer(name, modules, lr, weight_decay, scales=None):
    """adamw, lars or sgd; biases and BatchNorm are not decayed. scales: factors of the learning rate, one a module."""
    groups, scales = [], scales or [1.0] * len(modules)
    for scale in dict.fromkeys(scales):  # each value once
        params = [p for module, own in zip(modules, scales) if own == scale for p in module.parameters() if p.requires_grad]
        groups += [dict(params=[p for p in params if p.ndim > 1], weight_decay=weight_decay, scale=scale),
                   dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0, scale=scale)]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return LARS([dict(group, adapt=i % 2 == 0) for i, group in enumerate(groups)], lr=lr)


def set_learning_rate(optimizer, peak, step, steps, warmup=0, start=0.0):
    """Linear warm-up over `warmup` steps, then a cosine to 0 at `steps` (Loshchilov and Hutter 2017, arXiv 1608.03983), of which
    an earlier stage has gone through the share `start` already."""
    if step < warmup:
        lr = peak * (step + 1) / warmup
    else:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (start + (1 - start) * (step - warmup) / max(1, steps - warmup))))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def chunked_backward(model, embed, loss, x, chunk):
    """Gradient caching (Gao et al. 2021, arXiv 2101.06983): loss(z).backward() for z = embed(x), in the memory of `chunk` images.

    embed: images (b, ...) -> their embeddings (b, ...), by model; loss: all embeddings (B, ...) -> scalar. Exact but for
    BatchNorm, which sees a chunk at a time. Returns the loss.
    """
    parts, before = x.split(chunk), torch.get_rng_state()
    with torch.no_grad(), frozen_statistics(model):  # first without a graph
        z = torch.cat([upcast(embed(part)) for part in parts]).requires_grad_()
    value = loss(z)
    gradient, = torch.autograd.grad(value, z)
    torch.set_rng_state(before)  # then once more, with the same views
    for part, slope in zip(parts, gradient.split(chunk)):
        upcast(embed(part)).backward(slope)
    return value


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay average + (1 - decay) model, for every parameter. BatchNorm's statistics stay each module's own."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# -------------------------------------------------------------------------------------------------- checkpoints

def write_whole(path, write):
    """write(file) to a temporary name beside path, then rename: path is never half-written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)


def is_finite(*modules):
    return all(value.isfinite().all() for module in modules for value in module.state_dict().values())


def save_checkpoint(path, *, method, arch, image_size, backbone, head, classes, config, resume=None, projector=None):
    """Write one dict of plain types and tensors; backbone, head and projector are modules or state dicts.

    backbone: torchvision's own resnet of that name loads it (its fc aside); head: of the pretext task, or the classifier;
    projector: leads to a loss beside the head; resume: what --resume needs. Weights that are not finite are refused, so that
    the last good checkpoint stays.
    """
    backbone, head, projector = (part.state_dict() if isinstance(part, nn.Module) else part
                                 for part in (backbone, head, projector))
    for key, value in [pair for part in (backbone, head, projector) if part for pair in part.items()]:
        if not value.isfinite().all():
            fail(f"{key} is not finite any more: try a lower learning rate. {path} was left as it was")
    contents = dict(method=method, arch=arch, image_size=image_size, backbone=backbone, head=head, projector=projector,
                    classes=classes, config=config, resume=resume)
    if rank() == 0:
        write_whole(path, lambda file: torch.save(contents, file))
    if world() > 1:
        dist.barrier()  # who reads it next may be another process


def load_checkpoint(path):
    """Read any script's checkpoint or a foreign one (whatever stands in front of "conv1.weight" is the prefix); checked, on the
    CPU, without running any code it may hold. Returns our dict; what a foreign file does not tell is None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats: what matters is checked below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint {path}")
    except Exception as error:  # torch.load raises a dozen types for a file that is not a checkpoint
        reason = "it would run code when read" if "Unsupported" in str(error) else "it is truncated or no checkpoint"
        fail(f"cannot read {path}: {reason} ({type(error).__name__})")
    ours = isinstance(content, dict) and {"method", "arch", "image_size", "backbone", "config"} <= content.keys()
    for state in tensor_dicts(content["backbone"] if ours else content):
        if found := next(filter(None, (re.fullmatch(r"(.*\.|)4\.0\.conv1\.weight", key) for key in state)), None):
            names = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4".split()  # numbered by lightly
            state = {re.sub(r"^[0-7]\b", lambda child: names[int(child[0])], key[found.end(1):]): value
                     for key, value in state.items() if key.startswith(found[1])}
        prefixes = [key[:-len("layer1.0.conv1.weight")] for key in state if key.endswith("layer1.0.conv1.weight")]
        prefix = next((prefix for prefix in prefixes if prefix + "conv1.weight" in state), None)
        if prefix is not None:  # of a query and a key encoder, the first is the trained one
            backbone = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
            nothing = dict.fromkeys(("arch", "image_size", "head", "projector", "classes", "resume"))
            method = f"foreign, under {prefix}" if prefix else "foreign"
            return {**nothing, "config": {}, "method": method, **(content if ours else {}), "backbone": backbone}
    fail(f"{path} holds no ResNet backbone: no conv1.weight beside layer1.0.conv1.weight")


def tensor_dicts(content):
    """Every dict of tensors in nested dicts, such as {"state_dict": {...}}; what is not a tensor is left out."""
    if isinstance(content, dict):
        if tensors := {str(key): value for key, value in content.items() if torch.is_tensor(value)}:
            yield tensors
        for value in content.values():
            yield from tensor_dicts(value)


def resume_checkpoint(args):
    """The checkpoint that --resume goes on from, or None where there is none yet. The flags must be the run's own."""
    path = Path(f"{args.out}.pt")
    if not args.resume or not path.exists():
        return None
    ckpt = load_checkpoint(path)
    if not ckpt["resume"]:
        fail(f"{path} holds nothing to resume: --resume goes on from what the same command wrote")
    for name, value in run_config(args).items():
        if ckpt["config"].get(name) != value:
            fail(f"--resume: --{name.replace('_', '-')} is {value}, but {path} was made with {ckpt['config'].get(name)}")
    return ckpt


def run_config(args):
    """The flags that decide what a run computes, as plain types."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "device", "root", "out", "compile")}


# --------------------------------------------------------------------------------------------- logs and figures

class Log:
    """One dict an epoch: printed with images/s and time left, and written to OUT.jsonl."""

    def __init__(self, args, epochs, history=()):
        self.args, self.epochs, self.history, self.images = args, epochs, list(history), 0
        self.first, self.started = len(self.history), time.perf_counter()

    def epoch(self, images, unit="epoch", **metrics):
        """Record an epoch over `images` images. Metrics are numbers or device scalars, read here: once an epoch."""
        metrics = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
        for name, value in metrics.items():
            if value is not None and not math.isfinite(value):
                kept = f"{self.args.out}.pt holds the last good one" if self.history else "nothing was written"
                fail(f"{name} is {value} in {unit} {len(self.history) + 1}: try a lower learning rate. {kept}")
        self.history.append({unit: len(self.history) + 1, **metrics})
        self.images += images
        done, spent = len(self.history), time.perf_counter() - self.started
        left = spent / (done - self.first) * (self.epochs - done)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None)
        print(f"{unit} {done}/{self.epochs}  {shown}  {self.images / spent:,.0f} images/s  "
              f"left {timedelta(seconds=int(left))}", flush=True)
        self.write(self.history)

    def write(self, lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if rank() == 0:
            write_whole(f"{self.args.out}.jsonl", lambda file: file.write(text.encode()))


def plot_curves(axes, history, names, x="epoch"):
    """The named metrics against x, each where it was measured."""
    for name in names:
        points = [(line[x], line[name]) for line in history if line.get(name) is not None and x in line]
        if points:
            axes.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
    axes.set_xlabel(x)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)


def plot_features(axes, x, y, title):
    """Features x (n, D) with classes y (n,), normalised, in the plane in which their class means differ most. Of several labels,
    y (n, C), the first stands for all."""
    y = y if y.ndim == 1 else (y == 1).int().argmax(1)
    if not x.isfinite().all():  # of a run that diverged just short of infinity
        return
    x = F.normalize(x, dim=1) - F.normalize(x, dim=1).mean(0)
    class_means = torch.stack([x[y == label].mean(0) for label in y.unique()])  # (C, D)
    plane = x @ torch.linalg.svd(class_means, full_matrices=False)[2][:2].T     # (n, 2)
    axes.scatter(*plane.T.cpu().numpy(), c=y.cpu().numpy(), cmap="tab20", s=4)
    axes.set_title(title)


def show_images(axes, x, columns):
    """A grid of normalised images (n, 3, H, W), as the network gets them."""
    x = x.float().cpu()
    x = (x * constants(STD, x) + constants(MEAN, x)).clamp(0, 1)
    grid = torchvision.utils.make_grid(x, columns, padding=1, pad_value=1)
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set_axis_off()


def save_figure(args, figure):
    figure.tight_layout()
    if rank() == 0:
        write_whole(f"{args.out}.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
