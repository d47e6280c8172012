"""Plain fine-tuning: the last stage of the pipeline, and the yardstick for the other two
(core_tuning.py, bi_tuning.py).

A linear classifier is put on the backbone and both are trained with cross-entropy, SGD and a cosine
schedule. The protocol is the one of BiSSL (arXiv 2410.02387, section 4): learning rate and weight
decay are searched at random on a validation split, the best pair is trained with several seeds, and
the test split is looked at once, at the end of each such run.

    python finetune.py --ckpt simclr.pt                      without --ckpt: the same from scratch
    python finetune.py --ckpt simclr.pt --freeze             linear probe: the backbone stays
    python finetune.py --ckpt simclr.pt --search 20 --seeds 5     what a table needs: mean +- std
    python finetune.py --ckpt coin.pt                        COIN's second stage: its last epochs
    python finetune.py --ckpt finetune.pt --eval             test accuracy of a finished run, of
                                                             core_tuning.py and bi_tuning.py too

With all labels a search trains on train, and the final runs on train and val together. With few
labels all train on a subset of train, drawn anew for each final seed. A search is always judged on
the whole of val.
"""
import argparse
import copy
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import coin
import common

METRICS = ("top1", "top5", "mean_class", "map")
# What is usually reported, else top1: printed first, and what a search is judged by.
MAIN_METRIC = dict(flowers="mean_class", aircrafts="mean_class", pets="mean_class",
                   caltech101="mean_class", voc07="map")


def train(trial):
    """Cross-entropy, and with --eta what COIN's second stage adds to it."""
    args, data = trial.args, trial.data
    backbone, ckpt = common.start_backbone(args, say=False)
    head = nn.Linear(backbone.num_features, len(data.classes))
    model = nn.ModuleDict(dict(backbone=backbone, head=head))
    if args.eta:
        common.need_one_label(args, data)
        coin.say_positives(data.labels, args.batch_size)
        model["projector"] = coin.start_projector(backbone.num_features, ckpt)
    model.to(args.device)
    backbone.requires_grad_(not args.freeze)
    optimizer = common.make_optimizer("sgd", [model], args.lr, args.weight_decay)
    batches = common.Batches(data, args.batch_size)
    steps = args.epochs * len(batches)

    run = Run(trial, model, optimizer)
    for epoch in run.epochs_left(len(batches)):
        backbone.train(not args.freeze)  # a frozen backbone keeps its BatchNorm statistics too
        for step, (x, y) in enumerate(batches, start=epoch * len(batches)):
            common.set_learning_rate(
                optimizer, args.lr, step, steps, cosine_start=args.cosine_start)
            x = common.augment(x, args.image_size, crop=(args.crop, 1))
            with common.autocast(args.device, args.precision):
                f = backbone(x)    # (B, D)
                logits = head(f)   # (B, C)
                z = model.projector(f) if args.eta else None
            loss = common.task_loss(logits, y)
            if args.eta:
                loss = loss + args.eta * coin.supcon(z, y, args.temperature)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            run.add(len(x), loss=loss, train_top1=accuracy(logits, y))
        run.end_epoch()


def hit(logits, y):
    """Whether the highest score (B, C) is that of the class y (B,), or of one that is present,
    y (B, C) = 1: (B,) bool."""
    best = logits.argmax(1)
    return best == y if y.ndim == 1 else y.gather(1, best[:, None])[:, 0] == 1


def accuracy(logits, y):
    """Share of hits in per cent, a scalar on the device."""
    return 100 * hit(logits.detach(), y).float().mean()


def average_precision(scores, present):
    """11-point interpolated average precision of each class (C,), 0 to 1 (VOC 2007): the mean over
    the recalls 0, 0.1, ..., 1 of the highest precision at that recall or a higher one.

    scores (n, C); present (n, C): 1, 0, or -1 for what counts neither way. NaN for a class that no
    image has.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranked = present.gather(0, order)                           # (n, C), each column's best first
    found, seen = (ranked == 1).cumsum(0), (ranked >= 0).cumsum(0)
    precision, total = found.double() / seen.clamp(min=1), found[-1]  # (n, C), (C,)
    best = []
    for tenth in range(11):
        too_early = 10 * found < tenth * total                  # the recall is below tenth / 10
        best.append(precision.masked_fill(too_early, 0).amax(0))
    return torch.stack(best).mean(0).masked_fill(total == 0, torch.nan)


def metrics(logits, labels):
    """Top-1, top-5 and mean per-class accuracy in per cent, and the confusion matrix (C, C) with
    true classes as rows.

    logits (n, C), labels (n,). Classes without an image do not count in the mean. With several
    labels an image, (n, C): mean average precision and the share of images whose highest score is
    that of a class they show, and each class's precision (C,).
    """
    if labels.ndim == 2:
        precision = average_precision(logits, labels)
        scores = dict(map=100 * precision.nanmean().item(), top1=accuracy(logits, labels).item())
        return scores, precision.cpu()
    num_classes = logits.shape[1]
    ranked = logits.topk(min(5, num_classes)).indices == labels[:, None]  # (n, 5)
    pair = labels * num_classes + logits.argmax(1)                        # (n,) true and predicted
    confusion = torch.bincount(pair, minlength=num_classes ** 2).view(num_classes, num_classes)
    size = confusion.sum(1)
    recall = (confusion.diag() / size)[size > 0]
    scores = dict(top1=100 * ranked[:, 0].float().mean().item(),
                  top5=100 * ranked.any(1).float().mean().item(),
                  mean_class=100 * recall.mean().item())
    return scores, confusion.cpu()


@torch.no_grad()
def evaluate(backbone, head, store, args):
    """metrics() of a model on a store, centre crops, in evaluation mode."""
    x, labels = common.features(backbone, store, args)
    return metrics(head(x), labels)


@dataclass
class Trial:
    """One training of the protocol: a pair of the search, or a final run with one seed."""
    method: str
    flags: argparse.Namespace  # as they were typed
    args: argparse.Namespace   # with this trial's own learning rate, weight decay and seed
    data: common.Store         # what it trains on
    judge: common.Store        # what it is scored on after its last epoch
    watch: common.Store        # what its accuracy is logged on now and then, or None
    history: list              # a line an epoch of all trials so far
    results: list              # a dict for each finished trial
    resume: bool               # whether --resume goes on inside this one


class Run(common.Run):
    """common.Run of one trial: scored on the labelled images that judge it; many trials, one
    log."""

    def __init__(self, trial, model, optimizer):
        self.trial, self.number = trial, len(trial.results) + 1
        super().__init__(trial.flags, trial.method, model, trial.data.classes, stage="fine-tuning",
                         optimizer=optimizer)
        self.epochs *= trial.flags.search + trial.flags.seeds  # of all trials, for the time left
        self.history, self.over = trial.history, False
        self.first = len(self.history)

    def load(self, ckpt):
        """A trial that has not begun starts afresh: the checkpoint is that of the one before."""
        if self.trial.resume and self.epochs_done():
            super().load(ckpt)

    def epochs_done(self):
        return sum(line["run"] == self.number for line in self.trial.history)

    def epochs_left(self, steps=None):
        args, self.started = self.trial.args, time.perf_counter()
        spent = round(args.epochs * args.cosine_start / (1 - args.cosine_start))  # by coin.py
        for epoch in range(self.epochs_done(), args.epochs):
            common.seed_epoch(self.stage, args.seed, spent + epoch)
            self.start_epoch(steps)
            yield epoch
            if self.over:
                return

    def score(self):
        """Accuracy on the judge after the last epoch, on what is watched now and then."""
        trial, done = self.trial, self.epochs_done() + 1
        last, every = done == trial.args.epochs, max(1, trial.args.epochs // 10)
        watched = None
        if last:
            judged, _ = evaluate(self.model.backbone, self.model.head, trial.judge, trial.args)
            trial.results.append({**self.settings(), **judged})
            watched = judged if trial.watch is trial.judge else None
        if trial.watch is not None and watched is None and (last or done % every == 0):
            watched, _ = evaluate(self.model.backbone, self.model.head, trial.watch, trial.args)
        return dict(val_top1=watched and watched["top1"])

    def settings(self):
        args = self.trial.args
        return dict(lr=args.lr, weight_decay=args.weight_decay, seed=args.seed)

    def end_epoch(self):
        searching = self.number <= self.trial.flags.search
        finite = np.isfinite(list(self.means().values())).all() and common.is_finite(self.model)
        if searching and not finite:  # a bad pair, not an error: the search goes on with the next
            self.trial.results.append({**self.settings(), "top1": 0.0})
            self.over = True
            return
        super().end_epoch(run=self.number)

    def save(self):
        self.parts["results"] = self.trial.results
        super().save()


def protocol(args, method, train, panel=None):
    """Random search on the validation split, then the best pair with --seeds seeds, each scored
    once on test.

    train(trial): the script's own loop; panel(axes, args, backbone): what it adds to the figure.
    """
    _, ckpt = common.start_backbone(args)  # settles arch and image size, and says what it found
    stopped = common.resume_checkpoint(args)
    test, val = common.load_data(args, "test"), None
    if args.search or common.few_labels(args):
        val = common.load_val(args)
    if args.search and val is None:
        common.fail(f"--search is judged on val, and no image of {args.data} is left for it: each "
                    "class has one. Add a folder val")
    results, history = [], []
    if stopped:
        results, history = stopped["resume"]["results"], stopped["resume"]["history"]
    say_what_was_seen(args, ckpt)
    trials, first = args.search + args.seeds, len(results)
    for number in range(first, trials):
        searching, now = number < args.search, choose_settings(args, results, number)
        data = common.load_labelled(args, now.seed, hold_out=searching)
        watch = val if searching or common.few_labels(args) else None
        common.tell(f"run {number + 1}/{trials}: {len(data):,} labelled images of "
                    f"{len(data.classes)} classes, lr {now.lr:.2g}, weight decay "
                    f"{now.weight_decay:.2g}, seed {now.seed}")
        train(Trial(method, args, now, data, judge=val if searching else test, watch=watch,
                    history=history, results=results, resume=number == first))

    summary = dict(lr=results[-1]["lr"], weight_decay=results[-1]["weight_decay"])
    summary.update(report(args, results[args.search:]))
    common.write_lines(args, [*history, dict(summary, runs=results)])
    draw(args, history, test, panel)
    return summary


def choose_settings(args, results, number):
    """The flags of a trial: a random pair while the search goes on, then the best with a new
    seed."""
    now = copy.copy(args)
    if number < args.search:
        rng = np.random.default_rng(args.seed)
        pairs = 10 ** rng.uniform((-4, -5), (0, -2), (args.search, 2))  # lr 1e-4..1, wd 1e-5..1e-2
        now.lr, now.weight_decay = pairs[number].tolist()
        return now
    main_metric, highest = MAIN_METRIC.get(args.data, "top1"), -1.0
    for result in results[:args.search]:
        score = result.get(main_metric, 0.0)  # a pair that diverged has none
        if score > highest:
            highest, now.lr, now.weight_decay = score, result["lr"], result["weight_decay"]
    now.seed = args.seed + number - args.search
    return now


def say_what_was_seen(args, ckpt):
    """Where the checkpoint comes from a stage with labels: what it has seen, and what budget it
    left."""
    seen = argparse.Namespace(**(ckpt["config"] if ckpt else {}))
    if "labels_per_class" in vars(seen) and common.same_data(seen.data, args.data):
        few = common.few_labels(args)
        same = (seen.labels_per_class, seen.fraction, seen.seed) == (
            args.labels_per_class, args.fraction, args.seed)
        if few and (args.seeds > 1 or not same):
            common.tell(f"{args.ckpt} has learnt from other labelled images than these flags draw: "
                        "make one for each seed")
        if args.search and not common.few_labels(seen):
            common.tell(f"{args.ckpt} has learnt from val, on which this search is judged: "
                        "accuracies on val are too high")
    if args.cosine_start:
        common.tell(f"{args.epochs} epochs are left of the budget: goes on at "
                    f"{args.cosine_start:.0%} of the cosine")


def report(args, results):
    """Print and return mean and standard deviation of each metric over the runs, the data set's
    main metric first."""
    main_metric = MAIN_METRIC.get(args.data, "top1")
    names = [main_metric, *METRICS]
    summary, said = {}, []
    for name in dict.fromkeys(names):  # each once
        if name not in results[0]:
            continue
        values = np.array([result[name] for result in results])
        mean, std, spread = float(values.mean()), 0.0, ""
        if len(values) > 1:
            std = float(values.std(ddof=1))
            spread = f" +- {std:.2f}"
        summary.update({f"test_{name}": mean, f"test_{name}_std": std})
        said.append(f"{name} {mean:.2f}{spread} %")
    common.tell("test  " + "  ".join(said))
    return summary


def load_classifier(args, say=True):
    """Backbone and linear head of --ckpt, a fine-tuning checkpoint, and the classes that they tell
    apart."""
    if not args.ckpt:
        common.fail("--eval needs --ckpt, of finetune.py, core_tuning.py or bi_tuning.py")
    backbone, ckpt = common.start_backbone(args, say)
    state = ckpt["head"] or {}
    if "weight" not in state:
        common.fail(f"--ckpt {args.ckpt} has no classifier: fine-tune it first")
    classes, width = state["weight"].shape
    head = nn.Linear(width, classes, bias="bias" in state)
    head.load_state_dict(state)
    return backbone, head.to(args.device), ckpt["classes"]


def evaluate_checkpoint(args):
    """What --eval does: the metrics of --ckpt on test, printed and returned."""
    backbone, head, classes = load_classifier(args)
    test = common.load_data(args, "test")
    if test.classes != classes:
        common.fail(f"{args.ckpt} tells {len(classes)} classes apart, not those of {args.data}")
    scores, _ = evaluate(backbone, head, test, args)
    return report(args, [scores])


def draw(args, history, test, panel):
    """Curves, the confusion matrix on test (with several labels an image: each class's precision),
    the test features before and after, and the method's own panel."""
    finished = copy.copy(args)
    finished.ckpt, finished.prefix = f"{args.out}.pt", None
    backbone, head, classes = load_classifier(finished, say=False)
    classes = [name.replace("$", r"\$") for name in classes]  # else matplotlib reads formulas
    before, _ = common.start_backbone(args, say=False)
    x, y = common.features(backbone, test, args)
    _, confusion = metrics(head(x), y)  # or precision
    figure, axes = plt.subplots(2, 3, figsize=(16, 9.5))
    last_run = [dict(line, epoch=i + 1) for i, line in enumerate(history[-args.epochs:])]
    common.plot_curves(axes[0, 0], last_run, ["loss"])
    common.plot_curves(axes[0, 1], last_run, ["train_top1", "val_top1"])
    if y.ndim == 2:
        axes[0, 2].barh(classes, 100 * confusion.numpy())
        axes[0, 2].set(xlabel="average precision on test, %")
    else:
        share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
        show_matrix(axes[0, 2], share, classes, vmin=0, vmax=1)
        axes[0, 2].set(xlabel="predicted", ylabel="true", title="confusion on test")
    where = "fine-tuning, where class means differ most"
    x_before, _ = common.features(before, test, args)
    common.plot_features(axes[1, 0], x_before, y, f"test features before {where}")
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
    p.option("--crop", common.bounded(float, 0.01, 1), "smallest share of the image in a crop")
    p.option("--search", common.FROM_ZERO, "random pairs of learning rate and weight decay to try "
             "on the validation split", 0)
    p.option("--seeds", common.COUNT, "runs with seeds SEED, SEED + 1, ...: mean +- deviation", 1)
    p.option("--cosine-start", common.bounded(float, 0, 0.999), "share of the cosine that is over "
             "already; after coin.py: coin's")


PETALS = dict(image_size=32, arch="resnet10", epochs=60, batch_size=32, lr=0.08, weight_decay=0.008,
              crop=0.5, labels_per_class=20, cosine_start=0.0)
OTHERS = dict(PETALS, image_size=64, lr=0.01, weight_decay=5e-4, labels_per_class=None)
FROM_COIN = ("epochs", "cosine_start", "lr", "weight_decay", "batch_size", "crop",
             "labels_per_class", "fraction")


def parser():
    petals, others = dict(PETALS, eta=0.0, temperature=0.3), dict(OTHERS, eta=0.0, temperature=0.3)
    from_coin = (*FROM_COIN, "eta", "temperature")
    p = common.Parser("finetune.py", __doc__, petals, others, from_coin=from_coin)
    protocol_options(p)
    p.option("--eta", common.NOT_NEGATIVE, "cross-entropy + ETA x SupCon; after coin.py: coin's")
    p.option("--temperature", common.bounded(float, 1e-3), "tau of SupCon; after coin.py: coin's")
    p.add_argument("--freeze", action="store_true", help="linear probe: the backbone is left alone")
    p.add_argument("--eval", action="store_true", help="print the test accuracy of --ckpt; train "
                   "and write nothing")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("finetune.py", args, argv):
        if args.eval:
            return evaluate_checkpoint(args)
        return protocol(args, "finetune", train)


if __name__ == "__main__":
    main()
