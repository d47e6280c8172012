"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al. 2020,
arXiv 2002.05709).

Two random views of one image should have projections that are close to each other and far from
those of all other images in the batch. Labels are only read by the probe that watches the training.

  1. Draw a batch of B images; make two views x1, x2 of each.
  2. z = g(f(x)) for all 2B views: f is the backbone, g an MLP projector.
  3. NT-Xent: each view has to find its partner among the 2B - 1 others, by cosine similarity over
     temperature tau.
  4. Step f and g.
  After the training all but f is thrown away and f is fine-tuned (finetune.py), or all goes to
  bissl.py first.

    python simclr.py                                  doodles, on any machine
    python simclr.py --data DIR --out runs/mine       DIR/train/CLASS/*.png, labels unused
    python finetune.py --ckpt simclr.pt
"""
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import common


def nt_xent(z1, z2, temperature):
    """Normalised temperature-scaled cross-entropy (equation 1), mean over all 2B ordered positive
    pairs (i, j).

    l(i, j) = -log( exp(s_ij) / sum_{k != i} exp(s_ik) ), s_ij = z_i.z_j / tau, k over all 2B views.
    z1, z2 (B, D): projections of the two views, normalised here (zeros stay zeros); row i of both
    is image i. -> scalar of their type, float32 for half types. Where one process works alone,
    gather(x) and own_rows(x) are x, and N is B.
    """
    z1 = F.normalize(common.upcast(z1), dim=1)
    z2 = F.normalize(common.upcast(z2), dim=1)
    every = common.gather(torch.stack([z1, z2], 1))                 # (N, 2, D), N: of all processes
    candidates = torch.cat([every[:, 0], every[:, 1]])              # (2N, D)
    similarity = torch.cat([z1, z2]) @ candidates.T / temperature   # (2B, 2N), rows: own anchors
    row = common.own_rows(torch.arange(len(every), device=z1.device))   # (B,) own images among all
    itself = torch.cat([row, row + len(every)])                     # (2B,) the anchors' own columns
    partner = torch.cat([row + len(every), row])                    # (2B,) their partners' columns
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)     # k != i
    return F.cross_entropy(similarity, partner)         # -log( exp(s_ij) / sum_{k != i} exp(s_ik) )


def mlp(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, out, bias=False))


class Model(nn.Module):
    """Backbone f and projector g: views (B, 3, H, W) -> z (B, D), not normalised."""

    def __init__(self, backbone, hidden, out):
        super().__init__()
        self.backbone = backbone
        self.head = mlp(backbone.num_features, hidden, out)

    def forward(self, x):
        return self.head(self.backbone(x))


def make_model(backbone, args):
    return Model(backbone, args.hidden, args.dim)


def make_views(x, args):
    """uint8 (B, 3, S, S) -> two random views (B, 3, size, size)"""
    settings = dict(crop=(args.crop, 1), jitter=args.jitter, grey_p=args.grey, blur_p=args.blur)
    return [common.augment(x, args.image_size, **settings) for _ in range(2)]


def project(model, views, args):
    """Two views (B, 3, H, W) -> their projections z1, z2 in one tensor (B, 2, D)."""
    with common.autocast(views[0].device, args.precision):
        z = model(torch.cat(views))  # (2B, D) in one forward: BatchNorm sees both views
    return torch.stack(z.chunk(2), 1)  # a row for each image, so that --chunk can split them


def loss(model, views, args):
    """views: two (B, 3, H, W) -> scalar. bissl.py minimises this in its lower level."""
    z1, z2 = project(model, views, args).unbind(1)
    return nt_xent(z1, z2, args.temperature)


def after_step(model, args, step, steps):
    """Does nothing. bissl.py calls it after each lower step; byol.py's moves the target."""


def train(args):
    backbone, _ = common.start_backbone(args)
    model = common.place(make_model(backbone, args), args.device)
    optimizer = common.make_optimizer(args.optimizer, [model], args.lr, args.weight_decay)
    data, probe = common.load_unlabeled(args), common.load_probe(args)
    batches = common.Batches(data, args.batch_size, whole_only=True)
    steps = args.epochs * len(batches)
    warmup = args.warmup * len(batches)

    def embed(x):
        return project(model, make_views(x, args), args)        # (B, 2, D)

    def contrast(z):
        return nt_xent(z[:, 0], z[:, 1], args.temperature)      # z (B, 2, D) -> scalar

    run = common.Run(args, "simclr", model, data, probe=probe, optimizer=optimizer)
    for epoch in run.epochs_left(len(batches)):
        for step, (x, _) in enumerate(batches, start=epoch * len(batches)):
            common.set_learning_rate(optimizer, args.lr, step, steps, warmup)
            optimizer.zero_grad()
            if args.chunk:
                batch_loss = common.chunked_backward(model, embed, contrast, x, args.chunk)
            else:
                z1, z2 = project(model, make_views(x, args), args).unbind(1)
                batch_loss = nt_xent(z1, z2, args.temperature)
                batch_loss.backward()
            common.average_gradients(model)
            optimizer.step()
            run.add(len(x), loss=batch_loss)
        run.end_epoch()

    draw(args, run.history, make_views(data.images[:32].to(args.device), args))
    return run.history[-1]


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
    drawn = dict(image_size=32, arch="resnet10", epochs=12, batch_size=128, lr=2e-3,
                 weight_decay=1e-4, crop=0.4, jitter=[0.5, 0.5, 0.5, 0.5], blur=0.0)
    others = dict(drawn, image_size=64, epochs=500, crop=0.2, jitter=[0.4, 0.4, 0.2, 0.1])
    optimizers = dict(sgd=dict(lr=0.05, weight_decay=5e-4), lars=dict(lr=0.85, weight_decay=1e-6))
    p = common.Parser("simclr.py", __doc__, drawn, others, data="doodles", optimizers=optimizers)
    p.option("--optimizer", str, "adamw, lars or sgd; LARS wants batches in the thousands, and "
             "then a rate of 0.075 sqrt(batch)", "adamw", choices=common.OPTIMIZERS)
    p.option("--chunk", common.FROM_ZERO, "images in memory at once, on each process; costs a "
             "second forward pass; 0: all", 0)
    p.option("--warmup", common.FROM_ZERO, "epochs of linear warm-up before the cosine, at most "
             "half of all", 1)
    p.option("--temperature", common.bounded(float, 1e-3), "tau of NT-Xent", 0.2)
    p.option("--hidden", common.COUNT, "width of the projector's hidden layer", 256)
    p.option("--dim", common.COUNT, "width of the projections", 128)
    p.option("--crop", common.bounded(float, 0.01, 1), "smallest area of a crop; the image's is 1")
    p.option("--jitter", common.SHARE, "brightness, contrast, saturation and hue jitter", nargs=4,
             metavar=tuple("BCSH"))
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
