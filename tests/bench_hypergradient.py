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
            steps. h* comes from float64 solves on the whole batch to a residual of 1e-4, with shared
            directions instead of 100 plain steps
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
from pathlib import Path
from statistics import mean, median

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import bench_speed  # noqa: E402  (puts the repository's root on the path)
import bissl  # noqa: E402
import common  # noqa: E402
import simclr  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "hypergradient.csv"
FIELDS = ("device", "data", "setting", "idea", "hessian_batch", "products", "seconds", "ratio", "error", "residual", "graph_mb")
N_L, N_U, ROUNDS = 20, 8, 5


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


IDEAS = [  # name, images of the Hessian (None: all), solver, graph kept
    ("baseline: graph rebuilt, plain, 0.1", None, lambda A, vs: plain(A, vs, 0.1), False),
    ("graph kept", None, lambda A, vs: plain(A, vs, 0.1), True),
    ("graph kept, 5 steps", None, five, True),
    ("graph kept, 5 steps, layer-wise", None, five_layerwise, True),
    ("warm start, 0.1", None, lambda A, vs: warm(A, vs, 0.1), True),
    ("half batch, plain, 0.1", 2, lambda A, vs: plain(A, vs, 0.1), True),
    ("quarter batch, plain, 0.1", 4, lambda A, vs: plain(A, vs, 0.1), True),
    ("recycled, 0.1", None, lambda A, vs: recycled(A, vs, 0.1), True),
    ("recycled, 0.05 (default)", None, lambda A, vs: recycled(A, vs, 0.05), True),
    ("half batch, recycled, 0.05", 2, lambda A, vs: recycled(A, vs, 0.05), True),
    ("quarter batch, recycled, 0.05", 4, lambda A, vs: recycled(A, vs, 0.05), True),
]


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
    args = bissl.parser().parse_args([*argv, "--out", f"{tempfile.gettempdir()}/bench_hypergradient"])
    torch.manual_seed(args.seed)
    theta_B, ckpt = common.start_backbone(args)
    pretext, lower, config, _ = bissl.start_pretext(args, theta_B, ckpt)
    pretext_data = bissl.load_pretext_data(args, config)
    data = common.load_labelled(args, args.seed)
    phi_B = copy.deepcopy(theta_B)
    phi_H = nn.Linear(phi_B.num_features, len(data.classes)).to(args.device)
    lower_optimizer = common.make_optimizer(
        config.optimizer, [lower], config.lr / 5, config.weight_decay)
    upper_optimizer = common.make_optimizer("sgd", [phi_B, phi_H], args.lr, args.weight_decay)
    theta, phi, damping = tuple(theta_B.parameters()), tuple(phi_B.parameters()), args.lam + args.damping
    bissl.warm_up_head(args, phi_B, phi_H, data)
    times, inputs = {}, {}

    def timed(part, work):
        times.setdefault(part, []).append(bench_speed.seconds(work, args.device.split(":")[0]))

    def lower_step(x):
        distance = sum((t - p.detach()).square().sum() for t, p in zip(theta, phi))
        loss = pretext.loss(lower, pretext.make_views(x, config), config) + args.lam / 2 * distance
        lower_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lower.parameters(), 10)
        lower_optimizer.step()

    def upper_gradients(x, y):
        x = common.augment(x, args.image_size, crop=(args.crop, 1))
        with common.autocast(args.device, args.precision):
            with common.frozen_statistics(theta_B):
                theta_logits = phi_H(theta_B(x))
            phi_logits = phi_H(phi_B(x))
        theta_loss = F.cross_entropy(common.upcast(theta_logits), y)
        phi_loss = F.cross_entropy(common.upcast(phi_logits), y)
        inputs["v"] = torch.autograd.grad(theta_loss, theta, retain_graph=True)
        upper_optimizer.zero_grad()
        (theta_loss + phi_loss).backward(inputs=(*phi, *phi_H.parameters()))
        inputs["direct"] = [p.grad.clone() for p in phi]

    exact_args = Namespace(**vars(config))
    exact_args.precision = "float32"

    def first_order(part, model, views):
        views = [view[:len(view) // part] for view in views]
        with common.frozen_statistics(model):
            loss = pretext.loss(model, views, exact_args)
            return torch.autograd.grad(loss, tuple(model.backbone.parameters()), create_graph=True)

    batches = bissl.endless(common.Batches(pretext_data, args.pretext_batch_size, whole_only=True))
    common.set_learning_rate(lower_optimizer, config.lr / 10, 0, 1)
    planar = copy.deepcopy(lower).to(memory_format=torch.contiguous_format)  # the layout that bissl.py takes products in
    some = tuple(torch.randn_like(p) for p in theta)
    upper_batches = bissl.endless(common.Batches(data, args.batch_size))
    for i, (x, _) in enumerate(itertools.islice(batches, N_L)):
        timed("lower", lambda: lower_step(x))
        if i % (N_L // ROUNDS):
            continue
        views, (x, y) = [view.contiguous() for view in pretext.make_views(x, config)], next(upper_batches)
        timed("upper", lambda: upper_gradients(x, y))
        for part in (1, 2, 4):
            timed(("graph", part), lambda: inputs.update(graph=first_order(part, planar, views)))
            product = bissl.damped_hessian(inputs["graph"], tuple(planar.backbone.parameters()), damping)
            timed(("product", part), lambda: product(some))
        planar_theta = tuple(planar.backbone.parameters())
        timed("rebuilt", lambda: bissl.damped_hessian(
            first_order(1, planar, views), planar_theta, damping)(some))
    inputs.pop("graph")
    del planar, product
    lower.to(memory_format=torch.contiguous_format)
    images = next(batches)[0]
    views = [view.contiguous() for view in pretext.make_views(images, config)]
    exact = copy.deepcopy(lower).double()

    kept = {part: first_order(part, lower, views) for part in (1, 2, 4)}
    A = {part: bissl.damped_hessian(gradient, theta, damping) for part, gradient in kept.items()}
    vectors, direct = [], []
    for x, y in itertools.islice(upper_batches, N_U):
        upper_gradients(x, y)
        vectors.append(inputs["v"])
        direct.append(bissl.as_vector(inputs["direct"]).double())
        implicit = bissl.inverse_hvp(None, theta, inputs["v"], damping, 5, kept[1])
        torch._foreach_add_([p.grad for p in phi], implicit)
        upper_optimizer.step()
    seconds = {part: median(values) for part, values in times.items()}
    print("medians:", "  ".join(f"{part} {value:.3f} s" for part, value in seconds.items()), flush=True)

    exact_theta = tuple(exact.backbone.parameters())
    gradient = first_order(1, exact, [view.double() for view in views])
    exact_vectors = [tuple(t.double() for t in v) for v in vectors]
    product = bissl.damped_hessian(gradient, exact_theta, damping)
    solutions, count = recycled(product, exact_vectors, 1e-4, steps=100, most=200)
    solutions = [bissl.as_vector(x) for x in solutions]
    print(f"float64 solutions: {count} products", flush=True)
    del gradient, exact, product
    rows = []
    for name, part, solve, keeps in IDEAS:
        part = part or 1
        answers, products = solve(A[part], vectors)
        errors = []
        for x, best, d in zip(answers, solutions, direct):
            off = (bissl.as_vector(x).double() - best).norm() / (best + d).norm()
            errors.append(off.item())
        error = mean(errors)
        last = bissl.as_vector(vectors[-1])
        left = (last - bissl.as_vector(A[1](answers[-1]))).norm() / last.norm()
        work = products * seconds["rebuilt"]
        if keeps:
            work = seconds["graph", part] + products * seconds["product", part]
        held = held_bytes(lambda: first_order(part, lower, views),
                          lambda g: bissl.damped_hessian(g, theta, damping)(vectors[0]), args.device)
        total = N_L * seconds["lower"] + N_U * seconds["upper"] + work
        rows.append(dict(data=Path(args.data).name, setting=f"{args.arch}, {args.image_size} px, batch {len(images)}, damping {damping:g}",
                         idea=name, hessian_batch=len(images) // part, products=products, seconds=f"{total:.3g}",
                         ratio=f"{total / float(rows[0]['seconds'] if rows else total):.3f}", error=f"{error:.4f}",
                         residual=f"{left.item():.3f}", graph_mb=f"{held / 1e6:.0f}"))
        print("  ".join(str(value) for value in list(rows[-1].values())[2:]), flush=True)
    return rows, args.device


def draw(rows):
    """Error against time, a point an idea; one panel a device and data set."""
    groups = sorted({(row["device"], row["data"]) for row in rows})
    figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 5), squeeze=False)
    for axis, group in zip(axes[0], groups):
        own = [row for row in rows if (row["device"], row["data"]) == group]
        for i, row in enumerate(sorted(own, key=lambda row: float(row["error"]))):
            axis.plot(float(row["ratio"]), float(row["error"]), "o")
            axis.annotate(row["idea"], (float(row["ratio"]), float(row["error"])), xytext=(5, -9 if i % 2 else 4), textcoords="offset points", fontsize=7)
        axis.axvline(0.35, color="grey", linestyle=":")
        axis.axhline(float(own[0]["error"]), color="grey", linestyle=":")
        axis.set(yscale="log", xlabel="time of an alternation / the baseline's", ylabel="error of the hypergradient", xlim=(0, 1.9),
                 title=f"{group[1]}, {group[0]}\n(aim: below and left of the dotted lines)")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


def main(argv):
    if "--ckpt" not in argv:
        out = f"{tempfile.gettempdir()}/bench_simclr"
        simclr.main(["--epochs", "6", "--out", out])
        argv = [*argv, "--ckpt", f"{out}.pt"]
    rows, device = measure(argv)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{bench_speed.cpu_name()}, {torch.get_num_threads()} threads"
    rows = [dict(device=name, **row) for row in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["device"], row["data"]) != (name, rows[0]["data"])] + rows
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
