"""BiSSL: bilevel optimisation for self-supervised pre-training and fine-tuning (Zakarias, Hansen,
Tan 2024, arXiv 2410.02387).

Between pre-training and fine-tuning, the backbone is aligned with the downstream task: a lower
level goes on with the pretext task, pulled towards an upper level that learns the downstream task
*through* it: its loss is taken at the lower level's backbone, too (section 3).

    upper:  min_phi  L_D(theta_B*(phi_B), phi_H) + L_D(phi_B, phi_H)
    lower:  theta*(phi_B) = argmin_theta  L_P(theta) + lambda/2 ||theta_B - phi_B||^2

  1. theta = pretext checkpoint, backbone theta_B and head theta_H; phi_B := theta_B; train phi_H
     alone for --head-epochs.
  2. Repeat --alternations times:
     a. --lower-steps (N_L) steps down the lower objective, gradient norm clipped at 10, by the
        pretext's own optimiser.
     b. Draw one pretext batch; H = second derivative of L_P in theta_B on --hessian-batch of it.
     c. --upper-steps (N_U) steps on phi with
        grad_phi_B = A^-1 g_theta + d/dphi_B L_D(phi_B, phi_H),   A = I + H/(lambda + gamma),
        grad_phi_H = d/dphi_H [ L_D(theta_B, phi_H) + L_D(phi_B, phi_H) ],
        where g_theta = d/dtheta_B L_D(theta_B, phi_H), gamma is --damping. Conjugate gradients on
        Hessian-vector products solve A x = g_theta: at most --cg-steps of them, until
        ||g_theta - A x|| <= --cg-tol ||g_theta||. The N_U solves share A: each goes on from the
        directions of those before. The norm of both gradients together is clipped at 10.
        --batch-size, --lr and --weight-decay are those of these steps.
  3. The result is theta_B.

Where grad L_P + lambda (theta_B - phi_B) = 0, and with theta_H held fixed, the implicit function
theorem gives J = d theta_B / d phi_B = (I + H/lambda)^-1. A^-1 differs from the exact J twice.
theta_H is not fixed: the exact one has H_BB - H_BH H_HH^-1 H_HB, a Schur complement, in the place
of H = H_BB. And damped, J = lambda (H + lambda I)^-1 becomes lambda (H + (lambda + gamma) I)^-1 =
lambda/(lambda + gamma) A^-1: that factor, 0.001 with the defaults, is left out, so that theta's
gradient counts as much as phi's own where H is small.

    python bissl.py --ckpt simclr.pt --data flowers --out runs/bissl
    python finetune.py --ckpt runs/bissl.pt --data flowers
    python bissl.py --ckpt simclr.pt --task detect
    python finetune.py --ckpt bissl.pt --task detect

Look at `follow` in the log: how far theta_B has come along the way that phi_B went. Near 0 the
stage was its pretext continued: --lam or --alternations has to grow.
`residual` is ||g_theta - A x|| / ||g_theta|| of the worst solve of an alternation, as the solver's
recurrence has it without a further product, exact but for rounding. Near 1 the implicit gradient is
noise, and --damping or --cg-steps has to grow; the scale of H depends on the network. `products`
counts the products with H. And `lower` should not rise far above its start: theta_B would lose its
pretext.
"""
import copy
import sys
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import byol
import common
import finetune
import simclr

PRETEXTS = {"byol": byol, "simclr": simclr}
PAPER = dict(alternations=500, lower_steps=20, upper_steps=8, lam=0.001, damping=10.0,
             lower_warmup=10, head_epochs=20, cg_steps=5, cg_tol=0.0, recycle=0,
             hessian_batch=1024)  # --paper


def conjugate_gradient(matvec, b, steps, tolerance=0, directions=None):
    """Conjugate gradients on A x = b, for a symmetric positive definite A (Hestenes, Stiefel 1952).

    b: tuple of tensors, seen as one long vector of n numbers; matvec: such a tuple -> A times it.
    -> x, a tuple like b, once ||b - A x|| <= tolerance ||b||, or after `steps` products.
    directions: list of (p (n,), A p (n,), p.Ap) that earlier solves with the same A have made, and
    to which this one appends its own; p.Aq = 0 for any two of them. x starts at the best point of
    their span (Saad, Yeung, Erhel, Guyomarc'h 2000); without any it starts at 0.
    """
    if directions is None:
        directions = []
    rhs = as_vector(b)
    x, r = best_point(rhs, directions)
    for _ in range(steps):
        if tolerance and r.norm() <= tolerance * rhs.norm():
            break
        p = r
        # p is made conjugate to all earlier directions. A textbook's beta does so for the last one,
        # which is the same but for rounding where none are kept from other solves.
        for q, Aq, qAq in directions:
            p = p - ratio(Aq @ p, qAq) * q  # now q.Ap = 0
        Ap = as_vector(matvec(as_tensors(p, b)))
        pAp = p @ Ap
        directions.append((p, Ap, pAp))
        # Where p.Ap = 0 no step can be taken along p, and the next p would be the same. Without a
        # tolerance nothing is compared, so that a GPU never has to wait.
        if tolerance and pAp == 0:
            break
        alpha = ratio(p @ r, pAp)
        x, r = x + alpha * p, r - alpha * Ap
    return as_tensors(x, b)


def best_point(b, directions):
    """x = P (P^T A P)^-1 P^T b, the point of the span of the directions P that is nearest to A^-1 b
    in A's norm, and r = b - A x. After a solve, its directions give its solution once more, and its
    residual. b, x, r: (n,)"""
    x, r = torch.zeros_like(b), b
    for p, Ap, pAp in directions:  # P^T A P is diagonal
        alpha = ratio(p @ r, pAp)
        x, r = x + alpha * p, r - alpha * Ap
    return x, r


def ratio(top, bottom):
    """top / bottom, and 0 where bottom is 0: once a system is solved both are. NaN stays NaN."""
    return torch.where(bottom == 0, torch.zeros_like(top), top / bottom)


def as_vector(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def as_tensors(vector, like):
    parts = vector.split([t.numel() for t in like])
    return tuple(part.view(t.shape) for part, t in zip(parts, like))


def reusable(directions, most):
    """What the next solve starts from: of the first `most` directions, which find the largest
    eigenvalues, those with p.Ap > 0. Where p.Ap < 0 H has an eigenvalue below -(lambda + gamma)."""
    return [direction for direction in directions[:most] if direction[2] > 0]


def relative_residual(b, directions):
    """||b - A x|| / ||b|| of the solve that has just ended, without a product with H: best_point()
    repeats its steps. directions: all that it used, before reusable() drops any."""
    b = as_vector(b)
    _, r = best_point(b, directions)
    return ratio(r.norm(), b.norm())


def damped_hessian(gradient, params, damping):
    """v -> (I + H/damping) v, damping being lambda + gamma; gradient = d loss / d params, made with
    create_graph=True."""
    def matvec(v):
        g_dot_v = sum((s * t).sum() for s, t in zip(gradient, v))
        # H v = d(g.v)/d params (Pearlmutter 1994)
        Hv = torch.autograd.grad(g_dot_v, params, retain_graph=True, materialize_grads=True)
        Hv = common.process_means(Hv)  # each process has images of its own
        return tuple(s + t / damping for s, t in zip(v, Hv))

    return matvec


def inverse_hvp(loss, params, vector, damping, steps, gradient=None, tolerance=0, directions=None):
    """(I + H/damping)^-1 vector by conjugate gradients, H = d2 loss / d params2 (section 3.2;
    damping = lambda + gamma, not --damping alone).

    params, vector: tuples of tensors of the same shapes -> such a tuple. gradient: d loss / d
    params with its graph, if there already (loss is then not used): one graph serves all products
    of an alternation. tolerance, directions: conjugate_gradient()'s.
    """
    if gradient is None:
        gradient = torch.autograd.grad(loss, params, create_graph=True)
    matvec = damped_hessian(gradient, params, damping)
    return conjugate_gradient(matvec, vector, steps, tolerance, directions)


class SharedSolves:
    """A^-1 v for one vector v after the other, all with the same A = I + H/(lambda + gamma).

    gradient: d L_P / d theta_B with its graph, which serves all products. A solve goes on from the
    directions of those before; residuals has one entry for each, products counts their products.
    """

    def __init__(self, args, theta_B, gradient):
        self.args, self.theta_B, self.gradient = args, theta_B, gradient
        self.directions, self.residuals, self.products = [], [], 0

    def solve(self, v):
        args, before = self.args, len(self.directions)
        x = inverse_hvp(None, self.theta_B, v, damping=args.lam + args.damping,
                        steps=args.cg_steps, gradient=self.gradient, tolerance=args.cg_tol,
                        directions=self.directions)
        self.residuals.append(relative_residual(v, self.directions))
        self.products += len(self.directions) - before
        self.directions = reusable(self.directions, args.recycle)
        return x


def pretext_gradient(pretext, lower, x, pretext_args):
    """d L_P / d theta_B on images x, with the graph through which all products with H go.

    In float32, because bfloat16 has too few digits for second derivatives, and with contiguous
    weights, because BatchNorm's second derivative is a third slower in channels_last.
    """
    lower.to(memory_format=torch.contiguous_format)
    exact = Namespace(**vars(pretext_args))
    exact.precision = "float32"
    views = [view.contiguous() for view in pretext.make_views(x, exact)]
    with common.frozen_statistics(lower, second_order=True):
        loss = pretext.loss(lower, views, exact)
        return torch.autograd.grad(loss, tuple(lower.backbone.parameters()), create_graph=True)


def endless(batches):
    """Epoch after epoch of common.Batches, for stages that count steps."""
    while True:
        yield from batches


def squared_distance(theta_B, phi_B):
    """||theta_B - phi_B||^2, phi_B being a constant."""
    return sum((t - p.detach()).square().sum() for t, p in zip(theta_B, phi_B))


def share_of_way(theta_B, phi_B, start_B):
    """<theta_B - start, phi_B - start> / ||phi_B - start||^2: how far theta_B has come along the
    way of phi_B. 0: it has not moved towards phi_B, and the stage was its pretext continued; 1: it
    has come as far."""
    theta_way = as_vector(theta_B) - as_vector(start_B)
    phi_way = as_vector(phi_B) - as_vector(start_B)
    return ratio((theta_way * phi_way).sum(), phi_way.square().sum())


def start_pretext(args, backbone, ckpt):
    """The checkpoint's pretext task: its module, its model around the backbone, its flags as a
    Namespace, and whether its head is new."""
    config, name = {}, None
    if ckpt:
        config = ckpt["config"]
        name = config.get("pretext", ckpt["method"])  # this script's checkpoints have the flag
    fresh_head = name not in PRETEXTS
    if fresh_head:
        args.pretext = args.pretext or "simclr"
        common.tell(f"{args.ckpt or 'a random backbone'} has no pretext head: warms up a new one "
                    f"for {args.pretext}")
        flags = ["--data", args.pretext_data or args.data, "--out", args.out,
                 "--device", args.device, "--batch-size", str(args.pretext_batch_size)]
        config = common.run_config(PRETEXTS[args.pretext].parser().parse_args(flags))
    else:
        if args.pretext not in (None, name):
            common.fail(f"--pretext {args.pretext}: {args.ckpt} has the head of {name}")
        args.pretext = name
        config = config.get("pretext_config", config)
    pretext = PRETEXTS[args.pretext]
    pretext_args = Namespace(**config)
    pretext_args.image_size, pretext_args.precision = args.image_size, args.precision
    pretext_args.device = args.device
    lower = common.place(pretext.make_model(backbone, pretext_args), args.device)
    if not fresh_head:
        lower.head.load_state_dict(ckpt["head"])
    if args.pretext_batch_size != pretext_args.batch_size:
        common.tell(f"lower level: batches of {args.pretext_batch_size}, where {args.pretext} had "
                    f"{pretext_args.batch_size}; give --lower-lr, if its rate was for those")
    return pretext, lower, pretext_args, fresh_head


def load_pretext_data(args, pretext_args):
    """The images of the lower level: those of --pretext-data, or else the checkpoint's."""
    if args.pretext_data is None:
        args.pretext_data = pretext_args.data
        folder = Path(args.pretext_data)
        has_images = (folder / "unlabeled").is_dir() or (folder / "train").is_dir()
        if args.pretext_data in common.KNOWN_DATA:
            has_images = args.pretext_data != "voc"  # which has boxes and masks
        if not has_images:
            common.fail(f"no pretext images at {args.pretext_data}, in train/CLASS or unlabeled: "
                        "give --pretext-data")
    pretext_args.data = args.pretext_data  # where a later stage looks for them
    lower_args = Namespace(**vars(args))
    lower_args.data, lower_args.task = args.pretext_data, "classify"
    return common.load_unlabeled(lower_args, "pretext_batch_size")


def train(args):
    theta_backbone, ckpt = common.start_backbone(args)
    pretext, lower, pretext_args, fresh_head = start_pretext(args, theta_backbone, ckpt)
    args.lower_lr = args.lower_lr or pretext_args.lr / 5
    data = common.load_labelled(args, args.seed)
    probe = common.load_probe(args) if common.few_labels(args) else None  # else val is trained on
    pretext_data = load_pretext_data(args, pretext_args)
    upper = make_upper(args, theta_backbone, data.classes)
    phi_backbone, phi_head = upper
    theta_B, phi_B = tuple(theta_backbone.parameters()), tuple(phi_backbone.parameters())
    lower_optimizer = common.make_optimizer(
        pretext_args.optimizer, [lower], args.lower_lr, pretext_args.weight_decay)
    upper_optimizer = common.make_optimizer("sgd", [upper], args.lr, args.weight_decay)
    start_backbone = copy.deepcopy(theta_backbone)
    run = common.Run(
        args, "bissl", lower, data, pretext_data, epochs=args.alternations, unit="alternation",
        probe=probe, upper_backbone=phi_backbone, upper_head=phi_head,
        start_backbone=start_backbone, lower_optimizer=lower_optimizer,
        upper_optimizer=upper_optimizer)
    run.config["pretext_config"] = common.run_config(pretext_args)
    if not run.history:
        if fresh_head:
            warm_up_pretext_head(args, pretext, lower, pretext_args, pretext_data)
        warm_up_head(args, phi_backbone, phi_head, data)

    pretext_batches = common.Batches(pretext_data, args.pretext_batch_size, whole_only=True)
    task_batches = common.Batches(data, args.batch_size)
    lower_steps = args.alternations * args.lower_steps
    upper_steps = args.alternations * args.upper_steps
    for alternation in run.epochs_left(args.lower_steps + args.upper_steps):
        # Begun here, where the draws have just been seeded: a resumed run gets the same batches.
        lower_batches, upper_batches = endless(pretext_batches), endless(task_batches)

        for step in range(alternation * args.lower_steps, (alternation + 1) * args.lower_steps):
            x, _ = next(lower_batches)
            common.set_learning_rate(lower_optimizer, args.lower_lr, step, lower_steps,
                                     warmup=args.lower_warmup * args.lower_steps)
            pretext_loss = pretext.loss(lower, pretext.make_views(x, pretext_args), pretext_args)
            pull = args.lam / 2 * squared_distance(theta_B, phi_B)
            lower_optimizer.zero_grad()
            (pretext_loss + pull).backward()
            common.average_gradients(lower)
            nn.utils.clip_grad_norm_(lower.parameters(), 10)
            lower_optimizer.step()
            pretext.after_step(lower, pretext_args, step, lower_steps)
            run.add(len(x), lower=pretext_loss)

        x, _ = next(lower_batches)
        x = x[:args.hessian_batch // common.world()]
        # theta_B does not move in the upper steps: one graph serves all products.
        solves = SharedSolves(args, theta_B, pretext_gradient(pretext, lower, x, pretext_args))

        for step in range(alternation * args.upper_steps, (alternation + 1) * args.upper_steps):
            x, y = next(upper_batches)
            common.set_learning_rate(upper_optimizer, args.lr, step, upper_steps)
            theta_loss, phi_loss = downstream_losses(args, theta_backbone, upper, x, y)
            lower_optimizer.zero_grad()
            upper_optimizer.zero_grad()
            # theta_B gets g_theta, phi_B the direct gradient of its own loss, phi_H that of both.
            (theta_loss + phi_loss).backward(inputs=[*theta_B, *upper.parameters()])
            common.average_gradients(lower)
            common.average_gradients(upper)
            implicit = solves.solve([p.grad for p in theta_B])  # A^-1 g_theta
            torch._foreach_add_([p.grad for p in phi_B], implicit)
            nn.utils.clip_grad_norm_(upper.parameters(), 10)  # A^-1 g_theta may be huge
            upper_optimizer.step()
            run.add(len(x), upper_theta=theta_loss, upper_phi=phi_loss)

        residual, products = torch.stack(solves.residuals).max(), solves.products
        del solves  # its graph's memory is free for the next lower steps
        lower.to(memory_format=torch.channels_last)  # back from pretext_gradient()'s layout
        common.average_statistics(upper)
        check_solves(args, alternation, lower, residual)
        run.end_epoch(knn_phi=run.knn(phi_backbone), residual=residual, products=products,
                      follow=share_of_way(theta_B, phi_B, tuple(start_backbone.parameters())),
                      distance=squared_distance(theta_B, phi_B).sqrt())

    say_what_failed(args, run.history[-1])
    draw(args, run.history)
    return run.history[-1]


def make_upper(args, backbone, classes):
    """phi: phi_B, a copy of theta_B, and phi_H, a new head."""
    phi_backbone = copy.deepcopy(backbone)
    if args.compile:
        phi_backbone.compile()  # a copy is not compiled
    phi_head = finetune.make_task(args).head(phi_backbone, classes)
    return nn.ModuleList([phi_backbone, common.place(phi_head, args.device)])


def downstream_losses(args, theta_backbone, upper, x, y):
    """L_D(theta_B, phi_H) and L_D(phi_B, phi_H) on views of images x with labels y. BatchNorm's
    averages in theta_B do not move."""
    task, (phi_backbone, phi_head) = finetune.make_task(args), upper
    x, y = task.views(x, y)
    with common.autocast(args.device, args.precision):  # casts phi_H once, for both losses
        with common.frozen_statistics(theta_backbone):
            theta_loss, _, _ = task.loss(theta_backbone, phi_head, x, y)
        phi_loss, _, _ = task.loss(phi_backbone, phi_head, x, y)
    return theta_loss, phi_loss


def check_solves(args, alternation, lower, residual):
    """End the run where a solve diverged although the lower level is sound."""
    if not residual.isfinite() and common.is_finite(lower):
        common.fail(
            f"the implicit gradient is not finite in alternation {alternation + 1}: try a lower "
            f"learning rate or a higher --damping (now {args.damping:g}). {args.out}.pt was left "
            "as it was")


def say_what_failed(args, last):
    """A line where the last alternation shows that this was no BiSSL, and what to change."""
    if args.lam and last["follow"] < 0.01:
        common.tell(f"theta_B has come {max(0, last['follow']):.2%} of phi_B's way: this was "
                    f"{args.pretext} continued. Raise --lam (now {args.lam:g}) or --alternations")
    if last["residual"] > 1:
        common.tell(f"residual {last['residual']:.3g}: the implicit gradient was noise. Raise "
                    f"--damping (now {args.damping:g})")


def warm_up_head(args, backbone, head, data):
    """Train phi_H alone, so that the first gradients through it mean something: linear probing
    with the backbone frozen."""
    task = finetune.make_task(args)
    optimizer = common.make_optimizer("sgd", [head], args.lr, args.weight_decay)
    backbone.eval()
    for _ in range(args.head_epochs):
        for x, y in common.Batches(data, args.batch_size):
            x, y = task.views(x, y)
            loss, _, _ = task.loss(backbone, head, x, y, frozen=True)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(head)
            optimizer.step()
    backbone.train()


def warm_up_pretext_head(args, pretext, model, pretext_args, data):
    """Train a fresh pretext head alone for --head-epochs epochs. BYOL's target stays as it was
    made: the backbone, and the projector before this training."""
    optimizer = common.make_optimizer(
        pretext_args.optimizer, [model.head], pretext_args.lr, pretext_args.weight_decay)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    for _ in range(args.head_epochs):
        for x, _ in common.Batches(data, args.pretext_batch_size, whole_only=True):
            with common.frozen_statistics(model.backbone):
                loss = pretext.loss(model, pretext.make_views(x, pretext_args), pretext_args)
            optimizer.zero_grad()
            loss.backward(inputs=trained)
            common.average_gradients(model.head)
            optimizer.step()


def draw(args, history):
    """Both levels' losses, the distance between the backbones, how far theta has followed phi, how
    well the linear systems were solved, and the probe of both."""
    panels = [(["lower"], "pretext loss L_P(theta)"),
              (["upper_theta", "upper_phi"], "downstream losses L_D"),
              (["distance"], "||theta_B - phi_B||"),
              (["follow"], "how far theta_B has come along phi_B's way"),
              (["residual"], "worst ||g_theta - A x|| / ||g_theta||"),
              (["knn", "knn_phi"], "k-NN accuracy of theta_B and phi_B, %")]
    figure, axes = plt.subplots(2, 3, figsize=(16, 8))
    for axis, (names, title) in zip(axes.flat, panels):
        common.plot_curves(axis, history, names, x="alternation")
        axis.set_title(title)
    common.save_figure(args, figure)


def parser(paper=False):
    petals = dict(image_size=32, arch="resnet10", batch_size=64, lr=0.03, weight_decay=5e-4,
                  pretext_batch_size=128, labels_per_class=20)
    others = dict(petals, image_size=64, lr=0.005, labels_per_class=0)
    small, few = dict(batch_size=16), dict(labels_per_class=100)
    tasks = {"detect": small, "segment": small, "detect on petals": few, "segment on petals": few}
    p = common.Parser("bissl.py", __doc__, petals, others, tasks=tasks)
    p.label_options()
    finetune.task_option(p)
    p.option("--pretext", str, "pretext task; none: that of --ckpt, or else simclr",
             choices=sorted(PRETEXTS))
    p.option("--pretext-data", common.path, "data set of the pretext task; none: the checkpoint's")
    p.option("--pretext-batch-size", common.bounded(int, 4), "images of a lower step; H is "
             "taken on --hessian-batch of such a batch")
    p.option("--alternations", common.COUNT, "so many times: lower steps, then upper steps", 20)
    p.option("--lower-steps", common.COUNT, "N_L, steps of theta down the lower objective", 20)
    p.option("--upper-steps", common.COUNT, "N_U, steps of phi down the downstream loss", 8)
    p.option("--lower-lr", common.POSITIVE, "peak learning rate of the pretext's optimiser; none: "
             "a fifth of pre-training's")
    p.option("--lower-warmup", common.FROM_ZERO, "alternations of linear warm-up, lower level, at "
             "most half of all", 1)
    p.option("--head-epochs", common.FROM_ZERO, "epochs that warm up phi_H, and a "
             "pretext head where --ckpt brings none", 20)
    p.option("--lam", common.NOT_NEGATIVE, "lambda: how strongly theta_B is pulled towards phi_B",
             0.1)
    p.option("--damping", common.NOT_NEGATIVE, "gamma in (I + H/(lambda + gamma))^-1", 100)
    p.option("--cg-steps", common.COUNT, "products with H in a solve, at most", 5)
    p.option("--cg-tol", common.SHARE, "a solve ends at this ||g_theta - A x|| / ||g_theta||", 0.05,
             metavar="SHARE")
    p.option("--recycle", common.FROM_ZERO, "directions kept for an alternation's later solves, "
             "two vectors of the backbone's size each; 0: every solve starts from zero", 20)
    p.option("--hessian-batch", common.bounded(int, 4), "images of a pretext batch that H is taken "
             "on, at most", 32)
    p.option("--crop", common.bounded(float, 0.01, 1), "smallest area of a downstream crop; the "
             "image's is 1", 0.5)
    p.option("--probe-every", common.COUNT, "alternations between two k-NN probes (with few "
             "labels: val is held out then)", 4)
    figures = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in PAPER.items())
    p.add_argument("--paper", action="store_true",
                   help=f"the paper's figures instead of the defaults: {figures}")
    if paper:
        p.set_defaults(**PAPER)  # a flag that is given still wins
    return p


def main(argv=None):
    typed = sys.argv[1:] if argv is None else argv
    args = parser(paper="--paper" in typed).parse_args(argv)
    if args.lam + args.damping == 0:
        common.fail("--lam and --damping cannot both be 0: H is divided by their sum")
    with common.resumable("bissl.py", args, argv):
        return train(args)


if __name__ == "__main__":
    main()
