"""Do the papers' claims show up here? Every chain of stages on equal terms: same epochs, same
search, several seeds, test once.

    python tests/bench_accuracy.py                  all rows and label rates, 10 seeds: hours
    python tests/bench_accuracy.py --labels 20 --rows simclr
                                                    a column, rows with this in their name
    python tests/bench_accuracy.py --quick          six rows, 20 labels per class, 2 seeds
    python tests/bench_accuracy.py --data DIR --pretext "--data OTHER"       folders

A row is a chain {scratch, simclr, byol} - {nothing, coin, bissl} - {finetune, core_tuning,
bi_tuning}, a column a label rate, a cell the mean over seeds of the whole chain: pretext weights,
views and the labelled images all differ from seed to seed, and are the same for all rows of a seed.
  budget   In a column every row sees its labelled images equally often (RATES). COIN's epochs are
           taken from fine-tuning, and so are BiSSL's: those that warm up its head and those that
           its upper level goes through. `bissl_full` keeps the whole of fine-tuning beside them.
           The pretext has --pretext-epochs, of which BiSSL's lower level has its share. What
           BiSSL's solves cost is not counted: the table has each row's seconds.
  search   On seed 0, judged on val, of which nothing is ever trained on: --search trials of
           learning rate, weight decay and the weight of the row's own method (WEIGHTS), log-uniform
           around the paper's value. All rows have as many trials, and the other seeds take the
           best. `all` labels means all of train.
  test     One look for each seed, after its last epoch.
  gain     on the plain row (same pretext, plain fine-tuning), seed by seed, and half of its 95 %
           interval (t over the seeds). `best` is the highest mean of a column where its gain on the
           runner-up leaves 0 out.
Each finished run is a line of RUNS/runs.jsonl and is not made again: stop and start the bench as
you like, and share rows or label rates out among several of it. Writes
tests/results/accuracy-NAME.csv and .png.
"""
import shlex
import time

import matplotlib.pyplot as plt
import numpy as np

import benches
import bissl
import common
import simclr

# Labelled images per class, and how many epochs a row sees them.
RATES = {"all": 40, "20": 120, "10": 180, "5": 300}
# The weight that a stage or a method has of its own: its flag, and the range that is searched. The
# papers have an alpha of 0.7, a lambda of 0.001, eta from 0.1 to 10, a gamma_cl of 1.
WEIGHTS = {"coin": ("--alpha", 0.07, 0.9), "bissl": ("--lam", 0.001, 1),
           "core_tuning": ("--eta", 0.1, 10), "bi_tuning": ("--gamma", 0.1, 10)}
RANGES = {"--lr": (0.003, 0.3), "--weight-decay": (1e-5, 1e-2)}
FIELDS = ("device", "row", "labels", "metric", "seeds", "mean", "std", "gain", "gain_95", "best",
          "flags", "pretext_seconds", "seconds", "scores")


def all_rows():
    """(pretext, stage, method): COIN's second stage is finetune.py with --eta, and BiSSL is a
    second stage of a pretext."""
    rows = []
    for pretext in ("scratch", "simclr", "byol"):
        for method in ("finetune", "core_tuning", "bi_tuning"):
            rows.append((pretext, "", method))
        rows.append((pretext, "coin", "finetune"))
        if pretext != "scratch":
            rows.append((pretext, "bissl_full", "finetune"))
            for method in ("finetune", "core_tuning", "bi_tuning"):
                rows.append((pretext, "bissl", method))
    return rows


ROWS = all_rows()
QUICK_ROWS = [("scratch", "", "finetune"), ("simclr", "", "finetune"),
              ("simclr", "", "core_tuning"), ("simclr", "", "bi_tuning"),
              ("simclr", "coin", "finetune"), ("simclr", "bissl", "finetune")]


def name_of(row):
    return "-".join(part for part in row if part)


NAMES = [name_of(row) for row in ROWS]


def trials_to_search(count):
    """Shares (count, 4) of the ranges of learning rate, weight decay, the stage's weight and the
    method's: each of `count` equal parts of a range has one trial (a Latin square), since few draws
    that fall where they like leave the good part out."""
    rng = np.random.default_rng(0)
    parts = np.stack([rng.permutation(count) for _ in range(4)], 1)
    return (parts + rng.random((count, 4))) / count


def flags_of(row, trial):
    """A trial as flags: those of fine-tuning, of the stage before it, and of the method."""
    _, stage, method = row
    stage = stage.removesuffix("_full")
    tuning = []
    for (flag, (low, high)), share in zip(RANGES.items(), trial):
        tuning += [flag, f"{low * (high / low) ** share:.3g}"]
    own = []
    for name, share in ((stage, trial[2]), (method, trial[3])):
        flag, low, high = WEIGHTS.get(name, ("", 1, 1))
        own.append([flag, f"{low * (high / low) ** share:.3g}"] if flag else [])
    return tuning, *own


class Bench(benches.Bench):
    """... and whole chains of them."""

    def pretext(self, name, seed, shorter):
        """Checkpoint of a pretext run (None for scratch) with `shorter` epochs less than
        --pretext-epochs, and its seconds."""
        if name == "scratch":
            return None, 0.0
        epochs = self.args.pretext_epochs - shorter
        out = f"{name}-{seed}-{epochs}"
        flags = [*self.args.pretext, "--seed", seed, "--epochs", epochs]
        line = self.once(out, lambda: dict(knn=self.main(name, out, flags)["knn"]))
        return self.place / f"{out}.pt", line["seconds"]

    def bissl_stage(self, flags):
        """What bissl.py makes of these flags, and the pretext epochs that its lower level goes
        through."""
        stage = bissl.parser().parse_args(self.flags(flags))
        pretext = simclr.parser().parse_args(self.flags(self.args.pretext))
        seen = stage.alternations * stage.lower_steps * stage.pretext_batch_size
        return stage, round(seen / len(common.load_data(pretext, "unlabeled")))

    def chain(self, row, rate, seed, trial, judge):
        """One run of a row from its pretext checkpoint to its score on `judge`, val or test, in per
        cent; the seconds of the pretext, and those of the rest."""
        pretext, stage, method = row
        epochs, seconds, shorter = self.args.epochs or RATES[rate], 0.0, 0
        labels = ["--seed", seed, "--labels-per-class", rate]
        if rate == "all":
            labels = ["--seed", seed, "--fraction", 1]
        tuning, of_stage, of_method = flags_of(row, trial)
        if stage.startswith("bissl"):
            of_stage = self.args.stage + labels + of_stage
            args, shorter = self.bissl_stage(of_stage)
            if stage == "bissl":
                epochs -= benches.bissl_epochs(args, seed)
        ckpt, pretext_seconds = self.pretext(pretext, seed, shorter)
        start = ["--ckpt", ckpt] if ckpt else []
        tuning, budget = tuning + labels, ["--epochs", max(1, epochs)]
        if stage.startswith("bissl"):  # one run for all methods and both budgets
            out = f"bissl-{pretext}-{rate}-{seed}{''.join(of_stage[-2:])}"
            line = self.once(out, lambda: self.main("bissl", out, start + of_stage))
            start, seconds = ["--ckpt", self.place / f"{out}.pt"], line["seconds"]
        run = "".join([name_of(row), f"-{rate}-{seed}-", *tuning[:4], *of_stage[-2:], *of_method])
        if stage == "coin":
            out, flags = f"coin-{run}", start + tuning + budget + of_stage
            line = self.once(out, lambda: self.main("coin", out, flags))
            start, seconds = ["--ckpt", self.place / f"{out}.pt"], line["seconds"]
            budget = []  # its checkpoint says what is left of it
        flags = start + tuning + budget + of_method
        if judge == "test":
            line = self.once(f"{run}-test", lambda: self.on_test(method, run, flags))
            score = line[f"test_{self.metric()}"]
        else:
            line = self.once(f"{run}-val", lambda: dict(val=self.on_val(method, run, flags)))
            score = line["val"]
        (self.place / f"{run}.pt").unlink(missing_ok=True)  # its score is in the book
        return score, pretext_seconds, seconds + line["seconds"]


def cell(bench, row, rate, args):
    """Search on val with seed 0, then every seed once on test: its csv row."""
    tried = []
    for trial in trials_to_search(args.search).tolist():
        score, _, _ = bench.chain(row, rate, 0, trial, "val")
        tried.append((score, trial))
    _, trial = max(tried)
    scores, pretext, rest = [], [], []
    for seed in range(args.seeds):
        score, pretext_seconds, seconds = bench.chain(row, rate, seed, trial, "test")
        scores.append(score)
        pretext.append(pretext_seconds)
        rest.append(seconds)
    return dict(device=benches.device_name(args.device), row=name_of(row), labels=rate,
                metric=bench.metric(), seeds=args.seeds, mean=round(float(np.mean(scores)), 2),
                std=round(benches.spread_of(scores), 2),
                flags=" ".join(sum(flags_of(row, trial), [])),
                pretext_seconds=round(float(np.mean(pretext)), 1),
                seconds=round(float(np.mean(rest)), 1),
                scores=" ".join(f"{score:.2f}" for score in scores))


def scores_of(line):
    """{seed: score}"""
    return dict(enumerate(map(float, line["scores"].split())))


def mark(cells):
    """Adds what each row gains on the plain one, and which is the best of its column: the highest
    mean, if its gain on the runner-up leaves 0 out."""
    columns = {}
    for line in cells:
        columns.setdefault((line["device"], line["labels"]), []).append(line)
    for lines in columns.values():
        plain = {line["row"].split("-")[0]: line for line in lines
                 if line["row"].endswith("-finetune") and line["row"].count("-") == 1}
        for line in lines:
            line.update(gain="", gain_95="", best="")
            base = plain.get(line["row"].split("-")[0])
            if base is not None and base is not line:
                gain, half = benches.paired_gain(scores_of(line), scores_of(base))
                line.update(gain=round(gain, 2), gain_95="" if half is None else round(half, 2))
        first, *others = sorted(lines, key=lambda line: -line["mean"])
        if others:
            gain, half = benches.paired_gain(scores_of(first), scores_of(others[0]))
            first["best"] = half is not None and gain > half
    return cells


def draw(cells, path, title):
    """A panel for each label rate: a point per seed and the mean of each row, * where it is the
    best, and its gain on the plain row."""
    rates = [rate for rate in RATES if any(line["labels"] == rate for line in cells)]
    rows = sorted({line["row"] for line in cells}, key=NAMES.index)
    figure, axes = plt.subplots(1, len(rates), figsize=(2 + 5 * len(rates), 1 + 0.35 * len(rows)),
                                squeeze=False, sharey=True)
    for axis, rate in zip(axes[0], rates):
        for line in cells:
            if line["labels"] != rate:
                continue
            said = "* " if line["best"] is True else ""
            if line["gain"] != "":
                said += f"{line['gain']:+} +- {line['gain_95']}"
            benches.draw_row(axis, rows.index(line["row"]), list(scores_of(line).values()), said)
        axis.set(title="all labels" if rate == "all" else f"{rate} labels per class",
                 xlabel="test score, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    benches.save_figure(figure, path)


def enter(line, path):
    """The table in the file `path` with this row in its place, marked anew."""
    lines = benches.with_others([line], path, ("device", "row", "labels"))
    for line in lines:
        line.update(mean=float(line["mean"]), std=float(line["std"]))
    lines.sort(key=lambda line: (NAMES.index(line["row"]), list(RATES).index(line["labels"])))
    benches.write_table(mark(lines), path, FIELDS)
    return lines


def parse(argv):
    p = benches.parser(__doc__)
    p.add_argument("--quick", action="store_true",
                   help="six rows, 20 labels per class, 2 seeds, a search of 2, 12 pretext epochs")
    p.add_argument("--rows", default="", help="only rows with this in their name")
    p.add_argument("--labels", nargs="+", choices=RATES, help="label rates")
    p.add_argument("--seeds", type=int, help="default: 10, quick 2")
    p.add_argument("--search", type=int, help="trials; default: 6, quick 2")
    p.add_argument("--pretext", type=shlex.split, help="flags for simclr.py and byol.py; default: "
                   "--data doodles where the labels are of petals")
    p.add_argument("--stage", type=shlex.split, default=[], help="flags for bissl.py")
    p.add_argument("--pretext-epochs", type=int, help="default: 18, quick 12")
    p.add_argument("--epochs", type=int, help=f"with labels; default: {RATES}")
    args = p.parse_args(argv)
    defaults = dict(seeds=10, search=6, pretext_epochs=18, labels=list(RATES), pretext=[])
    if args.data == "petals":
        defaults["pretext"] = ["--data", "doodles"]
    args.name = benches.name_of_data(args.data)
    if args.quick:
        defaults.update(seeds=2, search=2, pretext_epochs=12, labels=["20"])
        args.name += "-quick"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.runs = args.runs or f"runs/accuracy-{args.name}"
    return args


def main(argv=None):
    args = parse(argv)
    bench, path = Bench(args), benches.RESULTS / f"accuracy-{args.name}.csv"
    title = (f"{args.name}: {args.pretext_epochs} pretext epochs, {args.seeds} seeds; right: gain "
             "on plain fine-tuning, * best of its column")
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
