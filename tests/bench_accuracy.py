"""Do the papers' claims show up here? Every chain of stages on equal terms: same epochs, same search, several seeds, test once.

    python tests/bench_accuracy.py --data petals              all rows and label rates, 3 seeds: hours on a CPU
    python tests/bench_accuracy.py --data petals --quick      six rows, one label rate, 2 seeds, a third of the epochs
    python tests/bench_accuracy.py --data DIR --rows simclr   a folder; only the rows whose name holds `simclr`

A row is a chain {scratch, simclr, byol} - {nothing, coin, bissl} - {finetune, core_tuning, bi_tuning}, a column a label rate, a
cell the mean +- standard deviation over seeds of the whole chain (pretext weights, views and the labelled images all differ).
  budget   Every row has the same pretext epochs and the same fine-tuning epochs. COIN's are taken from fine-tuning; those
           that BiSSL's lower level goes through are taken from the pretext. The seconds that a row took are in the table.
  search   Seed 0 of each cell tries the same random pairs of learning rate and weight decay, judged on val, of which nothing
           is ever trained on; the other seeds take the best pair. `all` labels means all of train.
  test     One look for each seed, after its last epoch.
Each finished run is a line of RUNS/runs.jsonl and is not made again: stop and start the bench as you like. Writes
tests/results/accuracy-DATA.csv and .png (accuracy-DATA-quick with --quick). The best bar of a column is marked where it beats
the plain row (same pretext, plain fine-tuning) by more than the pooled standard deviation.
"""
import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np

import bi_tuning
import bissl
import byol
import coin
import common
import core_tuning
import finetune
import simclr
from bench_speed import device_name

SCRIPTS = {"simclr": simclr, "byol": byol, "coin": coin, "bissl": bissl,
           "finetune": finetune, "core_tuning": core_tuning, "bi_tuning": bi_tuning}
RESULTS = Path(__file__).resolve().parent / "results"
# COIN ends in finetune.py with --supcon; the other two start from its backbone and then train for the rest of the budget
ROWS = [(pretext, stage, method) for pretext in ("scratch", "simclr", "byol") for stage in ("", "coin", "bissl")
        for method in ("finetune", "core_tuning", "bi_tuning") if not (pretext == "scratch" and stage == "bissl")]
QUICK_ROWS = [("scratch", "", "finetune"), ("simclr", "", "finetune"), ("simclr", "coin", "finetune"),
              ("simclr", "bissl", "finetune"), ("simclr", "", "core_tuning"), ("simclr", "", "bi_tuning")]
RATES = ("all", "20", "10", "5")


def name_of(row):
    return "-".join(part for part in row if part)


class Bench:
    """Runs scripts with the flags that all cells share; remembers what is done."""

    def __init__(self, args):
        self.args, self.place = args, Path(args.runs)
        self.place.mkdir(parents=True, exist_ok=True)
        self.book = self.place / "runs.jsonl"
        lines = self.book.read_text().splitlines() if self.book.exists() else []
        self.done = {line["run"]: line for line in map(json.loads, lines)}

    def once(self, run, make):
        """make() -> dict of results, unless `run` is in the book; the seconds it took are noted beside them."""
        if run not in self.done:
            start = time.perf_counter()
            result = make()
            self.done[run] = dict(run=run, seconds=round(time.perf_counter() - start, 1), **result)
            with open(self.book, "a") as file:
                file.write(json.dumps(self.done[run]) + "\n")
        return self.done[run]

    def main(self, script, out, *flags):
        shared = ["--data", self.args.data, "--root", self.args.root, "--device", self.args.device, "--out", self.place / out]
        if self.args.precision:
            shared += ["--precision", self.args.precision]
        return SCRIPTS[script].main([str(flag) for flag in (*shared, *flags, "--resume")])

    def pretext(self, name, seed, shorter):
        """Checkpoint of a pretext run (None for scratch) with `shorter` epochs less than --pretext-epochs, and its seconds."""
        if name == "scratch":
            return None, 0.0
        out = f"{name}-{seed}-{self.args.pretext_epochs - shorter}"
        line = self.once(out, lambda: dict(knn=self.main(
            name, out, "--seed", seed, "--epochs", self.args.pretext_epochs - shorter)["knn"]))
        return str(self.place / f"{out}.pt"), line["seconds"]

    def labels(self, rate):
        return ["--fraction", 1] if rate == "all" else ["--labels-per-class", rate]

    def chain(self, row, rate, seed, lr, weight_decay, judge):
        """One run of a row from its pretext checkpoint to its score on `judge`, val or test, in per cent."""
        (pretext, stage, method), seconds = row, 0.0
        ckpt, pretext_seconds = self.pretext(pretext, seed, self.args.bissl_epochs if stage == "bissl" else 0)
        out = f"{name_of(row)}-{rate}-{seed}"
        tuning = ["--lr", lr, "--weight-decay", weight_decay, "--seed", seed, *self.labels(rate)]
        start = ["--ckpt", ckpt] if ckpt else []
        if stage == "bissl":  # its own flags, not searched: one run for all pairs
            line = self.once(f"bissl-{pretext}-{rate}-{seed}", lambda: self.main(
                "bissl", f"bissl-{pretext}-{rate}-{seed}", *start, "--seed", seed, *self.labels(rate)))
            start, seconds = ["--ckpt", self.place / f"bissl-{pretext}-{rate}-{seed}.pt"], line["seconds"]
        tuned = f"{out}-lr{lr:.3g}-wd{weight_decay:.3g}"
        if stage == "coin":
            line = self.once(f"coin-{tuned}", lambda: self.main(
                "coin", f"coin-{tuned}", *start, *tuning, "--epochs", self.args.epochs))
            start, seconds = ["--ckpt", self.place / f"coin-{tuned}.pt"], line["seconds"]
        epochs = [] if stage == "coin" else ["--epochs", self.args.epochs]
        if judge == "test":
            line = self.once(f"{tuned}-test", lambda: {
                name: value for name, value in self.main(method, tuned, *start, *tuning, *epochs).items() if "test_" in name})
            score = line[f"test_{self.metric()}"]
        else:
            line = self.once(f"{tuned}-val", lambda: dict(val=self.on_val(method, f"{tuned}-val", [*start, *tuning, *epochs])))
            score = line["val"]
        return score, pretext_seconds, seconds + line["seconds"]

    def on_val(self, method, out, flags):
        """The score on val after a run's last epoch: what the protocol's search does, for a chain with stages before it."""
        script = SCRIPTS[method]
        args = script.parser().parse_args([*map(str, ["--data", self.args.data, "--root", self.args.root, "--device",
                                           self.args.device, "--out", self.place / out, *flags])])
        args.precision, args.search = self.args.precision or args.precision, 1  # 1: a pair that diverges is bad, not an error
        common.start_backbone(args, say=False)  # settles arch and image size
        data, val = common.load_labelled(args, args.seed), common.load_data(args, "val")
        results = []
        log = common.Log(args, args.epochs)
        script.train(finetune.Run(method, args, data, judge=val, watch=None, log=log, results=results, ckpt=None))
        return results[0].get(self.metric(), 0.0)

    def metric(self):
        return finetune.MAIN_METRIC.get(self.args.data, "top1")


def cell(bench, row, rate, args):
    """Search on val with seed 0, then every seed once on test: its csv row."""
    rng = np.random.default_rng(0)
    pairs = (10 ** rng.uniform((-2.5, -5), (-0.5, -2), (args.search, 2))).tolist()  # lr 0.003 .. 0.3, log-uniform
    scored = [(bench.chain(row, rate, 0, *pair, "val")[0], pair) for pair in pairs]
    best = max(scored)[1]
    scores, pretext, rest = zip(*(bench.chain(row, rate, seed, *best, "test") for seed in range(args.seeds)))
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return dict(device=device_name(args.device), row=name_of(row), labels=rate, metric=bench.metric(),
                mean=round(float(np.mean(scores)), 2), std=round(spread, 2), seeds=args.seeds, lr=f"{best[0]:.3g}",
                weight_decay=f"{best[1]:.3g}",
                pretext_seconds=round(float(np.mean(pretext)), 1), seconds=round(float(np.mean(rest)), 1))


def mark(cells):
    """Adds `gain` over the plain row, and `marked`: more than the pooled standard deviation, and the best of the column."""
    plain = {(line["row"].split("-")[0], line["labels"]): line for line in cells if line["row"].count("-") == 1
             and line["row"].endswith("-finetune")}
    for line in cells:
        base = plain.get((line["row"].split("-")[0], line["labels"]))
        line["gain"] = round(line["mean"] - base["mean"], 2) if base and base is not line else ""
        line["pooled_std"] = round(math.hypot(line["std"], base["std"]) / math.sqrt(2), 2) if line["gain"] != "" else ""
        best = max(other["mean"] for other in cells if other["labels"] == line["labels"])
        line["marked"] = bool(line["gain"] != "" and line["gain"] > line["pooled_std"] and line["mean"] == best)
    return cells


def draw(cells, path, title):
    """A group of bars for each row, a bar for each label rate, with the standard deviation; * where a row is marked."""
    rows, rates = list(dict.fromkeys(line["row"] for line in cells)), [r for r in RATES if any(c["labels"] == r for c in cells)]
    figure, axes = plt.subplots(figsize=(2 + 0.45 * len(rows) * len(rates) + 2, 5))
    for i, rate in enumerate(rates):
        for line in (line for line in cells if line["labels"] == rate):
            x = rows.index(line["row"]) + (i - (len(rates) - 1) / 2) * 0.8 / len(rates)
            axes.bar(x, line["mean"], 0.75 / len(rates), yerr=line["std"], color=f"C{i}", capsize=2,
                     label=f"{rate} labels a class" if rate != "all" else "all labels of train")
            axes.text(x, line["mean"] + line["std"] + 0.5, "*" if line["marked"] else "", ha="center")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles.keys())
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    axes.set(ylabel="test accuracy, %", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--data", default="petals")
    p.add_argument("--root", default="data")
    p.add_argument("--runs", help="folder of the runs; default: runs/accuracy-DATA")
    p.add_argument("--device", default="cuda" if common.torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("float32", "bfloat16"))
    p.add_argument("--quick", action="store_true", help="six rows, 20 labels a class, 2 seeds, 2 pairs, fewer epochs")
    p.add_argument("--rows", default="", help="only rows with this in their name")
    p.add_argument("--labels", nargs="+", choices=RATES, help="label rates")
    p.add_argument("--seeds", type=int)
    p.add_argument("--search", type=int, help="pairs of learning rate and weight decay")
    p.add_argument("--pretext-epochs", type=int, help="default: 24, quick 8")
    p.add_argument("--epochs", type=int, help="of fine-tuning; default: 60, quick 30")
    args = p.parse_args(argv)
    args.seeds, args.search = args.seeds or (2 if args.quick else 3), args.search or (2 if args.quick else 8)
    args.pretext_epochs, args.epochs = args.pretext_epochs or (8 if args.quick else 24), args.epochs or (30 if args.quick else 60)
    args.labels = args.labels or (["20"] if args.quick else list(RATES))
    name = Path(args.data).resolve().name if Path(args.data).is_dir() else args.data
    args.runs = args.runs or f"runs/accuracy-{name}{'-quick' * args.quick}"
    args.out = RESULTS / f"accuracy-{name}{'-quick' * args.quick}"
    flags = bissl.parser().parse_args(["--data", args.data, "--root", args.root, "--out", f"{args.runs}/flags"])
    images = len(common.load_data(flags, "unlabeled"))
    args.bissl_epochs = round(flags.alternations * flags.lower_steps * flags.pretext_batch_size / images)

    bench = Bench(args)
    wanted = [row for row in (QUICK_ROWS if args.quick else ROWS) if args.rows in name_of(row)]
    todo, cells, started = [(row, rate) for row in wanted for rate in args.labels], [], time.perf_counter()
    for i, (row, rate) in enumerate(todo):
        print(f"--- cell {i + 1}/{len(todo)}: {name_of(row)}, {rate} labels a class", flush=True)
        cells.append(cell(bench, row, rate, args))
        spent = time.perf_counter() - started
        print("--- {row} {labels}: {metric} {mean} +- {std} %".format(**cells[-1]) +
              f"; about {spent / (i + 1) * (len(todo) - i - 1) / 60:.0f} minutes left", flush=True)
        path = args.out.with_suffix(".csv")
        before = list(csv.DictReader(path.open())) if path.exists() else []
        key = lambda line: (line["device"], line["row"], line["labels"])
        kept = [line for line in before if key(line) not in {key(line) for line in cells}]
        with path.open("w", newline="") as file:
            lines = mark([dict(line, mean=float(line["mean"]), std=float(line["std"])) for line in [*kept, *cells]])
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    draw([line for line in lines if line["device"] == device_name(args.device)], args.out.with_suffix(".png"),
         f"{name}: {args.pretext_epochs} pretext epochs, {args.epochs} of fine-tuning, {args.seeds} seeds")
    for line in cells:
        print("{row:28} {labels:>4}  {mean:6.2f} +- {std:5.2f} %".format(**line))


if __name__ == "__main__":
    main()
