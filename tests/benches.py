"""What the benches share: the folder of results, tables in which new rows take the place of older
ones, a book of finished runs, gains with their intervals, names of devices and data.

Importing it puts the scripts on Python's path.
"""
import argparse
import contextlib
import csv
import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
import torch

import bi_tuning
import bissl
import byol
import coin
import common
import core_tuning
import finetune
import simclr

SCRIPTS = {"simclr": simclr, "byol": byol, "coin": coin, "bissl": bissl,
           "finetune": finetune, "core_tuning": core_tuning, "bi_tuning": bi_tuning}
RESULTS = ROOT / "tests" / "results"
# 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom; the last serves for more, too.
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


# ---------------------------------------------------------------------------------- names and flags

def cpu_name():
    """"x86_64 CPU" and what its vector unit is, which decides the figures more than its clock."""
    about, widest = Path("/proc/cpuinfo"), ""
    flags = about.read_text() if about.exists() else ""
    for unit in ("avx2", "avx512f", "avx512_bf16"):
        if unit in flags:
            widest = unit
    return f"{platform.machine()} CPU {widest}".strip()


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def name_of_data(data):
    """A folder's own name, without those above it."""
    return Path(data).resolve().name if Path(data).is_dir() else data


def bare_parser(doc):
    """A parser without flags, whose --help is the bench's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_groups(p, argv, groups, default=None):
    """The flags of a bench whose parts can be named behind it: args.groups, the default (without
    it, all) where none is."""
    default = default or list(groups)
    p.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups)}; default: "
                   + (" ".join(default) if len(default) < len(groups) else "all"))
    args = p.parse_args(argv)
    for group in args.groups:
        if group not in groups:
            p.error(f"no group {group}: there are {', '.join(groups)}")
    args.groups = args.groups or default
    return args


def parser(doc):
    """The flags of a bench that runs scripts."""
    p = bare_parser(doc)
    p.add_argument("--data", default="petals")
    p.add_argument("--root", default="data")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("float32", "bfloat16"))
    p.add_argument("--image-size", type=int, help="without: the scripts' own")
    p.add_argument("--runs", help="folder of the runs; default: runs/ and the results' name")
    return p


# ---------------------------------------------------------------------------------------- the books

class Bench:
    """Runs scripts with the flags of parser(), and remembers what is done: each finished run is a
    line of RUNS/runs.jsonl and is not made again."""

    def __init__(self, args):
        self.args, self.place = args, Path(args.runs)
        self.place.mkdir(parents=True, exist_ok=True)
        self.book, self.done = self.place / "runs.jsonl", {}
        if self.book.exists():
            for text in self.book.read_text().splitlines():
                line = json.loads(text)
                self.done[line["run"]] = line

    def once(self, run, make):
        """make() -> dict of results, unless `run` is in the book; the seconds it took are noted
        beside them (on a CPU the processor's, which other programs do not lengthen). A run that was
        stopped begins anew, so that they are those of the whole. What it prints goes to
        RUNS/log.txt."""
        if run not in self.done:
            clock = time.process_time if self.args.device == "cpu" else time.perf_counter
            start = clock()
            with open(self.place / "log.txt", "a") as log, contextlib.redirect_stdout(log):
                print(f"=== {run}", flush=True)
                result = make()
            self.done[run] = dict(run=run, seconds=round(clock() - start, 1), **result)
            with open(self.book, "a") as file:
                file.write(json.dumps(self.done[run]) + "\n")
            print(f"{run}: {self.done[run]}", flush=True)
        return self.done[run]

    def flags(self, flags, out="unused"):
        args = self.args
        shared = ["--data", args.data, "--root", args.root, "--device", args.device]
        shared += ["--out", self.place / out]
        if args.precision:
            shared += ["--precision", args.precision]
        if args.image_size:
            shared += ["--image-size", args.image_size]
        return [str(flag) for flag in shared + list(flags)]

    def main(self, script, out, flags):
        return SCRIPTS[script].main(self.flags(flags, out))

    def on_test(self, script, out, flags):
        """What a run of the protocol finds on test."""
        summary = self.main(script, out, flags)
        return {name: value for name, value in summary.items() if "test_" in name}

    def on_val(self, script, out, flags):
        """The score on val after a run's last epoch: what the protocol's search does, for a chain
        with stages before it."""
        args = SCRIPTS[script].parser().parse_args(self.flags(flags, f"{out}-val"))
        args.search = 1  # as in a search, a run that diverges scores 0 and stops nothing
        common.start_backbone(args, say=False)  # settles arch and image size
        data, val = common.load_labelled(args, args.seed), common.load_data(args, "val")
        results = []
        SCRIPTS[script].train(finetune.Trial(script, args, args, data, judge=val, watch=None,
                                             history=[], results=results))
        Path(f"{args.out}.pt").unlink(missing_ok=True)
        return results[0].get(self.metric(), 0.0)

    def metric(self):
        """The name of the score that counts, for a bench with --task that of the task."""
        return finetune.main_metric(self.args)


def bissl_epochs(args, seed):
    """How many epochs of labelled images a run of bissl.py shows: those that warm up its head, and
    those of its upper level, whose batches are of equal size."""
    batches = common.Batches(common.load_labelled(args, seed), args.batch_size)
    return args.head_epochs + round(args.alternations * args.upper_steps / len(batches))


# ------------------------------------------------------------------------------------------ figures

def spread_of(values):
    """Standard deviation, 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_gain(scores, others):
    """Mean of scores - others over the seeds that both have, and half of its 95 % interval (None
    with one seed). scores, others: dicts of seed: score."""
    seeds = sorted(set(scores) & set(others))
    difference = np.array([scores[seed] - others[seed] for seed in seeds])
    if len(seeds) < 2:
        return float(difference.mean()), None
    quantile = STUDENT[min(len(seeds) - 2, len(STUDENT) - 1)]
    return float(difference.mean()), quantile * spread_of(difference) / len(seeds) ** 0.5


# ------------------------------------------------------------------------------------------- tables

def read_table(path):
    """The rows of a CSV file, values as text; none without the file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_others(rows, path, key):
    """The file's rows but for those that have a new row's values under the names in `key`, and then
    the new rows. The file is read each time: another bench may have written to it."""
    new, older = {tuple(str(row[name]) for name in key) for row in rows}, read_table(path)
    if older and not older[0].keys() >= set(key):
        common.fail(f"{path} is of an older bench: move it away")
    kept = [old for old in older if tuple(old[name] for name in key) not in new]
    return [*kept, *rows]


def write_table(rows, path, fields):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def replace_rows(rows, path, key, fields):
    """Write with_others(): -> all rows that the file has now."""
    rows = with_others(rows, path, key)
    write_table(rows, path, fields)
    return rows


def draw_row(axis, place, values, said):
    """A row of a figure: a point for each seed, their mean, and beside it what is `said` of it."""
    axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.4)
    axis.plot(np.mean(values), place, "|", color="black", markersize=16)
    axis.annotate(said, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)


def save_figure(figure, path):
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
