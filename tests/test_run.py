"""common.Run, and what the command line settles before a run begins."""
import io
import sys
from argparse import Namespace

import pytest
import torch
from torch import nn

import bissl
import byol
import common
import simclr

CPU = ["--device", "cpu"]


# ------------------------------------------------------------------------- defaults and precision

@pytest.mark.parametrize("flags, lr, weight_decay", [
    ([], 2e-3, 1e-4),
    (["--optimizer", "lars"], 0.85, 1e-6),
    (["--optimizer", "sgd"], 0.05, 5e-4),
    (["--optimizer", "lars", "--lr", "0.1"], 0.1, 1e-6),
    (["--optimizer", "lars", "--weight-decay", "0.1"], 0.85, 0.1),
])
def test_an_optimizer_brings_its_own_defaults(tmp_path, flags, lr, weight_decay):
    args = simclr.parser().parse_args([*CPU, "--out", str(tmp_path / "x"), *flags])
    assert (args.lr, args.weight_decay) == (lr, weight_decay)


def test_byols_target_is_slower_where_runs_are_longer(tmp_path):
    def decay(*flags):
        return byol.parser().parse_args([*CPU, "--out", str(tmp_path / "x"), *flags]).decay

    assert decay() == 0.99
    assert decay("--data", "flowers") == 0.996
    assert decay("--data", "flowers", "--decay", "0.9") == 0.9


@pytest.mark.parametrize("capabilities, precision", [
    (dict(avx512_bf16=True), "bfloat16"),
    (dict(amx_bf16=True, avx512_bf16=False), "bfloat16"),
    (dict(avx2=True, amx_bf16=False), "float32"),
    ({}, "float32"),
])
def test_a_cpu_that_has_bfloat16_uses_it(tmp_path, monkeypatch, capsys, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    args = simclr.parser().parse_args([*CPU, "--out", str(tmp_path / "x")])
    assert args.precision == precision
    common.start_backbone(args)
    assert capsys.readouterr().out == f"cpu, {precision}, resnet10 at 32 px\n"


def test_float32_is_float32_on_a_gpu_too(tmp_path):
    simclr.parser().parse_args([*CPU, "--out", str(tmp_path / "x")])
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


# ------------------------------------------------------------- what the network sees in bfloat16

class Recorder(nn.Module):
    """A backbone that keeps the images that it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x.mean((2, 3))


def some_store(side=40, count=6):
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return common.Store(images, torch.arange(count) % 2, torch.arange(count), ["a", "b"])


def evaluation_settings(**more):
    return Namespace(
        image_size=32, device="cpu", precision="bfloat16", batch_size=6, seed=0, **more)


def test_features_are_of_crops_that_bfloat16_has_not_rounded():
    store, backbone = some_store(), Recorder()
    common.features(backbone, store, evaluation_settings())
    assert torch.equal(backbone.seen[0], common.test_crop(store.images, 32))


def test_the_warm_up_of_bissls_head_crops_outside_of_autocast(monkeypatch):
    inside, augment = [], common.augment

    def watched(x, size, **settings):
        inside.append(torch.is_autocast_enabled("cpu"))
        return augment(x, size, **settings)

    monkeypatch.setattr(common, "augment", watched)
    args = evaluation_settings(head_epochs=2, lr=0.1, weight_decay=0.0, crop=0.5)
    bissl.warm_up_head(args, Recorder(), nn.Linear(3, 2), some_store())
    assert inside == [False, False]


# ------------------------------------------------------------------------------- the progress line

class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class Clock:
    """time.perf_counter() that a test turns forward."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


TWO_IMAGES = common.Store(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.arange(2), ["a"])


def toy_run(tmp_path, monkeypatch, terminal):
    """A Run of two epochs of ten steps, four seconds and eight images each; what it prints."""
    screen, clock = Screen(terminal), Clock()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(common.time, "perf_counter", clock)
    args = Namespace(
        out=str(tmp_path / "toy"), resume=False, epochs=2, seed=0, arch="resnet10", image_size=16)
    model = nn.ModuleDict(dict(backbone=nn.Linear(2, 2)))
    run = common.Run(args, "toy", model, TWO_IMAGES)
    for epoch in run.epochs_left(10):
        for step in range(10):
            clock.now += 4
            run.add(8, loss=torch.tensor(float(step)))
        run.end_epoch()
    return screen.getvalue(), run


def test_on_a_terminal_a_line_is_rewritten_every_ten_seconds(tmp_path, monkeypatch):
    shown, _ = toy_run(tmp_path, monkeypatch, terminal=True)
    first_epoch = shown.split("\n")[0].split("\r")[1:]
    assert len(first_epoch) == 4  # after 12, 24 and 36 of 40 seconds, and the epoch's own line
    assert first_epoch[0] == (
        "epoch 1/2  loss 1  24 images  2 images/s  left in it 0:00:28\033[K")
    assert first_epoch[2] == (
        "epoch 1/2  loss 4  72 images  2 images/s  left in it 0:00:04\033[K")
    assert first_epoch[3] == "\033[Kepoch 1/2  loss 4.5  2 images/s  left 0:00:40"


def test_into_a_file_or_a_pipe_there_is_a_line_an_epoch_and_nothing_else(tmp_path, monkeypatch):
    printed, _ = toy_run(tmp_path, monkeypatch, terminal=False)
    assert printed == ("epoch 1/2  loss 4.5  2 images/s  left 0:00:40\n"
                       "epoch 2/2  loss 4.5  2 images/s  left 0:00:00\n")


def test_into_a_file_nothing_makes_the_device_wait_within_an_epoch(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(common.Run, "show_progress", reads.append)
    toy_run(tmp_path, monkeypatch, terminal=False)
    assert not reads


def test_the_means_of_uneven_batches_count_images_and_not_batches(tmp_path, monkeypatch):
    args = Namespace(out=str(tmp_path / "toy"), resume=False, epochs=1, seed=0)
    run = common.Run(args, "toy", nn.ModuleDict(dict(backbone=nn.Linear(2, 2))), TWO_IMAGES)
    for _ in run.epochs_left(2):
        run.add(3, loss=torch.tensor(1.0))
        run.add(1, loss=torch.tensor(5.0))
        assert run.means() == dict(loss=2.0)
