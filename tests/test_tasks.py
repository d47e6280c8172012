"""Detection and segmentation: targets that move with their views, models, losses, and the command
lines."""
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision

import bi_tuning
import bissl
import common
import core_tuning
import finetune
import simclr
from conftest import draw_nothing, error_line, json_lines

FEW_PETALS = {"unlabeled": 32, "train": 40, "val": 20, "test": 20}
FLAGS = ["--device", "cpu", "--precision", "float32"]


@pytest.fixture
def few(tmp_path, monkeypatch):
    """An empty folder, and few petals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW_PETALS)
    monkeypatch.setattr(common, "DOODLES", 32)
    draw_nothing(monkeypatch)
    return tmp_path


def flags(task, *more, script=finetune):
    return script.parser().parse_args(["--task", task, *FLAGS, *more])


def started(task, *more, count=8):
    """Task, backbone, head and the first petals with their targets."""
    args = flags(task, *more)
    backbone, _ = common.start_backbone(args, say=False)
    data = common.load_data(args, "train")
    data = data.subset(torch.arange(count))
    built = finetune.make_task(args)
    return built, backbone, built.head(backbone, data.classes), data


def batch(data):
    return next(common.feed(data, [torch.arange(len(data))]))


# ------------------------------------------------------------------------------- petals and views

def test_every_bloom_of_an_image_is_of_another_species_and_its_box_is_that_of_its_mask():
    images, boxes, masks = common.mixed_petals(64, 80, seed=5)
    assert images.shape == (64, 3, 80, 80) and images.dtype == masks.dtype == torch.uint8
    assert boxes.shape == (64, 4, 6) and boxes.dtype == torch.float32
    for image, mask in zip(boxes, masks):
        assert len(image[:, 4].unique()) == 4
        assert mask.unique().tolist() == sorted([0, *(1 + image[:, 4]).long().tolist()])
        for left, top, right, bottom, label, difficult in image.tolist():
            rows, columns = (mask == label + 1).nonzero().unbind(1)
            # Pixel centres are inside; of what is covered by another bloom the mask tells nothing.
            assert 80 * left < columns.min() + 0.51 and columns.max() + 0.49 < 80 * right
            assert 80 * top < rows.min() + 0.51 and rows.max() + 0.49 < 80 * bottom
            assert difficult == 0 and 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        last = mask == image[3, 4] + 1  # nothing lies on the last bloom
        rows, columns = last.nonzero().unbind(1)
        left, top, right, bottom = (80 * image[3, :4]).tolist()
        for edge, extreme in ((left, columns.min()), (top, rows.min()),
                              (right, columns.max() + 1), (bottom, rows.max() + 1)):
            # A petal's tip is thinner than a pixel, so that the mask ends before the outline.
            assert abs(edge - extreme) < 4


def test_all_species_come_up_in_the_mixed_petals():
    _, boxes, _ = common.mixed_petals(200, 16, seed=0)
    assert torch.bincount(boxes[:, :, 4].long().flatten(), minlength=10).min() > 40


@pytest.mark.parametrize("size", [16, 24, 40])
def test_a_masks_crop_is_the_nearest_pixel_of_the_images_crop(size):
    masks = torch.randint(0, 9, (12, 32, 32), dtype=torch.uint8)
    box, flip = common.crop_boxes(12, 32, (0.1, 1)), torch.rand(12) < 0.5
    cropped = common.crop_mask(masks, box, flip, size)
    assert cropped.dtype == torch.uint8 and cropped.shape == (12, size, size)
    for mask, (top, left, height, width), turned, found in zip(masks, box.tolist(), flip, cropped):
        for i in range(size):
            for j in range(size):
                column = size - 1 - j if turned else j
                row = math.floor(top + (i + 0.5) * height / size)
                assert found[i, j] == mask[row, math.floor(left + (column + 0.5) * width / size)]


def test_boxes_are_mirrored_with_their_images_and_empty_rows_stay_empty():
    task = finetune.make_task(flags("detect"))
    x = torch.zeros(64, 3, 40, 40, dtype=torch.uint8)
    x[:, :, 10:20, 5:25] = 255
    y = torch.full((64, 2, 6), -1.0)
    y[:, 0] = torch.tensor([5 / 40, 10 / 40, 25 / 40, 20 / 40, 3, 1])
    views, boxes = task.views(x, y)
    sides = set()
    for view, objects in zip(views, boxes):
        left, top, right, bottom = (32 * objects[0, :4]).round().int().tolist()
        bright = view[0] > 0
        assert bright[top:bottom, left:right].all()
        assert bright.sum() == (bottom - top) * (right - left)
        assert objects[0, 4:].tolist() == [3, 1] and objects[1, 4] == -1
        sides.add(left)
    assert sides == {4, 12}


def test_images_and_masks_are_cropped_alike():
    task = finetune.make_task(flags("segment"))
    masks = torch.zeros(32, 40, 40, dtype=torch.uint8)
    masks[:, 8:30, 12:36] = 1
    x = (255 * masks)[:, None].expand(-1, 3, -1, -1)
    views, targets = task.views(x, masks)
    bright = views[:, 0] > 0
    assert (bright == (targets == 1)).float().mean() > 0.97  # they differ at edges, by one pixel


# ------------------------------------------------------------------------------------------ models

@pytest.mark.parametrize("arch", ["resnet10", "resnet18", "resnet34", "resnet50"])
def test_the_dilated_map_is_torchvisions_and_the_backbone_is_as_before(arch):
    backbone = common.build_backbone(arch, small_stem=False)
    x = torch.randn(2, 3, 64, 64)
    plain = backbone(x)
    before = str(backbone)
    found = finetune.dilated_map(backbone, x)
    assert str(backbone) == before and torch.equal(backbone(x), plain)
    assert found.shape[2:] == (8, 8)
    backbone.eval()
    coarse = finetune.feature_maps(backbone, x)["layer4"]
    fine = finetune.dilated_map(backbone, x)[:, :, ::4, ::4]
    assert torch.allclose(fine, coarse, rtol=1e-4, atol=1e-5 * coarse.abs().max().item())
    backbone.train()
    if arch == "resnet50":  # torchvision cannot dilate the other kind of block
        model = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
        model.fc = torch.nn.Identity()
        model.load_state_dict(backbone.state_dict())
        maps = torchvision.models._utils.IntermediateLayerGetter(model, {"layer4": "map"})
        assert torch.equal(maps.to(memory_format=torch.channels_last)(x)["map"], found)


@pytest.mark.parametrize("arch", ["resnet10", "resnet18", "wide_resnet50_2"])
def test_the_maps_are_those_of_the_backbone(arch):
    backbone = common.build_backbone(arch, small_stem=True)
    x = torch.randn(2, 3, 32, 32)
    maps = finetune.feature_maps(backbone.eval(), x)
    assert torch.equal(maps["layer4"].mean((2, 3)), backbone(x))
    sides = [level.shape[-1] for level in maps.values()]
    assert sides == [sides[0], sides[0] // 2, sides[0] // 4, sides[0] // 8]


@pytest.mark.parametrize("arch, side", [
    ("resnet10", 32), ("resnet18", 64), ("resnet34", 32), ("resnet50", 64), ("resnet18", 160)])
def test_a_detection_loss_reaches_every_weight_and_is_the_same_each_time(few, arch, side):
    task, backbone, head, data = started(
        "detect", "--arch", arch, "--image-size", str(side), count=2)
    x, y = task.views(*batch(data))
    state = torch.get_rng_state()
    loss, _, _ = task.loss(backbone, head, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    again, _, _ = task.loss(backbone, head, x, y)
    assert loss.item() == again.item() > 0 and loss.dtype == torch.float32
    loss.backward()
    for name, p in [*backbone.named_parameters(), *head.named_parameters()]:
        assert p.grad is not None, name


@pytest.mark.parametrize("objects", [0, 4])
def test_images_without_any_object_train(few, objects):
    task, backbone, head, data = started("detect", count=4)
    x, y = task.views(*batch(data))
    y = torch.full((4, objects, 6), -1.0)
    loss, _, _ = task.loss(backbone, head, x, y)
    loss.backward()
    assert loss.isfinite() and backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("task_name", ["classify", "detect", "segment"])
def test_a_frozen_loss_leaves_the_backbone_alone(few, task_name):
    task, backbone, head, data = started(task_name, count=4)
    x, y = task.views(*batch(data))
    loss, _, _ = task.loss(backbone, head, x, y, frozen=True)
    loss.backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_the_segmentation_loss_is_the_mean_over_the_pixels_that_count(few):
    task, backbone, head, data = started("segment", count=3)
    x, y = task.views(*batch(data))
    y[0, :20], y[1] = 255, 255
    backbone.eval()
    head.eval()
    loss, f, _ = task.loss(backbone, head, x, y)
    assert f.shape[:2] == (3, 64)
    logits = F.interpolate(head(finetune.dilated_map(backbone, x)), (32, 32), mode="bilinear")
    terms = []
    for image in range(3):
        for i in range(32):
            for j in range(32):
                if y[image, i, j] != 255:
                    scores = logits[image, :, i, j].double()
                    terms.append((scores.logsumexp(0) - scores[y[image, i, j].item()]).item())
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    nothing, _, _ = task.loss(backbone, head, x, torch.full_like(y, 255))
    assert nothing == 0


def fit(task_name, steps, rate, side):
    """The score on the first four petals, whole, of a network that has learnt from them alone."""
    task, backbone, head, data = started(
        task_name, "--arch", "resnet10", "--image-size", str(side), count=4)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=rate)
    for step in range(steps):
        common.set_learning_rate(optimizer, rate, step, steps, warmup=10)
        x, y = batch(data)
        loss, _, _ = task.loss(backbone, head, common.test_crop(x, side, share=1), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*backbone.parameters(), *head.parameters()], 10)
        optimizer.step()
    return task.score(backbone, head, data)


def test_a_detector_learns_four_images_by_heart(few):
    assert fit("detect", 60, 3e-3, side=32)["ap50"] > 90


def test_masks_of_four_images_are_learnt_by_heart(few):
    # The head's map is a quarter as large: 32 px would leave 8 x 8 cells, and about 78 %.
    assert fit("segment", 80, 6e-3, side=128)["miou"] > 90


# ----------------------------------------------------------------------------- Core-tuning's pixels

def test_the_cells_are_shared_among_the_classes_and_void_ones_are_left_out():
    f = torch.arange(3 * 64, dtype=torch.float32).view(3, 1, 8, 8)  # each feature tells its cell
    y = torch.zeros(3, 32, 32, dtype=torch.uint8)
    y[0, :, :4], y[0, :, 4:8] = 3, 7     # a column of eight cells each
    y[1] = 255
    y[1, 4:8, 8:20] = 2                  # three cells, and nothing else that counts
    y[2] = 5
    picked, label = core_tuning.cells(f, y)
    assert picked.shape == (96, 1)
    picked, label = picked[label != 255], label[label != 255]
    assert len(picked) == 67 and len(picked.unique()) == 67
    for value, found in zip(picked[:, 0].long().tolist(), label.tolist()):
        image, row, column = value // 64, value % 64 // 8, value % 8
        assert found == y[image, 4 * row + 2, 4 * column + 2]
    count = torch.bincount(label, minlength=8).tolist()
    assert count == [16, 0, 3, 8, 0, 32, 0, 8]
    other, _ = core_tuning.cells(f, y)
    assert not torch.equal(other.sort(0)[0], picked.sort(0)[0])


def test_the_last_layer_classifies_rows_as_it_does_maps():
    head = finetune.make_task(flags("segment")).head(common.build_backbone("resnet10", True), "abc")
    f = torch.randn(2, 64, 4, 4)
    rows = core_tuning.logits_of(head, f.flatten(2).mT.flatten(0, 1))
    assert torch.allclose(rows, head[-1](f).flatten(2).mT.flatten(0, 1), atol=1e-6)


# ----------------------------------------------------------------------------------- command lines

SHORT = [*FLAGS, "--image-size", "16", "--batch-size", "8", "--labels-per-class", "2"]
SHORT_STAGE = ["--alternations", "1", "--lower-steps", "1", "--upper-steps", "1",
               "--head-epochs", "1", "--pretext-batch-size", "8"]


@pytest.mark.parametrize("task, metric", [("detect", "ap50"), ("segment", "miou")])
def test_the_chain_of_stages_ends_with_a_score_that_eval_repeats(few, task, metric):
    simclr.main([*FLAGS, "--image-size", "16", "--epochs", "1", "--batch-size", "8"])
    stage = bissl.main([*SHORT, *SHORT_STAGE, "--ckpt", "simclr.pt", "--task", task])
    assert stage["upper_theta"] > 0 and stage["knn"] is None
    result = finetune.main(
        [*SHORT, "--ckpt", "bissl.pt", "--task", task, "--epochs", "2", "--search", "2"])
    *_, last, summary = json_lines("finetune.jsonl")
    assert 0 <= result[f"test_{metric}"] <= 100 and f"val_{metric}" in last
    runs = summary["runs"]
    best = max(runs[:2], key=lambda run: run[metric])
    assert runs[2]["lr"] == best["lr"]
    again = finetune.main([*FLAGS, "--ckpt", "finetune.pt", "--task", task, "--eval"])
    assert again[f"test_{metric}"] == result[f"test_{metric}"]
    backbone = common.load_checkpoint("finetune.pt")["backbone"]
    assert backbone.keys() == common.build_backbone("resnet10", True).state_dict().keys()


def test_core_tuning_segments(few):
    result = core_tuning.main([*SHORT, "--task", "segment", "--epochs", "2"])
    assert 0 <= result["test_miou"] <= 100
    assert "train_pixels" in json_lines("core_tuning.jsonl")[0]  # as finetune.py has it
    again = finetune.main([*FLAGS, "--ckpt", "core_tuning.pt", "--task", "segment", "--eval"])
    assert again["test_miou"] == result["test_miou"]


def test_a_batch_of_void_masks_alone_trains(few, monkeypatch):
    def without_classes(args, splits, load=common.load_petals):
        images, masks, sizes, classes = load(args, splits)
        if splits != ["test"]:  # which has to show something
            masks = torch.full_like(masks, 255)
        return images, masks, sizes, classes

    monkeypatch.setattr(common, "load_petals", without_classes)
    core_tuning.main([*FLAGS, "--image-size", "16", "--batch-size", "8", "--task", "segment",
                      "--labels-per-class", "0", "--epochs", "1"])
    assert json_lines("core_tuning.jsonl")[0]["loss"] == 0  # as finetune.py has it


def test_the_mixtures_cross_entropy_is_the_mean_and_0_without_any():
    logits, labels = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    expected = -(labels * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(core_tuning.mean_cross_entropy(logits, labels), expected)
    assert core_tuning.mean_cross_entropy(logits[:0], labels[:0]) == 0


@pytest.mark.parametrize("trained, asked", [
    ("detect", "classify"), ("classify", "detect"), ("segment", "detect"), ("detect", "segment")])
def test_another_task_than_the_checkpoints_is_one_line(few, capsys, trained, asked):
    finetune.main([*SHORT, "--task", trained, "--epochs", "1"])
    line = error_line(capsys, finetune.main,
                      [*FLAGS, "--ckpt", "finetune.pt", "--task", asked, "--eval"])
    assert "--task" in line and "finetune.pt" in line


@pytest.mark.parametrize("script, argv", [
    (bi_tuning, ["--task", "detect"]),
    (core_tuning, ["--task", "detect"]),
    (finetune, ["--task", "locate"]),
    (finetune, ["--task", "detect", "--eta", "0.1"]),
    (finetune, ["--task", "segment", "--compile"])])
def test_a_task_that_a_script_does_not_have_is_one_line(few, capsys, script, argv):
    assert argv[0] in error_line(capsys, script.main, [*FLAGS, *argv]) or "--eta" in argv


def test_frozen_batchnorm_keeps_its_averages(few):
    simclr.main([*FLAGS, "--image-size", "16", "--epochs", "1", "--batch-size", "8"])
    before = common.load_checkpoint("simclr.pt")["backbone"]
    usual = [*SHORT, "--ckpt", "simclr.pt", "--epochs", "1"]
    finetune.main([*usual, "--freeze-bn"])
    after = common.load_checkpoint("finetune.pt")["backbone"]
    assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])
    finetune.main(usual)
    after = common.load_checkpoint("finetune.pt")["backbone"]
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])


def test_the_figures_show_boxes_and_masks(few, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(few)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW_PETALS)
    for task in ("detect", "segment"):
        finetune.main([*SHORT, "--task", task, "--epochs", "1", "--out", task])
        assert (few / f"{task}.png").stat().st_size > 20_000


# -------------------------------------------------------------------------------- several processes

def scores_in(number, processes, folder):
    """What each task's fixed model scores, and the views of one batch: written to folder."""
    torch.set_num_threads(1)
    common.PETAL_SPLITS = FEW_PETALS
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number,
                                world_size=processes)
    found = {}
    for name in ("detect", "segment"):
        task, backbone, head, data = started(name, "--arch", "resnet10", count=9)
        torch.manual_seed(3)
        mine = common.own_rows(torch.arange(8))
        x, y = task.views(*next(common.feed(data, [mine])))
        found[name] = dict(task.score(backbone, head, data), views=x, targets=y)
    torch.save(found, f"{folder}/{processes}-{number}.pt")
    if processes > 1:
        dist.destroy_process_group()


def test_two_processes_score_and_view_as_one_does(tmp_path):
    scores_in(0, 1, tmp_path)
    mp.spawn(scores_in, (2, str(tmp_path)), nprocs=2)
    one, *two = [torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]
    for task, whole in one.items():
        for part in ("views", "targets"):
            both = torch.stack([two[0][task].pop(part), two[1][task].pop(part)], 1).flatten(0, 1)
            assert torch.equal(both, whole.pop(part))
        assert two[0][task] == two[1][task] == pytest.approx(whole)
