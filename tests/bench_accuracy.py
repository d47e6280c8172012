"""Do the papers' claims show up here, and which part of a method brings what? Chains of stages on
equal terms: same epochs, same search, several seeds, test once.

    python tests/bench_accuracy.py                   every chain, 20 labels per class, 10 seeds: a
                                                     day of one core
    python tests/bench_accuracy.py --labels 5 all --rows simclr-finetune simclr-bi_tuning
                                                     two columns of the table, and two of its rows
    python tests/bench_accuracy.py --quick           six rows, 2 seeds: 17 minutes of two cores
    python tests/bench_accuracy.py bissl             BiSSL beside all that could explain its gain
    python tests/bench_accuracy.py bissl --search 0  README's three commands, with their defaults
    python tests/bench_accuracy.py eta losses --judge val
                                                     one thing varied at a time
    python tests/bench_accuracy.py bissl --task detect --search 0
    python tests/bench_accuracy.py bissl --name probe --finetune=--freeze
                                                     linear probes: how the features fit the labels
    python tests/bench_accuracy.py --data EMOJI --name clipart-emoji --pretext "--data CLIPART"
    python tests/bench_accuracy.py --parts           how much of the spread comes from the pretext,
                                                     how much from the labels

A row is a chain of {scratch, simclr, byol} - {nothing, coin, bissl} - {finetune, core_tuning,
bi_tuning}, a column a label rate, a cell the mean over seeds of the whole chain: pretext weights,
views and the labelled images all differ from seed to seed, and are the same for all rows of a seed.
Groups of rows:
  methods      every chain
  bissl        simclr - bissl - finetune beside its controls:
    same steps          the pretext goes on for as many lower steps (lambda 0: theta never hears of
                        phi, and its head and optimiser are BiSSL's)
    same seconds        ... for as many seconds, by more lower steps per alternation
    J = I               the hypergradient leaves H out (damping 1e12)
    phi_B, halfway      BiSSL's other backbone as the result; theta + 0.5 (phi - theta)
    more epochs         as many more epochs of fine-tuning as BiSSL shows labelled images
    BiSSL, more epochs  the same after BiSSL
  ingredients  Core-tuning without each of its three
  losses       Bi-tuning without each of its two
  a flag       (alpha, temperature, eta, keys; lam, damping, ... of bissl.py) its values, all else
               at its default

  budget   In a column every row sees its labelled images equally often (EPOCHS). COIN's epochs are
           taken from fine-tuning; in `methods` BiSSL's are, too: those that warm up its head and
           those that its upper level goes through. `bissl_full` keeps the whole of fine-tuning
           beside them, as do the other groups. What BiSSL's lower level shows the pretext's images
           is in `methods` added to the pretext of the rows without it. What BiSSL's solves cost is
           not counted: the table has each row's seconds.
  search   Judged on val, of which nothing is ever trained on, by the mean over the first
           --search-seeds seeds: the scripts' own flags, and --search trials of learning rate,
           weight decay and the weight of the row's own method (WEIGHTS; where the row does not set
           it), log-uniform around the paper's value. All rows have as many trials. --rates tries
           learning rates alone, and --search 0 keeps the scripts' own flags. `all` labels means
           all of train.
  test     One look for each seed, after its last epoch; --judge val leaves test alone.
  gain     on the plain row (same pretext, fine-tuning alone), seed by seed, and half of its 95 %
           interval (t over the seeds). In `lead` the best row of the column, in the group bissl
           BiSSL, is compared with this row: the best is the best where the runner-up's lead leaves
           0 out.
Each finished run is a line of RUNS/runs.jsonl and is not made again: stop and start the bench as
you like, and share rows or label rates out among several of it; give other flags for the stages
another --name. Writes tests/results/GROUP-NAME.csv and .png.
"""
import contextlib
import itertools
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import benches
import bi_tuning
import bissl
import common
import core_tuning
import finetune
import simclr

# Labelled images per class, and how many epochs a row sees them.
EPOCHS = {"all": 40, "100": 40, "20": 120, "10": 180, "5": 300}
# The weight that a stage or a method has of its own: its flag, and the range that is searched. The
# papers have an alpha of 0.7, a lambda of 0.001, eta from 0.1 to 10, a gamma_cl of 1.
WEIGHTS = {"coin": ("--alpha", 0.07, 0.9), "bissl": ("--lam", 0.001, 1),
           "core_tuning": ("--eta", 0.1, 10), "bi_tuning": ("--gamma", 0.1, 10)}
RANGES = {"--lr": (0.003, 0.3), "--weight-decay": (1e-5, 1e-2)}
# The flags that have a group each: the script, and the values.
FLAGS = {"alpha": ("coin", (0.1, 0.3, 0.5, 0.7, 0.9)), "temperature": ("coin", (0.1, 0.3)),
         "eta": ("core_tuning", (0, 0.1, 0.3, 1, 3, 10)),
         "keys": ("bi_tuning", (1, 4, 16, 40, 100)),
         "lam": ("bissl", (0.001, 0.01, 0.1, 0.3, 1, 3, 10)),
         "damping": ("bissl", (1, 10, 100, 300)), "upper-steps": ("bissl", (1, 2, 4, 8)),
         "alternations": ("bissl", (5, 10, 20, 40, 100)), "hessian-batch": ("bissl", (8, 32, 128)),
         "lr": ("bissl", (0.003, 0.01, 0.03, 0.1))}
LEFT_OUT = {
    "ingredients": ("core_tuning", ("hard positives", "semi-hard negatives", "focal weight")),
    "losses": ("bi_tuning", ("CCE", "CCL", "CCE and no CCL"))}
PRETEXT_GOES_ON = ("--lam", 0, "--upper-steps", 1, "--cg-steps", 1)
FIELDS = ("device", "labels", "row", "epochs", "tuning", "judge", "metric", "seeds", "mean", "std",
          "gain", "gain_95", "lead", "lead_95", "flags", "pretext_seconds", "seconds", "scores")
COLUMN = ("device", "metric", "labels", "epochs", "tuning", "judge")


# ----------------------------------------------------------------------------------------- the rows

@dataclass(frozen=True)
class Row:
    name: str
    plain: str  # the row that it gains on
    pretext: str = "simclr"  # or byol, scratch
    stage: str = ""  # or coin, bissl
    method: str = "finetune"  # or core_tuning, bi_tuning
    stage_flags: tuple = ()
    flags: tuple = ()  # of the method
    without: str = ""  # the part of the method that is left out
    keep: float = 0  # c of theta + c (phi - theta), which fine-tuning starts from
    labelled: int = 0  # how often BiSSL's labelled epochs are added to fine-tuning's: -1, 0 or 1
    longer: bool = False  # BiSSL's pretext epochs are added to the pretext's


def every_chain():
    rows = []
    for pretext in ("scratch", "simclr", "byol"):
        chains = [("", method) for method in ("finetune", "core_tuning", "bi_tuning")]
        chains.append(("coin", "finetune"))  # COIN's second stage is finetune.py with --eta
        if pretext != "scratch":  # BiSSL is a second stage of a pretext
            chains += [("bissl_full", "finetune"), ("bissl", "finetune"), ("bissl", "core_tuning"),
                       ("bissl", "bi_tuning")]
        for stage, method in chains:
            name = "-".join(part for part in (pretext, stage, method) if part)
            after_bissl = stage.startswith("bissl")
            rows.append(Row(name, f"{pretext}-finetune", pretext, stage.removesuffix("_full"),
                            method, labelled=-1 if stage == "bissl" else 0, longer=not after_bissl))
    return rows


def bissl_and_its_controls():
    plain = Row("SimCLR", "SimCLR")
    whole = replace(plain, name="BiSSL", stage="bissl")
    goes_on = replace(whole, name="same steps", stage_flags=PRETEXT_GOES_ON)
    return [
        replace(plain, name="scratch", pretext="scratch"),
        plain,
        goes_on,
        replace(goes_on, name="same seconds"),  # its lower steps follow from what BiSSL took
        replace(whole, name="J = I", stage_flags=("--damping", 1e12, "--cg-steps", 1)),
        whole,
        replace(whole, name="phi_B", keep=1),
        replace(whole, name="halfway", keep=0.5),
        replace(plain, name="more epochs", labelled=1),
        replace(whole, name="BiSSL, more epochs", labelled=1)]


def one_thing_varied(group):
    """Plain fine-tuning, and the values of a flag or the parts that are left out."""
    plain = Row("SimCLR", "SimCLR")
    if group in LEFT_OUT:
        method, parts = LEFT_OUT[group]
        whole = replace(plain, name=method, method=method)
        return [plain, whole, *(replace(whole, name=f"no {part}", without=part) for part in parts)]
    script, values = FLAGS[group]
    rows = [plain]
    for value in values:
        row, flag = replace(plain, name=f"{group} {value:g}"), (f"--{group}", value)
        if script in ("coin", "bissl"):
            rows.append(replace(row, stage=script, stage_flags=flag))
        else:
            rows.append(replace(row, method=script, flags=flag))
    return rows


def rows_of(group):
    if group == "methods":
        return every_chain()
    if group == "bissl":
        return bissl_and_its_controls()
    return one_thing_varied(group)


GROUPS = ("methods", "bissl", *LEFT_OUT, *FLAGS)
QUICK_ROWS = ("scratch-finetune", "simclr-finetune", "simclr-core_tuning", "simclr-bi_tuning",
              "simclr-coin-finetune", "simclr-bissl-finetune")


# --------------------------------------------------------------------- methods with a part left out

def unweighted_contrastive(z, positives, temperature):
    """core_tuning.focal_contrastive() without its factor 1 - p_ij."""
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_p = similarity.log_softmax(1).masked_fill(~positives, 0)
    number = positives.sum(1)
    return -(log_p.sum(1) / number.clamp(min=1)).sum() / (number > 0).sum().clamp(min=1)


def no_loss(*ignored, **named):
    return torch.zeros(())


def without(part):
    """Core-tuning or Bi-tuning with a part of LEFT_OUT taken out, as a patch; "" takes nothing."""
    hard_pairs = core_tuning.hard_pairs

    def pairs(f, y, classes, alpha):
        """hard_pairs(), with the images themselves in the place of what is left out."""
        f_pos, y_pos, f_neg, y_neg = hard_pairs(f, y, classes, alpha)
        own = F.one_hot(y, classes).to(f.dtype)
        if part == "hard positives":
            return f, own, f_neg, y_neg
        return f_pos, y_pos, f, own

    losses = {"CCE": "contrastive_cross_entropy", "CCL": "categorical_contrastive"}
    if part in ("hard positives", "semi-hard negatives"):
        return mock.patch.object(core_tuning, "hard_pairs", pairs)
    if part == "focal weight":
        return mock.patch.object(core_tuning, "focal_contrastive", unweighted_contrastive)
    left_out = [function for name, function in losses.items() if name in part]
    if left_out:
        return mock.patch.multiple(bi_tuning, **dict.fromkeys(left_out, no_loss))
    return contextlib.nullcontext()


# --------------------------------------------------------------------------------------- the search

class Trial(NamedTuple):
    """Flags that the search tries: of the labelled epochs, of the stage before them, and of the
    method."""
    tuning: list
    stage: list
    method: list


def trials_to_search(count):
    """Shares (count, 4) of the ranges of learning rate, weight decay, the stage's weight and the
    method's: each of `count` equal parts of a range has one trial (a Latin square), since few draws
    that fall where they like leave the good part out."""
    rng = np.random.default_rng(0)
    parts = np.stack([rng.permutation(count) for _ in range(4)], 1)
    return (parts + rng.random((count, 4))) / count


def log_uniform(low, high, share):
    """The value at this share of a range, as text."""
    return f"{low * (high / low) ** share:.3g}"


def weight_of(script, fixed, share):
    """Flags for a script's own weight; none where it has none or the row sets it."""
    if script not in WEIGHTS or WEIGHTS[script][0] in fixed:
        return []
    flag, low, high = WEIGHTS[script]
    return [flag, log_uniform(low, high, share)]


def trial_of(row, shares):
    tuning = []
    for (flag, (low, high)), share in zip(RANGES.items(), shares):
        tuning += [flag, log_uniform(low, high, share)]
    return Trial(tuning, weight_of(row.stage, row.stage_flags, shares[2]),
                 weight_of(row.method, row.flags, shares[3]))


def trials(args, row):
    """What the row's search tries."""
    if args.rates:
        return [Trial(["--lr", rate], [], []) for rate in args.rates]
    own = Trial([], [], [])  # the scripts' own flags
    return [own, *(trial_of(row, shares) for shares in trials_to_search(args.search).tolist())]


def best_trial(chains, row, tried):
    """The trial with the highest mean on val; a single one needs no run."""
    if len(tried) == 1:
        return tried[0]
    means = []
    for trial in tried:
        means.append(np.mean([chain.score(row, trial, "val").score for chain in chains]))
    return tried[int(np.argmax(means))]


# --------------------------------------------------------------------------------------- the chains

class Scored(NamedTuple):
    score: float  # in per cent
    pretext_seconds: float
    seconds: float  # of all that follows


def as_name(flags):
    text = "".join(str(flag) for flag in flags)
    return text.replace("--", "-").replace("/", "_").replace(" ", "_")


def name_of(start):
    """Of the checkpoint that a stage starts from."""
    return start[1].stem if start else "scratch"


class Chain:
    """The runs of one seed, each made once."""

    def __init__(self, bench, seed, rate):
        self.bench, self.args, self.seed, self.rate = bench, bench.args, seed, rate
        subset = ["--fraction", 1] if rate == "all" else ["--labels-per-class", rate]
        self.labels, self.which = ["--seed", seed, *subset], rate  # which: in the names of runs
        if self.args.task != "classify":
            self.labels += ["--task", self.args.task]
            self.which = f"{self.args.task}-{rate}"

    def bissl_args(self, flags=()):
        flags = self.bench.flags([*self.labels, *self.args.stage, *flags])
        return bissl.parser().parse_args(flags)

    def lower_epochs(self):
        """Epochs of the pretext's images that BiSSL's lower level goes through."""
        stage = self.bissl_args()
        pretext = simclr.parser().parse_args(self.bench.flags(self.args.pretext))
        seen = stage.alternations * stage.lower_steps * stage.pretext_batch_size
        return round(seen / len(common.load_data(pretext, "unlabeled")))

    def pretext(self, row):
        """The flag that starts from the pretext's checkpoint (none for scratch), and its
        seconds."""
        if row.pretext == "scratch":
            return [], 0.0
        epochs = self.args.pretext_epochs + (self.lower_epochs() if row.longer else 0)
        out = f"{row.pretext}-{self.seed}-{epochs}"
        flags = [*self.args.pretext, "--seed", self.seed, "--epochs", epochs]
        main = self.bench.main
        line = self.bench.once(out, lambda: dict(knn=main(row.pretext, out, flags)["knn"]))
        return ["--ckpt", self.bench.place / f"{out}.pt"], line["seconds"]

    def epochs(self, row, stage_flags=()):
        """Of fine-tuning, COIN's among them."""
        if self.args.epochs:
            epochs = self.args.epochs
        elif self.args.task == "classify":
            epochs = EPOCHS[self.rate]
        else:
            flags = self.bench.flags(self.labels)
            epochs = benches.SCRIPTS[row.method].parser().parse_args(flags).epochs
        if row.labelled:
            shown = benches.bissl_epochs(self.bissl_args(stage_flags), self.seed)
            epochs += row.labelled * shown
        return max(1, epochs)

    def bissl(self, row, start, flags):
        """A run of bissl.py, the same for all methods and budgets: its checkpoint and its line in
        the book."""
        flags = [*row.stage_flags, *flags]
        if self.bissl_args(flags) == self.bissl_args():
            flags = []  # a flag with its default is no run of its own
        out = f"bissl-{name_of(start)}-{self.which}-{self.seed}{as_name(flags)}"

        def make():
            last = self.bench.main("bissl", out, [*start, *self.labels, *self.args.stage, *flags])
            kept = ("lower", "upper_theta", "upper_phi", "knn", "knn_phi", "residual", "follow",
                    "distance")
            return {key: last.get(key) for key in kept}

        return self.bench.place / f"{out}.pt", self.bench.once(out, make)

    def as_many_seconds(self, row, start):
        """Flags with which the pretext goes on for as long as BiSSL takes."""
        whole = self.bissl(replace(row, stage_flags=()), start, [])[1]
        few = self.bissl(row, start, [])[1]
        # What a run takes whatever its steps:
        none = self.bissl(row, start, ["--lower-steps", 1])[1]
        of_steps = max(0.1, few["seconds"] - none["seconds"])
        share = (whole["seconds"] - none["seconds"]) / of_steps
        return ["--lower-steps", 1 + round((self.bissl_args().lower_steps - 1) * share)]

    def name(self, row, trial, start, stage_flags, epochs, labels_of):
        """Of a run's line in the book: all that it depends on."""
        chain = f"{name_of(start)}-{row.stage}{as_name([*row.stage_flags, *stage_flags])}"
        own = as_name([*row.flags, *trial.tuning, *trial.method, *self.args.finetune, row.without])
        name = f"{chain}-{row.keep:g}-{row.method}-{self.which}-{self.seed}-{epochs}{own}"
        if labels_of is not self:
            name += f"-labels{labels_of.seed}"
        return name

    def stage(self, row, start, stage_flags, shared, run):
        """What the method starts from, as flags, and the seconds of the row's stage. shared: the
        flags that coin.py has in common with the method; run: its name."""
        if row.stage == "bissl":
            path, line = self.bissl(row, start, stage_flags)
        elif row.stage == "coin":
            out, flags = f"coin-{run}", [*start, *shared, *row.stage_flags, *stage_flags]
            line = self.bench.once(out, lambda: self.bench.main("coin", out, flags))
            path = self.bench.place / f"{out}.pt"
        else:
            return start, 0.0
        return ["--ckpt", path], line["seconds"]

    def score(self, row, trial, judge, labels_of=None):
        """One run of a row from its pretext checkpoint to its score on `judge`, val or test.
        labels_of: another chain, whose labels and draws fine-tuning has."""
        bench, labels_of = self.bench, labels_of or self
        start, pretext_seconds = self.pretext(row)
        stage_flags, epochs = trial.stage, self.epochs(row, trial.stage)
        if row.name == "same seconds":
            stage_flags = self.as_many_seconds(row, start)
        run = self.name(row, trial, start, stage_flags, epochs, labels_of)
        shared = [*trial.tuning, *labels_of.labels, "--epochs", epochs]
        start, stage_seconds = self.stage(row, start, stage_flags, shared, run)
        flags = [*shared, *row.flags, *trial.method, *self.args.finetune]

        def make():
            ckpt = start
            if row.keep:
                ckpt = ["--ckpt", mixture(start[1], row.keep)]
            with without(row.without):
                if judge == "test":
                    return bench.on_test(row.method, run, [*ckpt, *flags])
                return dict(val=bench.on_val(row.method, run, [*ckpt, *flags]))

        line = bench.once(f"{run}-{judge}", make)
        (bench.place / f"{run}.pt").unlink(missing_ok=True)  # its score is in the book
        score = line["val"] if judge == "val" else line[f"test_{bench.metric()}"]
        return Scored(score, pretext_seconds, stage_seconds + line["seconds"])


def mixture(path, c):
    """The checkpoint of a run of bissl.py with theta + c (phi - theta) for its backbone."""
    ckpt = torch.load(path, weights_only=True)
    theta, phi = ckpt["backbone"], ckpt["resume"]["upper_backbone"]
    for name, value in theta.items():
        if value.is_floating_point():
            theta[name] = value + c * (phi[name] - value)
    mixed = path.with_name(f"{path.stem}-mixed{c:g}.pt")
    torch.save(ckpt, mixed)
    return mixed


# --------------------------------------------------------------------------------------- the tables

def cell(bench, row, rate):
    """Search on val, then every seed once on the judge: the row of the table."""
    args = bench.args
    chains = [Chain(bench, seed, rate) for seed in args.seeds]
    trial = best_trial(chains[:args.search_seeds], row, trials(args, row))
    runs = [chain.score(row, trial, args.judge) for chain in chains]
    scores = [run.score for run in runs]
    tuning = f"--search {args.search}"
    if args.rates:
        tuning = "--rates " + " ".join(f"{rate:g}" for rate in args.rates)
    return dict(device=benches.device_name(args.device), row=row.name, labels=rate, tuning=tuning,
                epochs=chains[0].epochs(replace(row, labelled=0)), judge=args.judge,
                metric=bench.metric(), seeds=len(scores), mean=round(float(np.mean(scores)), 2),
                std=round(benches.spread_of(scores), 2),
                flags=" ".join(str(flag) for flag in sum(trial, [])),
                pretext_seconds=round(float(np.mean([run.pretext_seconds for run in runs])), 1),
                seconds=round(float(np.mean([run.seconds for run in runs])), 1),
                scores=" ".join(f"{chain.seed}:{score:.2f}"
                                for chain, score in zip(chains, scores)))


def scores_of(line):
    """{seed: score}"""
    pairs = [text.split(":") for text in line["scores"].split()]
    return {int(seed): float(score) for seed, score in pairs}


def columns_of(lines):
    columns = {}
    for line in lines:
        columns.setdefault(tuple(str(line[name]) for name in COLUMN), []).append(line)
    return columns


def set_gain(line, name, one, other):
    """Enter what the row `one` gains on the row `other`; nothing where one is not there, both are
    the same, or they have no seed in common."""
    line[name] = line[f"{name}_95"] = ""
    if other is None or one is other:
        return
    scores, others = scores_of(one), scores_of(other)
    if not scores.keys() & others.keys():
        return
    gain, half = benches.paired_gain(scores, others)
    line[name] = round(gain, 2) + 0.0  # never -0.0
    line[f"{name}_95"] = "" if half is None else round(half, 2)


def mark(lines, rows):
    """Adds what each row gains on its plain one, and what its column's best row, or BiSSL among its
    controls, gains on it."""
    plain = {row.name: row.plain for row in rows}
    for column in columns_of(lines).values():
        by_name = {line["row"]: line for line in column}
        best = max(column, key=lambda line: float(line["mean"]))
        best = by_name.get("BiSSL", best)
        for line in column:
            set_gain(line, "gain", line, by_name.get(plain[line["row"]]))
            set_gain(line, "lead", best, line)
    return lines


def draw(lines, rows, path):
    """A panel for each column: a point per seed and the mean of each row; beside it what it gains
    on the plain row, in the group bissl what BiSSL gains on it."""
    columns = columns_of(lines)
    names = [row.name for row in rows if any(line["row"] == row.name for line in lines)]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(2 + 5 * len(columns), 1 + 0.35 * len(names)), squeeze=False,
        sharey=True)
    said = "lead" if "BiSSL" in names else "gain"
    for axis, (column, of_column) in zip(axes[0], columns.items()):
        for line in of_column:
            text = ""
            if line[said] != "":
                text = f"{float(line[said]):+.1f}"
            if line[f"{said}_95"] != "":
                text += f" +- {float(line[f'{said}_95']):.1f}"
            benches.draw_row(axis, names.index(line["row"]), list(scores_of(line).values()), text)
        _, _, labels, epochs, tuning, judge = column
        labels = "all labels" if labels == "all" else f"{labels} labels per class"
        axis.set(title=f"{labels}, {epochs} epochs, {tuning}", xlabel=f"score on {judge}, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    of = dict(lead="what BiSSL gains on the row", gain="what it gains on the plain row")
    figure.suptitle(f"{path.stem}; right: {of[said]}, and its 95 % interval")
    figure.tight_layout()
    benches.save_figure(figure, path.with_suffix(".png"))


def enter(line, path, rows):
    """Put this row into the table of the file, and mark the whole anew: all its rows that the
    group still has."""
    names, rates = [row.name for row in rows], list(EPOCHS)
    lines = benches.with_others([line], path, ("row", *COLUMN))
    lines = [line for line in lines if line["row"] in names]
    lines.sort(key=lambda line: (rates.index(line["labels"]), str(line["epochs"]), line["tuning"],
                                 names.index(line["row"])))
    benches.write_table(mark(lines, rows), path, FIELDS)
    return lines


def parts_of_variance(scores):
    """Standard deviations that the pretext, the labels and all else bring to scores (P, L), one of
    each pretext with each set of labels: a random effect for each, by their mean squares."""
    scores = np.asarray(scores, float)
    pretexts, sets = scores.shape
    by_pretext = scores.mean(1, keepdims=True) - scores.mean()
    by_labels = scores.mean(0, keepdims=True) - scores.mean()
    rest = scores - scores.mean() - by_pretext - by_labels
    square = (rest ** 2).sum() / ((pretexts - 1) * (sets - 1))
    of_pretext = (by_pretext ** 2).sum() / (pretexts - 1) - square / sets
    of_labels = (by_labels ** 2).sum() / (sets - 1) - square / pretexts
    return np.sqrt(np.maximum([of_pretext, of_labels, square], 0))


def say_parts(bench, rate):
    """SimCLR of each seed, with the labels and draws of each seed, judged on val."""
    row, trial = Row("SimCLR", "SimCLR"), Trial([], [], [])
    chains, scores = [Chain(bench, seed, rate) for seed in bench.args.seeds], []
    for chain in chains:
        scores.append([chain.score(row, trial, "val", other).score for other in chains])
    names = "pretexts", "sets of labels and their order", "what neither explains"
    for name, deviation in zip(names, parts_of_variance(scores)):
        print(f"standard deviation over {name}: {deviation:.1f} points")


# --------------------------------------------------------------------------------------------- main

def parse(argv):
    p = benches.parser(__doc__)
    p.add_argument("--quick", action="store_true", help="six rows of methods, 2 seeds, a "
                   "search of 1, 6 pretext epochs")
    p.add_argument("--name", help="of the results and the runs; default: that of the data")
    p.add_argument("--rows", nargs="+", help="these rows of the groups")
    p.add_argument("--labels", nargs="+", choices=EPOCHS, help="per class, or all of them; "
                   "default: 20, behind --task 100")
    p.add_argument("--task", default="classify", choices=finetune.TASKS)
    p.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 9, quick 0 1")
    p.add_argument("--search", type=int, help="trials beside the scripts' own flags; default: 6, "
                   "quick 1")
    p.add_argument("--rates", type=float, nargs="+", default=[], help="learning rates to search")
    p.add_argument("--search-seeds", type=int, default=1, metavar="N",
                   help="the search is judged by the mean over so many seeds; default: 1")
    p.add_argument("--judge", default="test", choices=("test", "val"))
    p.add_argument("--pretext", type=shlex.split, help="flags for simclr.py and byol.py; default: "
                   "--data doodles where the labels are of petals")
    p.add_argument("--stage", type=shlex.split, default=[], help="flags for bissl.py")
    p.add_argument("--finetune", type=shlex.split, default=[], help="flags for the method")
    p.add_argument("--pretext-epochs", type=int, help="default: 12, quick 6")
    p.add_argument("--epochs", type=int, help=f"with labels; default: {EPOCHS} by label rate, for "
                   "other tasks the script's own")
    p.add_argument("--parts", action="store_true", help="the parts of the spread, on val; printed")
    args = benches.parse_groups(p, argv, GROUPS, default=["methods"])
    if (args.pretext or args.stage or args.finetune) and not args.name:  # else they replace rows
        p.error("--pretext, --stage and --finetune lead to another table: give it a --name")
    defaults = dict(seeds=list(range(10)), search=6, pretext_epochs=12, labels=["20"],
                    pretext=["--data", "doodles"] if args.data == "petals" else [],
                    name=benches.name_of_data(args.data))
    if args.task != "classify":
        defaults.update(labels=["100"])
    if args.quick:
        defaults.update(seeds=[0, 1], search=1, pretext_epochs=6, rows=QUICK_ROWS,
                        name=f"{defaults['name']}-quick")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    known = [row.name for group in args.groups for row in rows_of(group)]
    for name in args.rows or ():
        if name not in known:
            p.error(f"no row {name}: there are {', '.join(known)}")
    args.runs = args.runs or f"runs/accuracy-{args.name}"
    return args


def quick_in_two(argv):
    """--quick in two processes of a thread each, since networks this small gain nothing from a
    second thread: the last row, BiSSL's, takes nearly as long as the others together."""
    one_thread, running = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    for rows in (QUICK_ROWS[:-1], QUICK_ROWS[-1:]):
        command = [sys.executable, __file__, *argv, "--rows", *rows]
        running.append(subprocess.Popen(command, env=one_thread))
    codes = [half.wait() for half in running]  # both end before one is judged
    if any(codes):
        common.fail("--quick has not finished: start it once more, and it goes on")


def load_everything(bench):
    """Draw or decode all images before the first stage is timed."""
    args = finetune.parser().parse_args(bench.flags(bench.args.finetune))
    for split in ("train", "val", "test"):
        common.load_data(args, split)
    args = simclr.parser().parse_args(bench.flags(bench.args.pretext))
    common.load_data(args, "unlabeled")


def main(argv=None):
    args = parse(argv)
    if args.rows is QUICK_ROWS:  # else --rows were given, as each of the two processes has them
        return quick_in_two(sys.argv[1:] if argv is None else argv)
    bench = benches.Bench(args)
    load_everything(bench)
    if args.parts:
        return say_parts(bench, args.labels[0])
    for group in args.groups:
        rows, path = rows_of(group), benches.RESULTS / f"{group}-{args.name}.csv"
        asked = [row for row in rows if not args.rows or row.name in args.rows]
        for rate, row in itertools.product(args.labels, asked):
            line = cell(bench, row, rate)
            print(f"--- {row.name}, {rate} labels per class: {line['metric']} {line['mean']} +- "
                  f"{line['std']} %", flush=True)
            lines = enter(line, path, rows)
        if asked:
            draw([other for other in lines if other["device"] == line["device"]], rows, path)


if __name__ == "__main__":
    main()
