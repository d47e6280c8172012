"""BYOL: the loss, the target network that is a constant to every derivative, the views, and the
pretext task of bissl.py."""
import copy
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bissl
import byol
import common
from conftest import draw_nothing, json_lines, write_folder


# --------------------------------------------------------------------------------------------- loss

def slow_byol_loss(p, z):
    """BYOL, equation 2: the mean over i of 2 - 2 <p_i, z_i> / (||p_i|| ||z_i||)."""
    total = 0
    for a, b in zip(p.double(), z.double()):
        inner = sum(s * t for s, t in zip(a, b))
        lengths = sum(s * s for s in a).sqrt() * sum(t * t for t in b).sqrt()
        total = total + 2 - 2 * inner / lengths
    return total / len(p)


def random_pair(batch, dim, dtype=torch.float64):
    return torch.randn(batch, dim, dtype=dtype), torch.randn(batch, dim, dtype=dtype)


@pytest.mark.parametrize("batch, dim", [(1, 3), (2, 2), (5, 4), (8, 16)])
def test_byol_loss_is_the_mean_of_the_equation(batch, dim):
    p, z = random_pair(batch, dim)
    torch.testing.assert_close(byol.byol_loss(p, z), slow_byol_loss(p, z), rtol=0, atol=1e-12)


def test_byol_loss_has_the_right_first_and_second_derivative():  # bissl.py differentiates it twice
    p, z = random_pair(3, 4)  # z is the target's, a constant
    assert torch.autograd.gradcheck(lambda p: byol.byol_loss(p, z), p.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda p: byol.byol_loss(p, z), p)


@pytest.mark.parametrize("angle, expected", [(0, 0), (60, 1), (90, 2), (180, 4)])
def test_byol_loss_of_a_known_angle_has_a_closed_form(angle, expected):
    p = torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    z = p @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    assert byol.byol_loss(p, z).item() == pytest.approx(expected, abs=1e-12)


def test_byol_loss_does_not_depend_on_the_lengths():
    p, z = random_pair(4, 3)
    lengths = torch.tensor([[1e-3], [1], [7], [1e4]], dtype=torch.float64)
    expected = byol.byol_loss(p, z)
    torch.testing.assert_close(byol.byol_loss(lengths * p, z), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(byol.byol_loss(p, lengths * z), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, expected", [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32)])
def test_byol_loss_keeps_the_dtype_unless_it_is_half(dtype, expected):
    assert byol.byol_loss(*random_pair(4, 3, dtype)).dtype == expected


def test_each_view_predicts_the_target_of_the_other():
    (p1, p2), (z1, z2) = random_pair(5, 4), random_pair(5, 4)
    expected = slow_byol_loss(p1, z2) + slow_byol_loss(p2, z1)
    loss = byol.symmetric_loss(torch.cat([p1, p2]), torch.cat([z1, z2]))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert abs(expected - slow_byol_loss(p1, z1) - slow_byol_loss(p2, z2)) > 0.1


def test_predictions_that_match_the_other_view_cost_nothing_and_those_that_match_their_own_do():
    z = torch.eye(6, dtype=torch.float64)
    assert byol.symmetric_loss(z.roll(3, 0), z).item() == 0
    assert byol.symmetric_loss(z, z).item() == 4


# -------------------------------------------------------------------------------------------- decay

@pytest.mark.parametrize("tau_base", [0, 0.9, 0.996, 1])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_decay_is_the_formula_of_the_paper_at_every_step(tau_base, steps):
    for k in range(steps + 1):
        expected = 1 - (1 - tau_base) * (math.cos(math.pi * k / steps) + 1) / 2
        assert byol.decay(tau_base, k, steps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau_base", [0, 0.9, 0.996, 1])
def test_decay_starts_at_tau_base_passes_the_middle_half_way_and_ends_at_exactly_one(tau_base):
    assert byol.decay(tau_base, 0, 50) == pytest.approx(tau_base, abs=1e-12)
    assert byol.decay(tau_base, 25, 50) == pytest.approx((tau_base + 1) / 2, abs=1e-12)
    assert byol.decay(tau_base, 50, 50) == 1


def test_decay_rises_at_every_step():
    taus = [byol.decay(0.9, k, 40) for k in range(41)]
    assert all(a < b for a, b in zip(taus, taus[1:]))


# -------------------------------------------------------------------------------------------- model

def small_model():
    """A network with BatchNorm in the backbone and in the heads, whose target is no longer a copy
    of it."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    backbone.num_features = 4 * 36
    model = byol.Model(backbone, hidden=6, out=5)
    with torch.no_grad():
        for param in model.head.target.parameters():
            param.add_(torch.randn_like(param))
    return model


def online(model):
    """The parameters that the target averages, in its order."""
    return [*model.backbone.parameters(), *model.head.projector.parameters()]


def cloned(tensors):
    return [t.detach().clone() for t in tensors]


def same(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    return all(map(torch.equal, one, other))


def test_the_target_starts_as_a_copy_of_backbone_and_projector_in_memory_of_its_own():
    backbone = common.build_backbone("resnet10", small_stem=True)
    model = byol.make_model(backbone, Namespace(hidden=6, dim=5))
    parts = model.backbone, model.head.projector
    for part, average in zip(parts, model.head.target, strict=True):
        assert part.state_dict().keys() == average.state_dict().keys()
        assert same(part.state_dict().values(), average.state_dict().values())
    held = {t.data_ptr() for part in parts for t in part.state_dict().values()}
    assert not held & {t.data_ptr() for t in model.head.target.state_dict().values()}


def test_the_networks_are_composed_as_in_the_paper():
    model, x = small_model(), torch.randn(6, 3, 8, 8)
    z, p, z_target = model(x)
    torch.testing.assert_close(z, model.head.projector(model.backbone(x)))
    torch.testing.assert_close(p, model.head.predictor(z))
    torch.testing.assert_close(z_target, model.head.target[1](model.head.target[0](x)))
    assert z.shape == p.shape == z_target.shape == (6, 5)


def test_no_gradient_flows_into_the_target_or_through_it():
    model, x = small_model(), torch.randn(6, 3, 8, 8, requires_grad=True)
    z, p, z_target = model(x)
    assert z.requires_grad and p.requires_grad and not z_target.requires_grad
    byol.symmetric_loss(p, z_target).backward()
    targets = set(model.head.target.parameters())
    assert targets and not any(param.requires_grad for param in targets)
    for param in model.parameters():
        assert (param.grad is None) == (param in targets)


@pytest.mark.parametrize("tau", [0, 0.3, 0.99, 1])
def test_update_target_averages_every_parameter_of_backbone_and_projector(tau):
    model = small_model()
    theta, before = cloned(online(model)), cloned(model.head.target.parameters())
    model.update_target(tau)
    for average, old, new in zip(model.head.target.parameters(), before, theta, strict=True):
        torch.testing.assert_close(average.detach(), tau * old + (1 - tau) * new)
    assert same(online(model), theta)
    assert tau < 1 or same(model.head.target.parameters(), before)


def test_update_target_leaves_every_batchnorm_statistic_alone():
    model = small_model()
    model(torch.randn(6, 3, 8, 8))
    before = cloned(model.buffers())
    model.update_target(0.3)
    assert same(model.buffers(), before)


def test_the_target_takes_batchnorm_statistics_of_its_own_forward_passes():
    model = small_model()
    expected = torch.zeros(4)
    for _ in range(3):
        x = torch.randn(6, 3, 8, 8)
        expected = 0.9 * expected + 0.1 * model.head.target[0][0](x).detach().mean((0, 2, 3))
        model(x)
    torch.testing.assert_close(model.head.target[0][1].running_mean, expected)
    assert not torch.allclose(model.backbone[1].running_mean, expected)
    counts = [int(buffer) for name, buffer in model.named_buffers()
              if name.endswith("num_batches_tracked")]
    assert counts == [3] * 5


@pytest.mark.parametrize("name", common.OPTIMIZERS)
def test_the_optimizer_holds_everything_but_the_target(name):
    model = small_model()
    groups = common.make_optimizer(name, [model], 0.1, 0.1).param_groups
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {*online(model), *model.head.predictor.parameters()}


# -------------------------------------------------------------------------------------------- views

def views(side=16, **flags):
    """Pictures that a flip does not change, 0 .. 1, and their two views: whole and unchanged but
    for the flags."""
    half = torch.randint(0, 256, (12, 3, side, side // 2), dtype=torch.uint8)
    x = torch.cat([half, half.flip(-1)], -1)
    settings = dict(
        image_size=side, crop=1, jitter=[0, 0, 0, 0], grey=0, blur=[0, 0], solarise=[0, 0])
    settings.update(flags)
    return x / 255, [shown(view) for view in byol.make_views(x, Namespace(**settings))]


def shown(view):
    """Back to 0 .. 1."""
    mean, std = torch.tensor(common.MEAN).view(3, 1, 1), torch.tensor(common.STD).view(3, 1, 1)
    return view * std + mean


@pytest.mark.parametrize(
    "flags, solarised", [([0, 0], []), ([1, 0], [0]), ([0, 1], [1]), ([1, 1], [0, 1])])
def test_solarise_is_for_each_view_on_its_own(flags, solarised):
    x, pair = views(solarise=flags)
    for i, view in enumerate(pair):
        expected = torch.where(x >= 0.5, 1 - x, x) if i in solarised else x
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def roughness(x):
    """The mean difference of neighbouring pixels, image by image."""
    return x.diff(dim=-1).abs().mean((1, 2, 3))


@pytest.mark.parametrize("flags, blurred", [([1, 0], 0), ([0, 1], 1)])
def test_blur_is_for_each_view_on_its_own(flags, blurred):
    x, pair = views(blur=flags)
    torch.testing.assert_close(pair[1 - blurred], x, rtol=0, atol=1e-5)
    smoother = roughness(pair[blurred]) / roughness(x)
    assert (smoother < 1 + 1e-5).all()
    assert smoother.mean() < 0.7  # a few draw a sigma that hardly blurs


@pytest.mark.parametrize(
    "flags", [dict(crop=0.3), dict(jitter=[0.5, 0.5, 0.5, 0.5]), dict(grey=0.5)])
def test_the_two_views_are_drawn_apart(flags):
    _, (first, second) = views(**flags)
    assert not torch.allclose(first, second)


# -------------------------------------------------------------------------------------- a whole run

def watch(patch):
    """A list that byol.py and bissl.py fill: what they do, in order, and the whole pretext model as
    it then is."""
    events, models = [], []
    outputs = byol.outputs
    update = byol.Model.update_target
    solve = bissl.inverse_hvp
    save = common.save_checkpoint

    def note(kind, model=None, **more):
        models.append(model or models[-1])
        events.append(Namespace(kind=kind, state=copy.deepcopy(models[-1].state_dict()), **more))

    def noting_outputs(model, views, args):
        note("forward", model)
        events[-1].z, *rest = outputs(model, views, args)
        return events[-1].z, *rest

    def noting_update(model, tau):
        note("update", model, tau=tau)
        update(model, tau)
        note("updated")

    def noting_solve(*args, **kwargs):
        note("solve")
        solution = solve(*args, **kwargs)
        note("solved")
        return solution

    def noting_save(*args, **kwargs):
        note("saved")
        save(*args, **kwargs)

    patch.setattr(byol, "outputs", noting_outputs)
    patch.setattr(byol.Model, "update_target", noting_update)
    patch.setattr(bissl, "inverse_hvp", noting_solve)
    patch.setattr(common, "save_checkpoint", noting_save)
    draw_nothing(patch)
    return events


def part(state, *prefixes, buffers=None):
    """The tensors under the prefixes: all of them, or the buffers alone, or the parameters
    alone."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    is_buffer = lambda key: key.rpartition(".")[2] in names
    found = []
    for prefix in prefixes:
        for key, value in state.items():
            if key.startswith(prefix) and buffers in (None, is_buffer(key)):
                found.append(value)
    return found


ONLINE, TARGET = ("backbone.", "head.projector."), ("head.target.0.", "head.target.1.")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Two epochs of two steps of byol.py on 36 pictures: flags to go on with, what it did, and
    OUT.jsonl."""
    folder = tmp_path_factory.mktemp("byol")
    write_folder(folder / "pictures")
    shared = ["--data", str(folder / "pictures"), "--root", str(folder), "--device", "cpu",
              "--precision", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        events = watch(patch)
        byol.main([*shared, "--arch", "resnet10", "--image-size", "16", "--epochs", "2",
                   "--batch-size", "18", "--decay", "0.9", "--hidden", "32", "--dim", "16",
                   "--warmup", "0", "--out", str(folder / "byol")])
    flags = [*shared, "--ckpt", str(folder / "byol.pt")]
    return Namespace(flags=flags, events=events, log=json_lines(folder / "byol.jsonl"))


@pytest.fixture(scope="module")
def aligned(pretrained, tmp_path_factory):
    """Two alternations of bissl.py from that checkpoint: what it did, its last metrics and its
    checkpoint."""
    out = tmp_path_factory.mktemp("aligned") / "bissl"
    with pytest.MonkeyPatch.context() as patch:
        events = watch(patch)
        last = bissl.main([*pretrained.flags, "--alternations", "2", "--lower-steps", "2",
                           "--upper-steps", "2", "--cg-steps", "2", "--head-epochs", "0",
                           "--batch-size", "18", "--pretext-batch-size", "18",
                           "--lower-warmup", "0", "--out", str(out)])
    return Namespace(events=events, last=last, ckpt=common.load_checkpoint(f"{out}.pt"))


def updates(events):
    """Of each training step: the forward passes, before and after the target's update, and what
    follows."""
    return [events[i - 1:i + 3] for i, event in enumerate(events) if event.kind == "update"]


def test_the_target_is_updated_once_a_step(pretrained):
    kinds = [*["forward", "update", "updated"] * 2, "saved"]
    assert [event.kind for event in pretrained.events] == kinds * 2


@pytest.mark.parametrize("run", ["pretrained", "aligned"])
def test_the_target_is_updated_after_the_optimizers_step(run, request):
    steps = updates(request.getfixturevalue(run).events)
    assert len(steps) == 4
    for forward, before, after, following in steps:
        weights = part(forward.state, *ONLINE, buffers=False)
        assert not same(weights, part(before.state, *ONLINE, buffers=False))
        assert same(part(after.state, *ONLINE), part(following.state, *ONLINE))


@pytest.mark.parametrize("run", ["pretrained", "aligned"])
def test_the_target_moves_in_every_training_step_by_the_decay_of_that_step(run, request):
    for k, (_, before, after, _) in enumerate(updates(request.getfixturevalue(run).events)):
        assert before.tau == pytest.approx(byol.decay(0.9, k, 4))
        old, new, theta = (part(state, *prefixes, buffers=False) for state, prefixes in (
            (before.state, TARGET), (after.state, TARGET), (before.state, ONLINE)))
        assert not same(old, new)
        for average, a, b in zip(new, old, theta, strict=True):
            torch.testing.assert_close(average, before.tau * a + (1 - before.tau) * b)
        statistics = part(before.state, *TARGET, buffers=True)
        assert same(statistics, part(after.state, *TARGET, buffers=True))


def test_the_log_holds_the_spread_of_the_normalised_projections(pretrained):
    forwards = [event for event in pretrained.events if event.kind == "forward"]
    assert len(pretrained.log) == 2
    for epoch, line in enumerate(pretrained.log):
        spreads = []
        for event in forwards[2 * epoch:2 * epoch + 2]:
            unit = torch.stack([row / row.square().sum().sqrt() for row in event.z.detach()])
            spreads += [column.std() for column in unit.T]
        assert line["spread"] == pytest.approx(sum(spreads).item() / len(spreads), rel=1e-4)


# --------------------------------------------------------------------- the pretext task of bissl.py

def test_bissl_goes_on_with_byol(aligned):
    assert aligned.ckpt["config"]["pretext"] == "byol"
    assert aligned.ckpt["config"]["pretext_config"]["decay"] == 0.9
    assert math.isfinite(aligned.last["residual"])
    saved = aligned.events[-1].state
    assert same(aligned.ckpt["head"].values(), part(saved, "head."))  # with the target


def test_bissl_starts_from_the_target_of_the_checkpoint(pretrained, aligned):
    first, saved = aligned.events[0].state, pretrained.events[-1].state
    assert first.keys() == saved.keys() and same(first.values(), saved.values())


def test_a_whole_upper_stage_leaves_target_and_theta_and_all_statistics_alone_to_the_bit(aligned):
    kinds = [*["forward", "update", "updated"] * 2, "forward", *["solve", "solved"] * 2, "saved"]
    assert [event.kind for event in aligned.events] == kinds * 2
    for start in (0, len(kinds)):
        last_update, *upper_stage = aligned.events[start:start + len(kinds)][5:]
        for event in upper_stage:
            assert same(event.state.values(), last_update.state.values())


def test_each_lower_step_is_one_forward_pass_a_view_to_every_statistic_and_the_hessian_is_none(
        aligned):
    counts = lambda event: {
        int(value) for key, value in event.state.items() if key.endswith("num_batches_tracked")}
    assert counts(aligned.events[0]) == {8}  # byol.py's four steps
    updated = [counts(event) for event in aligned.events if event.kind == "updated"]
    assert updated == [{10}, {12}, {14}, {16}]
    assert counts(aligned.events[-1]) == {16}


def test_each_view_meets_batchnorm_on_its_own():
    args = Namespace(hidden=8, dim=4, precision="float32")
    model = byol.make_model(common.build_backbone("resnet10", True), args)
    views = torch.randn(6, 3, 16, 16), 5 + 3 * torch.randn(6, 3, 16, 16)
    together = byol.outputs(model, views, args)
    for place, view in ((slice(0, 6), views[0]), (slice(6, 12), views[1])):
        for part_of, alone in zip(together, model(view)):
            torch.testing.assert_close(part_of[place], alone)


def slow_hessian_product(model, views, vector, step=1e-5):
    """The difference of the gradients at theta_B + step v and theta_B - step v, with z' held fixed
    at what it is."""
    z1, z2 = (model.head.target(view).detach() for view in views)

    def gradient(sign):
        moved = {name: (param + sign * step * v).detach().requires_grad_()
                 for (name, param), v in zip(model.backbone.named_parameters(), vector)}
        features = [torch.func.functional_call(model.backbone, moved, view) for view in views]
        p1, p2 = (model.head.predictor(model.head.projector(f)) for f in features)
        loss = slow_byol_loss(p1, z2) + slow_byol_loss(p2, z1)
        return torch.autograd.grad(loss, tuple(moved.values()))

    return [(above - below) / (2 * step) for above, below in zip(gradient(1), gradient(-1))]


# False: the target is still a copy of the online network.
@pytest.mark.parametrize("moved", [False, True])
def test_the_hessian_treats_the_target_as_a_constant(moved, monkeypatch):
    monkeypatch.setattr(byol, "mlp", lambda width, hidden, out: nn.Sequential(
        # Smooth, and without BatchNorm.
        nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out)))
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh())
    backbone.num_features = 4
    model = byol.Model(backbone, hidden=5, out=3).double()
    if moved:
        for param in model.head.target.parameters():
            param.normal_()
    pair = [torch.randn(6, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    theta, damping = tuple(model.backbone.parameters()), 0.5
    vector = tuple(torch.randn_like(param) for param in theta)

    loss = byol.loss(model, pair, Namespace(precision="float32"))
    gradient = torch.autograd.grad(loss, theta, create_graph=True)
    product = bissl.damped_hessian(gradient, theta, damping)(vector)
    for ours, v, Hv in zip(product, vector, slow_hessian_product(model, pair, vector), strict=True):
        assert Hv.norm() > 1e-3
        torch.testing.assert_close(ours, v + Hv / damping, rtol=0, atol=1e-7)


# ----------------------------------------------------------------------------------------- collapse

def spread_after(steps, loss_of, dim=16):
    """sqrt(dim) times the spread, as in the log, of a small network on blossoms: 1 is healthy, 0 is
    collapse."""
    torch.manual_seed(0)
    images, _ = common.petals(512, common.store_side(16), seed=0)
    args = Namespace(image_size=16, crop=0.4, jitter=[0.5, 0.5, 0.5, 0.5], grey=0.2, blur=[0, 0],
                     solarise=[0, 0], hidden=64, dim=dim, precision="float32")
    model = byol.make_model(common.build_backbone("resnet10", small_stem=True), args)
    optimizer = common.make_optimizer("adamw", [model], 5e-3, 1e-4)
    draw = lambda: byol.make_views(images[torch.randint(len(images), (64,))], args)
    for step in range(steps):
        loss = loss_of(model, draw(), args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(byol.decay(0.9, step, steps))
    z, _, _ = model(torch.cat(draw()))
    return F.normalize(z.detach(), dim=1).std(0).mean().item() * math.sqrt(dim)


def siamese_loss(model, views, args):
    """What is left of byol.loss without predictor, target and stop-gradient."""
    z, _, _ = model(torch.cat(views))
    return byol.symmetric_loss(z, z)


def test_projections_keep_their_spread_and_collapse_without_predictor_target_and_stop_gradient():
    assert spread_after(30, byol.loss) > 0.5
    assert spread_after(30, siamese_loss) < 0.2
