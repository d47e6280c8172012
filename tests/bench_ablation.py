"""What does each part of a method do? One thing varied at a time, all else at its default; judged on val, test untouched.

    python tests/bench_ablation.py --data petals --ckpt simclr.pt               every group, 3 seeds: hours on a CPU
    python tests/bench_ablation.py --data petals --ckpt simclr.pt residual eta  these groups only

  residual   ||v - A x|| / ||v|| of plain and layer-wise conjugate gradients against steps, for several dampings (one batch)
  controls   what BiSSL has to beat: nothing; the pretext continued for as many steps, and for as many seconds; lambda 0; J = I
  N_L N_U lam damping cg_steps layerwise   BiSSL's own flags
  alpha      COIN's share of the budget      eta  Core-tuning's weight        ingredients  Core-tuning without each of its three
  keys       Bi-tuning's K                   losses  Bi-tuning without each of its two losses
Each variant is trained from the same SimCLR checkpoint and fine-tuned with the same flags, --seeds times: labelled images,
views and heads differ. A finished run is a line of RUNS/runs.jsonl and is not made again. Writes
tests/results/ablation-DATA.csv and one figure a group.
"""
import argparse
import contextlib
import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import bi_tuning
import bissl
import common
import core_tuning
from bench_accuracy import Bench
from bench_speed import device_name

RESULTS = Path(__file__).resolve().parent / "results"
FLAG = {"N_L": "--lower-steps", "N_U": "--upper-steps", "lam": "--lam", "damping": "--damping", "cg_steps": "--cg-steps",
        "alpha": "--alpha", "eta": "--eta", "keys": "--keys"}
VALUES = {"N_L": (5, 10, 20, 40), "N_U": (1, 2, 4, 8), "lam": (0, 0.001, 0.01, 0.1, 1), "damping": (1, 10, 100, 1000),
          "cg_steps": (1, 2, 5, 10), "layerwise": ("plain", "layer-wise"), "alpha": (0.1, 0.3, 0.5, 0.7, 0.9),
          "eta": (0, 0.1, 0.3, 1, 3, 10),
          "ingredients": ("all", "no hard positives", "no semi-hard negatives", "no focal weight"),
          "keys": (1, 4, 16, 40, 100), "losses": ("both", "no CCE", "no CCL", "neither"),
          "controls": ("nothing", "bissl", "same steps of the pretext", "same seconds of the pretext", "lambda 0", "J = I")}


def without(part):
    """Core-tuning or Bi-tuning with one part taken out, as a patch."""
    hard_pairs, zero = core_tuning.hard_pairs, lambda *ignored, **named: torch.zeros(())
    own = lambda f, y, classes: (f, F.one_hot(y, classes).to(f.dtype))

    def pairs(f, y, classes, alpha):
        f_pos, y_pos, f_neg, y_neg = hard_pairs(f, y, classes, alpha)
        return (*own(f, y, classes), f_neg, y_neg) if part == "no hard positives" else (f_pos, y_pos, *own(f, y, classes))

    def unweighted(z, positives, temperature):
        z = F.normalize(z, dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_p = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(~positives, 0)
        number = positives.sum(1)
        return -(log_p.sum(1) / number.clamp(min=1)).sum() / (number > 0).sum().clamp(min=1)

    if part in ("no hard positives", "no semi-hard negatives"):
        return mock.patch.object(core_tuning, "hard_pairs", pairs)
    if part == "no focal weight":
        return mock.patch.object(core_tuning, "focal_contrastive", unweighted)
    gone = {"no CCE": ["contrastive_cross_entropy"], "no CCL": ["categorical_contrastive"],
            "neither": ["contrastive_cross_entropy", "categorical_contrastive"]}.get(part, [])
    return mock.patch.multiple(bi_tuning, **{name: zero for name in gone}) if gone else contextlib.nullcontext()


def variant(bench, args, group, value, seed):
    """Score on val of one variant, the seconds of its stages, and the residual where BiSSL ran."""
    labels = ["--labels-per-class", args.labels] if args.labels else ["--fraction", 1]
    out, start, shared = f"{group}-{value}-{seed}".replace(" ", "_"), ["--ckpt", args.ckpt], ["--seed", seed, *labels]
    name = f"ablation-{out}"
    if group in ("N_L", "N_U", "lam", "damping", "cg_steps", "layerwise", "controls"):
        flags = [FLAG[group], value] if group in FLAG else {
            "layer-wise": ["--layerwise"], "lambda 0": ["--lam", 0], "J = I": ["--damping", 1e12]}.get(value, [])
        stage, more = "bissl", {}
        if value == "nothing":
            stage = None
        elif value in ("same steps of the pretext", "same seconds of the pretext"):
            whole = bench.done[f"ablation-stage-controls-bissl-{seed}"]
            steps = whole["steps"]
            if value.startswith("same seconds"):
                same_steps = bench.done[f"ablation-stage-controls-same_steps_of_the_pretext-{seed}"]
                steps = round(steps * whole["seconds"] / same_steps["seconds"])
            images = len(common.load_data(SimpleNamespace(**whole["data"]), "unlabeled"))
            stage, flags = "simclr", ["--epochs", max(1, round(steps / (images // 128))), "--lr", 4e-4, "--warmup", 0]
        if stage:
            def make():
                last = bench.main(stage, name, *start, *(shared if stage == "bissl" else ["--seed", seed]), *flags)
                parsed = bissl.parser().parse_args(["--data", args.data, "--out", name, *map(str, start)])
                return dict(residual=last.get("residual"), steps=parsed.alternations * parsed.lower_steps,
                            data=dict(data=args.data, root=args.root, device="cpu",
                                      image_size=common.load_checkpoint(args.ckpt)["image_size"]))
            line = bench.once(f"ablation-stage-{out}", make)
            start, more = ["--ckpt", bench.place / f"{name}.pt"], dict(stage_seconds=line["seconds"], residual=line["residual"])
        method, flags = "finetune", []
    elif group == "alpha":
        line = bench.once(f"ablation-stage-{out}", lambda: bench.main("coin", name, *start, *shared, "--alpha", value) and {})
        start, method, flags, more = ["--ckpt", bench.place / f"{name}.pt"], "finetune", [], dict(stage_seconds=line["seconds"])
    else:
        method, more = ("core_tuning" if group in ("eta", "ingredients") else "bi_tuning"), {}
        flags = [FLAG[group], value] if group in FLAG else []

    def score():
        with without(value):
            return dict(val=bench.on_val(method, f"{name}-val", [*start, *shared, *flags]))
    line = bench.once(f"ablation-val-{out}", score)
    return dict(val=line["val"], seconds=line["seconds"], **more)


def residuals(args, device):
    """True residual of each solver against steps and damping, on one pretext batch of the checkpoint and one batch of labels."""
    flags = bissl.parser().parse_args(["--data", args.data, "--root", args.root, "--ckpt", args.ckpt, "--device", device,
                                       "--out", f"{args.runs}/residual"])
    backbone, ckpt = common.start_backbone(flags, say=False)
    pretext, model, config, _ = bissl.start_pretext(flags, backbone, ckpt)
    torch.manual_seed(0)
    x, _ = next(common.batches(common.load_data(flags, "unlabeled"), 128, whole_only=True))
    model.to(memory_format=torch.contiguous_format)
    theta, data = tuple(backbone.parameters()), common.load_data(flags, "train")
    head = torch.nn.Linear(backbone.num_features, len(data.classes)).to(device)
    with common.frozen_statistics(model, second_order=True):
        views = [view.contiguous() for view in pretext.make_views(x, config)]
        loss = pretext.loss(model, views, dict(config, precision="float32"))
        gradient = torch.autograd.grad(loss, theta, create_graph=True)
        pictures, y = next(common.batches(data, 64))
        v = torch.autograd.grad(common.task_loss(head(backbone(common.augment(pictures, flags.image_size))), y), theta)
    rows = []
    for damping in (1.0, 10.0, 100.0, 1000.0):
        matvec = bissl.damped_hessian(gradient, theta, damping)
        for solver in ("plain", "layer-wise"):
            for steps in (1, 2, 3, 5, 8):
                solution = bissl.conjugate_gradient(matvec, v, steps, layerwise=solver == "layer-wise")
                left = bissl.norm([b - Ax for b, Ax in zip(v, matvec(solution))]) / bissl.norm(v)
                rows.append(dict(group="residual", variant=f"{solver}, damping {damping:g}", value=steps,
                                 residual=float(f"{left.item():.3g}")))
                print("{variant}, {value} steps: {residual}".format(**rows[-1]), flush=True)
    return rows


def draw(group, rows, path, data):
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    if group == "residual":
        for name in dict.fromkeys(row["variant"] for row in rows):
            points = [(row["value"], row["residual"]) for row in rows if row["variant"] == name]
            axes.plot(*zip(*points), label=name, marker="o", linestyle="--" if name.startswith("layer") else "-")
        axes.set(yscale="log", xlabel="steps", ylabel="||v - A x|| / ||v||", title=f"{data}: solvers")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(fontsize=8)
    else:
        places = range(len(rows))
        axes.bar(places, [row["val"] for row in rows], yerr=[row["std"] for row in rows], color="lightsteelblue", capsize=3)
        axes.set_xticks(places, [str(row["variant"]) for row in rows], rotation=0 if group in FLAG else 20)
        low = min(row["val"] - row["std"] for row in rows)
        axes.set(xlabel=group, ylabel="top-1 on val, %", ylim=(max(0, low - 5), None), title=f"{data}: {group}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("groups", nargs="*", help="residual, controls, N_L, ...; without: all")
    p.add_argument("--data", default="petals")
    p.add_argument("--root", default="data")
    p.add_argument("--ckpt", required=True, help="a SimCLR checkpoint")
    p.add_argument("--runs", default="runs/ablation")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("float32", "bfloat16"))
    p.add_argument("--labels", type=int, default=20, help="labels a class; 0: all of train")
    p.add_argument("--seeds", type=int, default=3)
    args = p.parse_args(argv)
    unknown = set(args.groups) - {"residual", *VALUES}
    if unknown:
        common.fail(f"no group {', '.join(unknown)}: there are residual, {', '.join(VALUES)}")
    bench, name = Bench(args), Path(args.data).resolve().name if Path(args.data).is_dir() else args.data
    path = RESULTS / f"ablation-{name}.csv"
    fields = ("device", "group", "variant", "value", "val", "std", "seeds", "seconds", "stage_seconds", "residual")
    for group in args.groups or ["residual", *VALUES]:
        if group == "residual":
            rows = residuals(args, args.device)
        else:
            rows = []
            for value in VALUES[group]:
                runs = [variant(bench, args, group, value, seed) for seed in range(args.seeds)]
                mean = lambda key: round(float(np.mean([run[key] for run in runs])), 4) if runs[0].get(key) is not None else None
                rows.append(dict(group=group, variant=value, val=mean("val"), seeds=args.seeds, seconds=mean("seconds"),
                                 std=round(float(np.std([run["val"] for run in runs], ddof=1)), 2) if args.seeds > 1 else 0.0,
                                 stage_seconds=mean("stage_seconds"), residual=mean("residual")))
                print("--- {group} {variant}: {val} +- {std} % on val".format(**rows[-1]), flush=True)
        rows = [dict(row, device=device_name(args.device)) for row in rows]
        before = [row for row in csv.DictReader(path.open())] if path.exists() else []
        before = [row for row in before if (row["device"], row["group"]) != (rows[0]["device"], group)]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows([*before, *rows])
        draw(group, rows, RESULTS / f"ablation-{name}-{group}.png", name)


if __name__ == "__main__":
    main()
