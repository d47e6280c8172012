"""COIN: improving fine-tuning of self-supervised pre-training by a class-aware initialisation (Pan et al. 2022, arXiv 2208.00238).

Self-supervised features know pictures, not classes, and cross-entropy has to sort them out from a random classifier. COIN
spends the first part of the fine-tuning budget on pulling each class together and apart from the others, without a classifier;
nothing is added to the budget.

  1. The budget is the --epochs of plain fine-tuning, with one cosine of the learning rate over all of them.
  2. The first alpha of them (this script): SupCon alone on z = g(f(x)), one view an image. Anchor i is pulled to P(i), the
     other images of its class in the batch, among all others.
  3. The rest (finetune.py): cross-entropy + eta SupCon. It reads from the checkpoint how many epochs are left and where
     the cosine stands.

    python coin.py --ckpt simclr.pt          the first 42 of 60 epochs
    python finetune.py --ckpt coin.pt        the other 18: together what `python finetune.py --ckpt simclr.pt` sees

Look at S_Dbw, printed at the end: how compact the classes of the test features are beside the whole, before and after (lower is
better). It is there to read, not to choose flags by: that is what the validation images and their k-NN accuracy are for.

Measured on petals, one SimCLR run, 20 labels a class, 3 seeds: test top-1 76.9 +- 0.6 % after both stages, against 78.3 +- 4.8 % of plain
fine-tuning: no gain. S_Dbw fell from 0.86 to 0.51 - 0.57.

Differs from the paper in: tau 0.1 on petals, where 42 epochs of 0.3 ended at 48 % k-NN accuracy on validation images and 0.1 at 75 %;
momentum without Nesterov and a classifier with bias, as in finetune.py, so that rows differ in the method
alone; S_Dbw is the index of Halkidi and Vazirgiannis (2001), the authors took Tong's variant. From the authors' code in: the
mean over P(i) as in the paper (theirs divides by the batch); any budget (theirs switches stages at 70 of 100 epochs, hard-coded).
"""
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import common


def supcon(z, y, temperature):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362), mean over the anchors that have a positive.

    L_i = -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a != i} exp(z_i.z_a / tau) ), P(i) = others of i's class.
    z (B, D), normalised here; y (B,) int. 0, with a graph, where no anchor has a positive.
    """
    z = F.normalize(common.upcast(z), dim=1)
    every, labels = common.gather(z), common.gather(y)                   # (N, D), (N,): N = B times the number of processes
    column = torch.arange(len(every), device=z.device)
    itself = common.share(column)[:, None] == column                     # (B, N): own anchors, all candidates
    positive = (y[:, None] == labels) & ~itself                          # (B, N), row i: P(i)
    similarity = (z @ every.T / temperature).masked_fill(itself, -torch.inf)  # a != i
    log_p = similarity - similarity.logsumexp(1, keepdim=True)           # (B, N)
    number = positive.sum(1)                                             # (B,) |P(i)|
    per_anchor = -log_p.masked_fill(~positive, 0).sum(1) / number.clamp(min=1)
    return per_anchor.sum() * common.world() / common.all_sum((number > 0).sum()).clamp(min=1)


def make_projector(num_features, dim):
    """g: (B, num_features) -> (B, dim)"""
    return nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, dim))


def start_projector(args, backbone, ckpt):
    """For finetune.py's --supcon: the checkpoint's projector, or a new one where it has none of this kind."""
    if ckpt is None or "2.weight" not in (ckpt["projector"] or {}):
        return make_projector(backbone.num_features, 256)
    try:
        projector = make_projector(backbone.num_features, len(ckpt["projector"]["2.weight"]))
        projector.load_state_dict(ckpt["projector"])
    except (RuntimeError, KeyError) as error:
        common.fail(f"the projector in {args.ckpt} does not fit: {str(error).splitlines()[-1].strip()}")
    return projector


def s_dbw(x, y):
    """Cluster validity index S_Dbw = Scat + Dens_bw (Halkidi and Vazirgiannis 2001, ICDM), lower is better.

    x (n, D), y (n,). Scat: how large the classes' variances are beside the whole's. Dens_bw: how many points lie around the
    middle between two classes' means, beside those around the means (at least 1 is divided by); "around" is within stdev,
    which in hundreds of dimensions is so near that no point is, and S_Dbw is Scat.
    """
    x = x.double()
    member = (y[:, None] == y.unique()).double()                  # (n, C)
    size, classes = member.sum(0), member.shape[1]
    mean = member.T @ x / size[:, None]                           # (C, D)
    variance = member.T @ (x - member @ mean).square() / size[:, None]
    spread = variance.norm(dim=1)                                 # (C,) ||sigma(v_i)||
    scat = spread.mean() / x.var(0, correction=0).norm().clamp(min=1e-300)
    radius = spread.sum().sqrt() / classes                        # "stdev"
    distance = torch.cdist(x, mean, compute_mode="donot_use_mm_for_euclid_dist").square()  # (n, C)
    apart = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist").square()  # (C, C)
    own = (member * distance).sum(1, keepdim=True)                # (n, 1), to the mean of its own class
    middle = (own + distance) / 2 - member @ apart / 4            # (n, C), to (v_own + v_j) / 2: parallelogram law
    near_middle = member.T @ (middle <= radius ** 2).double()     # (C, C), points of class i around u_ij
    near_mean = member.T @ (distance <= radius ** 2).double()     # (C, C), points of class i around v_j
    of_pair = near_mean.diag()[:, None] + near_mean.T             # (C, C), points of classes i and j around v_i
    densest = torch.maximum(of_pair, of_pair.T)
    ratio = (near_middle + near_middle.T) / densest.clamp(min=1)
    density = (ratio.sum() - ratio.diag().sum()) / max(1, classes * (classes - 1))
    return (scat + density).item()


def balanced_batches(labels, batch_size, per_class):
    """Batches of per_class images of each of batch_size // per_class classes; as many images an epoch as there are, or fewer.

    labels (n,) -> list of index tensors. Classes are drawn anew for each batch whatever their size, so that images of a small
    one come up more often. Where there are too few classes for a batch, each gives more; with too few images, fewer.
    """
    members, batch_size = [(labels == label).nonzero()[:, 0] for label in labels.unique()], min(batch_size, len(labels))
    classes = min(len(members), max(2, batch_size // per_class))
    per_class = batch_size // classes if classes == len(members) else min(per_class, batch_size // classes)
    steps = max(1, len(labels) // (classes * per_class))
    chosen = torch.stack([torch.randperm(len(members))[:classes] for _ in range(steps)])  # (steps, classes)
    parts = torch.empty(steps, classes, per_class, dtype=torch.long)
    for i, rows in enumerate(members):
        places = chosen == i
        rounds = -(-int(places.sum()) * per_class // len(rows))  # no image comes up again before its whole class has
        draws = torch.stack([rows[torch.randperm(len(rows))] for _ in range(rounds)]).flatten() if rounds else rows[:0]
        parts[places] = draws[:places.sum() * per_class].view(-1, per_class)
    return list(parts.flatten(1))


def say_positives(labels, batch_size, balanced=0):
    """Stop where no class has two images, and say so where most anchors of a batch have no positive."""
    size = torch.bincount(labels).cpu().double()
    if size.max() < 2:
        common.fail("every class has one labelled image: SupCon has no positives. Give --labels-per-class 2 or more")
    n, steps = len(labels), -(-len(labels) // batch_size)
    small, larger = divmod(n, steps)  # common.batches makes `larger` batches of small + 1 images, the others of small
    others = small * (larger * (small + 1) + (steps - larger) * (small - 1)) / n  # in an image's batch, on average
    expected = others * ((size * (size - 1)).sum() / n / (n - 1)).item()
    if expected < 1 and not balanced:
        print(f"an anchor has {expected:.2f} positives in a batch of {batch_size} on average: a larger --batch-size has more, "
              "and so has coin.py --balanced 4", flush=True)


def train(args):
    coin_epochs = round(args.alpha * args.epochs)
    if not 0 < coin_epochs < args.epochs:
        common.fail(f"--alpha {args.alpha:g} of --epochs {args.epochs} is {coin_epochs} epochs of SupCon: at least one, and not all")
    if args.balanced > args.batch_size // 2:
        common.fail(f"--balanced {args.balanced} leaves no two classes for --batch-size {args.batch_size}")
    backbone, _ = common.start_backbone(args)
    data, test = common.load_labelled(args, args.seed), common.load_data(args, "test")
    common.need_one_label(args, data)
    common.check_classes(args, test.classes, data.classes, "test")
    val = common.load_held_out(args, data)
    say_positives(data.labels, args.batch_size, args.balanced)
    print(f"{coin_epochs} of {args.epochs} epochs: {len(data):,} labelled images of {len(data.classes)} classes", flush=True)
    before = common.features(backbone, test, args)
    projector = make_projector(backbone.num_features, args.dim).to(args.device)
    model = nn.ModuleList([backbone, projector])
    optimizer = common.make_optimizer("sgd", [model], args.lr, args.weight_decay)
    history, labels = [], data.labels.cpu()
    if ckpt := common.resume_checkpoint(args):
        backbone.load_state_dict(ckpt["backbone"])
        projector.load_state_dict(ckpt["projector"])
        optimizer.load_state_dict(ckpt["resume"]["optimizer"])
        history = ckpt["resume"]["history"]
    log = common.Log(args, coin_epochs, history)

    for epoch in range(len(history), coin_epochs):
        torch.manual_seed(args.seed * 1_000_003 + epoch)
        parts = [common.share(part) for part in balanced_batches(labels, args.batch_size, args.balanced)] if args.balanced else None
        steps_per_epoch = len(parts) if parts else -(-len(data) // args.batch_size)
        total, images = torch.zeros((), device=args.device), 0
        for i, (x, y) in enumerate(common.feed(data, parts) if parts else common.batches(data, args.batch_size)):
            common.set_learning_rate(optimizer, args.lr, epoch * steps_per_epoch + i, args.epochs * steps_per_epoch)
            x = common.augment(x, args.image_size, crop=(args.crop, 1))
            with common.autocast(args.device, args.precision):
                z = projector(backbone(x))  # (B, dim)
            loss = supcon(z, y, args.temperature)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            total += loss.detach() * len(y)
            images += len(y)

        common.average_statistics(model)
        total, images = common.all_sum(total), images * common.world()
        knn = None
        if val and ((epoch + 1) % args.probe_every == 0 or epoch + 1 == coin_epochs):
            knn = common.knn_probe(backbone, data, val, args)
        log.epoch(images, loss=total / images, knn=knn)
        rest = dict(epochs=args.epochs - epoch - 1, cosine_start=(epoch + 1) / args.epochs, lr=args.lr, crop=args.crop,
                    weight_decay=args.weight_decay, batch_size=args.batch_size, labels_per_class=args.labels_per_class,
                    fraction=args.fraction, supcon=args.eta, supcon_temperature=args.temperature)
        common.save_checkpoint(
            f"{args.out}.pt", method="coin", arch=args.arch, image_size=args.image_size, backbone=backbone, head=None,
            projector=projector, classes=data.classes, config=dict(common.run_config(args), rest=rest),
            resume=dict(optimizer=optimizer.state_dict(), history=log.history))

    after = common.features(backbone, test, args)
    indices = dict(s_dbw_before=s_dbw(*before), s_dbw_after=s_dbw(*after))
    print("test features: S_Dbw {s_dbw_before:.3f} before, {s_dbw_after:.3f} after (lower is better)".format(**indices), flush=True)
    log.write([*log.history, indices])
    draw(args, log.history, before, after, indices)
    return {**log.history[-1], **indices}


def draw(args, history, before, after, indices):
    """Loss and probe over the epochs, and the test features before and after."""
    figure, axes = plt.subplots(1, 4, figsize=(21, 4.8))
    common.plot_curves(axes[0], history, ["loss"])
    common.plot_curves(axes[1], history, ["knn"])
    axes[1].set_ylabel("k-NN accuracy on validation images, %")
    for axis, (x, y), when in ((axes[2], before, "before"), (axes[3], after, "after")):
        common.plot_features(axis, x, y, f"test features {when}: S_Dbw {indices[f's_dbw_{when}']:.3f}")
    common.save_figure(args, figure)


def parser():
    p = common.Parser(
        "coin.py", __doc__,
        petals=dict(image_size=32, arch="resnet10", epochs=60, batch_size=32, lr=0.03, weight_decay=5e-4, crop=0.5,
                    labels_per_class=20, temperature=0.1),
        others=dict(image_size=64, arch="resnet10", epochs=60, batch_size=32, lr=0.01, weight_decay=5e-4, crop=0.5,
                    labels_per_class=None, temperature=0.3))
    p.label_options()
    p.option("--crop", common.number(float, 0.01, 1), "smallest area of a crop, as a share of the image")
    p.option("--alpha", common.SHARE, "share of --epochs, the whole budget, that SupCon alone gets", 0.7)
    p.option("--eta", common.NOT_NEGATIVE, "weight of SupCon beside cross-entropy that finetune.py takes over", 0.1)
    p.option("--temperature", common.number(float, 1e-3), "tau of SupCon; the authors have 0.3")
    p.option("--dim", common.COUNT, "width of the projections", 256)
    p.option("--balanced", common.FROM_ZERO, "images of each class in a batch, which then holds --batch-size / BALANCED classes; 0: plain "
             "batches", 0)
    p.option("--probe-every", common.COUNT, "epochs between two k-NN probes (only with few labels: val is held out then)", 5)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("coin.py", args, argv):
        return train(args)


if __name__ == "__main__":
    main()
