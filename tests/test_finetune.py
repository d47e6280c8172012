"""Fine-tuning: its scores against slow loops, and its protocol of evaluation, subsets, search and
seeds."""
import numpy as np
import pytest
import torch
from torch import nn

import common
import finetune
from conftest import FINE_TUNING, ROOT, SCRIPTS, draw_nothing, error_line, files, json_lines

EMOJI = ROOT.parent / "shared" / "data" / "emoji"
SMALL = ["--data", "pictures", "--root", "root", "--image-size", "16", "--batch-size", "8",
         "--epochs", "1", "--device", "cpu", "--precision", "float32"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    draw_nothing(monkeypatch)


def from_scratch(script, *more):
    """main() with the short settings; what comes later in `more` replaces them."""
    return SCRIPTS[script].main([*SMALL, "--arch", "resnet10", *more])


def new_finetune(*more):
    return from_scratch("finetune", *more)


# ----------------------------------------------------------------------------------------- accuracy

def slow_metrics(logits, labels):
    """Top-1, top-5 and mean per-class accuracy in per cent, image by image."""
    first, fifth, hits_of = 0, 0, {}
    for scores, label in zip(logits.tolist(), labels.tolist()):
        ranking = sorted(range(len(scores)), key=lambda c: -scores[c])
        first += ranking[0] == label
        fifth += label in ranking[:5]
        hits_of.setdefault(label, []).append(ranking[0] == label)
    recalls = [sum(hits) / len(hits) for hits in hits_of.values()]
    return dict(top1=100 * first / len(labels), top5=100 * fifth / len(labels),
                mean_class=100 * sum(recalls) / len(recalls))


@pytest.mark.parametrize("images, classes", [
    (50, 10),
    (200, 7),
    (30, 5),
    (30, 3),
    (4, 20),    # most classes have no image
    (1, 2)])
def test_metrics_are_those_of_a_slow_loop(images, classes):
    labels = torch.randint(classes, (images,))
    logits = torch.randn(images, classes)
    logits += nn.functional.one_hot(labels, classes)  # better than chance
    scores, _ = finetune.metrics(logits, labels)
    assert scores == pytest.approx(slow_metrics(logits, labels), rel=1e-6)


def test_mean_class_accuracy_counts_every_class_that_has_images_once():
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 0])]  # always class 0; class 2 has no image
    scores, _ = finetune.metrics(logits, torch.tensor([0, 0, 0, 1]))
    assert (scores["top1"], scores["mean_class"]) == (75, 50)


def test_the_confusion_matrix_has_true_classes_as_rows():
    _, confusion = finetune.metrics(torch.eye(3)[torch.tensor([1, 1, 2])], torch.tensor([0, 0, 2]))
    assert confusion.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


# -------------------------------------------------------------------------------- average precision

def test_average_precision_of_an_example_worked_by_hand():
    # present, ignored, absent, present, absent
    # -> precision 1, -, 1/2, 2/3, 2/4 at recall 1/2, -, 1/2, 1, 1
    present = torch.tensor([[1, 1, 0], [-1, 1, 0], [0, 1, 0], [1, 1, -1], [0, 1, 0]])
    scores = torch.tensor([5.0, 4, 3, 2, 1])[:, None].expand(5, 3)
    precision = finetune.average_precision(scores, present)
    assert precision[0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert precision[1] == 1 and precision[2].isnan()
    scored, per_class = finetune.metrics(scores, present)
    assert scored["map"] == pytest.approx(100 * precision[:2].mean().item()) and len(per_class) == 3


def slow_average_precision(scores, present):
    """One class: both lists. The definition, threshold by threshold."""
    order = [i for i in sorted(range(len(scores)), key=lambda i: -scores[i]) if present[i] >= 0]
    total, found, points = sum(p == 1 for p in present), 0, []
    for rank, i in enumerate(order, 1):
        found += present[i] == 1
        points.append((found, found / rank))
    best = []
    for t in range(11):
        reached = [precision for hits, precision in points if 10 * hits >= t * total]
        best.append(max(reached, default=0))
    return sum(best) / 11


def test_average_precision_and_top1_against_slow_loops():
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.normal(size=(60, 20)))
    present = torch.tensor(rng.choice([-1, 0, 1], (60, 20), p=[0.2, 0.6, 0.2]))
    slow = []
    for c in range(20):
        slow.append(slow_average_precision(scores[:, c].tolist(), present[:, c].tolist()))
    assert finetune.average_precision(scores, present).tolist() == pytest.approx(slow, rel=1e-12)
    right = [present[i, int(scores[i].argmax())] == 1 for i in range(60)]
    top1 = finetune.metrics(scores, present)[0]["top1"]
    assert top1 == pytest.approx(100 * sum(right).item() / 60)


# --------------------------------------------------------------------------------------- evaluation

def test_eval_repeats_the_accuracy_of_the_run_and_writes_nothing(here, capsys):
    result = new_finetune("--freeze", "--lr", "0.001")  # between chance and perfect
    capsys.readouterr()
    before = files(here)
    again = finetune.main(["--data", "pictures", "--root", "root", "--ckpt", "finetune.pt",
                           "--eval", "--device", "cpu", "--precision", "float32"])
    assert again["test_top1"] == result["test_top1"]
    assert f"{result['test_top1']:.2f} %" in capsys.readouterr().out
    assert files(here) == before


def test_another_linear_head_of_as_many_classes_is_no_classifier(here, capsys):
    """As that of the method which tests/README adds: it tells something else apart."""
    new_finetune("--epochs", "1")
    ckpt = torch.load("finetune.pt", weights_only=True)
    del ckpt["config"]["search"]
    torch.save(ckpt, "rotation.pt")
    line = error_line(capsys, finetune.main, ["--data", "pictures", "--root", "root", "--eval",
                                              "--ckpt", "rotation.pt"])
    assert "has no head to classify" in line


@pytest.mark.parametrize("flags, images", [
    ([], 36),
    (["--labels-per-class", "0"], 36),
    (["--labels-per-class", "2"], 6),
    (["--fraction", "0.5"], 15),
    (["--fraction", "0.01"], 3)])
def test_finetune_trains_on_as_many_labelled_images_as_asked_for(here, monkeypatch, flags, images):
    """There are 3 classes of 12; a fifth of each (2) is held out where there is a choice to
    make."""
    seen, train = [], finetune.train

    def listen(trial):
        seen.append(len(trial.data))
        train(trial)

    monkeypatch.setattr(finetune, "train", listen)
    new_finetune(*flags)
    assert seen == [images]


@pytest.mark.parametrize("coin_flags, flags, said", [
    ("--labels-per-class 3", "--labels-per-class 3", ""),
    ("--labels-per-class 3", "--labels-per-class 3 --seed 1", "other labelled images"),
    ("--labels-per-class 3", "--labels-per-class 3 --seeds 2", "other labelled images"),
    ("--labels-per-class 0", "--labels-per-class 3", "other labelled images"),
    ("--labels-per-class 3", "--fraction 0.5", "other labelled images"),
    ("--labels-per-class 3", "--labels-per-class 3 --search 1", ""),
    ("--labels-per-class 0", "--labels-per-class 0 --search 1", "learnt from val"),
    ("--labels-per-class 0", "--labels-per-class 0", "")])
def test_fine_tuning_says_where_an_earlier_stage_has_seen_labels_that_it_should_not(
        here, capsys, coin_flags, flags, said):
    from_scratch("coin", "--epochs", "2", "--alpha", "0.5", *coin_flags.split())
    capsys.readouterr()
    finetune.main([*SMALL, "--epochs", "2", "--ckpt", "coin.pt", *flags.split()])
    printed = capsys.readouterr().out
    assert ("has learnt from" in printed) == bool(said) and said in printed


# ------------------------------------------------------------------------------------------- search

@pytest.fixture
def unequal(here):
    """pictures/ with a test split of 15 images, so that its length tells a split."""
    for path in sorted((here / "pictures" / "test").rglob("*.png")):
        if int(path.stem) >= 5:
            path.unlink()
    return here


@pytest.mark.parametrize("script", FINE_TUNING)
def test_search_and_seeds_give_mean_and_deviation_over_the_final_runs(unequal, script):
    result = from_scratch(script, "--search", "2", "--seeds", "2")
    runs = json_lines(f"{script}.jsonl")[-1]["runs"]
    assert len(runs) == 4 and [one["seed"] for one in runs[2:]] == [0, 1]
    scores = torch.tensor([one["top1"] for one in runs[2:]], dtype=torch.float64)
    assert result["test_top1"] == pytest.approx(scores.mean().item())
    assert result["test_top1_std"] == pytest.approx(scores.std().item())


@pytest.mark.parametrize("better", [min, max])
def test_search_chooses_by_validation_and_looks_at_test_once_a_final_run(
        unequal, monkeypatch, better):
    """The figure, which shows the test split when all is decided, is not drawn here (see
    no_figures)."""
    looks, rates = [], []

    def evaluate(backbone, head, store, args):
        on_test = len(store) == 15
        looks.append("test" if on_test else "val")
        rates.append(args.lr)
        like_small = (better is min) != on_test  # validation likes one rate, test the other
        return dict(top1=50 - args.lr if like_small else 50 + args.lr, top5=0, mean_class=0), None

    monkeypatch.setattr(finetune, "evaluate", evaluate)
    result = new_finetune("--search", "2", "--seeds", "2")
    assert len(set(rates)) == 2
    assert result["lr"] == better(rates)
    assert looks.count("test") == 2
    assert "test" not in looks[:looks.index("test")] and set(looks[:2]) == {"val"}


def test_of_each_result_it_is_said_how_many_images_have_judged_it(here, monkeypatch):
    new_finetune("--search", "1")
    runs = json_lines("finetune.jsonl")[-1]["runs"]
    of_val, of_test = [run["images"] for run in runs]
    val = common.load_data(finetune.parser().parse_args(SMALL), "val")
    assert of_val.startswith(f"{len(val)} of 36 images (") and of_test.startswith("36 images (")


def test_the_features_before_are_those_that_the_last_run_began_with(here, monkeypatch):
    started, start = [], common.start_backbone

    def noted(args, say=True):
        started.append(args.seed)
        return start(args, say)

    args = finetune.parser().parse_args([*SMALL, "--arch", "resnet10", "--seeds", "2"])
    new_finetune("--seeds", "2")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(common, "start_backbone", noted)
    monkeypatch.setattr(finetune.Classify, "picture", lambda *ignored: None)
    finetune.draw(args, json_lines("finetune.jsonl")[:-1], common.load_data(args, "test"), None)
    assert started[-1] == args.seed + 1


@pytest.mark.parametrize("rate, batch_size", [
    (1e30, "8"),             # several steps: the loss is not finite
    (float("inf"), "64")])   # one step: the loss before it is finite, the weights after it are not
def test_a_pair_that_diverges_does_not_stop_the_search(here, monkeypatch, rate, batch_size):
    peaks, real = [], common.set_learning_rate

    def diverge_in_the_first_run(optimizer, peak, *rest, **named):
        peaks.append(peak)
        real(optimizer, rate if peak == peaks[0] else peak, *rest, **named)

    monkeypatch.setattr(common, "set_learning_rate", diverge_in_the_first_run)
    result = new_finetune("--search", "2", "--batch-size", batch_size)
    assert len(json_lines("finetune.jsonl")[-1]["runs"]) == 3
    assert result["lr"] == peaks[-1] != peaks[0]


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji pictures are not here")
def test_finetune_runs_on_the_emoji_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = new_finetune("--data", str(EMOJI), "--labels-per-class", "2")
    assert len(common.load_checkpoint("finetune.pt")["classes"]) == 9
    assert 0 <= result["test_top1"] <= 100
