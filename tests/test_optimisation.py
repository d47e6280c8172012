"""Optimisers, learning rates, moving averages and gradients in chunks, each against its equation
written as a slow loop."""
import math

import pytest
import torch
from torch import nn

import common
import simclr


# --------------------------------------------------------------------------------------- optimisers

def slow_lars(w, gradients, lr, momentum, decay, eta, adapt):
    """The docstring of common.LARS, one step for each of the gradients."""
    v = torch.zeros_like(w)
    for g in gradients:
        trust = 1
        if adapt and w.norm() > 0 and g.norm() > 0:
            trust = eta * w.norm() / (g.norm() + decay * w.norm())
        v = momentum * v + trust * (g + decay * w)
        w = w - lr * v
    return w


# A zero weight has no norm to adapt to: its trust ratio is 1.
@pytest.mark.parametrize("start", ["random", "zero"])
@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("decay", [0, 0.1])
def test_lars_follows_its_equation_parameter_by_parameter(start, adapt, decay):
    make = torch.randn if start == "random" else torch.zeros
    starts = [make(shape, dtype=torch.float64) for shape in ((3, 4), (2, 3, 2), (5,))]
    params = [nn.Parameter(w.clone()) for w in starts]
    gradients = [[torch.randn_like(w) for w in starts] for _ in range(4)]
    optimizer = common.LARS(
        [dict(params=params, adapt=adapt)], lr=0.5, momentum=0.8, weight_decay=decay, eta=0.01)
    for step in gradients:
        for param, gradient in zip(params, step):
            param.grad = gradient.clone()
        optimizer.step()
    for i, param in enumerate(params):
        own = [step[i] for step in gradients]
        expected = slow_lars(starts[i], own, 0.5, 0.8, decay, 0.01, adapt)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lars_with_a_zero_gradient_and_no_decay_stays_where_it_is():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    common.LARS([param], lr=1).step()
    assert param.tolist() == [1, 1, 1]


def test_lars_leaves_a_parameter_without_a_gradient_alone():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    used.grad = torch.ones(3)
    common.LARS([unused, used], lr=1).step()
    assert unused.tolist() == [1, 1, 1] and used.tolist() != [1, 1, 1]


@pytest.mark.parametrize("name", common.OPTIMIZERS)
def test_only_weights_are_decayed_and_adapted_and_frozen_ones_are_left_out(name):
    frozen = nn.Linear(4, 4).requires_grad_(False)
    trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = common.make_optimizer(name, [frozen, trained], lr=0.1, weight_decay=0.3)
    weights, others = optimizer.param_groups
    assert [p is trained[0].weight for p in weights["params"]] == [True]
    assert set(others["params"]) == {trained[0].bias, trained[1].weight, trained[1].bias}
    assert (weights["weight_decay"], others["weight_decay"]) == (0.3, 0)
    assert name != "lars" or (weights["adapt"], others["adapt"]) == (True, False)


def schedule(peak, steps, warmup):
    """The learning rates of steps 0, 1, ..., steps."""
    optimizer, rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=123), []
    for step in range(steps + 1):
        common.set_learning_rate(optimizer, peak, step, steps, warmup)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("step, warmup, expected", [
    (0, 0, 1),      # without warm-up, a cosine over all steps
    (25, 0, 0.5 + 0.5 ** 1.5),
    (50, 0, 0.5),
    (100, 0, 0),
    (0, 20, 1 / 20),
    (9, 20, 1 / 2),
    (19, 20, 1),
    (20, 20, 1),
    (60, 20, 0.5),
    (100, 20, 0)])
def test_the_learning_rate_has_its_closed_form(step, warmup, expected):
    assert schedule(4.0, 100, warmup)[step] == pytest.approx(4 * expected, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 9, 40])
def test_a_warm_up_that_is_longer_than_the_run_takes_half_of_it(steps):
    assert schedule(1.0, steps, 1000) == schedule(1.0, steps, steps // 2)


def test_the_warm_up_is_a_straight_line_to_the_peak():
    assert schedule(2.0, 100, 8)[:8] == pytest.approx([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])


@pytest.mark.parametrize("warmup", [0, 1, 10, 50])
def test_the_learning_rate_never_jumps(warmup):
    rates = schedule(1.0, 100, warmup)
    cosine = math.pi / 2 / (100 - warmup)  # the steepest step that it can take
    largest = max(cosine, 1 / warmup if warmup else 0) + 1e-12
    assert all(abs(b - a) <= largest for a, b in zip(rates, rates[1:]))
    assert all(b <= a for a, b in zip(rates[warmup:], rates[warmup + 1:]))


def test_the_learning_rate_is_set_in_every_group():
    weight, bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([dict(params=[weight]), dict(params=[bias])], lr=123)
    common.set_learning_rate(optimizer, 3.0, 0, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [3, 3]


# ---------------------------------------------------------------------------------- moving averages

@pytest.mark.parametrize("decay", [0, 0.25, 0.99, 1])
def test_update_average_moves_every_parameter_towards_the_models_and_no_statistic(decay):
    average, model = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double() for _ in range(2))
    model(torch.randn(8, 3, dtype=torch.float64))  # moves its statistics
    old, new = ([p.detach().clone() for p in part.parameters()] for part in (average, model))
    assert common.update_average(average, model, decay) is None
    for p, was, towards in zip(average.parameters(), old, new, strict=True):
        torch.testing.assert_close(p.detach(), decay * was + (1 - decay) * towards)
    assert all(map(torch.equal, model.parameters(), new))
    assert not average[1].running_mean.any() and model[1].running_mean.any()


def test_update_average_leaves_no_graph():
    average, model = nn.Linear(2, 2), nn.Linear(2, 2)
    for _ in range(3):
        common.update_average(average, model, 0.5)
    assert all(p.is_leaf and p.requires_grad for p in average.parameters())


# --------------------------------------------------------------------------------- gradient caching

def toy(width=6):
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4)).double()


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 50])
def test_chunked_backward_gives_the_gradient_of_the_whole_batch(chunk):
    model, x, noise = toy(), torch.randn(7, 5, dtype=torch.float64), []

    def embed(part):  # two views of each image, drawn here
        views = [part + torch.randn(part.shape, dtype=part.dtype) for _ in range(2)]
        noise.append(torch.stack(views, 1))
        return torch.stack([model(view) for view in views], 1)

    loss = lambda z: simclr.nt_xent(*z.unbind(1), 0.3)
    value = common.chunked_backward(model, embed, loss, x, chunk)
    found = [p.grad.clone() for p in model.parameters()]
    half = len(noise) // 2
    views = torch.cat(noise[:half])
    assert torch.equal(views, torch.cat(noise[half:]))  # the same in both passes
    whole = loss(torch.stack([model(view) for view in views.unbind(1)], 1))
    expected = torch.autograd.grad(whole, list(model.parameters()))
    assert value.item() == pytest.approx(whole.item(), abs=1e-12)
    for gradient, right in zip(found, expected):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12)


def test_chunked_backward_adds_to_gradients_and_moves_batchnorm_once():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 5)
    common.chunked_backward(model, model, lambda z: z.square().sum(), x, 4)
    assert model[1].num_batches_tracked == 2  # two chunks, and not also the pass without a graph
    once = model[0].weight.grad.clone()
    common.chunked_backward(model, model, lambda z: z.square().sum(), x, 4)
    torch.testing.assert_close(model[0].weight.grad, 2 * once)


def saved_bytes(model, call):
    """The most bytes beside the weights that autograd held at once for backward passes during a
    call."""
    held, most, weights = 0, 0, {p.data_ptr() for p in model.parameters()}

    class Kept:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor, self.bytes = tensor, 0 if tensor.data_ptr() in weights else tensor.nbytes
            held += self.bytes
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        call()
    return most


def test_memory_grows_with_the_chunk_and_not_with_the_batch():
    model = common.build_backbone("resnet10", True)
    loss = lambda z: simclr.nt_xent(z, z.roll(1, 1), 0.3)
    pictures = lambda batch: torch.randn(batch, 3, 16, 16)
    peak = {}
    for batch, chunk in ((16, 8), (64, 8), (64, 32)):
        step = lambda: common.chunked_backward(model, model, loss, pictures(batch), chunk)
        peak[batch, chunk] = saved_bytes(model, step)
    assert peak[64, 8] < 1.1 * peak[16, 8]  # the loss itself keeps its 64 x 64 similarities
    assert peak[64, 32] > 3 * peak[64, 8]
    whole = saved_bytes(model, lambda: loss(model(pictures(64))).backward())
    assert peak[64, 8] < whole / 6
