"""Does BiSSL's A^-1 g predict what the lower level makes of a move of phi?

    python tests/bench_bilevel.py                  README's commands, 5 seeds: two hours of one core
    python tests/bench_bilevel.py --seeds 0 2      these seeds; their rows replace the old ones
    python tests/bench_bilevel.py --solvers        the other question, below

A state is theta and phi as they stand before bissl.py's first alternation and after 1, 2, 5 and 10.
There phi_B moves by a fixed length against a direction, and the lower level takes N_L steps from
theta, once with phi moved and once with phi as it was, on the same batches and views. dtheta is the
difference of the two results, so all that the move has brought about.
  directions  implicit with gamma 1, 10, 100 (A^-1 g_theta, solved to a residual of 0.05 or for 60
              products), J = I (g_theta), the direct gradient of L_D(phi_B, phi_H), implicit 100 +
              direct, and a random one
  change      of L_D(theta_B, phi_H), on train and on val, images whole, averages of BatchNorm: what
              the implicit gradient is made to lower
  follow      <dtheta, dphi> / ||dphi||^2
  cosine      of dtheta and A^-1 dphi, gamma 100: does theta go where the theorem sends it?
  rest        ||gradient of the lower objective|| / ||gradient of L_P||, of eight batches' mean: 0
              where theta is a best response
  residual    of the direction's solve
The lower level's optimiser begins anew, at bissl.py's rate without warm-up. Other lengths are tried
before the first alternation and after 5, other N_L and optimisers (a fifth of simclr.py's rate for
each) before the first. Writes tests/results/bilevel.csv and bilevel.png.

With --solvers: how well is A^-1 g known? Before the first alternation A x = g_theta is solved for
the labelled batches of eight upper steps, with gamma 10 and 100, by the paper's five steps from
zero, by the released code's (layer-wise), and as bissl.py does, each with H on 128 and on 32
images.
  products    Hessian-vector products of the eight solves together
  error       ||x - x*|| / ||x*||, mean of the eight; x* is solved in float64 with H on all 128
              images, to a residual of 1e-4
Writes tests/results/bilevel-solvers.csv.
"""
import argparse
import copy
import itertools
import shutil
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import benches
import bissl
import common
import simclr

FIELDS = ("device", "seed", "alternations", "direction", "length", "optimizer", "steps",
          "change_train", "change_val", "follow", "cosine", "rest", "residual")
AFTER, LENGTHS, LENGTH = (0, 1, 2, 5, 10), (0.05, 0.1, 0.5, 1, 2), 0.2
MORE_LENGTHS_AFTER = (0, 5)
GAMMAS, SOLVE_STEPS, USUAL_STEPS = (1, 10, 100), 60, 20
LONG_DIRECTIONS = ("implicit 10", "J = I", "direct", "random")
LOWER_RUNS = [("adamw", 80), ("adamw", 320), ("sgd", 20), ("sgd", 80), ("lars", 20), ("lars", 80)]
SOLVER_FIELDS = ("device", "seed", "gamma", "images", "solver", "products", "error")
SOLVER_GAMMAS, H_IMAGES, N_U = (10, 100), (128, 32), 8
EXACT, EXACT_STEPS = 1e-4, 100


class Enough(Exception):
    """Ends bissl.py once the last state is there."""


def make_states(seed, folder, argv, after):
    """The flags of a run of bissl.py, and a checkpoint file for each number of alternations in
    `after` but 0, which needs none."""
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / "simclr.pt"
    if not start.exists():
        simclr.main(["--seed", str(seed), "--out", str(folder / "simclr"), *argv.simclr])
    out = folder / "bissl"
    flags = ["--ckpt", str(start), "--seed", str(seed), "--out", str(out), *argv.bissl]
    paths = {k: folder / f"bissl-{k}.pt" for k in after if k}
    save = common.Run.save

    def keep(run):
        save(run)
        done = len(run.history)
        if done in paths:
            shutil.copy(f"{out}.pt", paths[done])
        if done == max(after):
            raise Enough

    missing = [path for path in paths.values() if not path.exists()]
    if missing:
        with mock.patch.object(common.Run, "save", keep):
            try:
                bissl.main(flags)
            except Enough:
                pass
    return flags, paths


class State:
    """Both levels as they stand after some alternations."""

    def __init__(self, flags, path):
        self.args = args = bissl.parser().parse_args(flags)
        theta_B, ckpt = common.start_backbone(args, say=False)
        self.pretext, self.lower, self.pretext_args, _ = bissl.start_pretext(args, theta_B, ckpt)
        self.images = bissl.load_pretext_data(args, self.pretext_args)
        self.train, self.val = common.load_labelled(args, args.seed), common.load_data(args, "val")
        self.phi_B, self.phi_H = bissl.make_upper(args, theta_B, self.train.classes)
        if path is None:
            torch.manual_seed(args.seed)
            bissl.warm_up_head(args, self.phi_B, self.phi_H, self.train)
        else:
            ckpt = common.load_checkpoint(path)
            theta_B.load_state_dict(ckpt["backbone"])
            self.lower.head.load_state_dict(ckpt["head"])
            self.phi_B.load_state_dict(ckpt["resume"]["upper_backbone"])
            self.phi_H.load_state_dict(ckpt["resume"]["upper_head"])
        self.theta = tuple(theta_B.parameters())
        self.phi = tuple(self.phi_B.parameters())

    def batches(self, seed):
        """Endless pretext batches, and then their views, that depend on the seed alone."""
        torch.manual_seed(seed)
        source = common.Batches(self.images, self.args.pretext_batch_size, whole_only=True)
        return bissl.endless(source)

    def lower_loss(self, lower, x, phi):
        """L_P, and L_P + lambda/2 ||theta_B - phi||^2, on images x."""
        views = self.pretext.make_views(x, self.pretext_args)
        loss = self.pretext.loss(lower, views, self.pretext_args)
        theta = tuple(lower.backbone.parameters())
        return loss, loss + self.args.lam / 2 * bissl.squared_distance(theta, phi)

    def respond(self, phi, name, steps):
        """The lower level after `steps` steps towards phi."""
        lower = copy.deepcopy(self.lower)
        rate = simclr.parser().choices["optimizer"].get(name, dict(lr=2e-3))["lr"] / 5
        optimizer = common.make_optimizer(name, [lower], rate, self.pretext_args.weight_decay)
        for x, _ in itertools.islice(self.batches(seed=1), steps):
            _, objective = self.lower_loss(lower, x, phi)
            optimizer.zero_grad()
            objective.backward()
            nn.utils.clip_grad_norm_(lower.parameters(), 10)
            optimizer.step()
        return lower

    def rest(self):
        """How large the gradient of the lower objective is, against that of L_P alone."""
        whole, alone = 0, 0
        for x, _ in itertools.islice(self.batches(seed=2), 8):
            loss, objective = self.lower_loss(self.lower, x, self.phi)
            for_whole = torch.autograd.grad(objective, self.theta, retain_graph=True)
            whole = whole + bissl.as_vector(for_whole)
            alone = alone + bissl.as_vector(torch.autograd.grad(loss, self.theta))
        return (whole.norm() / alone.norm()).item()

    def downstream_gradients(self):
        """g_theta, and the direct gradient of phi_B, over all labelled images."""
        x = common.test_crop(self.train.images[self.train.rows], self.args.image_size)
        found = []
        for backbone in (self.lower.backbone, self.phi_B):
            with common.frozen_statistics(backbone):
                loss = F.cross_entropy(self.phi_H(backbone(x)), self.train.labels)
            found.append(torch.autograd.grad(loss, tuple(backbone.parameters())))
        return found

    def upper_gradients(self, count):
        """g_theta on `count` batches of labelled views."""
        torch.manual_seed(5)
        batches = bissl.endless(common.Batches(self.train, self.args.batch_size))
        upper, found = nn.ModuleList([self.phi_B, self.phi_H]), []
        for x, y in itertools.islice(batches, count):
            loss, _ = bissl.downstream_losses(self.args, self.lower.backbone, upper, x, y)
            found.append(torch.autograd.grad(loss, self.theta))
        return found

    def pretext_gradient(self, lower, views):
        """bissl.pretext_gradient() of the lower level on views that are made already, in their
        type."""
        given = argparse.Namespace(make_views=lambda views, _: views, loss=self.pretext.loss)
        return bissl.pretext_gradient(given, lower, views, self.pretext_args)

    def directions(self):
        """name: a vector v of length 1, the residual of the solve that made it, and A^-1 v with the
        last gamma."""
        g_theta, direct = self.downstream_gradients()
        x, _ = next(self.batches(seed=3))
        graph = bissl.pretext_gradient(self.pretext, self.lower, x[:64], self.pretext_args)
        found = {"J = I": (g_theta, 0), "direct": (direct, 0)}
        for gamma in GAMMAS:
            product = bissl.damped_hessian(graph, self.theta, self.args.lam + gamma)
            tried = []
            implicit = bissl.conjugate_gradient(product, g_theta, SOLVE_STEPS, 0.05, tried)
            found[f"implicit {gamma}"] = implicit, bissl.relative_residual(g_theta, tried).item()
        implicit, residual = found[f"implicit {GAMMAS[-1]}"]
        both = tuple(s + t for s, t in zip(implicit, direct))
        found["implicit + direct"] = both, residual
        torch.manual_seed(4)
        found["random"] = tuple(torch.randn_like(p) for p in self.phi), 0
        unit = {}
        for name, (vector, residual) in found.items():
            length = bissl.as_vector(vector).norm()
            vector = tuple(t / length for t in vector)
            solved = bissl.conjugate_gradient(product, vector, SOLVE_STEPS, 0.05)
            unit[name] = vector, residual, bissl.as_vector(solved)
        self.lower.to(memory_format=torch.channels_last)
        return unit

    @torch.no_grad()
    def downstream_losses(self, lower):
        """L_D(theta_B, phi_H) on train and on val."""
        lower.backbone.eval()
        losses = []
        for store in (self.train, self.val):
            x = common.test_crop(store.images[store.rows], self.args.image_size)
            logits = torch.cat([self.phi_H(lower.backbone(part)) for part in x.split(250)])
            losses.append(F.cross_entropy(logits, store.labels).item())
        return np.array(losses)


def plans(alternations):
    """(names of directions or None for all, length, optimiser, N_L) of what is tried in a state."""
    tried = [(None, LENGTH, "adamw", USUAL_STEPS)]
    if alternations in MORE_LENGTHS_AFTER:
        tried += [(None, length, "adamw", USUAL_STEPS) for length in LENGTHS]
    if alternations == 0:
        tried += [(LONG_DIRECTIONS, LENGTH, name, steps) for name, steps in LOWER_RUNS]
    return tried


def measure(state, alternations):
    directions, rest, unmoved, rows = state.directions(), state.rest(), {}, []
    for names, length, optimizer, steps in plans(alternations):
        if (optimizer, steps) not in unmoved:
            lower = state.respond(state.phi, optimizer, steps)
            theta = bissl.as_vector([p.detach() for p in lower.backbone.parameters()])
            unmoved[optimizer, steps] = theta, state.downstream_losses(lower)
        theta_0, losses_0 = unmoved[optimizer, steps]
        for name in names or directions:
            direction, residual, solved = directions[name]
            dphi = tuple(-length * t for t in direction)
            moved = tuple(p.detach() + t for p, t in zip(state.phi, dphi))
            lower = state.respond(moved, optimizer, steps)
            theta = bissl.as_vector([p.detach() for p in lower.backbone.parameters()])
            change = state.downstream_losses(lower) - losses_0
            dtheta, flat = theta - theta_0, bissl.as_vector(dphi)
            rows.append(dict(
                seed=state.args.seed, alternations=alternations, direction=name, length=length,
                optimizer=optimizer, steps=steps, change_train=f"{change[0]:.5f}",
                change_val=f"{change[1]:.5f}", follow=f"{(dtheta @ flat / (flat @ flat)):.4f}",
                cosine=f"{F.cosine_similarity(dtheta, -solved, 0):.4f}", rest=f"{rest:.3f}",
                residual=f"{residual:.3g}"))
            print(" ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


# -------------------------------------------------------------------------------------- the solvers

class Counted:
    """A matvec that counts its products."""

    def __init__(self, matvec):
        self.matvec, self.products = matvec, 0

    def __call__(self, v):
        self.products += 1
        return self.matvec(v)


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


def five_steps(matvec, vectors):
    return [bissl.conjugate_gradient(matvec, v, 5) for v in vectors]


def five_layerwise(matvec, vectors):
    return [layerwise(matvec, v, 5) for v in vectors]


def shared(matvec, vectors, steps=5, tolerance=0.05, most=20):
    """As bissl.py solves the systems of an alternation, with its defaults."""
    directions, answers = [], []
    for v in vectors:
        answers.append(bissl.conjugate_gradient(matvec, v, steps, tolerance, directions))
        directions = bissl.reusable(directions, most)
    return answers


SOLVERS = {"5 steps": five_steps, "5 steps, layer-wise": five_layerwise,
           "shared directions": shared}


def measure_solvers(state):
    """A row for each gamma, number of images that H is taken on, and solver."""
    vectors, rows = state.upper_gradients(N_U), []
    x, _ = next(state.batches(seed=3))
    views = state.pretext.make_views(x, state.pretext_args)
    graphs = {}
    for images in H_IMAGES:
        graphs[images] = state.pretext_gradient(state.lower, [view[:images] for view in views])
    exact = copy.deepcopy(state.lower).double()
    exact_theta = tuple(exact.backbone.parameters())
    exact_graph = state.pretext_gradient(exact, [view.double() for view in views])
    exact_vectors = [tuple(t.double() for t in v) for v in vectors]
    for gamma in SOLVER_GAMMAS:
        damping = state.args.lam + gamma
        product = bissl.damped_hessian(exact_graph, exact_theta, damping)
        solutions = shared(product, exact_vectors, EXACT_STEPS, EXACT, 200)
        for images, name in itertools.product(H_IMAGES, SOLVERS):
            product = Counted(bissl.damped_hessian(graphs[images], state.theta, damping))
            errors = []
            for x, x_star in zip(SOLVERS[name](product, vectors), solutions):
                x, x_star = bissl.as_vector(x).double(), bissl.as_vector(x_star)
                errors.append(((x - x_star).norm() / x_star.norm()).item())
            rows.append(dict(seed=state.args.seed, gamma=gamma, images=images, solver=name,
                             products=product.products, error=f"{np.mean(errors):.4f}"))
            print(" ".join(str(value) for value in rows[-1].values()), flush=True)
    state.lower.to(memory_format=torch.channels_last)
    return rows


# ------------------------------------------------------------------------------------ what came out

def mean_of(rows, key, **wanted):
    """Mean over the seeds of the rows that have the wanted values; nan without any."""
    values = []
    for row in rows:
        if all(str(row[name]) == str(value) for name, value in wanted.items()):
            values.append(float(row[key]))
    return np.mean(values) if values else np.nan


def draw(rows):
    """What a move of phi brings, by its direction and length; how much theta follows, by the steps
    that it has; both over the alternations."""
    names = list(dict.fromkeys(row["direction"] for row in rows))
    figure, axes = plt.subplots(2, 2, figsize=(13, 9))
    usual = dict(optimizer="adamw", steps=USUAL_STEPS)
    for axis, after in zip(axes[0], MORE_LENGTHS_AFTER):
        lengths = sorted([*LENGTHS, LENGTH])
        for name in names:
            changes = [mean_of(rows, "change_val", alternations=after, direction=name,
                               length=length, **usual) for length in lengths]
            axis.plot(lengths, changes, "o-", label=name)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="length of phi's move", title=f"after {after} alternations",
                 ylabel="change of L_D(theta, phi_H) on val")
        axis.set_yscale("symlog", linthresh=0.01)
    axes[0, 0].legend(fontsize=8)
    usual = dict(alternations=0, length=LENGTH, direction="J = I")
    for optimizer in ("adamw", "sgd", "lars"):
        follow = [mean_of(rows, "follow", optimizer=optimizer, steps=steps, **usual)
                  for steps in (USUAL_STEPS, 80, 320)]
        axes[1, 0].plot((USUAL_STEPS, 80, 320), follow, "o-", label=optimizer)
    axes[1, 0].legend()
    axes[1, 0].set(xscale="log", xlabel="N_L", ylabel="follow", title="share of a move along "
                   "J = I that theta makes, by N_L and optimiser")
    usual = dict(optimizer="adamw", steps=20, length=LENGTH)
    for key, direction in (("rest", "J = I"), ("cosine", "J = I"), ("follow", "J = I"),
                           ("cosine", "random")):
        values = [mean_of(rows, key, alternations=after, direction=direction, **usual)
                  for after in AFTER]
        axes[1, 1].plot(AFTER, values, "o-", label=f"{key}, {direction}")
    axes[1, 1].legend(fontsize=8)
    axes[1, 1].set(xlabel="alternations before it", ylim=(0, None),
                   title="is theta a best response (rest 0), does it go where A^-1 sends it?")
    figure.tight_layout()
    benches.save_figure(figure, benches.RESULTS / "bilevel.png")


def main(argv=None):
    p = benches.bare_parser(__doc__)
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    p.add_argument("--runs", default="runs/bilevel", help="folder of the checkpoints")
    p.add_argument("--solvers", action="store_true")
    p.add_argument("--simclr", type=str.split, default=[], help="flags for simclr.py")
    p.add_argument("--bissl", type=str.split, default=[], help="flags for bissl.py")
    args = p.parse_args(argv)
    key, path = ("device", "seed"), benches.RESULTS / "bilevel.csv"
    after = AFTER[:1] if args.solvers else AFTER
    for seed in args.seeds:
        flags, paths = make_states(seed, Path(args.runs) / f"seed{seed}", args, after)
        rows = []
        for alternations in after:
            state = State(flags, paths.get(alternations))
            if args.solvers:
                rows += measure_solvers(state)
            else:
                rows += measure(state, alternations)
        device = benches.device_name(state.args.device)
        rows = [dict(row, device=device) for row in rows]
        if args.solvers:
            solvers = path.with_name("bilevel-solvers.csv")
            benches.replace_rows(rows, solvers, key, SOLVER_FIELDS)
        else:
            draw(benches.replace_rows(rows, path, key, FIELDS))


if __name__ == "__main__":
    main()
