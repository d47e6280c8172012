"""How a step's cost grows with batch, image side, processes, classes and store; and a store that is larger than memory.

    python tests/bench_scale.py                 every group, 11 minutes on one slow CPU core; on the GPU where there is one
    python tests/bench_scale.py batch side      these groups only

Prints for each quantity the exponent e of "seconds = constant x quantity^e" and writes tests/results/scale.csv and scale.png;
groups that were not measured anew stay in the CSV. A step is one of the scripts' own train(), from having a batch to having the
next one; the first is left out, the median of the others counts. On a CPU peak_mb is what the process grew by.
  batch      SimCLR by batch size, whole and with --chunk 128; and NT-Xent alone, forward + backward
  side       SimCLR by image side; and its two views alone
  processes  SimCLR by the number of processes that share one batch (gloo, or nccl with a GPU each), under torchrun
  classes    Bi-tuning and plain fine-tuning by the number of classes
  store      common.batches alone and a SimCLR step by the number of images in a mapped file
  disk       SimCLR from a mapped file larger than the memory that the process may have (Linux), against images in memory; the
             file in the page cache (warm), not in it at the start (cold), or, for single batches, never (more data than RAM)
"""
import contextlib
import csv
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

from bench_speed import VIEWS, device_name, pretext, seconds  # first: it puts the repository's root on the path
import bi_tuning
import common
import finetune
import simclr

RESULTS = Path(__file__).resolve().parent / "results"
DATA = Path(__file__).resolve().parent.parent / "data"  # the scripts' --root: /tmp may be memory
FIELDS = ("device", "quantity", "setting", "value", "seconds", "peak_mb", "ratio", "ratio_low", "ratio_high",
          "anon_start_mb", "anon_end_mb", "read_mb", "wait")
UNITS = dict(batch="images a batch", side="image side, px", processes="processes", classes="classes", store="images in the file",
             disk="MB in the file")
CPU = SimpleNamespace(
    arch="resnet10", size=32, batch=128, budget=3, batches=[128 << i for i in range(6)], sides=[32, 64, 96, 128, 160, 192, 224],
    side_batch=16, classes=[10, 30, 100, 300, 1000], class_batch=48, stores=[1 << i for i in range(10, 17)], disk_images=409_600,
    limit=1400, rounds=7, disk_steps=6)
GPU = SimpleNamespace(
    arch="resnet50", size=96, batch=512, budget=3, batches=[128 << i for i in range(6)], sides=[32, 64, 96, 128, 160, 192, 224],
    side_batch=128, classes=[10, 30, 100, 300, 1000], class_batch=64, stores=[1 << i for i in range(10, 19)], disk_images=400_000,
    limit=12_000, rounds=10, disk_steps=10)
SIMCLR = f"--crop {VIEWS['crop'][0]} --jitter {' '.join(map(str, VIEWS['jitter']))} --blur {VIEWS['blur_p']}"


# ---------------------------------------------------------------------------------------------------- measuring

def status(name):
    """A line of /proc/self/status, in MB."""
    return int(re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


@contextlib.contextmanager
def peak_memory(device):
    """Gives a function that says by how many MB the peak of memory exceeded what was held at the start; None where unknown."""
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


def steps_of(script, flags, data, device, size, steps=None, waits=None):
    """Median seconds of a step of the script's own train() on `data`, and the peak of memory in MB. steps: else size.budget.

    waits: a list that gets the seconds for which each step waited for its batch, which a busy machine changes less than the step.
    """
    stamps = []

    def timed(store, batch_size, **how):
        """common.batches, which stops when enough was measured."""
        feed = batches(data, batch_size, **how)
        while True:
            asked = time.perf_counter()
            batch = next(feed)
            waits is None or waits.append(time.perf_counter() - asked)
            torch.cuda.synchronize() if device == "cuda" else None
            stamps.append(time.perf_counter())
            if len(stamps) - 2 == steps or steps is None and len(stamps) > 2 and stamps[-1] - stamps[1] > size.budget:
                return
            yield batch

    batches, nothing = common.batches, lambda *ignored, **named: None
    patched = dict(batches=timed, load_unlabeled=lambda args: data, load_probe=nothing, save_checkpoint=nothing)
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(common, **patched), \
            mock.patch.object(simclr, "draw", nothing), contextlib.redirect_stdout(io.StringIO()), peak_memory(device) as peak:
        flags = f"--epochs 1 --lr 1e-4 --device {device} --out {folder}/x --arch {size.arch} {flags}"
        args = script.parser().parse_args(flags.split())
        script.train(args if script is simclr else SimpleNamespace(
            args=args, data=data, results=[1], start=lambda *ignored: 0, finish_epoch=lambda *ignored: True))
        return median(b - a for a, b in zip(stamps[1:], stamps[2:])), peak()


def alone(work, device, budget=1):
    """Median seconds of work(), for `budget` seconds, after a call that does not count."""
    times = [seconds(work, device)]
    while len(times) < 2 or sum(times) < budget:
        times.append(seconds(work, device))
    return median(times[1:])


def noise(size, image_size, batch, device):
    """A Store of random pictures, each in it again and again: enough for any number of steps."""
    data = pretext(device, size.arch, image_size, batch)[2]
    return replace(data, rows=data.rows.repeat(100), labels=data.labels.repeat(100))


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


# ------------------------------------------------------------------------------------------------------- groups

def batch_rows(device, size):
    rows = []
    for batch in size.batches:
        for setting, chunk in (("whole", 0), ("--chunk 128", 128)):
            flags = f"{SIMCLR} --image-size {size.size} --batch-size {batch} --chunk {chunk}"
            try:
                spent, peak = steps_of(simclr, flags, noise(size, size.size, batch, device), device, size)
            except torch.OutOfMemoryError:
                print(f"batch {batch}, {setting}: does not fit", flush=True)
                continue
            rows.append(dict(setting=setting, value=batch, seconds=spent, peak_mb=peak))
        z1, z2 = (torch.randn(batch, 128, device=device, requires_grad=True) for _ in range(2))
        loss = lambda: torch.autograd.grad(simclr.nt_xent(z1, z2, 0.2), (z1, z2))
        with peak_memory(device) as peak:
            rows.append(dict(setting="NT-Xent alone", value=batch, seconds=alone(loss, device), peak_mb=peak()))
    return rows


def side_rows(device, size):
    rows, size = [], SimpleNamespace(**{**vars(size), "arch": "resnet18" if device == "cuda" else size.arch})
    for side in size.sides:
        data = noise(size, side, size.side_batch, device)
        flags = f"{SIMCLR} --image-size {side} --batch-size {size.side_batch}"
        spent, peak = steps_of(simclr, flags, data, device, size)
        config = dict(pretext(device, size.arch, side, 4)[1], image_size=side)
        views = lambda: simclr.make_views(data.images[:size.side_batch], config)
        rows += [dict(setting="step", value=side, seconds=spent, peak_mb=peak),
                 dict(setting="views alone", value=side, seconds=alone(views, device))]
    return rows


def processes_rows(device, size):
    rows, most = [], 2 if device == "cpu" else torch.cuda.device_count()
    for processes in [number for number in (1, 2, 4, 8) if number <= most]:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                            __file__, "one-of", device, f"{folder}/row"], check=True, stdout=subprocess.DEVNULL,
                           env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads())))
            rows.append(json.loads(Path(f"{folder}/row").read_text()))
    if most < 2:
        print("processes: this machine has one GPU, so there is nothing to compare")
    return rows


def one_of(device, path):
    """A process of torchrun's; they all take the same number of steps."""
    size = GPU if device == "cuda" else CPU
    flags = f"{SIMCLR} --image-size {size.size} --batch-size {size.batch}"
    spent, peak = steps_of(simclr, flags, noise(size, size.size, size.batch, device), device, size, steps=12)
    if int(os.environ["RANK"]) == 0:
        Path(path).write_text(json.dumps(dict(setting="step", value=int(os.environ["WORLD_SIZE"]), seconds=spent, peak_mb=peak)))


def classes_rows(device, size):
    rows = []
    for classes in size.classes:
        data = noise(size, size.size, size.class_batch, device)
        data = replace(data, labels=(data.rows % classes).to(device), classes=[str(label) for label in range(classes)])
        flags = f"--image-size {size.size} --batch-size {size.class_batch}"
        for setting, script, more in (("finetune", finetune, ""), ("bi_tuning", bi_tuning, "--random-queue")):  # full queues
            spent, peak = steps_of(script, f"{flags} {more}", data, device, size)
            rows.append(dict(setting=setting, value=classes, seconds=spent, peak_mb=peak))
    return rows


def drain(data, batch, most):
    """Seconds a batch of common.batches alone, by `most` batches in random order, the first left out."""
    feed, stamps = common.batches(data, batch, whole_only=True), []
    for _ in zip(range(most + 1), feed):
        torch.cuda.synchronize() if data.labels.is_cuda else None
        stamps.append(time.perf_counter())
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def store_rows(device, size):
    rows, flags = [], f"{SIMCLR} --image-size {size.size} --batch-size {size.batch}"
    with file_of(size.stores[-1], common.store_side(size.size)) as path:
        for count in size.stores:
            data = store_of(common.map_images(path)[:count], device)
            again = replace(data, rows=data.rows.repeat(-(-8192 // count)), labels=data.labels.repeat(-(-8192 // count)))
            fed = median(drain(again, size.batch, 60) for _ in range(5))
            spent, peak = steps_of(simclr, flags, again, device, size)
            rows += [dict(setting="common.batches alone", value=count, seconds=fed),
                     dict(setting="step", value=count, seconds=spent, peak_mb=peak)]
    return rows


def disk_rows(device, size):
    if not hasattr(os, "posix_fadvise"):
        print("disk: needs Linux")
        return []
    with file_of(size.disk_images, common.store_side(size.size)) as path:
        apart = subprocess.run([sys.executable, __file__, "limited", device, path], check=True, stdout=subprocess.PIPE, text=True)
    *lines, rows = apart.stdout.splitlines()
    print(*lines, sep="\n", flush=True)
    return json.loads(rows)


def limited(device, path):
    """In a process whose private memory is limited to less than the file: steps from the file and from memory, in turn."""
    import resource
    size = GPU if device == "cuda" else CPU
    resource.setrlimit(resource.RLIMIT_DATA, (size.limit << 20, size.limit << 20))
    count, flags = os.path.getsize(path), f"{SIMCLR} --image-size {size.size} --batch-size {size.batch}"
    megabytes, read = count / 2**20, lambda: int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1]) / 2**20
    for how, load in (("np.load", lambda: np.load(path)), ("torch.empty", lambda: torch.empty(count, dtype=torch.uint8))):
        try:
            load()
            said = "succeeds: the limit does not hold"
        except (MemoryError, RuntimeError) as error:
            said = f"raises {type(error).__name__}"
        print(f"disk: under RLIMIT_DATA of {size.limit} MB, {how} of the file's {megabytes:,.0f} MB {said}", flush=True)
    held = common.map_images(path)[:len(common.map_images(path)) // 8].clone()  # as many of the images as memory has room for

    def drop():
        """The file leaves the page cache, as far as nothing has it mapped."""
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)

    def turn(images):
        """Seconds a step, private memory at the end, and MB a step that came from the disk."""
        before, waits = read(), []
        spent, _ = steps_of(simclr, flags, store_of(images, device), device, size, steps=size.disk_steps, waits=waits)
        return spent, status("RssAnon"), (read() - before) / (size.disk_steps + 2), sum(waits[1:]) / len(waits[1:])

    def first_batch():
        """Seconds and MB from the disk of one batch of a file that is not in the page cache."""
        drop()
        start, before = time.perf_counter(), read()
        data = store_of(common.map_images(path), device)
        list(common.feed(data, torch.randperm(len(data)).split(size.batch)[:1]))
        return time.perf_counter() - start, read() - before

    rows = []
    for cache in ("warm", "cold"):
        if cache == "warm":
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
        turns = []
        for i in range(size.rounds + 1):  # the first does not count
            if cache == "cold":
                drop()
            mapped = common.map_images(path)
            turns.append((turn(mapped), turn(held)) if i % 2 else (turn(held), turn(mapped))[::-1])
        counted = turns[1:]
        ratios = [disk[0] / memory[0] for disk, memory in counted]
        rows.append(dict(setting=f"step, in memory, in turn with {cache} cache", value=held.nbytes / 2**20,
                         seconds=median(memory[0] for _, memory in counted), wait=median(memory[3] for _, memory in counted)))
        rows.append(dict(setting=f"step, mapped, {cache} cache", value=megabytes, seconds=median(disk[0] for disk, _ in counted),
                         **dict(zip(("ratio_low", "ratio", "ratio_high"), np.quantile(ratios, (0.25, 0.5, 0.75)).tolist())),
                         anon_start_mb=turns[0][0][1], anon_end_mb=turns[-1][0][1],
                         read_mb=median(disk[2] for disk, _ in counted), wait=median(disk[3] for disk, _ in counted)))
        if cache == "warm":
            fed = drain(store_of(common.map_images(path), device), size.batch, 40)
            rows.append(dict(setting="common.batches alone, mapped, warm cache", value=megabytes, seconds=fed))
    spent, came = (median(column) for column in zip(*(first_batch() for _ in range(8))))
    rows += [dict(setting="one batch, mapped, never cached", value=megabytes, seconds=spent, read_mb=came),
             dict(setting="common.batches alone, in memory", value=held.nbytes / 2**20,
                  seconds=drain(store_of(held, device), size.batch, 40))]
    print(json.dumps(rows))


GROUPS = {"batch": batch_rows, "side": side_rows, "processes": processes_rows, "classes": classes_rows, "store": store_rows,
          "disk": disk_rows}


# --------------------------------------------------------------------------------------------- what came out

def line_through(points):
    """Least squares of log y on log x: exponent, its standard error (nan for two points), and y as a function of x."""
    x, y = np.log(np.array(points, float)).T
    e, constant = np.polyfit(x, y, 1)
    rest = ((y - e * x - constant) ** 2).sum()
    error = (rest / (len(x) - 2) / ((x - x.mean()) ** 2).sum()) ** 0.5 if len(x) > 2 else np.nan
    return e, error, lambda x: np.exp(constant) * np.asarray(x, float) ** e


def fitted_points(quantity, setting, column, points):
    """The points that one power can describe: not where another stem or a fixed cost decides."""
    if quantity == "side":
        return [p for p in points if p[0] > 40]  # up to 40 px the stem is another one
    if setting == "NT-Xent alone" or quantity == "batch" and column == "peak_mb":
        return [p for p in points if p[0] >= 512]
    return points


def curves(rows, column):
    """{(quantity, setting): [(value, rows' column), ...]}"""
    found = {}
    for row in rows:
        if row.get(column) not in (None, "") and row["quantity"] != "disk":
            found.setdefault((row["quantity"], row["setting"]), []).append((float(row["value"]), float(row[column])))
    return {key: sorted(points) for key, points in found.items() if len(points) > 1}


def reason(quantity, setting, column, curve, memory):
    """Why an exponent is above 1, in the numbers that were measured."""
    found = curve if column == "seconds" else memory
    if quantity == "batch":
        if setting == "NT-Xent alone":
            small, large = (4 * (2 * b)**2 / 2**20 for b in (512, found[quantity, setting][-1][0]))
            return ("it fills and reduces a table of 2B x 2B similarities, which would be 2; the table grows from "
                    f"{small:.0f} to {large:.0f} MB, and a processor's cache holds only the small ones")
        loss = dict(found["batch", "NT-Xent alone"])
        rest = [(b, y - loss[b]) for b, y in found[quantity, setting]]
        b, linear, square = rest[-1][0], rest[-1][1] / rest[-1][0], loss[rest[-1][0]] / rest[-1][0]**2
        share = f"NT-Xent's 2B x 2B similarities are {100 * square * b / (square * b + linear):.2g} % of it at B = {b:g}"
        if column == "peak_mb":
            return share
        return (f"{share}, and a tenth from B = {linear / square / 9:,.0f}, if they go with B^2 and the rest with B; the rest "
                f"alone has exponent {line_through(rest)[0]:.2f}")
    if quantity == "side":
        if column == "peak_mb":
            return "views and activations go with the area, which would be 2"
        if setting == "views alone":
            return "pixels would be 2; resampling multiplies each with a row of a (size x S) matrix, which would be 3"
        (x, y), (_, views) = found["side", "step"][-1], found["side", "views alone"][-1]
        return f"it goes with the area, which would be 2; at {x:g} px the views are {100 * views / y:.2g} % of it"
    return "no reason is known here"


def summarise(rows):
    curve, memory = curves(rows, "seconds"), curves(rows, "peak_mb")
    for column, unit, found in (("seconds", "s", curve), ("peak_mb", "MB", memory)):
        for (quantity, setting), points in found.items():
            if column == "peak_mb" and quantity not in ("batch", "side"):
                continue
            used = fitted_points(quantity, setting, column, points)
            if len(used) < 2:
                continue
            e, error, _ = line_through(used)
            (x, y), (x2, y2) = points[-2:]
            spread, over = f" +- {error:.2f}" if len(used) > 2 else "", ", ".join(f"{p[0]:g}" for p in used)
            last = f"; {np.log(y2 / y) / np.log(x2 / x):.2f} from {x:g} to {x2:g}" if len(used) > 2 else ""
            print(f"{quantity}, {setting}: {unit} go with exponent {e:.2f}{spread} over {over}{last}")
            if e - 2 * error > 1:
                print(f"    above 1: {reason(quantity, setting, column, curve, memory)}")
    for row in rows:
        if row["quantity"] == "disk" and row.get("ratio"):
            spent, ratio, low, high, start, end, came, wait = (float(row[key] or "nan") for key in ("seconds", *FIELDS[-7:]))
            more = lambda ratio: f"{100 * (1 / ratio - 1):+.1f} %"
            print(f"disk, {row['setting']}: {1 / spent:.3g} steps/s, {more(ratio)} against images in memory, half of the rounds "
                  f"between {more(high)} and {more(low)}; RssAnon {start:.0f} -> {end:.0f} MB; {came:.1f} MB a step read; "
                  f"a step waited {1000 * wait:.1f} ms for its batch")


def draw(rows, name):
    figure, axes = plt.subplots(2, 4, figsize=(20, 9))
    panels = [(quantity, "seconds", "s") for quantity in ("batch", "side", "processes", "classes", "store")]
    panels.insert(1, ("batch", "peak_mb", "MB at the peak"))
    panels.insert(3, ("side", "peak_mb", "MB at the peak"))
    for axis, (quantity, column, unit) in zip(axes.flat, panels):
        for (other, setting), points in curves(rows, column).items():
            if other == quantity:
                used = fitted_points(quantity, setting, column, points)
                dots, = axis.loglog(*zip(*points), "o")
                if len(used) > 1:
                    e, _, at = line_through(used)
                    x = [p[0] for p in used]
                    axis.loglog(x, at(x), color=dots.get_color(), label=f"{setting}: {e:.2f}")
        axis.set(xlabel=UNITS[quantity], ylabel=unit, title=f"{quantity}: exponents of the lines")
        if axis.lines:  # whole decades, so that no slope looks larger than it is
            low, high = axis.get_ylim()
            axis.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
            axis.legend(fontsize=8)
        ticks = sorted({float(row["value"]) for row in rows if row["quantity"] == quantity})
        ticks = ticks[::2] if len(ticks) > 6 else ticks
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    disk = [row for row in rows if row["quantity"] == "disk"][::-1]
    axes[1, 3].barh(range(len(disk)), [float(row["seconds"]) for row in disk], color="lightsteelblue", left=1e-5)
    axes[1, 3].set(xlabel="s", xscale="log", yticks=[], title="disk: a file larger than the process's memory")
    for i, row in enumerate(disk):
        axes[1, 3].text(1.2e-5, i, f"{row['setting']}: {float(row['seconds']):.2g} s", va="center", fontsize=8)
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(RESULTS / "scale.png", dpi=80)


def main(groups):
    if unknown := set(groups) - GROUPS.keys():
        raise SystemExit(f"no groups {', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
    device, path = "cuda" if torch.cuda.is_available() else "cpu", RESULTS / "scale.csv"
    name = device_name(device)
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    for group in groups or GROUPS:
        started = time.perf_counter()
        rows = [dict(row, device=name, quantity=group) for row in GROUPS[group](device, GPU if device == "cuda" else CPU)]
        rows = [{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
        for row in rows:
            print("  ".join(f"{row[key]}" for key in FIELDS[1:] if row.get(key) is not None), flush=True)
        print(f"{group}: {time.perf_counter() - started:.0f} s", flush=True)
        old = [row for row in old if (row["device"], row["quantity"]) != (name, group)] + rows
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(old)
    here = [row for row in old if row["device"] == name]
    summarise(here)
    draw(here, name)


if __name__ == "__main__":
    apart = {"one-of": one_of, "limited": limited}.get(sys.argv[1] if sys.argv[1:] else "")
    apart(*sys.argv[2:]) if apart else main(sys.argv[1:])
