"""Bi-tuning: efficient transfer from pre-trained representations (Zhong et al. 2020, arXiv
2011.06182).

Fine-tuning sees a label only through the classifier, and a batch at a time. Bi-tuning keeps, for
each class, the last K images as a slowly moving encoder saw them, and contrasts with all of them
twice, in the classifier's space and in a projector's: a class is learnt from K + 1 images at once,
however small the batch.

  1. Two views of each image: the query for the network, the key for its average (a MoCo-style key
     encoder, decay m).
  2. Query: h = f(x_q), y_hat = W h + b, z_q = g(h). Key: h_k = f'(x_k), z_k = g'(h_k), no gradient.
  3. L_CCE, the classifier's side: logits w_y . h~ / tau over the image's own h and all C K queued
     h_k; h~ = [h, 1], w_y = [W_y, b_y] and all z have unit length; w_y is a constant. L_CCL, the
     projector's side: logits z_q . z / tau over the image's own z_k and all C K queued z_k. Both
     are KL(target || softmax); the target is 1 / (K + 1) for the image itself and for each of the K
     keys of its class.
  4. L = L_CE + gamma_cl (L_CCE + L_CCL). Step f, g, W, b; then f' <- m f' + (1 - m) f, and g'
     alike; then the keys enter their classes' rings in place of the oldest.

Classification only: a ring holds images of one class.

    python bi_tuning.py --ckpt simclr.pt
    python bi_tuning.py --ckpt simclr.pt --search 20 --seeds 5       as finetune.py does it
    python finetune.py --ckpt bi_tuning.pt --eval                    its test accuracy once more
    python bi_tuning.py --ckpt resnet50.pth --data flowers --image-size 224 --backbone-lr 0.1
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

import common
import finetune


class ClassQueue(nn.Module):
    """The last K keys of each class, one ring per class. random: filled with random unit vectors,
    as the authors' are."""

    def __init__(self, classes, size, dim, random=False):
        super().__init__()
        keys, entered = torch.zeros(classes, size, dim), torch.zeros(classes, dtype=torch.long)
        if random:
            keys, entered = F.normalize(torch.randn(classes, size, dim), dim=2), entered + size
        self.register_buffer("keys", keys)        # (C, K, D), unit length
        self.register_buffer("entered", entered)  # (C,) keys that a class has seen

    def filled(self):
        """Which slots hold a key: (C, K) bool."""
        slot = torch.arange(self.keys.shape[1], device=self.keys.device)
        return slot < self.entered[:, None]

    @torch.no_grad()
    def enqueue(self, keys, y):
        """Put keys (B, D) into the rings of their classes y (B,), in order; of more than K of a
        class, the last K stay.

        With K = 2 and y = 5 5 5, the ranks 0 1 2 of the keys want the slots 0 1 0. Two writes to
        one slot have no order, so both write what the later one brings: the keys of rank 2 1 2.
        """
        classes, size, _ = self.keys.shape
        y, order = y.sort(stable=True)
        count = torch.zeros_like(self.entered)
        count.scatter_add_(0, y, torch.ones_like(y))            # (C,) keys of a class in the batch
        first = count.cumsum(0) - count                      # (C,) where its keys begin in `order`
        rank = torch.arange(len(y), device=y.device) - first[y]     # (B,) 0, 1, ... within a class
        laps = (count[y] - 1 - rank) // size                 # how often its slot is written again
        latest = first[y] + rank + laps * size               # place in `order` of the last such key
        slot = (self.entered[y] + rank) % size
        self.keys[y, slot] = keys[order[latest]].to(self.keys.dtype)
        self.entered += count


def share_with_class(own, queued, y, filled=None):
    """KL(target || softmax), batch mean; the target is uniform over the image itself and the filled
    slots of its class.

    own (B,): logits of the images themselves; queued (B, C, K): of all keys; y (B,); filled (C, K)
    bool, None: all. -> scalar of their type, float32 for half types
    """
    own, queued = common.upcast(own), common.upcast(queued)
    if filled is None:
        filled = torch.ones_like(queued[0], dtype=torch.bool)
    queued = queued.masked_fill(~filled, -torch.inf)
    log_sum = torch.cat([own[:, None], queued.flatten(1)], 1).logsumexp(1)      # (B,)
    image = torch.arange(len(y), device=y.device)
    of_class = queued[image, y].masked_fill(~filled[y], 0)                      # (B, K)
    size = (1 + filled[y].sum(1)).to(own.dtype)         # (B,), K + 1 once the ring is full
    mean_logit = (own + of_class.sum(1)) / size
    return (log_sum - mean_logit - size.log()).mean()   # sum_t t (log t - log p), t = 1 / size


def contrastive_cross_entropy(h, weight, bias, y, queue, temperature, filled=None):
    """CCE: w_y is to find the image's own features, and its class's keys among all queued ones.

    h (B, D), weight (C, D), bias (C,), y (B,), queue (C, K, D + 1) unit keys of [h, 1]; filled (C,
    K) bool, None: all. The weights are constants here: the loss moves the features. -> scalar
    of h's type, float32 for half types
    """
    w = torch.cat([weight, bias[:, None]], 1).detach()
    w = F.normalize(w, dim=1)[y]                        # (B, D + 1)
    own = (w * unit_with_one(h)).sum(1)                 # (B,)
    queued = torch.einsum("bd,ckd->bck", w, queue)      # (B, C, K)
    return share_with_class(own / temperature, queued / temperature, y, filled)


def categorical_contrastive(z_q, z_k, y, queue, temperature, filled=None):
    """CCL: z_q is to find its own key, and its class's keys among all queued ones.

    z_q, z_k (B, d), normalised here (zeros stay zeros), z_k a constant; y (B,); queue (C, K, d)
    unit keys; filled (C, K) bool, None: all. -> scalar of z_q's type, float32 for half types
    """
    z_q = F.normalize(common.upcast(z_q), dim=1)
    z_k = F.normalize(common.upcast(z_k.detach()), dim=1)
    own = (z_q * z_k).sum(1)                            # (B,)
    queued = torch.einsum("bd,ckd->bck", z_q, queue)    # (B, C, K)
    return share_with_class(own / temperature, queued / temperature, y, filled)


def unit_with_one(h):
    """[h, 1] at unit length (B, D + 1): the 1 stands for the bias."""
    h = common.upcast(h)
    return F.normalize(torch.cat([h, h.new_ones(len(h), 1)], 1), dim=1)


def make_model(backbone, classes, args):
    """-> the backbone with classifier, projector, both queues and key encoder around it; and its
    part that the key encoder averages, backbone and projector."""
    width = backbone.num_features
    model = nn.ModuleDict(dict(backbone=backbone))
    queue_h = ClassQueue(classes, args.keys, width + 1, args.random_queue)
    queue_z = ClassQueue(classes, args.keys, args.dim, args.random_queue)
    model["head"] = nn.Linear(width, classes)
    model["projector"] = nn.Linear(width, args.dim)
    model["queue_h"], model["queue_z"] = queue_h, queue_z
    model = common.place(model, args.device)
    query = nn.ModuleDict(dict(backbone=backbone, projector=model.projector))
    model["key"] = copy.deepcopy(query).requires_grad_(False)
    return model, query


def train(trial):
    """L_CE + gamma_cl (L_CCE + L_CCL) with a key encoder and two queues."""
    args, data = trial.args, trial.data
    common.need_one_label(args, data)
    backbone, _ = common.start_backbone(args, say=False)
    model, query = make_model(backbone, len(data.classes), args)
    head, key, queue_h, queue_z = model.head, model.key, model.queue_h, model.queue_z
    optimizer = common.make_optimizer("sgd", [backbone, head, model.projector], args.lr,
                                      args.weight_decay, scales=[args.backbone_lr, 1.0, 1.0])
    batches = common.Batches(data, args.batch_size)
    steps = args.epochs * len(batches)
    warmup = args.warmup * len(batches)

    run = finetune.TrialRun(trial, model, optimizer)
    for epoch in run.epochs_left(len(batches)):
        for step, (x, y) in enumerate(batches, start=epoch * len(batches)):
            common.set_learning_rate(optimizer, args.lr, step, steps, warmup)
            x_q = common.augment(x, args.image_size, crop=(args.crop, 1))
            x_k = common.augment(x, args.image_size, crop=(args.crop, 1))
            with common.autocast(args.device, args.precision):
                h = backbone(x_q)                           # (B, D)
                logits, z_q = head(h), model.projector(h)   # (B, C), (B, d)
                with torch.no_grad():                       # keys are constants
                    h_k = key.backbone(x_k)                 # (B, D)
                    z_k = key.projector(h_k)                # (B, d)
            cce = contrastive_cross_entropy(h, head.weight, head.bias, y, queue_h.keys,
                                            args.temperature, queue_h.filled())
            ccl = categorical_contrastive(z_q, z_k, y, queue_z.keys, args.temperature,
                                          queue_z.filled())
            loss = F.cross_entropy(common.upcast(logits), y) + args.gamma * (cce + ccl)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            common.update_average(key, query, args.decay)
            every_y = common.gather(y)
            queue_h.enqueue(common.gather(unit_with_one(h_k)), every_y)
            queue_z.enqueue(common.gather(F.normalize(common.upcast(z_k), dim=1)), every_y)
            run.add(len(x), loss=loss, train_top1=finetune.accuracy(logits, y))
        run.end_epoch()


def show_queue(axes, args, backbone):
    """The panel of Bi-tuning: mean cosine similarity between the queued projections of two
    classes."""
    ckpt = common.load_checkpoint(f"{args.out}.pt")
    queue = ckpt["resume"]["queue_z"]
    size = queue["entered"].clamp(1, args.keys)[:, None]
    mean = queue["keys"].sum(1) / size  # (C, d), empty slots are 0
    finetune.show_matrix(axes, mean @ mean.T, ckpt["classes"], cmap="coolwarm", vmin=-1, vmax=1)
    axes.figure.colorbar(axes.images[0], ax=axes)
    axes.set_title("mean similarity of queued projections")


def parser():
    petals, others = dict(finetune.PETALS, decay=0.99), dict(finetune.OTHERS, decay=0.999)
    p = common.Parser("bi_tuning.py", __doc__, petals, others, from_coin=finetune.FROM_COIN)
    finetune.protocol_options(p)
    p.option("--backbone-lr", common.NOT_NEGATIVE, "a factor, no rate: the backbone learns at "
             "BACKBONE_LR x --lr; the paper has 0.1 for supervised weights", 1.0)
    p.option("--gamma", common.NOT_NEGATIVE, "gamma_cl, weight of the two contrastive losses", 1.0)
    p.option("--keys", common.COUNT, "K, keys queued for each class", 40)
    p.option("--decay", common.SHARE, "m of the key encoder's average; the paper's 0.999 hardly "
             "moves in short runs")
    p.option("--temperature", common.bounded(float, 1e-3), "tau of both contrastive losses", 0.07)
    p.option("--dim", common.COUNT, "width of the projections", 128)
    p.add_argument("--random-queue", action="store_true",
                   help="start from random keys, as the released code does")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("bi_tuning.py", args, argv):
        return finetune.protocol(args, "bi_tuning", train, show_queue)


if __name__ == "__main__":
    main()
