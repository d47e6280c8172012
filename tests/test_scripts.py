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

import bi_tuning
import bissl
import byol
import coin
import common
import core_tuning
import finetune
import simclr
from conftest import ROOT, write_folder

SCRIPTS = {"simclr": simclr, "byol": byol, "coin": coin, "bissl": bissl,
           "finetune": finetune, "core_tuning": core_tuning, "bi_tuning": bi_tuning}
FINE_TUNING = ("finetune", "core_tuning", "bi_tuning")
SHARED_FLAGS = ["--data", "--root", "--image-size", "--arch", "--ckpt", "--out", "--epochs", "--batch-size", "--lr",
                "--weight-decay", "--seed", "--device", "--resume"]
SMALL = ["--image-size", "16", "--batch-size", "8", "--device", "cpu", "--precision", "float32"]
SHORT = {"simclr": ["--epochs", "1", "--arch", "resnet10"],
         "byol": ["--epochs", "1", "--arch", "resnet10"],
         "coin": ["--epochs", "2", "--alpha", "0.5"],
         "bissl": ["--alternations", "1", "--lower-steps", "2", "--upper-steps", "2", "--head-epochs", "1",
                   "--pretext-batch-size", "8"],
         "finetune": ["--epochs", "1"],
         "core_tuning": ["--epochs", "1"],
         "bi_tuning": ["--epochs", "1", "--keys", "4"]}
START = {"coin": "simclr.pt", "bissl": "simclr.pt", "finetune": "bissl.pt", "core_tuning": "coin.pt", "bi_tuning": "coin.pt"}
FEW_PETALS = {"unlabeled": 32, "train": 60, "val": 30, "test": 30}
EMOJI = ROOT.parent / "shared" / "data" / "emoji"


@pytest.fixture
def here(folder, monkeypatch):
    """The current folder, empty but for pictures/."""
    monkeypatch.chdir(folder.parent)
    return folder.parent


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take longer than these runs: only the real commands of the fixture `starts` draw them."""
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "draw", lambda *ignored: None, raising=False)


def short(script, *more, ckpt="", data="pictures"):
    """The short command line; what comes later in `more` replaces what it has. Without ckpt: the script's START."""
    start = START.get(script) if ckpt == "" else ckpt
    return [*SMALL, "--data", data, "--root", "root", *SHORT[script], *(["--ckpt", start] if start else []), *more]


def run(script, *more, **named):
    return SCRIPTS[script].main(short(script, *more, **named))


def from_scratch(script, *more):
    return run(script, "--arch", "resnet10", *more, ckpt=None)


def new_finetune(*more):
    return from_scratch("finetune", *more)


def files(place):
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- whole chains

@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """What the seven real commands write, one stage after the other, and torchvision.pt, to start from."""
    place = tmp_path_factory.mktemp("starts")
    write_folder(place / "pictures")
    for together in (["simclr", "byol"], ["coin", "bissl"], FINE_TUNING):
        runs = [subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *short(script)], cwd=place, text=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
                for script in together]
        for run in runs:
            errors = run.communicate()[1]
            assert run.returncode == 0, errors
    written = {name for name in files(place) if not name.startswith(("root/", "pictures/"))}
    assert written == {f"{script}.{ending}" for script in SCRIPTS for ending in ("pt", "jsonl", "png")}
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), place / "torchvision.pt")
    return place


def test_the_seven_commands_run_one_after_the_other_and_write_only_to_root_and_out(starts):
    for script in SCRIPTS:
        assert common.load_checkpoint(starts / f"{script}.pt")["method"] == script
        assert lines(starts / f"{script}.jsonl")


FEW_LABELS = ("--labels-per-class", "3")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder with the checkpoints START.pt and START-MIDDLE.pt that lead to the last stage, all on few petals."""
    place = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(common, "PETAL_SPLITS", FEW_PETALS)
        for script in SCRIPTS.values():
            patch.setattr(script, "draw", lambda *ignored: None, raising=False)
        for start in ("simclr", "byol"):
            run(start, data="petals")
        for start in ("scratch", "simclr", "byol"):
            for middle in ("coin", "bissl"):
                run(middle, *FEW_LABELS, "--out", f"{start}-{middle}", data="petals",
                    ckpt=None if start == "scratch" else f"{start}.pt")
    return place


@pytest.mark.parametrize("tuning", FINE_TUNING)
@pytest.mark.parametrize("middle", ["", "-coin", "-bissl"])
@pytest.mark.parametrize("start", ["scratch", "simclr", "byol"])
def test_every_chain_of_stages_ends_with_a_test_accuracy_that_eval_repeats(stages, monkeypatch, start, middle, tuning):
    monkeypatch.chdir(stages)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW_PETALS)
    result = run(tuning, *FEW_LABELS, data="petals", ckpt=None if start + middle == "scratch" else f"{start}{middle}.pt")
    assert 0 <= result["test_top1"] <= 100
    assert common.load_checkpoint(f"{tuning}.pt")["classes"][0] == "3 round"
    again = finetune.main(["--ckpt", f"{tuning}.pt", "--eval", "--device", "cpu", "--precision", "float32"])
    assert again["test_top1"] == result["test_top1"]


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji pictures are not here")
def test_finetune_runs_on_the_emoji_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = finetune.main([*SMALL, "--data", str(EMOJI), "--root", "root", "--arch", "resnet10", "--epochs", "1",
                            "--labels-per-class", "2"])
    assert len(common.load_checkpoint("finetune.pt")["classes"]) == 9
    assert 0 <= result["test_top1"] <= 100


# ------------------------------------------------------------------------------------------------ what is written

@pytest.mark.parametrize("script, unit", [("simclr", "epoch"), ("byol", "epoch"), ("bissl", "alternation")])
def test_the_log_holds_one_line_an_epoch_and_main_returns_the_last(starts, monkeypatch, script, unit):
    monkeypatch.chdir(starts)
    count = {"bissl": "--alternations"}.get(script, "--epochs")
    result = run(script, count, "3", "--out", "three")
    assert [line[unit] for line in lines("three.jsonl")] == [1, 2, 3]
    assert lines("three.jsonl")[-1] == result


@pytest.mark.parametrize("script", FINE_TUNING)
def test_the_log_of_fine_tuning_ends_with_the_test_accuracy_that_main_returns(here, script):
    result = from_scratch(script, "--epochs", "3")
    *epochs, last = lines(f"{script}.jsonl")
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

@pytest.mark.parametrize("start", [*SCRIPTS, "torchvision"])
def test_freeze_starts_from_the_checkpoint_and_changes_no_bit_of_the_backbone(starts, monkeypatch, start):
    monkeypatch.chdir(starts)
    run("finetune", "--ckpt", f"{start}.pt", "--freeze", "--epochs", "2", "--out", "frozen")
    before, after = (common.load_checkpoint(name)["backbone"] for name in (f"{start}.pt", "frozen.pt"))
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert after.keys() == {key for key in before if not key.startswith("fc.")}


@pytest.mark.parametrize("tuning, start", [*[("finetune", start) for start in ("simclr", "byol", "coin", "bissl", "torchvision")],
                                           ("core_tuning", "torchvision"), ("bi_tuning", "torchvision")])
def test_fine_tuning_trains_the_backbone_whatever_it_comes_from(starts, monkeypatch, tuning, start):
    monkeypatch.chdir(starts)
    result = run(tuning, "--ckpt", f"{start}.pt", "--out", "tuned")
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
    monkeypatch.setattr(finetune, "train", lambda trial: (seen.append(len(trial.data)), train(trial)))
    new_finetune(*flags)
    assert seen == [images]  # 3 classes of 12; a fifth of each (2) is held out where there is a choice to make


@pytest.mark.parametrize("coin_flags, flags, said", [
    ("--labels-per-class 3", "--labels-per-class 3", ""),
    ("--labels-per-class 3", "--labels-per-class 3 --seed 1", "other labelled images"),
    ("--labels-per-class 3", "--labels-per-class 3 --seeds 2", "other labelled images"),
    ("--labels-per-class 0", "--labels-per-class 3", "other labelled images"),
    ("--labels-per-class 3", "--fraction 0.5", "other labelled images"),
    ("--labels-per-class 3", "--labels-per-class 3 --search 1", ""),
    ("--labels-per-class 0", "--labels-per-class 0 --search 1", "learnt from val"),
    ("--labels-per-class 0", "--labels-per-class 0", "")])
def test_fine_tuning_says_where_an_earlier_stage_has_seen_labels_that_it_should_not(here, capsys, coin_flags, flags, said):
    run("coin", *coin_flags.split(), "--arch", "resnet10", ckpt=None)
    capsys.readouterr()
    run("finetune", *flags.split(), ckpt="coin.pt")
    printed = capsys.readouterr().out
    assert ("has learnt from" in printed) == bool(said) and said in printed


# --------------------------------------------------------------------------------------------------------- search

@pytest.fixture
def unequal(here):
    """pictures/ with a test split of 15 images, so that the length of a split tells which one it is."""
    for path in sorted((here / "pictures" / "test").rglob("*.png")):
        if int(path.stem) >= 5:
            path.unlink()
    return here


@pytest.mark.parametrize("script", FINE_TUNING)
def test_search_and_seeds_give_mean_and_deviation_over_the_final_runs(unequal, script):
    result = from_scratch(script, "--search", "2", "--seeds", "2")
    runs = lines(f"{script}.jsonl")[-1]["runs"]
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

@pytest.mark.parametrize("script", FINE_TUNING)
def test_fine_tuning_learns_easy_classes_in_a_few_epochs(here, script):
    assert from_scratch(script, "--epochs", "4")["test_top1"] > 80  # chance is 33


@pytest.mark.parametrize("script", ["simclr", "byol", "coin"])
def test_the_loss_falls(here, script):
    from_scratch(script, "--epochs", "8", "--lr", "0.003" if script != "coin" else "0.03")
    losses = [line["loss"] for line in lines(f"{script}.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.2


def test_the_new_method_of_the_readme_runs_and_is_fine_tuned(here, monkeypatch):
    text = (ROOT / "README.md").read_text().split("## Adding a method")[1]
    (here / "rotation.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    monkeypatch.syspath_prepend(str(here))
    import rotation
    x, angle = rotation.turn(torch.arange(5 * 3 * 4 * 4.).view(5, 3, 4, 4))
    assert angle.tolist() == [0, 0, 1, 2, 3] and x.shape == (5, 3, 4, 4)
    assert rotation.main(short("simclr", "--out", "rotation", ckpt=None))["loss"] > 0
    assert run("finetune", ckpt="rotation.pt")["test_top1"] >= 0
