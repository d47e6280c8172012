"""COIN: improving fine-tuning of self-supervised models with contrastive initialisation (Pan et al.
2022, arXiv 2208.00238).

Self-supervised features know pictures, not classes, and cross-entropy has to sort them out from a
random classifier. COIN spends the first part of the fine-tuning budget on pulling each class
together and apart from the others, without a classifier; nothing is added to the budget.

  1. The budget is the --epochs of plain fine-tuning, with one cosine of the learning rate over all.
  2. The first alpha of them (this script): SupCon alone on z = g(f(x)), one view an image. Anchor i
     is pulled to P(i), the other images of its class in the batch, among all others.
  3. The rest (finetune.py): cross-entropy + eta SupCon. It reads from the checkpoint how many
     epochs of the budget are spent, and goes on there: in the cosine, and in the draws. It takes
     over this script's rate, weight decay, batch size, crop and labels, too: plain fine-tuning
     needs the same ones to be comparable.

Classification only: its pairs are images of one class.

    python coin.py --ckpt simclr.pt          the first 84 of 120 epochs
    python finetune.py --ckpt coin.pt        the other 36: together what plain fine-tuning sees

Look at S_Dbw, printed at the end: how compact the classes of the features are, before and after
(lower is better), on val, or on test where val is trained on. It is there to read; flags are chosen
by the k-NN accuracy on val.
"""
import itertools
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import common


def supcon(z, y, temperature):
    """Supervised contrastive loss (L_out of Khosla et al. 2020, arXiv 2004.11362), mean over the
    anchors that have a positive.

    L_i = -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a != i} exp(z_i.z_a / tau) ),
    P(i): the others of i's class. z (B, D), normalised here (zeros stay zeros); y (B,) int. ->
    scalar of z's type, float32 for half types; 0, with a graph, where no anchor has a positive.
    """
    z = F.normalize(common.upcast(z), dim=1)
    every, labels = common.gather(z), common.gather(y)          # (N, D), (N,): N of all processes
    column = torch.arange(len(every), device=z.device)
    itself = common.own_rows(column)[:, None] == column         # (B, N): is a column the anchor?
    positive = (y[:, None] == labels) & ~itself                 # (B, N), row i: P(i)
    similarity = z @ every.T / temperature
    similarity = similarity.masked_fill(itself, -torch.inf)     # a != i
    log_p = similarity - similarity.logsumexp(1, keepdim=True)  # (B, N)
    size = positive.sum(1)                                      # (B,) |P(i)|
    per_anchor = -log_p.masked_fill(~positive, 0).sum(1) / size.clamp(min=1)
    anchors = (size > 0).sum()                                  # those that have a positive
    return common.part_of_mean(per_anchor.sum(), anchors)


def make_projector(num_features, dim):
    """g: features f(x) (B, num_features) -> projections (B, dim), not normalised"""
    return nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU(),
                         nn.Linear(num_features, dim))


def start_projector(num_features, ckpt):
    """For finetune.py's --eta: the checkpoint's projector, or a new one where it has none of this
    kind."""
    state, dim = {}, 256
    if ckpt and ckpt["projector"]:
        state = ckpt["projector"]
    if "2.weight" in state:  # its last layer's
        dim = len(state["2.weight"])
    projector = make_projector(num_features, dim)
    if common.shapes(state) == common.shapes(projector.state_dict()):
        projector.load_state_dict(state)
    return projector


def s_dbw(x, y):
    """Cluster validity index S_Dbw = Scat + Dens_bw (Halkidi and Vazirgiannis 2001, ICDM), lower is
    better. x (n, D), y (n,) -> float.

    Scat = mean_i ||sigma(v_i)|| / ||sigma(x)||, the variances of a class and of all. Dens_bw = mean
    over i != j of density(u_ij) / max(density(v_i), density(v_j)), v_i: class means, u_ij = (v_i +
    v_j) / 2, density(u): points of classes i and j within stdev = sqrt(sum_i ||sigma(v_i)||) / C of
    u. In hundreds of dimensions no point is that near: there S_Dbw is Scat.
    """
    x, labels = x.double(), y.unique()
    member = (y[:, None] == labels).double()                             # (n, C)
    size, classes = member.sum(0), len(labels)
    v = member.T @ x / size[:, None]                                     # (C, D) means
    variance = member.T @ (x - member @ v).square() / size[:, None]      # (C, D)
    spread = variance.norm(dim=1)                                        # (C,) ||sigma(v_i)||
    scat = spread.mean() / x.var(0, correction=0).norm()
    stdev = spread.sum().sqrt() / classes
    at_mean, at_middle = x.new_zeros(classes, classes), x.new_zeros(classes, classes)
    for i, label in enumerate(labels):
        of_class = x[y == label]
        at_mean[i] = points_around(of_class, v, stdev)                   # points of class i at v_j
        at_middle[i] = points_around(of_class, (v[i] + v) / 2, stdev)    # points of class i at u_ij
    of_both = at_mean.diag()[:, None] + at_mean.T                        # (C, C), of i and j at v_i
    most = torch.maximum(of_both, of_both.T).clamp(min=1)
    ratio = (at_middle + at_middle.T) / most
    density = (ratio.sum() - ratio.diag().sum()) / max(1, classes * (classes - 1))
    return (scat + density).item()


def points_around(points, centres, radius):
    """How many of the points (n, D) lie within the radius of each centre (C, D): (C,)"""
    distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance <= radius).double().sum(0)


def shuffled_forever(rows):
    """The rows in a random order again and again: none comes up twice before all have."""
    while True:
        yield from rows[torch.randperm(len(rows))].tolist()


def balanced_sizes(labels, batch_size, per_class):
    """(classes of a batch, images of each, batches of an epoch) for balanced_batches()."""
    available = len(labels.unique())
    batch_size = min(batch_size, len(labels))
    classes = min(available, max(2, batch_size // per_class))
    most = batch_size // classes
    per_class = most if classes == available else min(per_class, most)
    return classes, per_class, max(1, len(labels) // (classes * per_class))


def balanced_batches(labels, batch_size, per_class):
    """Batches of per_class images of each of batch_size // per_class classes; as many images an
    epoch as there are, or fewer. labels (n,) -> list of index tensors.

    Classes are drawn anew for each batch whatever their size, so that images of a small one come up
    more often; of one with fewer than per_class, some are twice in a batch, in two views that count
    as positives of each other. Where a batch has room for more classes than there are, each gives
    more. Where there are fewer images than batch_size, batches are smaller.
    """
    classes, per_class, steps = balanced_sizes(labels, batch_size, per_class)
    members = []
    for label in labels.unique():
        members.append(shuffled_forever((labels == label).nonzero()[:, 0]))
    chosen = [torch.randperm(len(members))[:classes].tolist() for _ in range(steps)]
    batches = []
    for some in chosen:
        rows = []
        for i in some:
            rows.extend(itertools.islice(members[i], per_class))
        batches.append(torch.tensor(rows))
    return batches


class BalancedBatches(common.Batches):
    """common.Batches of balanced_batches()."""

    def __init__(self, store, batch_size, per_class):
        super().__init__(store, batch_size)
        self.per_class, self.labels = per_class, store.labels.cpu()
        classes, of_each, self.steps = balanced_sizes(self.labels, batch_size, per_class)
        if classes * of_each < 2 * common.world():  # BatchNorm cannot work on one image
            common.fail(f"--balanced {per_class} makes batches of {classes * of_each} images, "
                        f"fewer than two for each process ({common.world()})")

    def __iter__(self):
        rows = balanced_batches(self.labels, self.batch_size, self.per_class)
        return common.feed(self.store, [common.own_rows(part) for part in rows])


def say_positives(labels, batch_size, balanced=0):
    """Stop where no class has two images, and say so where an anchor has fewer than one positive in
    a batch on average."""
    size, n = torch.bincount(labels).double(), len(labels)
    pairs = (size * (size - 1)).sum().item()  # ordered pairs of one class, of n (n - 1)
    if not pairs:
        common.fail("every class has one labelled image: SupCon has no positives. Give "
                    "--labels-per-class 2 or more, or a larger --fraction")
    others = n / math.ceil(n / batch_size) - 1
    expected = others * pairs / (n * (n - 1))
    if expected < 1 and not balanced:
        common.tell(f"an anchor has {expected:.2f} positives in a batch of {batch_size} on "
                    "average: a larger --batch-size has more, and so has coin.py --balanced 4")


def train(args):
    coin_epochs = supcon_epochs(args)
    backbone, _ = common.start_backbone(args)
    data = common.load_labelled(args, args.seed)
    common.need_one_label(args, data)
    val = common.load_val(args) if common.few_labels(args) else None  # else it is trained on
    if val:
        shown, split = val, "val"
    else:  # test is looked at in no other case
        shown, split = common.load_data(args, "test"), "test"
    say_positives(data.labels, args.batch_size, args.balanced)
    common.tell(f"{coin_epochs} of {args.epochs} epochs are for SupCon alone")
    before = common.features(backbone, shown, args)
    projector = make_projector(backbone.num_features, args.dim)
    model = common.place(nn.ModuleDict(dict(backbone=backbone, projector=projector)), args.device)
    optimizer = common.make_optimizer("sgd", [model], args.lr, args.weight_decay)
    batches = common.Batches(data, args.batch_size)
    if args.balanced:
        batches = BalancedBatches(data, args.batch_size, args.balanced)
    steps = args.epochs * len(batches)
    warmup = warmup_epochs(args) * len(batches)

    probe = common.load_probe(args) if val else None
    run = common.Run(args, "coin", model, data, epochs=coin_epochs, probe=probe,
                     draws="fine-tuning", optimizer=optimizer)
    for epoch in run.epochs_left(len(batches)):
        for step, (x, y) in enumerate(batches, start=epoch * len(batches)):
            common.set_learning_rate(optimizer, args.lr, step, steps, warmup)
            x = common.augment(x, args.image_size, crop=(args.crop, 1))
            with common.autocast(args.device, args.precision):
                z = projector(backbone(x))  # (B, d)
            loss = supcon(z, y, args.temperature)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            run.add(len(x), loss=loss)
        run.config["rest"] = rest_of_budget(args, epoch + 1)
        run.end_epoch()

    after = common.features(backbone, shown, args)
    indices = dict(s_dbw_before=s_dbw(*before), s_dbw_after=s_dbw(*after))
    common.tell(f"{split} features: S_Dbw {indices['s_dbw_before']:.3f} before, "
                f"{indices['s_dbw_after']:.3f} after")
    common.write_lines(args, [*run.history, indices])
    draw(args, run.history, before, after, indices)
    return {**run.history[-1], **indices}


def rest_of_budget(args, done):
    """The flags with which finetune.py goes on after `done` epochs of the budget."""
    names = ("epochs", "lr", "weight_decay", "batch_size", "crop", "labels_per_class", "fraction",
             "eta", "temperature")
    rest = {name: getattr(args, name) for name in names}
    return dict(rest, spent=done, warmup=warmup_epochs(args))


def warmup_epochs(args):
    """--warmup, but at most half of the epochs of SupCon."""
    return min(args.warmup, supcon_epochs(args) // 2)


def supcon_epochs(args):
    """The share alpha of the budget."""
    return round(args.alpha * args.epochs)


def draw(args, history, before, after, indices):
    """Loss and probe over the epochs, and the features before and after."""
    figure, axes = plt.subplots(1, 4, figsize=(21, 4.8))
    common.plot_curves(axes[0], history, ["loss"])
    common.plot_curves(axes[1], history, ["knn"])
    axes[1].set_ylabel("k-NN accuracy on validation images, %")
    s_before, s_after = indices["s_dbw_before"], indices["s_dbw_after"]
    common.plot_features(axes[2], *before, f"features before: S_Dbw {s_before:.3f}")
    common.plot_features(axes[3], *after, f"features after: S_Dbw {s_after:.3f}")
    common.save_figure(args, figure)


def parser():
    petals = dict(image_size=32, arch="resnet10", epochs=120, batch_size=32, lr=0.03,
                  weight_decay=5e-4, crop=0.5, labels_per_class=20, temperature=0.1,
                  warmup=10)
    others = dict(petals, image_size=64, epochs=60, lr=0.01, labels_per_class=0, temperature=0.3,
                  warmup=0)
    p = common.Parser("coin.py", __doc__, petals, others)
    p.label_options()
    p.option("--crop", common.bounded(float, 0.01, 1), "smallest area of a crop; the image's is 1")
    p.option("--warmup", common.FROM_ZERO, "epochs of linear warm-up before the cosine, at most "
             "half of this script's")
    p.option("--alpha", common.SHARE, "share of --epochs, the whole budget, for SupCon alone", 0.7)
    p.option("--eta", common.NOT_NEGATIVE, "weight of SupCon beside cross-entropy that finetune.py "
             "takes over", 0.1)
    p.option("--temperature", common.bounded(float, 1e-3), "tau of SupCon; the authors have 0.3")
    p.option("--dim", common.COUNT, "width of the projections", 256)
    p.option("--balanced", common.FROM_ZERO, "images per class, 2 or more, in batches of "
             "--batch-size / BALANCED classes; 0: plain batches", 0, metavar="BALANCED")
    p.option("--probe-every", common.COUNT, "epochs between two k-NN probes (only with few labels: "
             "val is held out then)", 5)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    coin_epochs = supcon_epochs(args)
    if not 0 < coin_epochs < args.epochs:
        common.fail(f"--alpha {args.alpha:g} of --epochs {args.epochs} is {coin_epochs} epochs of "
                    "SupCon: both stages need one")
    if args.balanced == 1:
        common.fail("--balanced 1 leaves no anchor a positive: give 2 or more, or 0 for plain "
                    "batches")
    with common.resumable("coin.py", args, argv):
        return train(args)


if __name__ == "__main__":
    main()
