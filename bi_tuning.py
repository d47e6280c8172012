"""Bi-tuning: efficient transfer from pre-trained representations (Zhong et al. 2020, arXiv 2011.06182).

Fine-tuning sees a label only through the classifier, and a batch at a time. Bi-tuning keeps, for each class, the last K images
as a slowly moving encoder saw them, and contrasts with all of them twice, in the classifier's space and in a projector's: a
class is learnt from K + 1 images at once, however small the batch.

  1. Two views of each image: the query for the network, the key for its average (a MoCo-style key encoder, decay m).
  2. Query: h = f(x_q), y_hat = W h + b, z_q = g(h). Key: h_k = f'(x_k), z_k = g'(h_k), no gradient.
  3. L_CCE, the classifier's side: logits w_y . h~ / tau over the image's own h and all C K queued h_k; h~ = [h, 1] and
     w_y = [W_y, b_y] have unit length, and w_y is a constant.
     L_CCL, the projector's side: logits z_q . z / tau over the image's own z_k and all C K queued z_k.
     Both are KL(target || softmax); the target is 1 / (K + 1) for the image itself and for each of the K keys of its class.
  4. L = L_CE + gamma_cl (L_CCE + L_CCL). Step f, g, W, b; then f' <- m f' + (1 - m) f, and g' alike; then the keys enter their
     classes' rings in place of the oldest.

    python bi_tuning.py --ckpt simclr.pt
    python bi_tuning.py --ckpt simclr.pt --search 20 --seeds 5     same search and seeds as finetune.py
    python finetune.py --ckpt bi_tuning.pt --eval                  its checkpoint is a fine-tuned one
    python bi_tuning.py --ckpt resnet50.pth --data flowers --image-size 224 --backbone-lr 0.1     supervised weights

Measured on petals from SimCLR, 20 labels a class, 3 seeds, same search: test top-1 92.3 +- 3.6 %, against 86.8 +- 6.8 % of plain
fine-tuning; seed by seed 5.6 +- 3.5 more (tests/bench_accuracy.py). A step costs 1.3 plain ones.

Differs from the paper in: momentum without Nesterov, as in finetune.py; the backbone learns at the rate of the rest
(--backbone-lr 0.1); on petals m is 0.99, because in 420 steps an average of 0.999 hardly leaves its start; slots of a ring that
no image has filled yet take part in no softmax (--random-queue for the authors' random unit vectors). From the authors' code
in: no loop over the batch.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

import common
import finetune


class ClassQueue(nn.Module):
    """The last K keys of each class, as one ring a class. random: filled with random unit vectors, as the authors' are."""

    def __init__(self, classes, size, dim, random=False):
        super().__init__()
        keys = F.normalize(torch.randn(classes, size, dim), dim=2) if random else torch.zeros(classes, size, dim)
        self.register_buffer("keys", keys)                                               # (C, K, D), unit length
        self.register_buffer("entered", torch.full((classes,), size if random else 0))   # (C,) keys that a class has seen

    def filled(self):
        """(C, K) bool"""
        return torch.arange(self.keys.shape[1], device=self.keys.device) < self.entered[:, None]

    @torch.no_grad()
    def enqueue(self, keys, y):
        """Put keys (B, D) into the rings of their classes y (B,), in order; of more than K of a class, the last K stay."""
        classes, size, _ = self.keys.shape
        y, order = y.sort(stable=True)
        count = torch.zeros_like(self.entered).scatter_add_(0, y, torch.ones_like(y))  # (C,) keys of a class in the batch
        first = count.cumsum(0) - count                                                # (C,) where its keys begin in `order`
        rank = torch.arange(len(y), device=y.device) - first[y]                        # (B,) 0, 1, ... within a class
        latest = first[y] + rank + (count[y] - 1 - rank) // size * size                # sorted row of the last key for the slot
        self.keys[y, (self.entered[y] + rank) % size] = keys[order[latest]].to(self.keys.dtype)
        self.entered += count


def share_with_class(own, queued, y, filled=None):
    """KL(target || softmax), batch mean; the target is uniform over the image itself and the filled slots of its class.

    own (B,): logits of the images themselves; queued (B, C, K): of all keys; filled (C, K) bool, without: all.
    """
    filled = torch.ones_like(queued[0], dtype=torch.bool) if filled is None else filled
    queued = queued.masked_fill(~filled, -torch.inf)
    log_sum = torch.cat([own[:, None], queued.flatten(1)], 1).logsumexp(1)           # (B,)
    of_class = queued[torch.arange(len(y), device=y.device), y].masked_fill(~filled[y], 0)  # (B, K)
    number = (1 + filled[y].sum(1)).to(own.dtype)                                    # (B,), K + 1 once the ring is full
    return (log_sum - (own + of_class.sum(1)) / number - number.log()).mean()       # sum_t t (log t - log p), t = 1/number


def contrastive_cross_entropy(h, weight, bias, y, queue, temperature, filled=None):
    """CCE: the class's classifier weights among the image's own features and all queued ones.

    h (B, D), weight (C, D), bias (C,), y (B,), queue (C, K, D + 1) unit keys of [h, 1]; filled (C, K) bool, without: all.
    The weights are constants here: the loss moves the features.
    """
    w = F.normalize(torch.cat([weight, bias[:, None]], 1).detach(), dim=1)[y]  # (B, D + 1)
    own = (w * unit_with_one(h)).sum(1)                                        # (B,)
    queued = torch.einsum("bd,ckd->bck", w, queue)                             # (B, C, K)
    return share_with_class(own / temperature, queued / temperature, y, filled)


def categorical_contrastive(z_q, z_k, y, queue, temperature, filled=None):
    """CCL: the image's projection among its own key and all queued ones.

    z_q, z_k (B, d), normalised here, z_k a constant; y (B,); queue (C, K, d) unit keys; filled (C, K) bool, without: all.
    """
    z_q, z_k = F.normalize(common.upcast(z_q), dim=1), F.normalize(common.upcast(z_k.detach()), dim=1)
    own = (z_q * z_k).sum(1)                          # (B,)
    queued = torch.einsum("bd,ckd->bck", z_q, queue)  # (B, C, K)
    return share_with_class(own / temperature, queued / temperature, y, filled)


def unit_with_one(h):
    """[h, 1] at unit length (B, D + 1): the 1 stands for the bias."""
    h = common.upcast(h)
    return F.normalize(torch.cat([h, h.new_ones(len(h), 1)], 1), dim=1)


def train(run):
    """L_CE + gamma_cl (L_CCE + L_CCL) with a key encoder and two queues."""
    args, data = run.args, run.data
    common.need_one_label(args, data)
    backbone, _ = common.start_backbone(args, say=False)
    width, classes = backbone.num_features, len(data.classes)
    queue_h, queue_z = (ClassQueue(classes, args.keys, dim, args.random_queue) for dim in (width + 1, args.dim))
    model = nn.ModuleDict(dict(
        backbone=backbone, head=nn.Linear(width, classes), projector=nn.Linear(width, args.dim),
        queue_h=queue_h, queue_z=queue_z)).to(args.device)
    query = nn.ModuleDict(dict(backbone=backbone, projector=model.projector))
    model["key"] = key = copy.deepcopy(query).requires_grad_(False)
    optimizer = common.make_optimizer("sgd", [backbone, model.head, model.projector], args.lr, args.weight_decay,
                                      scales=[args.backbone_lr, 1.0, 1.0])
    steps_per_epoch = -(-len(data) // args.batch_size)

    for epoch in range(run.start(model, optimizer), args.epochs):
        torch.manual_seed(args.seed * 1_000_003 + epoch)
        total = hits = 0
        for i, (x, y) in enumerate(common.batches(data, args.batch_size)):
            step, steps = epoch * steps_per_epoch + i, args.epochs * steps_per_epoch
            common.set_learning_rate(optimizer, args.lr, step, steps, start=args.cosine_start)
            x_q, x_k = (common.augment(x, args.image_size, crop=(args.crop, 1)) for _ in range(2))
            with common.autocast(args.device, args.precision):
                h = backbone(x_q)                               # (B, D)
                logits, z_q = model.head(h), model.projector(h)  # (B, C), (B, d)
                with torch.no_grad():                           # keys are constants
                    h_k = key.backbone(x_k)                     # (B, D)
                    z_k = key.projector(h_k)                    # (B, d)
            W, b = model.head.weight, model.head.bias
            cce = contrastive_cross_entropy(h, W, b, y, queue_h.keys, args.temperature, queue_h.filled())
            ccl = categorical_contrastive(z_q, z_k, y, queue_z.keys, args.temperature, queue_z.filled())
            loss = F.cross_entropy(common.upcast(logits), y) + args.gamma * (cce + ccl)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            common.update_average(key, query, args.decay)
            every_y = common.gather(y)
            queue_h.enqueue(common.gather(unit_with_one(h_k)), every_y)
            queue_z.enqueue(common.gather(F.normalize(common.upcast(z_k), dim=1)), every_y)
            total += loss.detach() * len(x_q)
            hits += (logits.detach().argmax(1) == y).sum()
        if not run.finish_epoch(epoch, model, optimizer, total, hits):
            break


def show_queue(axes, args, backbone):
    """The panel of Bi-tuning: mean cosine similarity between the queued projections of two classes."""
    ckpt = common.load_checkpoint(f"{args.out}.pt")
    queue, classes = ckpt["resume"]["queue_z"], ckpt["classes"]
    mean = queue["keys"].sum(1) / queue["entered"].clamp(1, args.keys)[:, None]  # (C, d), empty slots are 0
    finetune.show_matrix(axes, mean @ mean.T, classes, cmap="coolwarm", vmin=-1, vmax=1)
    axes.figure.colorbar(axes.images[0], ax=axes)
    axes.set_title("mean similarity of queued projections")


def parser():
    petals, others = dict(finetune.PETALS, decay=0.99), dict(finetune.OTHERS, decay=0.999)
    p = common.Parser("bi_tuning.py", __doc__, petals, others, finishes_budget=True)
    finetune.protocol_options(p)
    p.option("--backbone-lr", common.NOT_NEGATIVE, "the backbone's share of --lr; the paper has 0.1 for supervised weights", 1.0)
    p.option("--gamma", common.NOT_NEGATIVE, "gamma_cl, weight of the two contrastive losses", 1.0)
    p.option("--keys", common.COUNT, "K, keys queued for each class", 40)
    p.option("--decay", common.SHARE, "m of the key encoder's average; the paper's 0.999 hardly moves in short runs")
    p.option("--temperature", common.number(float, 1e-3), "tau of both contrastive losses", 0.07)
    p.option("--dim", common.COUNT, "width of the projections", 128)
    p.add_argument("--random-queue", action="store_true", help="start from random keys, as the released code does")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("bi_tuning.py", args, argv):
        return finetune.protocol(args, "bi_tuning", train, show_queue)


if __name__ == "__main__":
    main()
