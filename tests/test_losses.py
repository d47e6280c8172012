"""NT-Xent, accuracy, k-NN, LARS and the learning-rate schedule, each against its equation written as a slow loop."""
import math

import pytest
import torch
from torch import nn

import common
import finetune
import simclr


# ------------------------------------------------------------------------------------------------------ NT-Xent

def slow_nt_xent(z1, z2, temperature):
    """SimCLR, equation 1: mean over i of -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) ), j the partner of i."""
    z, batch = [*z1, *z2], len(z1)
    similarity = lambda i, k: float(z[i] @ z[k] / (z[i].norm() * z[k].norm()))
    total = 0
    for i in range(2 * batch):
        partner = i + batch if i < batch else i - batch
        denominator = sum(math.exp(similarity(i, k) / temperature) for k in range(2 * batch) if k != i)
        total -= math.log(math.exp(similarity(i, partner) / temperature) / denominator)
    return total / (2 * batch)


def random_views(batch, dim, dtype=torch.float64):
    return torch.randn(batch, dim, dtype=dtype), torch.randn(batch, dim, dtype=dtype)


@pytest.mark.parametrize("batch, dim, temperature", [(1, 3, 0.5), (2, 2, 1.0), (5, 4, 0.2), (8, 16, 0.05)])
def test_nt_xent_is_the_mean_of_the_equation_over_all_views(batch, dim, temperature):
    z1, z2 = random_views(batch, dim)
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(slow_nt_xent(z1, z2, temperature), abs=1e-12)


def test_nt_xent_has_the_right_first_and_second_derivative():  # bissl.py differentiates it twice
    views = [z.requires_grad_() for z in random_views(3, 4)]
    loss = lambda z1, z2: simclr.nt_xent(z1, z2, 0.5)
    assert torch.autograd.gradcheck(loss, views)
    assert torch.autograd.gradgradcheck(loss, views)


@pytest.mark.parametrize("batch", [2, 3, 10])
def test_nt_xent_of_collinear_embeddings_is_log_of_the_number_of_candidates(batch):
    line, lengths = torch.randn(5, dtype=torch.float64), torch.rand(2, batch, 1, dtype=torch.float64) + 0.1
    z1, z2 = lengths * line
    assert simclr.nt_xent(z1, z2, 0.1).item() == pytest.approx(math.log(2 * batch - 1), abs=1e-12)


@pytest.mark.parametrize("batch, temperature", [(2, 0.5), (4, 0.1), (6, 1.0)])
def test_nt_xent_of_orthogonal_images_with_identical_views_has_a_closed_form(batch, temperature):
    z = torch.eye(batch, dtype=torch.float64)
    expected = math.log(1 + (2 * batch - 2) * math.exp(-1 / temperature))
    assert simclr.nt_xent(z, z, temperature).item() == pytest.approx(expected, abs=1e-12)


def test_nt_xent_of_one_image_is_zero_because_the_partner_is_the_only_candidate():
    assert simclr.nt_xent(*random_views(1, 4), 0.5).item() == 0


def test_nt_xent_does_not_depend_on_the_length_of_an_embedding():
    z1, z2 = random_views(4, 3)
    lengths = torch.tensor([[1e-3], [1], [7], [1e4]], dtype=torch.float64)
    torch.testing.assert_close(simclr.nt_xent(lengths * z1, z2, 0.2), simclr.nt_xent(z1, z2, 0.2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nt_xent_keeps_the_dtype(dtype):
    assert simclr.nt_xent(*random_views(4, 3, dtype), 0.2).dtype == dtype


@pytest.mark.parametrize("temperature", [0.05, 0.005])  # exp(1 / 0.005) is more than float32 can hold
def test_nt_xent_does_not_overflow_in_float32_at_a_low_temperature(temperature):
    z1, z2 = random_views(8, 4)
    loss = simclr.nt_xent(z1.float(), z2.float(), temperature).item()
    assert loss == pytest.approx(simclr.nt_xent(z1, z2, temperature).item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------- accuracy

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


@pytest.mark.parametrize("images, classes", [(50, 10), (200, 7), (30, 5), (30, 3), (4, 20), (1, 2)])
def test_metrics_are_those_of_a_slow_loop(images, classes):  # 4 images of 20 classes: most classes have none
    labels = torch.randint(classes, (images,))
    logits = torch.randn(images, classes) + nn.functional.one_hot(labels, classes)  # better than chance
    assert finetune.metrics(logits, labels)[0] == pytest.approx(slow_metrics(logits, labels), rel=1e-6)


def test_mean_class_accuracy_counts_every_class_that_has_images_once():
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 0])]  # always class 0; class 2 has no image
    scores, _ = finetune.metrics(logits, torch.tensor([0, 0, 0, 1]))
    assert (scores["top1"], scores["mean_class"]) == (75, 50)


def test_the_confusion_matrix_has_true_classes_as_rows():
    _, confusion = finetune.metrics(torch.eye(3)[torch.tensor([1, 1, 2])], torch.tensor([0, 0, 2]))
    assert confusion.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


def slow_knn(memory, memory_labels, query, query_labels, k, temperature):
    """Each of the k most similar images in memory votes exp(similarity / temperature) for its class."""
    hits = 0
    for x, label in zip(query, query_labels.tolist()):
        similarity = [float(x @ m / (x.norm() * m.norm())) for m in memory]
        votes = {}
        for i in sorted(range(len(memory)), key=lambda i: -similarity[i])[:k]:
            votes[int(memory_labels[i])] = votes.get(int(memory_labels[i]), 0) + math.exp(similarity[i] / temperature)
        hits += max(votes, key=votes.get) == label
    return 100 * hits / len(query)


@pytest.mark.parametrize("memory, query, k, temperature", [
    (40, 60, 1, 0.1), (40, 60, 5, 0.1), (40, 60, 20, 0.1), (40, 60, 20, 10.0),
    (6, 30, 20, 0.1),      # more neighbours asked for than there are
    (5, 1100, 3, 0.1)])    # more queries than are compared at once
def test_knn_accuracy_is_that_of_a_slow_loop(memory, query, k, temperature):
    centres = torch.randn(4, 8, dtype=torch.float64)
    memory_labels, query_labels = torch.randint(4, (memory,)), torch.randint(4, (query,))
    memory, query = (centres[labels] + 1.5 * torch.randn(len(labels), 8, dtype=torch.float64)
                     for labels in (memory_labels, query_labels))
    problem = memory, memory_labels, query, query_labels, k, temperature
    assert common.knn_accuracy(*problem) == pytest.approx(slow_knn(*problem))


def test_knn_of_the_memory_itself_is_always_right_with_one_neighbour():
    x, labels = torch.randn(20, 4), torch.randint(3, (20,))
    assert common.knn_accuracy(x, labels, x, labels, k=1) == 100


# ------------------------------------------------------------------------------------------------- optimisation

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


@pytest.mark.parametrize("start", ["random", "zero"])  # a zero weight has no norm to adapt to: its trust ratio is 1
@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("decay", [0, 0.1])
def test_lars_follows_its_equation_parameter_by_parameter(start, adapt, decay):
    make = torch.randn if start == "random" else torch.zeros
    starts = [make(shape, dtype=torch.float64) for shape in ((3, 4), (2, 3, 2), (5,))]
    params = [nn.Parameter(w.clone()) for w in starts]
    gradients = [[torch.randn_like(w) for w in starts] for _ in range(4)]
    optimizer = common.LARS([dict(params=params, adapt=adapt)], lr=0.5, momentum=0.8, weight_decay=decay, eta=0.01)
    for step in gradients:
        for param, gradient in zip(params, step):
            param.grad = gradient.clone()
        optimizer.step()
    for i, param in enumerate(params):
        expected = slow_lars(starts[i], [step[i] for step in gradients], 0.5, 0.8, decay, 0.01, adapt)
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
    frozen, trained = nn.Linear(4, 4).requires_grad_(False), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights, others = common.make_optimizer(name, [frozen, trained], lr=0.1, weight_decay=0.3).param_groups
    assert [p is trained[0].weight for p in weights["params"]] == [True]
    assert {id(p) for p in others["params"]} == {id(p) for p in (trained[0].bias, trained[1].weight, trained[1].bias)}
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
    (0, 0, 1), (25, 0, 0.5 + 0.5 ** 1.5), (50, 0, 0.5), (100, 0, 0),        # cosine over all steps
    (0, 20, 1 / 20), (9, 20, 1 / 2), (19, 20, 1), (20, 20, 1), (60, 20, 0.5), (100, 20, 0)])
def test_the_learning_rate_has_its_closed_form(step, warmup, expected):
    assert schedule(4.0, 100, warmup)[step] == pytest.approx(4 * expected, abs=1e-12)


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


# ---------------------------------------------------------------------------------------------- moving averages

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


# ------------------------------------------------------------------------------------------- gradient caching

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
    assert torch.equal(torch.cat(noise[:half]), torch.cat(noise[half:]))  # the same views in both passes
    views = torch.cat(noise[:half])
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
    """The most bytes beside the weights that autograd held at once for backward passes during a call."""
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
    peak = {(batch, chunk): saved_bytes(model, lambda: common.chunked_backward(model, model, loss, pictures(batch), chunk))
            for batch, chunk in ((16, 8), (64, 8), (64, 32))}
    assert peak[64, 8] < 1.1 * peak[16, 8]  # the loss itself keeps its 64 x 64 similarities
    assert peak[64, 32] > 3 * peak[64, 8]
    whole = saved_bytes(model, lambda: loss(model(pictures(64))).backward())
    assert peak[64, 8] < whole / 6
