"""What does each part of a method do? One thing varied at a time, all else at its default; judged
on val, test untouched.

    python tests/bench_ablation.py --ckpt simclr.pt                     every group, 3 seeds: hours
    python tests/bench_ablation.py --ckpt simclr.pt keys eta            these groups only

  alpha        COIN's share of the budget
  eta          Core-tuning's weight
  ingredients  Core-tuning without each of its three
  keys         Bi-tuning's keys per class
  losses       Bi-tuning without each of its two losses
Each variant is trained from the same checkpoint with each of --pairs of learning rate and weight
decay, --seeds times (labelled images, views and heads differ), and has the pair with the best mean.
A gain is on plain fine-tuning, seed by seed, with its 95 % interval. A finished run is a line of
RUNS/runs.jsonl and is not made again: give another --name for another --ckpt, --labels or --epochs.
Writes tests/results/ablation-NAME.csv and a figure for each group. bench_bissl.py has BiSSL's flags
and controls.
"""
import contextlib
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import benches
import bi_tuning
import core_tuning

FIELDS = ("device", "group", "variant", "val", "std", "gain", "gain_95", "pair", "scores")
BI_LOSSES = {"no CCE": ["contrastive_cross_entropy"], "no CCL": ["categorical_contrastive"],
             "neither": ["contrastive_cross_entropy", "categorical_contrastive"]}
PLAIN, WHOLE = "fine-tuning", ("all", "both")
# The script of each group, and its variants: values of a flag, or what is left out.
GROUPS = {
    "alpha": ("coin", "--alpha", (0.1, 0.3, 0.5, 0.7, 0.9)),
    "eta": ("core_tuning", "--eta", (0, 0.1, 0.3, 1, 3, 10)),
    "ingredients": ("core_tuning", None, ("all", "no hard positives", "no semi-hard negatives",
                                          "no focal weight")),
    "keys": ("bi_tuning", "--keys", (1, 4, 16, 40, 100)),
    "losses": ("bi_tuning", None, ("both", "no CCE", "no CCL", "neither"))}


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

def score(bench, group, variant, seed, pair):
    """Score on val in per cent of a variant, fine-tuned with this learning rate and weight
    decay."""
    args, (script, flag, _) = bench.args, GROUPS[group]
    lr, decay = pair.split(",")
    labels = ["--labels-per-class", args.labels] if args.labels else ["--fraction", 1]
    budget = ["--epochs", args.epochs, "--lr", lr, "--weight-decay", decay, "--seed", seed]
    start, flags, part = ["--ckpt", args.ckpt], [], None
    if variant == PLAIN:
        script = "finetune"
    elif variant in WHOLE or variant == default_of(script, flag):
        variant = "default"  # in several groups, and made once
    elif flag:
        flags = [flag, variant]
    else:
        part = variant
    name = f"{script}-{variant}-{pair}-{seed}".replace(" ", "_")
    if script == "coin":
        bench.once(name, lambda: bench.main("coin", name, start + budget + labels + flags))
        # Its checkpoint says which epochs and which rates are left.
        script, start, flags = "finetune", ["--ckpt", bench.place / f"{name}.pt"], []
        budget = ["--seed", seed]

    def make():
        with without(part):
            return dict(val=bench.on_val(script, name, start + budget + labels + flags))

    return bench.once(f"{name}-val", make)["val"]


def default_of(script, flag):
    """What the script has where the flag is not given; None without a flag."""
    return flag and benches.SCRIPTS[script].parser().get_default(flag.strip("-"))


def rows_of(bench, group):
    """One row for each variant: mean and standard deviation over the seeds of its best pair."""
    rows, args = [], bench.args
    for variant in (PLAIN, *GROUPS[group][2]):
        found = {}
        for pair in args.pairs:
            found[pair] = [score(bench, group, variant, seed, pair) for seed in range(args.seeds)]
        pair = max(found, key=lambda pair: np.mean(found[pair]))
        own = dict(enumerate(found[pair]))
        row = dict(device=benches.device_name(args.device), group=group, variant=variant, pair=pair,
                   val=round(float(np.mean(found[pair])), 2),
                   std=round(benches.spread_of(found[pair]), 2),
                   scores=" ".join(f"{value:.1f}" for value in own.values()))
        if variant == PLAIN:
            plain = own
        else:
            gain, half = benches.paired_gain(own, plain)
            row.update(gain=round(gain, 2), gain_95="" if half is None else round(half, 2))
        rows.append(row)
        print("--- {group} {variant}: {val} +- {std} % on val".format(**row), flush=True)
    return rows


def draw(rows, path, title):
    """A point per seed and the mean, a line per variant; its gain stands beside it."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(rows)))
    for place, row in enumerate(rows):
        said = f"{row['gain']} +- {row['gain_95']}" if row.get("gain_95") else ""
        benches.draw_row(axes, place, np.array(row["scores"].split(), float), said)
    axes.set_yticks(range(len(rows)), [str(row["variant"]) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="score on val, %; right: gain on plain fine-tuning", title=title)
    axes.grid(axis="x", alpha=0.3)
    benches.save_figure(figure, path)


def parse(argv):
    p = benches.parser(__doc__)
    p.add_argument("--ckpt", required=True, help="a SimCLR checkpoint")
    p.add_argument("--name", help="of the results; default: that of the data")
    p.add_argument("--labels", type=int, default=20, help="labels per class; 0: all of train")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=60, help="of fine-tuning")
    p.add_argument("--pairs", nargs="+", default=["0.03,0.0005", "0.08,0.008"],
                   help="LR,WEIGHT_DECAY of fine-tuning")
    args = benches.parse_groups(p, argv, GROUPS)
    args.name = args.name or benches.name_of_data(args.data)
    args.runs = args.runs or f"runs/ablation-{args.name}"
    return args


def main(argv=None):
    args = parse(argv)
    bench, path = benches.Bench(args), benches.RESULTS / f"ablation-{args.name}.csv"
    for group in args.groups:
        rows = rows_of(bench, group)
        benches.replace_rows(rows, path, ("device", "group"), FIELDS)
        draw(rows, path.with_name(f"{path.stem}-{group}.png"), f"{args.name}: {group}")


if __name__ == "__main__":
    main()
