"""The scripts as a student runs them: through their command lines, one after the other, on small
data."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import finetune
from conftest import FINE_TUNING, ROOT, SCRIPTS, draw_nothing, files, json_lines, write_folder

SHARED_FLAGS = ["--data", "--root", "--image-size", "--arch", "--ckpt", "--out", "--epochs",
                "--batch-size", "--lr", "--weight-decay", "--seed", "--device", "--resume"]
SMALL = ["--image-size", "16", "--batch-size", "8", "--device", "cpu", "--precision", "float32"]
SHORT = {
    "simclr": ["--epochs", "1", "--arch", "resnet10"],
    "byol": ["--epochs", "1", "--arch", "resnet10"],
    "coin": ["--epochs", "2", "--alpha", "0.5"],
    "bissl": ["--alternations", "1", "--lower-steps", "2", "--upper-steps", "2",
              "--head-epochs", "1", "--pretext-batch-size", "8"],
    "finetune": ["--epochs", "1", "--spent", "0"],
    "core_tuning": ["--epochs", "1", "--spent", "0"],
    "bi_tuning": ["--epochs", "1", "--spent", "0", "--keys", "4"],
}
START = {"coin": "simclr.pt", "bissl": "simclr.pt", "finetune": "bissl.pt",
         "core_tuning": "coin.pt", "bi_tuning": "coin.pt"}
FEW_PETALS = {"unlabeled": 32, "train": 60, "val": 30, "test": 30}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take longer than these runs: only the real commands of the fixture `starts` draw
    them."""
    draw_nothing(monkeypatch)


def short(script, *more, ckpt="", data="pictures"):
    """The short command line; what comes later in `more` replaces what it has. Without ckpt: the
    script's START."""
    flags = [*SMALL, "--data", data, "--root", "root", *SHORT[script]]
    start = START.get(script) if ckpt == "" else ckpt
    if start:
        flags += ["--ckpt", start]
    return [*flags, *more]


def run(script, *more, **named):
    return SCRIPTS[script].main(short(script, *more, **named))


def from_scratch(script, *more):
    return run(script, "--arch", "resnet10", *more, ckpt=None)


# ------------------------------------------------------------------------------------- whole chains

@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """What the seven real commands write, one stage after the other, and torchvision.pt, to start
    from."""
    place = tmp_path_factory.mktemp("starts")
    write_folder(place / "pictures")
    for together in (["simclr", "byol"], ["coin", "bissl"], FINE_TUNING):
        runs = []
        for script in together:
            runs.append(subprocess.Popen(
                [sys.executable, str(ROOT / f"{script}.py"), *short(script)], cwd=place, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"}))
        for run in runs:
            errors = run.communicate()[1]
            assert run.returncode == 0, errors
    written = {name for name in files(place) if not name.startswith(("root/", "pictures/"))}
    endings = ("pt", "jsonl", "png")
    assert written == {f"{script}.{ending}" for script in SCRIPTS for ending in endings}
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), place / "torchvision.pt")
    return place


def test_the_seven_commands_run_one_after_the_other_and_write_only_to_root_and_out(starts):
    for script in SCRIPTS:
        assert common.load_checkpoint(starts / f"{script}.pt")["method"] == script
        assert json_lines(starts / f"{script}.jsonl")


FEW_LABELS = ("--labels-per-class", "3")


@pytest.mark.parametrize("script", ["simclr", "byol", "coin", "bissl"])
def test_a_k_nn_accuracy_means_the_same_in_all_logs(script, tmp_path, monkeypatch):
    """All of train votes on val, however few labels a stage learns from."""
    asked = []

    def noted(memory, memory_labels, query, query_labels):
        asked.append((len(memory), len(query)))
        return 0.0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW_PETALS)
    monkeypatch.setattr(common, "knn_accuracy", noted)
    few = FEW_LABELS if script in ("coin", "bissl") else ()
    run(script, *few, "--arch", "resnet10", data="petals", ckpt=None)
    assert set(asked) == {(FEW_PETALS["train"], FEW_PETALS["val"])}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder with the checkpoints START.pt and START-MIDDLE.pt that lead to the last stage, all
    on few petals."""
    place = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(common, "PETAL_SPLITS", FEW_PETALS)
        draw_nothing(patch)
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
def test_every_chain_of_stages_ends_with_a_test_accuracy_that_eval_repeats(
        stages, monkeypatch, start, middle, tuning):
    monkeypatch.chdir(stages)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW_PETALS)
    ckpt = None if start + middle == "scratch" else f"{start}{middle}.pt"
    result = run(tuning, *FEW_LABELS, data="petals", ckpt=ckpt)
    assert 0 <= result["test_top1"] <= 100
    assert common.load_checkpoint(f"{tuning}.pt")["classes"][0] == "3 round"
    again = finetune.main(
        ["--ckpt", f"{tuning}.pt", "--eval", "--device", "cpu", "--precision", "float32"])
    assert again["test_top1"] == result["test_top1"]


# ---------------------------------------------------------------------------------- what is written

@pytest.mark.parametrize("script, unit", [
    ("simclr", "epoch"),
    ("byol", "epoch"),
    ("bissl", "alternation")])
def test_the_log_holds_one_line_an_epoch_and_main_returns_the_last(
        starts, monkeypatch, script, unit):
    monkeypatch.chdir(starts)
    count = {"bissl": "--alternations"}.get(script, "--epochs")
    result = run(script, count, "3", "--out", "three")
    assert [line[unit] for line in json_lines("three.jsonl")] == [1, 2, 3]
    assert json_lines("three.jsonl")[-1] == result


@pytest.mark.parametrize("script", FINE_TUNING)
def test_the_log_of_fine_tuning_ends_with_the_test_accuracy_that_main_returns(here, script):
    result = from_scratch(script, "--epochs", "3")
    *epochs, last = json_lines(f"{script}.jsonl")
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert not any("test_top1" in line for line in epochs)
    assert {name: last[name] for name in result} == result
    assert 0 <= last["test_top1"] <= 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_figure_is_a_readable_picture_with_something_in_it(starts, script):
    with Image.open(starts / f"{script}.png") as image:
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


# --------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_shared_flags_in_the_common_order_and_every_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--help"])
    assert not stop.value.code
    _, *entries = re.split(r"^  (?=--)", capsys.readouterr().out, flags=re.M)  # one a flag
    flags = [entry.split()[0] for entry in entries]
    shared = SHARED_FLAGS.copy()
    if script == "bissl":  # it counts alternations
        shared.remove("--epochs")
    assert [flag for flag in flags if flag in shared] == shared
    for flag, entry in zip(flags, entries):
        takes_a_value = not re.match(r"--[\w-]+(  |\n|$)", entry)
        assert not takes_a_value or "(default: " in " ".join(entry.split()), flag


# ---------------------------------------------------------------------------------- starting points

def start_flags(start):
    """torchvision's stem is too large for 16 pixels."""
    larger = ["--image-size", "24"] if start == "torchvision" else []
    return ["--ckpt", f"{start}.pt", *larger]


@pytest.mark.parametrize("start", [*SCRIPTS, "torchvision"])
def test_freeze_starts_from_the_checkpoint_and_changes_no_bit_of_the_backbone(
        starts, monkeypatch, start):
    monkeypatch.chdir(starts)
    run("finetune", *start_flags(start), "--freeze", "--epochs", "2", "--out", "frozen")
    before = common.load_checkpoint(f"{start}.pt")["backbone"]
    after = common.load_checkpoint("frozen.pt")["backbone"]
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert after.keys() == {key for key in before if not key.startswith("fc.")}


@pytest.mark.parametrize("tuning, start", [
    ("finetune", "simclr"),
    ("finetune", "byol"),
    ("finetune", "coin"),
    ("finetune", "bissl"),
    ("finetune", "torchvision"),
    ("core_tuning", "torchvision"),
    ("bi_tuning", "torchvision")])
def test_fine_tuning_trains_the_backbone_whatever_it_comes_from(starts, monkeypatch, tuning, start):
    monkeypatch.chdir(starts)
    result = run(tuning, *start_flags(start), "--out", "tuned")
    before = common.load_checkpoint(f"{start}.pt")["backbone"]
    after = common.load_checkpoint("tuned.pt")["backbone"]
    changed = {key: not torch.equal(after[key], before[key]) for key in after}
    assert changed["conv1.weight"] and changed["layer4.0.conv2.weight"]
    assert "test_top1" in result


def test_bissl_says_that_a_foreign_checkpoint_has_no_pretext_head_and_goes_on(
        starts, monkeypatch, capsys):
    monkeypatch.chdir(starts)
    torch.save(common.load_checkpoint("simclr.pt")["backbone"], "foreign.pt")
    run("bissl", "--ckpt", "foreign.pt", "--out", "from_foreign")
    assert "no pretext head" in capsys.readouterr().out
    assert common.load_checkpoint("from_foreign.pt")["config"]["pretext"] == "simclr"
    run("bissl", "--ckpt", "simclr.pt", "--out", "from_simclr")
    assert "no pretext head" not in capsys.readouterr().out


@pytest.mark.parametrize("data, jitter", [("pictures", 0.4), ("doodles", 0.5)])
def test_a_new_pretext_head_has_the_defaults_of_the_pretext_images(
        starts, monkeypatch, data, jitter):
    monkeypatch.chdir(starts)
    monkeypatch.setattr(common, "DOODLES", 16)
    torch.save(common.load_checkpoint("simclr.pt")["backbone"], "foreign.pt")
    run("bissl", "--ckpt", "foreign.pt", "--pretext-data", data, "--out", "from_foreign")
    config = common.load_checkpoint("from_foreign.pt")["config"]["pretext_config"]
    assert config["jitter"][0] == jitter


def test_a_second_stage_goes_on_with_the_pretext_images_of_the_first(starts, monkeypatch):
    monkeypatch.chdir(starts)
    monkeypatch.setattr(common, "DOODLES", 16)
    run("bissl", "--ckpt", "simclr.pt", "--pretext-data", "doodles", "--out", "first")
    run("bissl", "--ckpt", "first.pt", "--out", "second")
    assert common.load_checkpoint("second.pt")["config"]["pretext_data"] == "doodles"


# ----------------------------------------------------------------------------------------- learning

@pytest.mark.parametrize("script", FINE_TUNING)
def test_fine_tuning_learns_easy_classes_in_a_few_epochs(here, script):
    assert from_scratch(script, "--epochs", "4")["test_top1"] > 80  # chance is 33


@pytest.mark.parametrize("script", ["simclr", "byol", "coin"])
def test_the_loss_falls(here, script):
    from_scratch(script, "--epochs", "8", "--lr", "0.003" if script != "coin" else "0.03")
    losses = [line["loss"] for line in json_lines(f"{script}.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.2


def test_the_new_method_of_the_readme_runs_and_is_fine_tuned(here, monkeypatch):
    text = (ROOT / "tests/README.md").read_text().split("## Adding a method")[1]
    (here / "rotation.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    monkeypatch.syspath_prepend(str(here))
    import rotation
    x, angle = rotation.turn(torch.arange(5 * 3 * 4 * 4.).view(5, 3, 4, 4))
    assert angle.tolist() == [0, 0, 1, 2, 3] and x.shape == (5, 3, 4, 4)
    assert rotation.main(short("simclr", "--out", "rotation", ckpt=None))["loss"] > 0
    assert run("finetune", ckpt="rotation.pt")["test_top1"] >= 0
