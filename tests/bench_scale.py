"""How a step's cost grows with the batch, the image side and the number of classes.

    python tests/bench_scale.py                 every group, 8 minutes on one slow CPU core; on the
                                                GPU where there is one
    python tests/bench_scale.py batch side      these groups only

Prints for each quantity the exponent e of "seconds = constant x quantity^e" and writes
tests/results/scale.csv and scale.png; groups that were not measured anew stay in the CSV. A step is
one of the scripts' own train(), from having a batch to having the next one; the first is left out,
the median of the others counts. On a CPU peak_mb is what the process grew by.
  batch      SimCLR by batch size, whole and with --chunk 128; and NT-Xent alone, forward + backward
  side       SimCLR by image side; and its two views alone
  classes    Bi-tuning and plain fine-tuning by the number of classes
"""
import contextlib
import ctypes
import gc
import io
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch

import benches
import bi_tuning
import common
import finetune
import simclr
from bench_speed import VIEWS, do_nothing, pretext, seconds, short_trial

FIELDS = ("device", "quantity", "setting", "value", "seconds", "peak_mb")
UNITS = dict(batch="images per batch", side="image side, px", classes="classes")
BATCHES, CLASSES = [128, 256, 512, 1024, 2048, 4096], [10, 30, 100, 300, 1000]
SIDES = [64, 96, 128, 160, 192, 224]  # up to 40 px build_backbone() has a smaller stem
BUDGET = 3  # seconds of steps, at least
CPU = SimpleNamespace(arch="resnet10", side_arch="resnet10", size=32, side_batch=16, class_batch=48)
GPU = SimpleNamespace(arch="resnet50", side_arch="resnet18", size=96, side_batch=128,
                      class_batch=64)
SIMCLR = (f"--crop {VIEWS['crop'][0]} --jitter {' '.join(map(str, VIEWS['jitter']))} "
          f"--blur {VIEWS['blur_p']}")


# ---------------------------------------------------------------------------------------- measuring

def status(name):
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", lines, re.M)[1]) / 1024


@contextlib.contextmanager
def peak_memory(device):
    """Gives a function that says by how many MB the peak of memory exceeded what was held at the
    start; None where unknown."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield lambda: round((torch.cuda.max_memory_allocated() - start) / 2**20)
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed goes back
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        start = status("VmRSS")
        yield lambda: round(status("VmHWM") - start)
    else:
        yield lambda: None


def timed_batches(stamps):
    """A class to put in the place of common.Batches. It notes when each batch was there, and stops
    BUDGET seconds after the first step."""
    class TimedBatches(common.Batches):
        def __iter__(self):
            for batch in super().__iter__():
                if batch[1].is_cuda:
                    torch.cuda.synchronize()
                stamps.append(time.perf_counter())
                if len(stamps) > 2 and stamps[-1] - stamps[1] > BUDGET:
                    return
                yield batch

    return TimedBatches


def steps_of(script, flags, data, device, arch):
    """Median seconds of a step of the script's own train() on `data`, and the peak of memory in
    MB."""
    stamps = []
    flags = f"--epochs 1 --lr 1e-4 --device {device} --arch {arch} {flags}"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.multiple(
            common, Batches=timed_batches(stamps), load_unlabeled=lambda args: data,
            load_probe=do_nothing, save_checkpoint=do_nothing))
        stack.enter_context(mock.patch.object(simclr, "draw", do_nothing))
        stack.enter_context(mock.patch.object(finetune.TrialRun, "end_epoch", do_nothing))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        peak = stack.enter_context(peak_memory(device))
        args = script.parser().parse_args([*flags.split(), "--out", f"{folder}/x"])
        script.train(args if script is simclr else short_trial(args, data))
        return median(np.diff(stamps[1:])), peak()


def alone(work, device, budget=1):
    """Median seconds of work(), for `budget` seconds, after a call that does not count."""
    times = [seconds(work, device)]
    while len(times) < 2 or sum(times) < budget:
        times.append(seconds(work, device))
    return median(times[1:])


def noise(arch, image_size, batch, device):
    """A Store of random pictures, each in it again and again: enough for any number of steps."""
    _, _, data = pretext(device, arch, image_size, batch)
    return replace(data, rows=data.rows.repeat(100), labels=data.labels.repeat(100))


# ------------------------------------------------------------------------------------------- groups

def batch_rows(device, size):
    rows = []
    for batch in BATCHES:
        data = noise(size.arch, size.size, batch, device)
        for setting, chunk in (("whole", 0), ("--chunk 128", 128)):
            flags = f"{SIMCLR} --image-size {size.size} --batch-size {batch} --chunk {chunk}"
            try:
                spent, peak = steps_of(simclr, flags, data, device, size.arch)
            except torch.OutOfMemoryError:
                print(f"batch {batch}, {setting}: does not fit", flush=True)
                continue
            rows.append(dict(setting=setting, value=batch, seconds=spent, peak_mb=peak))
        del data
        rows.append(dict(setting="NT-Xent alone", value=batch, **nt_xent_alone(batch, device)))
    return rows


def nt_xent_alone(batch, device):
    z1 = torch.randn(batch, 128, device=device, requires_grad=True)
    z2 = torch.randn(batch, 128, device=device, requires_grad=True)

    def forward_and_backward():
        torch.autograd.grad(simclr.nt_xent(z1, z2, 0.2), (z1, z2))

    with peak_memory(device) as peak:
        return dict(seconds=alone(forward_and_backward, device), peak_mb=peak())


def side_rows(device, size):
    rows = []
    for side in SIDES:
        data = noise(size.side_arch, side, size.side_batch, device)
        flags = f"{SIMCLR} --image-size {side} --batch-size {size.side_batch}"
        spent, peak = steps_of(simclr, flags, data, device, size.side_arch)
        rows.append(dict(setting="step", value=side, seconds=spent, peak_mb=peak))
        _, args, _ = pretext(device, size.side_arch, side, 4)
        x = data.images[:size.side_batch]
        spent = alone(lambda: simclr.make_views(x, args), device)
        rows.append(dict(setting="views alone", value=side, seconds=spent))
    return rows


def classes_rows(device, size):
    rows = []
    works = [("finetune", finetune, ""), ("bi_tuning", bi_tuning, "--random-queue")]  # full queues
    for classes in CLASSES:
        data = noise(size.arch, size.size, size.class_batch, device)
        names = [str(label) for label in range(classes)]
        data = replace(data, labels=(data.rows % classes).to(device), classes=names)
        for setting, script, more in works:
            flags = f"--image-size {size.size} --batch-size {size.class_batch} {more}"
            spent, peak = steps_of(script, flags, data, device, size.arch)
            rows.append(dict(setting=setting, value=classes, seconds=spent, peak_mb=peak))
    return rows


GROUPS = {"batch": batch_rows, "side": side_rows, "classes": classes_rows}


# ------------------------------------------------------------------------------------ what came out

def exponent(points):
    """e of y = constant x^e, by least squares of log y on log x."""
    x, y = np.log(np.array(points, float)).T
    return np.polyfit(x, y, 1)[0]


def draw(rows, name):
    """Seconds by quantity, a panel each, with the exponents; printed, too."""
    figure, axes = plt.subplots(1, len(UNITS), figsize=(16, 4.5))
    for axis, (quantity, unit) in zip(axes, UNITS.items()):
        lines = {}
        for row in rows:
            if row["quantity"] == quantity:
                point = float(row["value"]), float(row["seconds"])
                lines.setdefault(row["setting"], []).append(point)
        for setting, points in lines.items():
            said = f"{setting}: exponent {exponent(points):.2f}"
            print(f"{quantity}, {said}")
            axis.loglog(*zip(*points), "o-", label=said)
        axis.set(xlabel=unit, ylabel="seconds per step", title=quantity)
        axis.set_aspect("equal", adjustable="datalim")  # a slope of 1 looks like one
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(name)
    benches.save_figure(figure, benches.RESULTS / "scale.png")


def main(argv=None):
    args = benches.parse_groups(benches.bare_parser(__doc__), argv, GROUPS)
    device, path = "cuda" if torch.cuda.is_available() else "cpu", benches.RESULTS / "scale.csv"
    name, table = benches.device_name(device), []
    for group in args.groups:
        rows = []
        for row in GROUPS[group](device, GPU if device == "cuda" else CPU):
            row.update(device=name, quantity=group, seconds=f"{row['seconds']:.5g}")
            rows.append(row)
            print("  ".join(str(row.get(key, "")) for key in FIELDS[1:]), flush=True)
        table = benches.replace_rows(rows, path, ("device", "quantity"), FIELDS)
    draw([row for row in table if row["device"] == name], name)


if __name__ == "__main__":
    main()
