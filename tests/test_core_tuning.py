"""Core-tuning: hardest pairs, mixtures, positives and focal contrastive loss against slow loops;
whole steps on small data."""
import math
import random

import pytest
import torch
import torch.nn.functional as F

import common
import core_tuning
import finetune
from conftest import draw_nothing, json_lines, write_folder

SMALL = ["--data", "pictures", "--root", "root", "--image-size", "16", "--batch-size", "8",
         "--device", "cpu", "--precision", "float32"]
NEW = ["--arch", "resnet10", "--epochs", "1"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with pictures/ and a short run's core_tuning.pt, and what main() returned."""
    place = tmp_path_factory.mktemp("finished")
    write_folder(place / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        draw_nothing(patch)
        return place, run("--lr", "0.001")  # hardly trained: an accuracy between chance and perfect


def run(*more):
    """main() from scratch; what comes later in `more` replaces the short settings."""
    return core_tuning.main([*SMALL, *NEW, *more])


def epochs_of(path):
    return [line for line in json_lines(path) if "epoch" in line]


def random_batch(batch, classes, dim=5, relu=False):
    f = torch.randn(batch, dim, dtype=torch.float64)
    return f.relu() if relu else f, torch.randint(classes, (batch,))


def one_hot(y, classes):
    return F.one_hot(y, classes).double()


# ------------------------------------------------------------------------------------ hardest pairs

def cosine(a, b):
    return float(a @ b / (a.norm().clamp(min=1e-12) * b.norm().clamp(min=1e-12)))


def slow_hardest(f, y, i):
    """Similarities of the hardest positive and negative of anchor i, None where it has none."""
    positives = [cosine(f[i], f[j]) for j in range(len(f)) if y[j] == y[i] and j != i]
    negatives = [cosine(f[i], f[j]) for j in range(len(f)) if y[j] != y[i]]
    return min(positives, default=None), max(negatives, default=None)


@pytest.mark.parametrize("relu", [False, True])
def test_the_hardest_pairs_are_those_of_a_search_through_the_batch(relu):
    rng, alone, lonely = random.Random(0), 0, 0
    for _ in range(100):
        f, y = random_batch(rng.randint(1, 9), rng.randint(1, 5), relu=relu)
        hp, hn = (rows.tolist() for rows in core_tuning.hardest(f, y))
        for i in range(len(f)):
            positive, negative = slow_hardest(f, y, i)
            if positive is None:
                assert hp[i] == i
            else:
                assert hp[i] != i and y[hp[i]] == y[i]
                assert cosine(f[i], f[hp[i]]) == pytest.approx(positive, abs=1e-12)
            if negative is None:
                assert hn[i] == i
            else:
                assert y[hn[i]] != y[i]
                assert cosine(f[i], f[hn[i]]) == pytest.approx(negative, abs=1e-12)
            alone, lonely = alone + (positive is None), lonely + (negative is None)
    assert alone > 10 and lonely > 10


def test_a_batch_of_one_image_a_class_has_no_positive_but_itself():
    f, y = random_batch(6, 6)[0], torch.randperm(6)
    hp, hn = core_tuning.hardest(f, y)
    assert hp.tolist() == [0, 1, 2, 3, 4, 5]
    assert all(hn[i] != i for i in range(6))


def test_a_batch_of_one_class_has_no_negative_but_itself():
    hp, hn = core_tuning.hardest(random_batch(6, 1)[0], torch.full((6,), 3))
    assert hn.tolist() == [0, 1, 2, 3, 4, 5]
    assert all(hp[i] != i for i in range(6))


def test_the_hardest_pairs_do_not_depend_on_the_length_of_a_feature():
    f, y = random_batch(12, 3)
    lengths = 10 ** torch.linspace(-3, 3, 12, dtype=torch.float64)[torch.randperm(12), None]
    assert all(map(torch.equal, core_tuning.hardest(lengths * f, y), core_tuning.hardest(f, y)))


# ----------------------------------------------------------------------------------------- mixtures

# Several classes, one class, hardly two of a class, one image.
BATCHES = [(12, 4), (12, 1), (5, 3), (1, 2)]


@pytest.mark.parametrize("batch, classes", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixtures_keep_shapes_and_dtype_and_their_labels_are_shares(batch, classes, dtype):
    f, y = random_batch(batch, classes)
    f_pos, y_pos, f_neg, y_neg = core_tuning.hard_pairs(f.to(dtype), y, 7, 1.0)
    assert f_pos.shape == f_neg.shape == f.shape and y_pos.shape == y_neg.shape == (batch, 7)
    assert {t.dtype for t in (f_pos, y_pos, f_neg, y_neg)} == {dtype}
    for labels in (y_pos, y_neg):
        assert (labels >= 0).all()
        torch.testing.assert_close(labels.sum(1), torch.ones(batch, dtype=dtype))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_a_hard_positive_lies_between_the_hardest_pair_where_its_label_says(alpha):
    f, y = random_batch(20, 4)
    f_pos, y_pos, _, _ = core_tuning.hard_pairs(f, y, 4, alpha)
    hp, hn = core_tuning.hardest(f, y)
    for i in range(20):
        share = y_pos[i, y[i]]
        assert 0 <= share <= 1
        label = share * one_hot(y[i], 4) + (1 - share) * one_hot(y[hn[i]], 4)
        torch.testing.assert_close(y_pos[i], label)
        torch.testing.assert_close(f_pos[i], share * f[hp[i]] + (1 - share) * f[hn[i]])


def test_without_a_second_image_of_its_class_the_hard_positive_starts_from_the_anchor_itself():
    f, y = random_batch(6, 1)[0], torch.arange(6)
    f_pos, y_pos, _, _ = core_tuning.hard_pairs(f, y, 6, 1.0)
    share, hn = y_pos.diag()[:, None], core_tuning.hardest(f, y)[1]
    torch.testing.assert_close(f_pos, share * f + (1 - share) * f[hn])


def test_without_another_class_every_mixture_has_the_label_of_the_class():
    f, y = random_batch(6, 1)[0], torch.full((6,), 2)
    _, y_pos, _, y_neg = core_tuning.hard_pairs(f, y, 4, 1.0)
    torch.testing.assert_close(y_pos, one_hot(y, 4))
    torch.testing.assert_close(y_neg, one_hot(y, 4))


def partner(f, i, mixed):
    """r and l of mixed = (1 - l) f_i + l f_r, by trying every row."""
    found = []
    for r in range(len(f)):
        way = f[r] - f[i]
        share = float((mixed - f[i]) @ way / (way @ way).clamp(min=1e-12))
        if (f[i] + share * way - mixed).norm() < 1e-9:
            found.append((r, share))
    # Mixed with itself, every row fits, with a share of 0.
    return found[0] if len(found) == 1 else (i, 1.0)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_semi_hard_negatives_lie_near_the_images_of_a_permutation_with_labels_mixed_alike(alpha):
    f, y = random_batch(24, 4)
    _, _, f_neg, y_neg = core_tuning.hard_pairs(f, y, 4, alpha)
    partners, shares = zip(*(partner(f, i, f_neg[i]) for i in range(24)))
    assert sorted(partners) == list(range(24)) != list(partners)
    assert all(0.8 - 1e-9 <= share <= 1 + 1e-9 for share in shares)
    share = torch.tensor(shares, dtype=torch.float64)[:, None]
    expected = (1 - share) * one_hot(y, 4) + share * one_hot(y[list(partners)], 4)
    torch.testing.assert_close(y_neg, expected)


@pytest.mark.parametrize("alpha", [0.05, 1.0, 20.0])
def test_the_shares_of_the_hard_positives_are_drawn_from_beta_anchor_by_anchor(alpha):
    f, y = random_batch(1000, 2)
    share = core_tuning.hard_pairs(f, y, 2, alpha)[1][torch.arange(1000), y]
    assert len(share.unique()) > (500 if alpha < 1 else 990)  # a small alpha: many round to 0 and 1
    assert share.mean().item() == pytest.approx(0.5, abs=0.05)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_a_uniform_share_of_the_semi_hard_negatives_is_raised_to_0_8_four_times_of_five():
    f, y = random_batch(1000, 1)[0], torch.arange(1000)
    share = core_tuning.hard_pairs(f, y, 1000, 1.0)[3].max(1).values
    assert (share < 0.8 + 1e-9).double().mean().item() == pytest.approx(0.8, abs=0.05)
    assert share[share > 0.8 + 1e-9].mean().item() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("alpha", [1e-3, 1e6])
def test_extreme_alphas_still_give_shares(alpha):
    f, y = random_batch(200, 3)
    for mixed in core_tuning.hard_pairs(f.float(), y, 3, alpha):
        assert mixed.isfinite().all()


@pytest.mark.parametrize("batch, classes", BATCHES)
def test_gradients_flow_through_the_mixtures(batch, classes):
    f, y = random_batch(batch, classes)

    def mixtures(f):
        torch.manual_seed(1)  # the same shares and partners each time
        return [core_tuning.hard_pairs(f, y, classes, 1.0)[i] for i in (0, 2)]

    for one, other in zip(mixtures(f), mixtures(f)):
        assert torch.equal(one, other), \
            "torch.manual_seed() does not repeat the draws: draw with torch"
    assert torch.autograd.gradcheck(mixtures, f.requires_grad_())
    for mixed in mixtures(f):
        assert torch.autograd.grad(mixed.sum(), f, retain_graph=True)[0].any()


# ---------------------------------------------------------------------------------------- positives

def slow_positives(labels, batch):
    """Of each row: the others with the same label of one class, and an image's own hard
    positive."""
    n = len(labels)
    pure = [[c for c, share in enumerate(row) if share > 1 - 1e-6] for row in labels.tolist()]
    matrix = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            same = pure[i] != [] and pure[i] == pure[j] and i != j
            matrix[i, j] = same or (i < batch and j == batch + i)
    return matrix


def mixed_labels(batch, classes, dtype=torch.float64):
    f, y = random_batch(batch, classes)
    _, y_pos, _, y_neg = core_tuning.hard_pairs(f.to(dtype), y, classes, 1.0)
    return torch.cat([F.one_hot(y, classes).to(dtype), y_pos, y_neg])


# l + (1 - l) need not be exactly 1.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, classes", [*BATCHES, (20, 2), (30, 100)])
def test_positives_are_those_of_a_slow_loop(batch, classes, dtype):
    labels = mixed_labels(batch, classes, dtype)
    assert torch.equal(core_tuning.positive_pairs(labels, batch), slow_positives(labels, batch))


def test_positives_written_out_for_two_images():
    # Two images, their hard positives, their negatives.
    labels = torch.tensor([[1, 0], [0, 1], [0.3, 0.7], [0, 1], [1, 0], [0.3, 0.7]])
    positives = [set(row.nonzero()[:, 0].tolist()) for row in core_tuning.positive_pairs(labels, 2)]
    assert positives == [{4, 2}, {3}, set(), {1}, {0}, set()]


def test_classes_beyond_the_sixtieth_are_told_apart():
    y = torch.tensor([61, 62, 99, 61, 62, 99])
    positives = core_tuning.positive_pairs(one_hot(y, 100), 2)
    assert torch.equal(positives, slow_positives(one_hot(y, 100), 2))
    assert positives[2].nonzero()[:, 0].tolist() == [5]


# --------------------------------------------------------------------------- focal contrastive loss

def slow_focal(z, positives, temperature):
    """Equation 5, mean over the anchors with positives:
    -1/|P_i| sum_{j in P_i} (1 - p_ij) log p_ij."""
    z, n, anchors = [v / v.norm() for v in z], len(z), []
    similarity = [[float(a @ b) for b in z] for a in z]
    for i in range(n):
        own = positives[i].nonzero()[:, 0].tolist()
        if own:
            denominator = sum(math.exp(similarity[i][k] / temperature) for k in range(n) if k != i)
            p = [math.exp(similarity[i][j] / temperature) / denominator for j in own]
            anchors.append(-sum((1 - p_ij) * math.log(p_ij) for p_ij in p) / len(p))
    return sum(anchors) / len(anchors) if anchors else 0


def random_graph(n, share=0.3):
    """Some rows have no positive, none has itself."""
    graph = (torch.rand(n, n) < share) & (torch.arange(n) % 3 > 0)[:, None]
    return graph.fill_diagonal_(False)


def random_z(n, dim=4):
    return torch.randn(n, dim, dtype=torch.float64)


@pytest.mark.parametrize("n, share, temperature", [
    (9, 0.3, 0.07),
    (9, 0.3, 1.0),
    (12, 0.9, 0.5),
    (6, 0.1, 0.2),
    (2, 1, 0.5)])
def test_focal_contrastive_is_the_equation_anchor_by_anchor(n, share, temperature):
    z, positives = random_z(n), random_graph(n, share)
    expected = slow_focal(z, positives, temperature)
    loss = core_tuning.focal_contrastive(z, positives, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_focal_contrastive_of_the_labels_of_mixtures_is_the_equation():
    z, labels = random_z(24), mixed_labels(8, 3)
    expected = slow_focal(z, slow_positives(labels, 8), 0.07)
    loss = core_tuning.focal_contrastive(z, core_tuning.positive_pairs(labels, 8), 0.07)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_focal_contrastive_has_the_right_derivative():
    positives = random_graph(6)
    loss = lambda z: core_tuning.focal_contrastive(z, positives, 0.3)
    assert torch.autograd.gradcheck(loss, random_z(6).requires_grad_())


@pytest.mark.parametrize("n", [3, 4, 15])
def test_focal_contrastive_of_equal_projections_has_a_closed_form(n):
    p, positives = 1 / (n - 1), random_graph(n, 1)
    loss = core_tuning.focal_contrastive(random_z(1).expand(n, 4), positives, 0.07)
    assert loss.item() == pytest.approx(-(1 - p) * math.log(p), abs=1e-12)


def test_an_anchor_without_positives_does_not_count():
    z, positives = random_z(8), torch.zeros(8, 8, dtype=torch.bool)
    positives[2, 5] = True
    loss = core_tuning.focal_contrastive(z, positives, 0.5).item()
    assert loss == pytest.approx(slow_focal(z, positives, 0.5), abs=1e-12)
    positives[4, 5] = True
    both = core_tuning.focal_contrastive(z, positives, 0.5).item()
    positives[2, 5] = False
    other = core_tuning.focal_contrastive(z, positives, 0.5).item()
    assert both == pytest.approx((loss + other) / 2, abs=1e-12)


def test_without_any_positive_focal_contrastive_is_zero_and_so_is_its_gradient():
    z = random_z(5).requires_grad_()
    loss = core_tuning.focal_contrastive(z, torch.zeros(5, 5, dtype=torch.bool), 0.07)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, z)[0].any()


def test_a_positive_that_is_certain_costs_nothing_and_its_gradient_is_finite():
    z = torch.tensor([[1.0, 0], [1, 0], [-1, 0]], requires_grad=True)
    positives = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    loss = core_tuning.focal_contrastive(z, positives, 0.01)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_focal_contrastive_does_not_depend_on_the_length_of_a_projection():
    z, positives = random_z(6), random_graph(6)
    lengths = 10 ** torch.linspace(-3, 3, 6, dtype=torch.float64)[:, None]
    losses = [core_tuning.focal_contrastive(v, positives, 0.2) for v in (z, lengths * z)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_contrastive_keeps_the_dtype(dtype):
    assert core_tuning.focal_contrastive(random_z(6).to(dtype), random_graph(6), 0.2).dtype == dtype


# --------------------------------------------------------------------------------------- whole runs

def test_the_checkpoint_holds_backbone_classifier_without_bias_and_projector(finished):
    place, result = finished
    ckpt = common.load_checkpoint(place / "core_tuning.pt")
    assert (ckpt["method"], ckpt["arch"], ckpt["image_size"]) == ("core_tuning", "resnet10", 16)
    assert ckpt["classes"] == ["a", "b", "c"]
    assert {key: tuple(value.shape) for key, value in ckpt["head"].items()} == {"weight": (3, 256)}
    assert {key: tuple(value.shape) for key, value in ckpt["projector"].items()} == {
        "0.weight": (256, 256), "0.bias": (256,), "2.weight": (256, 256), "2.bias": (256,)}
    assert 0 <= result["test_top1"] <= 100


def test_finetune_eval_repeats_the_accuracy_of_the_run(finished, monkeypatch):
    place, result = finished
    monkeypatch.chdir(place)
    again = finetune.main([*SMALL, "--eval", "--ckpt", "core_tuning.pt"])
    assert again["test_top1"] == result["test_top1"]


def soft_cross_entropy(logits, labels):
    """Mean over rows of -sum_c label_c log softmax_c."""
    total = 0
    for row, label in zip(logits.tolist(), labels.tolist()):
        log_sum = math.log(sum(map(math.exp, row)))
        total -= sum(share * (value - log_sum) for share, value in zip(label, row))
    return total / len(logits)


@pytest.mark.parametrize("eta, temperature", [("0.5", "0.07"), ("3", "0.5"), ("0", "0.07")])
def test_the_loss_of_a_step_is_that_of_images_and_mixtures_together(
        here, monkeypatch, eta, temperature):
    seen = []
    hard_pairs = core_tuning.hard_pairs

    def listen(f, y, *rest):
        mixtures = hard_pairs(f, y, *rest)
        seen.append((f.double(), y, *(mixed.double() for mixed in mixtures)))
        return mixtures

    monkeypatch.setattr(core_tuning, "hard_pairs", listen)
    # The one step moves nothing.
    run("--batch-size", "36", "--eta", eta, "--temperature", temperature, "--lr", "1e-12")
    (f, y, f_pos, y_pos, f_neg, y_neg), = seen
    features = torch.cat([f, f_pos, f_neg]).detach()
    labels = torch.cat([one_hot(y, 3), y_pos, y_neg])
    ckpt = common.load_checkpoint("core_tuning.pt")
    w = {key: value.double() for key, value in ckpt["projector"].items()}
    z = F.linear(F.linear(features, w["0.weight"], w["0.bias"]).relu(), w["2.weight"], w["2.bias"])
    expected = soft_cross_entropy(features @ ckpt["head"]["weight"].double().T, labels)
    expected += float(eta) * slow_focal(z, slow_positives(labels, 36), float(temperature))
    assert epochs_of(here / "core_tuning.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_backbone_runs_once_a_step(here, monkeypatch):
    calls, build = [], common.build_backbone

    def note_call(module, x, f):
        if module.training:
            calls.append(len(f))

    def counted(*args):
        backbone = build(*args)
        backbone.register_forward_hook(note_call)
        return backbone

    monkeypatch.setattr(common, "build_backbone", counted)
    run("--epochs", "2")
    assert len(calls) == 2 * 5 and sum(calls) == 2 * 36


@pytest.mark.parametrize("flags", [["--eta", "0"], ["--alpha", "1e6"], ["--alpha", "0.001"]])
def test_extreme_settings_run(here, flags):
    assert 0 <= run(*flags)["test_top1"] <= 100
    assert math.isfinite(epochs_of(here / "core_tuning.jsonl")[0]["loss"])


def test_backbone_classifier_and_projector_all_learn(here, monkeypatch):
    starts, make = [], common.make_optimizer

    def listen(name, modules, *rest, **more):
        starts.append({key: value.clone() for key, value in modules[0].state_dict().items()})
        return make(name, modules, *rest, **more)

    monkeypatch.setattr(common, "make_optimizer", listen)
    run()
    ckpt = common.load_checkpoint("core_tuning.pt")
    for key in ("backbone.conv1.weight", "backbone.layer4.0.conv2.weight", "head.weight",
                "projector.0.weight"):
        part, name = key.split(".", 1)
        assert not torch.equal(ckpt[part][name], starts[0][key]), key


def test_the_panel_shows_each_anchor_above_its_hardest_positive_and_negative(finished, monkeypatch):
    place, _ = finished
    monkeypatch.chdir(place)
    args = core_tuning.parser().parse_args([*SMALL, *NEW, "--batch-size", "12"])
    backbone = common.start_backbone(args)[0]
    shown, pairs, hardest = [], [], core_tuning.hardest
    monkeypatch.setattr(common, "show_images", lambda axes, x, columns: shown.append((x, columns)))

    def listen(f, y):
        pairs.append((f, hardest(f, y)))
        return pairs[-1][1]

    monkeypatch.setattr(core_tuning, "hardest", listen)
    core_tuning.show_hard_pairs(common.plt.figure().gca(), args, backbone)
    common.plt.close("all")
    (x, columns), (f, (hp, hn)) = shown[0], pairs[0]
    backbone.eval()
    with torch.no_grad():
        expected = f[torch.cat([torch.arange(8), hp[:8], hn[:8]])]
        torch.testing.assert_close(backbone(x), expected, rtol=1e-4, atol=1e-4)
    assert columns == 8
