"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al. 2020, arXiv 2002.05709).

Two random views of one image should have projections that are close to each other and far from those of all other images in
the batch. Labels are only read by the probe that watches the training.

  1. Draw a batch of B images; make two views x1, x2 of each.
  2. z = g(f(x)) for all 2B views: f is the backbone, g an MLP projector.
  3. NT-Xent: each view has to find its partner among the 2B - 1 others, by cosine similarity over temperature tau.
  4. Step f and g. After the training g is thrown away and f is fine-tuned (finetune.py), or goes to bissl.py first.

    python simclr.py                                  petals, on any machine
    python simclr.py --data DIR --out runs/mine       DIR/train/CLASS/*.png, labels unused
    python finetune.py --ckpt simclr.pt

Measured on petals, default flags: 3:16 minutes on two CPU cores; 34 to 64 % k-NN accuracy over 5 seeds (chance: 10 %), and
after fine-tuning on 20 labels a class 70.0 +- 5.5 % on test, against 19.7 +- 1.8 % from scratch (bfloat16).

Differs from the paper in: AdamW instead of LARS, which wants batches in the thousands (--optimizer lars); the four colour
operations come in an order drawn once a batch, not an image; on 32 px petals no blur.
"""
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import common


def nt_xent(z1, z2, temperature):
    """Normalised temperature-scaled cross-entropy (equation 1), mean over all 2B ordered positive pairs.

    z1, z2 (B, D): projections of the two views, normalised here; row i of one belongs to row i of the other.
    """
    z1, z2 = (F.normalize(common.upcast(z), dim=1) for z in (z1, z2))
    every1, every2 = common.gather(torch.stack([z1, z2], 1)).unbind(1)         # (N, D), N = B times the number of processes
    similarity = torch.cat([z1, z2]) @ torch.cat([every1, every2]).T / temperature  # (2B, 2N): own anchors, all candidates
    row = common.share(torch.arange(len(every1), device=z1.device))            # (B,) where own images stand among all
    itself, partner = torch.cat([row, row + len(every1)]), torch.cat([row + len(every1), row])
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)            # k != i
    return F.cross_entropy(similarity, partner)                                # -log( exp(s_ij) / sum_{k != i} exp(s_ik) )


class Model(nn.Module):
    """Backbone f and projector g."""

    def __init__(self, backbone, hidden, out):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Linear(backbone.num_features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, out, bias=False))

    def forward(self, x):
        return self.head(self.backbone(x))


def make_model(backbone, config):
    return Model(backbone, config["hidden"], config["dim"])


def make_views(x, config):
    """uint8 (B, 3, S, S) -> two random views (B, 3, size, size)"""
    settings = dict(crop=(config["crop"], 1), jitter=config["jitter"], grey_p=config["grey"], blur_p=config["blur"])
    return [common.augment(x, config["image_size"], **settings) for _ in range(2)]


def embed(model, views, config):
    """Projections z1, z2 of a batch of views, (B, D) each."""
    with common.autocast(views[0].device, config["precision"]):
        return model(torch.cat(views)).chunk(2)  # one forward: BatchNorm sees both views


def loss(model, views, config):
    """The loss of one batch of views; what bissl.py minimises in its lower level."""
    return nt_xent(*embed(model, views, config), config["temperature"])


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
                project = lambda part: torch.stack(embed(model, make_views(part, config), config), 1)  # (b, 2, D)
                loss_of = lambda z: nt_xent(*z.unbind(1), args.temperature)
                batch_loss = common.chunked_backward(model, project, loss_of, x, args.chunk)
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
