"""What does each part of a method do? One thing varied at a time, all else at its default; judged
on val, test untouched.

    python tests/bench_ablation.py --ckpt simclr.pt                     every group, 3 seeds: hours
    python tests/bench_ablation.py --ckpt simclr.pt keys eta            these groups only

  alpha        COIN's share of the budget
  eta          Core-tuning's weight
  ingredients  Core-tuning without each of its three
  keys         Bi-tuning's K
  losses       Bi-tuning without each of its two losses
Each variant is trained from the same SimCLR checkpoint and fine-tuned with the same flags, --seeds
times: labelled images, views and heads differ. Each is fine-tuned with all --pairs of learning rate
and weight decay and has the best mean. A finished run is a line of RUNS/runs.jsonl and is not made
again. Writes tests/results/ablation-DATA.csv and one figure a group; with --name,
ablation-NAME.csv. bench_bissl.py has BiSSL's flags and controls.
"""
import contextlib
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import benches
import bi_tuning
import coin
import common
import core_tuning

FIELDS = ("device", "group", "variant", "value", "val", "std", "scores", "gain", "gain_std", "pair",
          "seconds", "stage_seconds", "knn")
SCRIPT = {"eta": "core_tuning", "ingredients": "core_tuning",
          "keys": "bi_tuning", "losses": "bi_tuning"}
FLAG = {"alpha": "--alpha", "eta": "--eta", "keys": "--keys"}
VALUES = {
    "alpha": (0, 0.1, 0.3, 0.5, 0.7, 0.9), "eta": (0, 0.1, 0.3, 1, 3, 10),
    "keys": (1, 4, 16, 40, 100), "losses": ("both", "no CCE", "no CCL", "neither", "fine-tuning"),
    "ingredients": ("all", "no hard positives", "no semi-hard negatives", "no focal weight",
                    "fine-tuning")}
BI_LOSSES = {"no CCE": ["contrastive_cross_entropy"], "no CCL": ["categorical_contrastive"],
             "neither": ["contrastive_cross_entropy", "categorical_contrastive"]}


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
    """Core-tuning or Bi-tuning with one part taken out, as a patch; None takes nothing."""
    hard_pairs = core_tuning.hard_pairs

    def pairs(f, y, classes, alpha):
        """hard_pairs(), with the images themselves in the place of what is left out."""
        f_pos, y_pos, f_neg, y_neg = hard_pairs(f, y, classes, alpha)
        own = F.one_hot(y, classes).to(f.dtype)
        if part == "no hard positives":
            return f, own, f_neg, y_neg
        return f_pos, y_pos, f, own

    if part in ("no hard positives", "no semi-hard negatives"):
        return mock.patch.object(core_tuning, "hard_pairs", pairs)
    if part == "no focal weight":
        return mock.patch.object(core_tuning, "focal_contrastive", unweighted_contrastive)
    if part in BI_LOSSES:
        return mock.patch.multiple(bi_tuning, **dict.fromkeys(BI_LOSSES[part], no_loss))
    return contextlib.nullcontext()


# ----------------------------------------------------------------------------------------- the runs

class Ablation:
    """The runs of all groups; equal ones, such as the default that stands in many groups, are made
    once."""

    def __init__(self, args):
        self.args, self.bench = args, benches.Bench(args)
        self.pairs = []
        for pair in args.pairs:
            lr, decay = pair.split(",")
            self.pairs.append(["--lr", lr, "--weight-decay", decay])
        self.labels = ["--fraction", 1]
        if args.labels:
            self.labels = ["--labels-per-class", args.labels]

    def default(self, group):
        """What the flag of a group is where nothing is varied."""
        script = {"alpha": coin, "eta": core_tuning, "keys": bi_tuning}[group]
        args = script.parser().parse_args(self.bench.flags("flags", ["--ckpt", self.args.ckpt]))
        return getattr(args, FLAG[group].strip("-").replace("-", "_"))

    def coin(self, seed, flags):
        """A run of coin.py from --ckpt: its checkpoint and its line in the book."""
        flags = [str(flag) for flag in flags]
        out = f"coin{''.join(flags)}-{seed}".replace("--", "-")
        start = ["--ckpt", self.args.ckpt, "--seed", seed]

        def make():
            return dict(knn=self.bench.main("coin", out, start + self.labels + flags)["knn"])

        return self.bench.place / f"{out}.pt", self.bench.once(out, make)

    def score(self, method, ckpt, seed, flags=(), part=None):
        """Score on val of a fine-tuning run, and its line in the book."""
        stem, flags = Path(ckpt).stem, [str(flag) for flag in flags]
        if not stem.startswith("coin"):  # which tells the epochs that are left
            flags = ["--epochs", str(self.args.epochs)] + flags
        name = f"{method}{part or ''}{''.join(flags)}-{seed}"
        out = f"{stem}-" + name.replace("--", "-").replace(" ", "_")
        argv = ["--ckpt", ckpt, "--seed", seed] + self.labels + flags

        def make():
            with without(part):
                return dict(val=self.bench.on_val(method, out, argv))

        return self.bench.once(out, make)

    def scores(self, method, ckpt, seed, flags=(), part=None):
        """score() with each of --pairs."""
        lines = []
        for pair in self.pairs:
            lines.append(self.score(method, ckpt, seed, pair + list(flags), part))
        return lines

    def run(self, group, value, seed):
        """Lines of the book: the stage before fine-tuning ({} without), and the fine-tuning runs,
        one for each of --pairs."""
        if value == "fine-tuning" or (group, value) == ("alpha", 0):
            return {}, self.scores("finetune", self.args.ckpt, seed)
        flags = []
        if group in FLAG and value != self.default(group):
            flags = [FLAG[group], value]
        if group == "alpha":  # its search begins before fine-tuning
            stages, lines = [], []
            for pair in self.pairs:
                budget = ["--epochs", self.args.epochs]
                ckpt, stage = self.coin(seed, budget + pair + flags)
                stages.append(stage)
                lines.append(self.score("finetune", ckpt, seed))
            return stages[0], lines
        part = value if group in ("ingredients", "losses") else None
        return {}, self.scores(SCRIPT[group], self.args.ckpt, seed, flags, part)

    def reference(self, group):
        """The variant that the others of a group are compared with: plain fine-tuning, all parts,
        or the flag's default."""
        if group in FLAG and group != "alpha":
            return self.default(group)
        return VALUES[group][0]

    def rows(self, group):
        """One row per variant: mean and standard deviation over the seeds of its best pair, and
        `gain` over the group's reference, seed by seed, on the same images."""
        rows, chosen = [], {}
        for value in VALUES[group]:
            stages, runs = [], []
            for seed in range(self.args.seeds):
                stage, lines = self.run(group, value, seed)
                stages.append(stage)
                runs.append(lines)
            scores = np.array([[line["val"] for line in lines] for lines in runs])  # (seeds, pairs)
            best = scores.mean(0).argmax()
            own = chosen[value] = scores[:, best]
            of_best = [lines[best] for lines in runs]
            rows.append(dict(
                group=group, variant=value, val=round(own.mean(), 2),
                std=round(benches.spread_of(own), 2),
                scores=" ".join(f"{s:.1f}" for s in own), pair=self.args.pairs[best],
                seconds=mean_of(of_best, "seconds"), stage_seconds=mean_of(stages, "seconds"),
                knn=mean_of(stages, "knn")))
            print("--- {group} {variant}: {val} +- {std} % on val".format(**rows[-1]), flush=True)
        reference = chosen[self.reference(group)]
        for row in rows:
            difference = chosen[row["variant"]] - reference
            row["gain"] = round(difference.mean(), 2)
            row["gain_std"] = round(benches.spread_of(difference), 2)
        return rows


def mean_of(lines, key):
    """Of lines of the book; nothing where the first has no such figure."""
    if lines[0].get(key) is None:
        return ""
    return round(float(np.mean([line[key] for line in lines])), 4)


# ------------------------------------------------------------------------------------ what came out

def draw_variants(axes, group, rows):
    """Bars of the means, and a line per seed: the same labelled images in all variants."""
    places = range(len(rows))
    axes.bar(places, [row["val"] for row in rows], yerr=[row["std"] for row in rows],
             color="lightsteelblue", capsize=3)
    scores = np.array([row["scores"].split() for row in rows], float)  # (variants, seeds)
    axes.plot(places, scores, marker=".", color="black", linewidth=0.5, alpha=0.6)
    is_flag = group in FLAG
    axes.set_xticks(places, [str(row["variant"]) for row in rows], rotation=0 if is_flag else 20)
    axes.set(xlabel=group if is_flag else "", ylabel="top-1 on val, %",
             ylim=(max(0, scores.min() - 5), None))


def draw(group, rows, path, title):
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    draw_variants(axes, group, rows)
    axes.set_title(f"{title}: {group}")
    benches.save_figure(figure, path)


def parse(argv):
    p = benches.parser(__doc__)
    p.add_argument("groups", nargs="*", help="alpha, eta, keys, ...; without: all")
    p.add_argument("--ckpt", required=True, help="a SimCLR checkpoint")
    p.add_argument("--name", help="of the results; default: that of the data")
    p.add_argument("--labels", type=int, default=20, help="labels per class; 0: all of train")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=60, help="of fine-tuning")
    p.add_argument("--pairs", nargs="+", default=["0.03,0.0005", "0.08,0.008"],
                   help="LR,WEIGHT_DECAY of fine-tuning")
    args = p.parse_args(argv)
    unknown = set(args.groups) - set(VALUES)
    if unknown:
        common.fail(f"no group {', '.join(unknown)}: there are {', '.join(VALUES)}")
    args.name = args.name or benches.name_of_data(args.data)
    args.runs = args.runs or f"runs/ablation-{args.name}"
    return args


def main(argv=None):
    args = parse(argv)
    ablation = Ablation(args)
    for group in args.groups or VALUES:
        rows = ablation.rows(group)
        for row in rows:
            row["device"] = benches.device_name(args.device)
        path = benches.RESULTS / f"ablation-{args.name}.csv"
        benches.replace_rows(rows, path, ("device", "group"), FIELDS)
        draw(group, rows, path.with_name(f"{path.stem}-{group}.png"), args.name)


if __name__ == "__main__":
    main()
