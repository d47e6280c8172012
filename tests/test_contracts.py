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
    results = call(*call.tensors)
    results = results if isinstance(results, tuple) else (results,)
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
    results = call(*call.tensors)
    results = results if isinstance(results, tuple) else (results,)
    with_graph = [result.sum() for result in results if result.requires_grad]
    if not call.trains:
        assert not with_graph, "the result hangs on a graph, and should be a constant"
        return
    constants = [call.tensors[place] for place in call.constants]
    for gradient in torch.autograd.grad(sum(with_graph), constants, allow_unused=True):
        assert gradient is None or not gradient.any(), "a gradient flows into a constant"


@each({**losses(), **pairs()})
def test_all_runs_on_the_arguments_device(name):
    """On `meta`, where tensors have shapes and no numbers: a tensor of the CPU's among them fails
    there as it does on a GPU, and so does what waits for a number."""
    call = {**losses(), **pairs()}[name]
    try:
        results = call(*[tensor.to("meta") for tensor in call.tensors])
    except RuntimeError as error:
        if not str(error):  # NotImplementedError: not written yet
            raise
        raise AssertionError(
            f"works on the CPU alone, or loops over samples: {str(error).splitlines()[0]}")
    results = results if isinstance(results, tuple) else (results,)
    assert {result.device.type for result in results} == {"meta"}, "the result is on another device"


# ------------------------------------------------------------------------------------------- losses

@each(losses())
def test_a_loss_is_a_mean_without_dimensions(name):
    call = losses()[name]
    assert call(*call.tensors).shape == (), "a loss is one number"


@each(losses())
def test_bfloat16_gives_a_float32_loss(name):
    """Computed in float32, too: equal to the loss of the same numbers in float32."""
    call = losses()[name]
    loss = call.on_features(lambda t: t.bfloat16())
    assert loss.dtype == torch.float32, f"bfloat16 in gave {loss.dtype}: upcast before computing"
    expected = call.on_features(lambda t: t.bfloat16().float()).item()
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


NORMALISED = ("simclr.nt_xent", "byol.byol_loss", "byol.symmetric_loss", "coin.supcon",
              "core_tuning.focal_contrastive", "bi_tuning.categorical_contrastive")


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


# --------------------------------------------------------------------------- functions of their own

@pytest.mark.parametrize("name", ["core_tuning.hardest"])
def test_a_row_of_zeros_still_has_pairs(name):
    f = normal(6, 4)
    f[1] = 0
    hp, hn = core_tuning.hardest(f, Y)
    assert all(Y[hp] == Y) and all(Y[hn] != Y)


@pytest.mark.parametrize("name", ["bi_tuning.ClassQueue.enqueue"])
def test_the_queue_stays_a_buffer(name):
    """The same tensor, without a graph, though the keys have one."""
    queue = bi_tuning.ClassQueue(3, 2, 4)
    keys = queue.keys
    queue.enqueue(unit(6, 4).float().requires_grad_(), Y)
    assert not queue.keys.requires_grad, "the queue hangs on the graph of the keys"
    assert queue.entered.tolist() == [3, 2, 1]
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


@pytest.mark.parametrize("name", ["byol.decay"])
def test_a_decay_is_a_plain_number(name):
    assert type(byol.decay(0.9, 3, 10)) is float
