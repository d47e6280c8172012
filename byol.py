"""BYOL: bootstrap your own latent (Grill et al. 2020, arXiv 2006.07733).

The network predicts, from one view of an image, what a slow average of itself makes of another
view. There are no negatives: what keeps all projections from becoming one constant is the
predictor, and that no gradient flows into the target. Labels are only read by the probe that
watches the training.

  1. Draw a batch of B images; make two views x1, x2 of each, by two augmentations (appendix B).
  2. Online: p = q(z), z = g(f(x)): f is the backbone, g the projector, q the predictor.
     Target: z' = g'(f'(x)), no gradient (z_target in the code).
  3. Loss: 2 - 2 cos(p1, z2') + 2 - 2 cos(p2, z1').
  4. Step f, g and q. Then f' <- tau f' + (1 - tau) f, and g' alike, with tau rising from tau_base
     to 1 on a cosine.
  After the training all but f is thrown away and f is fine-tuned (finetune.py), or all goes to
  bissl.py first.

    python byol.py                                    petals, on any machine
    python byol.py --data DIR --out runs/mine         DIR/train/CLASS/*.png, labels unused
    python finetune.py --ckpt byol.pt

Look at `spread` in the log: the mean standard deviation of the normalised projections. 1/sqrt(dim)
is healthy, 0 is collapse (Chen and He 2021, arXiv 2011.10566).
"""
import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import common


def byol_loss(p, z):
    """2 - 2 cos(p, z), mean over the batch (equation 2). p, z (B, D): a prediction and the target
    that it is for; zeros have a cosine of 0. -> scalar of their type, float32 for half types"""
    p, z = F.normalize(common.upcast(p), dim=1), F.normalize(common.upcast(z), dim=1)
    return (2 - 2 * (p * z).sum(1)).mean()


def mlp(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, out, bias=False))


class Model(nn.Module):
    """Backbone f; in the head the projector g, the predictor q, and the target: averages f' and g'
    of f and g.

    Views (B, 3, H, W) -> z, p, z_target (B, D) each.
    """

    def __init__(self, backbone, hidden, out):
        super().__init__()
        self.backbone = backbone
        projector, predictor = mlp(backbone.num_features, hidden, out), mlp(out, hidden, out)
        target = nn.Sequential(copy.deepcopy(backbone), copy.deepcopy(projector))
        target.requires_grad_(False)
        self.head = nn.ModuleDict(dict(projector=projector, predictor=predictor, target=target))

    def forward(self, x):
        z = self.head.projector(self.backbone(x))  # (B, D)
        p = self.head.predictor(z)                 # (B, D)
        with torch.no_grad():                      # the target is a constant
            z_target = self.head.target(x)         # (B, D)
        return z, p, z_target

    def update_target(self, tau):
        """f' <- tau f' + (1 - tau) f, and g' alike (equation 1), after the optimiser step.
        BatchNorm statistics stay its own."""
        online = nn.Sequential(self.backbone, self.head.projector)
        common.update_average(self.head.target, online, tau)


def decay(tau_base, step, steps):
    """tau_k = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 ("Implementation details"): tau_base at
    step 0, 1 at K."""
    return 1 - (1 - tau_base) * (math.cos(math.pi * step / steps) + 1) / 2


def make_model(backbone, args):
    return Model(backbone, args.hidden, args.dim)


def make_views(x, args):
    """uint8 (B, 3, S, S) -> two random views (B, 3, size, size); args.blur and
    args.solarise hold a probability for the first and one for the second"""
    views = []
    for blur, solarise in zip(args.blur, args.solarise):
        views.append(common.augment(x, args.image_size, crop=(args.crop, 1), jitter=args.jitter,
                                    grey_p=args.grey, blur_p=blur, solarise_p=solarise))
    return views


def outputs(model, views, args):
    """z, p, z_target (2B, D) of both views, the first ones first. Each view goes through BatchNorm
    on its own."""
    with common.autocast(views[0].device, args.precision):
        first, second = model(views[0]), model(views[1])
    return [torch.cat(pair) for pair in zip(first, second)]


def symmetric_loss(p, z_target):
    """Each view predicts the target's projection of the other; 0 to 8. p, z_target (2B, D): first
    views, then second -> scalar"""
    (p1, p2), (z1_target, z2_target) = p.chunk(2), z_target.chunk(2)
    return byol_loss(p1, z2_target) + byol_loss(p2, z1_target)


def loss(model, views, args):
    """views: two (B, 3, H, W) -> scalar. bissl.py minimises this in its lower level."""
    _, p, z_target = outputs(model, views, args)
    return symmetric_loss(p, z_target)


def after_step(model, args, step, steps):
    """The target follows the step that the optimiser has made."""
    model.update_target(decay(args.decay, step, steps))


def train(args):
    backbone, _ = common.start_backbone(args)
    model = common.place(make_model(backbone, args), args.device)
    optimizer = common.make_optimizer(args.optimizer, [model], args.lr, args.weight_decay)
    data, probe = common.load_unlabeled(args), common.load_probe(args)
    batches = common.Batches(data, args.batch_size, whole_only=True)
    steps = args.epochs * len(batches)
    warmup = args.warmup * len(batches)

    run = common.Run(args, "byol", model, data, probe=probe, optimizer=optimizer)
    for epoch in run.epochs_left(len(batches)):
        for step, (x, _) in enumerate(batches, start=epoch * len(batches)):
            common.set_learning_rate(optimizer, args.lr, step, steps, warmup)
            optimizer.zero_grad()
            z, p, z_target = outputs(model, make_views(x, args), args)
            batch_loss = symmetric_loss(p, z_target)
            batch_loss.backward()
            common.average_gradients(model)
            optimizer.step()
            after_step(model, args, step, steps)
            spread = F.normalize(common.upcast(z.detach()), dim=1).std(0).mean()
            run.add(len(x), loss=batch_loss, spread=spread)
        run.end_epoch()

    draw(args, run.history, make_views(data.images[:32].to(args.device), args))
    return run.history[-1]


def draw(args, history, views):
    """Loss, collapse monitor, decay and probe over the epochs, and two views of 32 images as the
    network gets them."""
    figure, axes = plt.subplots(1, 5, figsize=(24, 4.5), width_ratios=(1, 1, 1, 1, 1.3))
    common.plot_curves(axes[0], history, ["loss"])
    common.plot_curves(axes[1], history, ["spread"])
    axes[1].axhline(args.dim ** -0.5, color="green", linestyle=":")
    axes[1].axhline(0, color="red", linestyle=":")
    axes[1].set_title("deviation of the projections\nhealthy: 1/sqrt(dim), collapsed: 0")
    axes[2].plot([decay(args.decay, epoch, args.epochs) for epoch in range(args.epochs + 1)])
    axes[2].set(xlabel="epoch", title="tau, decay of the target's average")
    common.plot_curves(axes[3], history, ["knn"])
    axes[3].set_ylabel("k-NN accuracy on held-out labels, %")
    common.show_images(axes[4], torch.stack(views, 1).flatten(0, 1), columns=8)
    axes[4].set_title("views: each pair of columns is one image")
    common.save_figure(args, figure)


def parser():
    drawn = dict(image_size=32, arch="resnet10", epochs=24, batch_size=64, lr=0.05,
                 weight_decay=5e-4, crop=0.4, jitter=[1.0, 1.0, 0.5, 0.5], blur=[0.0, 0.0],
                 solarise=[0.0, 0.5], decay=0.99)
    others = dict(drawn, image_size=64, epochs=500, crop=0.2, jitter=[0.4, 0.4, 0.2, 0.1],
                  blur=[1.0, 0.1], solarise=[0.0, 0.2], decay=0.996)
    optimizers = dict(adamw=dict(lr=2e-3, weight_decay=1e-4),
                      lars=dict(lr=0.2, weight_decay=1.5e-6))
    p = common.Parser("byol.py", __doc__, drawn, others, optimizers=optimizers)
    p.option("--optimizer", str, "adamw, lars or sgd; LARS wants batches in the thousands, and "
             "then a rate of 0.2 batch / 256", "sgd", choices=common.OPTIMIZERS)
    p.option("--warmup", common.FROM_ZERO, "epochs of linear warm-up before the cosine, at most "
             "half of all", 1)
    p.option("--decay", common.SHARE,
             "tau_base, decay of the target's average: short runs need a lower one, or the "
             "target hardly leaves its start")
    p.option("--hidden", common.COUNT, "width of the heads' hidden layers", 512)
    p.option("--dim", common.COUNT, "width of the projections", 128)
    p.option("--crop", common.bounded(float, 0.01, 1), "smallest area of a crop; the image's is 1")
    p.option("--jitter", common.SHARE, "brightness, contrast, saturation and hue jitter", nargs=4,
             metavar=tuple("BCSH"))
    p.option("--grey", common.SHARE, "probability of a grey view", 0.2)
    p.option("--blur", common.SHARE, "probability of a blurred first and second view", nargs=2,
             metavar=tuple("12"))
    p.option("--solarise", common.SHARE, "probability of a solarised first and second view",
             nargs=2, metavar=tuple("12"))
    p.option("--probe-every", common.COUNT, "epochs between two k-NN probes on held-out labels", 5)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("byol.py", args, argv):
        return train(args)


if __name__ == "__main__":
    main()
