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
import sys
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
SIDES = [32, 64, 96, 128, 160, 192, 224]
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
        yield lambda: (torch.cuda.max_memory_allocated() - start) / 2**20
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed goes back
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        start = status("VmRSS")
        yield lambda: status("VmHWM") - start
    else:
        yield lambda: None


def timed_batches(stamps):
    """A class to put in the place of common.Batches. It notes when each batch was there, and stops
    after BUDGET seconds, of which the first step is none."""
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
        stack.enter_context(mock.patch.object(finetune.Run, "end_epoch", do_nothing))
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

def line_through(points):
    """Least squares of log y on log x: exponent, its standard error (nan for two points), and y as
    a function of x."""
    x, y = np.log(np.array(points, float)).T
    e, constant = np.polyfit(x, y, 1)
    rest, error = ((y - e * x - constant) ** 2).sum(), np.nan
    if len(x) > 2:
        error = (rest / (len(x) - 2) / ((x - x.mean()) ** 2).sum()) ** 0.5
    return e, error, lambda x: np.exp(constant) * np.asarray(x, float) ** e


def fitted_points(quantity, setting, column, points):
    """The points that one power can describe: not where another stem or a fixed cost decides."""
    if quantity == "side":
        return [p for p in points if p[0] > 40]  # up to 40 px the stem is another one
    if setting == "NT-Xent alone" or (quantity == "batch" and column == "peak_mb"):
        return [p for p in points if p[0] >= 512]
    return points


def curves(rows, column):
    """{(quantity, setting): [(value, rows' column), ...]}"""
    found, several = {}, {}
    for row in rows:
        if row.get(column) in (None, ""):
            continue
        point = float(row["value"]), float(row[column])
        found.setdefault((row["quantity"], row["setting"]), []).append(point)
    for key, points in found.items():
        if len(points) > 1:
            several[key] = sorted(points)
    return several


def summarise(rows):
    for column, unit in (("seconds", "s"), ("peak_mb", "MB")):
        for (quantity, setting), points in curves(rows, column).items():
            used = fitted_points(quantity, setting, column, points)
            if len(used) > 1 and (column == "seconds" or quantity in ("batch", "side")):
                e, error, _ = line_through(used)
                over = ", ".join(f"{x:g}" for x, _ in used)
                print(f"{quantity}, {setting}: {unit} go with exponent {e:.2f} +- {error:.2f} over "
                      f"{over}")


PANELS = [("batch", "seconds", "s"), ("batch", "peak_mb", "MB at the peak"),
          ("side", "seconds", "s"), ("side", "peak_mb", "MB at the peak"),
          ("classes", "seconds", "s")]


def draw(rows, name):
    figure, axes = plt.subplots(1, 5, figsize=(24, 4.5))
    for axis, (quantity, column, unit) in zip(axes.flat, PANELS):
        draw_lines(axis, quantity, column, curves(rows, column))
        axis.set(xlabel=UNITS[quantity], ylabel=unit, title=f"{quantity}: exponents of the lines")
        if axis.lines:  # whole decades, so that no slope looks larger than it is
            low, high = axis.get_ylim()
            axis.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
        ticks = sorted({float(row["value"]) for row in rows if row["quantity"] == quantity})
        if len(ticks) > 6:
            ticks = ticks[::2]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.suptitle(name)
    figure.tight_layout()
    benches.save_figure(figure, benches.RESULTS / "scale.png")


def draw_lines(axis, quantity, column, found):
    for (other, setting), points in found.items():
        if other != quantity:
            continue
        dots, = axis.loglog(*zip(*points), "o")
        used = fitted_points(quantity, setting, column, points)
        if len(used) > 1:
            e, _, at = line_through(used)
            x = [point[0] for point in used]
            axis.loglog(x, at(x), color=dots.get_color(), label=f"{setting}: {e:.2f}")


def as_text(row):
    """A row as it stands in the CSV."""
    text = {}
    for key, value in row.items():
        text[key] = f"{value:.5g}" if isinstance(value, float) else value
    return text


def main(groups):
    unknown = set(groups) - GROUPS.keys()
    if unknown:
        raise SystemExit(f"no groups {', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
    device, path = "cuda" if torch.cuda.is_available() else "cpu", benches.RESULTS / "scale.csv"
    name, table = benches.device_name(device), benches.read_table(path)
    for group in groups or GROUPS:
        started, rows = time.perf_counter(), []
        for row in GROUPS[group](device, GPU if device == "cuda" else CPU):
            rows.append(as_text(dict(row, device=name, quantity=group)))
            shown = [str(rows[-1][key]) for key in FIELDS[1:] if rows[-1].get(key) is not None]
            print("  ".join(shown), flush=True)
        print(f"{group}: {time.perf_counter() - started:.0f} s", flush=True)
        if rows:
            table = benches.replace_rows(rows, path, ("device", "quantity"), FIELDS)
    here = [row for row in table if row["device"] == name]
    summarise(here)
    draw(here, name)


if __name__ == "__main__":
    main(sys.argv[1:])
