"""SimCLR: NT-Xent against its equation written as a slow loop, and against closed forms."""
import math

import pytest
import torch

import simclr


def slow_nt_xent(z1, z2, temperature):
    """SimCLR, equation 1: the mean over i, with j the partner of i, of
    -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) )."""
    z, batch = [*z1, *z2], len(z1)
    similarity = lambda i, k: float(z[i] @ z[k] / (z[i].norm() * z[k].norm()))
    total = 0
    for i in range(2 * batch):
        partner = i + batch if i < batch else i - batch
        others = [k for k in range(2 * batch) if k != i]
        denominator = sum(math.exp(similarity(i, k) / temperature) for k in others)
        total -= math.log(math.exp(similarity(i, partner) / temperature) / denominator)
    return total / (2 * batch)


def random_views(batch, dim, dtype=torch.float64):
    return torch.randn(batch, dim, dtype=dtype), torch.randn(batch, dim, dtype=dtype)


@pytest.mark.parametrize("batch, dim, temperature", [
    (1, 3, 0.5),
    (2, 2, 1.0),
    (5, 4, 0.2),
    (8, 16, 0.05)])
def test_nt_xent_is_the_mean_of_the_equation_over_all_views(batch, dim, temperature):
    z1, z2 = random_views(batch, dim)
    expected = slow_nt_xent(z1, z2, temperature)
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(expected, abs=1e-12)


def test_nt_xent_has_the_right_first_and_second_derivative():  # bissl.py differentiates it twice
    views = [z.requires_grad_() for z in random_views(3, 4)]
    loss = lambda z1, z2: simclr.nt_xent(z1, z2, 0.5)
    assert torch.autograd.gradcheck(loss, views)
    assert torch.autograd.gradgradcheck(loss, views)


@pytest.mark.parametrize("batch", [2, 3, 10])
def test_nt_xent_of_collinear_embeddings_is_log_of_the_number_of_candidates(batch):
    line = torch.randn(5, dtype=torch.float64)
    lengths = torch.rand(2, batch, 1, dtype=torch.float64) + 0.1
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
    expected = simclr.nt_xent(z1, z2, 0.2)
    torch.testing.assert_close(simclr.nt_xent(lengths * z1, z2, 0.2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nt_xent_keeps_the_dtype(dtype):
    assert simclr.nt_xent(*random_views(4, 3, dtype), 0.2).dtype == dtype


# exp(1 / 0.005) is more than float32 can hold.
@pytest.mark.parametrize("temperature", [0.05, 0.005])
def test_nt_xent_does_not_overflow_in_float32_at_a_low_temperature(temperature):
    z1, z2 = random_views(8, 4)
    loss = simclr.nt_xent(z1.float(), z2.float(), temperature).item()
    assert loss == pytest.approx(simclr.nt_xent(z1, z2, temperature).item(), rel=1e-4)
