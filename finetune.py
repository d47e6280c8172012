"""Plain fine-tuning: the last stage of the pipeline, and the yardstick for the other two (core_tuning.py, bi_tuning.py).

A linear classifier is put on the backbone and both are trained with cross-entropy, SGD and a cosine schedule. The protocol
is the one of BiSSL (arXiv 2410.02387, section 4): learning rate and weight decay are searched at random on a validation
split, the best pair is trained with several seeds, and the test split is looked at once, at the end of each such run.

    python finetune.py --ckpt simclr.pt                      fine-tune; without --ckpt: the same from scratch
    python finetune.py --ckpt simclr.pt --freeze             linear probe: only the classifier learns
    python finetune.py --ckpt simclr.pt --search 20 --seeds 5     what a table needs: mean +- std over 5 seeds
    python finetune.py --ckpt finetune.pt --eval             accuracy of a finished run, no training

Measured on petals, default flags (20 labels a class, 5 seeds, test top-1): 19.7 +- 1.8 % from scratch, 70.0 +- 5.5 % from SimCLR;
20 seconds a run on two CPU cores.

Differs from the paper in: 60 epochs instead of 400, no weight decay on biases and BatchNorm. With all labels, the last runs train on train
and val together; with few, on a subset of train that each seed draws anew, and the search is judged on the whole of val.
"""
import argparse
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

METRICS = ("top1", "top5", "mean_class")


def metrics(logits, labels):
    """Top-1, top-5 and mean per-class accuracy in per cent, and the confusion matrix (C, C) with true classes as rows.

    logits (n, C), labels (n,). Classes without an image do not count in the mean.
    """
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


def train(args, data, judge, watch, log, results, resume):
    """One run on `data`, scored on `judge` after its last epoch (appended to results) and watched on `watch`, if given."""
    backbone, _ = common.start_backbone(args, say=False)
    head = nn.Linear(backbone.num_features, len(data.classes)).to(args.device)
    backbone.requires_grad_(not args.freeze)
    optimizer = common.make_optimizer("sgd", [backbone, head], args.lr, args.weight_decay)
    first_epoch = sum(line["run"] == len(results) + 1 for line in log.history)
    if resume and first_epoch:  # else it holds the weights of the run before
        backbone.load_state_dict(resume["backbone"])
        head.load_state_dict(resume["head"])
        optimizer.load_state_dict(resume["resume"]["optimizer"])
    steps_per_epoch = -(-len(data) // args.batch_size)

    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(args.seed * 1_000_003 + epoch)
        total, hits = torch.zeros((), device=args.device), torch.zeros((), device=args.device)
        backbone.train(not args.freeze)  # a frozen backbone keeps its BatchNorm statistics too
        for i, (x, y) in enumerate(common.batches(data, args.batch_size)):
            common.set_learning_rate(optimizer, args.lr, epoch * steps_per_epoch + i, args.epochs * steps_per_epoch)
            x = common.augment(x, args.image_size, crop=(args.crop, 1))
            with common.autocast(args.device, args.precision):
                logits = head(backbone(x))
            loss = F.cross_entropy(common.upcast(logits), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            hits += (logits.detach().argmax(1) == y).sum()

        run = dict(lr=args.lr, weight_decay=args.weight_decay, seed=args.seed)
        if len(results) < args.search and not (total.isfinite() and common.is_finite(backbone, head)):
            results.append(dict(run, top1=0.0))  # a pair of the search that diverges is a bad pair, not an error
            break
        last = epoch + 1 == args.epochs
        val_top1 = None
        if watch and (last or (epoch + 1) % max(1, args.epochs // 10) == 0):
            val_top1 = evaluate(backbone, head, watch, args)[0]["top1"]
        log.epoch(len(data), run=len(results) + 1, loss=total / steps_per_epoch, train_top1=100 * hits / len(data), val_top1=val_top1)
        if last:
            results.append({**run, **evaluate(backbone, head, judge, args)[0]})
        common.save_checkpoint(
            f"{args.out}.pt", method="finetune", arch=args.arch, image_size=args.image_size, backbone=backbone,
            head=head, classes=data.classes, config=common.run_config(log.args),
            resume=dict(optimizer=optimizer.state_dict(), history=log.history, results=results))


def protocol(args):
    """Random search on the validation split, then the best pair with --seeds seeds, each scored once on test."""
    common.start_backbone(args)  # settles arch and image size, and says what it found
    ckpt = common.resume_checkpoint(args)
    test, val = common.load_data(args, "test"), common.load_data(args, "val")
    results, history = (ckpt["resume"]["results"], ckpt["resume"]["history"]) if ckpt else ([], [])
    log = common.Log(args, (args.search + args.seeds) * args.epochs, history)

    rng = np.random.default_rng(args.seed)
    pairs = 10 ** rng.uniform((-4, -5), (0, -2), (args.search, 2))  # lr 1e-4..1 and wd 1e-5..1e-2, log-uniform
    for run in range(len(results), args.search + args.seeds):
        now = copy.copy(args)
        if run < args.search:
            now.lr, now.weight_decay = pairs[run].tolist()
        else:
            now.seed = args.seed + run - args.search
            if args.search:
                best = max(results[:args.search], key=lambda result: result["top1"])
                now.lr, now.weight_decay = best["lr"], best["weight_decay"]
        searching = run < args.search
        data = common.load_labelled(args, now.seed, hold_out=searching)
        print(f"run {run + 1}/{args.search + args.seeds}: {len(data):,} labelled images of {len(data.classes)} classes, "
              f"lr {now.lr:.2g}, weight decay {now.weight_decay:.2g}, seed {now.seed}", flush=True)
        train(now, data, val if searching else test, val if searching or common.few_labels(args) else None, log, results, ckpt)
        ckpt = None

    final = results[args.search:]
    summary = dict(lr=final[-1]["lr"], weight_decay=final[-1]["weight_decay"])
    for name in METRICS:
        values = np.array([result[name] for result in final])
        summary[f"test_{name}"] = float(values.mean())
        summary[f"test_{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    print("test  " + "  ".join(f"{name} {summary[f'test_{name}']:.2f} +- {summary[f'test_{name}_std']:.2f} %"
                               for name in METRICS) + f"  ({len(final)} seed{'s' * (len(final) > 1)})", flush=True)
    log.write([*log.history, dict(summary, runs=results)])
    draw(args, log.history, test)
    return summary


def load_classifier(args, path, classes):
    """Backbone and linear head of a fine-tuning checkpoint whose head fits the classes."""
    backbone, ckpt = common.start_backbone(argparse.Namespace(**{**vars(args), "ckpt": path}), say=args.eval)
    weight = (ckpt["head"] or {}).get("weight")
    if weight is None or ckpt["classes"] is None or len(weight) != len(ckpt["classes"]):
        common.fail(f"{path} ({ckpt['method']}) has no classifier: fine-tune it first")
    if ckpt["classes"] != classes:
        common.fail(f"{path} tells {len(weight)} classes apart ({', '.join(ckpt['classes'][:3])}, ...), but {args.data} has "
                    f"{len(classes)} ({', '.join(classes[:3])}, ...)")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in ckpt["head"])
    head.load_state_dict(ckpt["head"])
    return backbone, head.to(args.device)


def draw(args, history, test):
    """Curves, the confusion matrix on test, and the test features before and after in the plane that class means span best."""
    backbone, head = load_classifier(args, f"{args.out}.pt", test.classes)
    before, _ = common.start_backbone(args, say=False)
    figure, axes = plt.subplots(2, 3, figsize=(16, 9.5))
    last_run = [dict(line, epoch=i + 1) for i, line in enumerate(history[-args.epochs:])]
    common.plot_curves(axes[0, 0], last_run, ["loss"])
    common.plot_curves(axes[0, 1], last_run, ["train_top1", "val_top1"])
    confusion = evaluate(backbone, head, test, args)[1]
    axes[0, 2].imshow((confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy(), cmap="viridis", vmin=0, vmax=1)
    axes[0, 2].set(xlabel="predicted", ylabel="true", title="confusion on test, share of the true class")
    if len(test.classes) <= 20:
        axes[0, 2].set_yticks(range(len(test.classes)), test.classes)
        axes[0, 2].set_xticks(range(len(test.classes)), test.classes, rotation=90)
    for axis, model, when in ((axes[1, 0], before, "before"), (axes[1, 1], backbone, "after")):
        x, y = common.features(model, test, args)
        if not x.isfinite().all():  # a run that diverged just short of infinity
            continue
        x = F.normalize(x, dim=1) - F.normalize(x, dim=1).mean(0)
        class_means = torch.stack([x[y == label].mean(0) for label in y.unique()])  # (C, D)
        plane = x @ torch.linalg.svd(class_means, full_matrices=False)[2][:2].T     # (n, 2)
        axis.scatter(*plane.T.cpu().numpy(), c=y.cpu().numpy(), cmap="tab20", s=4)
        axis.set_title(f"test features {when} fine-tuning, where class means differ most")
    axes[1, 2].hist((100 * confusion.diag() / confusion.sum(1).clamp(min=1)).numpy(), bins=20, range=(0, 100))
    axes[1, 2].set(xlabel="accuracy, %", ylabel="classes", title="accuracy of the single classes on test")
    common.save_figure(args, figure)


def parser():
    p = common.Parser(
        "finetune.py", __doc__,
        petals=dict(image_size=32, arch="resnet10", epochs=60, batch_size=32, lr=0.03, weight_decay=5e-4, crop=0.5,
                    labels_per_class=20),
        others=dict(image_size=64, arch="resnet10", epochs=60, batch_size=32, lr=0.01, weight_decay=5e-4, crop=0.5,
                    labels_per_class=None))
    p.label_options()
    p.option("--crop", common.number(float, 0.01, 1), "smallest area of a crop, as a share of the image")
    p.option("--search", common.FROM_ZERO, "random pairs of learning rate and weight decay to try on the validation split", 0)
    p.option("--seeds", common.COUNT, "runs with seeds SEED, SEED + 1, ...: mean +- standard deviation", 1)
    p.add_argument("--freeze", action="store_true", help="linear probe: the backbone stays as it is")
    p.add_argument("--eval", action="store_true", help="print the test accuracy of --ckpt; train and write nothing")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with common.resumable("finetune.py", args, argv):
        if not args.eval:
            return protocol(args)
        if args.ckpt is None:
            common.fail("--eval needs --ckpt")
        args.image_size = args.image_size or common.load_checkpoint(args.ckpt)["image_size"]
        test = common.load_data(args, "test")
        scores, _ = evaluate(*load_classifier(args, args.ckpt, test.classes), test, args)
        print("test  " + "  ".join(f"{name} {scores[name]:.2f} %" for name in METRICS))
        return {f"test_{name}": value for name, value in scores.items()}


if __name__ == "__main__":
    main()
