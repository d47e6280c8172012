"""What every function that can be set as course work keeps to, whatever its equation: the caller's
tensors stay as they were, the gradient is whole and flows nowhere else, half types and large
numbers do no harm, all runs where its arguments are, and what is random is drawn anew.

A test's name ends with the function's, which is how tests/assignment.py finds those of one.
"""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bi_tuning
import bissl
import byol
import coin
import common
import core_tuning
import finetune
import simclr

Y = torch.tensor([0, 1, 0, 2, 1, 0])
# Half of the anchors have a positive, one of them two.
POSITIVES = torch.zeros(6, 6, dtype=torch.bool)
POSITIVES[[0, 0, 2, 3], [1, 2, 0, 5]] = True
KEYS = F.normalize(torch.arange(24.0).view(6, 4), dim=1)
FILLED = torch.tensor([[True, True], [True, False], [False, False]])


class Call:
    """A function and tensors that it can be called with: call(*call.tensors). trains, constants:
    the places of those that get a gradient, and of those that must not."""

    def __init__(self, function, tensors, trains=(), constants=()):
        self.function, self.tensors = function, list(tensors)
        self.trains, self.constants = trains, constants

    def __call__(self, *tensors):
        torch.manual_seed(1)  # the same draws at each call
        return self.function(*tensors)

    def on(self, convert):
        """The result with `convert` done to each floating point tensor."""
        return self(*[convert(t) if t.is_floating_point() else t for t in self.tensors])

    def on_features(self, convert):
        """... to those that come out of a network, a row per image; weights and queues stay
        float32."""
        tensors = []
        for tensor in self.tensors:
            if tensor.is_floating_point():
                tensor = convert(tensor) if len(tensor) == len(Y) else tensor.float()
            tensors.append(tensor)
        return self(*tensors)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def unit(*shape):
    return F.normalize(normal(*shape), dim=-1)


def mixed_labels():
    """Of six images, of their mixtures within a class, and of mixtures of two classes."""
    labels = F.one_hot(Y, 3).double()
    return torch.cat([labels, labels, 0.4 * labels + 0.6 * labels.roll(1, 1)])


def enqueue(keys, y):
    queue = bi_tuning.ClassQueue(3, 2, 4).to(keys.device)
    queue.enqueue(keys, y)
    return queue.keys


def solve(*b):
    return bissl.conjugate_gradient(lambda v: tuple(2 * t for t in v), b, 3)


def losses():
    """Each with a temperature of 0.3. A function is looked up when it is called: grading puts
    another one in its place."""
    return {
        "simclr.nt_xent": Call(
            lambda z1, z2: simclr.nt_xent(z1, z2, 0.3), [normal(6, 4), normal(6, 4)], (0, 1)),
        "byol.byol_loss": Call(
            lambda p, z: byol.byol_loss(p, z), [normal(6, 4), normal(6, 4)], (0,)),
        "byol.symmetric_loss": Call(
            lambda p, z: byol.symmetric_loss(p, z), [normal(6, 4), normal(6, 4)], (0,)),
        "coin.supcon": Call(lambda z, y: coin.supcon(z, y, 0.3), [normal(6, 4), Y], (0,)),
        "core_tuning.focal_contrastive": Call(
            lambda z, positives: core_tuning.focal_contrastive(z, positives, 0.3),
            [normal(6, 4), POSITIVES], (0,)),
        "bi_tuning.share_with_class": Call(
            lambda *inputs: bi_tuning.share_with_class(*inputs),
            [normal(6), normal(6, 3, 2), Y, FILLED], (0, 1)),
        "bi_tuning.contrastive_cross_entropy": Call(
            lambda h, weight, bias, y, queue, filled: bi_tuning.contrastive_cross_entropy(
                h, weight, bias, y, queue, 0.3, filled),
            [normal(6, 4), normal(3, 4), normal(3), Y, unit(3, 2, 5), FILLED], (0,), (1, 2)),
        "bi_tuning.categorical_contrastive": Call(
            lambda z_q, z_k, y, queue, filled: bi_tuning.categorical_contrastive(
                z_q, z_k, y, queue, 0.3, filled),
            [normal(6, 4), normal(6, 4), Y, unit(3, 2, 4), FILLED], (0,), (1,))}


def pairs():
    return {
        "core_tuning.hardest": Call(
            lambda f, y: core_tuning.hardest(f, y), [normal(6, 4), Y], (), (0,)),
        "core_tuning.hard_pairs": Call(
            lambda f, y: core_tuning.hard_pairs(f, y, 3, 1.0), [normal(6, 4), Y], (0,)),
        "core_tuning.positive_pairs": Call(
            lambda labels: core_tuning.positive_pairs(labels, 6), [mixed_labels()], (), (0,))}


def all_calls():
    return {**losses(), **pairs(),
            "bi_tuning.ClassQueue.enqueue": Call(enqueue, [unit(6, 4), Y], (), (0,)),
            "bissl.conjugate_gradient": Call(solve, [normal(2, 3), normal(4)]),
            "finetune.metrics": Call(lambda *inputs: finetune.metrics(*inputs), [normal(6, 3), Y])}


def each(calls, wanted=lambda call: True):
    """A case for each function."""
    return pytest.mark.parametrize("name", [name for name, call in calls.items() if wanted(call)])


# -------------------------------------------------------------------------------- for all functions

@each(all_calls())
def test_the_callers_tensors_stay_as_they_were(name):
    call = all_calls()[name]
    before = copy.deepcopy(call.tensors)
    call(*call.tensors)
    for i, (tensor, was) in enumerate(zip(call.tensors, before)):
        assert torch.equal(tensor, was), f"argument {i + 1} was changed in place"


@each(all_calls(), lambda call: call.trains)
def test_the_gradient_is_whole(name):
    """In every argument that trains, and for all of it."""
    call = all_calls()[name]
    for place in call.trains:
        call.tensors[place].requires_grad_()
    results = as_tuple(call(*call.tensors))
    assert any(result.requires_grad for result in results), "no gradient flows into the result"
    try:
        torch.autograd.gradcheck(call, call.tensors)
    except RuntimeError as error:
        numbers = " ".join(str(error).split())
        raise AssertionError(f"the gradient is not the derivative of the result: {numbers}")


@each(all_calls(), lambda call: call.constants)
def test_a_constant_has_no_gradient(name):
    call = all_calls()[name]
    for place in (*call.trains, *call.constants):
        call.tensors[place].requires_grad_()
    results = as_tuple(call(*call.tensors))
    with_graph = [result.sum() for result in results if result.requires_grad]
    if not call.trains:
        assert not with_graph, "the result hangs on a graph, and should be a constant"
        return
    constants = [call.tensors[place] for place in call.constants]
    for gradient in torch.autograd.grad(sum(with_graph), constants, allow_unused=True):
        assert gradient is None or not gradient.any(), "a gradient flows into a constant"


@each(all_calls())
def test_switches_stay_as_they_were(name):
    """Whether gradients are recorded, and, of what is not random, torch's random numbers."""
    call = all_calls()[name]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            call(*call.tensors)
            assert torch.is_grad_enabled() == recorded, "switches gradients on or off for good"
    if name != "core_tuning.hard_pairs":
        assert torch.equal(torch.get_rng_state(), state), "draws or seeds random numbers"


@pytest.fixture(scope="module")
def a_beta_without_numbers():
    """Drawn on `meta`: torch has no kernel for it."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_sample_dirichlet", lambda a, generator=None: torch.empty_like(a), "Meta")
        yield


@pytest.mark.usefixtures("a_beta_without_numbers")
@each({**losses(), **pairs()})
def test_all_runs_on_the_arguments_device(name):
    """On `meta`, where tensors have shapes and no numbers: a tensor of the CPU's among them fails
    there as it does on a GPU, and so does what waits for a number."""
    call = {**losses(), **pairs()}[name]
    try:
        results = as_tuple(call(*[tensor.to("meta") for tensor in call.tensors]))
    except RuntimeError as error:
        if not str(error):  # NotImplementedError: not written yet
            raise
        raise AssertionError(
            f"works on the CPU alone, or waits for a number: {str(error).splitlines()[0]}")
    assert {result.device.type for result in results} == {"meta"}, "the result is on another device"


# ------------------------------------------------------------------------------------------- losses

@each(losses())
def test_a_loss_is_a_mean_without_dimensions(name):
    call = losses()[name]
    assert call(*call.tensors).shape == (), "a loss is one number"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each(losses())
def test_half_types_give_a_float32_loss(name, half):
    """Computed in float32, too: equal to the loss of the same numbers in float32."""
    call = losses()[name]
    loss = call.on_features(lambda t: t.to(half))
    assert loss.dtype == torch.float32, f"{half} in gave {loss.dtype}: float32 is asked for"
    expected = call.on_features(lambda t: t.to(half).float()).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each(losses())
def test_a_loss_is_of_its_arguments_type(name, dtype):
    assert losses()[name].on(lambda t: t.to(dtype)).dtype == dtype


def opposite(n, dim=4):
    """Rows that are as near and as far from each other as can be."""
    sign = torch.tensor([1.0, -1]).repeat(n)[:n, None]
    return sign * torch.ones(n, dim, dtype=torch.float64)


def extremes():
    """Losses at similarities of 1 and -1 and a temperature of 0.01, or at logits of 100."""
    z, queue, wide = opposite(6), F.normalize(opposite(6).view(3, 2, 4), dim=2), normal(3, 2, 5)
    return {
        "simclr.nt_xent": Call(lambda a, b: simclr.nt_xent(a, b, 0.01), [z, -z]),
        "byol.byol_loss": Call(lambda p, z: byol.byol_loss(p, z), [z, -z]),
        "byol.symmetric_loss": Call(lambda p, z: byol.symmetric_loss(p, z), [z, -z]),
        "coin.supcon": Call(lambda z, y: coin.supcon(z, y, 0.01), [z, Y]),
        "core_tuning.focal_contrastive": Call(
            lambda z, positives: core_tuning.focal_contrastive(z, positives, 0.01), [z, POSITIVES]),
        "bi_tuning.share_with_class": Call(
            lambda own, queued, y: bi_tuning.share_with_class(own, queued, y),
            [100 * z[:, 0], 100 * z[:, 0, None, None] * opposite(6, 1).view(1, 3, 2), Y]),
        "bi_tuning.contrastive_cross_entropy": Call(
            lambda h, weight, bias, y, queue: bi_tuning.contrastive_cross_entropy(
                h, weight, bias, y, queue, 0.01),
            [z, -opposite(3), torch.ones(3, dtype=torch.float64), Y, F.normalize(wide, dim=2)]),
        "bi_tuning.categorical_contrastive": Call(
            lambda z_q, z_k, y, queue: bi_tuning.categorical_contrastive(z_q, z_k, y, queue, 0.01),
            [z, -z, Y, queue])}


@each(extremes())
def test_large_numbers_do_not_overflow(name):
    """float32, whose exp ends at 88, against float64, whose exp ends at 709."""
    call = extremes()[name]
    loss, expected = call.on(lambda t: t.float()).item(), call(*call.tensors).item()
    assert math.isfinite(expected), f"is {expected} in float64"
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-4), \
        f"is {loss} in float32 and {expected} in float64: exp overflows, or log of 0"


E, ZERO = [[1.0, 0]], [[0.0, 0]]
PAIR = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)  # rows 0 and 2
TWO = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)   # rows 0 and 1
log, e = math.log, math.e
# Losses by hand. At a temperature of 0.01 similarities of 1 and -1 are logits of 100 and -100.
WRITTEN = [
    ("simclr.nt_xent", (opposite(6), -opposite(6), 0.01), 200 + log(5)),
    ("simclr.nt_xent", (E, [[-1.0, 0]], 0.01), 0),
    ("simclr.nt_xent", ([*ZERO, *ZERO], [*E, *E], 1.0), (log(3) + log(2 + e)) / 2),
    ("byol.byol_loss", (ZERO, E), 2),
    ("byol.symmetric_loss", (ZERO * 2, E * 2), 4),
    ("coin.supcon", ([*E, *E, [-1.0, 0]], [0, 1, 0], 0.01), (200 + log(2)) / 2),
    ("coin.supcon", ([*E, [-1.0, 0]], [0, 0], 0.01), 0),
    ("coin.supcon", ([*ZERO, *E, *E], [0, 0, 1], 1.0), (log(2) + log(1 + e)) / 2),
    ("coin.supcon", ([*ZERO, *E, *E], [256, 256, 257], 1.0), (log(2) + log(1 + e)) / 2),
    ("core_tuning.focal_contrastive", ([*E, *E, [-1.0, 0]], PAIR, 0.01),
     (200 + log(2) / 2) / 2),
    ("core_tuning.focal_contrastive", ([*E, [-1.0, 0]], TWO[:2, :2], 0.01), 0),
    ("core_tuning.focal_contrastive", ([*ZERO, *E, *E], TWO, 1.0),
     (log(2) / 2 + e / (1 + e) * log(1 + e)) / 2),
    ("bi_tuning.share_with_class", ([-100.0], [[[100.0], [100]]], [0]), 100),
    ("bi_tuning.share_with_class", ([-200.0], [[[-200.0], [-200]]], [0]), log(3) - log(2)),
    ("bi_tuning.share_with_class", ([-200.0] * 6, [[[-200.0] * 2] * 3] * 6, Y, FILLED),
     (3 * log(4 / 3) + 2 * log(4 / 2) + log(4)) / 6),
    ("bi_tuning.categorical_contrastive", (E, [[-1.0, 0]], [0], [E, E], 0.01), 100),
    ("bi_tuning.categorical_contrastive", (E, ZERO, [0], [E, [[-1.0, 0]]], 1.0),
     log(1 + e + 1 / e) - 0.5 - log(2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, inputs, expected", WRITTEN)
def test_a_loss_of_extreme_numbers_is_what_the_equation_says(name, inputs, expected, dtype):
    tensors = []
    for value in inputs:
        value = torch.as_tensor(value) if not isinstance(value, float) else value
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.to(dtype)
        tensors.append(value)
    module, function = name.split(".")
    loss = getattr(globals()[module], function)(*tensors).item()
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["coin.supcon"])
def test_labels_are_told_apart_beside_half_types(name):
    """bfloat16 does not have 257."""
    z = torch.tensor([*ZERO, *E, *E], dtype=torch.bfloat16)
    loss = coin.supcon(z, torch.tensor([256, 256, 257]), 1.0).item()
    assert loss == pytest.approx((log(2) + log(1 + e)) / 2, abs=1e-5)


NORMALISED = ("simclr.nt_xent", "byol.byol_loss", "byol.symmetric_loss", "coin.supcon",
              "core_tuning.focal_contrastive", "bi_tuning.categorical_contrastive")


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("name", NORMALISED)
def test_the_length_of_a_row_does_not_matter(name, size):
    call = losses()[name]
    expected = call(*call.tensors)
    call.tensors[0][::2] *= size
    torch.testing.assert_close(call(*call.tensors), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NORMALISED)
def test_a_row_of_zeros_stays_one(name):
    call = losses()[name]
    call.tensors[0][1] = 0
    call.tensors[0].requires_grad_()
    loss = call(*call.tensors)
    assert loss.isfinite(), f"a row of zeros makes the loss {loss.item()}: 0 / 0"
    gradient, = torch.autograd.grad(loss, call.tensors[0])
    assert gradient.isfinite().all(), "a row of zeros makes the gradient infinite"


# ------------------------------------------------------------------------------------------- random

def mixtures(n=1000):
    """hard_pairs() of n images in two classes: its share of the hardest positive and of the
    permuted image, and which image that is."""
    f, y = normal(n, 8), torch.arange(n) % 2
    f_pos, y_pos, f_neg, y_neg = core_tuning.hard_pairs(f, y, 2, 1.0)
    distance = torch.cdist(f_neg, f)
    distance[torch.arange(n), torch.arange(n)] = torch.inf  # the image itself is near, too
    nearest = distance.argmin(1)
    way = f[nearest] - f
    share_neg = ((f_neg - f) * way).sum(1) / way.square().sum(1)
    return y_pos[torch.arange(n), y], share_neg, nearest


@pytest.mark.parametrize("name", ["core_tuning.hard_pairs"])
def test_two_calls_draw_differently(name):
    first, second = mixtures(), mixtures()
    f, y = normal(20, 4), torch.arange(20) % 4
    once, again = (core_tuning.hard_pairs(f, y, 4, 1.0)[0] for _ in range(2))
    assert not torch.equal(once, again), "two calls on the same features draw the same numbers"
    names = "shares of the positives", "shares of the negatives", "permutations"
    for one, other, what in zip(first, second, names):
        same = (one == other).double().mean().item()
        assert same < 0.9, f"two calls draw the same {what}: draw with torch, and set no seed"


@pytest.mark.parametrize("name", ["core_tuning.hard_pairs"])
def test_the_draws_are_torchs(name):
    torch.manual_seed(3)
    first = mixtures()
    torch.manual_seed(3)
    for one, other in zip(first, mixtures()):
        assert torch.equal(one, other), \
            "torch.manual_seed() does not repeat the draws: draw with torch"


@pytest.mark.parametrize("name", ["core_tuning.hard_pairs"])
def test_both_mixtures_draw_shares_of_their_own(name):
    share_pos, share_neg, _ = mixtures()
    raised = share_neg > 0.8 + 1e-6
    raw = share_pos[raised]
    assert not torch.allclose(raw, share_neg[raised]), "both mixtures have one share"
    together = torch.corrcoef(torch.stack([share_pos, share_neg]))[0, 1].item()
    assert abs(together) < 0.15, f"the shares of both mixtures correlate: {together:.2f}"


@pytest.mark.parametrize("name", ["core_tuning.hard_pairs"])
def test_the_permutation_is_no_shift(name):
    _, _, nearest = mixtures()
    shift = (nearest - torch.arange(1000)) % 1000
    most = shift.bincount().max().item()
    assert most < 20, f"{most} of 1000 images are mixed with the one as many rows on: a shift"


@pytest.mark.parametrize("name", ["core_tuning.hard_pairs"])
def test_every_permutation_comes_up(name):
    f, y, seen = normal(4, 3), torch.arange(4), {}
    for _ in range(400):
        chosen = tuple(core_tuning.hard_pairs(f, y, 4, 1.0)[3].argmax(1).tolist())
        seen[chosen] = seen.get(chosen, 0) + 1
    assert len(seen) == 24, f"of 24 permutations of four images {len(seen)} come up in 400 calls"


@pytest.mark.parametrize("name", ["core_tuning.hard_pairs"])
def test_both_shares_are_drawn_with_alpha(name):
    """With an alpha of 20 a share of 0.8 or more is one in a million."""
    y = torch.arange(1000)
    _, y_pos, _, y_neg = core_tuning.hard_pairs(normal(1000, 3), y, 1000, 20.0)
    raised = (y_neg.max(1).values < 0.8 + 1e-6).double().mean().item()
    assert raised > 0.97, "alpha does not count for the shares of the negatives"
    assert y_pos[y, y].std() < 0.12, "alpha does not count for the shares of the positives"


# --------------------------------------------------------------------------- functions of their own

@pytest.mark.parametrize("name", ["core_tuning.hardest"])
def test_a_row_of_zeros_still_has_pairs(name):
    f = normal(6, 4)
    f[1] = 0
    hp, hn = core_tuning.hardest(f, Y)
    assert all(Y[hp] == Y) and all(Y[hn] != Y)


@pytest.mark.parametrize("name", ["core_tuning.hardest"])
def test_the_anchor_is_no_candidate_even_among_equals(name):
    """Similarities of exactly 1 and -1, where a mark of that size is not out of reach."""
    v = torch.tensor([1.0, 2, 2], dtype=torch.float64)
    assert core_tuning.hardest(torch.ones(3, 4), torch.tensor([0, 0, 1]))[0].tolist() == [1, 0, 2]
    _, hn = core_tuning.hardest(torch.stack([v, v, -v]), torch.tensor([0, 0, 1]))
    assert hn[:2].tolist() == [2, 2]
    assert core_tuning.hardest(torch.stack([v, -v]), torch.tensor([0, 1]))[1].tolist() == [1, 0]


@pytest.mark.parametrize("name", ["core_tuning.positive_pairs"])
def test_a_mixture_of_two_classes_shares_its_label_with_no_row(name):
    labels = torch.tensor([[0.9995, 0.0005], [1, 0], [0.9995, 0.0005]])
    assert not core_tuning.positive_pairs(labels, 0).any()


@pytest.mark.parametrize("name", ["core_tuning.focal_contrastive"])
def test_a_small_loss_is_not_raised(name):
    z = torch.tensor([[1.0, 0], [1, 0], [-1, 0]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-10))
    loss = core_tuning.focal_contrastive(z, TWO, 0.2).item()
    assert loss == pytest.approx(-(1 - p) * math.log(p), abs=1e-12)


@pytest.mark.parametrize("name", ["bi_tuning.ClassQueue.enqueue"])
def test_makes_no_tensor_on_the_default_device(name):
    queue = bi_tuning.ClassQueue(3, 2, 4)
    with torch.device("meta"):  # what names no device is made there, and does not fit the others
        queue.enqueue(KEYS, Y)
    assert queue.entered.tolist() == [3, 2, 1]


@pytest.mark.parametrize("name", ["bi_tuning.ClassQueue.enqueue"])
def test_the_queue_stays_a_buffer(name):
    """The same tensor, without a graph, though the keys have one."""
    queue = bi_tuning.ClassQueue(3, 2, 4)
    keys = queue.keys
    queue.enqueue(unit(6, 4).float().requires_grad_(), Y)
    assert not queue.keys.requires_grad, "the queue hangs on the graph of the keys"
    assert queue.entered.tolist() == [3, 2, 1], "entered counts the keys that a class has seen"
    assert dict(queue.named_buffers()).keys() == {"keys", "entered"}
    assert queue.keys.shape == keys.shape and queue.keys.dtype == torch.float32


@pytest.mark.parametrize("name", ["byol.Model.forward"])
def test_a_forward_pass_changes_no_weight_and_no_image(name):
    model = byol.Model(common.build_backbone("resnet10", True), 8, 4)
    x = torch.rand(4, 3, 16, 16)
    weights, image = copy.deepcopy(dict(model.named_parameters())), x.clone()
    model(x)
    assert torch.equal(x, image), "the images were changed in place"
    for key, value in model.named_parameters():
        assert torch.equal(value, weights[key]), f"{key} was changed"


@pytest.mark.parametrize("name", ["byol.Model.forward"])
def test_every_online_weight_has_a_gradient(name):
    model = byol.Model(common.build_backbone("resnet10", True), 8, 4)
    z, p, z_target = model(torch.rand(4, 3, 16, 16))
    assert not z_target.requires_grad, "the target hangs on a graph"
    (p.square().sum() + z.square().sum()).backward()
    for key, value in model.named_parameters():
        if key.startswith("head.target"):
            assert value.grad is None, f"{key} has a gradient"
        else:
            assert value.grad is not None, f"{key} has no gradient"


@pytest.mark.parametrize("name", ["byol.Model.forward"])
def test_a_forward_pass_keeps_the_mode_and_runs_anywhere(name):
    model = byol.Model(common.build_backbone("resnet10", True), 8, 4).eval()
    with torch.no_grad():
        model(torch.rand(4, 3, 16, 16))
        assert not torch.is_grad_enabled(), "switches gradients on for good"
    assert not any(module.training for module in model.modules()), "switches to training"
    model.to("meta")
    assert {t.device.type for t in model(torch.rand(4, 3, 16, 16, device="meta"))} == {"meta"}


@pytest.mark.parametrize("name", ["bissl.conjugate_gradient"])
def test_a_matvec_may_ask_for_gradients(name):
    """As a product with the Hessian does."""
    t = normal(4).requires_grad_()
    g, = torch.autograd.grad(t.pow(3).sum() / 6, t, create_graph=True)

    def matvec(v):
        return torch.autograd.grad((g * v[0]).sum(), t, retain_graph=True)

    x, = bissl.conjugate_gradient(matvec, (torch.ones(4, dtype=torch.float64),), 4)
    torch.testing.assert_close(x.detach(), 1 / t.detach())


@pytest.mark.parametrize("name", ["bissl.conjugate_gradient"])
def test_tensors_of_any_layout_and_device_are_solved_for(name):
    b = normal(2, 3).T, normal(1, 2, 3, 3).to(memory_format=torch.channels_last)
    with torch.device("meta"):  # what names no device is made there, and does not fit the others
        x = bissl.conjugate_gradient(lambda v: tuple(2 * t for t in v), b, 2)
    for own, other in zip(x, b):
        torch.testing.assert_close(own, other / 2)


@pytest.mark.parametrize("name", ["bissl.conjugate_gradient"])
def test_a_nan_of_the_matvec_stays_one(name):
    b = normal(2, 3), normal(4)
    for steps in (1, 3):
        x = bissl.conjugate_gradient(lambda v: tuple(t * torch.nan for t in v), b, steps)
        assert all(t.isnan().any() for t in x), "NaN of the matvec does not show in the result"


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
@pytest.mark.parametrize("name", ["bissl.conjugate_gradient"])
def test_a_small_right_hand_side_is_solved_as_well(name, size):
    diagonal = torch.arange(1, 5, dtype=torch.float64)
    b = size * normal(4)
    x, = bissl.conjugate_gradient(lambda v: (diagonal * v[0],), (b,), 4)
    torch.testing.assert_close(x / size, b / diagonal / size, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["bissl.inverse_hvp"])
def test_an_inverse_leaves_parameters_and_their_grad_alone(name):
    params = tuple(normal(3).requires_grad_() for _ in range(2))
    vector = normal(3), normal(3)
    before, vector_before = copy.deepcopy(params), copy.deepcopy(vector)
    loss = sum(p.pow(4).sum() for p in params) + params[0] @ params[1]
    x = bissl.inverse_hvp(loss, params, vector, 10.0, 3)
    assert all(p.grad is None for p in params), "wrote into .grad: use torch.autograd.grad"
    assert all(map(torch.equal, params, before)), "the parameters were changed"
    assert all(map(torch.equal, vector, vector_before)), "the vector was changed in place"
    assert [t.shape for t in x] == [p.shape for p in params]


@pytest.mark.parametrize("name", ["bissl.inverse_hvp"])
def test_a_given_gradient_takes_the_place_of_the_loss(name):
    p = normal(3).requires_grad_()
    gradient = torch.autograd.grad((p ** 2).sum() * 5, (p,), create_graph=True)  # H is 10 I
    x, = bissl.inverse_hvp(p.pow(4).sum(), (p,), (torch.ones(3, dtype=torch.float64),), 10.0, 3,
                           gradient)
    torch.testing.assert_close(x, torch.full((3,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["finetune.metrics"])
def test_several_labels_per_image_leave_the_labels_alone_and_give_plain_floats(name):
    labels = torch.tensor([[1, 0, -1], [0, 1, 1], [1, -1, 0], [0, 0, 1]])
    before = labels.clone()
    scores, precision = finetune.metrics(normal(4, 3), labels)
    assert torch.equal(labels, before), "the labels were changed in place"
    assert all(type(value) is float for value in scores.values()), "scores are plain floats"
    assert precision.shape == (3,)


@pytest.mark.parametrize("name", ["finetune.metrics"])
def test_scores_of_half_types_are_whole(name):
    """bfloat16 has eight bits: 1 of 1,001 is rounded away in it."""
    logits = torch.zeros(1001, 2)
    logits[:, 1] = 1
    labels = torch.ones(1001, dtype=torch.long)
    labels[0] = 0
    scores, _ = finetune.metrics(logits.bfloat16(), labels)
    assert scores["top1"] == pytest.approx(100 * 1000 / 1001)
    assert scores["mean_class"] == pytest.approx(50)


@pytest.mark.parametrize("name", ["finetune.metrics"])
def test_equal_scores_count_once_and_alike_in_all_metrics(name):
    scores, confusion = finetune.metrics(torch.zeros(4, 10), torch.arange(4))
    right = 100 * confusion.diag().sum().item() / 4
    assert scores["top1"] == pytest.approx(right) and right <= 25


@pytest.mark.parametrize("name", ["finetune.metrics"])
def test_a_class_without_images_stays_in_the_matrix(name):
    for absent in (0, 2):
        logits, labels = normal(8, 3), torch.tensor([1, 2, 1, 2, 2, 1, 1, 2])
        if absent == 2:
            labels = labels - 1
        logits[:, absent] = -9  # is never predicted either
        scores, confusion = finetune.metrics(logits, labels)
        assert confusion.shape == (3, 3) and confusion.sum() == 8
        assert all(type(value) is float for value in scores.values()), "scores are plain floats"


@pytest.mark.parametrize("name", ["common.update_average"])
def test_an_average_keeps_its_parameters_and_leaves_the_model_alone(name):
    average, model = nn.Linear(3, 2), nn.Linear(3, 2)
    average.requires_grad_(False)
    own, before = list(average.parameters()), copy.deepcopy(list(model.parameters()))
    common.update_average(average, model, 0.9)
    assert all(one is other for one, other in zip(average.parameters(), own)), \
        "a parameter was replaced: optimiser and checkpoint have the old one"
    assert all(map(torch.equal, model.parameters(), before)), "the model was changed"
    assert all(not p.requires_grad and p.grad_fn is None for p in average.parameters()), \
        "the average hangs on a graph"


@pytest.mark.parametrize("name", ["common.update_average"])
def test_frozen_parameters_are_averaged_too_and_shared_ones_once(name):
    def twice():
        network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
        network[1].weight = network[0].weight
        return network

    average, model = twice(), twice()
    expected = [(a + b) / 2 for a, b in zip(average.parameters(), model.parameters())]
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            common.update_average(copy.deepcopy(average), model, 0.5)
            assert torch.is_grad_enabled() == recorded, "switches gradients on or off for good"
    common.update_average(average, model, 0.5)
    for own, value in zip(average.parameters(), expected):
        torch.testing.assert_close(own, value)


@pytest.mark.parametrize("name", ["byol.decay"])
def test_a_decay_is_a_plain_number(name):
    assert type(byol.decay(0.9, 3, 10)) is float
