"""The benches' own arithmetic, and each of them run from end to end on a few pictures. What they
measure is never asserted."""
import csv
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_ablation
import bench_accuracy
import bench_bilevel
import bench_bissl
import bench_scale
import bench_speed
import benches
import common
import simclr
from conftest import draw_nothing

FEW = {"unlabeled": 128, "train": 60, "val": 20, "test": 20}  # petals
SHORT_BISSL = ("--alternations 1 --lower-steps 1 --upper-steps 1 --head-epochs 1 "
               "--pretext-batch-size 16")


# --------------------------------------------------------------------------------- their arithmetic

@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_search_has_one_trial_in_each_part_of_every_range(count):
    for shares in bench_accuracy.trials_to_search(count).T:
        assert sorted(np.floor(shares * count).astype(int)) == list(range(count))


def test_a_trial_is_log_uniform_in_the_weights_that_a_row_has():
    row = ("simclr", "bissl_full", "core_tuning")
    assert bench_accuracy.flags_of(row, [0, 1, 0.5, 0.75]) == (
        ["--lr", "0.003", "--weight-decay", "0.01"], ["--lam", "0.0316"], ["--eta", "3.16"])
    tuning, of_stage, of_method = bench_accuracy.flags_of(("simclr", "", "finetune"), [0.5] * 4)
    assert tuning == ["--lr", "0.03", "--weight-decay", "0.000316"] and of_stage == of_method == []


def line(row, labels, *scores):
    return dict(device="here", row=row, labels=labels, mean=float(np.mean(scores)),
                scores=" ".join(map(str, scores)))


def test_a_gain_is_on_the_plain_row_of_the_same_pretext_and_the_best_beats_the_runner_up():
    cells = [line("simclr-finetune", "20", 50, 60, 70),
             line("simclr-bissl-finetune", "20", 52, 61, 72),
             line("simclr-bi_tuning", "20", 71, 80, 91),
             line("simclr-core_tuning", "20", 69, 79, 89),
             line("byol-finetune", "20", 1, 1, 1),
             line("simclr-bi_tuning", "5", 9, 9, 9)]
    plain, bissl, best, second, byol, alone = bench_accuracy.mark(cells)
    assert plain["gain"] == byol["gain"] == alone["gain"] == ""
    assert (bissl["gain"], bissl["gain_95"]) == (1.67, 1.43)  # 2, 1 and 2; 4.303 * 0.577 / 3**0.5
    assert [cell["best"] is True for cell in cells] == [False, False, True, False, False, False]
    assert second["gain"] == 19 and alone["best"] == ""


def test_of_equal_rows_hardly_one_is_called_the_best():
    """The highest of six beats the next by more than its interval in few of 500 tables."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(500):
        level = rng.normal(70, 8, 10)
        cells = [line(row, "20", *(level + rng.normal(0, 3, 10)))
                 for row in bench_accuracy.NAMES[:6]]
        found += any(cell["best"] is True for cell in bench_accuracy.mark(cells))
    assert found < 25
    level = rng.normal(70, 8, 10)
    cells = [line(row, "20", *(level + rng.normal(0, 3, 10))) for row in bench_accuracy.NAMES[:6]]
    cells[3] = line(bench_accuracy.NAMES[3], "20", *(level + 10))
    assert [cell["best"] is True for cell in bench_accuracy.mark(cells)] == [
        False, False, False, True, False, False]


def test_an_ablation_takes_each_variants_best_pair_and_compares_seed_by_seed(monkeypatch):
    # A list of pairs for each seed.
    scores = {"fine-tuning": [[50, 60], [52, 66]], "no focal weight": [[49, 10], [51, 10]]}
    bench = SimpleNamespace(args=SimpleNamespace(seeds=2, pairs=["0.1,0", "0.2,0"], device="cpu"))

    def score(bench, group, variant, seed, pair):
        return scores.get(variant, [[40, 41], [40, 41]])[seed][bench.args.pairs.index(pair)]

    monkeypatch.setattr(bench_ablation, "score", score)
    rows = {row["variant"]: row for row in bench_ablation.rows_of(bench, "ingredients")}
    plain, unweighted = rows["fine-tuning"], rows["no focal weight"]
    assert (plain["val"], plain["pair"], plain["scores"]) == (63, "0.2,0", "60.0 66.0")
    assert (unweighted["val"], unweighted["pair"]) == (50, "0.1,0")
    assert unweighted["gain"] == -13  # -11 and -15
    assert unweighted["gain_95"] == pytest.approx(12.71 * 2, abs=0.01)


# -------------------------------------------------------------------------------- each bench, small

def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint of an epoch of SimCLR on a few petals."""
    out = tmp_path_factory.mktemp("ckpt") / "simclr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "PETAL_SPLITS", FEW)
        simclr.main(["--data", "petals", "--image-size", "16", "--epochs", "1", "--batch-size",
                     "16", "--device", "cpu", "--out", str(out)])
    return f"{out}.pt"


@pytest.fixture
def few_petals(monkeypatch):
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW)


def test_a_finished_run_is_not_made_again(folder, tmp_path, monkeypatch, capsys):
    """Two rows, two seeds, a search of two, from drawing the pretext's views to the figure; then
    once more, from the book."""
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    flags = ("--device cpu --image-size 16 --pretext-epochs 1 --epochs 8 --search 2 --seeds 2 "
             "--labels 5").split()
    flags += ["--data", str(folder), "--root", str(tmp_path / "root")]
    flags += ["--runs", str(tmp_path / "runs")]
    parser = simclr.parser

    def small_batches():
        p = parser()
        p.set_defaults(batch_size=8)
        return p

    monkeypatch.setattr(simclr, "parser", small_batches)
    for row in ("simclr-finetune", "simclr-coin"):
        bench_accuracy.main([*flags, "--rows", row])
    table = read(tmp_path / "accuracy-pictures.csv")
    assert [cell["row"] for cell in table] == ["simclr-finetune", "simclr-coin-finetune"]
    assert all(len(cell["scores"].split()) == 2 for cell in table)
    assert (tmp_path / "accuracy-pictures.png").exists()
    book = (tmp_path / "runs" / "runs.jsonl").read_text()
    assert book.count("-val") == 2 * 2 and book.count("-test") == 2 * 2

    for script in benches.SCRIPTS.values():
        monkeypatch.setattr(script, "main", lambda argv: pytest.fail("made again"))
    bench_accuracy.main([*flags, "--rows", "simclr-finetune"])
    assert (tmp_path / "runs" / "runs.jsonl").read_text() == book


def test_every_kind_of_row_of_the_accuracy_bench_runs(few_petals, ckpt, tmp_path):
    """The chains of one seed and trial that the test above leaves out, judged on val."""
    argv = ["--device", "cpu", "--runs", str(tmp_path / "runs"), "--epochs", "3", "--pretext",
            "--data petals", "--stage", SHORT_BISSL, "--pretext-epochs", "5"]
    bench, asked = bench_accuracy.Bench(bench_accuracy.parse(argv)), []

    def pretext(name, seed, shorter):
        asked.append(shorter)
        return ckpt, 1.0

    bench.pretext = pretext
    for row in (("simclr", "bissl", "core_tuning"), ("simclr", "bissl_full", "bi_tuning")):
        score, _, seconds = bench.chain(row, "all", 0, [0.5] * 4, "val")
        assert 0 <= score <= 100 and seconds > 0
    assert asked == [0, 0]  # of 5 epochs of 128 images, 16 are an eighth
    epochs = {}
    for log in bench.place.glob("*-val.jsonl"):
        epochs["full" in log.name] = len([1 for line in log.open() if "epoch" in line])
    assert epochs == {False: 1, True: 3}  # one warmed the head up, one went through the upper level


@pytest.mark.parametrize("group", ["keys", "alpha", "ingredients", "losses"])
def test_the_ablation_bench_runs(group, few_petals, ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    few = dict(bench_ablation.GROUPS, keys=("bi_tuning", "--keys", (1, 40)),
               alpha=("coin", "--alpha", (0.5,)))
    monkeypatch.setattr(bench_ablation, "GROUPS", few)
    bench_ablation.main([group, "--ckpt", ckpt, "--device", "cpu", "--runs", str(tmp_path / "runs"),
                         "--seeds", "1", "--epochs", "2", "--labels", "2", "--pairs", "0.01,0"])
    rows = read(tmp_path / "ablation-petals.csv")
    assert [row["variant"] for row in rows] == ["fine-tuning", *map(str, few[group][2])]
    assert (tmp_path / f"ablation-petals-{group}.png").exists()


def test_a_paired_interval_holds_the_true_gain_19_times_of_20():
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        level = rng.normal(70, 8, 10)  # what a seed's rows share leaves the difference alone
        plain, other = level + rng.normal(0, 1, 10), level + rng.normal(3, 2, 10)
        mean, half = benches.paired_gain(dict(enumerate(other)), dict(enumerate(plain)))
        held += abs(mean - 3) <= half
    assert 0.935 < held / 2000 < 0.965


def test_a_paired_gain_by_hand():
    mean, half = benches.paired_gain({0: 5, 1: 9, 2: 4, 7: 50}, {2: 3, 1: 4, 0: 2, 8: 1})
    assert mean == 3  # of 3, 5, 1
    assert half == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert benches.paired_gain({0: 5}, {0: 2}) == (3, None)


def test_students_quantiles():
    for freedom, quantile in enumerate(benches.STUDENT, start=1):
        assert quantile == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=6e-3)


def test_the_bissl_bench_runs_every_row_and_none_twice(tmp_path, monkeypatch, capsys):
    draw_nothing(monkeypatch)
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW)
    monkeypatch.setattr(common, "DOODLES", 128)
    monkeypatch.setattr(bench_bissl, "EPOCHS", {2: 1})
    monkeypatch.setattr(bench_bissl, "GRID", {"lam": (0.1,)})
    small = "--image-size 16 --batch-size 8"
    argv = ["--device", "cpu", "--seeds", "0", "--labels", "2", "--finetune",
            small, "--stage", f"{SHORT_BISSL} {small}", "--pretext", f"--epochs 1 {small}",
            "--runs", str(tmp_path / "runs")]
    bench_bissl.main(argv)
    rows = read(tmp_path / "bissl-doodles-petals.csv")
    assert [row["row"] for row in rows] == list(bench_bissl.ROWS)
    assert (tmp_path / "bissl-doodles-petals-2.png").exists()
    book = (tmp_path / "runs/runs.jsonl").read_text()
    bench_bissl.main([*argv, "--grid", "lam"])
    assert (tmp_path / "bissl-doodles-petals-2-lam.png").exists()
    assert len(read(tmp_path / "bissl-doodles-petals.csv")) == len(rows) + 1
    grown = (tmp_path / "runs/runs.jsonl").read_text()
    assert grown.startswith(book) and len(grown.splitlines()) == len(book.splitlines()) + 2
    bench_bissl.main(argv)
    assert (tmp_path / "runs/runs.jsonl").read_text() == grown
    bench_bissl.main([*argv, "--rates", "0.01", "0.1", "--rows", "SimCLR", "BiSSL"])
    for row in read(tmp_path / "bissl-doodles-petals-rates.csv"):
        assert row["rate"] in ("0.01", "0.1")
    tried = [line for line in (tmp_path / "runs/runs.jsonl").read_text().splitlines()
             if "-val" in line]
    assert len(tried) == 4
    bench_bissl.main([*argv, "--parts", "--seeds", "0", "1"])
    assert "over pretexts: " in capsys.readouterr().out


def test_the_parts_of_a_variance_are_found_again():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        scores = rng.normal(0, 5, (6, 1)) + rng.normal(0, 3, (1, 6)) + rng.normal(0, 2, (6, 6))
        found.append(bench_bissl.parts_of_variance(scores) ** 2)
    assert np.mean(found, 0) == pytest.approx([25, 9, 4], rel=0.1)
    assert bench_bissl.parts_of_variance([[1, 1], [5, 5]]) == pytest.approx([8 ** 0.5, 0, 0])


def test_the_rate_of_a_row_is_that_of_its_best_mean_on_val():
    scores = {0.1: (50, 70), 0.2: (61, 61), 0.3: (10, 90)}
    chains = [SimpleNamespace(score=lambda row, rate, judge, i=i: (scores[rate][i], 0))
              for i in range(2)]
    assert bench_bissl.best_rate(chains, "BiSSL", list(scores)) == 0.2
    assert bench_bissl.best_rate(chains, "BiSSL", []) is None


def test_a_mixture_of_both_backbones_is_one(tmp_path, monkeypatch):
    """c = 1 is phi_B, statistics and counters aside."""
    chain = bench_bissl.Chain(SimpleNamespace(
        args=SimpleNamespace(labels=20, task="classify")), 0)
    theta, phi = (common.build_backbone("resnet10", True).state_dict() for _ in range(2))
    path = tmp_path / "bissl.pt"
    torch.save(dict(backbone=theta, resume=dict(upper_backbone=phi)), path)
    chain.stage = lambda: (path, {})
    for c, expected in ((0, theta), (1, phi)):
        mixed = torch.load(chain.mixture(c)[0], weights_only=True)["backbone"]
        for name, value in expected.items():
            torch.testing.assert_close(mixed[name], value)
    half = torch.load(chain.mixture(0.5)[0], weights_only=True)["backbone"]["conv1.weight"]
    torch.testing.assert_close(half, (theta["conv1.weight"] + phi["conv1.weight"]) / 2)


def test_the_bilevel_bench_runs(few_petals, ckpt, tmp_path, monkeypatch):
    """Two states, of which one has been through an alternation; every kind of lower run."""
    draw_nothing(monkeypatch)
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    for name, value in dict(AFTER=(0, 1), LENGTHS=(), MORE_LENGTHS_AFTER=(0,), SOLVE_STEPS=3,
                            LOWER_RUNS=[("sgd", 2), ("lars", 2)], USUAL_STEPS=1, N_U=2,
                            H_IMAGES=(16, 8), EXACT_STEPS=2).items():
        monkeypatch.setattr(bench_bilevel, name, value)
    (tmp_path / "runs/seed0").mkdir(parents=True)
    shutil.copy(ckpt, tmp_path / "runs/seed0/simclr.pt")
    few = ("--device cpu --image-size 16 --pretext-batch-size 16 --batch-size 8 "
           "--labels-per-class 2")
    argv = ["--seeds", "0", "--runs", str(tmp_path / "runs"), "--bissl",
            f"{few} {SHORT_BISSL} --alternations 3"]
    bench_bilevel.main(argv)
    bench_bilevel.main([*argv, "--solvers"])
    rows = read(tmp_path / "bilevel.csv")
    directions = {row["direction"] for row in rows}
    assert len(directions) == 7
    assert len(rows) == 7 * 2 + 2 * len(bench_bilevel.LONG_DIRECTIONS)
    assert {row["alternations"] for row in rows} == {"0", "1"}
    assert all(math.isfinite(float(row[name])) for row in rows
               for name in bench_bilevel.FIELDS[7:])
    assert (tmp_path / "bilevel.png").exists()
    rows = read(tmp_path / "bilevel-solvers.csv")
    assert len(rows) == 2 * 2 * len(bench_bilevel.SOLVERS)
    assert [row["products"] for row in rows if row["solver"] == "5 steps"] == ["10"] * 4
    assert all(math.isfinite(float(row["error"])) for row in rows)


@pytest.fixture
def small_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    for name, value in dict(arch="resnet10", size=16, batch=8, tuning_batch=8, hessian_batch=4,
                            pictures=8, lightly_batches=2).items():
        monkeypatch.setattr(bench_speed.CPU, name, value)

    def once(ours, reference, device, rounds):
        spent = bench_speed.seconds(ours, device), bench_speed.seconds(reference, device)
        return *spent, spent[0] / spent[1]

    monkeypatch.setattr(bench_speed, "in_turn", once)
    return tmp_path / "speed.csv"


@pytest.mark.parametrize("group", [group for group in bench_speed.GROUPS if group != "lightly"])
def test_the_speed_bench_runs(group, small_speed, monkeypatch):
    bench_speed.main([group])
    rows = read(small_speed)
    assert len(rows) == (4 if group == "tuning" else 1)
    for row in rows:
        assert list(row) == list(bench_speed.FIELDS) and float(row["ratio"]) > 0


def test_the_row_against_lightly_is_left_out_where_it_is_not_there(
        small_speed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightly.loss", None)  # which makes its import fail
    bench_speed.main(["lightly"])
    assert not small_speed.exists()
    out, = capsys.readouterr().out.splitlines()
    assert out.startswith("lightly: row left out")


def test_the_row_against_lightly_runs(small_speed, monkeypatch):
    """With stand-ins that have the signatures of lightly 1.6, so that this runs without it."""
    class SimCLRTransform:
        def __init__(self, input_size, cj_prob, cj_strength, cj_bright, cj_contrast, cj_sat, cj_hue,
                     min_scale, random_gray_scale, gaussian_blur, sigmas):
            self.size = input_size

        def __call__(self, image):
            assert image.mode == "RGB"
            return [torch.rand(3, self.size, self.size) for _ in range(2)]

    class NTXentLoss:
        def __init__(self, temperature):
            self.temperature = temperature

        def __call__(self, z1, z2):
            return simclr.nt_xent(z1, z2, self.temperature)

    parts = dict(loss=dict(NTXentLoss=NTXentLoss), transforms=dict(SimCLRTransform=SimCLRTransform))
    parts["models.modules"] = dict(
        SimCLRProjectionHead=lambda width, hidden, out: nn.Linear(width, out))
    for name in ("lightly", "lightly.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, contents in parts.items():
        module = ModuleType(f"lightly.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"lightly.{name}", module)
    bench_speed.main(["lightly"])
    row, = read(small_speed)
    assert row["row"] == "lightly" and float(row["ratio"]) > 0


@pytest.mark.parametrize("task, method, metric", [("detect", "finetune", "ap50"),
                                                  ("segment", "core_tuning", "miou")])
def test_the_bissl_bench_detects_and_segments(task, method, metric, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW)
    monkeypatch.setattr(common, "DOODLES", 128)
    monkeypatch.setattr(bench_bissl, "EPOCHS", {2: 1})
    small = "--image-size 16 --batch-size 8"
    bench_bissl.main([
        "--device", "cpu", "--seeds", "0", "--labels", "2", "--task", task, "--method", method,
        "--epochs", "1", "--rows", "SimCLR", "BiSSL", "--finetune", small, "--stage",
        f"{SHORT_BISSL} {small}", "--pretext", f"--epochs 1 {small}", "--name", task,
        "--runs", str(tmp_path / "runs")])
    assert len(read(tmp_path / f"bissl-{task}.csv")) == 2
    assert f'"test_{metric}"' in (tmp_path / "runs/runs.jsonl").read_text()


def test_the_scale_bench_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_scale, "alone", bench_speed.seconds)
    for name, value in dict(BUDGET=0.05, BATCHES=[8, 16], SIDES=[48, 64], CLASSES=[3, 5]).items():
        monkeypatch.setattr(bench_scale, name, value)
    for name, value in dict(size=16, side_batch=4, class_batch=8).items():
        monkeypatch.setattr(bench_scale.CPU, name, value)
    bench_scale.main([])
    rows = read(tmp_path / "scale.csv")
    counts = {}
    for row in rows:
        counts[row["quantity"]] = counts.get(row["quantity"], 0) + 1
    assert counts == dict(batch=6, side=4, classes=4)
    assert "batch, whole: exponent" in capsys.readouterr().out
    assert (tmp_path / "scale.png").exists()
    assert bench_scale.exponent([(x, 3 * x ** 1.5) for x in (1, 2, 5)]) == pytest.approx(1.5)
