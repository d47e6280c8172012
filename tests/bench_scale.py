"""How a step's cost grows with batch, image side, processes, classes and store; and a store that is
larger than memory.

    python tests/bench_scale.py                 every group, 11 minutes on one slow CPU core; on the
                                                GPU where there is one
    python tests/bench_scale.py batch side      these groups only

Prints for each quantity the exponent e of "seconds = constant x quantity^e" and writes
tests/results/scale.csv and scale.png; groups that were not measured anew stay in the CSV. A step is
one of the scripts' own train(), from having a batch to having the next one; the first is left out,
the median of the others counts. On a CPU peak_mb is what the process grew by.
  batch      SimCLR by batch size, whole and with --chunk 128; and NT-Xent alone, forward + backward
  side       SimCLR by image side; and its two views alone
  processes  SimCLR by the number of processes that share one batch (gloo, or nccl with a GPU each),
             under torchrun
  classes    Bi-tuning and plain fine-tuning by the number of classes
  store      common.Batches alone and a SimCLR step by the number of images in a mapped file
  disk       SimCLR from a mapped file larger than the memory that the process may have (Linux): its
             private memory before and after, and what a step waits for its batch
"""
import contextlib
import ctypes
import gc
import io
import json
import os
import re
import subprocess
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

DATA = benches.ROOT / "data"  # the scripts' --root: /tmp may be memory
FIELDS = ("device", "quantity", "setting", "value", "seconds", "peak_mb", "anon_start_mb",
          "anon_end_mb", "wait")
UNITS = dict(batch="images per batch", side="image side, px", processes="processes",
             classes="classes", store="images in the file", disk="MB in the file")
BATCHES, CLASSES = [128, 256, 512, 1024, 2048, 4096], [10, 30, 100, 300, 1000]
SIDES = [32, 64, 96, 128, 160, 192, 224]
CPU = SimpleNamespace(
    arch="resnet10", side_arch="resnet10", size=32, batch=128, budget=3, batches=BATCHES,
    sides=SIDES, side_batch=16, classes=CLASSES, class_batch=48,
    stores=[1 << i for i in range(10, 17)], epoch=8192, disk_images=409_600, limit=1400,
    disk_steps=12)
GPU = SimpleNamespace(
    arch="resnet50", side_arch="resnet18", size=96, batch=512, budget=3, batches=BATCHES,
    sides=SIDES, side_batch=128, classes=CLASSES, class_batch=64,
    stores=[1 << i for i in range(10, 19)], epoch=8192, disk_images=400_000, limit=12_000,
    disk_steps=20)
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


def timed_batches(stamps, waits, steps, budget):
    """A class to put in the place of common.Batches. It notes when each batch was there and how
    long that took, and stops when enough was measured: after so many steps or, where that is None,
    after `budget` seconds; the first step counts for neither."""
    def enough():
        if steps is not None:
            return len(stamps) == steps + 2
        return len(stamps) > 2 and stamps[-1] - stamps[1] > budget

    class TimedBatches(common.Batches):
        def __iter__(self):
            asked = time.perf_counter()
            for batch in super().__iter__():
                waits.append(time.perf_counter() - asked)
                wait_for(batch[1])
                stamps.append(time.perf_counter())
                if enough():
                    return
                yield batch
                asked = time.perf_counter()

    return TimedBatches


def wait_for(tensor):
    if tensor.is_cuda:
        torch.cuda.synchronize()


def steps_of(script, flags, data, device, size, steps=None):
    """Median seconds of a step of the script's own train() on `data`, the peak of memory in MB, and
    the mean seconds that a step waited for its batch, which a busy machine changes less than the
    step. steps: as many; without, as fit into size.budget seconds."""
    stamps, waits = [], []
    timed = timed_batches(stamps, waits, steps, size.budget)
    flags = f"--epochs 1 --lr 1e-4 --device {device} --arch {size.arch} {flags}"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.multiple(
            common, Batches=timed, load_unlabeled=lambda args: data, load_probe=do_nothing,
            save_checkpoint=do_nothing))
        stack.enter_context(mock.patch.object(simclr, "draw", do_nothing))
        stack.enter_context(mock.patch.object(finetune.Run, "end_epoch", do_nothing))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        peak = stack.enter_context(peak_memory(device))
        args = script.parser().parse_args([*flags.split(), "--out", f"{folder}/x"])
        script.train(args if script is simclr else short_trial(args, data))
        spent = [after - before for before, after in zip(stamps[1:], stamps[2:])]
        return median(spent), peak(), sum(waits[1:]) / len(waits[1:])


def alone(work, device, budget=1):
    """Median seconds of work(), for `budget` seconds, after a call that does not count."""
    times = [seconds(work, device)]
    while len(times) < 2 or sum(times) < budget:
        times.append(seconds(work, device))
    return median(times[1:])


def noise(size, image_size, batch, device):
    """A Store of random pictures, each in it again and again: enough for any number of steps."""
    _, _, data = pretext(device, size.arch, image_size, batch)
    return again(data, 100)


def again(data, times):
    return replace(data, rows=data.rows.repeat(times), labels=data.labels.repeat(times))


@contextlib.contextmanager
def file_of(count, side):
    """Path of an .npy file with `count` random images, real bytes that have reached the disk."""
    there = DATA.exists()
    DATA.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=DATA) as folder:
            path, rng = f"{folder}/store.npy", np.random.default_rng(0)
            images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, side, side))
            for i in range(0, count, 8192):
                images[i:i + 8192] = rng.integers(0, 256, images[i:i + 8192].shape, np.uint8)
            images.flush()
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            del images
            yield path
    finally:
        if not there:
            DATA.rmdir()


def store_of(images, device):
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    return common.Store(images, labels, torch.arange(len(images)), ["none"])


# ------------------------------------------------------------------------------------------- groups

def batch_rows(device, size):
    rows = []
    for batch in size.batches:
        data = noise(size, size.size, batch, device)
        for setting, chunk in (("whole", 0), ("--chunk 128", 128)):
            flags = f"{SIMCLR} --image-size {size.size} --batch-size {batch} --chunk {chunk}"
            try:
                spent, peak, _ = steps_of(simclr, flags, data, device, size)
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
    size, rows = SimpleNamespace(**vars(size)), []
    size.arch = size.side_arch
    for side in size.sides:
        data = noise(size, side, size.side_batch, device)
        flags = f"{SIMCLR} --image-size {side} --batch-size {size.side_batch}"
        spent, peak, _ = steps_of(simclr, flags, data, device, size)
        rows.append(dict(setting="step", value=side, seconds=spent, peak_mb=peak))
        _, args, _ = pretext(device, size.arch, side, 4)
        x = data.images[:size.side_batch]
        spent = alone(lambda: simclr.make_views(x, args), device)
        rows.append(dict(setting="views alone", value=side, seconds=spent))
    return rows


def processes_rows(device, size):
    rows, most = [], 2 if device == "cpu" else torch.cuda.device_count()
    threads = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    for processes in (1, 2, 4, 8):
        if processes > most:
            break
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       f"--nproc-per-node={processes}", __file__, "one-of", device, f"{folder}/row"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=threads)
            rows.append(json.loads(Path(f"{folder}/row").read_text()))
    if most < 2:
        print("processes: this machine has one GPU, so there is nothing to compare")
    return rows


def one_of(device, path):
    """A process of torchrun's; they all take the same number of steps."""
    size = GPU if device == "cuda" else CPU
    flags = f"{SIMCLR} --image-size {size.size} --batch-size {size.batch}"
    data = noise(size, size.size, size.batch, device)
    spent, peak, _ = steps_of(simclr, flags, data, device, size, steps=12)
    if int(os.environ["RANK"]) == 0:
        processes = int(os.environ["WORLD_SIZE"])
        row = dict(setting="step", value=processes, seconds=spent, peak_mb=peak)
        Path(path).write_text(json.dumps(row))


def classes_rows(device, size):
    rows = []
    works = [("finetune", finetune, ""), ("bi_tuning", bi_tuning, "--random-queue")]  # full queues
    for classes in size.classes:
        data = noise(size, size.size, size.class_batch, device)
        names = [str(label) for label in range(classes)]
        data = replace(data, labels=(data.rows % classes).to(device), classes=names)
        for setting, script, more in works:
            flags = f"--image-size {size.size} --batch-size {size.class_batch} {more}"
            spent, peak, _ = steps_of(script, flags, data, device, size)
            rows.append(dict(setting=setting, value=classes, seconds=spent, peak_mb=peak))
    return rows


def drain(data, batch, most):
    """Seconds a batch of common.Batches alone, by `most` batches in random order, the first left
    out."""
    stamps = []
    for _, y in common.Batches(data, batch, whole_only=True):
        wait_for(y)
        stamps.append(time.perf_counter())
        if len(stamps) > most:
            break
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def store_rows(device, size):
    rows, flags = [], f"{SIMCLR} --image-size {size.size} --batch-size {size.batch}"
    with file_of(size.stores[-1], common.store_side(size.size)) as path:
        for count in size.stores:
            data = store_of(common.map_images(path)[:count], device)
            data = again(data, common.steps_of(size.epoch, count))
            fed = median(drain(data, size.batch, 60) for _ in range(5))
            rows.append(dict(setting="common.batches alone", value=count, seconds=fed))
            spent, peak, _ = steps_of(simclr, flags, data, device, size)
            rows.append(dict(setting="step", value=count, seconds=spent, peak_mb=peak))
    return rows


# --------------------------------------------------------------------------------------------- disk

def disk_rows(device, size):
    if not Path("/proc/self/status").exists():
        print("disk: needs Linux")
        return []
    with file_of(size.disk_images, common.store_side(size.size)) as path:
        command = [sys.executable, __file__, "limited", device, path]
        apart = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *lines, rows = apart.stdout.splitlines()
    print(*lines, sep="\n", flush=True)
    return json.loads(rows)


def limited(device, path):
    """In a process whose private memory is limited to less than the file."""
    import resource  # Linux and macOS have it
    size = GPU if device == "cuda" else CPU
    resource.setrlimit(resource.RLIMIT_DATA, (size.limit << 20, size.limit << 20))
    try:
        np.load(path)
        print("disk: np.load succeeds, so that the limit does not hold")
    except MemoryError:
        print(f"disk: np.load of the whole file does not fit into {size.limit} MB")
    print(json.dumps(rows_from_disk(device, size, path)))


def rows_from_disk(device, size, path):
    """Steps from the mapped file, and the process's private memory before and after them."""
    data = store_of(common.map_images(path), device)
    flags = f"{SIMCLR} --image-size {size.size} --batch-size {size.batch}"
    steps_of(simclr, flags, data, device, size, steps=1)  # what the first step allocates stays
    start = status("RssAnon")
    spent, _, wait = steps_of(simclr, flags, data, device, size, steps=size.disk_steps)
    return [dict(setting="step, mapped", value=os.path.getsize(path) / 2**20, seconds=spent,
                 anon_start_mb=start, anon_end_mb=status("RssAnon"), wait=wait)]


GROUPS = {"batch": batch_rows, "side": side_rows, "processes": processes_rows,
          "classes": classes_rows, "store": store_rows, "disk": disk_rows}


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
        if row.get(column) in (None, "") or row["quantity"] == "disk":
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
    for row in rows:
        if row["quantity"] == "disk":
            number = {key: float(row[key]) for key in ("anon_start_mb", "anon_end_mb", "wait")}
            print("disk: private memory {anon_start_mb:.0f} -> {anon_end_mb:.0f} MB; a step waits "
                  "{wait:.4f} s for its batch".format(**number))


PANELS = [("batch", "seconds", "s"), ("batch", "peak_mb", "MB at the peak"),
          ("side", "seconds", "s"), ("side", "peak_mb", "MB at the peak"),
          ("processes", "seconds", "s"), ("classes", "seconds", "s"), ("store", "seconds", "s")]


def draw(rows, name):
    figure, axes = plt.subplots(2, 4, figsize=(20, 9))
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
    axes[1, 3].remove()
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
    if sys.argv[1:2] == ["one-of"]:
        one_of(*sys.argv[2:])
    elif sys.argv[1:2] == ["limited"]:
        limited(*sys.argv[2:])
    else:
        main(sys.argv[1:])
