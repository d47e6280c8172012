"""Plain fine-tuning: the last stage of the pipeline, and the yardstick for the other two
(core_tuning.py, bi_tuning.py).

A linear classifier is put on the backbone and both are trained with cross-entropy, SGD and a cosine
schedule, on petals after a warm-up. The protocol is the one of BiSSL (arXiv 2410.02387, section 4):
learning rate and weight decay are searched at random on a validation split, the best pair is
trained with several seeds, and the test split is looked at once, at the end of each such run.

    python finetune.py --ckpt simclr.pt                      without --ckpt: the same from scratch
    python finetune.py --ckpt simclr.pt --freeze             linear probe: the backbone stays
    python finetune.py --ckpt simclr.pt --search 20 --seeds 5     what a table needs: mean +- std
    python finetune.py --ckpt coin.pt                        COIN's second stage: its last epochs
    python finetune.py --ckpt finetune.pt --eval             test accuracy of a finished run, of
                                                             core_tuning.py and bi_tuning.py too
    python finetune.py --ckpt simclr.pt --task detect        boxes, by Faster R-CNN; segment: a
                                                             class for each pixel, by an FCN

With all labels a search trains on train, and the final runs on train and val together. With few
labels all train on a subset of train, drawn anew for each final seed. A search is always judged on
the whole of val.

What is trained for is a task: a head on the backbone, views, a loss of (backbone, head, x, y), a
score and a picture. Classify is all that the papers' tables need; Detect and Segment stand at the
end.
"""
import argparse
import copy
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import coin
import common

METRICS = ("top1", "top5", "mean_class", "map", "ap50", "ap", "ap75", "ap50_voc07", "miou",
           "mean_accuracy", "fwiou", "pixel_accuracy")
# The metric that is usually reported on a data set; elsewhere it is the task's own. It is printed
# first, and a search is judged by it.
MAIN_METRIC = dict(flowers="mean_class", aircrafts="mean_class", pets="mean_class",
                   caltech101="mean_class", voc07="map")
TENTHS = np.arange(11) / 10  # the recalls of VOC 2007's average precision


def train(trial):
    """Down the task's loss, and with --eta what COIN's second stage adds to it."""
    args, data, task = trial.args, trial.data, trial.task
    backbone, ckpt = common.start_backbone(args, say=False)
    head = task.head(backbone, data.classes)
    model = nn.ModuleDict(dict(backbone=backbone, head=head))
    if args.eta:
        common.need_one_label(args, data)
        coin.say_positives(data.labels, args.batch_size)
        model["projector"] = coin.start_projector(backbone.num_features, ckpt)
    model = common.place(model, args.device)
    backbone.requires_grad_(not args.freeze)
    optimizer = common.make_optimizer("sgd", [model], args.lr, args.weight_decay)
    batches = common.Batches(data, args.batch_size)
    steps = args.epochs * len(batches)
    warmup = args.warmup * len(batches)

    run = TrialRun(trial, model, optimizer)
    for epoch in run.epochs_left(len(batches)):
        backbone.train(not args.freeze)  # a frozen backbone keeps its BatchNorm statistics too
        if args.freeze_bn:
            common.freeze_batch_norm(backbone)
        for step, (x, y) in enumerate(batches, start=epoch * len(batches)):
            common.set_learning_rate(optimizer, args.lr, step, steps, warmup)
            x, y = task.views(x, y)
            loss, f, measured = task.loss(backbone, head, x, y)
            if args.eta:
                with common.autocast(args.device, args.precision):
                    z = model.projector(f)  # (B, d)
                loss = loss + args.eta * coin.supcon(z, y, args.temperature)
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model)
            optimizer.step()
            run.add(len(x), loss=loss, **measured)
        run.end_epoch()


class Classify:
    """A linear classifier; where images show several classes (voc07), one for each class."""
    metric = "top1"

    def __init__(self, args):
        self.args = args

    def head(self, backbone, classes):
        return nn.Linear(backbone.num_features, len(classes))

    def views(self, x, y):
        """uint8 images (B, 3, S, S) and labels -> normalised views (B, 3, size, size), labels"""
        return common.augment(x, self.args.image_size, crop=(self.args.crop, 1)), y

    def loss(self, backbone, head, x, y, frozen=False):
        """Views and labels -> the loss, the features f (B, D), and what is logged beside it.
        frozen: f is a constant, and here the head works on it in float32."""
        with common.autocast(self.args.device, self.args.precision):
            with torch.set_grad_enabled(not frozen):
                f = backbone(x)     # (B, D)
            if not frozen:
                logits = head(f)    # (B, C)
        if frozen:
            logits = head(common.upcast(f))
        return label_loss(logits, y), f, dict(train_top1=accuracy(logits, y))

    def score(self, backbone, head, store):
        return evaluate(backbone, head, store, self.args)[0]

    def picture(self, axes, backbone, head, before, store):
        """Three panels: the confusion matrix (with several labels per image: each class's
        precision), the store's features before fine-tuning and after."""
        x, y = common.features(backbone, store, self.args)
        _, by_class = metrics(head(x), y)  # the confusion matrix (C, C), or precision (C,)
        if y.ndim == 2:
            axes[0].barh(store.classes, 100 * by_class.numpy())
            axes[0].set(xlabel="average precision on test, %")
            y = (y == 1).int().argmax(1)  # the first of an image's classes gives its colour
        else:
            show_confusion(axes[0], by_class, store.classes)
        where = "fine-tuning, where class means differ most"
        x_before, _ = common.features(before, store, self.args)
        common.plot_features(axes[1], x_before, y, f"test features before {where}")
        common.plot_features(axes[2], x, y, f"test features after {where}")


def label_loss(logits, y):
    """Mean cross-entropy for y (B,). For y (B, C) of 1 present, 0 absent, -1 ignored: binary
    cross-entropy, mean over the entries that count. logits (B, C) -> scalar, in float32 or
    better."""
    logits = common.upcast(logits)
    if y.ndim == 1:
        return F.cross_entropy(logits, y)
    counts = (y >= 0).to(logits.dtype)                 # (B, C)
    present = y.clamp(min=0).to(logits.dtype)          # (B, C)
    total = F.binary_cross_entropy_with_logits(logits, present, counts, reduction="sum")
    return common.part_of_mean(total, counts.sum())


def accuracy(logits, y):
    """How often the highest score (B, C) is that of the class y (B,), or of one that is present,
    y (B, C) = 1: per cent, a scalar on the device."""
    best = logits.argmax(1)
    hit = best == y if y.ndim == 1 else y.gather(1, best[:, None]) == 1
    return 100 * hit.float().mean()


def average_precision(scores, present):
    """11-point interpolated average precision of each class (C,), 0 to 1 (VOC 2007): the mean over
    the recalls 0, 0.1, ..., 1 of the highest precision at that recall or a higher one.

    scores (n, C); present (n, C): 1, 0, or -1 for what counts neither way. NaN for a class that no
    image has.
    """
    order, means = scores.argsort(dim=0, descending=True, stable=True), []
    for ranked in present.gather(0, order).T.cpu().numpy():     # (n,), a class's best first
        total, mean = (ranked == 1).sum(), np.nan
        if total:
            mean = best_precision(ranked, total, TENTHS).mean()
        means.append(mean)
    return torch.tensor(means, dtype=torch.float64)


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
    in_five = logits.topk(min(5, num_classes)).indices == labels[:, None]  # (n, 5)
    pair = labels * num_classes + logits.argmax(1)                         # (n,) true and predicted
    confusion = torch.bincount(pair, minlength=num_classes ** 2).view(num_classes, num_classes)
    size = confusion.sum(1)
    recall = (confusion.diag() / size)[size > 0]
    scores = dict(top1=100 * (confusion.diag().sum() / len(labels)).item(),
                  top5=100 * in_five.any(1).float().mean().item(),
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
    flags: argparse.Namespace  # of the whole run: what OUT.pt keeps and --resume compares
    args: argparse.Namespace   # with this trial's own learning rate, weight decay and seed
    data: common.Store         # what it trains on
    judge: common.Store        # what it is scored on after its last epoch
    watch: common.Store        # what its score is logged on now and then, or None
    history: list              # a line per epoch of all trials so far
    results: list              # a dict for each finished trial

    @property
    def task(self):
        return make_task(self.args)


class TrialRun(common.Run):
    """common.Run of one trial: scored on the labelled images that judge it; many trials, one
    log."""

    def __init__(self, trial, model, optimizer):
        self.trial, self.number = trial, len(trial.results) + 1
        super().__init__(trial.flags, trial.method, model, trial.data, draws="fine-tuning",
                         optimizer=optimizer)
        trials = trial.flags.search + trial.flags.seeds
        # Of all trials: log() says how much time is left for them.
        self.epochs = trials * (trial.flags.epochs - trial.flags.spent)
        self.history, self.over = trial.history, False
        self.done_before = len(self.history)

    def load(self, ckpt):
        """Where the checkpoint is that of the trial before, this one begins, and nothing is
        loaded."""
        if self.epochs_done():
            super().load(ckpt)

    def epochs_done(self):
        return sum(line["run"] == self.number for line in self.trial.history)

    def epochs_left(self, steps):
        args, self.started = self.trial.args, time.perf_counter()
        for epoch in range(args.spent + self.epochs_done(), args.epochs):
            common.seed_epoch(self.draws, args.seed, epoch)
            self.start_epoch(steps)
            yield epoch
            if self.over:
                return

    def score(self):
        """The score on the judge after the last epoch, on what is watched now and then."""
        trial, model = self.trial, self.model
        done, epochs = self.epochs_done() + 1, trial.args.epochs - trial.args.spent
        last, metric, value = done == epochs, trial.task.metric, None
        if last:
            judged = trial.task.score(model.backbone, model.head, trial.judge)
            trial.results.append({**self.settings(), **judged})
        if last and trial.watch is trial.judge:
            value = judged[metric]
        elif trial.watch is not None and (last or done % max(1, epochs // 10) == 0):
            value = trial.task.score(model.backbone, model.head, trial.watch)[metric]
        return {f"val_{metric}": value}

    def settings(self):
        """What tells one result from the others."""
        args = self.trial.args
        judge = "val" if self.number <= self.trial.flags.search else "test"
        return dict(judge=judge, images=judges_in_words(self.trial.judge), lr=args.lr,
                    weight_decay=args.weight_decay, seed=args.seed)

    def end_epoch(self):
        searching = self.number <= self.trial.flags.search
        if searching and self.has_diverged():  # no error: the search goes on with the next pair
            self.trial.results.append({**self.settings(), self.trial.task.metric: 0.0})
            self.over = True
            return
        super().end_epoch(run=self.number)

    def has_diverged(self):
        losses = list(self.means().values())
        return not (np.isfinite(losses).all() and common.is_finite(self.model))

    def is_finished(self):
        return len(self.trial.results) == self.trial.flags.search + self.trial.flags.seeds

    def save(self):
        self.parts["results"] = self.trial.results
        super().save()


def protocol(args, method, train, panel=None):
    """Random search on the validation split, then the best pair with --seeds seeds, each scored
    once on test.

    train(trial): the script's own loop; panel(axes, args, backbone): what it adds to the figure.
    """
    if args.spent >= args.epochs:
        common.fail(f"--epochs {args.epochs} is the whole budget, and {args.spent} of them are "
                    "over: raise it, or give --spent 0 for a budget of its own")
    _, ckpt = common.start_backbone(args)  # settles arch and image size, and says what it found
    stopped = common.resume_checkpoint(args)
    test, val = common.load_data(args, "test"), None
    if args.search or common.few_labels(args):
        val = common.load_val(args)
    if args.search and val is None:
        common.fail(f"--search is judged on val, and {args.data} has too few labelled images for "
                    "one: add a val of its own")
    for name, judge in dict(val=val, test=test).items():
        if judge is not None and nothing_counts(judge.labels):
            common.fail(f"{name} of {args.data} has nothing that counts for a score: no object "
                        "that is not difficult, no pixel that is not void, or no class")
    results, history = [], []
    if stopped:
        labelled = common.load_data(args, "trainval")
        images = common.images_in_words(labelled)
        common.check_same_images(args, stopped, labelled.classes, images)
        results, history = stopped["resume"]["results"], stopped["resume"]["history"]
        check_same_judges(args, results, dict(val=val, test=test))
    say_what_was_seen(args, ckpt)
    trials = args.search + args.seeds
    for number in range(len(results), trials):
        searching, now = number < args.search, choose_settings(args, results, number)
        data = common.load_labelled(args, now.seed, hold_out=searching)
        if data.classes != test.classes:
            common.fail(f"train and test of {args.data} do not have the same classes")
        watch = val if searching or common.few_labels(args) else None
        common.tell(f"run {number + 1}/{trials}: lr {now.lr:.2g}, weight decay "
                    f"{now.weight_decay:.2g}, seed {now.seed}")
        train(Trial(method, args, now, data, judge=val if searching else test, watch=watch,
                    history=history, results=results))

    summary = dict(lr=results[-1]["lr"], weight_decay=results[-1]["weight_decay"])
    summary.update(report(args, results[args.search:]))
    common.write_lines(args, [*history, dict(summary, runs=results)])
    draw(args, history, test, panel)
    return summary


def nothing_counts(labels):
    """Whether labels, of any kind that a common.Store has, would give every score as NaN."""
    if labels.dtype == torch.uint8:                         # masks
        return not (labels != 255).any()
    if labels.is_floating_point():                          # boxes, of which -1 is none
        return not ((labels[:, :, 4] >= 0) & (labels[:, :, 5] != 1)).any()
    return labels.ndim == 2 and not (labels == 1).any()


def judges_in_words(judge):
    """common.images_in_words(), and how many of them judge: val may lie in one array with train."""
    words = common.images_in_words(judge)
    if len(judge) < len(judge.images):
        words = f"{len(judge):,} of {words}"
    return words


def check_same_judges(args, results, judges):
    """Stop where earlier trials were scored on other images than there are now. judges: val, which
    may be None, and test."""
    now = {}
    for name, judge in judges.items():
        if judge is not None:
            now[name] = judges_in_words(judge)
    for result in results:
        name, before = result["judge"], result["images"]
        if before != now[name]:
            common.fail(f"--resume: earlier runs were scored on {before} of {name}, and now "
                        f"{args.data} has {now[name]}")


def make_task(args):
    """What the flags ask for: Classify, where a script has no --task."""
    return TASKS[common.task_of(args)](args)


def main_metric(args):
    """The name of the score that is printed first, and by which a search goes."""
    return MAIN_METRIC.get(args.data, make_task(args).metric)


def choose_settings(args, results, number):
    """The flags of a trial: a random pair while the search goes on, then the best with a new
    seed."""
    now = copy.copy(args)
    if number < args.search:
        rng = np.random.default_rng(args.seed)
        pairs = 10 ** rng.uniform((-4, -5), (0, -2), (args.search, 2))  # lr 1e-4..1, wd 1e-5..1e-2
        now.lr, now.weight_decay = pairs[number].tolist()
        return now
    metric, highest = main_metric(args), -1.0
    for result in results[:args.search]:
        score = result.get(metric, 0.0)  # a pair that diverged has none
        if score > highest:
            highest, now.lr, now.weight_decay = score, result["lr"], result["weight_decay"]
    now.seed = args.seed + number - args.search
    return now


def say_what_was_seen(args, ckpt):
    """Where the checkpoint comes from a stage with labels: what it has seen, and what budget it
    left."""
    seen = argparse.Namespace(**(ckpt["config"] if ckpt else {}))
    same_labels = common.task_of(seen) == common.task_of(args)
    if same_labels and "labels_per_class" in vars(seen) and common.same_data(seen.data, args.data):
        few = common.few_labels(args)
        last_seed = seen.seed + getattr(seen, "seeds", 1) - 1  # whose run the checkpoint holds
        same = (seen.labels_per_class, seen.fraction, last_seed) == (
            args.labels_per_class, args.fraction, args.seed)
        if few and (args.seeds > 1 or not same):
            common.tell(f"{args.ckpt} has learnt from other labelled images than these flags draw: "
                        "make one for each seed")
        if args.search and not common.few_labels(seen):
            common.tell(f"{args.ckpt} has learnt from val, on which this search is judged: "
                        "accuracies on val are too high")
    elif "rest" in vars(seen):
        common.tell(f"{args.ckpt}: what coin.py left of its budget was for {seen.data}; here a new "
                    "one begins")
    if ckpt and is_fine_tuned(ckpt):
        common.tell(f"{args.ckpt}: its classifier is left out, and a new one begins")
    if args.spent:
        common.tell(f"{args.epochs - args.spent} of {args.epochs} epochs are left of the budget")


def report(args, results):
    """Print and return mean and standard deviation of each metric over the runs, the data set's
    main metric first."""
    summary, said = {}, []
    for name in dict.fromkeys([main_metric(args), *METRICS]):  # each once
        if name not in results[0]:
            continue
        values = np.array([result[name] for result in results])
        mean, std, spread = float(values.mean()), None, ""
        if len(values) > 1:
            std = float(values.std(ddof=1))
            spread = f" +- {std:.2f}"
        summary.update({f"test_{name}": mean, f"test_{name}_std": std})
        said.append(f"{name} {mean:.2f}{spread} %")
    common.tell("test  " + "  ".join(said))
    return summary


def is_fine_tuned(ckpt):
    """Whether one of the three scripts that fine-tune has made it: they alone have --search."""
    return "search" in ckpt["config"]


def load_fine_tuned(args, task, say=True):
    """Backbone and head of --ckpt, a fine-tuning checkpoint, and the classes that they tell
    apart."""
    if not args.ckpt:
        common.fail("--eval needs --ckpt, of finetune.py, core_tuning.py or bi_tuning.py")
    backbone, ckpt = common.start_backbone(args, say)
    # Without a head, stand-ins that the comparison below refuses.
    state, classes = ckpt["head"] or {}, ckpt["classes"] or ["none"]
    head = task.head(backbone, classes)
    if "weight" in state and "bias" not in state:  # core_tuning.py's classifier
        head.bias = None
    if not is_fine_tuned(ckpt) or common.shapes(state) != common.shapes(head.state_dict()):
        common.fail(f"--ckpt {args.ckpt} has no head to {common.task_of(args)}: fine-tune it "
                    "first, or give the --task and --image-size that it was fine-tuned for")
    head.load_state_dict(state)
    return backbone, head.to(args.device), classes


def evaluate_checkpoint(args):
    """What --eval does: the metrics of --ckpt on test, printed and returned."""
    task = make_task(args)
    backbone, head, classes = load_fine_tuned(args, task)
    test = common.load_data(args, "test")
    if test.classes != classes:
        common.fail(f"{args.ckpt} tells {len(classes)} classes apart, not those of {args.data}")
    return report(args, [task.score(backbone, head, test)])


def draw(args, history, test, panel):
    """Curves, the task's picture of the test images, and the method's own panel."""
    finished, task = copy.copy(args), make_task(args)
    finished.ckpt, finished.prefix = f"{args.out}.pt", None
    # OUT.pt is not the --ckpt whose weights load_backbone() compares with what it finds.
    vars(finished).pop("ckpt_weights", None)
    backbone, head, _ = load_fine_tuned(finished, task, say=False)
    begun = copy.copy(args)
    begun.seed = args.seed + args.seeds - 1  # of the last run, whose end OUT.pt is
    before, _ = common.start_backbone(begun, say=False)
    figure, axes = plt.subplots(2, 3, figsize=(16, 9.5))
    last_run = history[-(args.epochs - args.spent):]
    last_run = [dict(line, epoch=args.spent + i + 1) for i, line in enumerate(last_run)]
    common.plot_curves(axes[0, 0], last_run, ["loss"])
    measured = [name for name in last_run[-1] if name.startswith(("train_", "val_"))]
    common.plot_curves(axes[0, 1], last_run, measured)
    task.picture([axes[0, 2], axes[1, 0], axes[1, 1]], backbone, head, before, test)
    if panel:
        panel(axes[1, 2], args, backbone)
    else:
        axes[1, 2].remove()
    common.save_figure(args, figure)


def show_confusion(axes, confusion, names):
    """Of each true class, the share that was taken for each class: confusion (C, C)."""
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    show_matrix(axes, share, names, vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="confusion on test")


def show_matrix(axes, matrix, classes, **colours):
    """A number for each pair of classes (C, C), with their names where there are few."""
    axes.imshow(matrix.numpy(), **colours)
    if len(classes) <= 20:  # a $ in a name begins no formula
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
        axes.set_xticks(range(len(classes)), classes, parse_math=False, rotation=90)


# --------------------------------------------------------------------------- objects and pixels

STAGES = ("layer1", "layer2", "layer3", "layer4")
SMALL = 128  # pixels up to which anchors and a detector's head are small
LIKELY = 0.3  # score from which a figure shows what is found


def feature_maps(backbone, x):
    """What the stages make of images (B, 3, H, W): {stage: (B, channels, h, w)}"""
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x))))
    maps = {}
    for stage in STAGES:
        x = getattr(backbone, stage)(x)
        maps[stage] = x
    return maps


class Detector(nn.Module):
    """The head of a Faster R-CNN with a feature pyramid (Ren et al. 2015, arXiv 1506.01497; Lin et
    al. 2017, arXiv 1612.03144): all that follows the backbone, of torchvision's parts."""

    def __init__(self, backbone, classes, side):
        super().__init__()
        width, units = 256, 1024        # channels of the pyramid's maps, units of the box head
        anchor = 8                      # side of an anchor in cells
        limits = {}                     # numbers of boxes: those of torchvision
        if side <= SMALL:  # a step takes a thirtieth of the time
            width, units, anchor = 64, 128, 4
            limits = dict(rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100,
                          box_batch_size_per_image=32)
        stem = backbone.conv1.stride[0]  # pixels from a cell of layer1's map to the next
        if not isinstance(backbone.maxpool, nn.Identity):
            stem = 2 * stem
        if side % (8 * stem):  # else anchors would not lie where their cells look
            common.fail(f"--task detect needs an --image-size that is a multiple of {8 * stem}")
        sizes = [(anchor * stem * 2 ** level,) for level in range(5)]  # the fifth: layer4's, pooled
        channels = [backbone.num_features // 2 ** level for level in (3, 2, 1, 0)]
        self.pyramid = FeaturePyramidNetwork(channels, width, LastLevelMaxPool())
        self.pyramid.out_channels = width
        parts = FasterRCNN(
            self.pyramid, rpn_anchor_generator=AnchorGenerator(sizes, [(0.5, 1.0, 2.0)] * 5),
            box_roi_pool=MultiScaleRoIAlign(STAGES, 7, 2), box_head=TwoMLPHead(49 * width, units),
            box_predictor=FastRCNNPredictor(units, 1 + classes), **limits)
        self.rpn, self.rois = parts.rpn, parts.roi_heads

    def forward(self, x, maps, objects=None):
        """With objects (B, M, 6), see common.classes_shown(): the sum of the four losses. Without:
        what it finds, of each image boxes (n, 4) in pixels, labels from 1 and scores (n,)."""
        side, targets = x.shape[-1], None
        if objects is not None:
            targets = []
            for one in true_objects(objects):  # torchvision's parts take an image at a time
                targets.append(dict(boxes=side * one["boxes"], labels=one["labels"] + 1))
        images = ImageList(x, [(side, side)] * len(x))
        maps = {stage: common.upcast(level) for stage, level in self.pyramid(maps).items()}
        with torch.autocast(x.device.type, enabled=False):  # coordinates need float32's digits
            proposals, losses = self.rpn(images, maps, targets)
            found, more = self.rois(maps, proposals, images.image_sizes, targets)
        return found if targets is None else sum([*losses.values(), *more.values()])


class Detect:
    """Boxes around objects, and their classes."""
    metric = "ap50"

    def __init__(self, args):
        self.args = args

    def head(self, backbone, classes):
        return Detector(backbone, len(classes), self.args.image_size)

    def views(self, x, y):
        """Whole images, flipped or not: a crop could leave nothing of an object."""
        flip = common.own_rows(torch.rand(len(x) * common.world()) < 0.5)
        left, top, right, bottom, label, difficult = y.unbind(2)            # (B, M) each
        flipped = torch.stack([1 - right, top, 1 - left, bottom, label, difficult], 2)
        flip = flip.to(y.device, non_blocking=True)[:, None, None]               # (B, 1, 1)
        x = common.test_crop(x, self.args.image_size, share=1)
        return torch.where(flip[..., None], x.flip(3), x), torch.where(flip, flipped, y)

    def loss(self, backbone, head, x, y, frozen=False):
        """The four losses' sum. Difficult objects count as others do. Proposals are sampled from a
        seed of their own: two calls with the same arguments give the same loss, as BiSSL's two
        levels need, and what is drawn after it stays the same."""
        with common.autocast(self.args.device, self.args.precision):
            with torch.set_grad_enabled(not frozen):
                maps = feature_maps(backbone, x)
            with torch.random.fork_rng([x.device] if x.is_cuda else []):
                torch.manual_seed(0)
                loss = head(x, maps, y)
        return loss, maps, {}

    @torch.no_grad()
    def find(self, backbone, head, store):
        """What is found in each image of a store, as box_scores() takes it."""
        objects, size = [], self.args.image_size
        for x, _ in evaluation_batches(backbone, head, store, size):
            with common.autocast(self.args.device, self.args.precision):
                found = head(x, feature_maps(backbone, x))
            for one in found:
                objects.append(dict(boxes=one["boxes"].cpu() / size, labels=one["labels"].cpu() - 1,
                                    scores=one["scores"].cpu()))
        return objects

    def score(self, backbone, head, store):
        return box_scores(self.find(backbone, head, store), true_objects(store.labels.cpu()))

    def picture(self, axes, backbone, head, before, store):
        """What is there and what is found in four images of the store."""
        axes[0].remove()
        store = store.subset(torch.arange(len(store))[:4])
        found, true = self.find(backbone, head, store), true_objects(store.labels.cpu())
        (x, _), = evaluation_batches(backbone, head, store, self.args.image_size)
        show_boxes(axes[1], x, true, store.classes, "what is there")
        show_boxes(axes[2], x, found, store.classes, f"what is found, scores above {LIKELY}")


def evaluation_batches(backbone, head, store, size):
    """Whole images of a store, and their targets, with backbone and head in evaluation mode
    meanwhile. Of several processes each goes through all of them."""
    backbone.eval()
    head.eval()
    for x, y in common.feed(store, torch.arange(len(store)).split(32)):
        yield common.test_crop(x, size, share=1), y
    backbone.train()
    head.train()


def true_objects(labels):
    """The objects (B, M, 6) of each image, as box_scores() takes them."""
    objects = []
    for rows in labels:
        rows = rows[rows[:, 4] >= 0]
        objects.append(dict(boxes=rows[:, :4], labels=rows[:, 4].long(), difficult=rows[:, 5] == 1))
    return objects


def box_scores(found, true):
    """COCO's average precision (ap: mean over overlaps of 0.50, 0.55 ... 0.95), ap50, ap75, and the
    11-point one of VOC 2007 at 0.5 (ap50_voc07), means over the classes, in per cent.

    found, true: lists with a dict for each image. Of found: boxes (n, 4) left, top, right, bottom,
    labels (n,), scores (n,); of true: boxes (m, 4), labels (m,), difficult (m,) bool. A hit on a
    difficult object is neither right nor wrong. COCO counts the 100 best of a class and image.
    """
    overlaps, levels = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
    coco, voc = [], []  # of each class
    for label in torch.cat([one["labels"] for one in true]).unique():
        scores, outcomes, total = [], [], 0
        for one, there in zip(found, true):
            mine, theirs = one["labels"] == label, there["labels"] == label
            score, order = one["scores"][mine].sort(descending=True, stable=True)
            boxes, true_boxes = one["boxes"][mine][order], there["boxes"][theirs]
            iou = torchvision.ops.box_iou(boxes.double(), true_boxes.double()).numpy()  # (n, m)
            difficult = there["difficult"][theirs].numpy()
            of_coco = match(iou, difficult, overlaps)                           # (n, 10)
            of_coco[100:] = -1                                                  # do not count
            of_voc = match(iou, difficult, overlaps[:1], best_only=True)        # (n, 1)
            scores.append(score.numpy())
            outcomes.append(np.concatenate([of_coco, of_voc], 1))
            total += (~difficult).sum()
        if total:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            *columns, last = np.concatenate(outcomes)[order].T                  # (all n,) each
            coco.append([best_precision(ranked, total, levels).mean() for ranked in columns])
            voc.append(best_precision(last, total, TENTHS).mean())
    if not coco:  # there is nothing to find
        coco, voc = [[np.nan] * 10], [np.nan]
    ap = 100 * np.mean(coco, 0)                                                 # (10,)
    return dict(ap=float(ap.mean()), ap50=float(ap[0]), ap75=float(ap[5]),
                ap50_voc07=float(100 * np.mean(voc)))


def match(iou, difficult, overlaps, best_only=False):
    """Whether each found box is right (1), wrong (0), or neither (-1), at each of T overlaps: (n,
    T). iou (n, m) with the m true objects, the surest box first.

    A box takes the object that it overlaps most and that no surer one has taken; best_only: if a
    surer one has, it is wrong. A difficult object is taken when no other is, however often.
    """
    free = np.ones((len(overlaps), len(difficult)), bool)
    outcome = np.zeros((len(iou), len(overlaps)), int)
    if not len(difficult):
        return outcome
    for i, row in enumerate(iou):
        for level, overlap in enumerate(overlaps):
            fits = (row >= overlap) & (free[level] | difficult)                 # (m,)
            if best_only:
                fits &= np.arange(len(row)) == row.argmax()
            if (fits & ~difficult).any():
                fits &= ~difficult
            if fits.any():
                taken = np.flatnonzero(fits & (row == row[fits].max()))[-1]  # COCO's: the last
                outcome[i, level] = -1 if difficult[taken] else 1
                free[level, taken] = False
    return outcome


def best_precision(ranked, total, levels):
    """The highest precision at each recall of `levels` or a higher one. ranked (n,): 1 right, 0
    wrong, -1 neither, the surest first; total: how many objects there are to find."""
    right, counted = (ranked == 1).cumsum(), (ranked >= 0).cumsum()
    precision = right / np.maximum(counted, 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(right / total, levels)      # where that recall is reached, or n
    return np.append(best, 0)[first]


def show_boxes(axes, x, objects, names, title):
    """Four images (4, 3, H, H) with the objects of each; of found ones those that are likely."""
    common.show_images(axes, x, columns=2)
    axes.set_title(title)
    side = x.shape[-1]
    for i, one in enumerate(objects):
        corner = np.array([i % 2, i // 2]) * (side + 1) + 0.5  # the grid has a pixel between images
        for k, box in enumerate(side * one["boxes"].numpy()):
            label = int(one["labels"][k])
            text, colour = names[label], plt.get_cmap("tab20")(label % 20)
            if "scores" in one:
                if one["scores"][k] < LIKELY:
                    continue
                text = f"{text} {one['scores'][k]:.2f}"
            place, (width, height) = corner + box[:2], box[2:] - box[:2]
            axes.add_patch(plt.Rectangle(place, width, height, fill=False, color=colour))
            axes.text(*place, text, parse_math=False, fontsize=7, va="top",
                      bbox=dict(color=colour, pad=0.5))


class Segment:
    """A class for each pixel, by a fully convolutional network (Long et al. 2015, arXiv 1411.4038)
    whose last stages are dilated (Chen et al. 2017, arXiv 1606.00915)."""
    metric = "miou"

    def __init__(self, args):
        self.args = args

    def head(self, backbone, classes):
        """torchvision's FCNHead, as a plain sequence: its last layer is the classifier, and what
        stands before that gives the features."""
        return nn.Sequential(*FCNHead(backbone.num_features, len(classes)))

    def views(self, x, y):
        """Crops and flips, the mask's being the image's."""
        count, size = len(x) * common.world(), self.args.image_size
        box = common.own_rows(common.crop_boxes(count, x.shape[-1], (self.args.crop, 1)))
        flip = common.own_rows(torch.rand(count) < 0.5)
        y = common.crop_mask(y, box, flip, size)
        x = common.normalise(common.crop_resize_flip(x, box, flip, size))
        return x.contiguous(memory_format=torch.channels_last), y

    def loss(self, backbone, head, x, y, frozen=False):
        """Mean cross-entropy of the pixels that count, the head's features (B, D, h, w), and the
        share of those pixels that is right."""
        with common.autocast(self.args.device, self.args.precision):
            with torch.set_grad_enabled(not frozen):
                last = dilated_map(backbone, x)
            f = head[:-1](last)                                             # (B, D, h, w)
            logits = head[-1](f)                                            # (B, C, h, w)
        logits = resized(logits, y.shape[-1])
        counts = y != 255
        total = F.cross_entropy(logits, y.long(), ignore_index=255, reduction="sum")
        loss = common.part_of_mean(total, counts.sum())
        right = (logits.argmax(1) == y).sum() / counts.sum().clamp(min=1)
        return loss, f, dict(train_pixels=100 * right)

    @torch.no_grad()
    def predict(self, backbone, head, x, side):
        """The classes of the pixels (B, side, side) of images x (B, 3, H, H)."""
        with common.autocast(self.args.device, self.args.precision):
            logits = head(dilated_map(backbone, x))
        return resized(logits, side).argmax(1)

    def confusion(self, backbone, head, store):
        """Pixels of a store by true class and predicted one: (C, C)"""
        classes, size = len(store.classes), self.args.image_size
        counts = torch.zeros(classes ** 2, dtype=torch.long, device=store.labels.device)
        for x, y in evaluation_batches(backbone, head, store, size):
            pair = y.long() * classes + self.predict(backbone, head, x, y.shape[-1])
            counts += torch.bincount(pair[y != 255], minlength=classes ** 2)
        return counts.view(classes, classes).cpu()

    def score(self, backbone, head, store):
        return mask_scores(self.confusion(backbone, head, store))

    def picture(self, axes, backbone, head, before, store):
        """The confusion matrix of the pixels, and true and predicted masks of four images."""
        show_confusion(axes[0], self.confusion(backbone, head, store), store.classes)
        four = store.subset(torch.arange(len(store))[:4])
        # One batch, inside of which the model is in evaluation mode.
        for x, y in evaluation_batches(backbone, head, four, self.args.image_size):
            found = self.predict(backbone, head, x, y.shape[-1])
            show_masks(axes[1], x, y, "true classes")
            show_masks(axes[2], x, found, "predicted classes")


def dilated_map(backbone, x):
    """layer4's map (B, D, h, w) at layer2's resolution: the strides of layer3 and layer4 become
    dilation, but only here, so that the backbone is as it was for any other use."""
    changed, reach = [], 1
    for stage in (backbone.layer3, backbone.layer4):
        for conv in stage.modules():
            if isinstance(conv, nn.Conv2d):
                changed.append((conv, conv.stride, conv.dilation, conv.padding))
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (reach, reach)
                    reach = reach * conv.stride[0]  # what follows was made for a coarser map
                conv.stride = (1, 1)
    try:
        return feature_maps(backbone, x)["layer4"]
    finally:
        for conv, *before in changed:
            conv.stride, conv.dilation, conv.padding = before


def resized(logits, side):
    """(B, C, h, w) -> float32 (B, C, side, side)"""
    return F.interpolate(common.upcast(logits), (side, side), mode="bilinear")


def mask_scores(confusion):
    """Mean intersection over union, mean accuracy of the classes, IoU weighted by the classes'
    sizes, and the share of right pixels, in per cent. confusion (C, C): pixels, true classes as
    rows. A class that neither is there nor is predicted does not count."""
    counts = confusion.double()
    right, size = counts.diag(), counts.sum(1)                                  # (C,)
    union = size + counts.sum(0) - right
    iou = right / union.clamp(min=1)
    scores = dict(miou=iou[union > 0].mean(), mean_accuracy=(right / size)[size > 0].mean(),
                  fwiou=(size * iou).sum() / size.sum(), pixel_accuracy=right.sum() / size.sum())
    return {name: 100 * value.item() for name, value in scores.items()}


def show_masks(axes, x, masks, title):
    """Four images (4, 3, H, H) under the colours of their classes, masks (4, S, S)."""
    common.show_images(axes, x, columns=2)
    axes.set_title(title)
    masks = F.interpolate(masks[:, None].float().cpu(), x.shape[-2:], mode="nearest-exact")
    grid = torchvision.utils.make_grid(masks, 2, padding=1)[0].numpy()
    shown = np.ma.masked_where((grid == 0) | (grid == 255), grid % 20)
    axes.imshow(shown, cmap="tab20", vmin=0, vmax=20, alpha=0.7)


TASKS = dict(classify=Classify, detect=Detect, segment=Segment)
DETECT = {"detect": dict(epochs=20, batch_size=16, lr=0.02, weight_decay=1e-4, warmup=2),
          "detect on petals": dict(epochs=40, batch_size=8, lr=0.05, labels_per_class=100)}
SEGMENT = {"segment": dict(epochs=30, batch_size=16, lr=0.02, weight_decay=1e-4, warmup=0),
           "segment on petals": dict(lr=0.2, weight_decay=1e-3, labels_per_class=100)}


def protocol_options(p):
    """The flags of the protocol, the same for all three fine-tuning scripts."""
    p.label_options()
    p.option("--crop", common.bounded(float, 0.01, 1), "smallest area of a crop; the image's is "
             "1; to detect, images stay whole")
    p.option("--search", common.FROM_ZERO, "so many random pairs of learning rate (1e-4 to 1) and "
             "weight decay (1e-5 to 1e-2) are tried on the validation split, and the best one "
             "replaces --lr and --weight-decay", 0)
    p.option("--seeds", common.COUNT, "runs with seeds SEED, SEED + 1, ...: mean +- deviation", 1)
    p.option("--warmup", common.FROM_ZERO, "epochs of linear warm-up before the cosine, at most "
             "half of all")
    p.option("--spent", common.FROM_ZERO, "how many of the --epochs are over already")


def task_option(p, choices=("classify", "detect", "segment")):
    meaning = dict(classify="the class of an image", detect="boxes around objects",
                   segment="a class for each pixel")
    said = "; ".join(f"{name}: {meaning[name]}" for name in choices)
    p.option("--task", str, f"{said}. All but classify take petals, voc or a folder in the layout "
             "of VOC", "classify", choices=choices, metavar="TASK")


PETALS = dict(image_size=32, arch="resnet10", epochs=120, batch_size=32, lr=0.08,
              weight_decay=0.008, crop=0.5, labels_per_class=20, warmup=10, spent=0)
OTHERS = dict(PETALS, image_size=64, epochs=60, lr=0.01, weight_decay=5e-4, labels_per_class=0,
              warmup=0)
FROM_COIN = ("epochs", "spent", "warmup", "lr", "weight_decay", "batch_size", "crop",
             "labels_per_class", "fraction")


def parser():
    more = dict(eta=0.0, temperature=0.3)
    petals, others = dict(PETALS, **more), dict(OTHERS, **more)
    from_coin = (*FROM_COIN, "eta", "temperature")
    p = common.Parser("finetune.py", __doc__, petals, others, tasks={**DETECT, **SEGMENT},
                      from_coin=from_coin)
    protocol_options(p)
    task_option(p)
    p.option("--eta", common.NOT_NEGATIVE, "cross-entropy + ETA x SupCon")
    p.option("--temperature", common.bounded(float, 1e-3), "tau of SupCon")
    p.add_argument("--freeze", action="store_true", help="linear probe: the head alone is trained; "
                   "after coin.py, too, with a budget of its own")
    p.add_argument("--freeze-bn", action="store_true", help="BatchNorm in the backbone keeps the "
                   "averages that it came with")
    p.add_argument("--eval", action="store_true", help="print the test score of --ckpt; train and "
                   "write nothing")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.eta and args.task != "classify":
        common.fail("--eta is for --task classify: SupCon pairs images of one class")
    if args.eta and args.freeze:
        common.fail("--freeze leaves SupCon nothing to move: give one of --freeze and --eta")
    with common.resumable("finetune.py", args, argv):
        if args.eval:
            return evaluate_checkpoint(args)
        return protocol(args, "finetune", train)


if __name__ == "__main__":
    main()
