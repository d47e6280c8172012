"""A run that was stopped and goes on with --resume ends exactly as the run that was never
stopped."""
import contextlib
import os
import shlex
import signal
import time

import pytest
import torch

import common
import finetune
from conftest import SCRIPTS, draw_nothing, error_line, write_folder

BILEVEL = ["--lower-steps", "2", "--upper-steps", "1", "--head-epochs", "1", "--cg-steps", "2",
           "--pretext-batch-size", "8"]
PETALS = ["--data", "petals", "--labels-per-class", "2"]
RUNS = {
    "simclr": ["simclr", "--arch", "resnet10", "--epochs", "3"],
    "byol": ["byol", "--arch", "resnet10", "--epochs", "3"],
    "coin": ["coin", "--ckpt", "start.pt", "--epochs", "4", "--alpha", "0.75", "--balanced", "3"],
    "bissl": ["bissl", "--ckpt", "start.pt", "--alternations", "3", *BILEVEL],
    "byol_bissl": ["bissl", "--ckpt", "byol.pt", "--alternations", "2", *BILEVEL],
    "finetune": ["finetune", "--ckpt", "start.pt", "--epochs", "3", "--eta", "0.1"],
    "core_tuning": ["core_tuning", "--ckpt", "start.pt", "--epochs", "3"],
    "bi_tuning": ["bi_tuning", "--ckpt", "start.pt", "--epochs", "3", "--keys", "5",
                  "--random-queue"],
    "detect": ["finetune", "--ckpt", "start.pt", "--epochs", "3", *PETALS, "--task", "detect"],
    "segment": ["core_tuning", "--ckpt", "start.pt", "--epochs", "3", *PETALS, "--task", "segment"],
    "detect_bissl": ["bissl", "--ckpt", "start.pt", "--alternations", "2", *BILEVEL, *PETALS,
                     "--task", "detect"],
    "search": ["finetune", "--ckpt", "start.pt", "--epochs", "2", "--search", "2", "--seeds", "2"],
}
LONG = dict.fromkeys(SCRIPTS, ["--epochs", "4"]) | {"bissl": ["--alternations", "3"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and start.pt, in which the runs of this file are made."""
    place = tmp_path_factory.mktemp("resume")
    write_folder(place / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run("simclr", "start", "--epochs", "1")
        run("byol", "byol", "--epochs", "1")
    return place


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(common, "PETAL_SPLITS", dict(unlabeled=16, train=20, val=10, test=10))
    draw_nothing(monkeypatch)


def command(name, out, *more):
    script, *argv = RUNS[name]
    return script, ["--data", "pictures", "--root", "root", "--image-size", "16",
                    "--batch-size", "8", "--device", "cpu", "--precision", "float32", *argv,
                    "--out", out, *more]


def run(name, out, *more):
    script, argv = command(name, out, *more)
    return SCRIPTS[script].main(argv)


@pytest.fixture(scope="module")
def uninterrupted():
    """Runs `name` once, on the first call: what main() returned. Its files are whole_NAME."""
    results = {}

    def make(name):
        if name not in results:
            results[name] = run(name, f"whole_{name}")
        return results[name]
    return make


def read(path):
    with open(path, "rb") as file:
        return file.read()


def same(a, b):
    """Equal to the last bit, all through nested dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_run(out, whole):
    """Same weights, same optimiser, same log: each epoch once."""
    ours, theirs = common.load_checkpoint(f"{out}.pt"), common.load_checkpoint(f"{whole}.pt")
    for part in ("backbone", "head", "projector", "resume"):
        assert same(ours[part], theirs[part]), part
    assert read(f"{out}.jsonl") == read(f"{whole}.jsonl")


class Stop(Exception):
    """Stands for whatever ends a run."""


@contextlib.contextmanager
def stop_at_save(monkeypatch, number, when, error=Stop):
    """Make the number-th save_checkpoint raise, before it wrote or after."""
    real, calls = common.save_checkpoint, []

    def save_checkpoint(*args, **named):
        calls.append(1)
        if len(calls) == number and when == "before":
            raise error
        real(*args, **named)
        if len(calls) == number:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save_checkpoint)
        yield


@pytest.mark.parametrize("name, save, when", [
    ("simclr", 1, "before"),    # there is no checkpoint yet: --resume simply starts
    ("simclr", 2, "before"), ("simclr", 2, "after"),
    ("byol", 2, "before"), ("coin", 2, "after"),
    ("bissl", 1, "after"), ("bissl", 2, "before"), ("byol_bissl", 1, "after"),
    ("core_tuning", 2, "before"), ("bi_tuning", 2, "before"), ("bi_tuning", 1, "after"),
    ("finetune", 1, "after"), ("finetune", 2, "before"),
    ("search", 2, "before"),    # in the last of the two epochs of the first run
    ("search", 2, "after"),     # between two runs of the search
    ("search", 5, "before")])   # between the search and the final runs
def test_a_run_stopped_before_or_after_a_save_goes_on_to_the_same_end(
        uninterrupted, monkeypatch, name, save, when):
    result = uninterrupted(name)
    out = f"{name}_{save}_{when}"
    with stop_at_save(monkeypatch, save, when), pytest.raises(Stop):
        run(name, out)
    assert run(name, out, "--resume") == result
    assert_same_run(out, f"whole_{name}")


@pytest.mark.skipif(not hasattr(os, "fork"),
                    reason="the run to be killed is forked: a new Python takes seconds to start")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_killed_in_the_middle_goes_on_to_the_same_end(name):
    log = f"killed_{name}.jsonl"
    process = os.fork()
    if process == 0:
        try:
            run(name, f"killed_{name}", *LONG[name])
        finally:
            os._exit(1)
    # The log appears with the first finished epoch.
    while os.waitpid(process, os.WNOHANG) == (0, 0) and not os.path.exists(log):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert read(log).count(b"\n") < int(LONG[name][1])
    result = run(name, f"killed_{name}", *LONG[name], "--resume")
    assert result == run(name, f"unkilled_{name}", *LONG[name])
    assert_same_run(f"killed_{name}", f"unkilled_{name}")


@pytest.mark.parametrize("name", RUNS)
def test_resuming_a_finished_run_returns_its_metrics_and_changes_nothing(uninterrupted, name):
    result = uninterrupted(name)
    before = [read(f"whole_{name}.{ending}") for ending in ("pt", "jsonl")]
    assert run(name, f"whole_{name}", "--resume") == result
    assert [read(f"whole_{name}.{ending}") for ending in ("pt", "jsonl")] == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_prints_the_command_that_goes_on(uninterrupted, monkeypatch, capsys, name):
    result = uninterrupted(name)
    with stop_at_save(monkeypatch, 2, "after", KeyboardInterrupt):
        with pytest.raises(SystemExit) as stop:
            run(name, f"ctrl_c_{name}")
    assert stop.value.code == 130
    assert len(common.load_checkpoint(f"ctrl_c_{name}.pt")["resume"]["history"]) == 2
    printed = capsys.readouterr().err.split("Go on with: ")[1]
    python, script, *argv = shlex.split(printed)
    assert (python, script) == ("python", f"{RUNS[name][0]}.py") and "--resume" in argv
    assert SCRIPTS[name].main(argv) == result


def test_ctrl_c_before_the_first_save_does_not_lead_back_to_an_older_run(
        uninterrupted, monkeypatch, capsys):
    uninterrupted("simclr")
    run("simclr", "older")
    with stop_at_save(monkeypatch, 1, "before", KeyboardInterrupt):
        with pytest.raises(SystemExit):
            run("simclr", "older")
    said = capsys.readouterr().err
    assert "nothing has been saved yet" in said and "--resume" not in said


def test_ctrl_c_of_a_resumed_run_names_resume_once(uninterrupted, monkeypatch, capsys):
    for more in ([], ["--resume"]):
        with stop_at_save(monkeypatch, 1, "after", KeyboardInterrupt):
            with pytest.raises(SystemExit):
                run("simclr", "twice_ctrl_c", *more)
        assert capsys.readouterr().err.split().count("--resume") == 1


def test_ctrl_c_of_an_evaluation_names_no_command_to_go_on_with(uninterrupted, monkeypatch, capsys):
    def stop(*ignored):
        raise KeyboardInterrupt

    uninterrupted("finetune")
    monkeypatch.setattr(finetune, "evaluate_checkpoint", stop)
    with pytest.raises(SystemExit) as stopped:
        run("finetune", "nothing", "--eval", "--ckpt", "whole_finetune.pt")
    assert stopped.value.code == 130 and "Go on" not in capsys.readouterr().err


def leave_some_out(split):
    for label in "abc":
        (split / label / "0.png").rename(split / label / "0.off")


def swap_two_classes(split):
    (split / "a").rename(split / "c_")
    (split / "c").rename(split / "a")
    (split / "c_").rename(split / "c")


@pytest.mark.parametrize("change, now", [(leave_some_out, 33), (swap_two_classes, 36)])
@pytest.mark.parametrize("name, save", [
    ("simclr", 1), ("finetune", 1), ("search", 1), ("search", 2), ("coin", 1)])
def test_a_run_does_not_go_on_with_other_images(
        name, save, change, now, tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "pictures")
    with stop_at_save(monkeypatch, save, "after"), pytest.raises(Stop):
        run(name, str(tmp_path / "out"), "--data", str(folder))
    before = read(tmp_path / "out.pt")
    change(folder / "train")
    line = error_line(capsys, run, name, str(tmp_path / "out"), "--data", str(folder), "--resume")
    assert " 36 images (" in line and f"now there are {now} images (" in line
    assert read(tmp_path / "out.pt") == before


@pytest.mark.parametrize("change, now", [(leave_some_out, 33), (swap_two_classes, 36)])
def test_a_run_does_not_go_on_with_other_test_images(change, now, tmp_path, monkeypatch, capsys):
    folder, out = write_folder(tmp_path / "pictures"), str(tmp_path / "out")
    more = "--data", str(folder), "--epochs", "1", "--seeds", "2"
    with stop_at_save(monkeypatch, 1, "after"), pytest.raises(Stop):
        run("finetune", out, *more)
    change(folder / "test")
    line = error_line(capsys, run, "finetune", out, *more, "--resume")
    assert "scored on 36 images (" in line and ") of test, and now" in line
    assert f" has {now} images (" in line


def test_a_run_goes_on_where_its_folder_has_moved(tmp_path, monkeypatch):
    write_folder(tmp_path / "pictures")
    with stop_at_save(monkeypatch, 1, "after"), pytest.raises(Stop):
        run("finetune", str(tmp_path / "out"), "--data", str(tmp_path / "pictures"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pictures").rename(tmp_path / "elsewhere" / "pictures")
    run("finetune", str(tmp_path / "out"), "--data", str(tmp_path / "elsewhere" / "pictures"),
        "--resume")


def test_of_two_runs_with_one_out_one_ends(tmp_path, monkeypatch, capsys):
    out, save = str(tmp_path / "out"), common.Run.save

    def save_and_start_another(of_run):
        save(of_run)
        monkeypatch.setattr(common.Run, "save", save)
        run("simclr", out, "--seed", "1")

    monkeypatch.setattr(common.Run, "save", save_and_start_another)
    assert "another run writes to --out" in error_line(capsys, run, "simclr", out)
    assert read(f"{out}.jsonl").count(b"\n") == 3
    kept = common.load_checkpoint(f"{out}.pt")
    assert kept["config"]["seed"] == 1 and kept["resume"]["finished"]


def test_a_checkpoint_that_changes_between_two_seeds_ends_the_run(tmp_path, monkeypatch, capsys):
    start, end_epoch = str(tmp_path / "start"), finetune.TrialRun.end_epoch
    run("simclr", start, "--epochs", "1")

    def change(of_run):
        end_epoch(of_run)
        ckpt = torch.load(f"{start}.pt", weights_only=True)
        ckpt["backbone"]["conv1.weight"] += 1
        torch.save(ckpt, f"{start}.pt")

    monkeypatch.setattr(finetune.TrialRun, "end_epoch", change)
    line = error_line(capsys, run, "finetune", str(tmp_path / "out"), "--ckpt", f"{start}.pt",
                      "--epochs", "1", "--seeds", "2")
    assert "start.pt has changed since this run began" in line


def test_bissl_does_not_go_on_with_fewer_pretext_images(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "pictures")
    more = "--pretext-data", str(folder)
    with stop_at_save(monkeypatch, 1, "after"), pytest.raises(Stop):
        run("bissl", str(tmp_path / "out"), *more)
    (folder / "train" / "a" / "0.png").unlink()
    line = error_line(capsys, run, "bissl", str(tmp_path / "out"), *more, "--resume")
    made, now = line.split("now there are")
    assert made.count("36 images") == 2 and "35 images" in now and "36 images" in now


@pytest.mark.parametrize("name", ["finetune", "bissl", "coin"])
def test_a_run_does_not_go_on_from_other_weights_than_it_began_with(
        name, tmp_path, capsys):
    out, start = str(tmp_path / "out"), str(tmp_path / "start")
    run("simclr", start, "--epochs", "1")
    run(name, out, "--ckpt", f"{start}.pt")
    run("simclr", start, "--epochs", "1")
    run(name, out, "--ckpt", f"{tmp_path}/./start.pt", "--resume")  # the same once more
    run("simclr", start, "--epochs", "1", "--seed", "1")
    line = error_line(capsys, run, name, out, "--ckpt", f"{start}.pt", "--resume")
    assert "start.pt holds other weights" in line


def test_a_finished_run_is_not_told_as_one_of_other_classes(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures")
    run("finetune", str(tmp_path / "out"), "--data", str(folder))
    write_folder(folder, classes="abcd")
    line = error_line(capsys, run, "finetune", str(tmp_path / "out"), "--data", str(folder),
                      "--resume")
    assert "other classes" in line


def test_a_run_from_a_checkpoint_of_its_own_method_does_not_repeat_that_ones_draws(
        uninterrupted, monkeypatch):
    uninterrupted("simclr")
    uninterrupted("coin")
    stages, seed_epoch = [], common.seed_epoch

    def note(stage, seed, epoch):
        stages.append(stage)
        seed_epoch(stage, seed, epoch)

    monkeypatch.setattr(common, "seed_epoch", note)
    for name, out, ckpt, flags, stage in (
            ("simclr", "on", "whole_simclr", "", "simclr, continued"),
            ("simclr", "further", "on", "", "simclr, continued, continued"),
            ("finetune", "rest", "whole_coin", "--epochs 4", "fine-tuning"),
            ("finetune", "anew", "whole_coin", "--spent 0", "fine-tuning, continued"),
            ("coin", "further_coin", "rest", "", "fine-tuning, continued"),
            ("finetune", "its_rest", "further_coin", "--epochs 4", "fine-tuning, continued"),
            ("core_tuning", "core", "its_rest", "", "fine-tuning, continued, continued")):
        stages.clear()
        run(name, out, "--ckpt", f"{ckpt}.pt", *flags.split())
        assert set(stages) == {stage}, out


def test_no_stage_and_no_epoch_repeats_the_draws_of_another():
    drawn = []
    for stage in ("simclr", "byol", "bissl", "fine-tuning"):
        for seed in (0, 1):
            for epoch in range(3):
                common.seed_epoch(stage, seed, epoch)
                drawn.append(tuple(torch.randperm(50).tolist()))
    assert len(set(drawn)) == 24
