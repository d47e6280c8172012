"""What a BiSSL alternation costs, and how far its hypergradient is from the exact one, for each way
to solve its linear systems.

    python tests/bench_hypergradient.py                 trains a short SimCLR on petals first
    python tests/bench_hypergradient.py --ckpt simclr.pt --data flowers     any flags of bissl.py

10 to 20 minutes on a slow CPU. One alternation at bissl.py's default sizes with N_U = 8, damping
100. The baseline: float32, the first-order graph built anew for every product, plain conjugate
gradients from zero on the whole pretext batch until the residual is under 0.1.
  products  Hessian-vector products of the 8 solves
  seconds   20 lower steps + 8 upper steps + first-order graphs + products: how often each ran times
            the median of its time, which was taken in turn with the others' in this process.
            bissl.py's own loop around them costs nothing
  ratio     seconds / the baseline's; the aim is 0.35 with no larger an error
  error     ||h - h*|| / ||h*||, h = implicit + direct gradient of phi_B, mean over the 8 upper
            steps. h* comes from float64 solves on the whole batch to a residual of 1e-4, with
            shared directions instead of 100 plain steps
  residual  ||v - A x|| / ||v|| of the last solve, A with the whole batch
  graph MB  what the first-order graph holds: on a GPU the rise of allocated memory at its peak over
            one product, on a CPU the bytes of all tensors that autograd saves for it, each once
layerwise() is the released code's solver. Writes tests/results/hypergradient.csv (rows of other
devices and data stay) and hypergradient.png.
"""
import copy
import csv
import itertools
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib.pyplot as plt
import torch
from torch import nn

import bissl
import common
import simclr
from bench_speed import device_name, seconds

RESULTS = Path(__file__).resolve().parent / "results" / "hypergradient.csv"
FIELDS = ("device", "data", "setting", "idea", "hessian_batch", "products", "seconds", "ratio",
          "error", "residual", "graph_mb")
N_L, N_U, ROUNDS = 20, 8, 5
EXACT = 1e-4  # residual of the float64 solves


class Counted:
    """A matvec that counts its products."""

    def __init__(self, matvec):
        self.matvec, self.products = matvec, 0

    def __call__(self, v):
        self.products += 1
        return self.matvec(v)


def plain(matvec, vectors, tolerance, steps=20):
    matvec = Counted(matvec)
    answers = [bissl.conjugate_gradient(matvec, v, steps, tolerance) for v in vectors]
    return answers, matvec.products


def recycled(matvec, vectors, tolerance, steps=5, most=20):
    """As bissl.py solves the systems of an alternation."""
    matvec, directions, answers = Counted(matvec), [], []
    for v in vectors:
        answers.append(bissl.conjugate_gradient(matvec, v, steps, tolerance, directions))
        directions = bissl.reusable(directions, most)
    return answers, matvec.products


def warm(matvec, vectors, tolerance):
    """x starts at the last solution, whose A x is known: its directions' products add up to it."""
    matvec, answers = Counted(matvec), []
    x = Ax = torch.zeros_like(bissl.as_vector(vectors[0]))
    for v in vectors:
        whole = bissl.as_vector(v)
        r, directions = whole - Ax, []
        own_tolerance = tolerance * float(whole.norm() / r.norm())
        start = bissl.as_tensors(r, v)
        step = bissl.conjugate_gradient(matvec, start, 20, own_tolerance, directions)
        _, left = bissl.best_point(r, directions)
        x, Ax = x + bissl.as_vector(step), whole - left
        answers.append(bissl.as_tensors(x, v))
    return answers, matvec.products


def five(matvec, vectors):
    return [bissl.conjugate_gradient(matvec, v, 5) for v in vectors], 5 * len(vectors)


def layerwise(matvec, b, steps):
    """The released code's conjugate gradients on A x = b: every tensor of the tuple b has an alpha
    and a beta of its own, although A couples them."""
    x, r, p = [torch.zeros_like(t) for t in b], list(b), list(b)
    for _ in range(steps):
        Ap = matvec(tuple(p))
        for i in range(len(b)):
            rr = (r[i] * r[i]).sum()
            alpha = bissl.ratio(rr, (p[i] * Ap[i]).sum())
            x[i] = x[i] + alpha * p[i]
            r[i] = r[i] - alpha * Ap[i]
            beta = bissl.ratio((r[i] * r[i]).sum(), rr)
            p[i] = r[i] + beta * p[i]
    return tuple(x)


def five_layerwise(matvec, vectors):
    return [layerwise(matvec, v, 5) for v in vectors], 5 * len(vectors)


IDEAS = [  # name, images of the Hessian (1: all, 2: half of them), solver, graph kept
    ("baseline: graph rebuilt, plain, 0.1", 1, partial(plain, tolerance=0.1), False),
    ("graph kept", 1, partial(plain, tolerance=0.1), True),
    ("graph kept, 5 steps", 1, five, True),
    ("graph kept, 5 steps, layer-wise", 1, five_layerwise, True),
    ("warm start, 0.1", 1, partial(warm, tolerance=0.1), True),
    ("half batch, plain, 0.1", 2, partial(plain, tolerance=0.1), True),
    ("quarter batch, plain, 0.1", 4, partial(plain, tolerance=0.1), True),
    ("recycled, 0.1", 1, partial(recycled, tolerance=0.1), True),
    ("recycled, 0.05 (default)", 1, partial(recycled, tolerance=0.05), True),
    ("half batch, recycled, 0.05", 2, partial(recycled, tolerance=0.05), True),
    ("quarter batch, recycled, 0.05", 4, partial(recycled, tolerance=0.05), True),
]


# ----------------------------------------------------------------------------------- an alternation

class Levels:
    """Both levels of bissl.py as its train() starts them, and their steps one at a time."""

    def __init__(self, argv):
        out = f"{tempfile.gettempdir()}/bench_hypergradient"
        self.args = args = bissl.parser().parse_args([*argv, "--out", out])
        self.theta_B, ckpt = common.start_backbone(args)
        started = bissl.start_pretext(args, self.theta_B, ckpt)
        self.pretext, self.lower, self.pretext_args, _ = started
        pretext_args = self.pretext_args
        self.exact_args = Namespace(**vars(pretext_args))
        self.exact_args.precision = "float32"
        pretext_data = bissl.load_pretext_data(args, pretext_args)
        data = common.load_labelled(args, args.seed)
        self.upper = bissl.make_upper(args, self.theta_B, data.classes)
        self.phi_B, self.phi_H = self.upper
        self.lower_optimizer = common.make_optimizer(
            pretext_args.optimizer, [self.lower], pretext_args.lr / 10, pretext_args.weight_decay)
        self.upper_optimizer = common.make_optimizer("sgd", [self.upper], args.lr,
                                                     args.weight_decay)
        self.theta, self.phi = tuple(self.theta_B.parameters()), tuple(self.phi_B.parameters())
        self.damping = args.lam + args.damping
        bissl.warm_up_head(args, self.phi_B, self.phi_H, data)
        self.lower_batches = bissl.endless(
            common.Batches(pretext_data, args.pretext_batch_size, whole_only=True))
        self.upper_batches = bissl.endless(common.Batches(data, args.batch_size))

    def views(self, x):
        return [view.contiguous() for view in self.pretext.make_views(x, self.pretext_args)]

    def lower_step(self, x):
        views = self.pretext.make_views(x, self.pretext_args)
        loss = self.pretext.loss(self.lower, views, self.pretext_args)
        pull = self.args.lam / 2 * bissl.squared_distance(self.theta, self.phi)
        self.lower_optimizer.zero_grad()
        (loss + pull).backward()
        nn.utils.clip_grad_norm_(self.lower.parameters(), 10)
        self.lower_optimizer.step()

    def upper_gradients(self, x, y):
        """g_theta and the direct gradient of phi_B, which is left in p.grad, too."""
        theta_loss, phi_loss = bissl.downstream_losses(self.args, self.theta_B, self.upper, x, y)
        g_theta = torch.autograd.grad(theta_loss, self.theta, retain_graph=True)
        self.upper_optimizer.zero_grad()
        (theta_loss + phi_loss).backward(inputs=[*self.upper.parameters()])
        return g_theta, [p.grad.clone() for p in self.phi]

    def first_order(self, part, model, views):
        """d L_P / d theta_B, with its graph, on one `part`th of the views."""
        views = [view[:len(view) // part] for view in views]
        with common.frozen_statistics(model):
            loss = self.pretext.loss(model, views, self.exact_args)
            return torch.autograd.grad(loss, tuple(model.backbone.parameters()), create_graph=True)


def time_parts(levels):
    """Median seconds of each part of an alternation, which are taken in turn, after N_L steps."""
    times, made = {}, {}
    device = levels.args.device.split(":")[0]
    # bissl.py takes products in this layout.
    planar = copy.deepcopy(levels.lower).to(memory_format=torch.contiguous_format)
    theta = tuple(planar.backbone.parameters())
    some = tuple(torch.randn_like(p) for p in theta)

    def timed(part, work):
        times.setdefault(part, []).append(seconds(work, device))

    def make_graph(part, views):
        made["graph"] = levels.first_order(part, planar, views)

    def product():
        bissl.damped_hessian(made["graph"], theta, levels.damping)(some)

    def rebuilt(views):
        make_graph(1, views)
        product()

    for i in range(N_L):
        x, _ = next(levels.lower_batches)
        timed("lower", lambda: levels.lower_step(x))
        if i % max(1, N_L // ROUNDS):
            continue
        views, (pictures, y) = levels.views(x), next(levels.upper_batches)
        timed("upper", lambda: levels.upper_gradients(pictures, y))
        for part in (1, 2, 4):
            timed(("graph", part), lambda: make_graph(part, views))
            timed(("product", part), product)
        made.clear()
        timed("rebuilt", lambda: rebuilt(views))
    medians = {part: median(values) for part, values in times.items()}
    said = [f"{part} {value:.3f} s" for part, value in medians.items()]
    print("medians:", "  ".join(said), flush=True)
    return medians


def make_systems(levels, gradient):
    """The right-hand sides g_theta of N_U upper steps, and the direct gradients beside them."""
    vectors, direct = [], []
    for x, y in itertools.islice(levels.upper_batches, N_U):
        g_theta, own = levels.upper_gradients(x, y)
        vectors.append(g_theta)
        direct.append(bissl.as_vector(own).double())
        implicit = bissl.inverse_hvp(None, levels.theta, g_theta, levels.damping, 5, gradient)
        torch._foreach_add_([p.grad for p in levels.phi], implicit)
        levels.upper_optimizer.step()
    return vectors, direct


def solve_exactly(levels, exact, views, vectors):
    """The systems' solutions in float64, by the float64 copy `exact` of the lower level."""
    theta = tuple(exact.backbone.parameters())
    gradient = levels.first_order(1, exact, [view.double() for view in views])
    product = bissl.damped_hessian(gradient, theta, levels.damping)
    vectors = [tuple(t.double() for t in v) for v in vectors]
    solutions, count = recycled(product, vectors, EXACT, steps=100, most=200)
    print(f"float64 solutions: {count} products", flush=True)
    return [bissl.as_vector(x) for x in solutions]


def held_bytes(first_order, product, device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        product(first_order())
        return torch.cuda.max_memory_allocated() - before
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = first_order()
    del kept
    return sum(storages.values())


def measure(argv):
    levels = Levels(argv)
    args, theta, damping = levels.args, levels.theta, levels.damping
    spent = time_parts(levels)
    lower = levels.lower.to(memory_format=torch.contiguous_format)
    x, _ = next(levels.lower_batches)
    views = levels.views(x)
    exact = copy.deepcopy(lower).double()
    A = {}
    for part in (1, 2, 4):
        gradient = levels.first_order(part, lower, views)
        A[part] = bissl.damped_hessian(gradient, theta, damping)
        if part == 1:
            vectors, direct = make_systems(levels, gradient)
    solutions = solve_exactly(levels, exact, views, vectors)
    last, rows, baseline = bissl.as_vector(vectors[-1]), [], None
    for name, part, solve, keeps_graph in IDEAS:
        answers, products = solve(A[part], vectors)
        errors = []
        for answer, best, d in zip(answers, solutions, direct):
            off = (bissl.as_vector(answer).double() - best).norm() / (best + d).norm()
            errors.append(off.item())
        left = (last - bissl.as_vector(A[1](answers[-1]))).norm() / last.norm()
        work = products * spent["rebuilt"]
        if keeps_graph:
            work = spent["graph", part] + products * spent["product", part]
        total = N_L * spent["lower"] + N_U * spent["upper"] + work
        baseline = baseline or total
        held = held_bytes(lambda: levels.first_order(part, lower, views),
                          lambda g: bissl.damped_hessian(g, theta, damping)(vectors[0]),
                          args.device)
        setting = f"{args.arch}, {args.image_size} px, batch {len(x)}, damping {damping:g}"
        rows.append(dict(
            data=Path(args.data).name, setting=setting, idea=name, hessian_batch=len(x) // part,
            products=products, seconds=f"{total:.3g}", ratio=f"{total / baseline:.3f}",
            error=f"{mean(errors):.4f}", residual=f"{left.item():.3f}",
            graph_mb=f"{held / 1e6:.0f}"))
        print("  ".join(str(value) for value in list(rows[-1].values())[2:]), flush=True)
    return rows, args.device


# ------------------------------------------------------------------------------------ what came out

def draw(rows):
    """Error against time, a point an idea; one panel a device and data set."""
    groups = {}
    for row in rows:
        groups.setdefault((row["device"], row["data"]), []).append(row)
    figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 5), squeeze=False)
    for axis, (group, own) in zip(axes[0], sorted(groups.items())):
        for i, row in enumerate(sorted(own, key=error_of)):
            point = float(row["ratio"]), error_of(row)
            axis.plot(*point, "o")
            axis.annotate(row["idea"], point, xytext=(5, -9 if i % 2 else 4),
                          textcoords="offset points", fontsize=7)
        axis.axvline(0.35, color="grey", linestyle=":")
        axis.axhline(error_of(own[0]), color="grey", linestyle=":")
        axis.set(yscale="log", xlabel="time of an alternation / the baseline's", xlim=(0, 1.9),
                 ylabel="error of the hypergradient",
                 title=f"{group[1]}, {group[0]}\n(aim: below and left of the dotted lines)")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)
    plt.close(figure)


def error_of(row):
    return float(row["error"])


def write(rows):
    """The table with these rows; those of other devices and data stay in it."""
    key, others = (rows[0]["device"], rows[0]["data"]), []
    RESULTS.parent.mkdir(exist_ok=True)
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            for row in csv.DictReader(file):
                if (row["device"], row["data"]) != key:
                    others.append(row)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(others + rows)
    return others + rows


def main(argv):
    if "--ckpt" not in argv:
        out = f"{tempfile.gettempdir()}/bench_simclr"
        simclr.main(["--epochs", "6", "--out", out])
        argv = [*argv, "--ckpt", f"{out}.pt"]
    rows, device = measure(argv)
    for row in rows:
        row["device"] = device_name(device.split(":")[0])
    draw(write(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
