"""Core-tuning: contrast-regularised fine-tuning of self-supervised models (Zhang et al. 2021, arXiv
2102.06605).

Cross-entropy alone leaves the classes of a self-supervised backbone loose. Core-tuning adds a
contrastive loss on the labels, gives it hard pairs made by mixing features, and smooths the
classifier's boundary with the same mixtures.

  1. Features f = backbone(x), one view an image. For every anchor i in the batch: its hardest
     positive hp(i), the image of its class with the lowest cosine similarity, and its hardest
     negative hn(i), the one of another class with the highest.
  2. Hard positive       f+_i = l f_hp(i) + (1 - l) f_hn(i),  l ~ Beta(alpha, alpha), labels mixed
     alike. Semi-hard negative  f-_i = (1 - l') f_i + l' f_r(i), r a random permutation,
     l' ~ Beta(alpha, alpha), raised to 0.8 where it is less.
  3. L = L_ce^m + eta L_con^f over all 3B: soft-label cross-entropy of the classifier, and the focal
     contrastive loss of the projections z = g(f), in which easy positives weigh less. An image's
     own hard positive is one of its positives.

    python core_tuning.py --ckpt simclr.pt
    python core_tuning.py --ckpt simclr.pt --task segment            pairs of pixels: see cells()
    python core_tuning.py --ckpt simclr.pt --search 20 --seeds 5     as finetune.py does it
    python finetune.py --ckpt core_tuning.pt --eval                  its test accuracy once more
"""
import torch
import torch.nn.functional as F
from torch import nn

import common
import finetune


def hardest(f, y):
    """hp (B,), hn (B,): rows of the hardest positive and negative of each anchor by cosine
    similarity; the anchor's own where it has none. f (B, D), y (B,) int. Constants: no gradient
    flows through the choice."""
    if not len(f):  # argmin() needs a row; y is as empty as hp and hn
        return y, y
    f = F.normalize(f.detach(), dim=1)
    similarity, same = f @ f.T, y[:, None] == y                 # (B, B)
    positives = similarity.masked_fill(~same, torch.inf)        # other classes are never the lowest
    positives.fill_diagonal_(2)             # nor is the anchor, unless all others are at infinity
    negatives = similarity.masked_fill(same, -torch.inf)        # its own class is never the highest
    negatives.fill_diagonal_(-2)            # nor is the anchor, unless all others are at -infinity
    return positives.argmin(1), negatives.argmax(1)


def hard_pairs(f, y, num_classes, alpha):
    """Hard positives and semi-hard negatives made in feature space, and their labels ("hard pair
    mining").

    f (B, D), y (B,) int -> f_pos (B, D), y_pos (B, C), f_neg (B, D), y_neg (B, C) of rows
    that add up to 1. The shares, one for each mixture, and r are drawn by torch, anew in each call.
    """
    alpha = torch.tensor(alpha, dtype=f.dtype)
    shares = torch.distributions.Beta(alpha, alpha).sample((2, len(f), 1))  # (2, B, 1)
    l_pos, l_neg = shares.to(f.device, non_blocking=True)
    l_neg = l_neg.clamp(min=0.8)                            # stays close to the other image
    labels = F.one_hot(y, num_classes).to(f.dtype)          # (B, C)
    hp, hn = hardest(f, y)
    r = torch.randperm(len(f)).to(f.device, non_blocking=True)
    f_pos = l_pos * f[hp] + (1 - l_pos) * f[hn]
    y_pos = l_pos * labels[hp] + (1 - l_pos) * labels[hn]
    f_neg = (1 - l_neg) * f + l_neg * f[r]
    y_neg = (1 - l_neg) * labels + l_neg * labels[r]
    return f_pos, y_pos, f_neg, y_neg


def positive_pairs(labels, batch):
    """P_i as a bool matrix (n, n): the others with i's label, and for an image i < batch its own
    hard positive batch + i.

    labels (n, C): soft. A mixture of two classes shares its label with no other row; one within a
    class has the class's.
    """
    largest, label = labels.max(1)
    unique = -1 - torch.arange(len(labels), device=labels.device)
    label = torch.where(largest > 1 - 1e-6, label, unique)
    positives = (label[:, None] == label).fill_diagonal_(False)
    positives[:batch, batch:2 * batch].fill_diagonal_(True)
    return positives


def focal_contrastive(z, positives, temperature):
    """Focal contrastive loss L_con^f, mean over the anchors that have a positive.

    L_i = -1/|P_i| sum_{j in P_i} (1 - p_ij) log p_ij,
    p_ij = exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau).
    z (n, d), normalised here (zeros stay zeros); positives (n, n) bool, row i marks P_i, nothing on
    the diagonal. -> scalar of z's type, float32 for half types
    """
    z = F.normalize(common.upcast(z), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)    # k != i
    log_p = similarity.log_softmax(1).masked_fill(~positives, 0)            # 0 adds nothing below
    size = positives.sum(1)                                                 # (n,) |P_i|
    per_anchor = -((1 - log_p.exp()) * log_p).sum(1) / size.clamp(min=1)
    return per_anchor.sum() / (size > 0).sum().clamp(min=1)


def cells(f, y, most=32):
    """The paper does not say which features segmentation pairs: here those of the cells of the
    head's map, at most 32 an image, spread as evenly over its classes as can be.

    f (B, D, h, w), masks y (B, size, size) -> f (32 B, D), y (32 B,) int, the class of the pixel at
    a cell's centre, 255 where that is void; all h w cells of a smaller map.
    """
    centre = F.interpolate(y[:, None], f.shape[-2:], mode="nearest-exact")  # (B, 1, h, w)
    label = centre.flatten(1).long()                                        # (B, h w)
    order = torch.rand(label.shape).argsort(1).to(label.device)
    shuffled = label.gather(1, order)
    same = shuffled[:, :, None] == shuffled[:, None, :]                     # (B, h w, h w)
    turn = same.tril().sum(2)               # (B, h w): the first of its class, the second, ...
    turn = turn.masked_fill(shuffled == 255, label.shape[1])                # void ones come last
    chosen = order.gather(1, turn.argsort(dim=1, stable=True)[:, :most])        # (B, 32)
    f = f.flatten(2).mT.gather(1, chosen[..., None].expand(-1, -1, f.shape[1]))    # (B, 32, D)
    return f.flatten(0, 1), label.gather(1, chosen).flatten()


def mean_cross_entropy(logits, labels):
    """With soft labels (n, C); 0 without rows, as where all masks of a batch are void."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


def logits_of(head, f):
    """Logits (n, C) of rows of features (n, D), by a linear head or an FCN's last layer."""
    last = head[-1] if isinstance(head, nn.Sequential) else head
    return F.linear(f, last.weight.flatten(1), last.bias)


def train(trial):
    """L_ce^m + eta L_con^f over originals, hard positives and semi-hard negatives."""
    args, data, task = trial.args, trial.data, trial.task
    backbone, _ = common.start_backbone(args, say=False)
    width, classes = backbone.num_features, len(data.classes)
    if args.task == "segment":
        head = task.head(backbone, data.classes)
        width = width // 4  # FCNHead's features are a quarter as wide
    else:
        common.need_one_label(args, data)
        head = nn.Linear(width, classes, bias=False)  # as in the authors' code
    projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, args.dim))
    model = nn.ModuleDict(dict(backbone=backbone, head=head, projector=projector))
    model = common.place(model, args.device)
    optimizer = common.make_optimizer("sgd", [model], args.lr, args.weight_decay)
    batches = common.Batches(data, args.batch_size)
    steps = args.epochs * len(batches)
    warmup = args.warmup * len(batches)

    run = finetune.TrialRun(trial, model, optimizer)
    for epoch in run.epochs_left(len(batches)):
        for step, (x, y) in enumerate(batches, start=epoch * len(batches)):
            common.set_learning_rate(optimizer, args.lr, step, steps, warmup)
            x, y = task.views(x, y)
            if args.task == "segment":
                dense, f, measured = task.loss(backbone, head, x, y)
                f, y = cells(f, y)                                              # (32 B, D), (32 B,)
            else:
                with common.autocast(args.device, args.precision):
                    f = backbone(x)                                             # (B, D)
            f, y = common.gather(common.upcast(f)), common.gather(y)  # pairs: in the whole batch
            if args.task == "segment":  # a GPU is waited for: it alone knows how many are not void
                f, y = f[y != 255], y[y != 255]                                 # (n, D), (n,)
            f_pos, y_pos, f_neg, y_neg = hard_pairs(f, y, classes, args.alpha)
            features = torch.cat([f, f_pos, f_neg])                                 # (3B, D)
            labels = torch.cat([F.one_hot(y, classes).to(f.dtype), y_pos, y_neg])   # (3B, C)
            logits, z = logits_of(head, features), projector(features)          # (3B, C), (3B, d)
            contrast = focal_contrastive(z, positive_pairs(labels, len(y)), args.temperature)
            if args.task == "segment":  # the originals' cross-entropy is that of all pixels
                loss = dense + mean_cross_entropy(logits[len(y):], labels[len(y):])
            else:
                loss = F.cross_entropy(logits, labels)
                measured = dict(train_top1=finetune.accuracy(logits[:len(y)], y))
            loss = loss + args.eta * contrast
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            run.add(len(x), loss=loss, **measured)
        run.end_epoch()


def show_hard_pairs(axes, args, backbone):
    """The panel of Core-tuning: among random training images, eight anchors over their hardest
    positives and negatives."""
    last_seed = args.seed + args.seeds - 1
    data = common.load_labelled(args, last_seed)
    rng = torch.Generator().manual_seed(last_seed)
    data = data.subset(torch.randperm(len(data), generator=rng)[:args.batch_size])
    hp, hn = hardest(*common.features(backbone, data, args))
    x, _ = next(common.feed(data, [torch.arange(len(data))]))
    x = common.test_crop(x, args.image_size)
    shown = torch.cat([x[:8], x[hp[:8]], x[hn[:8]]])
    common.show_images(axes, shown, columns=min(8, len(x)))
    axes.set_title("anchor, hardest positive, hardest negative\n"
                   "in one training batch, after fine-tuning")


def parser():
    p = common.Parser("core_tuning.py", __doc__, finetune.PETALS, finetune.OTHERS,
                      tasks=finetune.SEGMENT, from_coin=finetune.FROM_COIN)
    finetune.protocol_options(p)
    finetune.task_option(p, choices=("classify", "segment"))
    p.option("--eta", common.NOT_NEGATIVE, "weight of the focal contrastive loss; the paper tunes "
             "it between 0.1 and 10. The authors' 0.1 is about 0.003 here: they divide by all 3B "
             "columns instead of |P_i|", 1.0)
    p.option("--alpha", common.bounded(float, 1e-3, 1e6), "shares of the mixtures are drawn from "
             "Beta(alpha, alpha)", 1.0)
    p.option("--temperature", common.bounded(float, 1e-3), "tau of the contrastive loss", 0.07)
    p.option("--dim", common.COUNT, "width of the projections", 256)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("core_tuning.py", args, argv):
        panel = show_hard_pairs if args.task == "classify" else None
        return finetune.protocol(args, "core_tuning", train, panel)


if __name__ == "__main__":
    main()
