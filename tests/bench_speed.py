"""How fast the scripts are, each figure a ratio to something timed in the same process on the same machine, in turn with it.

    python tests/bench_speed.py                 every row, about 6 minutes on two fast CPU cores; on the GPU where there is one
    python tests/bench_speed.py bi byol         these groups of rows only

Prints the table and writes tests/results/speed.csv; rows that were not measured anew stay in that file.
  step     images/s of the SimCLR step with data and augmentation / images/s of forward + backward on one fixed tensor
  views    two views a picture, uint8 128 -> 96 px / torchvision.transforms.v2 an image at a time, one DataLoader worker a core
  hvp      one Hessian-vector product on a kept graph / forward + backward of the same batch
  products the 8 x 5 products of a BiSSL alternation, graph built once / built anew for each product
  bi       Bi-tuning's two losses and the enqueue, forward + backward / a loop over the samples written from the equations
  tuning   a training step of each method that learns from labels / of plain fine-tuning, same batch and backbone
  byol     a training step of BYOL / of SimCLR
  decode   images/s of building the cache from JPEGs / of torchvision's ImageFolder with Resize and CenterCrop, one core each
"""
import copy
import csv
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2

import bi_tuning
import bissl
import byol
import coin
import common
import core_tuning
import finetune
import simclr

RESULTS = Path(__file__).resolve().parent / "results" / "speed.csv"
FIELDS = ("device", "row", "setting", "ours", "reference", "unit", "ratio", "aim")
VIEWS = dict(crop=(0.2, 1), jitter=(0.4, 0.4, 0.2, 0.1), grey_p=0.2, blur_p=0.5)


def cpu_name():
    """"x86_64 CPU" and what its vector unit is, which decides the figures more than its clock."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    widest = next((unit for unit in ("avx512_bf16", "avx512f", "avx2") if unit in flags), "")
    return f"{platform.machine()} CPU {widest}".strip()


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"


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


def slow_bi_losses(h, z_q, z_k, weight, bias, y, queue_h, queue_z, tau):
    """Both losses of Bi-tuning a sample at a time: KL between the uniform target and the softmax over all candidates."""
    total = 0
    for i in range(len(y)):
        c = int(y[i])
        w = F.normalize(torch.cat([weight[c], bias[c:c + 1]]).detach(), dim=0)
        for anchor, own, queue in ((w, F.normalize(torch.cat([h[i], h.new_ones(1)]), dim=0), queue_h),
                                   (F.normalize(z_q[i], dim=0), F.normalize(z_k[i], dim=0), queue_z)):
            logits = torch.cat([(own * anchor).sum()[None], queue.flatten(0, 1) @ anchor])  # the image itself, then C x K keys
            size = queue.shape[1]
            target = torch.zeros(len(logits), device=h.device)
            target[0] = 1 / (size + 1)
            target[1 + c * size:1 + (c + 1) * size] = 1 / (size + 1)
            log_p = (logits / tau).log_softmax(0)
            total = total + F.kl_div(log_p, target, reduction="sum")
    return total / len(y)


def bi_row(device):
    B, C, K, D, d, tau = 48, 200, 40, 512, 128, 0.07
    h, z_q = (torch.randn(B, width, device=device, requires_grad=True) for width in (D, d))
    h_k, z_k, y = torch.randn(B, D, device=device), torch.randn(B, d, device=device), torch.randint(C, (B,), device=device)
    weight, bias = torch.randn(C, D, device=device), torch.randn(C, device=device)
    queues = [bi_tuning.ClassQueue(C, K, width, random=True).to(device) for width in (D + 1, d)]
    rings = [queue.keys.clone() for queue in queues]
    keys = bi_tuning.unit_with_one(h_k), F.normalize(z_k, dim=1)
    value = {}

    def ours():
        queue_h, queue_z = queues
        loss = bi_tuning.contrastive_cross_entropy(h, weight, bias, y, queue_h.keys, tau, queue_h.filled()) \
            + bi_tuning.categorical_contrastive(z_q, z_k, y, queue_z.keys, tau, queue_z.filled())
        loss.backward()
        queue_h.enqueue(keys[0], y)
        queue_z.enqueue(keys[1], y)
        value["ours"] = loss.item()

    def reference():
        loss = slow_bi_losses(h, z_q, z_k, weight, bias, y, *rings, tau)
        loss.backward()
        for ring, new in zip(rings, keys):
            for key, label in zip(new, y.tolist()):  # the oldest first
                ring[label] = torch.cat([ring[label, 1:], key[None]])
        value["reference"] = loss.item()

    ours, reference, ratio = in_turn(ours, reference, device, 15)
    assert abs(value["ours"] - value["reference"]) < 1e-3 * abs(value["reference"])  # the same work was done
    return dict(row="bi losses", setting=f"B {B}, C {C}, K {K}, D {D}, d {d}, losses + enqueue, forward + backward", ours=ours,
                reference=reference, unit="s", ratio=ratio, aim="<= 0.2")


def tuning_rows(device):
    """Two steps of each script's own train(), on a store in memory."""
    arch, size, batch, precision = ("resnet50", 96, 256, "bfloat16") if device == "cuda" else ("resnet18", 64, 128, "float32")
    classes, side = 100, common.store_side(size)
    images = torch.randint(0, 256, (2 * batch, 3, side, side), dtype=torch.uint8).to(device)
    labels = (torch.arange(2 * batch) % classes).to(device)
    data = common.Store(images, labels, torch.arange(2 * batch), [str(label) for label in range(classes)])
    backbone = common.build_backbone(arch, size <= 40).to(device)

    folder = tempfile.gettempdir()

    def two_steps(script, *flags):
        argv = ["--data", "petals", "--arch", arch, "--image-size", str(size), "--batch-size", str(batch), "--epochs", "1", "--lr", "1e-4",
                "--device", device, "--precision", precision, "--out", f"{folder}/x", *flags]
        args = script.parser().parse_args(argv)
        run = SimpleNamespace(args=args, data=data, results=[1], start=lambda *ignored: 0, finish_epoch=lambda *ignored: True)
        return lambda: script.train(run)

    def coin_steps():
        projector = coin.make_projector(backbone.num_features, 256).to(device)
        optimizer = common.make_optimizer("sgd", [backbone, projector], 1e-4, 5e-4)
        for x, y in common.batches(data, batch):
            with common.autocast(device, precision):
                z = projector(backbone(common.augment(x, size, crop=(0.5, 1))))
            loss = coin.supcon(z, y, 0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    plain, start_backbone = two_steps(finetune), common.start_backbone
    common.start_backbone = lambda args, say=True: (backbone, None)  # the same one for all, and no time spent on making it
    rows = []
    for name, work, aim in (("core_tuning", two_steps(core_tuning), "<= 1.15"), ("bi_tuning", two_steps(bi_tuning), "<= 1.45"),
                            ("coin", coin_steps, "<= 1.05"), ("finetune --eta", two_steps(finetune, "--eta", "0.1"), "<= 1.05")):
        ours, reference, ratio = in_turn(work, plain, device, 7)
        rows.append(dict(row=f"{name} step", setting=f"{arch}, {size} px, batch {batch}, {classes} classes, {precision}",
                         ours=ours / 2, reference=reference / 2, unit="s", ratio=ratio, aim=aim))
    common.start_backbone = start_backbone
    return rows


def byol_row(device):
    arch, size, batch, precision = ("resnet50", 96, 1024, "bfloat16") if device == "cuda" else ("resnet18", 64, 128, "float32")
    model, config, data = pretext(device, arch, size, batch)
    config["precision"] = precision
    config_byol = dict(config, hidden=512, blur=[1.0, 0.1], solarise=[0.0, 0.2])
    model_byol = byol.make_model(copy.deepcopy(model.backbone), config_byol).to(device)

    def steps(script, model, config):
        optimizer = common.make_optimizer("adamw", [model], 1e-3, 1e-4)

        def step():
            for x, _ in common.batches(data, batch, whole_only=True):
                loss = script.loss(model, script.make_views(x, config), config)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if script is byol:
                    model.update_target(0.99)
        return step

    ours, reference, ratio = in_turn(steps(byol, model_byol, config_byol), steps(simclr, model, config), device, 5)
    return dict(row="byol step", setting=f"{arch}, {size} px, batch {batch}, {precision}, against simclr", ours=ours / 2,
                reference=reference / 2, unit="s", ratio=ratio, aim="<= 1.45")


def decoding(device):
    """On one core: the threads that decode are held to this process's."""
    side, count = common.store_side(64), 2 * common.DECODE_CHUNK
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/pictures/test/class")
        rough = torch.Generator().manual_seed(0)
        for i in range(count):  # smooth noise: detail of all sizes, the coarse the stronger, as in photographs
            coarse = [(cell, torch.rand(1, 3, 375 // cell, 500 // cell, generator=rough) - 0.5) for cell in (64, 16, 4)]
            noise = sum(cell ** 0.5 * F.interpolate(x, (375, 500), mode="bicubic")[0] for cell, x in coarse)
            image = (128 + 20 * noise).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            common.Image.fromarray(image).save(f"{folder}/pictures/test/class/{i}.jpg", quality=90)
        plain = torchvision.datasets.ImageFolder(
            f"{folder}/pictures/test", v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()]))

        def ours():
            common.decode(SimpleNamespace(data=f"{folder}/pictures", root=folder, image_size=64), ["test"])
            shutil.rmtree(f"{folder}/cache")

        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            ours, reference, ratio = in_turn(ours, lambda: [plain[i] for i in range(count)], "cpu", 5)
        finally:
            os.sched_setaffinity(0, cores)
    return dict(row="decode", setting=f"{count} JPEGs 500 x 375 -> {side} px, one core", ours=count / ours,
                reference=count / reference, unit="images/s", ratio=1 / ratio, aim=">= 1.5")


GROUPS = {"step": step_row, "views": views_row, "hvp": hessian_rows, "bi": bi_row, "tuning": tuning_rows, "byol": byol_row,
          "decode": decoding}


def main(groups):
    if unknown := set(groups) - GROUPS.keys():
        raise SystemExit(f"no rows {', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(device)
    measured = [GROUPS[group](device) for group in groups or GROUPS]
    rows = [dict(row, device=name) for part in measured for row in (part if isinstance(part, list) else [part])]
    for row in rows:
        for key in ("ours", "reference", "ratio"):
            row[key] = f"{row[key]:.4g}"
        print("  ".join(f"{row[key]}" for key in FIELDS[1:]), flush=True)
    others = []
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            new = {(row["device"], row["row"]) for row in rows}
            others = [row for row in csv.DictReader(file) if (row["device"], row["row"]) not in new]
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(others + rows)


if __name__ == "__main__":
    main(sys.argv[1:])
