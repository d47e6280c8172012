"""What only a GPU can show: no step of any script waits for it. Skipped where there is none."""
import pytest
import torch

import bi_tuning
import bissl
import byol
import coin
import common
import core_tuning
import finetune
import simclr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = "--device cuda --batch-size 16 --image-size 16 --root root"
# BiSSL's default solver asks the GPU once per product whether another one is needed: products cost
# far more than that.
BISSL = ("--alternations 2 --lower-steps 2 --upper-steps 2 --head-epochs 1 --pretext-batch-size 16 "
         "--cg-tol 0 --recycle 0")
RUNS = {  # the name of a run, which its checkpoint gets: script and flags
    "simclr": (simclr, "--epochs 2"),
    "simclr_chunked": (simclr, "--epochs 2 --chunk 8"),
    "simclr_lars": (simclr, "--epochs 2 --optimizer lars --blur 0.5"),
    "byol": (byol, "--epochs 2"),
    "byol_blurred": (byol, "--epochs 2 --blur 1 0.1"),
    "coin": (coin, "--ckpt simclr.pt --epochs 2 --alpha 0.5"),
    "coin_balanced": (coin, "--ckpt simclr.pt --epochs 2 --alpha 0.5 --balanced 4"),
    "bissl": (bissl, f"--ckpt simclr.pt {BISSL}"),
    "bissl_byol": (bissl, f"--ckpt byol.pt {BISSL}"),
    "finetune": (finetune, "--ckpt coin.pt --epochs 2"),
    "core_tuning": (core_tuning, "--ckpt simclr.pt --epochs 2"),
    "bi_tuning": (bi_tuning, "--ckpt simclr.pt --epochs 2 --keys 4")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("where", ["on the GPU", "in pinned memory"])
@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_gpu(place, monkeypatch, name, where):
    """From the first line of a step to the end of its epoch, each wait for the GPU is an error."""
    monkeypatch.chdir(place)
    splits = {"unlabeled": 64, "train": 200, "val": 40, "test": 40}
    monkeypatch.setattr(common, "PETAL_SPLITS", splits)
    monkeypatch.setattr(common, "DOODLES", 64)
    if where == "in pinned memory":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    script, flags = RUNS[name]
    set_learning_rate, steps = common.set_learning_rate, []
    average_statistics, means = common.average_statistics, common.Run.means

    def step_begins(*args, **named):
        steps.append(torch.cuda.set_sync_debug_mode("error"))
        set_learning_rate(*args, **named)

    def stage_ends(module):
        torch.cuda.set_sync_debug_mode("default")
        average_statistics(module)

    def epoch_is_logged(run):
        torch.cuda.set_sync_debug_mode("default")
        return means(run)

    monkeypatch.setattr(common, "set_learning_rate", step_begins)
    # What an epoch's end calls first; in the trials of finetune.py it is the means.
    monkeypatch.setattr(common, "average_statistics", stage_ends)
    monkeypatch.setattr(common.Run, "means", epoch_is_logged)
    try:
        script.main([*f"{SMALL} {flags}".split(), "--out", name])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) >= 4
