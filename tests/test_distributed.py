"""Several processes (gloo, on the CPU) do what one does on the same batches; and what happens when
one of them is lost."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import bissl
import byol
import coin
import common
import finetune
import simclr
from conftest import ROOT, SCRIPTS, json_lines, write_folder

PLAIN = "--device cpu --precision float32 --image-size 12 --batch-size 8 --root root"
VIEWS = "--jitter 0 0 0 0 --probe-every 1"
FEW = "--labels-per-class 4 --epochs 2 --lr 0.03"  # 40 images: 5 whole batches
BILEVEL = ("--labels-per-class 4 --lower-steps 3 --upper-steps 2 --head-epochs 1 "
           "--pretext-batch-size 16")
RUNS = {
    "simclr": f"{VIEWS} --arch resnet10 --epochs 2 --optimizer sgd --lr 0.05",
    # CHUNK becomes 4 / processes
    "chunked": f"{VIEWS} --arch resnet10 --epochs 2 --optimizer sgd --lr 0.05 --chunk CHUNK",
    "byol": f"{VIEWS} --arch resnet10 --epochs 2 --solarise 0 0",
    "coin": f"--ckpt simclr.pt {FEW} --alpha 0.5",
    "balanced": f"--ckpt simclr.pt {FEW} --alpha 0.5 --balanced 2",
    "bissl": f"--ckpt simclr.pt {BILEVEL} --alternations 2 --hessian-batch 8 --damping 10",
    "byol_bissl": f"--ckpt byol.pt {BILEVEL} --alternations 1 --damping 0.1",
    "finetune": f"--ckpt coin.pt {FEW} --epochs 3 --eta 0.3",
    "core_tuning": f"--ckpt simclr.pt {FEW}",
    "bi_tuning": f"--ckpt simclr.pt {FEW} --keys 3",
}
SCRIPT_OF = {"chunked": "simclr", "balanced": "coin", "byol_bissl": "bissl"}


# ----------------------------------------------------------------------- one process, two and three

class Toy(nn.Module):
    """A backbone without BatchNorm, with the two keys that checkpoints are recognised by."""

    def __init__(self):
        super().__init__()
        self.conv1, self.num_features = nn.Conv2d(3, 6, 3, 2), 10
        self.layer1 = nn.Sequential(nn.ModuleDict(dict(conv1=nn.Conv2d(6, 10, 3))))

    def forward(self, x):
        return self.layer1[0]["conv1"](torch.tanh(self.conv1(x))).tanh().mean((2, 3))


def without_batchnorm(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))


class PlainHead(simclr.Model):
    def __init__(self, backbone, hidden, out):
        nn.Module.__init__(self)
        self.backbone, self.head = backbone, without_batchnorm(10, 8, 6)


def in_float32(make):
    """The views that a float32 run sees, as float64."""
    def view(*args, **named):
        torch.set_default_dtype(torch.float32)
        try:
            return make(*args, **named).double()
        finally:
            torch.set_default_dtype(torch.float64)
    return view


def process(number, processes, folder):
    """Runs everything in float64 without BatchNorm; writes what came out to folder."""
    os.chdir(folder)
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=processes)
    torch.set_default_dtype(torch.float64)
    common.build_backbone = lambda arch, small_stem: Toy()
    common.PETAL_SPLITS = {"unlabeled": 38, "train": 60, "val": 31, "test": 29}
    common.DOODLES = 38
    simclr.Model, byol.mlp = PlainHead, without_batchnorm
    common.augment, common.test_crop = in_float32(common.augment), in_float32(common.test_crop)
    for script in SCRIPTS.values():
        script.draw = lambda *ignored: None
    for name, flags in RUNS.items():
        flags = flags.replace("CHUNK", str(4 // processes))
        SCRIPTS[SCRIPT_OF.get(name, name)].main([*PLAIN.split(), *flags.split(), "--out", name])
    torch.save(losses(), f"losses{number}.pt")
    if processes > 1:
        dist.destroy_process_group()


def losses():
    """Loss, gradient and Hessian-vector product of each loss that reaches over processes, for 12
    fixed images."""
    torch.manual_seed(0)
    x, direction = torch.randn(12, 7), [torch.randn(5, 7)]
    weight = torch.randn(5, 7, requires_grad=True)
    y = torch.tensor([0, 1, 0, 2, 2, 2, 0, 3, 1, 4, 4, 5])  # 3 and 5 have no positive
    present = torch.randint(-1, 2, (12, 5))
    mine, label, found = common.own_rows(x), common.own_rows(y), {}
    project = lambda x: torch.tanh(x @ weight.T)
    alone = common.own_rows(torch.arange(12))
    for name, loss in (
            ("nt_xent", lambda: simclr.nt_xent(project(mine), project(mine + 0.3), 0.2)),
            ("supcon", lambda: coin.supcon(project(mine), label, 0.2)),
            ("several labels",
             lambda: finetune.label_loss(project(mine), common.own_rows(present))),
            ("no positive", lambda: coin.supcon(project(mine), alone, 0.2))):
        value = loss()
        gradient = torch.autograd.grad(value, [weight], create_graph=True)
        product = bissl.damped_hessian(gradient, [weight], 2.0)(direction)
        mean = common.all_sum(value.detach()) / common.world()
        means = common.process_means([g.detach() for g in gradient])
        found[name] = [mean, *means, *product]
    found["rows"] = [common.gather(mine)]
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process wrote, and two."""
    places = {processes: tmp_path_factory.mktemp(f"with{processes}") for processes in (1, 2)}
    for processes, place in places.items():
        mp.spawn(process, (processes, str(place)), nprocs=processes)
    return places


def assert_close(one, other, what):
    scale = max(one.abs().max().item(), 1e-30)
    assert (one - other).abs().max().item() <= 1e-6 * scale, what


def states(path):
    """Every tensor of a checkpoint that training has made."""
    ckpt = torch.load(path, weights_only=True)
    found = {}
    for part in ("backbone", "head", "projector"):
        found.update({(part, key): value for key, value in (ckpt[part] or {}).items()})
    for part in ("upper_backbone", "upper_head", "key", "queue_h", "queue_z"):
        found.update({(part, key): value for key, value in ckpt["resume"].get(part, {}).items()})
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_is_the_run_of_one(folders, name):
    one, two = states(folders[1] / f"{name}.pt"), states(folders[2] / f"{name}.pt")
    assert one.keys() == two.keys() and len(one) >= 6
    for key, value in one.items():
        assert_close(value.double(), two[key].double(), key)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_what_one_logs(folders, name):
    one, two = (json_lines(folders[processes] / f"{name}.jsonl") for processes in (1, 2))
    assert len(one) == len(two)
    for line, other in zip(one, two):
        assert line.keys() == other.keys()
        for key, value in line.items():
            # `spread` is a deviation within each process's share.
            if isinstance(value, (int, float)) and key != "spread":
                assert other[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key


@pytest.mark.parametrize("name", ["nt_xent", "supcon", "several labels", "no positive", "rows"])
def test_loss_gradient_and_hessian_vector_product_of_two_processes(folders, name):
    one = torch.load(folders[1] / "losses0.pt")[name]
    for number in range(2):  # every process holds the same
        two = torch.load(folders[2] / f"losses{number}.pt")[name]
        for value, other in zip(one, two, strict=True):
            assert value.abs().max() > 0 or name == "no positive"
            assert_close(value, other, name)


def test_training_moved_something(folders):
    start, end = states(folders[1] / "simclr.pt"), states(folders[1] / "bissl.pt")
    assert any((start[key] - end[key]).abs().max() > 1e-4 for key in start)


def test_alone_nothing_is_shared():
    x = torch.randn(5, 3, requires_grad=True)
    assert common.world() == 1 and common.rank() == 0
    assert common.gather(x) is x and torch.equal(common.own_rows(x), x) and common.all_sum(x) is x


# ----------------------------------------------------------------------------------- under torchrun

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("torchrun")
    write_folder(place / "pictures", per_class=16)
    return place


SMALL = ["--data", "pictures", "--root", "root", "--device", "cpu", "--precision", "float32",
         "--image-size", "16", "--batch-size", "12", "--arch", "resnet10"]


def torchrun(place, processes, *argv):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
         f"--master-port={port()}", str(ROOT / argv[0]), *SMALL, *argv[1:]],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def port():
    import socket
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def children(pid):
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if re.search(rf"^PPid:\s+{pid}$", status.read_text(), re.M):
                found.append(int(status.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the processes in /proc")
def test_a_lost_process_stops_the_others_and_another_number_goes_on(place):
    run = torchrun(place, 2, "simclr.py", "--epochs", "400", "--out", "run")
    for line in run.stdout:
        if line.startswith("epoch 2/"):
            break
    workers = sorted(children(run.pid))
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - killed < 20 and run.returncode != 0
    assert not list(place.glob("*.tmp"))
    epochs = len((place / "run.jsonl").read_text().splitlines())
    saved = len(common.load_checkpoint(place / "run.pt")["resume"]["history"])
    assert saved in (epochs, epochs - 1) and epochs < 400

    ckpt = torch.load(place / "run.pt", weights_only=True)
    ckpt["config"]["epochs"] = saved + 1  # a shorter way to the end than 400 epochs
    torch.save(ckpt, place / "run.pt")
    run = torchrun(place, 3, "simclr.py", "--epochs", str(saved + 1), "--out", "run", "--resume")
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert said.count("epoch ") == 1  # one process prints
    assert len((place / "run.jsonl").read_text().splitlines()) == saved + 1
    assert (place / "run.png").exists()


def test_a_batch_that_cannot_be_shared_is_refused_in_a_line(place):
    run = torchrun(place, 2, "simclr.py", "--batch-size", "7", "--out", "odd")
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "--batch-size 7 cannot be shared by 2 processes" in errors
    assert not (place / "odd.pt").exists()
