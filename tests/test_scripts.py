"""The scripts as a student runs them: through their command lines, one after the other, on small data."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import bissl
import common
import finetune
import simclr
from conftest import ROOT, write_folder

SCRIPTS = {"simclr": simclr, "bissl": bissl, "finetune": finetune}
SHARED_FLAGS = ["--data", "--root", "--image-size", "--arch", "--ckpt", "--out", "--epochs", "--batch-size", "--lr",
                "--weight-decay", "--seed", "--device", "--resume"]
SMALL = ["--image-size", "16", "--batch-size", "8", "--device", "cpu", "--precision", "float32"]
SHORT = {"simclr": ["--epochs", "1", "--arch", "resnet10"],
         "bissl": ["--ckpt", "simclr.pt", "--alternations", "1", "--lower-steps", "2", "--upper-steps", "2",
                   "--head-epochs", "1", "--pretext-batch-size", "8"],
         "finetune": ["--ckpt", "bissl.pt", "--epochs", "1"]}
EMOJI = ROOT.parent / "shared" / "data" / "emoji"


@pytest.fixture
def here(folder, monkeypatch):
    """The current folder, empty but for pictures/."""
    monkeypatch.chdir(folder.parent)
    return folder.parent


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take longer than these runs: only the real commands and the fixture `starts` draw them."""
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "draw", lambda *ignored: None)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Checkpoints to start from: each script's own and torchvision's."""
    place = tmp_path_factory.mktemp("starts")
    write_folder(place / "pictures")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), place / "torchvision.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for script in SCRIPTS:
            run(script)
    return place


def run(script, *more, data="pictures"):
    """main() with the short settings; what comes later in `more` replaces them."""
    return SCRIPTS[script].main([*SMALL, "--data", data, "--root", "root", *SHORT[script], *more])


def new_finetune(*more):
    """finetune.main() from scratch."""
    return finetune.main([*SMALL, "--data", "pictures", "--root", "root", "--arch", "resnet10", "--epochs", "1", *more])


def files(place):
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- whole chains

def test_the_three_commands_run_one_after_the_other_and_write_only_to_root_and_out(here):
    before = set(files(here))
    for script in SCRIPTS:
        argv = [*SMALL, "--data", "pictures", "--root", "cache", *SHORT[script], "--out", f"runs/{script}"]
        argv = [f"runs/{word}" if word.endswith(".pt") else word for word in argv]
        done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *argv], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    new = {name for name in set(files(here)) - before if not name.startswith("cache/")}
    assert new == {f"runs/{script}.{ending}" for script in SCRIPTS for ending in ("pt", "jsonl", "png")}


def test_the_three_scripts_run_on_petals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "PETAL_SPLITS", {"unlabeled": 32, "train": 60, "val": 30, "test": 30})
    for script in SCRIPTS:
        few = [] if script == "simclr" else ["--labels-per-class", "3"]
        result = run(script, *few, data="petals")
    assert 0 <= result["test_top1"] <= 100
    assert common.load_checkpoint("finetune.pt")["classes"][0] == "3 round"


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji pictures are not here")
def test_finetune_runs_on_the_emoji_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = finetune.main([*SMALL, "--data", str(EMOJI), "--root", "root", "--arch", "resnet10", "--epochs", "1",
                            "--labels-per-class", "2"])
    assert len(common.load_checkpoint("finetune.pt")["classes"]) == 9
    assert 0 <= result["test_top1"] <= 100


# ------------------------------------------------------------------------------------------------ what is written

@pytest.mark.parametrize("script, unit", [("simclr", "epoch"), ("bissl", "alternation")])
def test_the_log_holds_one_line_an_epoch_and_main_returns_the_last(starts, monkeypatch, script, unit):
    monkeypatch.chdir(starts)
    count = {"simclr": "--epochs", "bissl": "--alternations"}[script]
    result = run(script, count, "3", "--out", "three")
    assert [line[unit] for line in lines("three.jsonl")] == [1, 2, 3]
    assert lines("three.jsonl")[-1] == result


def test_the_log_of_finetune_ends_with_the_test_accuracy_that_main_returns(here):
    result = new_finetune("--epochs", "3")
    *epochs, last = lines("finetune.jsonl")
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert not any("test_top1" in line for line in epochs)
    assert {name: last[name] for name in result} == result
    assert 0 <= last["test_top1"] <= 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_figure_is_a_readable_picture_with_something_in_it(starts, script):
    with Image.open(starts / f"{script}.png") as image:
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


# ----------------------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_shared_flags_in_the_common_order_and_every_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--help"])
    assert not stop.value.code
    entries = re.split(r"^  (?=--)", capsys.readouterr().out, flags=re.M)[1:]  # one text for each flag
    flags = [entry.split()[0] for entry in entries]
    shared = [flag for flag in SHARED_FLAGS if (flag, script) != ("--epochs", "bissl")]  # bissl counts alternations
    assert [flag for flag in flags if flag in shared] == shared
    for flag, entry in zip(flags, entries):
        takes_a_value = not re.match(r"--[\w-]+(  |\n|$)", entry)
        assert not takes_a_value or "(default: " in " ".join(entry.split()), flag


# ------------------------------------------------------------------------------------------------ starting points

@pytest.mark.parametrize("start", ["simclr", "bissl", "finetune", "torchvision"])
def test_freeze_starts_from_the_checkpoint_and_changes_no_bit_of_the_backbone(starts, monkeypatch, start):
    monkeypatch.chdir(starts)
    run("finetune", "--ckpt", f"{start}.pt", "--freeze", "--epochs", "2", "--out", "frozen")
    before, after = (common.load_checkpoint(name)["backbone"] for name in (f"{start}.pt", "frozen.pt"))
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert after.keys() == {key for key in before if not key.startswith("fc.")}


@pytest.mark.parametrize("start", ["simclr", "bissl", "torchvision"])
def test_finetune_without_freeze_trains_backbone_and_head(starts, monkeypatch, start):
    monkeypatch.chdir(starts)
    result = run("finetune", "--ckpt", f"{start}.pt", "--out", "tuned")
    before, after = (common.load_checkpoint(name)["backbone"] for name in (f"{start}.pt", "tuned.pt"))
    changed = {key: not torch.equal(after[key], before[key]) for key in after}
    assert changed["conv1.weight"] and changed["layer4.0.conv2.weight"]
    assert "test_top1" in result


def test_bissl_says_that_a_foreign_checkpoint_has_no_pretext_head_and_goes_on(starts, monkeypatch, capsys):
    monkeypatch.chdir(starts)
    torch.save(common.load_checkpoint("simclr.pt")["backbone"], "foreign.pt")
    run("bissl", "--ckpt", "foreign.pt", "--out", "from_foreign")
    assert "no pretext head" in capsys.readouterr().out
    assert common.load_checkpoint("from_foreign.pt")["config"]["pretext"] == "simclr"
    run("bissl", "--ckpt", "simclr.pt", "--out", "from_simclr")
    assert "no pretext head" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- evaluation

def test_eval_repeats_the_accuracy_of_the_run_and_writes_nothing(here, capsys):
    result = new_finetune("--freeze", "--lr", "0.001")  # hardly trained: an accuracy between chance and perfect
    capsys.readouterr()
    before = files(here)
    again = finetune.main(["--data", "pictures", "--root", "root", "--ckpt", "finetune.pt", "--eval", "--device", "cpu",
                           "--precision", "float32"])
    assert again["test_top1"] == result["test_top1"]
    assert f"{result['test_top1']:.2f} %" in capsys.readouterr().out
    assert files(here) == before


@pytest.mark.parametrize("flags, images", [
    ([], 36), (["--labels-per-class", "0"], 36), (["--labels-per-class", "2"], 6), (["--fraction", "0.5"], 15),
    (["--fraction", "0.01"], 3)])
def test_finetune_trains_on_as_many_labelled_images_as_asked_for(here, monkeypatch, flags, images):
    seen = []
    train = finetune.train
    monkeypatch.setattr(finetune, "train", lambda run: (seen.append(len(run.data)), train(run)))
    new_finetune(*flags)
    assert seen == [images]  # 3 classes of 12; a fifth of each (2) is held out where there is a choice to make


# --------------------------------------------------------------------------------------------------------- search

@pytest.fixture
def unequal(here):
    """pictures/ with a test split of 15 images, so that the length of a split tells which one it is."""
    for path in sorted((here / "pictures" / "test").rglob("*.png")):
        if int(path.stem) >= 5:
            path.unlink()
    return here


def test_search_and_seeds_give_mean_and_deviation_over_the_final_runs(unequal, monkeypatch):
    result = new_finetune("--search", "2", "--seeds", "2")
    runs = lines("finetune.jsonl")[-1]["runs"]
    assert len(runs) == 4 and [one["seed"] for one in runs[2:]] == [0, 1]
    scores = torch.tensor([one["top1"] for one in runs[2:]], dtype=torch.float64)
    assert result["test_top1"] == pytest.approx(scores.mean().item())
    assert result["test_top1_std"] == pytest.approx(scores.std().item())


@pytest.mark.parametrize("better", [min, max])
def test_search_chooses_by_validation_and_looks_at_test_once_a_final_run(unequal, monkeypatch, better):
    """The figure, which shows the test split when all is decided, is not drawn here (see no_figures)."""
    looks, rates = [], []

    def evaluate(backbone, head, store, args):
        on_test = len(store) == 15
        looks.append("test" if on_test else "val")
        rates.append(args.lr)
        like_small = (better is min) != on_test  # validation likes one rate, test the other
        return dict(top1=50 - args.lr if like_small else 50 + args.lr, top5=0, mean_class=0), None

    monkeypatch.setattr(finetune, "evaluate", evaluate)
    result = new_finetune("--search", "2", "--seeds", "2")
    assert len(set(rates)) == 2
    assert result["lr"] == better(rates)
    assert looks.count("test") == 2
    assert "test" not in looks[:looks.index("test")] and set(looks[:2]) == {"val"}


@pytest.mark.parametrize("rate, batch_size", [
    (1e30, "8"),             # several steps: the loss is not finite
    (float("inf"), "64")])   # one step: the loss before it is finite, the weights after it are not
def test_a_pair_that_diverges_does_not_stop_the_search(here, monkeypatch, rate, batch_size):
    peaks, real = [], common.set_learning_rate

    def diverge_in_the_first_run(optimizer, peak, *rest, **named):
        peaks.append(peak)
        real(optimizer, rate if peak == peaks[0] else peak, *rest, **named)

    monkeypatch.setattr(common, "set_learning_rate", diverge_in_the_first_run)
    result = new_finetune("--search", "2", "--batch-size", batch_size)
    assert len(lines("finetune.jsonl")[-1]["runs"]) == 3
    assert result["lr"] == peaks[-1] != peaks[0]


# ------------------------------------------------------------------------------------------------------- learning

def test_finetune_learns_easy_classes_in_a_few_epochs(here):
    assert new_finetune("--epochs", "4")["test_top1"] > 80  # chance is 33


def test_the_loss_of_simclr_falls(here):
    run("simclr", "--epochs", "6", "--lr", "0.003")
    losses = [line["loss"] for line in lines("simclr.jsonl")]
    assert losses[-1] < losses[0] - 0.2
