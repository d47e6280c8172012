"""Do a backbone's features fit the task before fine-tuning? What BiSSL's paper shows of its
backbones, as numbers and pictures.

    python tests/bench_alignment.py --data petals simclr=simclr.pt bissl=bissl.pt
                                                NAME=CHECKPOINT, as many as you like
    python tests/bench_alignment.py --data petals simclr=runs/s0.pt simclr=runs/s1.pt
                                                one name twice: mean +- std

  linear_probe, knn   accuracy on test, %, of a linear classifier and of 20 nearest neighbours,
                      given the labels of all of train
  s_dbw               cluster validity of the test classes (coin.s_dbw), lower is better
  silhouette          (b - a) / max(a, b), a: mean distance to the others of its class, b: to the
                      nearest other; mean, -1 .. 1
  alignment           mean squared distance of two images of one class (Wang and Isola 2020, arXiv
                      2005.10242: of two views)
  uniformity          log of the mean of exp(-2 squared distance) over all pairs, lower is more
                      uniform
The last three are of features at unit length. Test labels are read, so choose no flags by these
figures. Writes tests/results/alignment-DATA.csv and .png, with each name's first checkpoint side by
side.
"""
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import benches
import coin
import common

MEASURES = ("linear_probe", "knn", "s_dbw", "silhouette", "alignment", "uniformity")


def linear_probe(x, y, test_x, test_y, decay=1e-3):
    """Test accuracy in per cent of multinomial logistic regression on standardised features, with
    decay/2 ||W||^2, by L-BFGS."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    classes = int(y.max()) + 1
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return 100 * ((test_x @ weight + bias).argmax(1) == test_y).float().mean().item()


def silhouette(x, y):
    """Mean silhouette coefficient (Rousseeuw 1987) of x (n, D) with classes y (n,); 0 for an image
    that is alone in its class."""
    member = (y[:, None] == y.unique()).to(x.dtype)                         # (n, C)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")   # (n, n)
    total, size = distance @ member, member.sum(0)                          # (n, C), (C,)
    own = (member * total).sum(1) / (member @ size - 1).clamp(min=1)        # (n,) a
    other = (total / size).masked_fill(member.bool(), torch.inf).amin(1)    # (n,) b
    score = (other - own) / torch.maximum(own, other).clamp(min=1e-12)
    return score.masked_fill(member @ size == 1, 0).mean().item()


def alignment_and_uniformity(x, y):
    """Of x (n, D) at unit length: mean squared distance over pairs of one class; log mean
    exp(-2 squared distance) over all."""
    squared = (2 - 2 * x @ x.T).clamp(min=0)                                # (n, n)
    pair = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    alignment = squared[pair & (y[:, None] == y)].mean().item()
    return alignment, (-2 * squared[pair]).exp().mean().log().item()


def measure(ckpt, args):
    """All measures of one checkpoint's backbone, and its test features and labels."""
    flags = common.Parser("bench_alignment.py", "", {}, {}).parse_args(
        ["--data", args.data, "--root", args.root, "--device", args.device, "--ckpt", ckpt,
         "--precision", args.precision, "--out", str(benches.RESULTS / "alignment")])
    backbone, _ = common.start_backbone(flags)
    train = common.features(backbone, common.load_data(flags, "train"), flags)
    test = common.features(backbone, common.load_data(flags, "test"), flags)
    x, y = F.normalize(test[0], dim=1), test[1]
    alignment, uniformity = alignment_and_uniformity(x, y)
    values = dict(linear_probe=linear_probe(*train, *test), knn=common.knn_accuracy(*train, *test),
                  s_dbw=coin.s_dbw(*test), silhouette=silhouette(x, y), alignment=alignment,
                  uniformity=uniformity)
    return values, test


def row_of(name, runs, device):
    """Mean and standard deviation of each measure over a backbone's runs: its csv row."""
    row = dict(device=benches.device_name(device), backbone=name, runs=len(runs))
    for key in MEASURES:
        values = np.array([run[key] for run in runs])
        row[key], row[f"{key}_std"] = f"{values.mean():.4g}", ""
        if len(runs) > 1:
            row[f"{key}_std"] = f"{values.std(ddof=1):.2g}"
    return row


def draw(rows, features, path):
    figure, axes = plt.subplots(1, len(rows), figsize=(5 * len(rows), 4.8), squeeze=False)
    title = "{backbone}; mean of {runs}: k-NN {knn} %, probe {linear_probe} %"
    for axis, row in zip(axes[0], rows):
        common.plot_features(axis, *features[row["backbone"]], title.format(**row))
    figure.suptitle("test features before fine-tuning, where class means differ most")
    benches.save_figure(figure, path)


def main(argv=None):
    p = benches.parser(__doc__, runs=False)
    p.set_defaults(precision="float32")
    p.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    args = p.parse_args(argv)
    measured, features = {}, {}
    for pair in args.checkpoints:
        name, ckpt = pair.split("=", 1)
        values, test = measure(ckpt, args)
        measured.setdefault(name, []).append(values)
        features.setdefault(name, test)

    rows = []
    for name, runs in measured.items():
        row = row_of(name, runs, args.device)
        said = [f"{key} {row[key]} +- {row[f'{key}_std']}" for key in MEASURES]
        print(f"{name:12}  {'  '.join(said)}", flush=True)
        rows.append(row)
    path = benches.RESULTS / f"alignment-{benches.name_of_data(args.data)}.csv"
    benches.write_table(rows, path, rows[0])
    draw(rows, features, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
