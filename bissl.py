"""BiSSL: bilevel optimisation for self-supervised pre-training and fine-tuning (Zakarias, Hansen, Tan 2024, arXiv 2410.02387).

Between pre-training and fine-tuning, the backbone is aligned with the downstream task: a lower level goes on with the pretext
task, pulled towards an upper level that learns the downstream task *through* it (section 3).

    upper:  min_phi  L_D(theta_B*(phi_B), phi_H) + L_D(phi_B, phi_H)
    lower:  theta*(phi_B) = argmin_theta  L_P(theta) + lambda/2 ||theta_B - phi_B||^2

  1. theta = pretext checkpoint, backbone theta_B and head; phi_B := theta_B; train phi_H alone for --head-epochs.
  2. Repeat --alternations times:
     a. --lower-steps (N_L) steps down the lower objective, gradient norm clipped at 10, by the pretext's own optimiser.
     b. Draw one pretext batch; H = second derivative of L_P in theta_B. Its first-order graph is built once.
     c. --upper-steps (N_U) steps on phi with, by the implicit function theorem,
        grad_phi_B = A^-1 g_theta + d/dphi_B L_D(phi_B, phi_H),   g_theta = d/dtheta_B L_D(theta_B, phi_H),
        grad_phi_H = d/dphi_H [ L_D(theta_B, phi_H) + L_D(phi_B, phi_H) ],   A = I + H/(lambda + gamma), gamma is --damping.
        Conjugate gradients on Hessian-vector products solve A x = v, v = g_theta: at most --cg-steps of them, until
        ||v - A x|| <= --cg-tol ||v||. The N_U solves share A: each goes on from the directions of those before.
  3. The result is theta_B.

    python bissl.py --ckpt simclr.pt --data flowers --out runs/bissl
    python finetune.py --ckpt runs/bissl.pt --data flowers

Look at `residual` in the log: the true ||v - A x|| / ||v|| of the last solve of an alternation. Near 1 the implicit gradient is
noise, and --damping or --cg-steps has to grow; the scale of H depends on the network.

Measured on petals after SimCLR, 20 labels a class, 3 seeds, same pretext epochs and search: test top-1 89.8 +- 3.1 % after
fine-tuning, against 86.8 +- 6.8 % without this stage: seed by seed 3.0 +- 3.8 more, less than the spread
(tests/bench_accuracy.py), and no more than with J = I (tests/bench_ablation.py). Residual 0.02.

Differs from the paper in: fewer alternations (the paper: 500); on petals lambda 1, at which theta_B hears of phi_B; a
damping of 100 instead of 10, at which five steps solve the system for the default network; a tolerance, and directions shared
by the solves of an alternation: 17 products on emoji and 19 on petals instead of 40, in 0.53 and 0.57 of the alternation's time
(one CPU core; tests/bench_hypergradient.py). --paper gives the paper's figures back, but for learning rates and batch sizes.
phi_H is warmed up at a constant rate. From the authors' code in: plain conjugate gradients as in the paper (--layerwise for
theirs); a fresh Hessian batch each alternation; one graph for all its products; NaN stops the run.
"""
import copy
import itertools
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import byol
import common
import simclr

PRETEXTS = {"byol": byol, "simclr": simclr}
PAPER = dict(alternations=500, lower_steps=20, upper_steps=8, lam=0.001, damping=10.0, lower_warmup=10, head_epochs=20,
             cg_steps=5, cg_tol=0.0, recycle=0)  # --paper
norm = nn.utils.get_total_norm  # of tensors, seen as one long vector


def conjugate_gradient(matvec, b, steps, layerwise=False):
    """`steps` of conjugate gradients on A x = b from x = 0, for a symmetric positive definite A (Hestenes and Stiefel 1952).

    b: tuple of tensors, seen as one long vector; matvec: such a tuple -> A times it. -> x, a tuple like b. layerwise is the
    authors' released variant: every tensor has an alpha and a beta of its own, although A couples them.
    """
    def dot(u, v):  # (number of tensors,), or (1,) if they are one vector
        products = torch.stack([(s * t).sum() for s, t in zip(u, v)])
        return products if layerwise else products.sum(0, keepdim=True).expand(len(products))

    ratio = lambda top, bottom: torch.where((top > 0) & (bottom != 0), top / bottom, torch.zeros_like(top))  # 0/0, once solved
    x, r, p = [torch.zeros_like(t) for t in b], list(b), list(b)
    rr = dot(r, r)
    for _ in range(steps):
        Ap = matvec(tuple(p))
        alpha = ratio(rr, dot(p, Ap))
        x = [s + a * t for s, a, t in zip(x, alpha, p)]
        r = [s - a * t for s, a, t in zip(r, alpha, Ap)]
        rr, rr_before = dot(r, r), rr
        beta = ratio(rr, rr_before)
        p = [s + a * t for s, a, t in zip(r, beta, p)]
    return tuple(x)


def damped_hessian(gradient, params, damping):
    """v -> (I + H/damping) v, from the first-order graph: gradient = d loss / d params, made with create_graph=True."""
    def matvec(v):
        g_dot_v = sum((s * t).sum() for s, t in zip(gradient, v))
        Hv = torch.autograd.grad(g_dot_v, params, retain_graph=True, materialize_grads=True)  # Pearlmutter 1994
        return tuple(s + t / damping for s, t in zip(v, common.average(Hv)))
    return matvec


def inverse_hvp(loss, params, vector, damping, steps, layerwise=False, gradient=None, tolerance=0, recycled=None):
    """(I + H/damping)^-1 vector by conjugate gradients, H = d2 loss / d params2 (section 3.2; damping = lambda + gamma).

    params, vector: tuples of tensors of the same shapes -> such a tuple. gradient: d loss / d params with its graph, if there
    already (loss is then not used): one graph serves all products of an alternation. tolerance and recycled (a Recycled) are
    recycled_conjugate_gradient()'s, which solves where either is given and layerwise is not.
    """
    if gradient is None:
        gradient = torch.autograd.grad(loss, params, create_graph=True)
    matvec, recycled = damped_hessian(gradient, params, damping), recycled or Recycled(most=0)
    if layerwise or not (tolerance or recycled.most):
        return conjugate_gradient(matvec, vector, steps, layerwise)
    return recycled_conjugate_gradient(matvec, vector, steps, tolerance, recycled)


@dataclass
class Recycled:
    """What the solves of one alternation share: A's products with `directions`, and how many products were made."""
    most: int                                       # directions kept at most; each costs two vectors of backbone size
    directions: list = field(default_factory=list)  # (p (n,), A p (n,), p . A p > 0) each; p_i . A p_j = 0 for i != j
    products: int = 0


def recycled_conjugate_gradient(matvec, b, steps, tolerance, recycled):
    """Conjugate gradients that reuse the directions of earlier solves with the same A (Saad, Yeung, Erhel, Guyomarc'h 2000).

    b as in conjugate_gradient(). x starts at the best point of the span of the directions so far, and each new direction is
    the residual made conjugate to all of them; without any these are plain conjugate gradients. Ends once ||b - A x|| <=
    tolerance ||b||, or after `steps` products. The first `most` directions are kept, since the first steps find the largest
    eigenvalues; one with p . A p < 0 (H has an eigenvalue below -damping) serves this solve only.
    """
    flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])
    unflat = lambda v: tuple(part.view(t.shape) for part, t in zip(v.split([t.numel() for t in b]), b))
    r, directions = flat(b), list(recycled.directions)    # r (n,)
    x, enough = torch.zeros_like(r), tolerance * r.norm()
    for p, Ap, pAp in directions:                         # x = P (P^T A P)^-1 P^T b, and P^T A P is diagonal
        alpha = p @ r / pAp
        x, r = x + alpha * p, r - alpha * Ap
    for _ in range(steps):
        if r.norm() <= enough:                            # waits for the device, but a product too many would cost far more
            break
        p = r
        for q, Aq, qAq in directions:
            p = p - Aq @ p / qAq * q                      # now q . A p = 0
        Ap = flat(matvec(unflat(p)))
        pAp = p @ Ap
        recycled.products += 1
        if pAp == 0:                                      # no step length solves this; NaN goes on into x
            break
        alpha = p @ r / pAp
        x, r = x + alpha * p, r - alpha * Ap
        directions.append((p, Ap, pAp))
    recycled.directions = [direction for direction in directions if direction[2] > 0][:recycled.most]
    return unflat(x)


def endless(data, batch_size, whole_only):
    """common.batches() epoch after epoch: for stages that count steps"""
    while True:
        yield from common.batches(data, batch_size, whole_only=whole_only)


def start_pretext(args, backbone, ckpt):
    """The checkpoint's pretext task: its module, its model around the backbone, its flags, and whether its head is new."""
    config = ckpt["config"] if ckpt else {}
    name = config.get("pretext", ckpt and ckpt["method"])
    fresh = name not in PRETEXTS
    if fresh:
        print(f"{args.ckpt or 'a random backbone'} has no pretext head: warms up a new one for {args.pretext}", flush=True)
        flags = ["--data", args.data, "--out", args.out, "--device", args.device, "--batch-size", str(args.pretext_batch_size)]
        config = vars(PRETEXTS[args.pretext].parser().parse_args(flags))
    else:
        args.pretext, config = name, config.get("pretext_config", config)
    pretext, config = PRETEXTS[args.pretext], dict(config, image_size=args.image_size, precision=args.precision)
    model = common.place(pretext.make_model(backbone, config), args.device)
    if not fresh:
        model.head.load_state_dict(ckpt["head"])
    return pretext, model, config, fresh


def train(args):
    if args.lam + args.damping == 0:
        common.fail("--lam and --damping cannot both be 0: H is divided by their sum")
    if (args.hessian_batch or 0) > args.pretext_batch_size:
        common.fail(f"--hessian-batch {args.hessian_batch} is more than --pretext-batch-size {args.pretext_batch_size}")
    lower_backbone, ckpt = common.start_backbone(args)
    pretext, lower, config, fresh_head = start_pretext(args, lower_backbone, ckpt)
    if args.pretext_data is None:
        args.pretext_data = config["data"]
        if args.pretext_data not in common.KNOWN_DATA and not Path(args.pretext_data).is_dir():
            common.fail(f"no pretext images at {args.pretext_data}, where {args.ckpt} was trained: give --pretext-data")
    args.lower_lr = config["lr"] / 5 if args.lower_lr is None else args.lower_lr
    pretext_data = common.load_unlabeled(Namespace(**dict(vars(args), data=args.pretext_data)), "pretext_batch_size")
    data = common.load_labelled(args, args.seed)
    val = common.load_held_out(args, data)

    upper_backbone = copy.deepcopy(lower_backbone)
    if args.compile:
        upper_backbone.compile()  # a copy is not compiled
    upper_head = nn.Linear(upper_backbone.num_features, len(data.classes)).to(args.device)
    lower_optimizer = common.make_optimizer(config["optimizer"], [lower], args.lower_lr, config["weight_decay"])
    upper_optimizer = common.make_optimizer("sgd", [upper_backbone, upper_head], args.lr, args.weight_decay)
    upper = nn.ModuleList([upper_backbone, upper_head])
    theta_B, phi_B = tuple(lower_backbone.parameters()), tuple(upper_backbone.parameters())
    history, damping = [], args.lam + args.damping
    resumed = dict(upper_backbone=upper_backbone, upper_head=upper_head, lower_optimizer=lower_optimizer,
                   upper_optimizer=upper_optimizer)
    if ckpt := common.resume_checkpoint(args):
        lower_backbone.load_state_dict(ckpt["backbone"])
        lower.head.load_state_dict(ckpt["head"])
        for name, part in resumed.items():
            part.load_state_dict(ckpt["resume"][name])
        history = ckpt["resume"]["history"]
    else:
        if fresh_head:
            warm_up_pretext_head(args, pretext, lower, config, pretext_data)
        warm_up_head(args, upper_backbone, upper_head, data)
    log = common.Log(args, args.alternations, history)

    for alternation in range(len(history), args.alternations):
        torch.manual_seed(args.seed * 1_000_003 + alternation)
        sums = torch.zeros(3, device=args.device)  # L_P, L_D(theta_B, phi_H), L_D(phi_B, phi_H)
        lower_batches = endless(pretext_data, args.pretext_batch_size, whole_only=True)
        upper_batches = endless(data, args.batch_size, whole_only=False)

        for i, (x, _) in enumerate(itertools.islice(lower_batches, args.lower_steps)):
            step, steps = alternation * args.lower_steps + i, args.alternations * args.lower_steps
            common.set_learning_rate(lower_optimizer, args.lower_lr, step, steps, warmup=args.lower_warmup * args.lower_steps)
            pretext_loss = pretext.loss(lower, pretext.make_views(x, config), config)
            distance = sum((t - p.detach()).square().sum() for t, p in zip(theta_B, phi_B))  # ||theta_B - phi_B||^2
            lower_optimizer.zero_grad()
            (pretext_loss + args.lam / 2 * distance).backward()
            common.average_gradients(lower)
            nn.utils.clip_grad_norm_(lower.parameters(), 10)
            lower_optimizer.step()
            if pretext is byol:
                lower.update_target(byol.decay(config["decay"], step, steps))
            sums[0] += pretext_loss.detach() / args.lower_steps

        lower.to(memory_format=torch.contiguous_format)  # BatchNorm's second derivative is a third slower in channels_last
        with common.frozen_statistics(lower, second_order=True):  # theta_B and a target stay: one graph for all products
            x, _ = next(lower_batches)
            x = x[:args.hessian_batch // common.world()] if args.hessian_batch else x
            views = [view.contiguous() for view in pretext.make_views(x, config)]
            hessian_loss = pretext.loss(lower, views, dict(config, precision="float32"))
            pretext_gradient = torch.autograd.grad(hessian_loss, theta_B, create_graph=True)
        recycled = Recycled(args.recycle)  # empty anew: the next A is another one
        for i, (x, y) in enumerate(itertools.islice(upper_batches, args.upper_steps)):
            step, steps = alternation * args.upper_steps + i, args.alternations * args.upper_steps
            common.set_learning_rate(upper_optimizer, args.lr, step, steps)
            x = common.augment(x, args.image_size, crop=(args.crop, 1))
            with common.autocast(args.device, args.precision):
                with common.frozen_statistics(lower_backbone):
                    theta_logits = upper_head(lower_backbone(x))  # (B, C)
                phi_logits = upper_head(upper_backbone(x))        # (B, C)
            theta_loss, phi_loss = (common.task_loss(logits, y) for logits in (theta_logits, phi_logits))
            gradients = common.average(torch.autograd.grad(theta_loss + phi_loss, (*theta_B, *upper.parameters())))
            g_theta = gradients[:len(theta_B)]
            for p, g in zip(upper.parameters(), gradients[len(theta_B):]):
                p.grad = torch.empty_like(p).copy_(g)  # in p's memory layout: fused steps go by the position in memory
            implicit = inverse_hvp(
                hessian_loss, theta_B, g_theta, damping, args.cg_steps, args.layerwise, pretext_gradient, args.cg_tol, recycled)
            torch._foreach_add_([p.grad for p in phi_B], implicit)
            upper_optimizer.step()
            sums[1:] += torch.stack([theta_loss.detach(), phi_loss.detach()]) / args.upper_steps

        common.average_statistics(nn.ModuleList([lower, upper]))
        sums, = common.average([sums])
        product = damped_hessian(pretext_gradient, theta_B, damping)(implicit)
        residual = norm(v - Ax for v, Ax in zip(g_theta, product)) / norm(g_theta)
        plain = args.layerwise or not (args.cg_tol or args.recycle)
        products = args.cg_steps * args.upper_steps if plain else recycled.products
        if sums[0].isfinite() and not residual.isfinite():  # the lower level is sound: it is the solve that diverged
            common.fail(f"the implicit gradient is not finite in alternation {alternation + 1}: try a lower learning rate or a "
                        f"higher --damping (now {args.damping:g}). {args.out}.pt was left as it was")
        del hessian_loss, pretext_gradient, product, recycled  # frees graph and directions before the next lower step
        lower.to(memory_format=torch.channels_last)
        distance = norm(t.detach() - p.detach() for t, p in zip(theta_B, phi_B))
        due = (alternation + 1) % args.probe_every == 0 or alternation + 1 == args.alternations
        knn = common.knn_probe(lower_backbone, data, val, args) if val and due else None
        images = args.lower_steps * args.pretext_batch_size + args.upper_steps * args.batch_size
        log.epoch(images, unit="alternation", lower=sums[0], upper_theta=sums[1], upper_phi=sums[2], residual=residual, knn=knn,
                  products=products, distance=distance)
        common.save_checkpoint(
            f"{args.out}.pt", method="bissl", arch=args.arch, image_size=args.image_size, backbone=lower_backbone,
            head=lower.head, classes=data.classes, config=dict(common.run_config(args), pretext_config=config),
            resume=dict({name: part.state_dict() for name, part in resumed.items()}, history=log.history))

    draw(args, log.history)
    return log.history[-1]


def warm_up_head(args, backbone, head, data):
    """Train phi_H alone, so that the first gradients through it mean something: linear probing with the backbone frozen."""
    optimizer = common.make_optimizer("sgd", [head], args.lr, args.weight_decay)
    backbone.eval()
    for _ in range(args.head_epochs):
        for x, y in common.batches(data, args.batch_size):
            with torch.no_grad(), common.autocast(args.device, args.precision):
                x = backbone(common.augment(x, args.image_size, crop=(args.crop, 1)))
            loss = common.task_loss(head(common.upcast(x)), y)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(head)
            optimizer.step()
    backbone.train()


def warm_up_pretext_head(args, pretext, model, config, data):
    """Train a fresh pretext head alone for --head-epochs epochs. BYOL's target stays a copy of backbone and new projector."""
    optimizer = common.make_optimizer(config["optimizer"], [model.head], config["lr"], config["weight_decay"])
    for _ in range(args.head_epochs):
        for x, _ in common.batches(data, args.pretext_batch_size, whole_only=True):
            with common.frozen_statistics(model.backbone):
                loss = pretext.loss(model, pretext.make_views(x, config), config)
            optimizer.zero_grad()
            loss.backward(inputs=[p for p in model.head.parameters() if p.requires_grad])
            common.average_gradients(model.head)
            optimizer.step()


def draw(args, history):
    """Both levels' losses, the distance between the backbones, the probe, and how well the linear systems were solved."""
    figure, axes = plt.subplots(1, 5, figsize=(22, 4))
    for axis, names, title in zip(axes, (["lower"], ["upper_theta", "upper_phi"], ["distance"], ["residual"], ["knn"]),
                                  ("pretext loss L_P(theta)", "downstream losses L_D", "||theta_B - phi_B||",
                                   "||v - A x|| / ||v||", "k-NN accuracy of theta_B, %")):
        common.plot_curves(axis, history, names, x="alternation")
        axis.set_title(title)
    common.save_figure(args, figure)


def parser(paper=False):
    petals = dict(image_size=32, arch="resnet10", batch_size=64, lr=0.03, weight_decay=5e-4, pretext_batch_size=128,
                  alternations=10, lower_steps=20, upper_steps=8, lam=1.0, labels_per_class=20)
    others = dict(petals, image_size=64, lr=0.005, alternations=20, lam=0.001, labels_per_class=None)
    p = common.Parser("bissl.py", __doc__, petals, others)
    p.label_options()
    p.option("--pretext", str, "pretext task where --ckpt brings none; else the checkpoint's is taken", "simclr",
             choices=sorted(PRETEXTS))
    p.option("--pretext-data", str, "data set of the pretext task; without: the checkpoint's")
    p.option("--pretext-batch-size", common.number(int, 4), "images of a lower step, and of the Hessian")
    p.option("--alternations", common.COUNT, "T: lower stage, upper stage, T times over; the paper has 500")
    p.option("--lower-steps", common.COUNT, "N_L")
    p.option("--upper-steps", common.COUNT, "N_U")
    p.option("--lower-lr", common.POSITIVE, "peak learning rate of the pretext's optimiser; none: a fifth of pre-training's")
    p.option("--lower-warmup", common.FROM_ZERO, "alternations of linear warm-up in the lower level", 1)
    p.option("--head-epochs", common.FROM_ZERO, "epochs over the labelled images that warm up phi_H", 20)
    p.option("--lam", common.NOT_NEGATIVE, "lambda: how strongly theta_B is pulled towards phi_B")
    p.option("--damping", common.NOT_NEGATIVE, "gamma, added to lambda in (I + H/(lambda + gamma))^-1; the paper has 10", 100)
    p.option("--cg-steps", common.COUNT, "conjugate-gradient steps a solve, at most", 5)
    p.option("--cg-tol", common.SHARE, "a solve ends once ||v - A x|| / ||v|| is no more than this", 0.05, metavar="SHARE")
    p.option("--recycle", common.FROM_ZERO, "directions kept for an alternation's later solves, two vectors of the backbone's "
             "size each; 0: every solve starts from zero", 20)
    p.option("--hessian-batch", common.number(int, 4), "images of the pretext batch that H is taken on; none: all of them")
    p.add_argument("--layerwise", action="store_true",
                   help="the released code's conjugate gradients, tensor by tensor, without --cg-tol and --recycle")
    p.option("--crop", common.number(float, 0.01, 1), "smallest area of a downstream crop, as a share of the image", 0.5)
    p.option("--probe-every", common.COUNT, "alternations between two k-NN probes (with few labels: val is held out then)", 4)
    p.add_argument("--paper", action="store_true", help="the paper's figures instead of the defaults: {}".format(
        " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in PAPER.items())))
    if paper:
        p.set_defaults(**PAPER)  # a flag that is given still wins
    return p


def main(argv=None):
    args = parser(paper="--paper" in (sys.argv[1:] if argv is None else argv)).parse_args(argv)
    with common.resumable("bissl.py", args, argv):
        return train(args)


if __name__ == "__main__":
    main()
