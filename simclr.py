"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al. 2020, arXiv 2002.05709).

Two random views of one image should have projections that are close to each other and far from those of all other images in
the batch.
Labels are only read by the probe that watches the training.

  1. Draw a batch of B images; make two views x1, x2 of each.
  2. z = g(f(x)) for all 2B views: f is the backbone, g an MLP projector.
  3. NT-Xent: each view has to find its partner among the 2B - 1 others, by cosine similarity over temperature tau.
  4. Step f and g.
  After the training all but f is thrown away and f is fine-tuned (finetune.py), or all goes to bissl.py first.

    python simclr.py                                  petals, on any machine
    python simclr.py --data DIR --out runs/mine       DIR/train/CLASS/*.png, labels unused
    python finetune.py --ckpt simclr.pt

Measured on petals, default flags and bfloat16, 3 seeds: 63 +- 6 % k-NN accuracy on test (chance: 10 %), and after fine-tuning
on 20 labels a class 86.8 +- 6.8 %, against 19.4 +- 0.7 % from scratch (tests/bench_accuracy.py).

Differs from the paper in: AdamW instead of LARS, which wants batches in the thousands (--optimizer lars); tau 0.2 and a projector
of 256-128 (the paper: 0.1, 2048-128); weaker colour jitter; no blur (--blur 0.5 for the paper's); the four colour operations come
in an order drawn once a batch, not an image.
"""
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import common


def nt_xent(z1, z2, temperature):
    """Normalised temperature-scaled cross-entropy (equation 1), mean over all 2B ordered positive pairs (i, j).

    l(i, j) = -log( exp(s_ij) / sum_{k != i} exp(s_ik) ), s_ij = z_i.z_j / tau, k over all 2B projections.
    z1, z2 (B, D): projections of the two views, normalised here; row i of both is image i. -> scalar
    """
    z1, z2 = (F.normalize(common.upcast(z), dim=1) for z in (z1, z2))
    every1, every2 = common.gather(torch.stack([z1, z2], 1)).unbind(1)         # (N, D), N = B times the number of processes
    similarity = torch.cat([z1, z2]) @ torch.cat([every1, every2]).T / temperature  # (2B, 2N): own anchors, all candidates
    row = common.share(torch.arange(len(every1), device=z1.device))            # (B,) where own images stand among all
    itself, partner = torch.cat([row, row + len(every1)]), torch.cat([row + len(every1), row])
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)            # k != i
    return F.cross_entropy(similarity, partner)                                # -log( exp(s_ij) / sum_{k != i} exp(s_ik) )


def mlp(width, hidden, out):
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False))


class Model(nn.Module):
    """Backbone f and projector g: views (B, 3, H, W) -> z (B, D), not normalised."""

    def __init__(self, backbone, hidden, out):
        super().__init__()
        self.backbone = backbone
        self.head = mlp(backbone.num_features, hidden, out)

    def forward(self, x):
        return self.head(self.backbone(x))


def make_model(backbone, config):
    return Model(backbone, config["hidden"], config["dim"])


def make_views(x, config):
    """uint8 (B, 3, S, S) -> two random views (B, 3, size, size)"""
    settings = dict(crop=(config["crop"], 1), jitter=config["jitter"], grey_p=config["grey"], blur_p=config["blur"])
    return [common.augment(x, config["image_size"], **settings) for _ in range(2)]


def outputs(model, views, config):
    """z1, z2 (B, D) of both views."""
    with common.autocast(views[0].device, config["precision"]):
        return model(torch.cat(views)).chunk(2)  # one forward: BatchNorm sees both views


def loss(model, views, config):
    """views: two (B, 3, H, W) -> scalar. bissl.py minimises this in its lower level."""
    return nt_xent(*outputs(model, views, config), config["temperature"])


def chunked_loss(model, x, config, chunk):
    """loss() of views of x and its backward pass, in the memory of `chunk` images (common.chunked_backward)."""
    project = lambda part: torch.stack(outputs(model, make_views(part, config), config), 1)  # (b, 2, D)
    return common.chunked_backward(model, project, lambda z: nt_xent(*z.unbind(1), config["temperature"]), x, chunk)


def train(args):
    backbone, _ = common.start_backbone(args)
    config = common.run_config(args)
    model = common.place(make_model(backbone, config), args.device)
    optimizer = common.make_optimizer(args.optimizer, [model], args.lr, args.weight_decay)
    data = common.load_unlabeled(args)
    probe = common.load_probe(args)
    history, steps_per_epoch = [], len(data) // args.batch_size
    if ckpt := common.resume_checkpoint(args):
        model.backbone.load_state_dict(ckpt["backbone"])
        model.head.load_state_dict(ckpt["head"])
        optimizer.load_state_dict(ckpt["resume"]["optimizer"])
        history = ckpt["resume"]["history"]
    log = common.Log(args, args.epochs, history)

    for epoch in range(len(history), args.epochs):
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # order and views of an epoch do not depend on the ones before
        total = 0
        for i, (x, _) in enumerate(common.batches(data, args.batch_size, whole_only=True)):
            step, steps = epoch * steps_per_epoch + i, args.epochs * steps_per_epoch
            common.set_learning_rate(optimizer, args.lr, step, steps, warmup=args.warmup * steps_per_epoch)
            optimizer.zero_grad()
            if args.chunk:
                batch_loss = chunked_loss(model, x, config, args.chunk)
            else:
                batch_loss = loss(model, make_views(x, config), config)
                batch_loss.backward()
            common.average_gradients(model)
            optimizer.step()
            total += batch_loss.detach()

        common.average_statistics(model)
        total, = common.average([total / steps_per_epoch])
        due = (epoch + 1) % args.probe_every == 0 or epoch + 1 == args.epochs
        knn = common.knn_probe(backbone, *probe, args) if probe and due else None
        log.epoch(steps_per_epoch * args.batch_size, loss=total, knn=knn)
        common.save_checkpoint(
            f"{args.out}.pt", method="simclr", arch=args.arch, image_size=args.image_size, backbone=backbone, head=model.head,
            classes=data.classes, config=config, resume=dict(optimizer=optimizer.state_dict(), history=log.history))

    draw(args, log.history, make_views(data.images[:32].to(args.device), config))
    return log.history[-1]


def draw(args, history, views):
    """Loss and probe over the epochs, and two views of 32 images as the network gets them."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    common.plot_curves(axes[0], history, ["loss"])
    common.plot_curves(axes[1], history, ["knn"])
    axes[1].set_ylabel("k-NN accuracy on held-out labels, %")
    common.show_images(axes[2], torch.stack(views, 1).flatten(0, 1), columns=8)
    axes[2].set_title("views: each pair of columns is one image")
    common.save_figure(args, figure)


def parser():
    petals = dict(image_size=32, arch="resnet10", epochs=24, batch_size=128, lr=2e-3, weight_decay=1e-4,
                  crop=0.4, jitter=[0.5, 0.5, 0.5, 0.5], blur=0.0)
    others = dict(petals, image_size=64, epochs=500, crop=0.2, jitter=[0.4, 0.4, 0.2, 0.1])
    p = common.Parser("simclr.py", __doc__, petals, others)
    p.option("--optimizer", str, "adamw, lars or sgd; LARS wants batches in the thousands", "adamw", choices=common.OPTIMIZERS)
    p.option("--chunk", common.FROM_ZERO, "images in memory at once, on each process; costs a second forward pass; 0: all", 0)
    p.option("--warmup", common.FROM_ZERO, "epochs of linear warm-up before the cosine", 1)
    p.option("--temperature", common.number(float, 1e-3), "tau of NT-Xent", 0.2)
    p.option("--hidden", common.COUNT, "width of the projector's hidden layer", 256)
    p.option("--dim", common.COUNT, "width of the projections", 128)
    p.option("--crop", common.number(float, 0.01, 1), "smallest area of a crop, as a share of the image")
    p.option("--jitter", common.SHARE, "brightness, contrast, saturation and hue jitter", nargs=4, metavar=tuple("BCSH"))
    p.option("--grey", common.SHARE, "probability of a grey view", 0.2)
    p.option("--blur", common.SHARE, "probability of a blurred view")
    p.option("--probe-every", common.COUNT, "epochs between two k-NN probes on held-out labels", 5)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("simclr.py", args, argv):
        return train(args)


if __name__ == "__main__":
    main()
