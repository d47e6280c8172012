"""Bi-tuning: both contrastive losses against slow loops, the rings against deques, and whole runs
on small data."""
import collections
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

import bi_tuning
import common
import finetune
from conftest import draw_nothing, json_lines, write_folder

SMALL = ["--data", "pictures", "--root", "root", "--image-size", "16", "--batch-size", "8",
         "--epochs", "1", "--device", "cpu", "--precision", "float32", "--keys", "3", "--dim", "6"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    draw_nothing(monkeypatch)


def run(*more):
    """main() with the short settings; what comes later in `more` replaces them."""
    return bi_tuning.main([*SMALL, "--arch", "resnet10", *more])


def save_start():
    """start.pt, a fresh resnet10 as foreign code would save it; its weights."""
    state = common.build_backbone("resnet10", small_stem=True).state_dict()
    torch.save(state, "start.pt")
    return state


def first_loss(path="bi_tuning.jsonl"):
    return json_lines(path)[0]["loss"]


# ------------------------------------------------------------------------------- contrastive losses

def slow_kl(own, queued, y, filled):
    """KL of the uniform target from the softmax, one image: own logit, queued[c][k], class y,
    filled[c][k]."""
    candidates = [(own, True)]
    for c in range(len(queued)):
        candidates += [(queued[c][k], c == y) for k in range(len(queued[c])) if filled[c][k]]
    total = sum(math.exp(logit) for logit, _ in candidates)
    share = 1 / sum(right for _, right in candidates)
    return sum(share * (math.log(share) - math.log(math.exp(logit) / total))
               for logit, right in candidates if right)


def unit(values):
    length = math.sqrt(sum(value ** 2 for value in values))
    return [value / length for value in values]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def slow_cce(h, weight, bias, y, queue, temperature, filled):
    """Section 6: logits w_y . h~ / tau over the image itself and the keys of all classes."""
    total = 0
    for i, c in enumerate(y.tolist()):
        w = unit([*weight[c].tolist(), bias[c].item()])
        logits = [[dot(w, key) / temperature for key in keys] for keys in queue.tolist()]
        own = dot(w, unit([*h[i].tolist(), 1])) / temperature
        total += slow_kl(own, logits, c, filled.tolist())
    return total / len(y)


def slow_ccl(z_q, z_k, y, queue, temperature, filled):
    """Section 6: logits z_q . z / tau over the image's own key and the keys of all classes."""
    total = 0
    for i, c in enumerate(y.tolist()):
        z = unit(z_q[i].tolist())
        logits = [[dot(z, key) / temperature for key in keys] for keys in queue.tolist()]
        own = dot(z, unit(z_k[i].tolist())) / temperature
        total += slow_kl(own, logits, c, filled.tolist())
    return total / len(y)


def random_problem(name, batch=5, classes=4, keys=3, dim=4, dtype=torch.float64):
    """The fast and the slow loss, and their arguments before the temperature."""
    make = lambda *shape: torch.randn(shape, dtype=dtype)
    y = torch.randint(classes, (batch,))
    if name == "cce":
        inputs = (make(batch, dim), make(classes, dim), make(classes), y,
                  F.normalize(make(classes, keys, dim + 1), dim=2))
        return bi_tuning.contrastive_cross_entropy, slow_cce, inputs
    return bi_tuning.categorical_contrastive, slow_ccl, (
        make(batch, dim), make(batch, dim), y, F.normalize(make(classes, keys, dim), dim=2))


both = pytest.mark.parametrize("name", ["cce", "ccl"])


@both
@pytest.mark.parametrize("batch, classes, keys, temperature", [
    (5, 4, 3, 0.07),
    (5, 4, 3, 1.0),
    (1, 2, 1, 0.2),
    (8, 2, 6, 0.5)])
def test_a_contrastive_loss_is_the_divergence_from_the_uniform_target_image_by_image(
        name, batch, classes, keys, temperature):
    fast, slow, inputs = random_problem(name, batch, classes, keys)
    all_filled = torch.ones(classes, keys, dtype=torch.bool)
    expected = slow(*inputs, temperature, all_filled)
    assert fast(*inputs, temperature).item() == pytest.approx(expected, abs=1e-12)
    assert fast(*inputs, temperature, all_filled).item() == pytest.approx(expected, abs=1e-12)


@both
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_empty_slots_take_no_part_in_a_contrastive_loss(name, share):
    fast, slow, inputs = random_problem(name, batch=8, classes=5)
    filled = torch.rand(5, 3) < share
    filled[inputs[-2][0]] = False  # one image's class has no key at all
    loss = fast(*inputs, 0.2, filled)
    assert loss.item() == pytest.approx(slow(*inputs, 0.2, filled), abs=1e-12)
    *others, queue = inputs
    other = fast(*others, torch.where(filled[:, :, None], queue, 9.0), 0.2, filled)
    torch.testing.assert_close(other, loss, rtol=0, atol=0)


@both
def test_with_empty_queues_a_contrastive_loss_is_zero_and_so_is_its_gradient(name):
    fast, _, (x, *others) = random_problem(name)
    loss = fast(x.requires_grad_(), *others, 0.07, torch.zeros(4, 3, dtype=torch.bool))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    gradient, = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_contrastive_loss_has_the_right_derivative(name, share):
    fast, _, (x, *others) = random_problem(name)
    filled = torch.rand(4, 3) < share
    assert torch.autograd.gradcheck(lambda x: fast(x, *others, 0.3, filled), x.requires_grad_())


@both
def test_a_contrastive_loss_moves_only_the_query_side(name):
    """Neither the classifier's weights nor the keys get a gradient."""
    fast, _, inputs = random_problem(name)
    leaves = [value.requires_grad_() for value in inputs[:-1] if value.is_floating_point()]
    query, *constants = torch.autograd.grad(fast(*inputs, 0.3), leaves, allow_unused=True)
    assert query.any()
    assert len(constants) == {"cce": 2, "ccl": 1}[name] and constants == [None] * len(constants)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_contrastive_loss_keeps_the_dtype(name, dtype):
    fast, _, inputs = random_problem(name, dtype=dtype)
    assert fast(*inputs, 0.3).dtype == dtype


@both
@pytest.mark.parametrize("classes, keys", [(2, 1), (3, 4), (10, 40)])
def test_with_equal_logits_a_contrastive_loss_is_log_of_candidates_per_right_answer(
        name, classes, keys):
    fast, _, (x, *others, _) = random_problem(name, classes=classes)
    x = x[:1].expand(5, 4)
    key = bi_tuning.unit_with_one(x[:1]) if name == "cce" else F.normalize(x[:1], dim=1)
    others[0] = x if name == "ccl" else others[0]
    loss = fast(x, *others, key.expand(classes, keys, -1), 0.07)
    assert loss.item() == pytest.approx(math.log((1 + classes * keys) / (1 + keys)), abs=1e-12)


def test_projections_of_any_length_give_the_same_categorical_contrastive_loss():
    fast, _, (z_q, z_k, y, queue) = random_problem("ccl")
    lengths = 10 ** torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    expected = fast(z_q, z_k, y, queue, 0.2)
    torch.testing.assert_close(fast(lengths * z_q, z_k / lengths, y, queue, 0.2), expected)


def test_unit_with_one_appends_the_one_before_it_takes_the_length():
    h = torch.tensor([[3.0, 4], [0, 0]])
    expected = torch.tensor([[3, 4, 1], [0, 0, 26 ** 0.5]]) / 26 ** 0.5
    torch.testing.assert_close(bi_tuning.unit_with_one(h), expected)
    torch.testing.assert_close(bi_tuning.unit_with_one(h.bfloat16()), expected)


# -------------------------------------------------------------------------------------------- rings

class Backwards(TorchDispatchMode):
    """Writes the last row first: of two rows for one slot, a GPU may keep either."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func is aten.index_put_.default:
            place, index, values, *rest = args
            args = place, [i.flip(0) for i in index], values.flip(0), *rest
        elif func in (aten.index_copy_.default, aten.scatter_.src):
            place, dim, index, values = args
            args = place, dim, index.flip(min(dim, index.ndim - 1)), values.flip(dim)
        return func(*args, **(kwargs or {}))


def assert_like(queue, deques):
    """Filled slots hold the deques' keys, in the ring's order: from its next slot on, oldest
    first."""
    size = queue.keys.shape[1]
    assert queue.filled().sum(1).tolist() == list(map(len, deques))
    for c, keys in enumerate(deques):
        held = queue.keys[c][queue.filled()[c]]
        assert sorted(held.tolist()) == sorted(keys)
        ring = held.roll(-(int(queue.entered[c]) % size), 0) if len(keys) == size else held
        assert ring.tolist() == list(keys)


@pytest.mark.parametrize("classes, size", [(1, 4), (3, 1), (4, 3), (6, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_a_ring_holds_what_a_deque_of_its_class_holds(classes, size, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    queue = bi_tuning.ClassQueue(classes, size, 2)
    deques = [collections.deque(maxlen=size) for _ in range(classes)]
    assert_like(queue, deques)
    for _ in range(12):
        batch = rng.randint(1, 3 * size)
        # The other classes get nothing; one class alone gets all.
        among = rng.sample(range(classes), rng.randint(1, classes))
        keys, y = torch.randn(batch, 2), torch.tensor([rng.choice(among) for _ in range(batch)])
        queue.enqueue(keys, y)
        for key, label in zip(keys.tolist(), y.tolist()):
            deques[label].append(key)
        assert_like(queue, deques)


def test_a_ring_keeps_the_last_keys_whatever_the_order_in_which_slots_are_written():
    keys, y = torch.randn(40, 2), torch.randint(2, (40,))
    queues = [bi_tuning.ClassQueue(2, 3, 2) for _ in range(2)]
    queues[0].enqueue(keys, y)
    with Backwards():
        queues[1].enqueue(keys, y)
    assert torch.equal(queues[1].keys, queues[0].keys)


def test_backwards_turns_the_order_of_writes_round():
    slots = torch.zeros(2)
    with Backwards():
        slots[torch.tensor([0, 0, 1])] = torch.tensor([1.0, 2, 3])
    assert slots.tolist() == [1, 3]


def test_the_oldest_key_is_the_one_that_is_replaced_next():
    queue = bi_tuning.ClassQueue(2, 3, 1)

    def put(*numbers):
        queue.enqueue(torch.tensor(numbers)[:, None], torch.ones(len(numbers), dtype=torch.long))

    put(1.0, 2.0)
    assert queue.filled().tolist() == [[False] * 3, [True, True, False]]
    put(3.0, 4.0)
    assert sorted(queue.keys[1, :, 0].tolist()) == [2, 3, 4]
    put(5.0)
    assert sorted(queue.keys[1, :, 0].tolist()) == [3, 4, 5]
    put(*map(float, range(10, 18)))
    assert sorted(queue.keys[1, :, 0].tolist()) == [15, 16, 17]
    put(18.0)
    assert sorted(queue.keys[1, :, 0].tolist()) == [16, 17, 18]
    assert not queue.keys[0].any()


def test_a_random_start_counts_as_filled_with_unit_keys_and_is_replaced():
    queue = bi_tuning.ClassQueue(3, 4, 5, random=True)
    start = queue.keys.clone()
    assert queue.filled().all()
    torch.testing.assert_close(start.norm(dim=2), torch.ones(3, 4))
    assert len(start.view(12, 5).unique(dim=0)) == 12 and (start < 0).any() and (start > 0).any()
    new = torch.ones(4, 5)
    queue.enqueue(new[:1], torch.tensor([1]))
    assert sum(torch.equal(a, b) for a, b in zip(queue.keys[1], start[1])) == 3
    queue.enqueue(new[:3], torch.tensor([1, 1, 1]))
    assert torch.equal(queue.keys[1], new) and torch.equal(queue.keys[[0, 2]], start[[0, 2]])
    assert queue.filled().all()


def test_keys_of_a_narrower_type_enter_as_float32():
    queue = bi_tuning.ClassQueue(1, 2, 2)
    queue.enqueue(torch.ones(1, 2, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long))
    assert queue.keys.dtype == torch.float32 and queue.keys[0, 0].tolist() == [1, 1]


# --------------------------------------------------------------------------- one step after another

DECAY = 0.7


def copies(values):
    return [value.detach().clone() for value in values]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What happens in a run of two epochs of 5 steps: the events' names in order, and what each
    worked on."""
    place = tmp_path_factory.mktemp("record")
    write_folder(place / "pictures")
    seen = SimpleNamespace(place=place, order=[], losses=[], before=[], stepped=[], averages=[],
                           queries=[], entered=[], calls=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        draw_nothing(patch)
        listen_to_losses(patch, seen)
        listen_to_optimizer(patch, seen)
        build, enqueue = common.build_backbone, bi_tuning.ClassQueue.enqueue

        def note_call(module, x, f):
            if module.training:
                seen.calls.append(len(f))

        def counted(*args):
            backbone = build(*args)
            backbone.register_forward_hook(note_call)
            return backbone

        def enter(queue, keys, y):
            seen.order.append("enqueue")
            seen.entered.append((keys.clone(), y.clone()))
            enqueue(queue, keys, y)

        patch.setattr(common, "build_backbone", counted)
        patch.setattr(bi_tuning.ClassQueue, "enqueue", enter)
        seen.result = run("--epochs", "2", "--decay", str(DECAY))
    return seen


def listen_to_losses(patch, seen):
    for name in ("contrastive_cross_entropy", "categorical_contrastive"):
        def listen(*args, name=name, original=getattr(bi_tuning, name)):
            loss = original(*args)
            seen.order.append("loss")
            seen.losses.append(SimpleNamespace(
                name=name, loss=loss.item(), query=args[0].detach(), key=args[1].detach(),
                queue=args[-3].clone(), filled=args[-1].clone()))
            return loss
        patch.setattr(bi_tuning, name, listen)


def listen_to_optimizer(patch, seen):
    make, average = common.make_optimizer, common.update_average

    def listen(*args, **more):
        seen.optimizer = make(*args, **more)
        seen.optimizer.register_step_post_hook(lambda *ignored: seen.order.append("step"))
        return seen.optimizer

    def update(key, query, decay):
        seen.order.append("average")
        seen.before.append(copies(key.parameters()))
        average(key, query, decay)
        seen.key, seen.query = key, query
        seen.averages.append(copies(key.parameters()))
        seen.queries.append(copies(query.parameters()))

    patch.setattr(common, "make_optimizer", listen)
    patch.setattr(common, "update_average", update)


def test_losses_come_before_the_step_the_average_after_it_and_the_keys_enter_last(record):
    assert record.order == 10 * ["loss", "loss", "step", "average", "enqueue", "enqueue"]


def test_query_and_key_backbone_run_once_a_step_each(record):
    assert len(record.calls) == 2 * 10 and sum(record.calls) == 2 * 72


def test_the_key_encoder_is_the_moving_average_of_backbone_and_projector(record):
    names = [name for name, _ in record.key.named_parameters()]
    assert names == [name for name, _ in record.query.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"backbone", "projector"}
    for before, query, after in zip(record.before, record.queries, record.averages):
        for old, new, mean in zip(before, query, after):
            torch.testing.assert_close(mean, DECAY * old + (1 - DECAY) * new, rtol=1e-5, atol=1e-7)
    for after, before in zip(record.averages, record.before[1:]):
        assert all(map(torch.equal, after, before))  # nothing else moves it


def test_the_key_encoder_gets_no_gradient_and_is_not_optimised(record):
    own = {id(p) for group in record.optimizer.param_groups for p in group["params"]}
    for p in record.key.parameters():
        assert not p.requires_grad and p.grad is None and id(p) not in own
    assert all(id(p) in own for p in record.query.parameters())


def test_in_the_first_step_no_slot_is_filled_and_both_contrastive_losses_are_zero(record):
    for seen in record.losses[:2]:
        assert not seen.filled.any()
        assert seen.loss == pytest.approx(0, abs=1e-6)
    assert all(seen.loss > 1e-3 for seen in record.losses[2:])


def test_a_step_contrasts_with_the_keys_of_the_steps_before(record):
    deques = {"contrastive_cross_entropy": [collections.deque(maxlen=3) for _ in range(3)],
              "categorical_contrastive": [collections.deque(maxlen=3) for _ in range(3)]}
    for step in range(10):
        both = slice(2 * step, 2 * step + 2)
        for seen, (keys, y) in zip(record.losses[both], record.entered[both]):
            for c, expected in enumerate(deques[seen.name]):
                assert sorted(seen.queue[c][seen.filled[c]].tolist()) == sorted(expected)
            for key, label in zip(keys.tolist(), y.tolist()):
                deques[seen.name][label].append(key)


def test_the_keys_that_enter_are_the_key_encoders_at_unit_length(record):
    for step in range(10):
        (h, _), (z, _) = record.entered[2 * step:2 * step + 2]
        torch.testing.assert_close(z, F.normalize(record.losses[2 * step + 1].key, dim=1))
        torch.testing.assert_close(h.norm(dim=1), torch.ones(len(h)))
        features = h[:, :-1] / h[:, -1:]  # of [h, 1] at unit length: h
        weight, bias = record.before[step][-2:]  # of the key encoder's projector, in this step
        key = record.losses[2 * step + 1].key
        torch.testing.assert_close(F.linear(features, weight, bias), key, rtol=1e-3, atol=1e-4)


def test_query_and_key_see_different_views(record):
    weight, bias = record.before[0][-2:]  # in the first step both encoders have the same weights
    cce, ccl = record.losses[:2]
    torch.testing.assert_close(F.linear(cce.query, weight, bias), ccl.query, rtol=1e-4, atol=1e-4)
    assert (ccl.query - ccl.key).abs().max() > 0.1


def test_the_checkpoint_holds_classifier_projector_key_encoder_and_both_queues(record):
    ckpt = common.load_checkpoint(record.place / "bi_tuning.pt")
    assert ckpt["method"] == "bi_tuning" and ckpt["classes"] == ["a", "b", "c"]
    shapes = lambda part: {key: tuple(value.shape) for key, value in ckpt[part].items()}
    assert shapes("head") == dict(weight=(3, 256), bias=(3,))
    assert shapes("projector") == dict(weight=(6, 256), bias=(6,))
    for queue in ("queue_h", "queue_z"):
        assert ckpt["resume"][queue]["entered"].tolist() == [24, 24, 24]
    for name, value in record.key.state_dict().items():
        assert torch.equal(ckpt["resume"]["key"][name], value)


def test_finetune_eval_repeats_the_accuracy_of_the_run(record, monkeypatch):
    monkeypatch.chdir(record.place)
    flags = SMALL[:SMALL.index("--keys")]
    again = finetune.main([*flags, "--eval", "--ckpt", "bi_tuning.pt"])
    assert again["test_top1"] == record.result["test_top1"]


def test_the_panel_compares_the_mean_keys_of_the_classes(record, monkeypatch):
    monkeypatch.chdir(record.place)
    axes = common.plt.figure().gca()
    bi_tuning.show_queue(axes, bi_tuning.parser().parse_args([*SMALL]), None)
    keys = common.load_checkpoint("bi_tuning.pt")["resume"]["queue_z"]["keys"]
    shown = torch.tensor(axes.images[0].get_array().tolist())
    common.plt.close("all")
    for a in range(3):
        for b in range(3):
            expected = sum(float(key @ other) for key in keys[a] for other in keys[b]) / 9
            assert shown[a, b].item() == pytest.approx(expected, abs=1e-5)


def test_the_panel_takes_names_that_would_be_formulas(record, monkeypatch, tmp_path):
    ckpt = common.load_checkpoint(record.place / "bi_tuning.pt")
    torch.save(dict(ckpt, classes=["a $x_$", "b $", "c"]), tmp_path / "bi_tuning.pt")
    monkeypatch.chdir(tmp_path)
    figure = common.plt.figure()
    bi_tuning.show_queue(figure.gca(), bi_tuning.parser().parse_args([*SMALL]), None)
    figure.savefig("panel.png")
    common.plt.close("all")


# --------------------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("decay", [0, 0.9, 1])
def test_after_one_step_the_key_encoder_is_between_start_and_result(here, decay):
    start = save_start()
    run("--ckpt", "start.pt", "--batch-size", "36", "--decay", str(decay))
    ckpt = common.load_checkpoint("bi_tuning.pt")
    key = ckpt["resume"]["key"]
    for name in ("conv1.weight", "layer4.0.conv2.weight", "bn1.bias"):
        old, new = start[name], ckpt["backbone"][name]
        assert not torch.equal(old, new)
        mean = decay * old + (1 - decay) * new
        torch.testing.assert_close(key[f"backbone.{name}"], mean, rtol=1e-5, atol=1e-7)
    follows = torch.equal(key["projector.weight"], ckpt["projector"]["weight"])
    assert follows == (decay == 0)


@pytest.mark.parametrize("flags", [[], ["--random-queue"]])
def test_the_loss_of_the_first_step_is_cross_entropy_plus_gamma_times_both(
        here, monkeypatch, flags):
    seen, parts = SimpleNamespace(order=[], losses=[]), []
    listen_to_losses(monkeypatch, seen)
    entropy = F.cross_entropy

    def listen(logits, y):
        parts.append((logits.detach(), y))
        return entropy(logits, y)

    monkeypatch.setattr(F, "cross_entropy", listen)
    run("--batch-size", "36", "--gamma", "2.5", "--lr", "1e-12", *flags)  # moves nothing
    (cce, ccl), ((logits, y),) = seen.losses, parts
    assert cce.filled.all() == ccl.filled.all() == bool(flags)
    head = common.load_checkpoint("bi_tuning.pt")["head"]
    expected = F.linear(cce.query, head["weight"], head["bias"])
    torch.testing.assert_close(expected, logits, rtol=1e-4, atol=1e-4)
    expected = entropy(logits, y).item() + 2.5 * (cce.loss + ccl.loss)
    assert first_loss() == pytest.approx(expected, rel=1e-5)


def test_random_queues_are_made_of_unit_keys_that_the_images_replace(here):
    run("--random-queue", "--keys", "15")
    for queue in ("queue_h", "queue_z"):
        state = common.load_checkpoint("bi_tuning.pt")["resume"][queue]
        assert state["entered"].tolist() == [27, 27, 27]
        torch.testing.assert_close(state["keys"].norm(dim=2), torch.ones(3, 15))


@pytest.fixture
def rates(monkeypatch):
    """Of each step, the learning rates of the backbone's parameters and of the others'; and the
    classifier's start."""
    seen, make = SimpleNamespace(backbone=[], others=[]), common.make_optimizer

    def listen(name, modules, *rest, **more):
        optimizer = make(name, modules, *rest, **more)
        own = {id(p) for p in modules[0].parameters()}
        seen.head = copies(modules[1].parameters())

        def note(*ignored):
            of = []
            for group in optimizer.param_groups:
                of += [(id(p) in own, group["lr"]) for p in group["params"]]
            assert len(of) == sum(len(list(module.parameters())) for module in modules)
            seen.backbone.append({lr for is_backbone, lr in of if is_backbone})
            seen.others.append({lr for is_backbone, lr in of if not is_backbone})

        optimizer.register_step_post_hook(note)
        return optimizer

    monkeypatch.setattr(common, "make_optimizer", listen)
    return seen


@pytest.mark.parametrize("share", [0.1, 1])
def test_backbone_lr_scales_the_backbones_learning_rate_in_every_step(here, rates, share):
    run("--backbone-lr", str(share), "--lr", "0.02")
    assert len(rates.backbone) == 5 and rates.others[0] == {0.02}
    assert len(set(map(max, rates.others))) == 5
    for (backbone,), (other,) in zip(rates.backbone, rates.others):
        assert backbone == pytest.approx(share * other)


def test_with_backbone_lr_0_only_classifier_and_projector_learn(here, rates):
    start = save_start()
    run("--ckpt", "start.pt", "--backbone-lr", "0", "--weight-decay", "0.1")
    ckpt = common.load_checkpoint("bi_tuning.pt")
    for name, _ in common.build_backbone("resnet10", small_stem=True).named_parameters():
        assert torch.equal(ckpt["backbone"][name], start[name])
    assert not any(map(torch.equal, copies(ckpt["head"].values()), rates.head))


def test_bi_tuning_starts_from_torchvisions_supervised_weights(here, capsys):
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, "resnet18.pth")
    result = bi_tuning.main(
        [*SMALL, "--ckpt", "resnet18.pth", "--image-size", "24", "--batch-size", "36",
         "--backbone-lr", "0"])
    assert "left out fc.weight, fc.bias" in capsys.readouterr().out
    ckpt = common.load_checkpoint("bi_tuning.pt")
    assert ckpt["arch"] == "resnet18"
    name = "layer4.1.conv2.weight"
    assert torch.equal(ckpt["backbone"][name], state[name])
    assert 0 <= result["test_top1"] <= 100
