"""Bad input ends with one line that says what to change and exit code 2, and no file is touched."""
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
import finetune
from conftest import ROOT, SCRIPTS, draw_nothing, error_line, files, json_lines, write_folder

SMALL = ["--data", "pictures", "--root", "root", "--image-size", "16", "--batch-size", "8",
         "--device", "cpu", "--precision", "float32", "--out", "out"]
USUAL = {
    "simclr": [*SMALL, "--arch", "resnet10", "--epochs", "1"],
    "byol": [*SMALL, "--arch", "resnet10", "--epochs", "1"],
    "coin": [*SMALL, "--arch", "resnet10", "--epochs", "2", "--alpha", "0.5"],
    "bissl": [*SMALL, "--ckpt", "simclr.pt", "--alternations", "1", "--lower-steps", "1",
              "--upper-steps", "1", "--head-epochs", "1", "--pretext-batch-size", "8"],
    "finetune": [*SMALL, "--arch", "resnet10", "--epochs", "1"],
    "core_tuning": [*SMALL, "--arch", "resnet10", "--epochs", "1"],
    "bi_tuning": [*SMALL, "--arch", "resnet10", "--epochs", "1"],
}


class RunsCode:
    """Unpickling this makes the folder `pwned`."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the rows below name, and an older out.pt, out.jsonl and
    out.png."""
    place = tmp_path_factory.mktemp("bad")
    for name in ("pictures", "hollow", "broken", "all_broken", "no_test"):
        write_folder(place / name)
    write_folder(place / "single", classes=("a",))
    write_folder(place / "four", classes=("a", "b", "c", "d"))
    write_folder(place / "few", classes=("a", "b"), per_class=3)
    write_folder(place / "lonely", classes=("a", "b"), per_class=9)
    for path in sorted((place / "lonely" / "train" / "b").iterdir())[1:]:
        path.unlink()
    write_folder(place / "unlike", splits=("train", "val"))
    write_folder(place / "unlike", classes=("a", "c"), splits=("test",))
    write_folder(place / "unlike_val", splits=("train", "test"))
    write_folder(place / "unlike_val", classes=("a", "c"), splits=("val",))
    shutil.rmtree(place / "no_test" / "test")
    (place / "empty").mkdir()
    for path in (place / "hollow" / "train" / "b").iterdir():
        path.unlink()
    half = place / "broken" / "train" / "b" / "7.png"
    half.write_bytes(half.read_bytes()[:200])
    for path in (place / "all_broken").rglob("*.png"):
        path.write_bytes(b"no picture")
    (place / "blocker").write_text("a file where a folder should be")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for script in SCRIPTS:
            SCRIPTS[script].main([*USUAL[script], "--out", script])
    (place / "truncated.pt").write_bytes((place / "simclr.pt").read_bytes()[:10_000])
    (place / "garbage.pt").write_bytes(b"no checkpoint" * 100)
    (place / "empty.pt").write_bytes(b"")
    (place / "code.pt").write_bytes(pickle.dumps({"state_dict": RunsCode()}))
    torch.save({"note": "no weights", "fc.weight": torch.zeros(2, 2)}, place / "headonly.pt")
    backbone = common.load_checkpoint(place / "simclr.pt")["backbone"]
    torch.save(backbone, place / "foreign.pt")
    misshapen = {**backbone, "layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}
    torch.save(misshapen, place / "misshapen.pt")
    del backbone["layer3.0.bn1.weight"]
    torch.save(backbone, place / "missing.pt")
    for ending in ("pt", "jsonl", "png"):
        (place / f"out.{ending}").write_text("of an older run")
    return place


# script, flags that replace the usual ones, what the message has to name
ROWS = [
    # checkpoints
    ("finetune", "--ckpt nowhere.pt", "nowhere.pt"),
    ("finetune", "--ckpt=", "--ckpt: is empty"),  # --ckpt "$CKPT", which is not set
    ("simclr", "--data=", "--data: is empty"),
    ("finetune", "--prefix encoder_q.", "there is no --ckpt"),
    ("finetune", "--ckpt truncated.pt", "truncated.pt"),
    ("finetune", "--ckpt garbage.pt", "garbage.pt"),
    ("finetune", "--ckpt empty.pt", "empty.pt"),
    ("finetune", "--ckpt pictures", "pictures"),
    ("finetune", "--ckpt code.pt", "would run code"),
    ("finetune", "--ckpt headonly.pt", "conv1.weight"),
    ("finetune", "--ckpt misshapen.pt", "layer1.0.conv1.weight"),
    ("finetune", "--ckpt missing.pt", "layer3.0.bn1.weight"),
    ("finetune", "--ckpt simclr.pt --arch resnet18", "resnet18"),
    ("simclr", "--ckpt garbage.pt", "garbage.pt"),
    ("bissl", "--ckpt garbage.pt", "garbage.pt"),
    ("byol", "--ckpt garbage.pt", "garbage.pt"),
    ("coin", "--ckpt misshapen.pt", "layer1.0.conv1.weight"),
    ("core_tuning", "--ckpt nowhere.pt", "nowhere.pt"),
    ("bi_tuning", "--ckpt missing.pt", "layer3.0.bn1.weight"),
    # data
    ("simclr", "--data petunias", "petals, doodles, flowers"),
    ("simclr", f"--data {300 * 'a'}", "cannot read --data"),
    ("bissl", "--data petunias", "petals, doodles, flowers"),
    ("bissl", "--pretext-data petunias", "petals, doodles, flowers"),
    ("finetune", "--data doodles", "no labels"),
    ("bissl", "--data doodles", "no labels"),
    ("coin", "--data doodles", "no labels"),
    ("core_tuning", "--data doodles", "no labels"),
    ("bi_tuning", "--data doodles", "no labels"),
    ("finetune", "--data petunias", "petals, doodles, flowers"),
    ("simclr", "--data empty", "empty"),
    ("bissl", "--data empty", "empty"),
    ("finetune", "--data empty", "empty"),
    ("finetune", "--data no_test", "no_test/test"),
    ("finetune", "--data hollow", "classes b"),
    ("finetune", "--data broken", "broken/train/b/7.png"),
    ("simclr", "--data all_broken", ".png"),
    ("simclr", "--data few", "--batch-size"),
    ("byol", "--data few", "--batch-size"),
    ("byol", "--data petunias", "petals, doodles, flowers"),
    ("coin", "--data petunias", "petals, doodles, flowers"),
    ("core_tuning", "--data petunias", "petals, doodles, flowers"),
    ("bi_tuning", "--data petunias", "petals, doodles, flowers"),
    ("coin", "--data no_test", "no_test/test"),
    ("core_tuning", "--data broken", "broken/train/b/7.png"),
    ("bi_tuning", "--data hollow", "classes b"),
    ("simclr", "--data unlike_val", "val does not have the classes"),
    ("byol", "--data unlike_val", "val does not have the classes"),
    ("coin", "--data unlike", "test does not have the classes"),
    ("bissl", "--data unlike_val", "val does not have the classes"),
    ("finetune", "--data unlike", "test does not have the classes"),
    ("finetune", "--data unlike_val --labels-per-class 2", "val does not have the classes"),
    ("core_tuning", "--data unlike", "test does not have the classes"),
    ("bi_tuning", "--data unlike", "test does not have the classes"),
    ("coin", "--data single", "one class"),
    ("core_tuning", "--data single", "one class"),
    ("bi_tuning", "--data single", "one class"),
    ("coin", "--labels-per-class 1", "no positives"),
    ("finetune", "--labels-per-class 1 --eta 0.1", "no positives"),
    ("bissl", "--pretext-data few", "--pretext-batch-size"),
    ("bissl", "--pretext byol", "the head of simclr"),
    ("bissl", "--data single", "one class"),
    ("finetune", "--data single", "one class"),
    # evaluation
    ("finetune", "--eval", "--ckpt"),
    ("finetune", "--eval --ckpt simclr.pt", "no head to classify"),
    ("finetune", "--eval --ckpt byol.pt", "no head to classify"),
    ("finetune", "--eval --ckpt foreign.pt", "no head to classify"),
    ("finetune", "--eval --ckpt coin.pt", "no head to classify"),
    ("finetune", "--eval --ckpt bi_tuning.pt --data four", "3 classes"),
    ("finetune", "--eval --ckpt finetune.pt --data four", "3 classes"),
    # command line
    ("simclr", "--colour 1", "--colour"),
    ("bissl", "--colour 1", "--colour"),
    ("finetune", "--colour 1", "--colour"),
    ("simclr", "--epochs many", "--epochs"),
    ("simclr", "--arch resnet11", "resnet11"),
    ("simclr", "--device toaster", "toaster"),
    ("simclr", "--device cuda", "cuda"),
    ("finetune", "--out blocker/x", "blocker/x"),
    ("finetune", "--ckpt finetune.pt --out finetune", "another --out"),
    ("coin", "--ckpt ./simclr.pt --out simclr", "another --out"),
    # numbers that make no sense
    ("simclr", "--image-size 0", "--image-size"),
    ("simclr", "--image-size 8", "--image-size"),
    ("simclr", "--batch-size 0", "--batch-size"),
    ("simclr", "--epochs 0", "--epochs"),
    ("simclr", "--lr -1", "--lr"),
    ("finetune", "--lr -1", "--lr"),
    ("finetune", "--weight-decay -1", "--weight-decay"),
    ("simclr", "--temperature 0", "--temperature"),
    ("simclr", "--temperature -1", "--temperature"),
    ("simclr", "--crop 0", "--crop"),
    ("simclr", "--crop 2", "--crop"),
    ("simclr", "--jitter -1 0 0 0", "--jitter"),
    ("simclr", "--hidden 0", "--hidden"),
    ("simclr", "--dim 0", "--dim"),
    ("simclr", "--probe-every 0", "--probe-every"),
    ("bissl", "--pretext-batch-size 0", "--pretext-batch-size"),
    ("bissl", "--alternations 0", "--alternations"),
    ("bissl", "--lower-steps 0", "--lower-steps"),
    ("bissl", "--upper-steps 0", "--upper-steps"),
    ("bissl", "--cg-steps 0", "--cg-steps"),
    ("bissl", "--cg-tol 2", "--cg-tol"),
    ("bissl", "--recycle -1", "--recycle"),
    ("bissl", "--hessian-batch 0", "--hessian-batch"),
    ("simclr", "--chunk -1", "--chunk"),
    ("bissl", "--damping -1", "--damping"),
    ("bissl", "--damping 0 --lam 0", "--lam"),  # their sum divides
    ("bissl", "--lam -1", "--lam"),
    ("bissl", "--lower-lr -1", "--lower-lr"),
    ("bissl", "--head-epochs -1", "--head-epochs"),
    ("bissl", "--probe-every 0", "--probe-every"),
    ("byol", "--decay 2", "--decay"),
    ("byol", "--blur 2 0", "--blur"),
    ("byol", "--blur 0.5", "--blur"),
    ("byol", "--solarise 0 -1", "--solarise"),
    ("byol", "--dim 0", "--dim"),
    ("coin", "--alpha 0", "--alpha"),
    ("coin", "--alpha 1", "--alpha"),
    ("coin", "--alpha 2", "--alpha"),
    ("coin", "--epochs 1", "--alpha"),
    ("coin", "--eta -1", "--eta"),
    ("coin", "--temperature 0", "--temperature"),
    ("coin", "--labels-per-class 13", "--labels-per-class"),
    ("core_tuning", "--alpha 0", "--alpha"),
    ("core_tuning", "--eta -1", "--eta"),
    ("core_tuning", "--temperature 0", "--temperature"),
    ("core_tuning", "--labels-per-class 13", "--labels-per-class"),
    ("core_tuning", "--seeds 0", "--seeds"),
    ("bi_tuning", "--keys 0", "--keys"),
    ("bi_tuning", "--gamma -1", "--gamma"),
    ("bi_tuning", "--decay -1", "--decay"),
    ("bi_tuning", "--backbone-lr -1", "--backbone-lr"),
    ("bi_tuning", "--temperature 0", "--temperature"),
    ("bi_tuning", "--labels-per-class 13", "--labels-per-class"),
    ("finetune", "--eta -1", "--eta"),
    ("finetune", "--eta 0.1 --freeze", "one of --freeze and --eta"),
    ("finetune", "--temperature 0", "--temperature"),
    ("finetune", "--spent -1", "--spent"),
    ("finetune", "--epochs 3 --spent 3", "--spent"),
    ("finetune", "--crop 2", "--crop"),
    ("finetune", "--labels-per-class 13", "--labels-per-class"),
    ("finetune", "--labels-per-class -1", "--labels-per-class"),
    ("finetune", "--labels-per-class 2 --fraction 0.5", "give one"),
    ("finetune", "--lr inf", "--lr"),
    ("coin", "--temperature inf", "--temperature"),
    ("finetune", "--fraction 0", "--fraction"),
    ("finetune", "--fraction 2", "--fraction"),
    ("finetune", "--seeds 0", "--seeds"),
    ("finetune", "--seeds -1", "--seeds"),
    ("finetune", "--search -1", "--search"),
    # resume
    ("simclr", "--out simclr --resume --lr 0.5", "--lr"),
    ("finetune", "--out finetune --resume --data four", "--data"),
    ("simclr", "--out finetune --resume", "finetune.pt"),
    ("finetune", "--out simclr --resume", "simclr.pt"),
    ("bissl", "--out simclr --resume", "simclr.pt"),
    ("byol", "--out simclr --resume", "simclr.pt"),
    ("coin", "--out coin --resume --alpha 0.4", "--alpha"),
    ("core_tuning", "--out bi_tuning --resume", "bi_tuning.pt"),
    ("bi_tuning", "--out bi_tuning --resume --keys 3", "--keys"),
    ("finetune", "--out headonly --resume", "headonly.pt"),
    ("finetune", "--out missing --resume", "missing.pt"),
]


@pytest.mark.parametrize(
    "script, flags, named", ROWS, ids=[f"{script} {flags}" for script, flags, _ in ROWS])
def test_one_line_says_what_is_wrong_and_no_file_changes(
        place, monkeypatch, capsys, script, flags, named):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(place)
    before = files(place)
    assert named in error_line(capsys, SCRIPTS[script].main, [*USUAL[script], *flags.split()])
    after = files(place)
    assert all(after.get(path) == content for path, content in before.items())
    assert not (place / "pwned").exists()


@pytest.mark.parametrize("script", ["coin", "finetune", "core_tuning", "bi_tuning"])
def test_a_class_with_one_image_and_batches_of_one_class_are_trained_on(
        place, tmp_path, monkeypatch, script):
    monkeypatch.chdir(place)
    more = ["--eta", "0.1"] if script == "finetune" else []
    result = SCRIPTS[script].main([*USUAL[script], "--data", "lonely", "--batch-size", "4",
                                   "--out", str(tmp_path / "out"), *more])
    assert all(value == value for value in result.values() if value is not None)
    ckpt = common.load_checkpoint(tmp_path / "out.pt")
    assert all(value.isfinite().all() for value in ckpt["backbone"].values())


def test_a_real_command_with_bad_input_prints_one_line_without_a_traceback(place):
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune.py"), *USUAL["finetune"], "--data", "all_broken"],
        cwd=place, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script, count", [
    ("simclr", "--epochs"),
    ("byol", "--epochs"),
    ("coin", "--epochs"),
    ("bissl", "--alternations"),
    ("finetune", "--epochs"),
    ("core_tuning", "--epochs"),
    ("bi_tuning", "--epochs")])
def test_a_run_that_diverges_keeps_the_last_finite_checkpoint(
        place, tmp_path, monkeypatch, capsys, script, count):
    monkeypatch.chdir(place)
    real, checkpoint = common.set_learning_rate, tmp_path / "out.pt"

    def diverge_after_the_first_checkpoint(optimizer, peak, *rest, **named):
        real(optimizer, float("inf") if checkpoint.exists() else peak, *rest, **named)

    monkeypatch.setattr(common, "set_learning_rate", diverge_after_the_first_checkpoint)
    with pytest.raises(SystemExit) as stop:
        number = "6" if script == "coin" else "3"
        SCRIPTS[script].main([*USUAL[script], count, number, "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "try a lower" in message and message.count("\n") == 1
    ckpt = common.load_checkpoint(checkpoint)
    assert len(ckpt["resume"]["history"]) == 1
    assert all(value.isfinite().all() for value in ckpt["backbone"].values())


@pytest.mark.parametrize("mode, ending", [
    ("L", "png"),
    ("1", "png"),
    ("LA", "png"),
    ("P", "png"),
    ("RGBA", "png"),
    ("I;16", "png"),
    ("CMYK", "jpg")])
def test_pictures_of_any_mode_can_be_trained_on(tmp_path, monkeypatch, mode, ending):
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)
    folder = write_folder(tmp_path / "pictures", classes=("a", "b"), per_class=4)
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as picture:
            if mode == "I;16":
                picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
            elif mode == "LA":
                picture = picture.convert("L").convert(mode)
            else:
                picture = picture.convert(mode)
        path.unlink()
        picture.save(path.with_suffix(f".{ending}"))
        assert Image.open(path.with_suffix(f".{ending}")).mode == mode
    assert 0 <= finetune.main(USUAL["finetune"])["test_top1"] <= 100
    assert json_lines(tmp_path / "out.jsonl")[0]["epoch"] == 1
