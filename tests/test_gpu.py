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
SCRIPTS = {"simclr": simclr, "byol": byol, "coin": coin, "bissl": bissl,
           "finetune": finetune, "core_tuning": core_tuning, "bi_tuning": bi_tuning}
SMALL = "--device cuda --batch-size 16 --image-size 16 --root root".split()
RUNS = {"simclr": "--epochs 2", "simclr_chunked": "--epochs 2 --chunk 8", "byol": "--epochs 2",
        "simclr_lars": "--epochs 2 --optimizer lars --blur 0.5", "byol_blurred": "--epochs 2 --blur 1 0.1",
        "coin": "--ckpt simclr.pt --epochs 2 --alpha 0.5", "coin_balanced": "--ckpt simclr.pt --epochs 2 --alpha 0.5 --balanced 4",
        # its default solver asks the GPU once a product whether another one is needed: products cost far more than that
        "bissl": "--ckpt simclr.pt --alternations 2 --lower-steps 2 --upper-steps 2 --head-epochs 1 --pretext-batch-size 16 "
                 "--cg-tol 0 --recycle 0",
        "bissl_byol": "--ckpt byol.pt --alternations 2 --lower-steps 2 --upper-steps 2 --head-epochs 1 "
                      "--pretext-batch-size 16 --cg-tol 0 --recycle 0",
        "finetune": "--ckpt coin.pt --epochs 2", "core_tuning": "--ckpt simclr.pt --epochs 2",
        "bi_tuning": "--ckpt simclr.pt --epochs 2 --keys 4"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("where", ["on the GPU", "in pinned memory"])
@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_gpu(place, monkeypatch, name, where):
    monkeypatch.chdir(place)
    monkeypatch.setattr(common, "PETAL_SPLITS", {"unlabeled": 64, "train": 200, "val": 40, "test": 40})
    if where == "in pinned memory":
        monkeypatch.setattr(common, "memory", lambda device: 1.5e5 if name == "bi_tuning" else 0)
    script, steps = SCRIPTS[name.rsplit("_", 1)[0] if name not in SCRIPTS else name], []
    set_learning_rate, average_statistics = common.set_learning_rate, common.average_statistics

    def step_begins(*args, **named):
        steps.append(torch.cuda.set_sync_debug_mode("error"))
        set_learning_rate(*args, **named)

    def epoch_ends(module):
        torch.cuda.set_sync_debug_mode("default")
        average_statistics(module)

    monkeypatch.setattr(common, "set_learning_rate", step_begins)
    monkeypatch.setattr(common, "average_statistics", epoch_ends)
    try:
        script.main([*SMALL, *RUNS[name].split(), "--out", name])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) >= 4
