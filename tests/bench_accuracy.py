"""Do the papers' claims show up here? Every chain of stages on equal terms: same epochs, same
search, several seeds, test once.

    python tests/bench_accuracy.py --data petals                all rows and label rates, 3 seeds: 3
                                                                to 4 hours of one CPU core
    python tests/bench_accuracy.py --data petals --quick        six rows, 20 labels per class, 2
                                                                seeds: under 20 minutes
    python tests/bench_accuracy.py --data DIR --rows simclr     a folder; only the rows whose name
                                                                holds `simclr`

A row is a chain {scratch, simclr, byol} - {nothing, coin, bissl} - {finetune, core_tuning,
bi_tuning}, a column a label rate, a cell the mean +- standard deviation over seeds of the whole
chain (pretext weights, views and the labelled images all differ).
  budget   Every row has the same pretext epochs, and in a column the same fine-tuning epochs
           (RATES: more where there are fewer images). COIN's are taken from fine-tuning; those that
           BiSSL's lower level goes through are taken from the pretext. What BiSSL's solves cost
           beyond that is not: the table has each row's seconds.
  search   Seed 0 of each cell tries the same random pairs of learning rate and weight decay, judged
           on val, of which nothing is ever trained on; the other seeds take the best pair. `all`
           labels means all of train.
  test     One look for each seed, after its last epoch.
Each finished run is a line of RUNS/runs.jsonl and is not made again: stop and start the bench as
you like, and share the label rates out among several of it (--labels). What the scripts print goes
to RUNS/log.txt. Writes tests/results/accuracy-DATA.csv and .png (accuracy-DATA-quick with --quick).
`gain` compares a row with the plain one (same pretext, plain fine-tuning) seed by seed, on the same
images. The best bar of a column is marked where it beats the plain row by more than the pooled
standard deviation.
"""
import math
import time

import matplotlib.pyplot as plt
import numpy as np

import benches
import bissl
import common

# Labelled images per class, and how many epochs of fine-tuning they get.
RATES = {"all": 12, "20": 60, "10": 90, "5": 120}


def all_rows():
    """(pretext, stage, method): COIN's second stage is finetune.py with --eta, and BiSSL is a
    second stage of a pretext."""
    rows = []
    for pretext in ("scratch", "simclr", "byol"):
        for stage in ("", "coin", "bissl"):
            if stage == "bissl" and pretext == "scratch":
                continue
            for method in ("finetune", "core_tuning", "bi_tuning"):
                if stage != "coin" or method == "finetune":
                    rows.append((pretext, stage, method))
    return rows


ROWS = all_rows()
QUICK_ROWS = [("scratch", "", "finetune"), ("simclr", "", "finetune"),
              ("simclr", "", "core_tuning"), ("simclr", "", "bi_tuning"),
              ("simclr", "coin", "finetune"), ("simclr", "bissl", "finetune")]


def name_of(row):
    return "-".join(part for part in row if part)


NAMES = [name_of(row) for row in ROWS]


class Bench(benches.Bench):
    """... and whole chains of them."""

    def pretext(self, name, seed, shorter):
        """Checkpoint of a pretext run (None for scratch) with `shorter` epochs less than
        --pretext-epochs, and its seconds."""
        if name == "scratch":
            return None, 0.0
        epochs = self.args.pretext_epochs - shorter
        out = f"{name}-{seed}-{epochs}"

        def make():
            last = self.main(name, out, ["--seed", seed, "--epochs", epochs])
            return dict(knn=last["knn"])

        return self.place / f"{out}.pt", self.once(out, make)["seconds"]

    def chain(self, row, rate, seed, lr, weight_decay, judge):
        """One run of a row from its pretext checkpoint to its score on `judge`, val or test, in per
        cent; the seconds of the pretext, and those of the rest."""
        pretext, stage, method = row
        epochs, seconds = self.args.epochs or RATES[rate], 0.0
        shorter = self.args.bissl_epochs if stage == "bissl" else 0
        ckpt, pretext_seconds = self.pretext(pretext, seed, shorter)
        start = ["--ckpt", ckpt] if ckpt else []
        labels = ["--seed", seed, "--labels-per-class", rate]
        if rate == "all":
            labels = ["--seed", seed, "--fraction", 1]
        tuning = ["--lr", lr, "--weight-decay", weight_decay] + labels
        budget = ["--epochs", epochs]
        if stage == "bissl":  # its own flags, not searched: one run for all pairs
            out = f"bissl-{pretext}-{rate}-{seed}"
            line = self.once(out, lambda: self.main("bissl", out, start + labels))
            start, seconds = ["--ckpt", self.place / f"{out}.pt"], line["seconds"]
        run = f"{name_of(row)}-{rate}-{seed}-{epochs}-lr{lr:.3g}-wd{weight_decay:.3g}"
        if stage == "coin":
            out = f"coin-{run}"
            line = self.once(out, lambda: self.main("coin", out, start + tuning + budget))
            start, seconds = ["--ckpt", self.place / f"{out}.pt"], line["seconds"]
            budget = []  # its checkpoint says what is left of it
        flags = start + tuning + budget
        if judge == "test":
            line = self.once(f"{run}-test", lambda: self.on_test(method, run, flags))
            score = line[f"test_{self.metric()}"]
        else:
            line = self.once(f"{run}-val", lambda: dict(val=self.on_val(method, run, flags)))
            score = line["val"]
        (self.place / f"{run}.pt").unlink(missing_ok=True)  # its score is in the book
        return score, pretext_seconds, seconds + line["seconds"]


def pairs_to_search(count):
    """Random pairs of learning rate (0.003 to 0.3) and weight decay (1e-5 to 1e-2), log-uniform:
    each of `count` equal parts of either range has one (a Latin square), since few draws that fall
    where they like leave the good part out."""
    rng = np.random.default_rng(0)
    parts = np.stack([rng.permutation(count), rng.permutation(count)], 1)  # (count, 2)
    share = (parts + rng.random((count, 2))) / count
    return (10 ** (np.array([-2.5, -5]) + share * np.array([2, 3]))).tolist()


def cell(bench, row, rate, args):
    """Search on val with seed 0, then every seed once on test: its csv row."""
    tried = []
    for pair in pairs_to_search(args.search):
        lr, decay = pair
        score, _, _ = bench.chain(row, rate, 0, lr, decay, "val")
        tried.append((score, pair))
    _, (lr, decay) = max(tried)
    scores, pretext, rest = [], [], []
    for seed in range(args.seeds):
        score, pretext_seconds, seconds = bench.chain(row, rate, seed, lr, decay, "test")
        scores.append(score)
        pretext.append(pretext_seconds)
        rest.append(seconds)
    return dict(device=benches.device_name(args.device), row=name_of(row), labels=rate,
                metric=bench.metric(), mean=round(float(np.mean(scores)), 2),
                std=round(benches.spread_of(scores), 2),
                scores=" ".join(f"{s:.2f}" for s in scores),
                lr=f"{lr:.3g}", weight_decay=f"{decay:.3g}",
                pretext_seconds=round(float(np.mean(pretext)), 1),
                seconds=round(float(np.mean(rest)), 1))


def mark(cells):
    """Adds what a row gains on the plain one, seed by seed; `marked`: best of its column, by more
    than the pooled deviation."""
    plain, best = {}, {}
    for line in cells:
        pretext, *rest = line["row"].split("-")
        if rest == ["finetune"]:
            plain[pretext, line["labels"]] = line
        best[line["labels"]] = max(line["mean"], best.get(line["labels"], 0.0))
    for line in cells:
        line.update(gain="", gain_std="", pooled_std="", marked=False)
        base = plain.get((line["row"].split("-")[0], line["labels"]))
        if base is None or base is line:
            continue
        own = np.array(line["scores"].split(), float)
        other = np.array(base["scores"].split(), float)
        if len(own) == len(other) > 1:
            difference = own - other
            line["gain"] = round(difference.mean(), 2)
            line["gain_std"] = round(difference.std(ddof=1), 2)
        line["pooled_std"] = round(math.hypot(line["std"], base["std"]) / math.sqrt(2), 2)
        is_best = line["mean"] == best[line["labels"]]
        line["marked"] = is_best and line["mean"] - base["mean"] > line["pooled_std"]
    return cells


def draw(cells, path, title):
    """A group of bars for each row, a bar for each label rate, with the standard deviation; * where
    a row is marked."""
    rows = sorted({line["row"] for line in cells}, key=NAMES.index)
    rates = [rate for rate in RATES if any(line["labels"] == rate for line in cells)]
    width = 0.8 / len(rates)
    figure, axes = plt.subplots(figsize=(4 + 0.2 * len(rows) * (len(rates) + 1), 5))
    for i, rate in enumerate(rates):
        label = "all labels of train" if rate == "all" else f"{rate} labels per class"
        for line in cells:
            if line["labels"] != rate:
                continue
            x = rows.index(line["row"]) + (i - (len(rates) - 1) / 2) * width
            axes.bar(x, line["mean"], 0.94 * width, yerr=line["std"], capsize=2, color=f"C{i}",
                     label=label)
            label = None  # one entry of the legend for all its bars
            if line["marked"]:
                axes.text(x, line["mean"] + line["std"] + 0.5, "*", ha="center", fontsize=14)
    axes.legend(fontsize=8)
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    axes.set(ylabel="test accuracy, %", title=title)
    axes.grid(axis="y", alpha=0.3)
    benches.save_figure(figure, path)


def enter(line, path):
    """The table in the file `path` with this row in its place, marked anew."""
    lines = benches.with_others([line], path, ("device", "row", "labels"))
    for line in lines:
        line.update(mean=float(line["mean"]), std=float(line["std"]))
    lines = mark(sorted(lines, key=place_of))
    benches.write_table(lines, path, lines[0])
    return lines


def place_of(line):
    return NAMES.index(line["row"]), list(RATES).index(line["labels"])


def bissl_epochs(bench):
    """The pretext epochs that BiSSL's lower level goes through."""
    flags = bissl.parser().parse_args(bench.flags("flags"))
    images = flags.alternations * flags.lower_steps * flags.pretext_batch_size
    return round(images / len(common.load_data(flags, "unlabeled")))


def parse(argv):
    p = benches.parser(__doc__)
    p.add_argument("--quick", action="store_true",
                   help="six rows, 20 labels per class, 2 seeds, half the pretext epochs")
    p.add_argument("--rows", default="", help="only rows with this in their name")
    p.add_argument("--labels", nargs="+", choices=RATES, help="label rates")
    p.add_argument("--seeds", type=int, help="default: 3, quick 2")
    p.add_argument("--search", type=int, default=4, help="pairs of learning rate and weight decay")
    p.add_argument("--pretext-epochs", type=int, help="default: 24, quick 12")
    p.add_argument("--epochs", type=int, help=f"of fine-tuning; default: {RATES}")
    args = p.parse_args(argv)
    defaults = dict(seeds=3, pretext_epochs=24, labels=list(RATES))
    args.name = benches.name_of_data(args.data)
    if args.quick:
        defaults = dict(seeds=2, pretext_epochs=12, labels=["20"])
        args.name += "-quick"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.runs = args.runs or f"runs/accuracy-{args.name}"
    return args


def main(argv=None):
    args = parse(argv)
    bench, path = Bench(args), benches.RESULTS / f"accuracy-{args.name}.csv"
    args.bissl_epochs = bissl_epochs(bench)
    title = (f"{args.name}: {args.pretext_epochs} pretext epochs, {args.seeds} seeds\n"
             "* best of its column and beyond the spread")
    todo = []
    for row in QUICK_ROWS if args.quick else ROWS:
        if args.rows in name_of(row):
            todo.extend((row, rate) for rate in args.labels)
    started = time.perf_counter()
    for i, (row, rate) in enumerate(todo):
        print(f"--- cell {i + 1}/{len(todo)}: {name_of(row)}, {rate} labels per class", flush=True)
        line = cell(bench, row, rate, args)
        left = (time.perf_counter() - started) / (i + 1) * (len(todo) - i - 1)
        print(f"--- {line['row']} {line['labels']}: {line['metric']} {line['mean']} +- "
              f"{line['std']} %; about {left / 60:.0f} minutes left", flush=True)
        lines = enter(line, path)
        here = [other for other in lines if other["device"] == line["device"]]
        draw(here, path.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
