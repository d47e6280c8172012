"""What does BiSSL add, and is it BiSSL that adds it? README's three commands over seeds of the
whole chain, beside everything that could explain the gain.

    python tests/bench_bissl.py                              doodles, then petals: 10 seeds of all
                                                             rows: two hours of one CPU core
    python tests/bench_bissl.py --seeds 0 2 4 6 8            half of the seeds; then the others in a
                                                             second process, then all once more
    python tests/bench_bissl.py --labels 5 --rows SimCLR BiSSL
    python tests/bench_bissl.py --grid lam --seeds 0 1 2     BiSSL with other values of a flag
    python tests/bench_bissl.py --rates 0.02 0.04 0.08       each row at its own rate of fine-tuning
    python tests/bench_bissl.py --parts                      how much of the spread comes from the
                                                             pretext, how much from the labels
    python tests/bench_bissl.py --name probe --finetune=--freeze
                                                             linear probes: how the features fit the
                                                             labels before they are fine-tuned
    python tests/bench_bissl.py --name detect --task detect --labels 100 --rows scratch SimCLR BiSSL
                                                             objects, or with segment pixels
    python tests/bench_bissl.py --data EMOJI --name clipart-emoji --pretext "--data CLIPART
        --epochs 40" --stage "--lam 1"                       other data, with flags of their own

A row is what happens between the pretext and fine-tuning with the script's default flags:
  scratch             no pretext
  SimCLR              nothing
  same steps          the pretext goes on for as many lower steps (lambda 0: theta never hears of
                      phi, and its head and optimiser are BiSSL's)
  same seconds        ... for as many seconds, by more lower steps per alternation
  J = I               the hypergradient leaves H out (damping 1e12)
  BiSSL               bissl.py
  phi_B               BiSSL's other backbone as the result
  halfway             theta + 0.5 (phi - theta) as the result
  more epochs         SimCLR, and as many more epochs of fine-tuning as BiSSL shows labelled images
  BiSSL, more epochs  the same after BiSSL
Weights, views and labelled images differ from seed to seed, and are the same for all rows of a
seed. Test is looked at once per run. Each finished run is a line of RUNS/runs.jsonl and is not made
again: give other flags for the stages another --name. Writes tests/results/bissl-NAME.csv (with
--rates bissl-NAME-rates.csv) and a .png, whose name has --labels and --grid, too. Its columns:
  rate        of fine-tuning, where --rates chose it
  gain        on SimCLR, seed by seed, and half of its 95 % interval (t over the seeds)
  bissl_gain  what BiSSL has more than this row
  seconds     of bissl.py
"""
import json
import shlex

import matplotlib.pyplot as plt
import numpy as np
import torch

import benches
import bissl
import common
import finetune
import simclr
from benches import paired_gain, spread_of

FIELDS = ("device", "labels", "row", "epochs", "rate", "seeds", "mean", "std", "gain", "gain_95",
          "bissl_gain", "bissl_gain_95", "seconds", "scores")
PRETEXT_GOES_ON = ["--lam", 0, "--upper-steps", 1, "--cg-steps", 1]
MORE = ("more epochs", "BiSSL, more epochs")
ROWS = ("scratch", "SimCLR", "same steps", "same seconds", "J = I", "BiSSL", "phi_B", "halfway",
        *MORE)
GRID = {"lam": (0.001, 0.01, 0.3, 1, 3), "damping": (1, 10, 30, 300), "upper-steps": (1, 2, 4),
        "alternations": (5, 10, 40, 100), "hessian-batch": (8, 128), "lr": (0.003, 0.01, 0.1)}
METHODS = ("finetune", "core_tuning", "bi_tuning")
EPOCHS = {5: 120, 20: 60, 100: 20}  # of fine-tuning, by labels per class


class Chain:
    """The runs of one seed, each made once."""

    def __init__(self, bench, seed):
        self.bench, self.args, self.seed = bench, bench.args, seed
        self.labels = ["--labels-per-class", self.args.labels, "--seed", seed]
        if self.args.task != "classify":
            self.labels += ["--task", self.args.task]

    def pretext(self):
        out = f"simclr-{self.seed}"
        flags = [*pretext_flags(self.args), "--seed", self.seed]
        self.bench.once(out, lambda: dict(knn=self.bench.main("simclr", out, flags)["knn"]))
        return self.bench.place / f"{out}.pt"

    def stage(self, flags=()):
        """A run of bissl.py: its checkpoint and its line in the book."""
        flags = [str(flag) for flag in flags]
        name = "".join(flags).replace("--", "-")
        out = f"bissl{name}-{self.args.labels}-{self.seed}"
        flags = ["--ckpt", self.pretext(), *self.labels, *self.args.stage, *flags]

        def make():
            last = self.bench.main("bissl", out, flags)
            kept = ("lower", "upper_theta", "upper_phi", "knn", "knn_phi", "residual", "follow",
                    "distance")
            return {key: last.get(key) for key in kept}

        return self.bench.place / f"{out}.pt", self.bench.once(out, make)

    def mixture(self, c):
        """A checkpoint with theta + c (phi - theta) of BiSSL for its backbone."""
        path, line = self.stage()
        mixed = path.with_name(f"{path.stem}-mixed{c:g}.pt")
        ckpt = torch.load(path, weights_only=True)
        theta, phi = ckpt["backbone"], ckpt["resume"]["upper_backbone"]
        for name, value in theta.items():
            if value.is_floating_point():
                theta[name] = value + c * (phi[name] - value)
        torch.save(ckpt, mixed)
        return mixed, line

    def start(self, row):
        """The checkpoint to fine-tune, None from scratch, and the line of the stage before it."""
        if row == "scratch":
            return None, {}
        if row in ("SimCLR", "more epochs"):
            return self.pretext(), {}
        if row in ("BiSSL", "BiSSL, more epochs"):
            return self.stage()
        if row == "same steps":
            return self.stage(PRETEXT_GOES_ON)
        if row == "J = I":
            return self.stage(["--damping", 1e12, "--cg-steps", 1])
        if row == "phi_B":
            return self.mixture(1)
        if row == "halfway":
            return self.mixture(0.5)
        if row == "same seconds":
            whole, few = self.stage()[1], self.stage(PRETEXT_GOES_ON)[1]
            # What a run takes whatever its steps:
            none = self.stage([*PRETEXT_GOES_ON, "--lower-steps", 1])[1]
            of_steps = max(0.1, few["seconds"] - none["seconds"])
            share = (whole["seconds"] - none["seconds"]) / of_steps
            lower_steps = 1 + round((self.stage_args().lower_steps - 1) * share)
            return self.stage([*PRETEXT_GOES_ON, "--lower-steps", lower_steps])
        flag, value = row.split()
        return self.stage([f"--{flag}", value])

    def epochs(self, row):
        epochs = self.args.epochs
        if row in MORE:
            epochs += benches.bissl_epochs(self.stage_args(), self.seed)
        return epochs

    def stage_args(self):
        flags = self.bench.flags([*self.labels, *self.args.stage])
        return bissl.parser().parse_args(flags)

    def score(self, row, rate, judge="test", labels_of=None):
        """Score in per cent, and the seconds of the stage before fine-tuning. rate: of fine-tuning;
        None: the script's. labels_of: another chain, whose labels and draws fine-tuning has."""
        ckpt, line = self.start(row)
        epochs = self.epochs(row)
        own = "".join(self.args.finetune).replace("/", "_")
        out = f"{self.args.method}{own}-{row}-{self.args.labels}-{self.seed}-{epochs}-{rate}"
        labels = self.labels
        if labels_of not in (None, self):
            labels = labels_of.labels
            out += f"-labels{labels_of.seed}"
        out = out.replace(" ", "_")
        flags = [*labels, "--epochs", epochs, *self.args.finetune]
        if rate is not None:
            flags += ["--lr", rate]
        if ckpt:
            flags = ["--ckpt", ckpt, *flags]
        bench, method, seconds = self.bench, self.args.method, line.get("seconds", 0)
        if judge == "val":
            made = bench.once(f"{out}-val", lambda: dict(val=bench.on_val(method, out, flags)))
            return made["val"], seconds
        made = bench.once(out, lambda: bench.on_test(method, out, flags))
        return made[f"test_{bench.metric()}"], seconds


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


def say_parts(chains):
    """SimCLR of each seed, with the labels and draws of each seed, judged on val."""
    scores = []
    for chain in chains:
        scores.append([chain.score("SimCLR", None, "val", other)[0] for other in chains])
    names = "pretexts", "sets of labels and their order", "what neither explains"
    for name, deviation in zip(names, parts_of_variance(scores)):
        print(f"standard deviation over {name}: {deviation:.1f} points")


def best_rate(chains, row, rates):
    """The rate at which the row's mean on val over all seeds is highest; None without rates."""
    means = {}
    for rate in rates:
        means[rate] = np.mean([chain.score(row, rate, "val")[0] for chain in chains])
    return max(means, key=means.get) if means else None


def pretext_flags(args):
    return ["--data", "doodles", *args.pretext]


def load_everything(bench):
    """Draw or decode all images before the first stage is timed."""
    args = finetune.parser().parse_args(bench.flags(bench.args.finetune))
    for split in ("train", "val", "test"):
        common.load_data(args, split)
    args = simclr.parser().parse_args(bench.flags(pretext_flags(bench.args)))
    common.load_data(args, "unlabeled")


def table(scores, seconds, args, tuning):
    """A line for each row: mean, deviation, its gain on SimCLR, and what BiSSL gains on it.
    tuning: {row: epochs and learning rate of its fine-tuning}"""
    lines = []
    for row, own in scores.items():
        line = dict(device=benches.device_name(args.device), labels=args.labels, row=row,
                    **tuning[row], seeds=len(own),
                    mean=round(float(np.mean(list(own.values()))), 2),
                    std=round(spread_of(list(own.values())), 2),
                    seconds=round(float(np.mean(seconds[row])), 1),
                    scores=" ".join(f"{seed}:{score:.2f}" for seed, score in sorted(own.items())))
        for name, (one, other) in dict(gain=(row, "SimCLR"), bissl_gain=("BiSSL", row)).items():
            if one != other and one in scores and other in scores:
                mean, half = paired_gain(scores[one], scores[other])
                line[name] = round(mean, 2)
                line[f"{name}_95"] = "" if half is None else round(half, 2)
        lines.append(line)
    return lines


def draw(scores, path, title):
    """A point per seed and the mean, a line per row; what BiSSL gains on it stands beside it."""
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(scores)))
    for i, (row, own) in enumerate(scores.items()):
        said = ""
        if row != "BiSSL" and "BiSSL" in scores:
            mean, half = paired_gain(scores["BiSSL"], own)
            said = f"{mean:+.1f}" + (f" +- {half:.1f}" if half else "")
        benches.draw_row(axes, i, list(own.values()), said)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy, %; | mean of the seeds; right: BiSSL's gain on the row and its "
             "95 % interval", title=title)
    axes.grid(axis="x", alpha=0.3)
    benches.save_figure(figure, path)


def parse(argv):
    p = benches.parser(__doc__)
    p.add_argument("--name", default="doodles-petals", help="of the results and the runs")
    p.add_argument("--task", default="classify", choices=finetune.TASKS)
    p.add_argument("--method", default="finetune", choices=METHODS, help="what learns the labels")
    p.add_argument("--labels", type=int, default=20, choices=EPOCHS, help="labels per class")
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    p.add_argument("--grid", nargs="+", default=[], choices=GRID,
                   help="these flags' values instead of the rows; BiSSL itself stands beside them")
    p.add_argument("--pretext", type=shlex.split, default=[], help="flags for simclr.py")
    p.add_argument("--stage", type=shlex.split, default=[], help="flags for bissl.py")
    p.add_argument("--finetune", type=shlex.split, default=[], help="flags for finetune.py")
    p.add_argument("--epochs", type=int, help=f"of fine-tuning; default: {EPOCHS} by labels, for "
                   "other tasks the script's own")
    p.add_argument("--rates", type=float, nargs="+", default=[],
                   help="learning rates of fine-tuning: each row takes the best of them on val")
    p.add_argument("--parts", action="store_true", help="SimCLR alone: each seed's pretext with "
                   "each seed's labels, on val; printed")
    args = p.parse_args(argv)
    if args.epochs is None:
        args.epochs = EPOCHS[args.labels]
        if args.task != "classify":
            script = benches.SCRIPTS[args.method]
            flags = ["--data", args.data, "--task", args.task]
            args.epochs = script.parser().parse_args(flags).epochs
    args.runs = args.runs or f"runs/bissl-{args.name}"
    if args.grid:
        args.rows = ["SimCLR", "BiSSL"]
        for flag in args.grid:
            args.rows += [f"{flag} {value:g}" for value in GRID[flag]]
    return args


def main(argv=None):
    args = parse(argv)
    bench = benches.Bench(args)
    load_everything(bench)
    chains = [Chain(bench, seed) for seed in args.seeds]
    if args.parts:
        return say_parts(chains)
    scores, seconds, tuning = {}, {}, {}
    for row in args.rows:
        rate = best_rate(chains, row, args.rates)
        tuning[row] = dict(epochs=chains[0].epochs(row), rate=rate)
        scores[row], seconds[row] = {}, []
        for chain in chains:
            scores[row][chain.seed], spent = chain.score(row, rate)
            seconds[row].append(spent)
        lines = table(scores, seconds, args, tuning)
        print(json.dumps({line["row"]: line["mean"] for line in lines}), flush=True)
    name = f"bissl-{args.name}" + ("-rates" if args.rates else "")
    path = benches.RESULTS / f"{name}.csv"
    benches.replace_rows(lines, path, ("device", "labels", "row", "epochs"), FIELDS)
    group = "-" + "-".join(args.grid) if args.grid else ""
    labels = "" if args.labels == 20 else f"-{args.labels}"
    draw(scores, path.with_name(f"{name}{labels}{group}.png"),
         f"{args.name}, {args.labels} labels per class, {len(args.seeds)} seeds")


if __name__ == "__main__":
    main()
