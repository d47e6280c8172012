"""Plain fine-tuning: the last stage of the pipeline, and the yardstick for the other two (core_tuning.py, bi_tuning.py).

A linear classifier is put on the backbone and both are trained with cross-entropy, SGD and a cosine schedule. The protocol
is the one of BiSSL (arXiv 2410.02387, section 4): learning rate and weight decay are searched at random on a validation
split, the best pair is trained with several seeds, and the test split is looked at once, at the end of each such run.

    python finetune.py --ckpt simclr.pt                      fine-tune; without --ckpt: the same from scratch
    python finetune.py --ckpt simclr.pt --freeze             linear probe: only the classifier learns
    python finetune.py --ckpt simclr.pt --search 20 --seeds 5     what a table needs: mean +- std over 5 seeds
    python finetune.py --ckpt coin.pt                        COIN's second stage: its last epochs, with --supcon 0.1
    python finetune.py --ckpt finetune.pt --eval             accuracy of a finished run; core_tuning.pt, bi_tuning.pt too

With all labels a search trains on train, and the final runs on train and val together. With few labels all train on a subset of
train, drawn anew for each final seed. A search is always judged on the whole of val.

Measured on petals, 20 labels a class, 3 seeds, search of 4 pairs: test top-1 19.4 +- 0.7 % from scratch, 86.8 +- 6.8 % from
SimCLR (tests/bench_accuracy.py, whose search the defaults on petals are taken from).

Differs from the paper in: no search and one seed by default (the paper: 100 pairs, 10 seeds), 60 epochs instead of
400, batches of 32 instead of 256, no weight decay on biases and BatchNorm.
"""
import argparse
import copy
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import coin
import common

METRICS = ("top1", "top5", "mean_class", "map")
# what is usually reported, else top1: printed first, and what the best pair of a search is chosen by
MAIN_METRIC = dict(flowers="mean_class", aircrafts="mean_class", pets="mean_class", caltech101="mean_class", voc07="map")


def train(run):
    """Cross-entropy, and with --supcon what COIN's second stage adds to it."""
    args, data = run.args, run.data
    backbone, ckpt = common.start_backbone(args, say=False)
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(backbone.num_features, len(data.classes))))
    if args.supcon:
        common.need_one_label(args, data)
        coin.say_positives(data.labels, args.batch_size)
        model["projector"] = coin.start_projector(backbone.num_features, ckpt)
    model.to(args.device)
    backbone.requires_grad_(not args.freeze)
    optimizer = common.make_optimizer("sgd", [model], args.lr, args.weight_decay)
    steps_per_epoch = -(-len(data) // args.batch_size)

    for epoch in range(run.start(model, optimizer), args.epochs):
        torch.manual_seed(args.seed * 1_000_003 + epoch)
        total = hits = 0
        backbone.train(not args.freeze)  # a frozen backbone keeps its BatchNorm statistics too
        for i, (x, y) in enumerate(common.batches(data, args.batch_size)):
            step, steps = epoch * steps_per_epoch + i, args.epochs * steps_per_epoch
            common.set_learning_rate(optimizer, args.lr, step, steps, start=args.cosine_start)
            x = common.augment(x, args.image_size, crop=(args.crop, 1))
            with common.autocast(args.device, args.precision):
                f = backbone(x)         # (B, D)
                logits = model.head(f)  # (B, C)
                z = model.projector(f) if args.supcon else None
            loss = common.task_loss(logits, y)
            if args.supcon:
                loss = loss + args.supcon * coin.supcon(z, y, args.supcon_temperature)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            total += loss.detach() * len(x)
            hits += hit(logits.detach(), y).sum()
        if not run.finish_epoch(epoch, model, optimizer, total, hits):
            break


def hit(logits, y):
    """Whether the highest score (B, C) is that of the class y (B,), or of one that is present, y (B, C) = 1: (B,) bool."""
    best = logits.argmax(1)
    return best == y if y.ndim == 1 else y.gather(1, best[:, None])[:, 0] == 1


def average_precision(scores, present):
    """11-point interpolated average precision of each class (C,), 0 to 1 (VOC 2007): the mean over the recalls 0, 0.1, ..., 1
    of the highest precision at that recall or a higher one.

    scores (n, C); present (n, C): 1, 0, or -1 for what counts neither way. NaN for a class that no image has.
    """
    ranked = present.gather(0, scores.argsort(dim=0, descending=True, stable=True))  # (n, C), each column's best first
    found, seen = (ranked == 1).cumsum(0), (ranked >= 0).cumsum(0)
    precision, total = found.double() / seen.clamp(min=1), found[-1]  # (n, C), (C,)
    best = [precision.masked_fill(10 * found < tenth * total, 0).amax(0) for tenth in range(11)]
    return torch.stack(best).mean(0).masked_fill(total == 0, torch.nan)


def metrics(logits, labels):
    """Top-1, top-5 and mean per-class accuracy in per cent, and the confusion matrix (C, C) with true classes as rows.

    logits (n, C), labels (n,). Classes without an image do not count in the mean. With several labels an image, (n, C): mean
    average precision and the share of images whose highest score is that of a class they show, and each class's precision (C,).
    """
    if labels.ndim == 2:
        precision = average_precision(logits, labels)
        return dict(map=100 * precision.nanmean().item(), top1=100 * hit(logits, labels).float().mean().item()), precision.cpu()
    num_classes = logits.shape[1]
    ranked = logits.topk(min(5, num_classes)).indices == labels[:, None]  # (n, 5)
    confusion = torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes ** 2)
    confusion = confusion.view(num_classes, num_classes)
    present = confusion.sum(1) > 0
    recall = confusion.diag()[present] / confusion.sum(1)[present]
    return dict(top1=100 * ranked[:, 0].float().mean().item(), top5=100 * ranked.any(1).float().mean().item(),
                mean_class=100 * recall.mean().item()), confusion.cpu()


@torch.no_grad()
def evaluate(backbone, head, store, args):
    """metrics() of a model on a store, centre crops, in evaluation mode."""
    x, labels = common.features(backbone, store, args)
    return metrics(head(x), labels)


@dataclass
class Run:
    """One training run of the protocol: its flags and data, where its results go, and what it goes on from after a stop."""
    method: str
    args: argparse.Namespace  # with this run's own learning rate, weight decay and seed
    data: common.Store        # what it trains on
    judge: common.Store       # what it is scored on after its last epoch
    watch: common.Store       # what its accuracy is logged on now and then, or None
    log: common.Log
    results: list             # a dict for each finished run; this run's is appended
    ckpt: dict                # the checkpoint that --resume found, or None

    def start(self, model, optimizer):
        """The first epoch to train: 0, or the one in which this run was stopped, with everything loaded."""
        epoch = sum(line["run"] == len(self.results) + 1 for line in self.log.history)
        if self.ckpt and epoch:  # at epoch 0 it is still that of the run before
            optimizer.load_state_dict(self.ckpt["resume"]["optimizer"])
            for name, part in model.named_children():
                part.load_state_dict({**self.ckpt["resume"], **self.ckpt}[name])
        return epoch

    def finish_epoch(self, epoch, model, optimizer, total, hits):
        """Log the epoch, score the last one, save; False if the run is over because it diverged.

        model: ModuleDict of backbone, head and what the method has beside them; total, hits: loss and right answers of the
        epoch, summed over this process's images.
        """
        args, last = self.args, epoch + 1 == self.args.epochs
        common.average_statistics(model)
        total, hits, images = common.all_sum(total), common.all_sum(hits), len(self.data) - len(self.data) % common.world()
        run = dict(lr=args.lr, weight_decay=args.weight_decay, seed=args.seed)
        if len(self.results) < args.search and not (total.isfinite() and common.is_finite(model)):
            self.results.append(dict(run, top1=0.0))  # a pair of the search that diverges is a bad pair, not an error
            return False
        score = lambda store: evaluate(model.backbone, model.head, store, args)[0]
        due = (epoch + 1) % max(1, args.epochs // 10) == 0 or last
        judged = score(self.judge) if last else None
        watched = judged if last and self.watch is self.judge else score(self.watch) if self.watch and due else None
        self.log.epoch(images, run=len(self.results) + 1, loss=total / images, train_top1=100 * hits / images,
                       val_top1=watched and watched["top1"])
        if last:
            self.results.append({**run, **judged})
        parts = {name: part.state_dict() for name, part in model.named_children()}
        common.save_checkpoint(
            f"{args.out}.pt", method=self.method, arch=args.arch, image_size=args.image_size, backbone=parts.pop("backbone"),
            head=parts.pop("head"), projector=parts.pop("projector", None), classes=self.data.classes,
            config=common.run_config(self.log.args),
            resume=dict(parts, optimizer=optimizer.state_dict(), history=self.log.history, results=self.results))
        return True


def protocol(args, method, train, panel=None):
    """Random search on the validation split, then the best pair with --seeds seeds, each scored once on test.

    train(run): the script's own loop; panel(axes, args, backbone): what it adds to the figure.
    """
    _, start = common.start_backbone(args)  # settles arch and image size, and says what it found
    ckpt = common.resume_checkpoint(args)
    test, val = common.load_data(args, "test"), common.load_data(args, "val")
    results, history = (ckpt["resume"]["results"], ckpt["resume"]["history"]) if ckpt else ([], [])
    log = common.Log(args, (args.search + args.seeds) * args.epochs, history)
    if start and "labels_per_class" in start["config"] and start["config"]["data"] == args.data:  # a stage that has seen labels
        seen = argparse.Namespace(**start["config"])
        drawn = [(flags.labels_per_class, flags.fraction, flags.seed) for flags in (seen, args)]
        if common.few_labels(args) and (args.seeds > 1 or drawn[0] != drawn[1]):
            print(f"{args.ckpt} has learnt from other labelled images than these flags draw: make one for each seed", flush=True)
        if args.search and not common.few_labels(seen):
            print(f"{args.ckpt} has learnt from val, on which this search is judged: accuracies on val are too high", flush=True)
    if args.cosine_start:
        print(f"{args.epochs} epochs are left of the budget: goes on at {args.cosine_start:.0%} of the cosine", flush=True)

    rng, main_metric = np.random.default_rng(args.seed), MAIN_METRIC.get(args.data, "top1")
    pairs = 10 ** rng.uniform((-4, -5), (0, -2), (args.search, 2))  # lr 1e-4..1 and wd 1e-5..1e-2, log-uniform
    for run in range(len(results), args.search + args.seeds):
        searching, now = run < args.search, copy.copy(args)
        if searching:
            now.lr, now.weight_decay = pairs[run].tolist()
        else:
            best = max(results[:args.search], key=lambda result: result.get(main_metric, 0.0), default=vars(args))
            now.lr, now.weight_decay, now.seed = best["lr"], best["weight_decay"], args.seed + run - args.search
        data = common.load_labelled(args, now.seed, hold_out=searching)
        for split, store in (("val", val), ("test", test)):
            common.check_classes(args, store.classes, data.classes, split)
        print(f"run {run + 1}/{args.search + args.seeds}: {len(data):,} labelled images of {len(data.classes)} classes, "
              f"lr {now.lr:.2g}, weight decay {now.weight_decay:.2g}, seed {now.seed}", flush=True)
        train(Run(method, now, data, judge=val if searching else test,
                  watch=val if searching or common.few_labels(args) else None, log=log, results=results, ckpt=ckpt))
        ckpt = None

    lr, weight_decay = results[-1]["lr"], results[-1]["weight_decay"]
    summary = dict(lr=lr, weight_decay=weight_decay, **report(args, results[args.search:]))
    log.write([*log.history, dict(summary, runs=results)])
    draw(args, log.history, test, panel)
    return summary


def report(args, results):
    """Print and return mean and standard deviation of each metric over the runs, the data set's main metric first."""
    names, summary, said = [name for name in METRICS if name in results[0]], {}, []
    for name in sorted(names, key=lambda name: name != MAIN_METRIC.get(args.data, "top1")):
        values = np.array([result[name] for result in results])
        mean, std = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
        summary.update({f"test_{name}": mean, f"test_{name}_std": std})
        said.append(f"{name} {mean:.2f}{f' +- {std:.2f}' * (len(values) > 1)} %")
    print("test  " + "  ".join(said), flush=True)
    return summary


def load_classifier(args, say=True):
    """Backbone and linear head of --ckpt, a fine-tuning checkpoint, and the classes that they tell apart."""
    if not args.ckpt:
        common.fail("--eval needs --ckpt, a checkpoint of finetune.py, core_tuning.py or bi_tuning.py")
    backbone, ckpt = common.start_backbone(args, say)
    weight = ckpt and (ckpt["head"] or {}).get("weight")
    if weight is None:
        common.fail(f"--ckpt {args.ckpt} has no classifier: fine-tune it first")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in ckpt["head"])
    head.load_state_dict(ckpt["head"])
    return backbone, head.to(args.device), ckpt["classes"]


def evaluate_checkpoint(args):
    """What --eval does: the metrics of --ckpt on test, printed and returned."""
    backbone, head, classes = load_classifier(args)
    test = common.load_data(args, "test")
    if test.classes != classes:
        common.fail(f"{args.ckpt} tells {len(classes)} classes apart, which are not those of {args.data}")
    return report(args, [evaluate(backbone, head, test, args)[0]])


def draw(args, history, test, panel):
    """Curves, the confusion matrix on test (with several labels an image: each class's precision), the test features before and
    after, and the method's own panel."""
    backbone, head, classes = load_classifier(argparse.Namespace(**{**vars(args), "ckpt": f"{args.out}.pt"}), say=False)
    before, _ = common.start_backbone(args, say=False)
    x, y = common.features(backbone, test, args)
    confusion = metrics(head(x), y)[1]  # or precision
    figure, axes = plt.subplots(2, 3, figsize=(16, 9.5))
    last_run = [dict(line, epoch=i + 1) for i, line in enumerate(history[-args.epochs:])]
    common.plot_curves(axes[0, 0], last_run, ["loss"])
    common.plot_curves(axes[0, 1], last_run, ["train_top1", "val_top1"])
    if y.ndim == 2:
        axes[0, 2].barh(classes, 100 * confusion.numpy())
        axes[0, 2].set(xlabel="average precision on test, %")
    else:
        show_matrix(axes[0, 2], confusion / confusion.sum(1, keepdim=True).clamp(min=1), classes, vmin=0, vmax=1)
        axes[0, 2].set(xlabel="predicted", ylabel="true", title="confusion on test, share of the true class")
    where = "fine-tuning, where class means differ most"
    common.plot_features(axes[1, 0], *common.features(before, test, args), f"test features before {where}")
    common.plot_features(axes[1, 1], x, y, f"test features after {where}")
    if panel:
        panel(axes[1, 2], args, backbone)
    else:
        axes[1, 2].remove()
    common.save_figure(args, figure)


def show_matrix(axes, matrix, classes, **colours):
    """A number for each pair of classes (C, C), with their names where there are few."""
    axes.imshow(matrix.numpy(), **colours)
    if len(classes) <= 20:
        axes.set_yticks(range(len(classes)), classes)
        axes.set_xticks(range(len(classes)), classes, rotation=90)


def protocol_options(p):
    """The flags of the protocol, the same for all three fine-tuning scripts."""
    p.label_options()
    p.option("--crop", common.number(float, 0.01, 1), "smallest area of a crop, as a share of the image")
    p.option("--search", common.FROM_ZERO, "random pairs of learning rate and weight decay to try on the validation split", 0)
    p.option("--seeds", common.COUNT, "runs with seeds SEED, SEED + 1, ...: mean +- standard deviation", 1)
    p.option("--cosine-start", common.SHARE, "share of the cosine that is over already; after coin.py: coin's")


PETALS = dict(image_size=32, arch="resnet10", epochs=60, batch_size=32, lr=0.08, weight_decay=0.008, crop=0.5,
              labels_per_class=20, cosine_start=0.0)
OTHERS = dict(PETALS, image_size=64, lr=0.01, weight_decay=5e-4, labels_per_class=None)


def parser():
    petals, others = (dict(defaults, supcon=0.0, supcon_temperature=0.3) for defaults in (PETALS, OTHERS))
    p = common.Parser("finetune.py", __doc__, petals, others, finishes_budget=True)
    protocol_options(p)
    p.option("--supcon", common.NOT_NEGATIVE, "eta: cross-entropy + ETA x SupCon; after coin.py: 0.1", metavar="ETA")
    p.option("--supcon-temperature", common.number(float, 1e-3), "tau of SupCon; after coin.py: coin's")
    p.add_argument("--freeze", action="store_true", help="linear probe: the backbone stays as it is")
    p.add_argument("--eval", action="store_true", help="print the test accuracy of --ckpt; train and write nothing")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("finetune.py", args, argv):
        return evaluate_checkpoint(args) if args.eval else protocol(args, "finetune", train)


if __name__ == "__main__":
    main()
