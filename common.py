"""What every stage shares and no paper is about: command line, processes, data, views, backbone,
optimisers, checkpoints, logs.

Who reads a method needs augment(), Batches, features(), make_optimizer(), set_learning_rate() and
Run. What reads pictures, data sets and checkpoints as people have them, half of this file, can
wait.

Images travel as uint8 (B, 3, S, S), S being a quarter more than the training side; augment() turns
them into normalised floats (B, 3, size, size). What a view looks like is drawn on the CPU: a
GPU would have to be waited for, to learn how many images are to be blurred. Each epoch seeds the
draws anew, so that a resumed run repeats them.

Under torchrun every process holds the same weights and makes the same random draws; of each batch
it takes its own_rows(). What a process computes on them becomes the whole batch's by gather()
(rows) and average_gradients().
"""
import argparse
import contextlib
import filecmp
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import socket
import sys
import tempfile
import time
import unicodedata
import warnings
import xml.etree.ElementTree
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache, partial
from operator import itemgetter
from pathlib import Path, PurePath
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from numpy._core import multiarray
from PIL import Image, ImageOps
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, ResNet

plt.switch_backend("Agg")  # figures are files: no screen is needed
Image.MAX_IMAGE_PIXELS = None  # or Pillow refuses large pictures as attacks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as published backbones have


# ------------------------------------------------------------------------------------- command line

def fail(message):
    """End the program as for any bad input: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def tell(text, end="\n"):
    """Print at once, and as \\x.. what the screen's encoding lacks. Where nobody reads on, as
    behind `| head`, the program ends quietly."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what is left in the buffer
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        fail(f"cannot print: {error.strerror}")


tell_once = cache(tell)  # what was said before is not said again


def bounded(kind, low, high=math.inf):
    """An argparse type: an int or a float between low and high, both allowed; never infinite."""
    bounds = f"at least {low:g}"
    if high < math.inf:
        bounds = f"between {low:g} and {high:g}"

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def path(text):
    """An argparse type: expands ~, which the shell leaves in --out=~/a, and refuses an empty value,
    which an unset "$X" is."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return os.path.expanduser(text)


COUNT, FROM_ZERO, SHARE = bounded(int, 1), bounded(int, 0), bounded(float, 0, 1)
POSITIVE, NOT_NEGATIVE = bounded(float, 1e-12, 1e12), bounded(float, 0, 1e12)


class Parser(argparse.ArgumentParser):
    """The flags that all scripts share, in one order.

    drawn, others: defaults on data that the code draws and on all others; data: the default of
    --data; optimizers, tasks: by a value of --optimizer or --task (or "detect on petals"), the
    defaults that it replaces; from_coin: the flags whose defaults come from config["rest"] of a
    checkpoint of coin.py, so that the rest of its budget is trained as it would have been (not with
    --freeze: a probe has a budget of its own).
    """

    def __init__(self, script, doc, drawn, others, data="petals", optimizers=None, tasks=None,
                 from_coin=()):
        super().__init__(prog=script, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.drawn, self.others = drawn, others
        self.choices = dict(optimizer=optimizers or {}, task=tasks or {})
        self.from_coin = from_coin
        self.option("--data", path, f"{' and '.join(DRAWN)}, which the code draws, "
                    f"{', '.join(KNOWN_DATA[len(DRAWN):])}, or a folder with train/CLASS/*.png and "
                    "test/CLASS/*.png", data)
        self.option("--root", path, "folder of the data sets, downloaded if need be, and of the "
                    "cache of decoded images", "data")
        # With 8 layer4 would begin on a map of 1 x 1, on which a CPU's gradients in bfloat16 are
        # wrong.
        self.option("--image-size", bounded(int, 9), "side in pixels that the network sees; with "
                    "--ckpt, the checkpoint's")
        self.option("--arch", str, f"{', '.join(ARCHS)}; with --ckpt, the checkpoint's",
                    choices=ARCHS, metavar="ARCH")
        self.option("--ckpt", path, "checkpoint whose backbone to start from: any script's, or a "
                    "foreign ResNet's")
        self.option("--prefix", str, "which of several networks in --ckpt; none: the first one")
        self.option("--out", path, "writes OUT.pt, OUT.jsonl and OUT.png", Path(script).stem)
        if "epochs" in drawn:
            self.option("--epochs", COUNT, "passes over the images")
        self.option("--batch-size", bounded(int, 4), "images per step; BatchNorm needs a few")
        self.option("--lr", POSITIVE, "peak learning rate")
        self.option("--weight-decay", NOT_NEGATIVE, "decay of the weights; never of biases and "
                    "BatchNorm")
        self.option("--seed", bounded(int, 0, 2**32 - 1), "seeds weights, order and views", 0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.option("--device", str, "cpu, cuda, cuda:1, ...", device)
        self.option("--precision", str, "float32 or bfloat16 for the forward pass; none: bfloat16 "
                    "where the device has it in hardware", choices=("float32", "bfloat16"),
                    metavar="TYPE")
        self.add_argument("--compile", action="store_true", help="compile the backbones that are "
                          "trained: minutes at the start, faster steps after that")
        self.add_argument("--resume", action="store_true",
                          help="go on from OUT.pt where a stopped run left it")

    def option(self, flag, type, help, default=None, metavar=None, **more):
        """A flag with a value. Its default, where drawn and others have one, is filled in later."""
        name = flag.strip("-").replace("-", "_")
        shown = default
        if name in self.drawn:
            shown = self.drawn[name]
            if self.others[name] != shown:
                shown = f"{shown} on drawn images, else {self.others[name]}"
        for choice, table in self.choices.items():
            for value, defaults in table.items():
                if name in defaults:
                    shown = f"{shown}; with --{choice} {value}: {defaults[name]}"
        if name in self.from_coin:
            shown = f"{shown}; after coin.py: coin's"
        help = f"{help} (default: {shown})".replace("%", "%%")  # argparse formats it once more
        metavar = metavar or type.__name__.upper()
        self.add_argument(flag, type=type, default=default, metavar=metavar, help=help, **more)

    def label_options(self):
        self.option("--labels-per-class", FROM_ZERO, "labelled images that show each class to "
                    "train on (all where there are fewer); 0: all")
        self.option("--fraction", bounded(float, 1e-9, 1), "share of each class's labelled images "
                    "to train on")

    def parse_args(self, argv=None):
        if sys.stdout is None:  # the command was started with a closed one
            sys.stdout = open(os.devnull, "w")
        args = super().parse_args(argv)
        for name, value in self.defaults_for(args).items():
            if name in vars(args) and getattr(args, name) is None:
                setattr(args, name, value)
        settle_device(args)
        check_batch_sizes(args)
        if not getattr(args, "eval", False):  # which writes nothing
            check_out(args)
        return args

    def defaults_for(self, args):
        """The defaults of these data, this optimiser and this checkpoint; args: what was typed.
        Stops where flags contradict each other."""
        defaults = dict(self.others)
        if args.data in DRAWN:
            defaults.update(self.drawn)
        for choice, table in self.choices.items():
            value = getattr(args, choice, None)
            defaults.update(table.get(value, {}))
            if args.data == "petals":
                defaults.update(table.get(f"{value} on petals", {}))
        if args.prefix is not None and not args.ckpt:
            fail("--prefix says which network of --ckpt to take, and there is no --ckpt")
        if args.ckpt:  # it tells its architecture and image size
            if not getattr(args, "eval", False) and same_file(args.ckpt, f"{args.out}.pt"):
                fail(f"--ckpt {args.ckpt} is the file that this run writes: give another --out")
            defaults.update(arch=None, image_size=None)
            config = load_checkpoint(args.ckpt)["config"]
            rest = config.get("rest", {})
            goes_on = task_of(args) == "classify" and not getattr(args, "freeze", False)
            if goes_on and same_data(config.get("data"), args.data):
                defaults.update({name: rest[name] for name in self.from_coin if name in rest})
        if "labels_per_class" in vars(args):
            if args.labels_per_class is not None and args.fraction is not None:
                self.error("--labels-per-class and --fraction ask for different subsets: give one")
            if args.labels_per_class is not None or args.fraction is not None:
                defaults.update(labels_per_class=None, fraction=None)  # the other one stays unset
        return defaults

    def error(self, message):
        fail(f"{message} (python {self.prog} --help explains each option)")


def same_file(one, other):
    return Path(one).resolve() == Path(other).resolve()


def same_data(one, other):
    """Whether two --data are one: published sets go by name, folders by their place."""
    if one is None or one in KNOWN_DATA or other in KNOWN_DATA:
        return one == other
    return same_file(one, other)


def task_of(args):
    """classify, detect or segment; a script without --task classifies."""
    return getattr(args, "task", "classify")


def settle_device(args):
    """Meet the other processes, check that --device is there, and choose --precision."""
    try:
        one = torch.ones(1, device=join_processes(args.device))
        one.item()  # meta, say, has tensors without values
    except Exception as error:
        fail(f"--device {args.device} is not to be had here: {first_line(error)}")
    device, args.device = one.device, str(one.device)
    # cuDNN would round the products of float32 convolutions to TF32, those with the Hessian too.
    torch.backends.fp32_precision = "ieee"
    if args.precision is None:
        args.precision = "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device):
    """Whether the processor multiplies in bfloat16 itself; emulated, it would be slower than
    float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return device.type == "cpu" and (has.get("avx512_bf16", False) or has.get("amx_bf16", False))


def check_batch_sizes(args):
    for name in ("batch_size", "pretext_batch_size", "hessian_batch"):
        size = getattr(args, name, None)
        if size and (size % world() or size < 2 * world()):
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} {size} cannot be shared by {world()} processes, each with two images or "
                 "more")


def check_out(args):
    """Before any work, whether all that a run writes can be written, under its temporary name
    too."""
    if os.path.basename(args.out) in ("", ".", ".."):
        fail(f"--out {args.out} is a folder: add a name, such as {Path(args.out) / 'run'}")
    if args.out.endswith((".pt", ".jsonl", ".png")):
        fail(f"--out {args.out} is a name without its ending: {Path(args.out).with_suffix('')}")
    for ending in ("pt", "jsonl", "png"):
        path = Path(f"{args.out}.{ending}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary_name(path).touch()
            temporary_name(path).unlink()
        except OSError as error:
            fail(f"cannot write to --out {args.out}: {error.strerror}")
        if path.is_dir():
            fail(f"cannot write to --out {args.out}: {path} is a folder")


@contextlib.contextmanager
def resumable(script, args, argv):
    """Ctrl-C ends with the command that goes on; running out of memory ends as bad input does."""
    checkpoint = Path(f"{args.out}.pt")
    before = written_at(checkpoint)
    try:
        yield
        if dist.is_torchelastic_launched():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        if getattr(args, "eval", False):  # which writes nothing that it could go on from
            raise SystemExit(130) from None
        typed = sys.argv[1:] if argv is None else argv
        typed = [word for word in typed if word != "--resume"]
        command = shlex.join(["python", script, *typed, "--resume"])
        if world() > 1:
            command = "the same torchrun command and --resume"
        said = f"{checkpoint} holds the last finished epoch. Go on with: {command}"
        if written_at(checkpoint) == before and not args.resume:
            said = "nothing has been saved yet: begin anew"
        print(f"\nstopped; {said}", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:  # a CPU's shortage has no type of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        fail(f"out of memory on {args.device}: lower --batch-size or --image-size")


def written_at(path):
    """When a file was written last, in nanoseconds; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


# ---------------------------------------------------------------------------------- several devices

def world():
    """Number of processes that work on this run: 1, or what `torchrun --nproc-per-node` says."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number among them; 0 alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_processes(device):
    """Under torchrun, meet the others (nccl on GPUs, gloo on CPUs); returns this one's device."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "gloo"
        if torch.device(device).type == "cuda":
            backend, device = "nccl", f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        # Hours, because the others wait while process 0 decodes a large data set.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def place(module, device):
    """The module on its device; on several GPUs, BatchNorm's statistics are the whole batch's."""
    if world() > 1 and torch.device(device).type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module.to(device)


def own_rows(rows):
    """This process's part (n // world) of rows (n, ...) that all processes know: every world-th
    one. An uneven rest is left out."""
    whole = len(rows) - len(rows) % world()
    return rows[:whole][rank()::world()]


class AllSum(torch.autograd.Function):
    """The sum of a tensor over all processes. dist.all_reduce() has no derivative, and losses reach
    over processes: this one has, of any order, the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return AllSum.apply(gradient)


def all_sum(x):
    """AllSum of a tensor; itself, where there is one process."""
    return AllSum.apply(x) if world() > 1 else x


def part_of_mean(total, count):
    """This process's part of a mean over all processes: its own total by the count (a tensor) of
    all, 0 without any; times world(), since average_gradients() divides by it."""
    return total * world() / all_sum(count).clamp(min=1)


def gather(own):
    """own_rows() undone: rows (b, ...) of each process -> those of the whole batch (b world, ...)
    on every one, with a graph."""
    if world() == 1:
        return own
    columns = [torch.zeros_like(own)] * world()
    columns[rank()] = own
    every = torch.stack(columns, 1)             # (b, world, ...), others' rows are zero
    return all_sum(every.flatten(0, 1))


def process_means(tensors):
    """Each tensor's mean over all processes, sent as one message."""
    tensors = tuple(tensors)
    if world() == 1 or not tensors:
        return tensors
    message = torch.cat([tensor.flatten() for tensor in tensors])
    parts = (all_sum(message) / world()).split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors))


@torch.no_grad()
def average_gradients(module):
    """After backward(): a process's loss is world() times its part of the whole batch's, so that
    the mean of the gradients is the whole batch's."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    for gradient, mean in zip(gradients, process_means(gradients)):
        gradient.copy_(mean)


@torch.no_grad()
def average_statistics(module):
    """BatchNorm's running statistics, which on CPUs are those of a process's own images, become the
    same everywhere."""
    statistics = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    for statistic, mean in zip(statistics, process_means(statistics)):
        statistic.copy_(mean)


# ----------------------------------------------------------------------------------------- data

@dataclass
class Store:
    """Decoded images in memory. Image i of the store is images[rows[i]] with label labels[i].

    Labels are of one of four kinds: int64 (n,), one class an image; int64 (n, C), 1 where a class
    is shown (voc07); float32 (n, M, 6), one object per row: left, top, right, bottom as shares of
    the image's sides, class, 1 if it is difficult, and -1 throughout where there is none; uint8 (n,
    S, S), the class of each pixel, 0 for the background and 255 for what counts as nothing.
    """
    images: torch.Tensor  # uint8 (N, 3, S, S), on the device where it fits, else on the host
    labels: torch.Tensor  # (n, ...) on the device
    rows: torch.Tensor    # int64 (n,) on the CPU
    classes: list

    def __len__(self):
        return len(self.rows)

    @property
    def one_label(self):
        """Whether each image has one class, so that labels is (n,)."""
        return self.labels.ndim == 1

    def subset(self, keep):
        return replace(self, rows=self.rows[keep], labels=self.labels[keep.to(self.labels.device)])


def classes_shown(labels):
    """int64 (n, K): the classes that each image shows, -1 where they are fewer than K. labels: of
    any kind that a Store has."""
    if labels.ndim == 1:
        return labels[:, None]
    if labels.is_floating_point():
        return labels[:, :, 4].long()
    present = labels == 1                                                       # (n, C)
    if labels.dtype == torch.uint8:
        present = torch.zeros(len(labels), 256, dtype=torch.bool)
        for row, mask in zip(present, labels):
            row[:] = torch.bincount(mask.flatten(), minlength=256) > 0
        present[:, [0, 255]] = False
    return torch.where(present, torch.arange(present.shape[1]), -1)


def store_side(image_size):
    """Side of the stored images: a quarter more than the network sees, room for crops to differ."""
    return round(1.25 * image_size)


PETAL_COUNTS, PETAL_FORMS = (3, 4, 5, 6, 8), ("round", "pointed")
PETAL_SPLITS = {"unlabeled": 8192, "train": 2000, "val": 1000, "test": 2000}  # seeds 1, 2, 3, 4
DOODLES = 8192


@cache
def petals(count, side, seed):
    """Procedural blossoms: class = petal count x petal form; hue, size and places vary freely.

    Four blooms of one species an image, so that any crop still shows it, in a loose grid and of one
    hue on a grey ground: what tells two images apart should be the petals. Returns uint8
    (count, 3, side, side) and int64 (count,), as many of each class as can be. Drawn on the CPU in
    float64, so that rounding gives the same bytes on every machine.
    """
    rng = torch.Generator().manual_seed(seed)
    in_turn = torch.arange(count) % (len(PETAL_COUNTS) * len(PETAL_FORMS))
    labels = in_turn[torch.randperm(count, generator=rng)]
    images = [draw_petals(part[:, None], side, rng)[0] for part in labels.split(128)]
    return torch.cat(images), labels


@cache
def mixed_petals(count, side, seed):
    """petals() for detection and segmentation: the four blooms of an image are of four species, or
    its class would give all away. Images uint8 (count, 3, side, side), boxes (count, 4, 6) and
    masks (count, side, side) as in classes_shown()."""
    rng = torch.Generator().manual_seed(seed)
    species = torch.rand(count, len(PETAL_COUNTS) * len(PETAL_FORMS), generator=rng)
    species = species.argsort(1)[:, :4]                                        # (count, 4)
    images, boxes, masks = [], [], []
    for part in species.split(128):
        drawn, outline, petal = draw_petals(part, side, rng)
        low, high = outline.amin(3), outline.amax(3)                           # (n, 4, 2)
        corners = ((torch.cat([low, high], 2) + 1) / 2).clamp(0, 1)
        rest = torch.stack([part, torch.zeros_like(part)], 2)                  # none is difficult
        mask = torch.zeros(len(part), side, side, dtype=torch.uint8)
        for i in range(4):  # later blooms lie on top
            mask = torch.where(petal[:, i] > 0.5, (part[:, i, None, None] + 1).to(mask.dtype), mask)
        images.append(drawn)
        boxes.append(torch.cat([corners, rest], 2).float())
        masks.append(mask)
    return torch.cat(images), torch.cat(boxes), torch.cat(masks)


def random_numbers(rng, *shape):
    """(*shape, 1, 1), between 0 and 1"""
    return torch.rand(*shape, 1, 1, generator=rng, dtype=torch.float64)


def pixel_places(side):
    """y (side, 1) and x (1, side) of the pixels of an image that reaches from -1 to 1."""
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    return axis[:, None], axis[None, :]


def inside(distance, side):
    """How much of a pixel is covered, by its distance from an edge: 1 inside, 0 outside, smooth
    over one pixel."""
    return (distance * side / 2 + 0.5).clamp(0, 1)


def paint(image, cover, colour):
    return image + cover * (colour - image)


def petal_reach(angle, petal_count, is_round):
    """How far a bloom of radius 1 reaches at an angle."""
    wave = (petal_count * angle / 2).cos().abs()            # 1 on a petal's axis, 0 between two
    return 0.25 + 0.75 * torch.where(is_round, wave.sqrt(), 1 - wave.acos() * 2 / math.pi)


def draw_petals(labels, side, rng):
    """An image of four blooms for each row of labels: (n, 1), one species for all, or (n, 4).
    Returns uint8 (n, 3, side, side), drawn as petals() says, points x, y on each bloom's outline
    (n, 4, 2, 720), and where its petals are (n, 4, side, side)."""
    n = len(labels)
    uniform = partial(random_numbers, rng)
    label = labels[:, :, None, None]
    petal_count = torch.tensor(PETAL_COUNTS)[label % len(PETAL_COUNTS)]        # as label
    is_round = label < len(PETAL_COUNTS)
    y, x = pixel_places(side)
    grid = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]], dtype=torch.float64)
    centre = grid.view(4, 2, 1, 1) + 0.3 * uniform(n, 4, 2) - 0.15             # (n, 4, 2, 1, 1)
    dy, dx = y - centre[:, :, 0], x - centre[:, :, 1]                          # (n, 4, side, side)
    radius = 0.42 + 0.2 * uniform(n, 1)                                        # (n, 1, 1, 1)
    tilt = 2 * math.pi * uniform(n, 4)                                         # (n, 4, 1, 1)
    r = torch.hypot(dx, dy) / radius                                           # (n, 4, side, side)
    reach = petal_reach(torch.atan2(dy, dx) + tilt, petal_count, is_round)
    petal = inside((reach - r) * radius, side)                                 # (n, 4, side, side)
    disc = inside((0.22 - r) * radius, side)

    image = (0.5 * uniform(n, 1)).expand(n, 1, side, side)                     # the ground
    for i in range(3):  # clutter: grey specks
        distance = torch.hypot(y - 2 * uniform(n, 1) + 1, x - 2 * uniform(n, 1) + 1)
        speck = inside(0.05 + 0.1 * uniform(n, 1) - distance, side)            # (n, 1, side, side)
        image = paint(image, speck, 0.6 * uniform(n, 1))
    colour = uniform(n, 3)                                                     # (n, 3, 1, 1)
    colour = colour / colour.amax(1, keepdim=True)                             # bright, of any hue
    for i in range(4):
        shade = 1 - 0.45 * r[:, i, None].clamp(0, 1)                           # (n, 1, side, side)
        image = paint(image, petal[:, i, None], colour * shade)                # (n, 3, side, side)
        image = paint(image, disc[:, i, None], 0.4 * colour)
    angle = torch.arange(720, dtype=torch.float64) * math.pi / 360   # half degrees: tips are among
    length, turned = radius * petal_reach(angle, petal_count, is_round), angle - tilt
    outline = centre[..., 0].flip(2) + length * torch.cat([turned.cos(), turned.sin()], 2)
    return (image * 255).round().to(torch.uint8), outline, petal


@cache
def doodles(count, side, seed):
    """Procedural pictures of another kind than petals, for pretext tasks: a large shape and a small
    one on a coloured ground. uint8 (count, 3, side, side), drawn as petals() is."""
    rng = torch.Generator().manual_seed(seed)
    parts = torch.arange(count).split(128)
    return torch.cat([draw_doodles(len(part), side, rng) for part in parts])


def draw_doodles(n, side, rng):
    """Shapes are round, stretched, lobed or spiky; filled or a stroke; plain, shaded or striped."""
    uniform = partial(random_numbers, rng)
    y, x = pixel_places(side)
    image = uniform(n, 3).expand(n, 3, side, side)                             # the ground
    large = (0.45 + 0.4 * uniform(n, 1), 0.25)  # radius, and how far from the middle its centre is
    small = (0.08 + 0.42 * uniform(n, 1).square(), 0.75)
    for radius, spread in (large, small):
        dy = y - spread * (2 * uniform(n, 1) - 1)                              # (n, 1, side, side)
        dx = x - spread * (2 * uniform(n, 1) - 1)
        tilt = 2 * math.pi * uniform(n, 1)                                     # (n, 1, 1, 1)
        along = dx * tilt.cos() + dy * tilt.sin()
        across = (dy * tilt.cos() - dx * tilt.sin()) * (1 + 2 * uniform(n, 1).square())
        r = torch.hypot(along, across) / radius
        lobes, is_round = (9 * uniform(n, 1)).floor(), uniform(n, 1) < 0.5     # 0 lobes: an ellipse
        lobe = petal_reach(torch.atan2(across, along), lobes, is_round)
        edge = (1 - 0.9 * uniform(n, 1) * (1 - lobe) - r) * radius             # distance from it
        stroke = 0.03 + 0.09 * uniform(n, 1) - edge.abs()
        cover = inside(torch.where(uniform(n, 1) < 0.35, stroke, edge), side)
        shade = 1 - 0.5 * uniform(n, 1) * r.clamp(0, 1)
        stripes = (uniform(n, 1) < 0.3) & (((2 + 18 * uniform(n, 1)) * along).sin() > 0)
        image = paint(image, cover, uniform(n, 3) * torch.where(stripes, 0.5 * shade, shade))
    return (image * 255).round().to(torch.uint8)


def read_image(path, side=None):
    """Any picture as 8-bit RGB, turned as its camera was, transparency laid on white. What cannot
    be read, or has no defined black and white, is named.

    side: what its short side will be resized to. A JPEG decodes at 1/2, 1/4 or 1/8 much faster;
    twice the side has to be left.
    """
    try:
        with Image.open(path) as image:
            if side:
                image.draft(None, (2 * side, 2 * side))  # does nothing to other formats
            has_16_bit = ";16" in str(image.tile)  # how Pillow calls them before they are read
            image.load()
            kind, image = image.format, ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a decoder of Pillow's raises
        raise ValueError(f"broken image file {path}: {error}") from None
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        grey = np.asarray(image.convert("I"), dtype=np.float64) / 257  # 0 to 65,535
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{path} holds numbers without a range (mode {image.mode}): save it as 8 "
                         "or 16 bit")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    if has_16_bit and max(high for _, high in image.getextrema()) < 64:
        tell_once("pictures of 16 bit are among them that reach less than a quarter of 65,535, as "
                  "those of 12 bit do: they are read as nearly black. Stretch all in the same way")
    return image


sets = torchvision.datasets
CUB200 = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
SUN397 = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()

# Readers of one split: (root, split) -> pictures, labels and classes as in open_dataset().


def listed(published, root, split, **how):
    """Of a data set of torchvision's: with loader=str it gives the path of a picture."""
    data = published(root, split, loader=str, **how)
    paths, labels = zip(*(data[i] for i in range(len(data))))
    return paths, labels, data.classes


def read_cifar(published, root, split):
    data = published(root, split == "train", download=True)
    return data.data, data.targets, data.classes


def read_cub200(root, split):
    folder = root / "CUB_200_2011"
    if not folder.exists():
        md5 = "97eceeb196236b17998738112f37df78"
        sets.utils.download_and_extract_archive(CUB200, root, md5=md5)

    def table(name):  # a line: a number and what it stands for
        return dict(line.split() for line in (folder / f"{name}.txt").read_text().splitlines())

    labels_of, is_training = table("image_class_labels"), table("train_test_split")
    paths, labels = [], []
    for i, file in table("images").items():
        if (is_training[i] == "1") == (split == "train"):
            paths.append(folder / "images" / file)
            labels.append(int(labels_of[i]) - 1)
    return paths, labels, list(table("classes").values())


def read_sun397(root, split):
    """The first of the official partitions, 50 + 50 images per class; torchvision has none."""
    data, folder = sets.SUN397(root, download=True), root / "SUN397"
    label_of = dict(zip(data._image_files, data._labels))
    if not (folder / "Testing_01.txt").exists():
        sets.utils.download_and_extract_archive(SUN397, folder)
    lines = (folder / f"{split.title()}ing_01.txt").read_text().split()  # /a/abbey/sun_x.jpg
    paths = [folder / line[1:] for line in lines]
    return paths, [label_of[path] for path in paths], data.classes


def read_voc07(root, split):
    """Labels 1 present, 0 absent, -1 ignored: all objects of the class are marked difficult."""
    name_list = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt"
    download = not name_list.exists()  # torchvision would unpack its archive each time
    data = sets.VOCDetection(root, "2007", split, download=download)
    labels = []
    for file in data.annotations:
        label = dict.fromkeys(VOC_CLASSES, 0)
        for thing in xml.etree.ElementTree.parse(file).iter("object"):
            name = thing.findtext("name")
            if thing.findtext("difficult") != "1":
                label[name] = 1
            elif label[name] == 0:
                label[name] = -1
        labels.append(list(label.values()))
    return data.images, labels, VOC_CLASSES


def read_pets(root, split):
    names = dict(train="trainval", test="test")
    data = sets.OxfordIIITPet(root, names[split], download=True)
    return data._images, data._labels, data.classes


def read_caltech101(root, split):
    """30 images per class, drawn once and for all, are train, the others test."""
    folder = root / "caltech101" / "101_ObjectCategories"
    if not folder.exists():
        sets.Caltech101(root, download=True)
    classes = class_folders(folder)
    classes.pop("BACKGROUND_Google", None)
    paths, labels = list_pictures(classes)
    train = set(labelled_subset(torch.tensor(labels), seed=0, per_class=30).tolist())
    own = [i for i in range(len(labels)) if (i in train) == (split == "train")]
    return [paths[i] for i in own], [labels[i] for i in own], list(classes)


def read_stl10(root, split):
    data = sets.STL10(root, split, download=True)
    classes = (root / "stl10_binary" / "class_names.txt").read_text().split()
    return data.data.transpose(0, 2, 3, 1), data.labels, classes


def read_imagenet(root, split):
    names = dict(train="train", test="val")
    data = sets.ImageNet(root / "imagenet", names[split])
    folder = Path(data.split_folder)
    if any(entry.is_file() for entry in folder.iterdir()):  # archives go once they are unpacked
        raise ValueError(f"{folder} was not unpacked to the end: remove it")
    paths, labels = list_pictures(class_folders(folder))
    return paths, labels, [", ".join(synonyms) for synonyms in data.classes]


TRAIN_TEST, TRAIN_VAL_TEST = ("train", "test"), ("train", "val", "test")
DATASETS = {  # name: its reader, its splits, its folder under root
    "flowers": (partial(listed, sets.Flowers102, download=True), TRAIN_VAL_TEST, "flowers-102"),
    "food": (partial(listed, sets.Food101, download=True), TRAIN_TEST, "food-101"),
    "cifar10": (partial(read_cifar, sets.CIFAR10), TRAIN_TEST, "cifar-10-batches-py"),
    "cifar100": (partial(read_cifar, sets.CIFAR100), TRAIN_TEST, "cifar-100-python"),
    "cub200": (read_cub200, TRAIN_TEST, "CUB_200_2011"),
    "sun397": (read_sun397, TRAIN_TEST, "SUN397"),
    "cars": (partial(listed, sets.StanfordCars), TRAIN_TEST, "stanford_cars"),
    "aircrafts": (partial(listed, sets.FGVCAircraft, annotation_level="variant", download=True),
                  TRAIN_VAL_TEST, "fgvc-aircraft-2013b"),
    "voc07": (read_voc07, TRAIN_VAL_TEST, "VOCdevkit/VOC2007"),
    "dtd": (partial(listed, sets.DTD, partition=1, download=True), TRAIN_VAL_TEST, "dtd/dtd"),
    "pets": (read_pets, TRAIN_TEST, "oxford-iiit-pet"),
    "caltech101": (read_caltech101, TRAIN_TEST, "caltech101"),
    "stl10": (read_stl10, ("unlabeled", "train", "test"), "stl10_binary"),
    "imagenet": (read_imagenet, TRAIN_TEST, "imagenet"),
}
DRAWN = ("petals", "doodles")  # by the code
KNOWN_DATA = (*DRAWN, *DATASETS, "voc")


def open_dataset(name, root, split):
    """One split: pictures (n paths, or uint8 (n, H, W, 3)), labels (n,), of voc07 (n, 20), and the
    list of classes. What is absent is downloaded; where that cannot be, one line says so."""
    if name not in DATASETS:
        return open_folder(Path(name), split)
    read, _, folder = DATASETS[name]
    with named_download(name, f"{root}/{folder}"):
        return read(Path(root), split)


@contextlib.contextmanager
def named_download(name, folder):
    """Whatever the network or the files did, the way out is the same."""
    socket.setdefaulttimeout(20)  # seconds: a dead network is no reason to hang
    try:
        yield
    except Exception as error:
        fail(f"{name} is not whole under {folder} and cannot be downloaded ({error}): see the row "
             f"{name} of the table under Data in README.md")


def open_folder(folder, split):
    """One split of a folder of pictures. Labels are positions in the list of classes: a split that
    lacks a class of train would shift them."""
    if not (folder / split).is_dir():
        fail(f"no folder {folder / split}: {folder} must hold train/CLASS/*.png, test/CLASS/*.png "
             "(a val can be renamed to test), for pre-training unlabeled/ANY/*.png or train; the "
             "layout of VOC is for --task detect or segment of the scripts that have it")
    classes = class_folders(folder / split)
    if split in ("val", "test") and (folder / "train").is_dir():
        odd = sorted(classes.keys() ^ class_folders(folder / "train").keys())
        if odd:
            fail(f"{folder}: {split} does not have the classes of the other splits (an empty "
                 f"folder will do){some_names(':', odd)}")
    beside = [path.name for path in (folder / split).iterdir()
              if is_picture(path.name) and not path.is_dir()]
    if beside:
        tell_once(f"{folder / split}: {len(beside)} pictures lie in no folder of a class and are "
                  f"left out{some_names(':', sorted(beside))}")
    paths, labels = list_pictures(classes)
    empty = absent_classes(classes, labels)
    if empty and split == "train":
        fail(f"{folder / split} has no pictures of {some_names('classes', empty)}")
    earlier = dict(unlabeled=["test"], val=["train"], test=["train", "val"])
    for other in earlier.get(split, []):
        if (folder / other).is_dir():
            others = list_pictures(class_folders(folder / other))
            shared = shared_pictures((paths, labels), others)
            if shared:
                fail(f"{folder}: {other} and {split} share {len(shared)} pictures"
                     f"{some_names(':', shared)}")
    return paths, labels, list(classes)


def shared_pictures(pictures, others):
    """Those of list_pictures() that are among the others, too: the same file, or a copy of it under
    the same name in the class of the same number, for which the first 1,000 are compared."""
    shared, twins = set(pictures[0]).intersection(others[0]), {}
    for path, label in zip(*others):
        twins[label, os.path.basename(path)] = path
    for path, label in itertools.islice(zip(*pictures), 1000):
        twin = twins.get((label, os.path.basename(path)))
        if twin and filecmp.cmp(path, twin, shallow=False):  # which compares their sizes first
            shared.add(path)
    return sorted(shared)


def is_picture(name):
    return name.lower().endswith(sets.folder.IMG_EXTENSIONS) and not name.startswith(".")


def class_folders(folder):
    """The folders of each class, {name: [folders]}, in the order of the names; an accent may be
    composed or not, a name in another encoding than UTF-8 shows its bytes. What begins with a dot
    is hidden."""
    classes = {}
    for entry in sorted(folder.resolve().iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            name = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            classes.setdefault(unicodedata.normalize("NFC", name), []).append(entry)
    return dict(sorted(classes.items()))


def list_pictures(classes):
    """Paths and labels of the pictures in class_folders(), each once however many links lead to it;
    what is left out for its ending is counted."""
    label_of, left_out = {}, []  # label_of: by the real path
    for label, folders in enumerate(classes.values()):
        for folder in folders:
            for path, real in files_below(folder):
                if not is_picture(os.path.basename(path)):
                    left_out.append(os.path.basename(path))
                elif real == path or real not in label_of:  # its own place goes before a link
                    label_of[real] = label
    if left_out:
        # All folders lie side by side, so that the last one's parent is everyone's.
        tell_once(f"{folder.parent}: {len(left_out)} files are no pictures by their ending"
                  f"{some_names(':', sorted(left_out))}")
    pictures = sorted(label_of.items(), key=itemgetter(1, 0))  # class after class, by name
    return [path for path, _ in pictures], [label for _, label in pictures]


def files_below(top):
    """Paths and real paths of the files in a folder and those inside, but for what begins with a
    dot."""
    def stop(error):  # a folder that cannot be read
        raise error

    been = set()
    for folder, inner, names in os.walk(top, onerror=stop, followlinks=True):
        place = os.path.realpath(folder)
        if place in been:  # a link to a parent would lead round and round
            inner.clear()
            continue
        been.add(place)
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            real = os.path.join(place, name)
            if os.path.islink(real):
                real = os.path.realpath(real)
            yield os.path.join(folder, name), real


# Boxes and masks in the layout of VOC: of each task, the folder below ImageSets of its lists of
# images, the folder of its targets, and how their names end.
VOC_LAYOUT = dict(detect=("Main", "Annotations", "xml"),
                  segment=("Segmentation", "SegmentationClass", "png"))


def voc_folders(args):
    """The folders in that layout that --data stands for; voc is VOC2007 and VOC2012, for masks
    VOC2012 alone, and is downloaded if need be."""
    if args.data != "voc":
        return [Path(args.data).resolve()]
    top = Path(args.root).resolve() / "VOCdevkit"
    archives = [("2007", "trainval"), ("2007", "test"), ("2012", "trainval")]
    folders = [top / "VOC2007", top / "VOC2012"]
    if args.task == "segment":
        archives, folders = archives[2:], folders[1:]
    for year, split in archives:
        if not (top / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt").exists():
            with named_download("voc", top):
                sets.VOCDetection(args.root, year, split, download=True)
    return folders


def voc_lists(args):
    """{split: its lists of images}. Without a test.txt, as in VOC2012, val.txt is for the test.
    Train is train_aug.txt where there is a folder of the further masks that it names."""
    lists = {}
    for folder in voc_folders(args):
        for file in sorted((folder / "ImageSets" / VOC_LAYOUT[args.task][0]).glob("*.txt")):
            lists.setdefault(file.stem.replace("_", ""), []).append(file)  # train_aug or trainaug
        if args.task == "segment" and "trainaug" in lists:
            if (folder / "SegmentationClassAug").is_dir():
                lists["train"] = lists["trainaug"][:1]
    if args.data == "voc":  # the targets of VOC2012's test are not public
        tests = lists.pop("test", [])
        lists["test"] = [file for file in tests if file.parents[2].name == "VOC2007"]
    if not lists.get("test") and "val" in lists:
        lists["test"] = lists.pop("val")
        if args.data != "voc":
            tell_once(f"{args.data} has no test.txt: val.txt is its test, a fifth of train its val")
    return lists


def list_voc(args, split):
    """Pairs of a picture and the file of its boxes or mask."""
    lists, pairs = voc_lists(args), []
    kind, place, ending = VOC_LAYOUT[args.task]
    if split not in lists:
        raise ValueError(f"{args.data} has no ImageSets/{kind}/{split}.txt that names its images")
    for file in lists[split]:
        folder, pictures = file.parents[2], {}
        names = list(dict.fromkeys(read_lines(file)))  # each once
        if not names:
            raise ValueError(f"{file} names no images")
        for path in sorted((folder / "JPEGImages").iterdir()):
            if is_picture(path.name):
                pictures.setdefault(path.stem, []).append(path)
        for name in names:
            target = folder / f"{place}Aug" / f"{name}.{ending}"
            if "aug" not in file.stem or not target.exists():
                target = folder / place / f"{name}.{ending}"
            if name not in pictures or not target.exists():
                raise ValueError(f"{file} names {name}, but {folder} has no JPEGImages/{name}.jpg "
                                 f"or no {place}/{name}.{ending}")
            if len(pictures[name]) > 1:
                raise ValueError(f"{file} names {name}, and there are "
                                 f"{' and '.join(map(str, pictures[name]))}: leave one of them")
            pairs.append((pictures[name][0], target))
    return pairs


def list_apart(args, splits):
    """{split: its list_voc()} of these splits, with test those of train and val, too. Stop where
    two of them share a picture: what is trained on must not be scored on."""
    seen, pairs, lists = set(), {}, voc_lists(args)
    if "test" in splits:
        splits = [split for split in TRAIN_VAL_TEST if split in lists]
    for split in splits:
        pairs[split] = list_voc(args, split)
        for picture, _ in pairs[split]:
            if picture in seen:
                raise ValueError(f"the lists of {' and '.join(splits)} share {picture}")
            seen.add(picture)
    return pairs


def read_lines(file):
    """What is not blank; another encoding than UTF-8 shows its bytes."""
    lines = [line.strip() for line in file.read_text("utf-8-sig", "backslashreplace").splitlines()]
    return [line for line in lines if line]


def voc_classes(args):
    """VOC's; a folder's are the lines of its class_names.txt, or else, of boxes, all that train
    names."""
    names_file = Path(args.data) / "class_names.txt"
    if args.data == "voc":
        return VOC_CLASSES if args.task == "detect" else ["background", *VOC_CLASSES]
    if names_file.exists():
        return read_lines(names_file)
    if args.task == "segment":
        raise ValueError(f"there is no {names_file}, which names a class per line, the "
                         "background first")
    found = set()
    for _, annotation in list_voc(args, "train"):
        try:
            things = list(read_xml(annotation).iter("object"))
        except Exception as error:
            raise ValueError(f"{annotation}: {first_line(error)}") from None
        found.update(thing.findtext("name") for thing in things)
    found.discard(None)  # an object without a name is met once more in read_boxes()
    if not found:
        raise ValueError(f"no file that train.txt of {args.data} names has an object")
    if len({name.casefold() for name in found}) < len(found):
        raise ValueError(f"train has a class in two spellings, of {', '.join(sorted(found))}: give "
                         f"it one, or a {names_file}")
    return sorted(found)


def read_xml(file):
    content = xml.etree.ElementTree.parse(file)
    for element in content.iter():
        element.text = (element.text or "").strip()
    return content


def shown_size(picture):
    """Width and height of a picture, turned as its camera was."""
    with Image.open(picture) as image:
        lies = image.getexif().get(0x0112, 1) >= 5  # 0x0112: orientation, 5 to 8 lie on a side
        if lies and image.format != "TIFF":  # of which Pillow has turned the size already
            return image.size[::-1]
        return image.size


def read_boxes(file, picture, classes):
    """float32 (m, 6), one object per row as in a Store. What reaches out of the picture is cut off,
    what has no area is left out."""
    content, objects = read_xml(file), []
    width, height = shown_size(picture)
    said = [content.findtext("size/width"), content.findtext("size/height")]
    if said not in ([None, None], ["0", "0"], [str(width), str(height)]):
        raise ValueError(f"it is for {said[0]} x {said[1]} pixels, not {width} x {height} as "
                         f"{picture} has")
    for thing in content.iter("object"):
        name = thing.findtext("name")
        if name not in classes:
            raise ValueError(f"unknown class {name}")
        corners = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if None in corners:
            raise ValueError(f"a {name} has no bndbox with xmin, ymin, xmax and ymax")
        box = [float(corner) for corner in corners]
        if 0 <= min(box) and max(box) <= 1 and any(corner % 1 for corner in box):
            raise ValueError(f"a {name} has shares of the sides for corners: VOC counts pixels")
        # VOC counts pixels from 1, and the last one belongs to the box.
        box = np.array([box[0] - 1, box[1] - 1, box[2], box[3]])
        left, top, right, bottom = (box / [width, height, width, height]).clip(0, 1)
        if right > left and bottom > top:
            difficult = thing.findtext("difficult") == "1"
            objects.append([left, top, right, bottom, classes.index(name), difficult])
        else:
            tell_once(f"{file}: a {name} has no area inside the picture and is left out")
    return torch.tensor(objects, dtype=torch.float32).view(-1, 6)


def read_mask(file, picture, classes, side, colours):
    """uint8 (side, side): numbers of classes, as a palette's image or a grey one holds them.
    colours: of the masks before it, for check_colours()."""
    with Image.open(file) as mask:
        if mask.mode not in ("P", "L", "1"):
            raise ValueError(f"mode {mask.mode} is no mask: one number per pixel (P or L), for a "
                             "class the same in all files")
        if re.search("L;[24]", str(mask.tile)):  # Pillow would stretch its numbers to shades
            raise ValueError("it is grey with 2 or 4 bits a pixel: save it with 8")
        if mask.size != shown_size(picture):
            raise ValueError(f"it has {mask.size} pixels, {picture} {shown_size(picture)}")
        number = np.array(mask, dtype=np.uint8)
        highest = number[number < 255].max(initial=0)
        if highest >= len(classes):
            raise ValueError(f"it has a class {highest}, but there are {len(classes)} names of "
                             "classes, of which the first, 0, is the background")
        if mask.mode == "P":
            check_colours(mask.getpalette(), np.unique(number).tolist(), colours)
        small = mask.resize((side, side), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(small, dtype=np.uint8))


def check_colours(palette, labels, colours):
    """Stop where the palette (red, green, blue of 0, of 1, ...) has another colour for one of these
    labels than `colours`, those of the masks before it, to which the new ones are added."""
    for label in labels:
        colour = palette[3 * label:3 * label + 3]
        if colours.setdefault(label, colour) != colour:
            raise ValueError(f"its {label} has another colour than that of the masks before it: a "
                             "class must have one number in all files")


def read_voc(args, splits):
    """read_splits() with boxes or masks as labels."""
    classes, pictures, targets, sizes = voc_classes(args), [], [], []
    side, colours = store_side(args.image_size), {}
    for split in splits:
        pairs = list_voc(args, split)
        sizes.append(len(pairs))
        for picture, file in pairs:
            pictures.append(picture)
            try:
                if args.task == "detect":
                    targets.append(read_boxes(file, picture, classes))
                else:
                    targets.append(read_mask(file, picture, classes, side, colours))
            except Exception as error:  # whatever a parser or a decoder raises
                raise ValueError(f"{file}: {first_line(error)}") from None
    if args.task == "detect":
        labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)
    else:
        labels = torch.stack(targets)
        if labels.unique().tolist() == [0, 255]:
            raise ValueError(f"the masks of {' and '.join(splits)} hold 0, the background, and "
                             "255, which counts as nothing, but no class: 1, 2, ...")
    return pictures, labels, sizes, classes


DECODE_CHUNK = 256  # images that are held decoded until they are written


def write_images(path, pictures, side, squash=False):
    """Decode the pictures into an .npy file, uint8 (n, 3, side, side), on all cores: Pillow lets
    other threads run meanwhile. squash: a whole picture becomes the square, instead of its
    centre."""
    def decoded(picture):
        is_array = isinstance(picture, np.ndarray)
        image = Image.fromarray(picture) if is_array else read_image(picture, side)
        fit = Image.Image.resize if squash else ImageOps.fit
        image = fit(image, (side, side), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1).tobytes()

    n = len(pictures)
    header = dict(descr="|u1", fortran_order=False, shape=(n, 3, side, side))
    with open(path, "wb") as file, ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(file, header)
        began = shown = time.perf_counter()
        for first in range(0, n, DECODE_CHUNK):
            chunk = pictures[first:first + DECODE_CHUNK]
            file.writelines(pool.map(decoded, chunk))
            now, ready = time.perf_counter(), first + len(chunk)
            if now - shown > 5 or ready == n:
                shown, speed = now, ready / (now - began)
                left = timedelta(seconds=int((n - ready) / speed))
                tell(f"decoded {ready:,}/{n:,}  {speed:,.0f} images/s  left {left}")


def read_splits(args, splits):
    """Pictures (paths or arrays), their labels, how many each split has, and the names of the
    classes."""
    pictures, labels, sizes = [], [], []
    for split in splits:
        of_split, its_labels, classes = open_dataset(args.data, args.root, split)
        if not len(its_labels):
            fail(f"{args.data} has no images for {split}: those of a folder lie in {split}/CLASS/, "
                 "where CLASS is any name if they have no labels")
        pictures.extend(of_split)
        labels.append(np.asarray(its_labels, np.int64))
        sizes.append(len(its_labels))
    return pictures, torch.from_numpy(np.concatenate(labels)), sizes, classes


def build_cache(path, args, splits):
    """Write the images uint8 (n, 3, S, S) of these splits, one after the other, to PATH; their
    labels, the splits' sizes and the classes to the .pt file beside it.

    Both are renamed into place when they are whole, the images last. Of two runs that build at
    once, the second one's files replace the first one's, which hold the same.
    """
    side, names = store_side(args.image_size), " and ".join(splits)
    squash = task_of(args) != "classify"
    read = read_voc if squash else read_splits
    pictures, labels, sizes, classes = read(args, splits)
    about = dict(labels=labels, sizes=sizes, classes=[*classes])
    tell(f"decoding {len(pictures):,} images of {args.data} {names} to {side} px")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=path.parent) as folder:
        write_images(f"{folder}/images", pictures, side, squash)
        torch.save(about, f"{folder}/about")
        os.replace(f"{folder}/about", path.with_suffix(".pt"))
        os.replace(f"{folder}/images", path)


def cache_path(args, splits):
    """A published data set's cache goes by name, splits and side alone, so that its own files are
    not opened again; a folder's, and that of boxes and masks, also by its place, its classes and
    its files' names, sizes and times."""
    folder, task = Path(args.data).resolve(), task_of(args)
    name = args.data if args.data in KNOWN_DATA else folder.name
    name = f"{name}-{'-'.join(splits)}-{store_side(args.image_size)}"
    if task != "classify":
        name = f"{task}-{name}"
    if args.data not in DATASETS:
        key, names_file = hashlib.sha256(), folder / "class_names.txt"
        if task == "classify":
            key.update(os.fsencode(folder))
            files = []
            for split in splits:
                pictures, labels, classes = open_dataset(args.data, args.root, split)
                files.extend(pictures)
                key.update(repr((split, labels, classes)).encode())
        else:
            pairs = list_apart(args, splits)
            files = [names_file] if names_file.exists() else []
            if task == "detect" and args.data != "voc" and not files:
                splits = ["train", *splits]  # its objects name the classes
            for split in splits:
                if split not in pairs:
                    pairs[split] = list_voc(args, split)
                for picture, target in pairs[split]:
                    files += [picture, target]
                key.update(f"{split} {len(files)}".encode())  # where the split ends
        for file in files:
            stat = os.stat(file)
            key.update(os.fsencode(f"{file} {stat.st_mtime_ns} {stat.st_size}\n"))
        name = f"{name}-{key.hexdigest()[:12]}"
    return Path(args.root) / "cache" / f"{name}.npy"


def load_cached(args, splits):
    """Images, labels, sizes and classes as in build_cache(), which runs where there is no cache."""
    try:
        if rank():
            dist.barrier()  # waits until process 0 has built it
        path = cache_path(args, splits)
        about_path = path.with_suffix(".pt")
        if not (path.exists() and about_path.exists()):
            build_cache(path, args, splits)
    except Exception as error:  # whatever a picture or a disk leads to
        fail(f"{args.data} and its cache under --root {args.root}: {first_line(error)}")
    if world() > 1 and rank() == 0:
        dist.barrier()
    try:
        about = torch.load(about_path, weights_only=True)
        images = shared_images(path, torch.device(args.device))
    except Exception as error:
        fail(f"cannot read the cache {path}: delete it, and it is built anew ({first_line(error)})")
    return images, about["labels"], about["sizes"], about["classes"]


@cache
def shared_images(path, device):
    """The images in a cache file, once for all splits and runs that take rows of them. On the host
    they are mapped read-only: the system drops their pages when memory is short."""
    array = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nobody must write to it, and nobody does
        images = torch.from_numpy(array)
    return fit_on(device, images)


def fit_on(device, images):
    """On a GPU where half of its free memory holds them, else on the host."""
    if device.type == "cuda" and images.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        return images.to(device)
    return images


def load_doodles(args, splits):
    """Images, labels, sizes and classes as in build_cache(): all of one class."""
    images = doodles(DOODLES, store_side(args.image_size), 1)
    images = fit_on(torch.device(args.device), images)
    return images, torch.zeros(len(images), dtype=torch.int64), [len(images)], ["doodle"]


def load_petals(args, splits):
    """Images, labels, sizes and classes as in build_cache()."""
    side, names, images, labels = store_side(args.image_size), list(PETAL_SPLITS), [], []
    classes = [f"{count} {form}" for form in PETAL_FORMS for count in PETAL_COUNTS]
    for split in splits:
        count, seed = PETAL_SPLITS[split], 1 + names.index(split)
        if task_of(args) == "classify":
            drawn, targets = petals(count, side, seed)
        else:
            drawn, boxes, masks = mixed_petals(count, side, seed)
            targets = boxes if args.task == "detect" else masks
        images.append(drawn)
        labels.append(targets)
    if task_of(args) == "segment":
        classes = ["background", *classes]
    images = fit_on(torch.device(args.device), torch.cat(images))
    return images, torch.cat(labels), [len(part) for part in labels], classes


def own_splits(args):
    """The splits that a data set has of its own."""
    name, task = args.data, task_of(args)
    if name in KNOWN_DATA and Path(name).is_dir():
        tell_once(f"--data {name} is the known data set; --data ./{name} would be the folder here")
    if name == "petals":
        return list(PETAL_SPLITS)
    if name == "doodles":
        return ["unlabeled"]
    if name == "voc" and task == "classify":
        fail("--data voc has boxes and masks, for --task detect and segment; for classes voc07")
    if name in DATASETS and task != "classify":
        fail(f"--data {name} has classes of images only: --task {task} takes petals, voc, or a "
             "folder in the layout of VOC")
    if name == "voc":
        return TRAIN_VAL_TEST if task == "detect" else TRAIN_TEST
    if name in DATASETS:
        return DATASETS[name][1]
    try:
        if not Path(name).is_dir():
            fail(f"unknown data set {name}: one of {', '.join(KNOWN_DATA)}, or a folder with "
                 "train/CLASS/*.png, test/CLASS/*.png")
        folders = list(class_folders(Path(name)))
    except OSError as error:
        fail(f"cannot read --data {name}: {error.strerror}")
    if task != "classify":
        return list(voc_lists(args))
    splits = ("unlabeled", "train", "val", "test")
    others = [folder for folder in folders if folder not in splits]
    if others:
        tell_once(f"{name}: only {', '.join(splits)} are splits{some_names('; not read:', others)}")
    return [folder for folder in folders if folder in splits]


def load_data(args, split):
    """A Store of one split: unlabeled, train, val, trainval or test.

    Without a val of the data's own, it is a seeded, stratified fifth of train; without unlabeled,
    it is trainval. train, val and trainval are rows of one array: no image is in two.
    """
    own = own_splits(args)
    if split == "unlabeled" and "unlabeled" not in own:
        split = "trainval"
    if args.data == "doodles" and split != "unlabeled":
        fail("--data doodles has no labels, it is for pre-training: give --data petals")
    if split in ("unlabeled", "test"):
        splits = [split]
    elif "val" in own:
        splits = ["train", "val"]
    else:
        splits = ["train"]
    loaders = dict(petals=load_petals, doodles=load_doodles)
    load = loaders.get(args.data, load_cached)
    images, labels, sizes, classes = load(args, splits)
    rows = torch.arange(len(labels))
    if split in ("train", "val"):
        if "val" in own:
            held_out = rows[sizes[0]:]
        else:
            held_out = labelled_subset(labels, seed=0, fraction=0.2)
            shown = classes_shown(labels)
            for label in range(len(classes)):
                images_of = (shown == label).any(1).nonzero()[:, 0]
                if len(images_of) == 1:  # the only image of a class stays in train
                    held_out = held_out[held_out != images_of]
        rows = held_out if split == "val" else rows[~torch.isin(rows, held_out)]
    store = Store(images, labels[rows].to(args.device), rows, classes)
    if split != "unlabeled":
        say_absent(store, f"{args.data} {split}")
    return store


def say_absent(store, name):
    """Say which classes have no image in a store: in a mean over classes they do not count."""
    shown = classes_shown(store.labels.cpu()).unique().tolist()
    if store.labels.dtype == torch.uint8:
        shown.append(0)  # the background, which classes_shown() leaves out
    absent = absent_classes(store.classes, shown)
    if absent:
        tell_once(f"{name} has no image of {len(absent)} of {len(store.classes)} classes"
                  f"{some_names(':', absent)}")


def absent_classes(classes, labels):
    """The names of the classes that are not among the labels, a list of positions."""
    present = set(labels)
    return [name for label, name in enumerate(classes) if label not in present]


def load_val(args):
    """val, or None where no image is left for it."""
    store = load_data(args, "val")
    return store if len(store) else None


def load_unlabeled(args, flag="batch_size"):
    """The images of a pretext task: at least a batch of them, since its batches are all whole."""
    data, batch_size = load_data(args, "unlabeled"), getattr(args, flag)
    if len(data) < batch_size:
        option = "--" + flag.replace("_", "-")
        fail(f"{option} {batch_size} is more than the {len(data)} images: lower it")
    split = "unlabeled" if "unlabeled" in own_splits(args) else "train and val"
    tell_once(f"{len(data):,} images of {args.data}, {split}")
    return data


PROBE_IMAGES = 50_000, 10_000  # at most, of train and of val


def load_probe(args):
    """train and val for a probe on held-out labels, of huge data a random part; None without
    labels, or with several an image. Doodles have none: petals' stand in."""
    if args.data == "doodles":
        args = argparse.Namespace(**vars(args))
        args.data = "petals"
    if args.data not in KNOWN_DATA and not (Path(args.data) / "train").is_dir():
        return None
    rng = torch.Generator().manual_seed(0)
    probe = []
    for split, most in zip(("train", "val"), PROBE_IMAGES):
        store = load_data(args, split)
        if len(store.classes) < 2 or not store.one_label or not len(store):
            return None
        if len(store) > most:
            store = store.subset(torch.randperm(len(store), generator=rng)[:most])
        probe.append(store)
    return tuple(probe)


def labelled_subset(labels, seed, per_class=None, fraction=None):
    """Indices of a seeded subset: per_class images that show each class, or that fraction of those
    that do (at least one). What was drawn for one class counts for the others that it shows."""
    rng = torch.Generator().manual_seed(seed)
    shown, members = classes_shown(labels.cpu()), []
    for label in shown.unique():
        if label >= 0:
            members.append((shown == label).any(1).nonzero()[:, 0])
    largest = max(map(len, members), default=0)
    if per_class is not None and per_class > largest:
        fail(f"--labels-per-class {per_class} is more than any class has: at most {largest} images")
    # The same rows twice: as a mask, and in the order in which they were drawn.
    chosen, keep = torch.zeros(len(shown), dtype=torch.bool), [torch.arange(0)]
    for rows in members:
        size = per_class  # of a smaller class all
        if per_class is None:
            size = max(1, round(fraction * len(rows)))
        others = rows[~chosen[rows]]
        missing = max(0, size - int(chosen[rows].sum()))
        drawn = others[torch.randperm(len(others), generator=rng)[:missing]]
        chosen[drawn] = True
        keep.append(drawn)
    if per_class is None:  # of the images that show nothing as large a part
        nothing = (shown < 0).all(1).nonzero()[:, 0]
        size = round(fraction * len(nothing))
        keep.append(nothing[torch.randperm(len(nothing), generator=rng)[:size]])
    return torch.cat(keep)


def few_labels(args):
    """Whether the flags ask for a subset of the labelled images; val is then not trained on."""
    return bool(args.labels_per_class) or args.fraction is not None


def load_labelled(args, seed, hold_out=False):
    """The labelled images to train on: with --labels-per-class or --fraction a subset of train that
    the seed draws, else train and val. hold_out keeps val out, for a search judged on it."""
    store = load_data(args, "train" if few_labels(args) or hold_out else "trainval")
    if len(store.classes) < 2 and store.one_label:
        fail(f"{args.data} has only one class, {store.classes[0]}: there is nothing to tell apart")
    if few_labels(args):
        keep = labelled_subset(store.labels, seed, args.labels_per_class, args.fraction)
        store = store.subset(keep)
        say_absent(store, f"{args.data}: the labelled part")
    tell_once(f"{len(store):,} labelled images of {args.data}, {len(store.classes)} classes")
    return store


def need_one_label(args, data):
    if not data.one_label:
        fail(f"{args.data} has several classes per image, and this loss needs one: finetune.py "
             "without --eta takes it")


class Batches:
    """Epochs of images uint8 (b, 3, S, S) and their labels (b, ...) on the device, each in an order
    of its own: every image once, of each batch this process's rows.

    whole_only drops a rest that does not fill a batch (a pretext task wants as many negatives each
    step); else the images are spread evenly over the batches. No process gets a batch of one image,
    on which BatchNorm cannot work.
    """

    def __init__(self, store, batch_size, whole_only=False):
        self.store, self.batch_size, self.whole_only = store, batch_size, whole_only
        own = len(store) // world()  # the images of one process
        if whole_only:
            self.steps = len(store) // batch_size
            smallest = min(own, batch_size // world())
        else:  # fewer batches where the rows of one process cannot give each of them two
            self.steps = max(1, min(math.ceil(len(store) / batch_size), own // 2))
            smallest = own // self.steps
        if smallest < 2 or self.steps == 0:
            fail(f"{len(store)} images in batches of {batch_size} are fewer than two a batch for "
                 f"each process ({world()}): take more images or fewer processes")

    def __len__(self):
        return self.steps

    def __iter__(self):
        order = torch.randperm(len(self.store))
        if self.whole_only:
            order = order[:self.steps * self.batch_size]
        return feed(self.store, own_rows(order).tensor_split(self.steps))


def feed(store, parts):
    """Yields images and labels, on the device, of each index tensor in `parts`. What is on the host
    is read a batch ahead."""
    device = store.labels.device
    if store.images.is_cuda:
        for part in parts:
            rows = store.rows[part].to(device, non_blocking=True)
            yield store.images[rows], store.labels[part.to(device, non_blocking=True)]
        return
    copies = None
    if device.type == "cuda":
        copies = torch.cuda.Stream(device)  # beside the computation

    def read(part):
        shape = len(part), *store.images.shape[1:]
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return torch.index_select(store.images, 0, store.rows[part], out=images)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, parts[0])
        for i, part in enumerate(parts):
            images = ahead.result()
            if i + 1 < len(parts):
                ahead = reader.submit(read, parts[i + 1])
            with torch.cuda.stream(copies):  # without a GPU this does nothing
                images = images.to(device, non_blocking=True)
            if copies is not None:
                computation = torch.cuda.current_stream(device)
                computation.wait_stream(copies)
                images.record_stream(computation)
            yield images, store.labels[part.to(device, non_blocking=True)]


# ---------------------------------------------------------------------------------------- views

def crop_resize_flip(x, box, flip, size):
    """uint8 (B, 3, S, S), box (B, 4) of top, left, height, width in whole pixels, flip (B,) bool,
    both on the CPU -> float32 (B, 3, size, size) in 0..1: torchvision's resized_crop of each."""
    if x.device.type != "cpu" or x.shape[-1] <= 64:  # a call for each small image would take longer
        box, flip = box.to(x.device, non_blocking=True), flip.to(x.device, non_blocking=True)
        return resample(x.float() / 255, box, flip, size)
    views = []
    for i, (top, left, height, width) in enumerate(box.int().tolist()):
        cut = x[i:i + 1, :, top:top + height, left:left + width]
        cut = cut.contiguous(memory_format=torch.channels_last)  # torch resizes this layout fastest
        views.append(F.interpolate(cut, (size, size), mode="bilinear", antialias=True))
    views = torch.cat(views).contiguous()
    views[flip] = views[flip].flip(3)
    return views.float().div_(255)


def resample(x, box, flip, size):
    """crop_resize_flip() on floats, all at once: two matrices an image, one for each axis. A row
    has the bilinear weights of an output pixel: a triangle inside the crop, widened where that
    shrinks. Box and flip on x's device."""
    first, length = box.to(x.dtype)[..., None, None].split(2, dim=1)  # (B, 2, 1, 1): both axes
    scale = length / size
    centre = (torch.arange(size, device=x.device)[:, None] + 0.5) * scale
    pixel = torch.arange(x.shape[-1], device=x.device) - first  # 0 at the crop's edge
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= 0) & (pixel < length))
    weight = weight / weight.sum(-1, keepdim=True)  # (B, 2, size, S)
    rows, columns = weight.unbind(1)
    columns = torch.where(flip.view(-1, 1, 1), columns.flip(1), columns)
    x = (x.flatten(1, 2) @ columns.mT).unflatten(1, (3, -1))
    return rows[:, None] @ x


def crop_mask(mask, box, flip, size):
    """crop_resize_flip() of masks (B, S, S), whose numbers cannot be mixed -> (B, size, size): each
    pixel is the nearest one, in row floor(top + (i + 0.5) height / size)."""
    first, length = box.to(mask.device)[..., None].split(2, dim=1)      # (B, 2, 1): both axes
    centre = (torch.arange(size, device=mask.device) + 0.5) * length / size
    rows, columns = (first + centre).long().unbind(1)                   # (B, size)
    columns = torch.where(flip.to(mask.device)[:, None], columns.flip(1), columns)
    image = torch.arange(len(mask), device=mask.device)[:, None, None]
    return mask[image, rows[:, :, None], columns[:, None, :]]


grey = torchvision.transforms.functional.rgb_to_grayscale  # (B, 3, H, W) -> (B, 1, H, W)


def blend(x, other, factor):
    """factor (B,): 1 gives x (B, 3, H, W), 0 the other, more than 1 exaggerates the difference."""
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def brightness(x, factor):
    return blend(x, 0, factor)


def contrast(x, factor):
    return blend(x, grey(x.mean((2, 3), keepdim=True)), factor)


def saturation(x, factor):
    return blend(x, grey(x), factor)


def hue(x, shift):
    """Turn the hue of x (B, 3, H, W) in 0..1 by shift (B,), in full turns, in HSV space."""
    red, green, blue = x.unbind(1)
    low, chroma = x.amin(1), x.amax(1) - x.amin(1)
    # How far from red, 0 to 3 sixths of a turn: upwards on green's side, downwards on blue's.
    from_red = 1 + (green + blue - red - low) / chroma.clamp(min=1e-12)
    sixths = torch.copysign(from_red, green - blue) + 6 * shift.view(-1, 1, 1)
    sixths = sixths - 6 * (sixths / 6).floor()  # 0 to 6: red is 0, green 2, blue 4
    red = low + chroma * ((sixths - 3).abs() - 1).clamp_(0, 1)
    green = low + chroma * (2 - (sixths - 2).abs()).clamp_(0, 1)
    blue = low + chroma * (2 - (sixths - 4).abs()).clamp_(0, 1)
    return torch.stack([red, green, blue], 1)


def blur(x, sigma, kernel):
    """Gaussian blur of x (B, 3, H, H) by sigma (B,) in pixels, `kernel` taps, edges mirrored."""
    reach, side = kernel // 2, x.shape[-1]
    weight = torch.exp(-0.5 * (torch.arange(reach + 2, device=x.device) / sigma[:, None]) ** 2)
    weight[:, reach + 1] = 0  # (B, reach + 2): of a pixel by its distance, none beyond the reach
    weight = weight / (2 * weight.sum(1, keepdim=True) - weight[:, :1])  # both sides, 0 once
    source = torch.arange(-reach, side + reach, device=x.device)  # where mirrored pixels count too
    distance = (source - source[reach:-reach, None]).abs().clamp(max=reach + 1)
    matrix = weight[:, None, distance]  # (B, 1, H, H + 2 reach)
    return matrix @ F.pad(x, (reach, reach, reach, reach), mode="reflect") @ matrix.mT


def normalise(x):
    """0..1 -> ImageNet's mean 0 and deviation 1"""
    mean_std = torch.tensor((MEAN, STD), dtype=x.dtype).to(x.device, non_blocking=True)
    mean, std = mean_std[..., None, None]
    return (x - mean) / std


def crop_boxes(count, side, scale, ratio=(3 / 4, 4 / 3), tries=10):
    """RandomResizedCrop's boxes (count, 4): the first of ten draws that fits, else the image."""
    area = side * side * torch.empty(count, tries).uniform_(*scale)
    aspect = torch.empty(count, tries).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    shape = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], 2).round()
    fits = ((shape > 0) & (shape <= side)).all(2)
    shape[~fits] = side
    shape = shape[torch.arange(count), fits.int().argmax(1)]  # (count, 2): height, width
    corner = (torch.rand(2, count).T * (side - shape + 1)).floor()
    return torch.cat([corner, shape], 1)


def augment(x, size, crop=(0.08, 1), jitter=(0, 0, 0, 0), jitter_p=0.8, grey_p=0, blur_p=0,
            solarise_p=0):
    """One random view of every image: uint8 (B, 3, S, S) -> normalised float32 (B, 3, size, size).

    Crop with flip, colour jitter (brightness, contrast, saturation, hue; in an order drawn once a
    batch), grey, blur (sigma 0.1 to 2 pixels), solarise. Drawn on the CPU, for the whole batch, so
    that views do not depend on the number of processes and no step waits for the device.
    """
    count = len(x) * world()
    box = own_rows(crop_boxes(count, x.shape[-1], crop))
    flip = own_rows(torch.rand(count) < 0.5)
    order, factors, chosen = [], [], {}
    if any(jitter):
        order = torch.randperm(4).tolist()
        left_out = torch.rand(count) >= jitter_p
        for strength, neutral in zip(jitter, (1, 1, 1, 0)):  # neutral changes nothing
            low, high = max(neutral - strength, neutral - 1), neutral + strength
            factor = torch.empty(count).uniform_(low, high).masked_fill(left_out, neutral)
            factors.append(own_rows(factor).to(x.device, non_blocking=True))
    for name, p in (("grey", grey_p), ("blur", blur_p), ("solarise", solarise_p)):
        if p:
            chosen[name] = own_rows(torch.rand(count) < p)
    if blur_p:
        sigma = own_rows(torch.empty(count).uniform_(0.1, 2)).to(x.device, non_blocking=True)
    at_once = max(1, len(x))  # all
    if x.device.type == "cpu":
        at_once = 1 + 2 ** 17 // size ** 2  # 1.5 MB of float32 stay in the processor's cache
    views = torch.empty(len(x), 3, size, size, device=x.device, memory_format=torch.channels_last)
    for first in range(0, len(x), at_once):
        part = slice(first, first + at_once)
        view = crop_resize_flip(x[part], box[part], flip[part], size)
        for i in order:
            if jitter[i]:
                view = (brightness, contrast, saturation, hue)[i](view, factors[i][part])
        for name, which in chosen.items():
            rows = which[part].nonzero()[:, 0].to(x.device, non_blocking=True)
            if name == "grey":
                view[rows] = grey(view[rows])
            if name == "blur":
                kernel = max(3, size // 10 // 2 * 2 + 1)  # odd, about a tenth of the side
                view[rows] = blur(view[rows], sigma[part][rows], kernel)
            if name == "solarise":
                view[rows] = torch.minimum(view[rows], 1 - view[rows])
        views[part] = normalise(view)
    return views


def test_crop(x, size, share=0.875):
    """The view that every evaluation uses: the centre of the image, resized, normalised. share: of
    the image's side, 1 for boxes and masks, which reach to its edge."""
    side = round(share * x.shape[-1])
    edge = round((x.shape[-1] - side) / 2)
    box = torch.tensor([[edge, edge, side, side]]).expand(len(x), 4)
    x = crop_resize_flip(x, box, torch.zeros(len(x), dtype=torch.bool), size)
    return normalise(x).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------- backbone

ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2",
         "wide_resnet101_2")


def build_backbone(arch, small_stem):
    """torchvision's ResNet without its last layer: (B, 3, H, W) -> (B, num_features).

    small_stem, for images of 40 px and less: a 3x3 convolution of stride 1 and no max-pool (SimCLR,
    appendix B.9). resnet10 is for small machines: half the channels, and a stride of 2 in its small
    stem.
    """
    narrow = arch == "resnet10"
    if narrow:
        model, width, stride = ResNet(BasicBlock, [1, 1, 1, 1]), 32, 2
    else:
        model, width, stride = getattr(torchvision.models, arch)(), 64, 1
    model.num_features = model.fc.in_features
    model.fc = nn.Identity()
    if small_stem:
        model.conv1 = nn.Conv2d(3, width, 3, stride, 1, bias=False)
        model.maxpool = nn.Identity()
    elif narrow:
        model.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    if narrow:  # what follows has half the channels, too
        model.inplanes, model.num_features = width, 8 * width
        model.bn1 = nn.BatchNorm2d(width)
        model.layer1 = model._make_layer(BasicBlock, width, 1)
        model.layer2 = model._make_layer(BasicBlock, 2 * width, 1, stride=2)
        model.layer3 = model._make_layer(BasicBlock, 4 * width, 1, stride=2)
        model.layer4 = model._make_layer(BasicBlock, 8 * width, 1, stride=2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)


def start_backbone(args, say=True):
    """Backbone on the device, from --ckpt or fresh, and the checkpoint (None if fresh). Seeds
    torch, settles args.arch and args.image_size. say: print what was found."""
    torch.manual_seed(args.seed)
    ckpt = None
    if args.ckpt:
        ckpt = load_checkpoint(args.ckpt, args.prefix)
        backbone = load_backbone(ckpt, args, say)
    else:
        backbone = build_backbone(args.arch, args.image_size <= 40)
    if say:
        tell(f"{args.device}, {args.precision}, {args.arch} at {args.image_size} px")
    backbone = place(backbone, args.device)
    if args.compile:
        if task_of(args) != "classify":
            fail("--compile is for --task classify: the other heads take a backbone apart")
        backbone.compile()
    return backbone, ckpt


HEADS = ("fc", "cls", "classifier", "linear", "last_linear", "logit", "head", "embed", "proj",
         "pred", "prototypes", "mlp", "queue")  # how the names of what follows the backbone begin


def load_backbone(ckpt, args, say):
    """The checkpoint's backbone. Every tensor but BatchNorm's counts has to be there in the right
    shape, and nothing else but a head: what has no place here belongs to another network. Settles
    args.arch, image_size and stem_padding, and notes what --resume compares (ckpt_weights) and Run
    names the draws by (ckpt_method, ckpt_draws)."""
    state = ckpt["backbone"]
    args.image_size = args.image_size or ckpt["image_size"]
    if args.image_size is None:
        fail(f"{args.ckpt} does not say for which image size: give --image-size")
    small_stem = state["conv1.weight"].shape[-1:] == (3,)
    if args.arch is None:
        args.arch = ckpt["arch"] or most_similar_arch(state, small_stem)
    backbone = build_backbone(args.arch, small_stem)
    args.stem_padding = ckpt["config"].get("stem_padding", 1)
    weights = digest_of(state)
    if getattr(args, "ckpt_weights", weights) != weights:
        fail(f"{args.ckpt} has changed since this run began with it: what was found before and "
             "after would be mixed. Give a copy of it")
    args.ckpt_weights, args.ckpt_method = weights, ckpt["method"]
    args.ckpt_draws = ckpt["config"].get("draws", ckpt["method"])
    if small_stem:
        backbone.conv1.padding = (args.stem_padding, args.stem_padding)
    elif args.image_size <= 16:  # layer4 would begin on a map of 1 x 1: see --image-size
        fail(f"--image-size {args.image_size} is too small for the stem of {args.ckpt}, which "
             "makes a quarter of it: give 17 or more")
    found, needed = shapes(state), shapes(backbone.state_dict())
    misfit = f"{args.ckpt} does not fit --arch {args.arch}"
    for key, shape in needed.items():
        if found.get(key) != shape:
            problem = f"has shape {tuple(found[key])}" if key in found else "is missing"
            fail(f"{misfit}: {key} {problem}, should be {tuple(shape)}")
    left = [key for key in found if key not in needed]
    for key in left:
        if not key.startswith(HEADS):
            fail(f"{misfit}: {key} has no place there, so that it is of another network")
    own = {key: state[key] for key in backbone.state_dict() if key in state}
    backbone.load_state_dict(own)  # torch fills in BatchNorm's counts, which old files lack
    if say:
        stem = ""
        if ckpt["arch"] is None:  # tensors do not tell these
            conv, pool = backbone.conv1, "no max-pool" if small_stem else "max-pool"
            stem = (f"; taken to have a {conv.kernel_size[0]}x{conv.kernel_size[0]} stem: stride "
                    f"{conv.stride[0]}, padding {conv.padding[0]}, {pool}")
        tell(f"{args.ckpt}: {origin_of(ckpt)}; all {len(needed)} backbone tensors matched"
             f"{some_names(', left out', left)}{stem}")
    return backbone


def origin_of(ckpt):
    """In words: the method that made a checkpoint, on which data, and whether it has finished."""
    origin = ckpt["method"]
    if "data" in ckpt["config"]:
        origin = f"{origin} on {Path(ckpt['config']['data']).name}"
    if ckpt["resume"] and not ckpt["resume"].get("finished", True):
        origin = f"{origin}, of a run that has not finished"
    return origin


def most_similar_arch(state, small_stem):
    """The name of the architecture of which the fewest tensors are missing, misshapen or left
    over."""
    found, differences = shapes(state), {}
    for arch in ARCHS:
        needed = shapes_of_arch(arch, small_stem)
        keys = needed.keys() | found.keys()
        differences[arch] = sum(needed.get(key) != found.get(key) for key in keys)
    return min(differences, key=differences.get)


@cache
def shapes_of_arch(arch, small_stem):
    with torch.device("meta"):  # which has shapes without memory
        return shapes(build_backbone(arch, small_stem).state_dict())


def shapes(state):
    """The shape of each tensor of a state dict; BatchNorm's counts of batches do not matter."""
    return {key: value.shape for key, value in state.items()
            if not key.endswith("num_batches_tracked")}


def digest_of(state):
    """Twelve hexadecimal digits that change with any number in a state dict."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.float().numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()[:12]


def some_names(words, names, most=4):
    """The words, and behind them at most `most` of the names: ", left out fc.weight, fc.bias ...";
    nothing without names."""
    if not names:
        return ""
    more = " ..." if len(names) > most else ""
    return f"{words} {', '.join(names[:most])}{more}"


@contextlib.contextmanager
def frozen_statistics(model, second_order=False):
    """BatchNorm uses the batch's own statistics as in training, but leaves its running averages as
    they are.

    second_order: leave out what has no second derivative, torch.compile and statistics over several
    processes.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
        if second_order:
            layer.forward = partial(_BatchNorm.forward, layer)  # instead of SyncBatchNorm's
    eager = contextlib.nullcontext()
    if second_order and "torch._dynamo" in sys.modules:  # where --compile has loaded it
        eager = torch.compiler.set_stance("force_eager")
    try:
        with eager:
            yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
            layer.__dict__.pop("forward", None)


def freeze_batch_norm(model):
    """BatchNorm goes by its running averages, and leaves them as they are, until the next
    model.train()."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()


def autocast(device, precision):
    """For forward passes only: losses and second derivatives are computed outside."""
    half = precision == "bfloat16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)


def upcast(x):
    """Half types to float32; float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@torch.no_grad()
def features(backbone, store, args):
    """Backbone features float32 (n, D) of a store in its order, in evaluation mode, and its
    labels."""
    was_training, parts = backbone.training, []
    backbone.eval()
    own = torch.arange(rank(), len(store), world())
    for x, _ in feed(store, own.split(512)):
        x = test_crop(x, args.image_size)  # not inside autocast, which would round the pixels
        with autocast(args.device, args.precision):
            f = backbone(x)
        parts.append(upcast(f))
    backbone.train(was_training)
    own_features = torch.cat(parts)
    every = own_features.new_zeros(len(store), own_features.shape[1])
    every[rank()::world()] = own_features
    return all_sum(every), store.labels


def knn_accuracy(memory, memory_labels, query, query_labels, k=20, temperature=0.1):
    """Weighted k-NN on cosine similarity (Wu et al. 2018, arXiv 1805.01978, section 3.4), in per
    cent.

    memory (N, D), query (M, D); each of the k nearest votes exp(similarity / temperature) for its
    class.
    """
    memory, query, hits = F.normalize(memory, dim=1), F.normalize(query, dim=1), 0
    classes = int(memory_labels.max()) + 1
    for part, label in zip(query.split(1024), query_labels.split(1024)):
        similarity, nearest = (part @ memory.T).topk(min(k, len(memory)))  # (b, k)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, memory_labels[nearest], (similarity / temperature).exp())
        hits += (votes.argmax(1) == label).sum()
    return 100 * hits.item() / len(query)


# ------------------------------------------------------------------------------------- optimisation

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum.

    g <- g + wd w;  g <- g eta ||w|| / (||g_raw|| + wd ||w||);  v <- momentum v + g;  w <- w - lr v.
    The trust ratio is that of You et al. (2017, arXiv 1708.03888), whose norms leave the decay out
    of g; SimCLR's code takes the norm of g + wd w. The learning rate stands outside of v, as in
    torch.optim.SGD; both of theirs have it inside. Groups with adapt=False (biases, BatchNorm) keep
    their gradient as it is.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=True)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        """All tensors of a group at once: a loop over them would put a dozen small kernels for each
        in every step on a GPU."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            decay, steps = group["weight_decay"], gradients
            if decay:
                steps = torch._foreach_add(gradients, params, alpha=decay)
            if group["adapt"]:
                w = torch.stack(torch._foreach_norm(params))     # (number of tensors,) ||w||
                g = torch.stack(torch._foreach_norm(gradients))  # (number of tensors,) ||g_raw||
                trust = group["eta"] * w / (g + decay * w)
                trust = torch.where((w > 0) & (g > 0), trust, torch.ones_like(trust))
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
    """adamw, lars or sgd over the modules' trainable parameters; biases and BatchNorm are not
    decayed.

    scales: a factor of the learning rate for each module.
    """
    scales = scales or [1.0] * len(modules)
    groups = []  # only LARS looks at `adapt`
    for scale in dict.fromkeys(scales):  # each value once
        weights, others = [], []
        for module, own_scale in zip(modules, scales):
            for p in module.parameters():
                kind = weights if p.ndim > 1 else others
                if p.requires_grad and own_scale == scale:
                    kind.append(p)
        groups.append(dict(params=weights, weight_decay=weight_decay, adapt=True, scale=scale))
        groups.append(dict(params=others, weight_decay=0.0, adapt=False, scale=scale))
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return LARS(groups, lr=lr)


def set_learning_rate(optimizer, peak, step, steps, warmup=0):
    """Linear warm-up over `warmup` steps, at most half of `steps`, then a cosine to 0 at `steps`
    (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    warmup = min(warmup, steps // 2)
    if step < warmup:
        lr = peak * (step + 1) / warmup
    else:
        share = (step - warmup) / max(1, steps - warmup)
        lr = peak * 0.5 * (1 + math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def chunked_backward(model, embed, loss, x, chunk):
    """Gradient caching (Gao et al. 2021, arXiv 2101.06983): loss(z).backward() for z = embed(x), in
    the memory of `chunk` images.

    embed: images (b, ...) -> their embeddings (b, ...), by model; loss: all embeddings (B, ...) ->
    scalar. Exact but for BatchNorm, which sees a chunk at a time. Returns the loss.
    """
    parts, before = x.split(chunk), torch.get_rng_state()
    with torch.no_grad(), frozen_statistics(model):  # first without a graph
        z = torch.cat([upcast(embed(part)) for part in parts])
    z.requires_grad_()
    value = loss(z)
    gradient, = torch.autograd.grad(value, z)
    torch.set_rng_state(before)  # then once more, with the same views
    for part, part_gradient in zip(parts, gradient.split(chunk)):
        upcast(embed(part)).backward(part_gradient)
    return value


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay average + (1 - decay) model, for every parameter. BatchNorm's statistics
    stay each module's own."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# -------------------------------------------------------------------------------------- checkpoints

def write_whole(path, write):
    """write(file) to a temporary name beside path, then rename: path is never half-written. Of
    several processes, 0 alone writes."""
    if rank():
        return
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except Exception as error:  # torch's writer, too, has a type of its own for a full disk
        fail(f"cannot write {path}: {first_line(error)}")
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path):
    return Path(f"{path}.{os.getpid()}.tmp")


def first_line(error):
    """What an exception says, or else its type."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]


def state_of(part):
    """The state dict of a module or an optimiser; what has none (a state dict, a list, None) is
    what it is."""
    return part.state_dict() if hasattr(part, "state_dict") else part


def not_finite(state):
    """The first name in a state dict (or None) whose tensor is not finite; None where all are."""
    for key, value in (state or {}).items():
        if not value.isfinite().all():
            return key
    return None


def is_finite(module):
    return not_finite(module.state_dict()) is None


def save_checkpoint(path, *, method, arch, image_size, backbone, head, classes, config, resume=None,
                    projector=None):
    """Write one dict of plain types and tensors; backbone, head and projector are modules or state
    dicts.

    backbone: torchvision's own resnet of that name loads it (its fc aside); head: of the pretext
    task, or the classifier; projector: leads to a loss beside the head; resume: what --resume
    needs. Weights that are not finite are refused, so that the last good checkpoint stays.
    """
    parts = dict(backbone=state_of(backbone), head=state_of(head), projector=state_of(projector))
    for state in parts.values():
        key = not_finite(state)
        if key:
            fail(f"{key} is not finite any more: try a lower learning rate. {path} was left as it "
                 "was")
    contents = dict(method=method, arch=arch, image_size=image_size, **parts, classes=classes,
                    config=config, resume=resume)
    write_whole(path, partial(torch.save, contents))
    if world() > 1:
        dist.barrier()  # who reads it next may be another process


OURS = {"method", "arch", "image_size", "backbone", "config"}  # together in no other checkpoint
# Some files number a ResNet's parts: 4.0.conv1.weight. Where 4 is layer1, relu and maxpool are
# counted, as in a Sequential of torchvision's; where it is 2, as in lightly's ResNetGenerator, not.
NUMBERED = {"4": "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4".split(),
            "2": "conv1 bn1 layer1 layer2 layer3 layer4".split()}
# What checkpoints hold beside tensors, and what runs nothing: numbers and flags.
HARMLESS = [
    argparse.Namespace, SimpleNamespace, defaultdict, deque, frozenset, slice, datetime, timedelta,
    *[(PurePath, f"{module}.{kind}") for module in ("pathlib", "pathlib._local")
      for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")],
    np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"},
    (multiarray.scalar, "numpy._core.multiarray.scalar"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    (multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct")]
SAFETENSORS_TYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16,
                         BF16=torch.bfloat16, I64=torch.int64, I32=torch.int32, I16=torch.int16,
                         I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)
FIRST_BLOCK = re.compile(r"(.*\.|)(layer1|4|2)\.0\.conv1\.weight")


def load_checkpoint(path, wanted=None):
    """Read any script's checkpoint, or a foreign one: what stands in front of
    "layer1.0.conv1.weight" there is the prefix of a backbone. Nothing in the file is run.

    wanted: the prefix of the backbone to take; without, the file's first, since of a query and a
    key encoder that is the trained one. Returns our dict, tensors on the CPU; what a foreign file
    does not tell is None.
    """
    content = read_file(path)
    if not isinstance(content, dict):
        content = {}
    ours, searched, backbones = OURS <= content.keys(), content, {}
    if ours:
        searched = content["backbone"] or {}
    state = flat_tensors(searched)
    for key in state:
        found = FIRST_BLOCK.fullmatch(key)
        if found and found[1] not in backbones:
            backbone = named_layers(state, prefix=found[1], first=found[2])
            if "conv1.weight" in backbone:
                backbones[found[1]] = backbone
    if not backbones:
        fail(f"{path} holds no ResNet backbone: no conv1.weight beside layer1.0.conv1.weight")
    prefix = wanted
    if wanted is None:
        prefix = next(iter(backbones))
    if prefix not in backbones:
        fail(f"{path} has no network under --prefix {wanted}"
             f"{some_names('; it has', list(backbones))}")
    if ours:
        ckpt = {"projector": None, **content}
    else:
        method = f"foreign, under {prefix}" if prefix else "foreign"
        others = [other for other in backbones if other != prefix]
        ckpt = dict(method=method + some_names("; for another one --prefix", others), arch=None,
                    image_size=None, head=None, projector=None, classes=None,
                    config=dict(stem_padding=stem_padding(content)), resume=None)
    ckpt["backbone"] = backbones[prefix]
    for part in ("backbone", "head", "projector"):
        key = not_finite(ckpt[part])
        if key:
            fail(f"{path} cannot be used: {key} of its {part} is not finite")
    return ckpt


def read_file(path):
    """What torch.save or safetensors wrote, without running any of it."""
    try:
        if str(path).endswith(".safetensors"):
            return safetensors(Path(path).read_bytes())
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # about old formats: the caller checks what matters
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint {path}")
    except Exception as error:  # torch.load raises a dozen types for what is no checkpoint
        reason = "it is truncated or no checkpoint"
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            reason = f"it would run code of {refused[1]} when read: save its tensors alone"
        elif "Unsupported" in str(error) and Path(path).read_bytes()[:1] == pickle.PROTO:
            reason = "it is a plain pickle, which would run code when read"
        elif "TorchScript" in str(error):
            reason = "it is a TorchScript program: save torch.jit.load(FILE).state_dict() instead"
        fail(f"cannot read {path}: {reason} ({type(error).__name__})")


def safetensors(content):
    """A dict of tensors from the bytes of a .safetensors file: 8 that say how long the header is, a
    JSON header, the values."""
    size = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:size]), {}
    header.pop("__metadata__", None)
    for name, about in header.items():
        first, last = about["data_offsets"]
        values = bytearray(content[size + first:size + last])
        kind = SAFETENSORS_TYPES[about["dtype"]]
        tensors[name] = torch.frombuffer(values, dtype=kind).reshape(about["shape"])
    return tensors


def flat_tensors(content, prefix=""):
    """Nested dicts such as {"state_dict": {...}} as one, {"state_dict.conv1.weight": ...}; what is
    not a tensor is left out."""
    tensors = {}
    for key, value in content.items():
        if torch.is_tensor(value):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            tensors.update(flat_tensors(value, f"{prefix}{key}."))
    return tensors


def named_layers(state, prefix, first):
    """What stands under the prefix, under the names that torchvision's ResNet has; first: what the
    file calls layer1."""
    backbone = {}
    for key, value in state.items():
        part, dot, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix):
            continue
        if first in NUMBERED:
            if not part.isdecimal() or int(part) >= len(NUMBERED[first]):
                continue
            part = NUMBERED[first][int(part)]
        rest = rest.replace("shortcut.", "downsample.")  # as ResNets made for CIFAR call it
        backbone[part + dot + rest] = value
    return backbone


def stem_padding(content):
    """That of the first convolution: 2 in solo-learn's ResNet for CIFAR, which its hyper-parameters
    tell."""
    flags = content.get("hyper_parameters")
    if isinstance(flags, argparse.Namespace):
        flags = vars(flags)
    if isinstance(flags, dict):
        data = flags.get("data", flags)  # newer versions nest
        if isinstance(data, dict) and str(data.get("dataset")).startswith("cifar"):
            return 2
    return 1


def resume_checkpoint(args):
    """The checkpoint that --resume goes on from, or None where there is none yet. The flags must be
    the run's own."""
    path = Path(f"{args.out}.pt")
    if args.resume and not path.exists():
        tell_once(f"--resume: there is no {path} yet, so that the run begins")
    if not args.resume or not path.exists():
        return None
    ckpt = load_checkpoint(path)
    if not ckpt["resume"]:
        fail(f"{path} holds nothing to resume: --resume goes on from what the same command wrote")
    for name, value in run_config(args).items():
        before = ckpt["config"].get(name)
        if name in ("data", "pretext_data", "ckpt") and before and value:
            before, value = Path(before).name, Path(value).name  # they may have moved
        if before != value:
            if name == "ckpt_weights":
                fail(f"--resume: {args.ckpt} holds other weights than those that {path} began with")
            flag = name.replace("_", "-")
            fail(f"--resume: --{flag} is {value}, but {path} was made with {before}")
    return ckpt


def images_in_words(*stores):
    """How many images Stores hold, and twelve digits that change with what 64 of each show."""
    words = []
    for store in stores:
        some = store.images[::max(1, len(store.images) // 64)].cpu()
        words.append(f"{len(store.images):,} images ({digest_of(dict(some=some))})")
    return " and ".join(words)


def check_same_images(args, ckpt, classes, images):
    """Stop where the checkpoint's run was for other classes, or found other images, those that it
    holds out among them. images: as images_in_words() has them now."""
    if ckpt["classes"] != classes:
        fail(f"--resume: {args.out}.pt was made for other classes than {args.data} has now")
    before = ckpt["resume"].get("images", "images that an older version did not note")
    if before != images:
        fail(f"--resume: {args.out}.pt was made from {before}, and now there are {images}")


def run_config(args):
    """The flags that decide what a run computes, as plain types; a folder of images with its whole
    path, by which a later stage knows it from wherever it is started."""
    config = dict(vars(args))
    for name in ("resume", "device", "root", "out", "compile"):
        config.pop(name, None)
    for name in ("data", "pretext_data"):
        folder = config.get(name)
        if folder is not None and folder not in KNOWN_DATA:
            config[name] = str(Path(folder).resolve())
    return config


# ------------------------------------------------------------------------------------ runs and logs

class Run:
    """What every training loop repeats: it goes on where a stopped run was, seeds each epoch,
    averages what is logged over images and processes, and writes OUT.jsonl and OUT.pt after each
    epoch.

        run = common.Run(args, "simclr", model, data, optimizer=optimizer)
        for epoch in run.epochs_left(len(batches)):
            for x, _ in batches:
                ...
                run.add(len(x), loss=loss)
            run.end_epoch()

    model: its children backbone, head, projector, ... are saved under their names; data,
    pretext_data: the Stores that it learns from; --resume asks for the same images;
    others: what only --resume needs, each with a state_dict(). epochs: where they are not
    args.epochs, as bissl.py's, whose unit is an alternation. probe: (memory, query) stores for a
    k-NN probe every args.probe_every epochs.
    draws: the name that with seed and epoch decides order and views, the method's unless given.
    coin.py and the three that fine-tune give "fine-tuning", so that all see what plain fine-tuning
    does. Behind a checkpoint whose run drew by the same name ", continued" is added, or this run
    would see the same once more; not where it goes on with the epochs that coin.py left.
    """

    def __init__(self, args, method, model, data, pretext_data=None, epochs=None, unit="epoch",
                 probe=None, draws=None, **others):
        self.args, self.method, self.model, self.classes = args, method, model, data.classes
        stores = [data]
        if pretext_data:
            stores.append(pretext_data)
        self.learns_from, self.last_logged = images_in_words(*stores), self.logged()
        self.draws = draws or method
        draws_before = getattr(args, "ckpt_draws", "")
        if draws_before.startswith(self.draws):
            self.draws = draws_before
            if args.ckpt_method != "coin" or not getattr(args, "spent", 0):
                self.draws = f"{draws_before}, continued"
        self.epochs, self.unit, self.probe = epochs or args.epochs, unit, probe
        self.parts = dict(model.named_children(), **others)
        self.config, self.history = dict(run_config(args), draws=self.draws), []
        ckpt = resume_checkpoint(args)
        if ckpt:
            check_same_images(args, ckpt, self.classes, self.learns_from)
            self.load(ckpt)
        self.images_seen, self.done_before = 0, len(self.history)

    def load(self, ckpt):
        """Every part and the history as the checkpoint has them."""
        states = {**ckpt, **ckpt["resume"]}
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        self.history = states["history"]

    def epochs_left(self, steps):
        """The numbers of the epochs to come; steps: how often add() is called in each of them."""
        self.started = time.perf_counter()
        for epoch in range(len(self.history), self.epochs):
            seed_epoch(self.draws, self.args.seed, epoch)
            self.start_epoch(steps)
            yield epoch

    def start_epoch(self, steps):
        self.sums, self.counts = {}, {}
        self.steps, self.steps_done, self.seen_before = steps, 0, self.images_seen
        self.began = self.shown_at = time.perf_counter()

    def add(self, images, **means):
        """Add a batch's means over `images` images of this process; they stay on the device."""
        self.images_seen += images * world()
        self.steps_done += 1
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + mean.detach() * images
            self.counts[name] = self.counts.get(name, 0) + images
        if sys.stdout.isatty() and time.perf_counter() - self.shown_at > 10:
            self.show_progress()

    def show_progress(self):
        """A line that is rewritten in place every ten seconds, on a terminal only: to read the sums
        makes the device wait."""
        self.shown_at = time.perf_counter()
        spent, images = self.shown_at - self.began, self.images_seen - self.seen_before
        seconds = spent / self.steps_done * (self.steps - self.steps_done)
        left = timedelta(seconds=int(seconds))
        means = [f"{name} {sums / self.counts[name]:.4g}" for name, sums in self.sums.items()]
        tell(f"\r{self.unit} {len(self.history) + 1}/{self.epochs}  {'  '.join(means)}  "
             f"{images:,} images  {images / spent:,.0f} images/s  left in it {left}\033[K",
             end="")

    def means(self):
        """The averages so far over the images of all processes, as numbers."""
        names = list(self.sums)
        means = [self.sums[name] / self.counts[name] for name in names]
        return dict(zip(names, process_means([torch.stack(means)])[0].tolist()))

    def knn(self, backbone):
        """The probe of a backbone, None in epochs that are not due for one."""
        done = len(self.history) + 1
        if self.probe is None or (done % self.args.probe_every and done < self.epochs):
            return None
        memory, query = self.probe
        return knn_accuracy(*features(backbone, memory, self.args),
                            *features(backbone, query, self.args))

    def score(self):
        """What is measured after an epoch."""
        return dict(knn=self.knn(self.model.backbone))

    def end_epoch(self, **metrics):
        """Log the averages, the score and the metrics (numbers or device scalars), then save."""
        average_statistics(self.model)
        self.log({**self.means(), **self.score(), **metrics})
        self.save()

    def log(self, metrics):
        """One line on the screen, with images per second and the time left, and one in
        OUT.jsonl."""
        done = len(self.history) + 1
        line, shown = {self.unit: done}, []
        for name, value in metrics.items():
            value = value.item() if torch.is_tensor(value) else value
            line[name] = value
            if value is None:
                continue
            if not math.isfinite(value):
                kept = "nothing was written"
                if self.history:
                    kept = f"{self.args.out}.pt holds the last good one"
                fail(f"{name} is {value} in {self.unit} {done}: try a lower learning rate. {kept}")
            shown.append(f"{name} {value:.4g}")
        self.history.append(line)
        spent = time.perf_counter() - self.started
        left = timedelta(seconds=int(spent / (done - self.done_before) * (self.epochs - done)))
        start_of_line = "\r\033[K" if sys.stdout.isatty() else ""
        tell(f"{start_of_line}{self.unit} {done}/{self.epochs}  {'  '.join(shown)}  "
             f"{self.images_seen / spent:,.0f} images/s  left {left}")
        if rank() == 0 and self.logged() not in (self.last_logged, None):
            fail(f"another run writes to --out {self.args.out}, too: give each a name of its own")
        self.last_logged = write_lines(self.args, self.history)

    def logged(self):
        """What OUT.jsonl holds now; None where there is none."""
        path = Path(f"{self.args.out}.jsonl")
        if path.exists():
            return path.read_bytes()

    def is_finished(self):
        return len(self.history) == self.epochs

    def save(self):
        parts = {name: state_of(part) for name, part in self.parts.items()}
        named = {name: parts.pop(name, None) for name in ("backbone", "head", "projector")}
        parts.update(history=self.history, finished=self.is_finished(), images=self.learns_from)
        save_checkpoint(f"{self.args.out}.pt", method=self.method, arch=self.args.arch,
                        image_size=self.args.image_size, classes=self.classes, config=self.config,
                        resume=parts, **named)


def seed_epoch(draws, seed, epoch):
    """Order and views of an epoch depend neither on the ones before nor on those of another
    stage. draws: Run's."""
    digest = hashlib.sha256(f"{draws} {seed} {epoch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def write_lines(args, lines):
    """OUT.jsonl: one JSON object per line. -> its bytes"""
    # A number that is not finite becomes null: JSON has no word for it.
    lines = json.loads(json.dumps(lines), parse_constant=lambda name: None)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write_whole(f"{args.out}.jsonl", lambda file: file.write(content))
    return content


# ----------------------------------------------------------------------------------------- figures

def plot_curves(axes, history, names, x="epoch"):
    """The named metrics against x, each where it was measured."""
    for name in names:
        points = [line for line in history if line.get(name) is not None and x in line]
        if points:
            marker = "." if len(points) < 30 else None
            axes.plot([line[x] for line in points], [line[name] for line in points], label=name,
                      marker=marker)
    axes.set_xlabel(x)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)


def plot_features(axes, x, y, title):
    """Features x (n, D) with classes y (n,), normalised, in the plane in which their class means
    differ most."""
    if not x.isfinite().all():  # of a run that diverged just short of infinity
        return
    x = F.normalize(x, dim=1)
    x = x - x.mean(0)
    class_means = torch.stack([x[y == label].mean(0) for label in y.unique()])  # (C, D)
    _, _, directions = torch.linalg.svd(class_means)            # (D, D), largest first
    plane = (x @ directions[:2].T).cpu().numpy()                                # (n, 2)
    axes.scatter(plane[:, 0], plane[:, 1], c=y.cpu().numpy(), cmap="tab20", s=4)
    axes.set_title(title)


def show_images(axes, x, columns):
    """A grid of normalised images (n, 3, H, W), as the network gets them."""
    x = x.float().cpu()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    x = (x * std + mean).clamp(0, 1)
    grid = torchvision.utils.make_grid(x, columns, padding=1, pad_value=1)
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set_axis_off()


def save_figure(args, figure):
    figure.tight_layout()
    write_whole(f"{args.out}.png", partial(figure.savefig, format="png", dpi=110))
    plt.close(figure)
