"""BiSSL: conjugate gradients, the inverse Hessian, and the upper level's gradient, against dense
algebra in float64."""
import copy
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_nothing, write_folder
from torch import nn

import bissl
import common
import simclr
from bench_bilevel import layerwise

SHAPES = (2, 3), (4,), (1, 2, 2)  # three tensors, 14 numbers


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    draw_nothing(monkeypatch)


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


def plain(matvec, b, steps):
    """Looks the function up at each call: grading puts a submission's in its place."""
    return bissl.conjugate_gradient(matvec, b, steps)


def solve(A, b, steps, solver=plain, shapes=SHAPES):
    """A solver's answer as one vector; it has b in pieces of the given shapes."""
    def matvec(v):
        return unflat(A @ flat(v), shapes)

    return flat(solver(matvec, unflat(b, shapes), steps))


def with_a_list(matvec, b, steps):
    return bissl.conjugate_gradient(matvec, b, steps, 0, [])


EACH = pytest.mark.parametrize("solver", [plain, with_a_list, layerwise])


# ------------------------------------------------------------------------------ conjugate gradients

@pytest.mark.parametrize("shapes", [
    SHAPES, ((5,),), ((1,), (1,)), ((3, 2, 1, 1), (2,), (2,), (4, 2))])
def test_conjugate_gradients_solve_a_system_of_n_unknowns_in_n_steps(shapes):
    A, b = random_system(shapes)
    x = solve(A, b, len(b), plain, shapes)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_conjugate_gradients_stop_at_the_best_point_of_the_krylov_space(steps):
    """Best: of all x in span(b, A b, ..., A^(k-1) b), the one with the smallest error
    (x - x*)^T A (x - x*)."""
    A, b = random_system()
    krylov = torch.stack([torch.linalg.matrix_power(A, k) @ b for k in range(steps)], dim=1)
    basis = torch.linalg.qr(krylov).Q
    best = basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ b)
    torch.testing.assert_close(solve(A, b, steps, plain), best, rtol=0, atol=1e-10)


def test_one_step_goes_along_b_by_alpha():
    A, b = random_system()
    torch.testing.assert_close(solve(A, b, 1, plain), (b @ b) / (b @ A @ b) * b)


@EACH
def test_no_step_gives_zero(solver):
    A, b = random_system()
    assert not solve(A, b, 0, solver).any()


@EACH
def test_a_zero_right_hand_side_gives_zero(solver):
    A, b = random_system()
    assert torch.equal(solve(A, 0 * b, 5, solver), 0 * b)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_further_steps_stay_at_the_solution(scale, dtype, solver):
    """The residual goes on shrinking until its square underflows: 0 / 0 must not turn the solution
    into NaN."""
    A = scale * torch.diag(torch.tensor([1, 2, 2, 3], dtype=dtype))
    b = torch.ones(4, dtype=dtype)
    x = solve(A, b, 60, solver, ((4,),))  # after 33 at most the square is 0
    torch.testing.assert_close(x, torch.linalg.solve(A, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_conjugate_gradients_scale_with_b(size, dtype):
    A = spd(14).to(dtype)
    b = torch.randn(14, dtype=dtype)
    torch.testing.assert_close(solve(A, size * b, 14) / size, solve(A, b, 14), rtol=1e-4, atol=1e-6)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_keep_dtype_and_shapes(dtype, solver):
    b = tuple(torch.randn(shape, dtype=dtype) for shape in SHAPES)
    x = solver(lambda v: v, b, 3)
    assert [(t.dtype, t.shape) for t in x] == [(dtype, torch.Size(shape)) for shape in SHAPES]


@EACH
def test_conjugate_gradients_do_not_change_b(solver):
    b = tuple(torch.randn(shape) for shape in SHAPES)
    before = copy.deepcopy(b)
    solver(lambda v: tuple(2 * t for t in v), b, 3)
    assert all(map(torch.equal, b, before))


# ------------------------------------- the bench's layer-wise variant, which the authors released

def slow_layerwise(A, b, steps, shapes):
    """A couples all tensors, but each takes alpha and beta from its own numbers only."""
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
    expected = slow_layerwise(A, b, steps, SHAPES)
    torch.testing.assert_close(solve(A, b, steps, layerwise), expected)
    assert not torch.allclose(solve(A, b, steps, plain), expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_layerwise_on_uncoupled_tensors_solves_each_alone(steps):
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    blocks, b = [spd(n) for n in sizes], [torch.randn(n, dtype=torch.float64) for n in sizes]
    alone = torch.cat([solve(A, v, steps, plain, (v.shape,)) for A, v in zip(blocks, b)])
    x = solve(torch.block_diag(*blocks), torch.cat(b), steps, layerwise)
    torch.testing.assert_close(x, alone)


def test_layerwise_on_one_tensor_is_the_plain_variant():
    A, b = random_system(((3, 4),))
    x = solve(A, b, 4, layerwise, ((3, 4),))
    torch.testing.assert_close(x, solve(A, b, 4, plain, ((3, 4),)))


def test_layerwise_solves_with_the_dense_hessian():
    loss, params, vector = tiny_network()
    gradient = torch.autograd.grad(loss(*params), params, create_graph=True)
    x = layerwise(bissl.damped_hessian(gradient, params, 10), vector, 2)
    A = torch.eye(26, dtype=torch.float64) + dense_hessian(loss, params) / 10
    shapes = [p.shape for p in params]
    torch.testing.assert_close(flat(x), slow_layerwise(A, flat(vector), 2, shapes))


# --------------------------------------------------------- directions that several solves share

def solve_in_a_row(A, rights, steps, tolerance, most=99, shapes=SHAPES):
    """conjugate_gradient() for one right-hand side after the other, with the directions kept as
    train() keeps them: answers, products after each, and the directions in the end."""
    directions, answers, products, made = [], [], [], []

    def matvec(v):
        made.append(v)
        return unflat(A @ flat(v), shapes)

    for b in rights:
        x = bissl.conjugate_gradient(matvec, unflat(b, shapes), steps, tolerance, directions)
        answers.append(flat(x))
        products.append(len(made))
        directions = bissl.reusable(directions, most)
    return answers, products, directions


def few_large(n=14):
    """A = I + small + three large eigenvalues, as BiSSL's (I + H/damping) is, and three right-hand
    sides."""
    A = torch.eye(n, dtype=torch.float64) + 0.05 * spd(n)
    for size in (30, 8, 3):
        u = torch.randn(n, dtype=torch.float64)
        A = A + size * torch.outer(u, u) / (u @ u)
    return A, torch.randn(3, n, dtype=torch.float64)


def residual(A, x, b):
    return ((b - A @ x).norm() / b.norm()).item()


@pytest.mark.parametrize("shapes", [SHAPES, ((14,),), ((1,), (13,))])
def test_solves_in_a_row_are_exact_after_enough_steps(shapes):
    A, rights = spd(14), torch.randn(4, 14, dtype=torch.float64)
    answers, _, _ = solve_in_a_row(A, rights, 20, 1e-12, shapes=shapes)
    for x, b in zip(answers, rights):
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_empty_list_of_directions_is_filled_and_changes_no_bit(steps):
    A, b = random_system()
    (x,), _, directions = solve_in_a_row(A, [b], steps, 0)
    assert torch.equal(x, solve(A, b, steps, plain))
    assert len(directions) == steps
    for p, Ap, pAp in directions:
        torch.testing.assert_close(Ap, A @ p)
        torch.testing.assert_close(pAp, p @ A @ p)


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
@pytest.mark.parametrize("most", [0, 2, 99])
def test_the_tolerance_is_kept_by_the_true_residual_and_not_outdone(tolerance, most):
    A, rights = few_large()
    answers, products, _ = solve_in_a_row(A, rights, 50, tolerance, most)
    for x, b in zip(answers, rights):
        assert residual(A, x, b) <= tolerance * (1 + 1e-9)
    fewer = solve_in_a_row(A, rights[:1], products[0] - 1, 0)[0][0]
    assert residual(A, fewer, rights[0]) > tolerance  # no step was made in vain


def test_each_step_reaches_the_best_point_of_all_directions_so_far():
    A, rights = few_large()
    answers, products, directions = solve_in_a_row(A, rights, 2, 0)
    assert products == [2, 4, 6]
    P = torch.stack([p for p, _, _ in directions], dim=1)
    conjugate = P.T @ A @ P
    best = P @ torch.linalg.solve(conjugate, P.T @ rights[-1])
    torch.testing.assert_close(answers[-1], best, rtol=0, atol=1e-10)
    assert (conjugate - conjugate.diag().diag()).abs().max() < 1e-9 * conjugate.max()


def test_shared_directions_save_products_where_few_eigenvalues_are_large():
    A, rights = few_large()
    shared, alone = (solve_in_a_row(A, rights, 50, 0.01, most)[1] for most in (99, 0))
    assert shared[0] == alone[0] and shared[-1] < 0.7 * alone[-1]


def test_the_same_right_hand_side_again_takes_no_product():
    A, rights = few_large()
    (first, again), products, _ = solve_in_a_row(A, rights[[0, 0]], 50, 0.01)
    assert products[0] == products[1]
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_directions_are_kept_than_the_bound_and_the_first_stay(most):
    A, rights = few_large()
    _, _, directions = solve_in_a_row(A, rights, 3, 0, most)
    assert len(directions) == most
    for kept, first in zip(directions, solve_in_a_row(A, rights[:1], 3, 0)[2]):
        assert torch.equal(kept[0], first[0])


def test_a_zero_right_hand_side_after_another_gives_zero_and_no_product():
    A, rights = few_large()
    answers, products, _ = solve_in_a_row(A, [rights[0], 0 * rights[0]], 5, 0.1)
    assert products[0] == products[1] and torch.equal(answers[1], 0 * rights[0])


def test_an_indefinite_matrix_is_solved_but_no_direction_of_negative_curvature_is_kept():
    A = torch.diag(torch.tensor([4, 2, 1, -1.5], dtype=torch.float64))
    rights = torch.tensor([[0, 0, 0, 1], [1, 2, 3, 4], [1, 1, 1, 1]], dtype=torch.float64)
    answers, _, directions = solve_in_a_row(A, rights, 50, 1e-9, shapes=((4,),))
    for x, b in zip(answers, rights):
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=0, atol=1e-7)
    assert directions and all(curvature > 0 for _, _, curvature in directions)


def test_a_solve_stops_where_the_matrix_has_no_answer():
    A = torch.diag(torch.tensor([1, -1.0], dtype=torch.float64))
    b = torch.ones(2, dtype=torch.float64)
    (x,), products, directions = solve_in_a_row(A, [b], 50, 0.1, shapes=((2,),))
    assert torch.equal(x, 0 * b) and products == [1] and not directions  # b . A b = 0


@pytest.mark.parametrize("tolerance", [0, 0.1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_product_shows_in_the_answer(value, tolerance):
    b, directions = (torch.ones(3),), []
    x, = bissl.conjugate_gradient(lambda v: (value * v[0],), b, 3, tolerance, directions)
    assert not x.isfinite().all()
    assert not bissl.relative_residual(b, directions).isfinite()


@pytest.mark.parametrize("steps, tolerance", [(3, 0), (50, 0.05), (0, 0)])
def test_the_directions_of_a_solve_tell_its_residual(steps, tolerance):
    A, rights = few_large()
    directions = []
    for b in rights:
        x = bissl.conjugate_gradient(lambda v: (A @ v[0],), (b,), steps, tolerance, directions)[0]
        told = bissl.relative_residual((b,), directions).item()
        assert told == pytest.approx(residual(A, x, b), rel=1e-9)
        again, r = bissl.best_point(b, directions)
        assert torch.equal(again, x)


def test_inverse_hvp_shares_directions_and_keeps_its_tolerance():
    loss, params, vector = tiny_network()
    A = torch.eye(26, dtype=torch.float64) + dense_hessian(loss, params) / 10
    gradient = torch.autograd.grad(loss(*params), params, create_graph=True)
    directions, made = [], []
    for tolerance in (0.1, 1e-3, 1e-6):
        x = bissl.inverse_hvp(None, params, vector, 10, 40, gradient, tolerance, directions)
        assert residual(A, flat(x), flat(vector)) <= tolerance * (1 + 1e-6)
        made.append(len(directions))
    assert made[0] < made[1] < made[2] < 40  # it went on from the same directions
    alone = bissl.inverse_hvp(loss(*params), params, vector, 10, 40, tolerance=0.1)
    assert 1e-6 < residual(A, flat(alone), flat(vector)) <= 0.1


# ------------------------------------------------------------------------------ the inverse Hessian

def tiny_network():
    """Parameters of a tanh network, and a loss that is smooth and, near a minimum, convex."""
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    shapes = (4, 3), (4,), (2, 4), (2,)
    params = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)

    def loss(W1, b1, W2, b2):
        return F.mse_loss(F.linear(torch.tanh(F.linear(x, W1, b1)), W2, b2), y)
    return loss, params, tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def dense_hessian(loss, params):
    shapes = [p.shape for p in params]
    start = flat(params).detach()
    return torch.autograd.functional.hessian(lambda vector: loss(*unflat(vector, shapes)), start)


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
    expected = flat(vector) + dense_hessian(loss, params) @ flat(vector) / 3
    torch.testing.assert_close(flat(product), expected)


@pytest.mark.parametrize("damping", [0.5, 100])
def test_inverse_hvp_of_a_quadratic_has_a_closed_form(damping):
    """L = 1/2 theta^T A theta has H = A, so the answer is (I + A / damping)^-1 v."""
    A, v = random_system(((4,),))
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x, = bissl.inverse_hvp(theta @ A @ theta / 2, (theta,), (v,), damping, steps=4)
    inverse = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + A / damping)
    torch.testing.assert_close(x, inverse @ v)


def test_a_gradient_that_is_handed_in_changes_no_bit_and_can_be_used_again():
    loss, params, vector = tiny_network()
    fresh = bissl.inverse_hvp(loss(*params), params, vector, 10, 5)
    value = loss(*params)
    gradient = torch.autograd.grad(value, params, create_graph=True)
    for _ in range(2):
        reused = bissl.inverse_hvp(value, params, vector, 10, 5, gradient)
        assert all(map(torch.equal, fresh, reused))


def test_where_the_loss_is_linear_the_vector_comes_back_as_it_was():
    """There H is 0, so (I + H/damping)^-1 v = v."""
    curved = torch.ones(3, dtype=torch.float64, requires_grad=True)
    straight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    loss = curved.square().sum() + 5 * straight.sum()  # H = 2 I for the one, 0 for the other
    x, y = bissl.inverse_hvp(loss, (curved, straight), (v, v), damping=2, steps=2)
    torch.testing.assert_close((x, y), (v / 2, v))


def test_the_implicit_gradient_is_the_derivative_through_the_solved_lower_level():
    """The paper's theorem: with theta*(phi) = argmin L_P(theta) + lambda/2 ||theta - phi||^2,
    d/dphi L_D(theta*(phi)) = (I + H/lambda)^-1 d/dtheta L_D(theta*). L_P is quadratic, so that
    theta* is exact."""
    A, c = random_system(((5,),))
    lam, phi = 0.7, torch.randn(5, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)

    def pretext_loss(theta):
        return theta @ A @ theta / 2 - c @ theta

    def downstream_loss(theta):
        return theta.sin().sum() + theta.prod()

    def solution(phi):
        return torch.linalg.solve(A + lam * eye, c + lam * phi)

    slope = []
    for step in 1e-5 * eye:
        above, below = downstream_loss(solution(phi + step)), downstream_loss(solution(phi - step))
        slope.append((above - below) / 2e-5)

    theta = solution(phi).requires_grad_()
    g_theta = torch.autograd.grad(downstream_loss(theta), theta)
    implicit, = bissl.inverse_hvp(pretext_loss(theta), (theta,), g_theta, damping=lam, steps=5)
    torch.testing.assert_close(implicit, torch.stack(slope), rtol=0, atol=1e-8)


# ----------------------------------------------------------------------------- BatchNorm statistics

def batchnorm_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
                         nn.Linear(4 * 36, 5), nn.BatchNorm1d(5))


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


# ----------------------------------------------------------------------------- one whole upper step

@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The common flags of a tiny run on 36 pictures, with an epoch of SimCLR to start from."""
    folder = tmp_path_factory.mktemp("bissl")
    write_folder(folder / "pictures")
    shared = ["--data", str(folder / "pictures"), "--root", str(folder), "--device", "cpu",
              "--precision", "float32"]
    simclr.main([*shared, "--arch", "resnet10", "--image-size", "16", "--epochs", "1",
                 "--batch-size", "36", "--out", str(folder / "simclr")])
    return [*shared, "--ckpt", str(folder / "simclr.pt"), "--alternations", "1",
            "--head-epochs", "0", "--batch-size", "36", "--pretext-batch-size", "36"]


def run(flags, out):
    """The checkpoint that bissl.py started from, and the one that it wrote."""
    bissl.main([*flags, "--out", str(out)])
    start = common.load_checkpoint(flags[flags.index("--ckpt") + 1])
    return start, common.load_checkpoint(f"{out}.pt")


def test_the_upper_level_leaves_theta_alone_to_the_bit(pretrained, tmp_path):
    flags = [*pretrained, "--lower-steps", "2", "--lr", "0.1"]
    start, one_step = run([*flags, "--upper-steps", "1"], tmp_path / "one")
    _, three_steps = run([*flags, "--upper-steps", "3"], tmp_path / "three")
    for name in ("backbone", "head"):  # weights and BatchNorm statistics
        for key, value in one_step[name].items():
            assert torch.equal(value, three_steps[name][key])
        for key, value in start[name].items():
            if key.endswith("num_batches_tracked"):  # the two lower steps alone are counted
                assert one_step[name][key] == value + 2
    one, three = one_step["resume"]["upper_backbone"], three_steps["resume"]["upper_backbone"]
    assert not torch.equal(one["conv1.weight"], three["conv1.weight"])  # phi did move


def test_the_upper_step_takes_the_gradients_of_the_paper(pretrained, tmp_path, monkeypatch):
    """grad phi_B = (I + H/(lambda + gamma))^-1 g_theta + d/dphi_B L_D(phi_B, phi_H); grad phi_H is
    both losses'.

    Views without chance and batches that hold every picture let the test compute the same losses.
    After its first step the momentum of SGD is the gradient, clipped to a norm of 10; a learning
    rate near 0 leaves phi where the gradient was taken.
    """
    monkeypatch.setattr(common, "augment", lambda x, size, **settings: common.test_crop(x, size))
    lam, gamma = 20, 80
    flags = ["--lower-steps", "3", "--lower-warmup", "0", "--lower-lr", "0.01", "--upper-steps",
             "1", "--lr", "1e-12", "--weight-decay", "0", "--lam", str(lam),
             "--damping", str(gamma),
             "--cg-steps", "40", "--cg-tol", "1e-4", "--hessian-batch", "36"]
    start, end = run([*pretrained, *flags], tmp_path / "bissl")

    config, resume = Namespace(**start["config"], device="cpu"), end["resume"]
    theta_B = common.build_backbone("resnet10", small_stem=True)
    phi_B = common.build_backbone("resnet10", small_stem=True)
    theta, phi_H = simclr.make_model(theta_B, config), nn.Linear(phi_B.num_features, 3)
    theta_B.load_state_dict(end["backbone"])
    theta.head.load_state_dict(end["head"])
    phi_B.load_state_dict(resume["upper_backbone"])
    phi_H.load_state_dict(resume["upper_head"])
    optimizer = common.make_optimizer("sgd", [phi_B, phi_H], 0, 0)
    optimizer.load_state_dict(resume["upper_optimizer"])

    def taken(module):
        return [optimizer.state[p]["momentum_buffer"] / clipped for p in module.parameters()]

    args = bissl.parser().parse_args(
        [*pretrained, "--image-size", "16", "--out", str(tmp_path / "unused")])
    data = common.load_data(args, "trainval")
    x, labels = common.test_crop(data.images, 16), data.labels
    params = tuple(theta_B.parameters())
    of_theta = F.cross_entropy(phi_H(theta_B(x)), labels)
    of_phi = F.cross_entropy(phi_H(phi_B(x)), labels)
    g_theta = flat(torch.autograd.grad(of_theta, params, retain_graph=True))
    (of_theta + of_phi).backward(inputs=[*phi_B.parameters(), *phi_H.parameters()])
    of_head, clipped = flat([p.grad for p in phi_H.parameters()]), 1
    clipped = (flat(taken(phi_H)).norm() / of_head.norm()).item()
    torch.testing.assert_close(flat(taken(phi_H)), of_head, rtol=1e-3, atol=1e-5)
    norm = flat(taken(phi_B) + taken(phi_H)).norm().item()
    assert clipped == pytest.approx(min(1, 10 / norm), rel=1e-3) and norm > 10

    implicit = [whole - p.grad for whole, p in zip(taken(phi_B), phi_B.parameters())]
    # in float64: a ReLU that is 0 but for rounding can move this product by a hundredth
    theta, x = theta.double().to(memory_format=torch.contiguous_format), x.double().contiguous()
    params = tuple(theta.backbone.parameters())
    loss = simclr.loss(theta, [x, x], config)
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    Hv = torch.autograd.grad(gradient, params, [v.double() for v in implicit])
    assert flat(Hv).norm() > 10 * g_theta.norm()  # the Hessian matters: implicit is not g_theta
    left = g_theta - flat(implicit) - flat(Hv) / (lam + gamma)
    assert left.norm() < 0.01 * g_theta.norm()


def test_follow_is_the_share_of_phi_s_way_that_theta_has_come():
    start = (torch.zeros(2), torch.zeros(1, 1))
    phi = (torch.tensor([3.0, 0]), torch.tensor([[4.0]]))
    along = (torch.tensor([1.5, 9]), torch.tensor([[2.0]]))  # half of the way, and a way of its own
    away = (torch.tensor([0.0, 9]), torch.zeros(1, 1))
    for theta, share in ((start, 0), (phi, 1), (along, 0.5), (away, 0)):
        assert bissl.share_of_way(theta, phi, start) == share
    assert bissl.share_of_way(start, start, start) == 0  # no way was gone
    doubled = tuple(2 * p for p in phi)
    assert bissl.share_of_way(doubled, phi, start) == 2


def test_follow_is_counted_from_where_the_stage_began(pretrained, tmp_path):
    """Of two alternations: theta_B and phi_B against the checkpoint that the run started from."""
    flags = [*pretrained, "--alternations", "2", "--lower-steps", "2", "--upper-steps", "2",
             "--lr", "0.1", "--lam", "3", "--lower-warmup", "0", "--lower-lr", "0.01"]
    start, whole = run(flags, tmp_path / "whole")
    phi = whole["resume"]["upper_backbone"]
    way, come = [], []
    for name, _ in common.build_backbone("resnet10", small_stem=True).named_parameters():
        way.append((phi[name] - start["backbone"][name]).flatten().double())
        come.append((whole["backbone"][name] - start["backbone"][name]).flatten().double())
    way, come = torch.cat(way), torch.cat(come)
    share = (come @ way / (way @ way)).item()
    assert share > 0.01
    assert whole["resume"]["history"][-1]["follow"] == pytest.approx(share, rel=1e-4)
    for name, value in whole["resume"]["start_backbone"].items():
        assert torch.equal(value, start["backbone"][name])


@pytest.mark.parametrize("flags, said", [
    (["--lam", "1e-6"], "this was simclr continued. Raise --lam (now 1e-06)"),
    (["--damping", "1e-3", "--lam", "1e-9"], "the implicit gradient was noise. Raise --damping")])
def test_a_stage_that_was_none_says_so(pretrained, tmp_path, capsys, flags, said):
    usual = ["--alternations", "2", "--lower-steps", "1", "--upper-steps", "1", "--lr", "1e-4"]
    bissl.main([*pretrained, *usual, *flags, "--out", str(tmp_path / "bissl")])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("batch_size, said", [("8", True), ("36", False)])
def test_another_batch_size_than_the_pretexts_is_said(
        pretrained, tmp_path, capsys, batch_size, said):
    bissl.main([*pretrained, "--alternations", "1", "--lower-steps", "1", "--upper-steps", "1",
                "--pretext-batch-size", batch_size, "--out", str(tmp_path / "bissl")])
    had = f"batches of {batch_size}, where simclr had"
    assert (had in capsys.readouterr().out) == said


@pytest.mark.parametrize("labels, probed", [("4", True), ("0", False)])
def test_the_probe_asks_only_about_labels_that_were_held_out(pretrained, tmp_path, labels, probed):
    last = bissl.main([*pretrained, "--lower-steps", "1", "--upper-steps", "1",
                       "--labels-per-class", labels, "--out", str(tmp_path / "bissl")])
    assert (last["knn"] is not None) == (last["knn_phi"] is not None) == probed


@pytest.mark.parametrize("flags, images", [
    ([], 32), (["--hessian-batch", "100"], 36), (["--hessian-batch", "8"], 8)])
def test_the_hessian_is_taken_on_the_first_images_of_the_pretext_batch(
        pretrained, tmp_path, monkeypatch, flags, images):
    seen, usual = [], simclr.make_views
    batches, usual_batches = [], bissl.endless

    def endless(source):
        for x, y in usual_batches(source):
            if source.whole_only:
                batches.append(x)
            yield x, y

    def make_views(x, args):
        seen.append(x)
        return usual(x, args)

    monkeypatch.setattr(simclr, "make_views", make_views)
    monkeypatch.setattr(bissl, "endless", endless)
    bissl.main([*pretrained, "--lower-steps", "2", "--upper-steps", "2", *flags,
                "--out", str(tmp_path / "bissl")])
    assert [len(x) for x in seen] == [36, 36, images]  # two lower steps, then the Hessian
    assert torch.equal(seen[2], batches[2][:images])


def test_paper_gives_the_papers_figures_and_a_given_flag_wins(monkeypatch):
    seen = []
    monkeypatch.setattr(bissl, "train", seen.append)
    for data in ("petals", str(common.__file__).rsplit("/", 1)[0]):
        bissl.main(["--paper", "--data", data])
        bissl.main(["--data", data, "--alternations", "7", "--paper", "--damping", "30",
                    "--cg-tol", "0.2", "--hessian-batch", "64"])
        bissl.main(["--data", data])
        paper, given, usual = seen[-3:]
        assert (paper.alternations, paper.lower_steps, paper.upper_steps) == (500, 20, 8)
        assert (paper.lam, paper.damping, paper.head_epochs) == (0.001, 10, 20)
        assert (paper.cg_steps, paper.cg_tol, paper.recycle, paper.hessian_batch) == (5, 0, 0, 1024)
        assert (given.alternations, given.upper_steps, given.damping) == (7, 8, 30)
        assert (given.cg_tol, given.hessian_batch) == (0.2, 64)
        assert usual.alternations < 500 and usual.damping == 100


@pytest.mark.parametrize("flags, products", [
    ([], None), (["--recycle", "0", "--cg-tol", "0"], 10), (["--recycle", "0"], None),
    (["--recycle", "3", "--cg-tol", "0"], 10)])
def test_the_flags_reach_the_solver_and_its_products_and_worst_residual_are_logged(
        pretrained, tmp_path, monkeypatch, flags, products):
    solves, made, usual, usual_hessian = [], [], bissl.inverse_hvp, bissl.damped_hessian

    def damped_hessian(gradient, params, damping):
        product = usual_hessian(gradient, params, damping)

        def counted(v):
            made.append(v)
            return product(v)

        return counted

    def inverse_hvp(loss, params, vector, damping, steps, gradient, tolerance, directions):
        solves.append((tolerance, len(directions)))
        x = usual(loss, params, vector, damping, steps, gradient, tolerance, directions)
        Ax = usual_hessian(gradient, params, damping)(x)
        true.append(((flat(vector) - flat(Ax)).norm() / flat(vector).norm()).item())
        return x

    true = []
    monkeypatch.setattr(bissl, "damped_hessian", damped_hessian)
    monkeypatch.setattr(bissl, "inverse_hvp", inverse_hvp)
    last = bissl.main([*pretrained, "--lower-steps", "1", "--upper-steps", "2", *flags,
                       "--out", str(tmp_path / "bissl")])
    args = bissl.parser().parse_args([*pretrained, *flags, "--out", str(tmp_path / "unused")])
    (tolerance, before_first), (_, before_second) = solves
    assert tolerance == args.cg_tol and before_first == 0
    assert before_second <= args.recycle and (before_second > 0) == (args.recycle > 0)
    assert last["products"] == len(made) == (products or len(made)) and 1 <= last["products"] <= 10
    assert last["residual"] == pytest.approx(max(true), rel=1e-3, abs=1e-5)
