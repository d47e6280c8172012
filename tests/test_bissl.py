"""BiSSL: conjugate gradients, the inverse Hessian, and the upper level's gradient, against dense algebra in float64."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import write_folder
from torch import nn

import bissl
import common
import simclr

SHAPES = (2, 3), (4,), (1, 2, 2)  # three tensors, 14 numbers


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def unflat(vector, shapes):
    parts = vector.split([torch.Size(shape).numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes))


def spd(n, dtype=torch.float64):
    """A random symmetric positive definite matrix."""
    root = torch.randn(n, n, dtype=dtype)
    return root @ root.T / n + torch.eye(n, dtype=dtype)


def random_system(shapes=SHAPES):
    n = sum(torch.Size(shape).numel() for shape in shapes)
    return spd(n), torch.randn(n, dtype=torch.float64)


def solve(A, b, steps, layerwise=False, shapes=SHAPES):
    """conjugate_gradient() with b in pieces of the given shapes; the answer as one vector."""
    matvec = lambda v: unflat(A @ flat(v), shapes)
    return flat(bissl.conjugate_gradient(matvec, unflat(b, shapes), steps, layerwise))


# ------------------------------------------------------------------------------------------- conjugate gradients

@pytest.mark.parametrize("shapes", [SHAPES, ((5,),), ((1,), (1,)), ((3, 2, 1, 1), (2,), (2,), (4, 2))])
def test_conjugate_gradients_solve_a_system_of_n_unknowns_in_n_steps(shapes):
    A, b = random_system(shapes)
    torch.testing.assert_close(solve(A, b, len(b), shapes=shapes), torch.linalg.solve(A, b), rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_conjugate_gradients_stop_at_the_best_point_of_the_krylov_space(steps):
    """Best: of all x in span(b, A b, ..., A^(k-1) b), the one with the smallest error (x - x*)^T A (x - x*)."""
    A, b = random_system()
    krylov = torch.stack([torch.linalg.matrix_power(A, k) @ b for k in range(steps)], dim=1)
    basis = torch.linalg.qr(krylov).Q
    best = basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ b)
    torch.testing.assert_close(solve(A, b, steps), best, rtol=0, atol=1e-10)


def test_one_step_goes_along_b_by_alpha():
    A, b = random_system()
    torch.testing.assert_close(solve(A, b, 1), (b @ b) / (b @ A @ b) * b)


@pytest.mark.parametrize("layerwise", [False, True])
def test_no_step_gives_zero(layerwise):
    A, b = random_system()
    assert not solve(A, b, 0, layerwise).any()


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_zero_right_hand_side_gives_zero(layerwise):
    A, b = random_system()
    assert torch.equal(solve(A, 0 * b, 5, layerwise), 0 * b)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_further_steps_stay_at_the_solution(scale, dtype, layerwise):
    """The residual goes on shrinking until its square underflows: 0 / 0 must not turn the solution into NaN."""
    A, b = scale * torch.diag(torch.tensor([1, 2, 2, 3], dtype=dtype)), torch.ones(4, dtype=dtype)
    x = solve(A, b, 200, layerwise, shapes=((4,),))
    torch.testing.assert_close(x, torch.linalg.solve(A, b))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_keep_dtype_and_shapes(dtype, layerwise):
    b = tuple(torch.randn(shape, dtype=dtype) for shape in SHAPES)
    x = bissl.conjugate_gradient(lambda v: v, b, 3, layerwise)
    assert [(t.dtype, t.shape) for t in x] == [(dtype, torch.Size(shape)) for shape in SHAPES]


@pytest.mark.parametrize("layerwise", [False, True])
def test_conjugate_gradients_do_not_change_b(layerwise):
    b = tuple(torch.randn(shape) for shape in SHAPES)
    before = copy.deepcopy(b)
    bissl.conjugate_gradient(lambda v: tuple(2 * t for t in v), b, 3, layerwise)
    assert all(map(torch.equal, b, before))


def slow_layerwise(A, b, steps, shapes):
    """The released code's variant: A couples all tensors, but each takes alpha and beta from its own numbers only."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(steps):
        Ap, start = A @ p, 0
        for shape in shapes:
            own = slice(start, start + torch.Size(shape).numel())
            rr = r[own] @ r[own]
            alpha = rr / (p[own] @ Ap[own])
            x[own] += alpha * p[own]
            r[own] -= alpha * Ap[own]
            beta = (r[own] @ r[own]) / rr
            p[own] = r[own] + beta * p[own]
            start = own.stop
    return x


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_layerwise_takes_step_lengths_of_its_own_for_each_tensor(steps):
    A, b = random_system()
    torch.testing.assert_close(solve(A, b, steps, layerwise=True), slow_layerwise(A, b, steps, SHAPES))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_layerwise_on_uncoupled_tensors_solves_each_alone(steps):
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    blocks, b = [spd(n) for n in sizes], [torch.randn(n, dtype=torch.float64) for n in sizes]
    alone = torch.cat([solve(A, v, steps, shapes=(v.shape,)) for A, v in zip(blocks, b)])
    torch.testing.assert_close(solve(torch.block_diag(*blocks), torch.cat(b), steps, layerwise=True), alone)


def test_layerwise_on_one_tensor_is_the_plain_variant():
    A, b = random_system(((3, 4),))
    assert torch.equal(solve(A, b, 4, layerwise=True, shapes=((3, 4),)), solve(A, b, 4, shapes=((3, 4),)))


# -------------------------------------------------------------------------------- recycled conjugate gradients

def solve_in_a_row(A, rights, steps, tolerance, most=99, shapes=SHAPES):
    """recycled_conjugate_gradient() for one right-hand side after the other: answers, products after each, what was kept."""
    recycled, answers, products = bissl.Recycled(most), [], []
    for b in rights:
        x = bissl.recycled_conjugate_gradient(lambda v: unflat(A @ flat(v), shapes), unflat(b, shapes), steps, tolerance, recycled)
        answers.append(flat(x))
        products.append(recycled.products)
    return answers, products, recycled


def few_large(n=14):
    """A = I + small + three large eigenvalues, as BiSSL's (I + H/damping) is, and three right-hand sides."""
    return torch.eye(n, dtype=torch.float64) + 0.05 * spd(n) + sum(
        size * torch.outer(u, u) / (u @ u) for size, u in zip((30, 8, 3), torch.randn(3, n, dtype=torch.float64))), \
        torch.randn(3, n, dtype=torch.float64)


def residual(A, x, b):
    return ((b - A @ x).norm() / b.norm()).item()


@pytest.mark.parametrize("shapes", [SHAPES, ((14,),), ((1,), (13,))])
def test_recycled_solves_in_a_row_are_exact_after_enough_steps(shapes):
    A, rights = spd(14), torch.randn(4, 14, dtype=torch.float64)
    answers, _, _ = solve_in_a_row(A, rights, 20, 1e-12, shapes=shapes)
    for x, b in zip(answers, rights):
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_first_recycled_solve_is_plain_conjugate_gradients(steps):
    A, b = random_system()
    torch.testing.assert_close(solve_in_a_row(A, [b], steps, 0)[0][0], solve(A, b, steps))


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
@pytest.mark.parametrize("most", [0, 2, 99])
def test_the_tolerance_is_kept_by_the_true_residual_and_not_outdone(tolerance, most):
    A, rights = few_large()
    answers, products, _ = solve_in_a_row(A, rights, 50, tolerance, most)
    assert all(residual(A, x, b) <= tolerance * (1 + 1e-9) for x, b in zip(answers, rights))
    fewer = products[0] - 1
    assert residual(A, solve_in_a_row(A, rights[:1], fewer, 0)[0][0], rights[0]) > tolerance  # no step was made in vain


def test_each_recycled_step_reaches_the_best_point_of_all_directions_so_far():
    A, rights = few_large()
    answers, products, recycled = solve_in_a_row(A, rights, 2, 0)
    assert products == [2, 4, 6]
    P = torch.stack([p for p, _, _ in recycled.directions], dim=1)
    torch.testing.assert_close(answers[-1], P @ torch.linalg.solve(P.T @ A @ P, P.T @ rights[-1]), rtol=0, atol=1e-10)
    conjugate = P.T @ A @ P
    assert (conjugate - conjugate.diag().diag()).abs().max() < 1e-9 * conjugate.max()


def test_recycling_saves_products_where_few_eigenvalues_are_large():
    A, rights = few_large()
    recycled, alone = (solve_in_a_row(A, rights, 50, 0.01, most)[1] for most in (99, 0))
    assert recycled[0] == alone[0] and recycled[-1] < 0.7 * alone[-1]


def test_the_same_right_hand_side_again_takes_no_product():
    A, rights = few_large()
    (first, again), products, _ = solve_in_a_row(A, rights[[0, 0]], 50, 0.01)
    assert products[0] == products[1]
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_directions_are_kept_than_the_bound_and_the_first_stay(most):
    A, rights = few_large()
    _, _, recycled = solve_in_a_row(A, rights, 3, 0, most)
    assert len(recycled.directions) == most
    for kept, first in zip(recycled.directions, solve_in_a_row(A, rights[:1], 3, 0)[2].directions):
        assert torch.equal(kept[0], first[0])


def test_a_recycled_solve_of_zero_gives_zero_and_no_product():
    A, rights = few_large()
    answers, products, _ = solve_in_a_row(A, [rights[0], 0 * rights[0]], 5, 0.1)
    assert products[0] == products[1] and torch.equal(answers[1], 0 * rights[0])


def test_a_recycled_solve_with_an_indefinite_matrix_goes_on_but_keeps_no_direction_of_negative_curvature():
    A = torch.diag(torch.tensor([4, 2, 1, -1.5], dtype=torch.float64))
    rights = torch.eye(4, dtype=torch.float64)[3], torch.tensor([1, 2, 3, 4], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    answers, _, recycled = solve_in_a_row(A, rights, 50, 1e-9, shapes=((4,),))
    for x, b in zip(answers, rights):
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=0, atol=1e-7)
    assert recycled.directions and all(curvature > 0 for _, _, curvature in recycled.directions)


def test_a_recycled_solve_stops_where_the_matrix_has_no_answer():
    A, b = torch.diag(torch.tensor([1, -1.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    (x,), products, recycled = solve_in_a_row(A, [b], 50, 0.1, shapes=((2,),))
    assert torch.equal(x, 0 * b) and products == [1] and not recycled.directions  # b . A b = 0: no step length


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_product_shows_in_a_recycled_answer(value):
    b = (torch.ones(3),)
    x, = bissl.recycled_conjugate_gradient(lambda v: (value * v[0],), b, 3, 0.1, bissl.Recycled(5))
    assert not x.isfinite().all()


def test_inverse_hvp_recycles_and_keeps_its_tolerance():
    loss, params, vector = tiny_network()
    A = torch.eye(26, dtype=torch.float64) + dense_hessian(loss, params) / 10
    recycled, gradient = bissl.Recycled(20), torch.autograd.grad(loss(*params), params, create_graph=True)
    for tolerance in (0.1, 1e-3, 1e-6):
        x = bissl.inverse_hvp(None, params, vector, 10, 40, gradient=gradient, tolerance=tolerance, recycled=recycled)
        assert residual(A, flat(x), flat(vector)) <= tolerance * (1 + 1e-6)
    alone = bissl.inverse_hvp(loss(*params), params, vector, 10, 40, tolerance=0.1)
    assert 1e-6 < residual(A, flat(alone), flat(vector)) <= 0.1


# --------------------------------------------------------------------------------------------- inverse Hessian

def tiny_network():
    """Parameters of a tanh network, and a loss that is smooth and, near a minimum, convex in them."""
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    shapes = (4, 3), (4,), (2, 4), (2,)
    params = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)

    def loss(W1, b1, W2, b2):
        return F.mse_loss(F.linear(torch.tanh(F.linear(x, W1, b1)), W2, b2), y)
    return loss, params, tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def dense_hessian(loss, params):
    shapes = [p.shape for p in params]
    return torch.autograd.functional.hessian(lambda vector: loss(*unflat(vector, shapes)), flat(params).detach())


@pytest.mark.parametrize("damping", [1, 10.001])
def test_inverse_hvp_solves_with_the_dense_hessian(damping):
    loss, params, vector = tiny_network()
    A = torch.eye(26, dtype=torch.float64) + dense_hessian(loss, params) / damping
    x = bissl.inverse_hvp(loss(*params), params, vector, damping, steps=40)
    torch.testing.assert_close(flat(x), torch.linalg.solve(A, flat(vector)), rtol=0, atol=1e-8)


def test_damped_hessian_multiplies_by_the_dense_hessian():
    loss, params, vector = tiny_network()
    gradient = torch.autograd.grad(loss(*params), params, create_graph=True)
    product = bissl.damped_hessian(gradient, params, 3)(vector)
    torch.testing.assert_close(flat(product), flat(vector) + dense_hessian(loss, params) @ flat(vector) / 3)


@pytest.mark.parametrize("damping", [0.5, 100])
def test_inverse_hvp_of_a_quadratic_has_a_closed_form(damping):
    """L = 1/2 theta^T A theta has H = A, so the answer is (I + A / damping)^-1 v."""
    A, v = random_system(((4,),))
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x, = bissl.inverse_hvp(theta @ A @ theta / 2, (theta,), (v,), damping, steps=4)
    torch.testing.assert_close(x, torch.linalg.inv(torch.eye(4, dtype=torch.float64) + A / damping) @ v)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_gradient_that_is_handed_in_changes_no_bit_and_can_be_used_again(layerwise):
    loss, params, vector = tiny_network()
    fresh = bissl.inverse_hvp(loss(*params), params, vector, 10, 5, layerwise)
    value = loss(*params)
    gradient = torch.autograd.grad(value, params, create_graph=True)
    for _ in range(2):
        reused = bissl.inverse_hvp(value, params, vector, 10, 5, layerwise, gradient)
        assert all(map(torch.equal, fresh, reused))


def test_layerwise_reaches_the_solver():
    loss, params, vector = tiny_network()
    plain = bissl.inverse_hvp(loss(*params), params, vector, 10, 2)
    layerwise = bissl.inverse_hvp(loss(*params), params, vector, 10, 2, layerwise=True)
    A = torch.eye(26, dtype=torch.float64) + dense_hessian(loss, params) / 10
    torch.testing.assert_close(flat(layerwise), slow_layerwise(A, flat(vector), 2, [p.shape for p in params]))
    assert not torch.allclose(flat(plain), flat(layerwise))


def test_where_the_loss_is_linear_the_vector_comes_back_as_it_was():
    """There H is 0, so (I + H/damping)^-1 v = v."""
    curved, straight = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    loss = curved.square().sum() + 5 * straight.sum()  # H = 2 I for the one, 0 for the other
    x, y = bissl.inverse_hvp(loss, (curved, straight), (v, v), damping=2, steps=2)
    torch.testing.assert_close((x, y), (v / 2, v))


def test_the_implicit_gradient_is_the_derivative_through_the_solved_lower_level():
    """The paper's theorem: with theta*(phi) = argmin L_P(theta) + lambda/2 ||theta - phi||^2,
    d/dphi L_D(theta*(phi)) = (I + H/lambda)^-1 d/dtheta L_D(theta*). L_P is quadratic, so that theta* is exact."""
    A, c = random_system(((5,),))
    lam, phi = 0.7, torch.randn(5, dtype=torch.float64)
    pretext_loss = lambda theta: theta @ A @ theta / 2 - c @ theta
    downstream_loss = lambda theta: theta.sin().sum() + theta.prod()
    solution = lambda phi: torch.linalg.solve(A + lam * torch.eye(5, dtype=torch.float64), c + lam * phi)

    step = 1e-5 * torch.eye(5, dtype=torch.float64)
    slope = [(downstream_loss(solution(phi + e)) - downstream_loss(solution(phi - e))) / 2e-5 for e in step]

    theta = solution(phi).requires_grad_()
    g_theta = torch.autograd.grad(downstream_loss(theta), theta)
    implicit, = bissl.inverse_hvp(pretext_loss(theta), (theta,), g_theta, damping=lam, steps=5)
    torch.testing.assert_close(implicit, torch.stack(slope), rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------ BatchNorm statistics

def batchnorm_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5))


def test_frozen_statistics_are_not_moved_by_a_forward_in_training_mode():
    model = batchnorm_network()
    before = copy.deepcopy(model.state_dict())
    with common.frozen_statistics(model):
        model(torch.randn(6, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_frozen_statistics_do_not_change_the_output():
    model, x = batchnorm_network(), torch.randn(6, 3, 8, 8)
    usual = copy.deepcopy(model)(x)  # with the batch's own mean and variance, as always in training
    with common.frozen_statistics(model):
        assert torch.equal(model(x), usual)


def moves(model):
    """Does a forward in training mode move the running averages?"""
    before = model[1].running_mean.clone()
    model(torch.randn(6, 3, 8, 8))
    return not torch.equal(model[1].running_mean, before)


def test_statistics_move_again_afterwards():
    model = batchnorm_network()
    with common.frozen_statistics(model):
        pass
    assert moves(model)


def test_statistics_move_again_after_an_error():
    model = batchnorm_network()
    with pytest.raises(ValueError), common.frozen_statistics(model):
        raise ValueError
    assert moves(model)


# -------------------------------------------------------------------------------------------- one whole upper step

@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The common flags of a tiny run on 36 pictures, with an epoch of SimCLR to start from."""
    folder = tmp_path_factory.mktemp("bissl")
    write_folder(folder / "pictures")
    shared = ["--data", str(folder / "pictures"), "--root", str(folder), "--device", "cpu", "--precision", "float32"]
    simclr.main([*shared, "--arch", "resnet10", "--image-size", "16", "--epochs", "1", "--batch-size", "36",
                 "--out", str(folder / "simclr")])
    return [*shared, "--ckpt", str(folder / "simclr.pt"), "--alternations", "1", "--head-epochs", "0",
            "--batch-size", "36", "--pretext-batch-size", "36"]


def run(flags, out):
    """The checkpoint that bissl.py started from, and the one that it wrote."""
    bissl.main([*flags, "--out", str(out)])
    return common.load_checkpoint(flags[flags.index("--ckpt") + 1]), common.load_checkpoint(f"{out}.pt")


def test_the_upper_level_leaves_theta_alone_to_the_bit(pretrained, tmp_path):
    flags = [*pretrained, "--lower-steps", "2", "--lr", "0.1"]
    start, one_step = run([*flags, "--upper-steps", "1"], tmp_path / "one")
    _, three_steps = run([*flags, "--upper-steps", "3"], tmp_path / "three")
    for name in ("backbone", "head"):  # weights and BatchNorm statistics
        assert all(torch.equal(value, three_steps[name][key]) for key, value in one_step[name].items())
        for key, value in start[name].items():
            if key.endswith("num_batches_tracked"):  # nothing but the two lower steps was counted, the Hessian neither
                assert one_step[name][key] == value + 2
    one, three = (end["resume"]["upper_backbone"]["conv1.weight"] for end in (one_step, three_steps))
    assert not torch.equal(one, three)  # phi did move


def test_the_upper_step_takes_the_gradients_of_the_paper(pretrained, tmp_path, monkeypatch):
    """grad phi_B = (I + H/(lambda + gamma))^-1 g_theta + d/dphi_B L_D(phi_B, phi_H); grad phi_H is both losses'.

    Views without chance and batches that hold every picture let the test compute the same losses. After its first step
    the momentum of SGD is the gradient; a learning rate near 0 leaves phi where the gradient was taken.
    """
    monkeypatch.setattr(common, "augment", lambda x, size, **settings: common.test_crop(x, size))
    lam, gamma = 20, 80
    start, end = run([*pretrained, "--lower-steps", "3", "--lower-warmup", "0", "--lower-lr", "0.01",
                      "--upper-steps", "1", "--lr", "1e-12", "--weight-decay", "0",
                      "--lam", str(lam), "--damping", str(gamma), "--cg-steps", "15", "--cg-tol", "1e-4"], tmp_path / "bissl")

    config, resume = start["config"], end["resume"]
    theta_B, phi_B = (common.build_backbone("resnet10", small_stem=True) for _ in range(2))
    theta, phi_H = simclr.make_model(theta_B, config), nn.Linear(phi_B.num_features, 3)
    for part, state in ((theta_B, end["backbone"]), (theta.head, end["head"]), (phi_B, resume["upper_backbone"]),
                        (phi_H, resume["upper_head"])):
        part.load_state_dict(state)
    optimizer = common.make_optimizer("sgd", [phi_B, phi_H], 0, 0)
    optimizer.load_state_dict(resume["upper_optimizer"])
    taken = lambda module: [optimizer.state[p]["momentum_buffer"] for p in module.parameters()]

    args = bissl.parser().parse_args([*pretrained, "--image-size", "16", "--out", str(tmp_path / "unused")])
    data = common.load_data(args, "trainval")
    x, labels = common.test_crop(data.images, 16), data.labels
    params = tuple(theta_B.parameters())
    of_theta, of_phi = F.cross_entropy(phi_H(theta_B(x)), labels), F.cross_entropy(phi_H(phi_B(x)), labels)
    g_theta = flat(torch.autograd.grad(of_theta, params, retain_graph=True))
    (of_theta + of_phi).backward(inputs=[*phi_B.parameters(), *phi_H.parameters()])
    torch.testing.assert_close(flat(taken(phi_H)), flat(p.grad for p in phi_H.parameters()), rtol=1e-3, atol=1e-5)

    implicit = [taken - p.grad for taken, p in zip(taken(phi_B), phi_B.parameters())]
    # in float64: a ReLU that is 0 but for rounding can move this product by a hundredth
    theta, x = theta.double().to(memory_format=torch.contiguous_format), x.double().contiguous()
    params = tuple(theta.backbone.parameters())
    gradient = torch.autograd.grad(simclr.loss(theta, [x, x], config), params, create_graph=True)
    Hv = torch.autograd.grad(gradient, params, [v.double() for v in implicit])
    assert flat(Hv).norm() > 10 * g_theta.norm()  # the Hessian matters: without it implicit would be g_theta
    residual = flat(implicit) + flat(Hv) / (lam + gamma) - g_theta
    assert residual.norm() < 0.01 * g_theta.norm()


@pytest.mark.parametrize("labels, probed", [("4", True), ("0", False)])
def test_the_probe_asks_only_about_labels_that_were_held_out(pretrained, tmp_path, labels, probed):
    last = bissl.main([*pretrained, "--lower-steps", "1", "--upper-steps", "1", "--labels-per-class", labels,
                       "--out", str(tmp_path / "bissl")])
    assert (last["knn"] is not None) == probed


@pytest.mark.parametrize("flags, images", [([], 36), (["--hessian-batch", "36"], 36), (["--hessian-batch", "8"], 8)])
def test_the_hessian_is_taken_on_the_first_images_of_the_pretext_batch(pretrained, tmp_path, monkeypatch, flags, images):
    seen, usual = [], simclr.make_views
    batches, usual_batches = [], bissl.endless

    def endless(data, batch_size, whole_only):
        for x, y in usual_batches(data, batch_size, whole_only):
            batches.append(x) if whole_only else None
            yield x, y

    monkeypatch.setattr(simclr, "make_views", lambda x, config: (seen.append(x), usual(x, config))[1])
    monkeypatch.setattr(bissl, "endless", endless)
    bissl.main([*pretrained, "--lower-steps", "2", "--upper-steps", "2", *flags, "--out", str(tmp_path / "bissl")])
    assert [len(x) for x in seen] == [36, 36, images]  # two lower steps, then the Hessian
    assert torch.equal(seen[2], batches[2][:images])


def test_paper_gives_the_papers_figures_and_a_given_flag_wins(monkeypatch):
    seen = []
    monkeypatch.setattr(bissl, "train", seen.append)
    for data in ("petals", str(common.__file__).rsplit("/", 1)[0]):
        bissl.main(["--paper", "--data", data])
        bissl.main(["--data", data, "--alternations", "7", "--paper", "--damping", "30", "--cg-tol", "0.2", "--hessian-batch", "64"])
        bissl.main(["--data", data])
        paper, given, usual = seen[-3:]
        assert (paper.alternations, paper.lower_steps, paper.upper_steps, paper.lam, paper.damping, paper.cg_steps, paper.cg_tol,
                paper.recycle, paper.hessian_batch, paper.head_epochs, paper.layerwise) == (500, 20, 8, 0.001, 10, 5, 0, 0, None, 20, False)
        assert (given.alternations, given.upper_steps, given.damping, given.cg_tol, given.hessian_batch) == (7, 8, 30, 0.2, 64)
        assert usual.alternations < 500 and usual.damping == 100


@pytest.mark.parametrize("flags, solver, products", [
    ([], "recycled", None), (["--recycle", "0", "--cg-tol", "0"], "plain", 10), (["--layerwise"], "layerwise", 10),
    (["--recycle", "0"], "recycled", None), (["--cg-tol", "0"], "recycled", 10)])
def test_the_flags_choose_the_solver_and_its_products_are_counted(pretrained, tmp_path, monkeypatch, flags, solver, products):
    used, plain, recycled = [], bissl.conjugate_gradient, bissl.recycled_conjugate_gradient
    monkeypatch.setattr(bissl, "conjugate_gradient", lambda *a: (used.append("layerwise" if a[3] else "plain"), plain(*a))[1])
    monkeypatch.setattr(bissl, "recycled_conjugate_gradient", lambda *a: (used.append("recycled"), recycled(*a))[1])
    last = bissl.main([*pretrained, "--lower-steps", "1", "--upper-steps", "2", *flags, "--out", str(tmp_path / "bissl")])
    assert used == [solver] * 2
    assert last["products"] == products if products else 1 <= last["products"] <= 10
