"""COIN: SupCon, S_Dbw and balanced batches against slow loops, and one budget that coin.py begins
and finetune.py ends."""
import itertools
import math
import re

import pytest
import torch

import coin
import common
import finetune
import simclr
from conftest import FINE_TUNING, SCRIPTS, draw_nothing, error_line, json_lines, write_folder

SMALL = ["--root", "root", "--image-size", "16", "--device", "cpu", "--precision", "float32"]
USUAL = ["--data", "pictures", *SMALL, "--batch-size", "8"]
NEW = [*USUAL, "--arch", "resnet10"]
AFTER_COIN = ["--data", "pictures", *SMALL]  # what is left of the budget comes from the checkpoint
# Flags of the run that makes coin.pt.
GIVEN = dict(lr=0.02, weight_decay=0.001, crop=0.4, eta=0.25, temperature=0.6)
IMAGES = 21  # of 3 classes of 7: batches of at most 8 are three of 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, other pictures, simclr.pt, and coin.pt: 2 of 5 epochs."""
    place = tmp_path_factory.mktemp("coin")
    write_folder(place / "pictures", per_class=7)
    write_folder(place / "others", per_class=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        draw_nothing(patch)
        simclr.main([*NEW, "--epochs", "1"])
        flags = [word for name, value in GIVEN.items()
                 for word in (f"--{name.replace('_', '-')}", str(value))]
        coin.main([*NEW, "--epochs", "5", "--alpha", "0.5", "--dim", "12", *flags])
    return place


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    draw_nothing(monkeypatch)
    return place


def losses(path):
    return [line["loss"] for line in json_lines(path) if "loss" in line]


# ------------------------------------------------------------------------------------------- SupCon

def slow_supcon(z, y, temperature):
    """-1/|A| sum_{i in A} 1/|P(i)| sum_{p in P(i)} log p_ip,
    p_ip = exp(z_i.z_p / tau) / sum_{a != i} exp(z_i.z_a / tau)"""
    z, y = z.double(), y.tolist()
    similarity = lambda i, k: float(z[i] @ z[k] / (z[i].norm() * z[k].norm()))
    terms = []
    for i in range(len(y)):
        positives = [p for p in range(len(y)) if p != i and y[p] == y[i]]
        denominator = sum(math.exp(similarity(i, a) / temperature) for a in range(len(y)) if a != i)
        logs = [math.log(math.exp(similarity(i, p) / temperature) / denominator) for p in positives]
        terms += [-sum(logs) / len(positives)] if positives else []
    return sum(terms) / len(terms)


def embeddings(count, dim=5, dtype=torch.float64):
    return torch.randn(count, dim, dtype=dtype)


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("labels", [
    [0, 0], [0, 1, 0, 1], [5, 5, 5, 5, 5, 5], [2, 0, 0, 1, 0, 3],  # 1, 2 and 3 are alone
    [9, 0, 3, 3, 0, 0, 0, 9, 3, 7, 0, 1]])
def test_supcon_is_the_mean_of_the_equation_over_the_anchors_with_a_positive(labels, temperature):
    z, y = embeddings(len(labels)), torch.tensor(labels)
    expected = slow_supcon(z, y, temperature)
    assert coin.supcon(z, y, temperature).item() == pytest.approx(expected, abs=1e-12)


def test_supcon_has_the_right_derivative():
    y = torch.tensor([0, 1, 0, 0, 2, 1])
    assert torch.autograd.gradcheck(
        lambda z: coin.supcon(z, y, 0.3), embeddings(6).requires_grad_())


@pytest.mark.parametrize("dtype, expected", [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32)])
def test_supcon_keeps_the_dtype_but_for_half_types(dtype, expected):
    loss = coin.supcon(embeddings(4, dtype=dtype), torch.tensor([0, 0, 1, 1]), 0.3)
    assert loss.dtype == expected


@pytest.mark.parametrize("labels", [[0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5]])
def test_supcon_of_equal_embeddings_is_log_of_the_number_of_candidates(labels):
    z = torch.rand(len(labels), 1, dtype=torch.float64).add(0.1) * embeddings(1)
    loss = coin.supcon(z, torch.tensor(labels), 0.1).item()
    assert loss == pytest.approx(math.log(len(labels) - 1), abs=1e-12)


@pytest.mark.parametrize("classes, size, temperature", [(2, 2, 0.3), (3, 4, 0.1), (5, 2, 1.0)])
def test_supcon_of_classes_that_are_orthogonal_points_has_a_closed_form(classes, size, temperature):
    y = torch.arange(classes).repeat(size)
    expected = math.log(size - 1 + size * (classes - 1) * math.exp(-1 / temperature))
    z = torch.eye(classes, dtype=torch.float64)[y]
    assert coin.supcon(z, y, temperature).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_supcon_without_any_positive_is_zero_and_moves_nothing(batch):
    z = embeddings(batch).requires_grad_()
    loss = coin.supcon(z, torch.arange(batch), 0.3)
    assert loss.item() == 0
    loss.backward()
    assert z.grad.eq(0).all()  # and not nan


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_supcon_of_two_views_an_image_is_nt_xent(batch):
    z1, z2 = embeddings(batch), embeddings(batch)
    loss = coin.supcon(torch.cat([z1, z2]), torch.arange(batch).repeat(2), 0.2)
    torch.testing.assert_close(loss, simclr.nt_xent(z1, z2, 0.2), rtol=0, atol=1e-12)


def test_supcon_does_not_depend_on_the_length_of_an_embedding():
    z, y = embeddings(4), torch.tensor([0, 1, 0, 1])
    lengths = torch.tensor([[1e-3], [1], [7], [1e4]], dtype=torch.float64)
    torch.testing.assert_close(
        coin.supcon(lengths * z, y, 0.2), coin.supcon(z, y, 0.2), rtol=0, atol=1e-12)


# exp(1 / 0.005) is more than float32 can hold.
def test_supcon_does_not_overflow_in_float32_at_a_low_temperature():
    z, y = embeddings(8), torch.arange(8) % 3
    expected = coin.supcon(z, y, 0.005).item()
    assert coin.supcon(z.float(), y, 0.005).item() == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------- S_Dbw

def slow_s_dbw(x, y):
    """Scat + Dens_bw as Halkidi and Vazirgiannis (2001) write them, pair of classes by pair."""
    x, classes = x.double(), sorted(set(y.tolist()))
    points = {i: x[y == i] for i in classes}
    v = {i: points[i].mean(0) for i in classes}
    norm_of_sigma = lambda some: float(((some - some.mean(0)) ** 2).mean(0).norm())
    spread = [norm_of_sigma(points[i]) for i in classes]
    stdev = math.sqrt(sum(spread)) / len(classes)
    scat = sum(spread) / len(classes) / norm_of_sigma(x)
    total = 0
    for i, j in itertools.permutations(classes, 2):
        both = torch.cat([points[i], points[j]])
        density = lambda u: int(((both - u).norm(dim=1) <= stdev).sum())
        between = density((v[i] + v[j]) / 2)
        total += between / max(density(v[i]), density(v[j])) if between else 0
    return scat + total / (len(classes) * (len(classes) - 1))


def clusters(sizes, dim=3, distance=2.0, labels=None):
    """Normal clusters of these sizes around normal centres `distance` apart or so, in a random
    order."""
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    centre = distance * torch.randn(len(sizes), dim, dtype=torch.float64)
    x = centre[y] + torch.randn(len(y), dim, dtype=torch.float64)
    return x, y if labels is None else torch.tensor(labels)[y]


@pytest.mark.parametrize("sizes, dim, distance", [
    ([20, 20], 2, 1),
    ([5, 40, 17], 2, 1),
    ([12, 12, 12, 12], 2, 0.3),
    ([1, 9, 1, 14], 3, 1),
    ([30, 30, 30], 1, 2),
    ([20] * 30, 1, 3)])
def test_s_dbw_is_that_of_slow_loops(sizes, dim, distance):
    problem = clusters(sizes, dim, distance)
    assert coin.s_dbw(*problem) == pytest.approx(slow_s_dbw(*problem), rel=1e-9)


def test_s_dbw_takes_labels_with_gaps_and_float32():
    x, y = clusters([9, 14, 11], labels=[0, 3, 7])
    assert coin.s_dbw(x, y) == pytest.approx(slow_s_dbw(x, y), rel=1e-9)
    assert coin.s_dbw(x.float(), y) == pytest.approx(slow_s_dbw(x.float(), y), rel=1e-9)


# Not a rotation: ||sigma|| is the norm of the variances along the axes.
@pytest.mark.parametrize("change", ["scale", "reflection", "translation", "names", "order"])
def test_s_dbw_does_not_depend_on(change):
    x, y = clusters([15, 20, 8, 11], distance=1)
    order = torch.randperm(len(y))
    other = dict(scale=(1e3 * x, y), translation=(x + torch.tensor([100., -3, 7]), y),
                 reflection=(x[:, [2, 0, 1]] * torch.tensor([1, -1, 1]), y),
                 names=(x, torch.tensor([6, 2, 9, 0])[y]), order=(x[order], y[order]))[change]
    assert coin.s_dbw(*other) == pytest.approx(coin.s_dbw(x, y), rel=1e-9)


def test_s_dbw_is_small_for_tight_classes_far_apart_and_grows_as_they_overlap():
    centre, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4).repeat(25)
    noise = torch.randn(100, 5, dtype=torch.float64)
    index = [coin.s_dbw(centre[y] + width * noise, y) for width in (1e-3, 0.1, 0.5, 3)]
    assert index == sorted(index)
    assert index[0] < 1e-4 and index[-1] > 1


def test_s_dbw_of_classes_that_are_points_is_zero():
    y = torch.arange(3).repeat(4)
    assert coin.s_dbw(torch.tensor([[0., 0], [4, 0], [0, 8]])[y], y) == 0


def test_s_dbw_counts_no_density_where_neither_the_middle_nor_the_means_have_points_around_them():
    ring = torch.tensor([[1., 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)  # stdev is 0.59
    x, y = torch.cat([ring, ring + torch.tensor([10, 0])]), torch.arange(2).repeat_interleave(4)
    scat = math.sqrt(0.5) / math.hypot(25.5, 0.5)
    assert coin.s_dbw(x, y) == pytest.approx(scat, rel=1e-9)


# ------------------------------------------------------------------------------------------ batches

def labels_of(sizes, names=None):
    labels = torch.arange(len(sizes)) if names is None else torch.tensor(names)
    return labels.repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]


@pytest.mark.parametrize("sizes, batch_size, per_class, classes, each", [
    ([20] * 10, 32, 4, 8, 4),
    ([5, 50, 3, 30, 1, 44], 8, 2, 4, 2),
    ([16] * 16, 16, 16, 2, 8),
    # Three classes are too few for a batch of eight: each gives more.
    ([9, 9, 30], 32, 4, 3, 10),
    ([30, 30, 3], 8, 2, 3, 2),
    ([20] * 10, 8, 3, 2, 3)])
def test_a_balanced_batch_holds_as_many_images_of_as_many_classes_as_asked_for(
        sizes, batch_size, per_class, classes, each):
    labels = labels_of(sizes)
    for part in coin.balanced_batches(labels, batch_size, per_class):
        count = torch.bincount(labels[part])
        assert count[count > 0].tolist() == [each] * classes


@pytest.mark.parametrize("sizes, batch_size, per_class, steps", [
    ([20] * 10, 32, 4, 6),
    ([5, 50, 3, 30, 1, 44], 8, 2, 16),
    ([9, 9, 30], 32, 4, 1),
    ([8, 8], 16, 4, 1),
    ([2, 2, 2], 32, 4, 1)])
def test_an_epoch_of_balanced_batches_has_all_the_steps_that_the_number_of_images_pays_for(
        sizes, batch_size, per_class, steps):
    parts = coin.balanced_batches(labels_of(sizes), batch_size, per_class)
    assert len(parts) == steps
    assert sum(map(len, parts)) <= sum(sizes)


def test_an_image_comes_up_again_only_after_all_of_its_class_have():
    labels = labels_of([2, 7, 40, 11])
    order = torch.cat(coin.balanced_batches(labels, 6, 3)).tolist()
    for label, size in enumerate([2, 7, 40, 11]):
        drawn = [i for i in order if labels[i] == label]
        rounds = [drawn[k:k + size] for k in range(0, len(drawn), size)]
        assert all(len(set(some)) == len(some) for some in rounds)


def test_a_small_class_comes_up_as_often_as_a_large_one():
    labels = labels_of([2, 60, 60, 60])
    drawn = torch.cat([part for _ in range(100) for part in coin.balanced_batches(labels, 8, 4)])
    share = torch.bincount(labels[drawn]) / len(drawn)
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_balanced_batches_take_labels_with_gaps_and_follow_the_seed():
    labels, made = labels_of([6, 9, 12], names=[0, 3, 7]), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        made.append(torch.stack(coin.balanced_batches(labels, 6, 3)))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert all(len(set(labels[part].tolist())) == 2 for part in made[0])


# ---------------------------------------------------------------------------------------- positives

def slow_positives(labels, batch_size):
    """Positives of an anchor, the mean over all anchors and all ways to fill the batches of an
    epoch."""
    n = len(labels)
    store = common.Store(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), labels, torch.arange(n), [])
    mean = 0
    for _, y in common.Batches(store, batch_size):
        chosen = list(itertools.combinations(labels.tolist(), len(y)))
        positives = [sum(part.count(label) - 1 for label in part) / len(part) for part in chosen]
        mean += sum(positives) / len(positives) * len(y) / n
    return mean


@pytest.mark.parametrize("labels, batch_size", [
    ([0, 0, 1, 1, 2, 2, 3, 4], 4),
    ([0, 0, 1, 2, 4, 4], 6),
    ([0, 0, 1, 2], 64),
    ([7, 1, 7, 1, 1, 2, 3, 5, 6], 3)])
def test_few_positives_are_told_in_one_line_with_their_number(capsys, labels, batch_size):
    expected = slow_positives(torch.tensor(labels), batch_size)
    assert expected < 1
    coin.say_positives(torch.tensor(labels), batch_size, balanced=0)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "--batch-size" in said and "--balanced" in said
    assert float(re.search(r"\d+\.\d+", said)[0]) == pytest.approx(expected, abs=0.00501)


def test_enough_positives_and_balanced_batches_need_no_word(capsys):
    enough = torch.tensor([0, 0, 0, 1, 1, 1])
    assert slow_positives(enough, 6) > 1
    coin.say_positives(enough, 6, balanced=0)
    coin.say_positives(torch.tensor([0, 0, 1, 2, 3, 4]), 4, balanced=2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("balanced", [0, 2])
def test_one_image_a_class_ends_coin(capsys, balanced):
    line = error_line(capsys, coin.say_positives, torch.tensor([4, 0, 2]), 4, balanced)
    assert "--labels-per-class" in line


# ------------------------------------------------------------------------------------------- budget

@pytest.fixture
def steps(monkeypatch):
    """(learning rates of all groups, images) of each optimizer step; what it shows between two
    steps it must learn from."""
    steps, waiting, augment, step = [], [], common.augment, torch.optim.SGD.step

    def count(x, *args, **named):  # evaluations look at centre crops
        waiting.append(len(x))
        return augment(x, *args, **named)

    def note(self, *args, **named):
        steps.append(([group["lr"] for group in self.param_groups], sum(waiting)))
        waiting.clear()
        return step(self, *args, **named)

    monkeypatch.setattr(common, "augment", count)
    monkeypatch.setattr(torch.optim.SGD, "step", note)
    return steps


@pytest.mark.parametrize("epochs, alpha, first, warmup", [
    (2, 0.5, 1, 0), (3, 0.7, 2, 0), (5, 0.5, 2, 1), (7, 0.1, 1, 0), (6, 0.9, 5, 2)])
def test_coin_and_finetune_see_the_images_and_the_learning_rates_of_plain_finetuning(
        inside, steps, epochs, alpha, first, warmup):
    budget = ["--epochs", str(epochs), "--warmup", str(warmup)]
    coin.main([*NEW, *budget, "--alpha", str(alpha), "--out", "part"])
    assert first == round(alpha * epochs) == len(losses("part.jsonl"))
    assert sum(images for _, images in steps) == first * IMAGES
    rest = common.load_checkpoint("part.pt")["config"]["rest"]
    assert (rest["epochs"], rest["spent"]) == (epochs, first)
    finetune.main([*AFTER_COIN, "--ckpt", "part.pt", "--out", "tuned"])
    assert len(losses("tuned.jsonl")) == epochs - first
    both = steps.copy()
    steps.clear()
    finetune.main([*NEW, *budget, "--out", "plain"])
    assert [images for _, images in both] == [images for _, images in steps]
    assert sum(images for _, images in both) == epochs * IMAGES
    for (rates, _), (plain, _) in zip(both, steps):
        assert set(rates) == {rates[0]} and rates[0] == pytest.approx(plain[0], rel=1e-12)


@pytest.mark.parametrize("script", FINE_TUNING)
@pytest.mark.parametrize("warmup, rising", [(1, 3), (2, 6), (9, 6)])  # of 12 steps
def test_the_learning_rate_rises_for_the_epochs_of_the_warm_up(
        script, inside, steps, warmup, rising):
    SCRIPTS[script].main([*NEW, "--epochs", "4", "--lr", "0.06", "--warmup", str(warmup), "--out",
                          "warm"])
    rates = [rates[0] for rates, _ in steps]
    assert rates[:rising] == pytest.approx([0.06 * (i + 1) / rising for i in range(rising)])
    assert all(b <= a for a, b in zip(rates[rising:], rates[rising + 1:]))


@pytest.fixture
def views(monkeypatch):
    """What augment() makes, in order: the images and their views."""
    views, augment = [], common.augment

    def note(x, *args, **named):
        views.append((x.clone(), augment(x, *args, **named)))
        return views[-1][1]

    monkeypatch.setattr(common, "augment", note)
    return views


@pytest.mark.parametrize("epochs, alpha, warmup", [(3, 0.7, 0), (5, 0.5, 1), (6, 0.9, 2)])
def test_coin_and_finetune_see_the_batches_and_the_views_of_plain_finetuning(
        inside, views, epochs, alpha, warmup):
    budget = ["--epochs", str(epochs), "--warmup", str(warmup)]
    coin.main([*NEW, *budget, "--alpha", str(alpha), "--out", "part"])
    finetune.main([*AFTER_COIN, "--ckpt", "part.pt", "--out", "tuned"])
    both = views.copy()
    views.clear()
    finetune.main([*NEW, *budget, "--out", "plain"])
    assert len(both) == len(views) == epochs * 3
    for (images, view), (plain_images, plain_view) in zip(both, views):
        assert torch.equal(images, plain_images) and torch.equal(view, plain_view)
    assert not torch.equal(views[0][0], views[3][0])  # another epoch, another order


@pytest.mark.parametrize("flags", ["--labels-per-class 5", "--fraction 0.4"])
def test_finetune_learns_from_the_labelled_images_that_coin_has_learnt_from(
        inside, monkeypatch, flags):
    seen, load = [], common.load_labelled
    monkeypatch.setattr(common, "load_labelled",
                        lambda *args, **named: seen.append(load(*args, **named)) or seen[-1])
    coin.main([*NEW, "--epochs", "2", "--alpha", "0.5", *flags.split(), "--out", "part"])
    finetune.main([*AFTER_COIN, "--ckpt", "part.pt", "--out", "tuned"])
    first, second = (store.rows.tolist() for store in seen)
    assert first == second and 0 < len(first) < 17  # 3 x 6 are left when a fifth is held out


def test_balanced_batches_too_small_for_the_processes_are_one_line(inside, monkeypatch, capsys):
    store = common.Store(torch.zeros(9, 3, 8, 8), labels_of([3, 3, 3]), torch.arange(9), ["abc"])
    monkeypatch.setattr(common, "world", lambda: 4)
    line = error_line(capsys, coin.BalancedBatches, store, 8, 3)
    assert "--balanced 3" in line and "batches of 6 images" in line


def test_balanced_coin_has_its_own_batches_and_no_more_images_and_ends_where_finetune_starts(
        inside, steps):
    coin.main([*NEW, "--epochs", "4", "--alpha", "0.5", "--balanced", "2", "--out", "part"])
    assert [images for _, images in steps] == 2 * 3 * [6]  # 2 of each of 3 classes
    steps.clear()
    finetune.main([*AFTER_COIN, "--ckpt", "part.pt", "--out", "tuned"])
    assert [images for _, images in steps] == 2 * 3 * [7]
    assert steps[0][0][0] == pytest.approx(0.01 / 2, rel=1e-12)


# ------------------------------------------------------------------------------ what finetune takes

def settings(script, *flags):
    return SCRIPTS[script].parser().parse_args([*AFTER_COIN, *flags])


@pytest.mark.parametrize("script", FINE_TUNING)
def test_the_three_finetuners_go_on_where_coin_ended(inside, script):
    args = settings(script, "--ckpt", "coin.pt")
    assert (args.epochs, args.spent, args.warmup, args.batch_size) == (5, 2, 0, 8)
    for name in ("lr", "weight_decay", "crop"):
        assert getattr(args, name) == GIVEN[name]


def test_finetune_takes_eta_and_temperature_and_the_others_keep_their_own_temperature(inside):
    args = settings("finetune", "--ckpt", "coin.pt")
    assert (args.eta, args.temperature) == (GIVEN["eta"], GIVEN["temperature"])
    for script in ("core_tuning", "bi_tuning"):
        args = settings(script, "--ckpt", "coin.pt")
        assert args.temperature == settings(script).temperature != GIVEN["temperature"]
    eta = settings("core_tuning", "--ckpt", "coin.pt").eta
    assert eta == settings("core_tuning").eta != GIVEN["eta"]


@pytest.mark.parametrize("flag, value", [
    ("epochs", 9),
    ("warmup", 1),
    ("spent", 0),
    ("lr", 0.5),
    ("weight-decay", 0.0),
    ("crop", 1.0),
    ("batch-size", 16),
    ("eta", 0.0),
    ("eta", 3.0),
    ("temperature", 0.05)])
def test_a_flag_wins_over_what_coin_left_and_leaves_the_rest_alone(inside, flag, value):
    usual = vars(settings("finetune", "--ckpt", "coin.pt"))
    args = vars(settings("finetune", "--ckpt", "coin.pt", f"--{flag}", str(value)))
    name = flag.replace("-", "_")
    assert args[name] == value != usual[name]
    assert {**usual, name: value} == args


@pytest.mark.parametrize(
    "flags", [["--data", "others", "--ckpt", "coin.pt"], ["--ckpt", "simclr.pt"], []])
@pytest.mark.parametrize("script", FINE_TUNING)
def test_other_data_or_another_checkpoint_begin_a_budget_of_their_own(inside, script, flags):
    args = settings(script, *flags)
    own_eta = dict(finetune=0.0, core_tuning=1.0).get(script)
    assert (args.epochs, args.spent, args.lr) == (60, 0, 0.01)
    assert getattr(args, "eta", None) == own_eta


def test_a_linear_probe_after_coin_has_a_budget_of_its_own(inside):
    plain = settings("finetune", "--freeze")
    args = settings("finetune", "--ckpt", "coin.pt", "--freeze")
    assert (args.epochs, args.spent, args.eta, args.lr) == (60, 0, 0, plain.lr)


def test_what_was_finetuned_after_coin_leaves_no_budget(inside):
    finetune.main([*AFTER_COIN, "--ckpt", "coin.pt", "--epochs", "3", "--out", "tuned"])
    args = settings("finetune", "--ckpt", "tuned.pt")
    assert (args.epochs, args.spent, args.eta) == (60, 0, 0)


# ----------------------------------------------------------------------- cross-entropy + eta SupCon

# The logged loss is then that of the weights that a run starts from.
ONE_STEP = ["--epochs", "1", "--batch-size", "64", "--spent", "0"]


@pytest.mark.parametrize(
    "start", [["--ckpt", "coin.pt"], ["--ckpt", "simclr.pt"], ["--arch", "resnet10"]])
def test_the_loss_is_cross_entropy_and_eta_supcon(inside, monkeypatch, start):
    calls, real = [], coin.supcon
    monkeypatch.setattr(coin, "supcon", lambda *args: calls.append(args) or real(*args))
    for eta in ("0", "0.7"):
        finetune.main([*AFTER_COIN, *start, *ONE_STEP, "--eta", eta, "--temperature", "0.4",
                       "--out", f"eta{eta}"])
    (z, y, temperature), = calls
    assert temperature == 0.4 and len(y) == IMAGES
    alone, both = losses("eta0.jsonl") + losses("eta0.7.jsonl")
    assert both - alone == pytest.approx(0.7 * slow_supcon(z.detach(), y, 0.4), rel=1e-4)


def test_without_weights_of_its_own_supcon_adds_eta_times_itself_in_every_epoch(
        inside, monkeypatch):
    monkeypatch.setattr(coin, "supcon", lambda z, y, temperature: 0 * z.sum() + 7)
    for eta in ("0", "0.3"):
        finetune.main([*AFTER_COIN, "--ckpt", "coin.pt", "--eta", eta, "--weight-decay", "0",
                       "--out", f"eta{eta}"])
    alone, both = losses("eta0.jsonl"), losses("eta0.3.jsonl")
    assert len(alone) == 3
    assert both == pytest.approx([loss + 0.3 * 7 for loss in alone], rel=1e-4)


def test_coin_learns_from_supcon_alone_with_its_temperature(inside, monkeypatch):
    calls, real = [], coin.supcon
    monkeypatch.setattr(coin, "supcon", lambda *args: calls.append(args) or real(*args))
    coin.main([*NEW, "--epochs", "2", "--alpha", "0.5", "--temperature", "0.4", "--dim", "6",
               "--out", "part"])
    assert len(calls) == 3 and {z.shape[1] for z, *_ in calls} == {6}
    expected = sum(slow_supcon(z.detach(), y, 0.4) * len(y) for z, y, _ in calls) / IMAGES
    assert losses("part.jsonl") == [pytest.approx(expected, rel=1e-4)]


def test_supcon_goes_on_with_the_projector_of_coin(inside):
    ckpt = common.load_checkpoint("coin.pt")
    projector = coin.start_projector(256, ckpt)
    assert projector[2].weight.shape == (12, 256)
    for key, value in projector.state_dict().items():
        assert torch.equal(value, ckpt["projector"][key])
    finetune.main([*AFTER_COIN, "--ckpt", "coin.pt", "--lr", "1e-9", "--epochs", "3", "--out",
                   "tuned"])
    tuned = common.load_checkpoint("tuned.pt")["projector"]
    torch.testing.assert_close(tuned, dict(ckpt["projector"]), rtol=0, atol=1e-6)


def test_a_projector_of_another_width_is_not_taken():
    narrow = coin.make_projector(64, 8).state_dict()  # as core_tuning.py --task segment has it
    projector = coin.start_projector(256, dict(projector=narrow))
    assert projector(torch.zeros(2, 256)).shape == (2, 8)


@pytest.mark.parametrize("start", [["--ckpt", "simclr.pt"], ["--arch", "resnet10"]])
def test_supcon_makes_a_projector_where_there_is_none_and_trains_it(inside, start):
    saved = []
    for rate in ("1e-9", "0.1"):
        finetune.main(
            [*AFTER_COIN, *start, *ONE_STEP, "--eta", "0.1", "--lr", rate, "--out", "tuned"])
        saved.append(common.load_checkpoint("tuned.pt")["projector"])
    assert {key: tuple(value.shape) for key, value in saved[0].items()} == {
        "0.weight": (256, 256), "0.bias": (256,), "2.weight": (256, 256), "2.bias": (256,)}
    assert all((saved[0][key] - saved[1][key]).abs().max() > 1e-6 for key in saved[0])


# ----------------------------------------------------------------------- what coin says and refuses

def test_coin_ends_with_s_dbw_of_the_test_features_before_and_after(inside, capsys):
    result = coin.main([*USUAL, "--ckpt", "simclr.pt", "--epochs", "3", "--out", "part"])
    said = capsys.readouterr().out
    *epochs, last = json_lines("part.jsonl")
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert set(last) == {"s_dbw_before", "s_dbw_after"} and result == {**epochs[-1], **last}
    for when, start in (("before", "simclr.pt"), ("after", "part.pt")):
        args = coin.parser().parse_args([*USUAL, "--ckpt", start])
        backbone, _ = common.start_backbone(args)
        x, y = common.features(backbone, common.load_data(args, "test"), args)
        assert last[f"s_dbw_{when}"] == pytest.approx(coin.s_dbw(x, y), rel=1e-6)
        assert f"{last[f's_dbw_{when}']:.3f} {when}" in said
    assert last["s_dbw_before"] != last["s_dbw_after"]


def test_test_is_not_read_where_val_is_held_out(inside, monkeypatch, capsys):
    """A search over coin.py's flags may go by its log and figure."""
    read, load = [], common.load_data

    def note(args, split):
        read.append(split)
        return load(args, split)

    monkeypatch.setattr(common, "load_data", note)
    short = [*USUAL, "--ckpt", "simclr.pt", "--epochs", "2", "--out", "unread"]
    coin.main([*short, "--labels-per-class", "4"])
    assert "test" not in read and "val features: S_Dbw" in capsys.readouterr().out
    coin.main(short)
    assert "test" in read and "test features: S_Dbw" in capsys.readouterr().out


@pytest.mark.parametrize("flags, named", [
    ("--alpha 0", "--alpha"),
    ("--alpha 1", "--alpha"),
    ("--alpha -0.1", "--alpha"),
    ("--alpha 0.95 --epochs 8", "--alpha"),
    ("--alpha 0.1 --epochs 4", "--alpha"),
    ("--epochs 1", "--epochs"),
    ("--balanced -1", "--balanced"),
    ("--temperature 0", "--temperature"),
    ("--eta -1", "--eta"),
    ("--dim 0", "--dim"),
    ("--labels-per-class 1", "--labels-per-class")])
def test_coin_refuses_in_one_line_and_writes_nothing(inside, capsys, flags, named):
    assert named in error_line(capsys, coin.main, [*NEW, "--out", "never", *flags.split()])
    assert not list(inside.glob("never*"))
