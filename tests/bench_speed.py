"""How fast the scripts are, each figure a ratio to something timed in the same process on the same
machine, in turn with it.

    python tests/bench_speed.py                 every row, about 8 minutes on two fast CPU cores; on
                                                the GPU where there is one
    python tests/bench_speed.py hvp byol        these groups of rows only

Prints the table and writes tests/results/speed.csv; rows that were not measured anew stay in that
file.
  step      images/s of the SimCLR step with data and augmentation / images/s of forward + backward
            on one fixed tensor
  lightly   images/s of the SimCLR step / of lightly's: its views, head and loss, one DataLoader
            worker a core; same backbone, batch, precision and images, which it gets decoded. Left
            out where lightly (pip install lightly) is not there: it is no requirement
            (on a CPU its workers take the cores from the training, the more so on a busy machine:
            with OMP_NUM_THREADS=1 the network alone decides there)
  views     two views a picture, uint8 128 -> 96 px / torchvision.transforms.v2 an image at a time,
            one DataLoader worker a core
  hvp       one Hessian-vector product on a kept graph / forward + backward of the same batch
  tuning    a training step of each method that learns from labels / of plain fine-tuning, same
            batch and backbone
  byol      a training step of BYOL / of SimCLR
  decode    images/s of building the cache from JPEGs / of torchvision's ImageFolder with Resize and
            CenterCrop, one core each
"""
import copy
import os
import shutil
import tempfile
import time
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import benches
import bi_tuning
import bissl
import byol
import coin
import common
import core_tuning
import finetune
import simclr

FIELDS = ("device", "row", "setting", "ours", "reference", "unit", "ratio", "aim")
VIEWS = dict(crop=(0.2, 1), jitter=(0.4, 0.4, 0.2, 0.1), grey_p=0.2, blur_p=0.5)
CPU = SimpleNamespace(  # lightly_batches: those of an epoch, enough for its workers to get going
    arch="resnet18", size=64, batch=128, precision="float32", step_aim=">= 0.90",
    tuning_batch=128, hessian_batch=32, pictures=1024, lightly_batches=8)
GPU = SimpleNamespace(
    arch="resnet50", size=96, batch=1024, precision="bfloat16", step_aim=">= 0.97",
    tuning_batch=256, hessian_batch=256, pictures=1024, lightly_batches=48)


# ---------------------------------------------------------------------------------------- measuring

def sizes(device):
    return GPU if device == "cuda" else CPU


def seconds(work, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(ours, reference, device, rounds):
    """Median seconds of each, run alternately after one round that does not count, and the median
    of the rounds' ratios."""
    own, other, ratios = [], [], []
    for _ in range(rounds + 1):
        own.append(seconds(ours, device))
        other.append(seconds(reference, device))
        ratios.append(own[-1] / other[-1])
    return median(own[1:]), median(other[1:]), median(ratios[1:])


# ------------------------------------------------------------------------------ SimCLR and its like

def pretext(device, arch, image_size, batch_size):
    """SimCLR's model, the flags of its views and loss, and a Store of two batches of noise."""
    args = SimpleNamespace(precision="float32", hidden=256, dim=128, temperature=0.2,
                           crop=VIEWS["crop"][0], jitter=VIEWS["jitter"], grey=VIEWS["grey_p"],
                           blur=VIEWS["blur_p"], image_size=image_size)
    backbone = common.build_backbone(arch, image_size <= 40)
    model = simclr.make_model(backbone, args).to(device)
    side = common.store_side(image_size)
    images = torch.randint(0, 256, (2 * batch_size, 3, side, side), dtype=torch.uint8).to(device)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    return model, args, common.Store(images, labels, torch.arange(len(images)), ["none"])


def pretext_epoch(script, model, args, data, batch_size):
    """A function that goes through the data once as the script's train() does."""
    optimizer = common.make_optimizer("adamw", [model], 1e-3, 1e-4)
    batches = common.Batches(data, batch_size, whole_only=True)

    def epoch():
        for x, _ in batches:
            loss = script.loss(model, script.make_views(x, args), args)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            script.after_step(model, args, 0, len(batches))

    return epoch


def step_row(device):
    size = sizes(device)
    model, args, data = pretext(device, size.arch, size.size, size.batch)
    args.precision = size.precision
    fixed = []
    for _ in range(2):
        view = torch.randn(size.batch, 3, size.size, size.size, device=device)
        fixed.append(view.contiguous(memory_format=torch.channels_last))

    def descend():
        for _ in range(2):
            model.zero_grad()
            simclr.loss(model, fixed, args).backward()

    step = pretext_epoch(simclr, model, args, data, size.batch)
    ours, reference, ratio = in_turn(step, descend, device, 5)
    images = 2 * size.batch
    return dict(row="step", setting=setting_of(size, size.batch), ours=images / ours,
                reference=images / reference, unit="images/s", ratio=1 / ratio, aim=size.step_aim)


def setting_of(size, batch):
    return f"{size.arch}, {size.size} px, batch {batch}, {size.precision}"


def byol_row(device):
    size = sizes(device)
    model, args, data = pretext(device, size.arch, size.size, size.batch)
    args.precision = size.precision
    byol_args = SimpleNamespace(**vars(args))
    byol_args.hidden, byol_args.decay = 512, 0.99
    byol_args.blur, byol_args.solarise = [1.0, 0.1], [0.0, 0.2]
    byol_model = byol.make_model(copy.deepcopy(model.backbone), byol_args).to(device)
    own_epoch = pretext_epoch(byol, byol_model, byol_args, data, size.batch)
    other_epoch = pretext_epoch(simclr, model, args, data, size.batch)
    ours, reference, ratio = in_turn(own_epoch, other_epoch, device, 5)
    return dict(row="byol step", setting=f"{setting_of(size, size.batch)}, against simclr",
                ours=ours / 2, reference=reference / 2, unit="s", ratio=ratio, aim="<= 1.45")


# ------------------------------------------------------------------------------------------ lightly

class Pictures(Dataset):
    """Decoded pictures for a DataLoader, each `times` an epoch, made into views one at a time."""

    def __init__(self, pictures, transform, times=1):
        self.pictures, self.transform, self.times = pictures, transform, times

    def __len__(self):
        return len(self.pictures) * self.times

    def __getitem__(self, i):
        return self.transform(self.pictures[i % len(self.pictures)])


def lightly_epoch(size, data, times, device):
    """A function that trains SimCLR for an epoch with lightly's parts, as its documentation puts
    them together. ImportError where it is not installed."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    brightness, contrast, saturation, hue = VIEWS["jitter"]
    transform = SimCLRTransform(
        input_size=size.size, cj_prob=0.8, cj_strength=1.0, cj_bright=brightness,
        cj_contrast=contrast, cj_sat=saturation, cj_hue=hue, min_scale=VIEWS["crop"][0],
        random_gray_scale=VIEWS["grey_p"], gaussian_blur=VIEWS["blur_p"], sigmas=(0.1, 2))
    pictures = [v2.functional.to_pil_image(image) for image in data.images.cpu()]
    loader = DataLoader(Pictures(pictures, transform, times), size.batch, shuffle=True,
                        drop_last=True, num_workers=os.cpu_count(), persistent_workers=True,
                        pin_memory=device == "cuda")
    backbone = common.build_backbone(size.arch, size.size <= 40)
    head = SimCLRProjectionHead(backbone.num_features, 256, 128)
    model = nn.Sequential(backbone, head).to(device)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def epoch():
        for first, second in loader:
            first = first.to(device, non_blocking=True)
            second = second.to(device, non_blocking=True)
            with common.autocast(device, size.precision):
                z1, z2 = model(first), model(second)
            loss = criterion(z1.float(), z2.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def lightly_row(device):
    size = sizes(device)
    model, args, data = pretext(device, size.arch, size.size, size.batch)
    args.precision = size.precision
    times = size.lightly_batches // 2
    try:
        other_epoch = lightly_epoch(size, data, times, device)
    except ImportError as error:
        print(f"lightly: row left out, it cannot be imported ({error})", flush=True)
        return []
    again = replace(data, rows=data.rows.repeat(times), labels=data.labels.repeat(times))
    own_epoch = pretext_epoch(simclr, model, args, again, size.batch)
    ours, reference, ratio = in_turn(own_epoch, other_epoch, device, 3)
    images = 2 * times * size.batch
    return dict(row="lightly", setting=f"{setting_of(size, size.batch)}, {os.cpu_count()} workers",
                ours=images / ours, reference=images / reference, unit="images/s", ratio=1 / ratio,
                aim=">= 1")


# -------------------------------------------------------------------------------------------- views

def usual_views(image):
    """The usual way: a picture at a time, each operation by torchvision.transforms.v2."""
    return USUAL_VIEW(image), USUAL_VIEW(image)


USUAL_VIEW = v2.Compose([
    v2.RandomResizedCrop(96, scale=VIEWS["crop"], antialias=True),
    v2.RandomHorizontalFlip(),
    v2.RandomApply([v2.ColorJitter(*VIEWS["jitter"])], p=0.8),
    v2.RandomGrayscale(VIEWS["grey_p"]),
    v2.RandomApply([v2.GaussianBlur(9, (0.1, 2))], p=VIEWS["blur_p"]),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(common.MEAN, common.STD)])


def views_row(device):
    count = sizes(device).pictures
    images = torch.randint(0, 256, (count, 3, 128, 128), dtype=torch.uint8)
    here = images.to(device)
    loader = DataLoader(Pictures(images, usual_views), 256, num_workers=os.cpu_count(),
                        persistent_workers=True)

    def ours():
        for x in here.split(256):
            for _ in range(2):
                common.augment(x, 96, **VIEWS)

    def reference():
        for views in loader:
            for view in views:
                view.to(device)

    ours, reference, ratio = in_turn(ours, reference, device, 3)
    return dict(row="views", setting="two views, uint8 128 px -> 96 px, batch 256",
                ours=count / ours, reference=count / reference, unit="pictures/s", ratio=1 / ratio,
                aim=">= 3")


# ---------------------------------------------------------------------- a product with the Hessian

def hvp_row(device):
    size = sizes(device)
    batch = size.hessian_batch
    model, args, data = pretext(device, size.arch, size.size, batch)
    # bissl.py takes products in the one layout; the other is faster for forward + backward.
    planar = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    views = simclr.make_views(data.images[:batch], args)
    planar_views = [view.contiguous() for view in views]
    theta, weights = tuple(planar.backbone.parameters()), tuple(model.backbone.parameters())
    vector = tuple(torch.randn_like(p) for p in theta)
    loss = simclr.loss(planar, planar_views, args)
    product = bissl.damped_hessian(torch.autograd.grad(loss, theta, create_graph=True), theta, 100)

    def forward_and_backward():
        torch.autograd.grad(simclr.loss(model, views, args), weights)

    ours, reference, ratio = in_turn(lambda: product(vector), forward_and_backward, device, 7)
    return dict(row="hvp", setting=f"{size.arch}, {size.size} px, batch {batch}, float32",
                ours=ours, reference=reference, unit="s", ratio=ratio, aim="<= 2.6")


# ----------------------------------------------------------------------------- learning from labels

def short_trial(args, data):
    """A trial of the fine-tuning protocol that trains on `data` and, where
    finetune.TrialRun.end_epoch is patched, is neither scored nor saved."""
    return finetune.Trial("bench", args, args, data, judge=None, watch=None, history=[],
                          results=[])


def do_nothing(*ignored, **named):
    pass


def tuning_rows(device):
    """Two steps of each script's own train(), on a store in memory."""
    size, classes, folder = sizes(device), 100, tempfile.gettempdir()
    batch, side = size.tuning_batch, common.store_side(size.size)
    images = torch.randint(0, 256, (2 * batch, 3, side, side), dtype=torch.uint8).to(device)
    labels = (torch.arange(2 * batch) % classes).to(device)
    names = [str(label) for label in range(classes)]
    data = common.Store(images, labels, torch.arange(2 * batch), names)
    backbone = common.build_backbone(size.arch, size.size <= 40).to(device)

    def two_steps(script, *flags):
        argv = f"--data petals --arch {size.arch} --image-size {size.size} --batch-size {batch} "
        argv += f"--epochs 1 --lr 1e-4 --device {device} --precision {size.precision}"
        args = script.parser().parse_args([*argv.split(), "--out", f"{folder}/bench", *flags])
        return lambda: script.train(short_trial(args, data))

    def coin_steps():
        projector = coin.make_projector(backbone.num_features, 256).to(device)
        optimizer = common.make_optimizer("sgd", [backbone, projector], 1e-4, 5e-4)
        for x, y in common.Batches(data, batch):
            with common.autocast(device, size.precision):
                z = projector(backbone(common.augment(x, size.size, crop=(0.5, 1))))
            loss = coin.supcon(z, y, 0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    works = [("core_tuning", two_steps(core_tuning), "<= 1.15"),
             ("bi_tuning", two_steps(bi_tuning), "<= 1.45"),
             ("coin", coin_steps, "<= 1.05"),
             ("finetune --eta", two_steps(finetune, "--eta", "0.1"), "<= 1.05")]
    plain, rows = two_steps(finetune), []
    setting = f"{size.arch}, {size.size} px, batch {batch}, {classes} classes, {size.precision}"
    # The same backbone for all, and no time spent on making it.
    with mock.patch.object(common, "start_backbone", lambda args, say=True: (backbone, None)), \
            mock.patch.object(finetune.TrialRun, "end_epoch", do_nothing), \
            mock.patch.object(coin, "say_positives", do_nothing):
        for name, work, aim in works:
            ours, reference, ratio = in_turn(work, plain, device, 7)
            rows.append(dict(row=f"{name} step", setting=setting, ours=ours / 2,
                             reference=reference / 2, unit="s", ratio=ratio, aim=aim))
    return rows


# ----------------------------------------------------------------------------------------- decoding

def save_photographs(folder, count):
    """JPEGs of smooth noise with detail of all sizes, the coarse the stronger, as photographs have
    it."""
    rng = torch.Generator().manual_seed(0)
    for i in range(count):
        noise = 0
        for cell in (64, 16, 4):
            coarse = torch.rand(1, 3, 375 // cell, 500 // cell, generator=rng) - 0.5
            noise = noise + cell ** 0.5 * F.interpolate(coarse, (375, 500), mode="bicubic")[0]
        pixels = (128 + 20 * noise).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        common.Image.fromarray(pixels).save(f"{folder}/{i}.jpg", quality=90)


def decode_row(device):
    """On one core: the threads that decode are held to this process's."""
    side, count = common.store_side(64), sizes(device).pictures // 2
    with tempfile.TemporaryDirectory() as folder:
        pictures = f"{folder}/pictures"
        os.makedirs(f"{pictures}/test/class")
        save_photographs(f"{pictures}/test/class", count)
        args = SimpleNamespace(data=pictures, root=folder, image_size=64)
        view = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
        plain = torchvision.datasets.ImageFolder(f"{pictures}/test", view)

        def ours():
            common.build_cache(common.cache_path(args, ["test"]), args, ["test"])
            shutil.rmtree(f"{folder}/cache")

        def reference():
            for i in range(count):
                plain[i]

        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            ours, reference, ratio = in_turn(ours, reference, "cpu", 5)
        finally:
            os.sched_setaffinity(0, cores)
    return dict(row="decode", setting=f"{count} JPEGs 500 x 375 -> {side} px, one core",
                ours=count / ours, reference=count / reference, unit="images/s", ratio=1 / ratio,
                aim=">= 1.5")


GROUPS = {"step": step_row, "lightly": lightly_row, "views": views_row, "hvp": hvp_row,
          "tuning": tuning_rows, "byol": byol_row, "decode": decode_row}


def main(argv=None):
    args = benches.parse_groups(benches.bare_parser(__doc__), argv, GROUPS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = benches.device_name(device)
    for group in args.groups:
        measured = GROUPS[group](device)
        if isinstance(measured, dict):
            measured = [measured]
        for row in measured:
            row["device"] = name
            for key in ("ours", "reference", "ratio"):
                row[key] = f"{row[key]:.4g}"
            print("  ".join(row[key] for key in FIELDS[1:]), flush=True)
            # At once, so that a run that is stopped loses nothing.
            path = benches.RESULTS / "speed.csv"
            benches.replace_rows([row], path, ("device", "row"), FIELDS)


if __name__ == "__main__":
    main()
