"""How fast the slice is, each figure a ratio to something timed in the same process on the same machine, in turn with it.

    python tests/bench_speed.py                 every row, about 6 minutes on two CPU cores; on the GPU where there is one

Prints the table and writes tests/results/speed.csv; rows measured on another device stay in that file.
  step     images/s of the SimCLR step with data and augmentation / images/s of forward + backward on one fixed tensor
  views    two views a picture, uint8 128 -> 96 px / torchvision.transforms.v2 an image at a time, one DataLoader worker a core
  hvp      one Hessian-vector product on a kept graph / forward + backward of the same batch
  products the 8 x 5 products of a BiSSL alternation, graph built once / built anew for each product
"""
import copy
import csv
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torchvision.transforms import v2

import bissl
import common
import simclr

RESULTS = Path(__file__).resolve().parent / "results" / "speed.csv"
FIELDS = ("device", "row", "setting", "ours", "reference", "unit", "ratio", "aim")
VIEWS = dict(crop=(0.2, 1), jitter=(0.4, 0.4, 0.2, 0.1), grey_p=0.2, blur_p=0.5)


def seconds(work, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(ours, reference, device, rounds):
    """Median seconds of each, run alternately after one round that does not count, and the median of the rounds' ratios."""
    times = [(seconds(ours, device), seconds(reference, device)) for _ in range(rounds + 1)][1:]
    return *(median(column) for column in zip(*times)), median(a / b for a, b in times)


def pretext(device, arch, image_size, batch_size):
    config = dict(precision="float32", hidden=256, dim=128, temperature=0.2, crop=0.2, jitter=VIEWS["jitter"], grey=0.2, blur=0.5, image_size=image_size)
    model = simclr.make_model(common.build_backbone(arch, image_size <= 40), config).to(device)
    side = common.store_side(image_size)
    images = torch.randint(0, 256, (2 * batch_size, 3, side, side), dtype=torch.uint8).to(device)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    return model, config, common.Store(images, labels, torch.arange(len(images)), ["none"])


def step_row(device):
    arch, size, batch, precision = ("resnet50", 96, 1024, "bfloat16") if device == "cuda" else ("resnet18", 64, 128, "float32")
    model, config, data = pretext(device, arch, size, batch)
    optimizer, config["precision"] = common.make_optimizer("adamw", [model], 1e-3, 1e-4), precision

    def descend(views):
        loss = simclr.loss(model, views, config)
        optimizer.zero_grad()
        loss.backward()

    def step():
        for x, _ in common.batches(data, batch, whole_only=True):
            descend(simclr.make_views(x, config))
            optimizer.step()

    fixed = [torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    ours, reference, ratio = in_turn(step, lambda: [descend(fixed) for _ in range(2)], device, 5)
    images = 2 * batch
    return dict(row="step", setting=f"{arch}, {size} px, batch {batch}, {precision}", ours=images / ours,
                reference=images / reference, unit="images/s", ratio=1 / ratio, aim=">= 0.97" if device == "cuda" else ">= 0.90")


class TwoViews(torch.utils.data.Dataset):
    """The usual way: a picture at a time, each operation by torchvision.transforms.v2."""

    def __init__(self, images):
        self.images = images
        b, c, s, h = VIEWS["jitter"]
        self.view = v2.Compose([
            v2.RandomResizedCrop(96, scale=VIEWS["crop"], antialias=True), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(b, c, s, h)], p=0.8), v2.RandomGrayscale(VIEWS["grey_p"]),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2))], p=VIEWS["blur_p"]),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(common.MEAN, common.STD)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.view(self.images[i]), self.view(self.images[i])


def views_row(device):
    images = torch.randint(0, 256, (1024, 3, 128, 128), dtype=torch.uint8)
    here = images.to(device)
    loader = torch.utils.data.DataLoader(TwoViews(images), 256, num_workers=os.cpu_count(), persistent_workers=True)

    def ours():
        for x in here.split(256):
            for _ in range(2):
                common.augment(x, 96, **VIEWS)

    def reference():
        for views in loader:
            [view.to(device) for view in views]

    ours, reference, ratio = in_turn(ours, reference, device, 3)
    return dict(row="views", setting="two views, uint8 128 px -> 96 px, batch 256", ours=1024 / ours, reference=1024 / reference,
                unit="pictures/s", ratio=1 / ratio, aim=">= 3")


def hessian_rows(device):
    arch, size, batch = ("resnet50", 96, 256) if device == "cuda" else ("resnet18", 64, 32)
    model, config, data = pretext(device, arch, size, batch)
    planar = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # the layout that bissl.py takes products in
    views = simclr.make_views(data.images[:batch], config)  # channels_last, the faster layout for forward + backward
    planar_views, theta = [view.contiguous() for view in views], tuple(planar.backbone.parameters())
    vector = tuple(torch.randn_like(p) for p in theta)
    first_order = lambda: torch.autograd.grad(simclr.loss(planar, planar_views, config), theta, create_graph=True)
    product = lambda gradient: bissl.damped_hessian(gradient, theta, 100)(vector)
    kept = first_order()
    plain = lambda: torch.autograd.grad(simclr.loss(model, views, config), tuple(model.backbone.parameters()))
    setting = f"{arch}, {size} px, batch {batch}, float32"
    one = in_turn(lambda: product(kept), plain, device, 7)

    def once():
        gradient = first_order()
        for _ in range(40):
            product(gradient)

    forty = in_turn(once, lambda: [product(first_order()) for _ in range(40)], device, 1)
    return [dict(row=row, setting=setting, ours=ours, reference=reference, unit="s", ratio=ratio, aim=aim)
            for row, (ours, reference, ratio), aim in (("hvp", one, "<= 2.6"), ("products", forty, "<= 0.75"))]


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    rows = [dict(row, device=name) for row in (step_row(device), views_row(device), *hessian_rows(device))]
    for row in rows:
        for key in ("ours", "reference", "ratio"):
            row[key] = f"{row[key]:.4g}"
        print("  ".join(f"{row[key]}" for key in FIELDS[1:]), flush=True)
    others = []
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            others = [row for row in csv.DictReader(file) if row["device"] != name]
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(others + rows)


if __name__ == "__main__":
    main()
