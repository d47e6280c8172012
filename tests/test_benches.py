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

import bench_accuracy
import bench_bilevel
import bench_scale
import bench_speed
import benches
import bi_tuning
import coin
import common
import core_tuning
import simclr
from conftest import draw_nothing, error_line

FEW = {"unlabeled": 128, "train": 60, "val": 20, "test": 20}  # petals
SHORT_BISSL = ("--alternations 1 --lower-steps 1 --upper-steps 1 --head-epochs 1 "
               "--pretext-batch-size 16")


# --------------------------------------------------------------------------------- their arithmetic

@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_search_has_one_trial_in_each_part_of_every_range(count):
    for shares in bench_accuracy.trials_to_search(count).T:
        assert sorted(np.floor(shares * count).astype(int)) == list(range(count))


def row_of(group, name):
    return {row.name: row for row in bench_accuracy.rows_of(group)}[name]


def test_a_trial_is_log_uniform_in_the_weights_that_a_row_does_not_set():
    row = row_of("methods", "simclr-bissl-core_tuning")
    assert bench_accuracy.trial_of(row, [0, 1, 0.5, 0.75]) == (
        ["--lr", "0.003", "--weight-decay", "0.01"], ["--lam", "0.0316"], ["--eta", "3.16"])
    plain = row_of("methods", "simclr-finetune")
    assert bench_accuracy.trial_of(plain, [0.5] * 4) == (
        ["--lr", "0.03", "--weight-decay", "0.000316"], [], [])
    for group, name in (("bissl", "same steps"), ("lam", "lam 0.01")):
        assert bench_accuracy.trial_of(row_of(group, name), [0.5] * 4).stage == []
    assert bench_accuracy.trial_of(row_of("bissl", "J = I"), [0] * 4).stage == ["--lam", "0.001"]
    assert bench_accuracy.trial_of(row_of("eta", "eta 3"), [0] * 4).method == []


def line(row, labels, *scores):
    return dict(device="here", row=row, labels=labels, epochs=60, tuning="--search 6",
                judge="test", metric="top1", mean=float(np.mean(scores)),
                scores=" ".join(f"{seed}:{score}" for seed, score in enumerate(scores)))


CHAINS = bench_accuracy.every_chain()
NAMES = [row.name for row in CHAINS]


def best_of(lines):
    """The rows whose lead on the runner-up leaves 0 out."""
    marked = bench_accuracy.mark(lines, CHAINS)
    first, second = sorted(marked, key=lambda line: -line["mean"])[:2]
    return first["row"] if second["lead"] > second["lead_95"] else None


def test_a_gain_is_on_the_plain_row_of_the_same_pretext_and_the_lead_is_the_best_rows():
    cells = [line("simclr-finetune", "20", 50, 60, 70),
             line("simclr-bissl-finetune", "20", 52, 61, 72),
             line("simclr-bi_tuning", "20", 71, 80, 91),
             line("simclr-core_tuning", "20", 69, 79, 89),
             line("byol-finetune", "20", 1, 1, 1),
             line("simclr-bi_tuning", "5", 9, 9, 9)]
    plain, bissl, best, second, byol, alone = bench_accuracy.mark(cells, CHAINS)
    assert plain["gain"] == byol["gain"] == alone["gain"] == ""
    assert (bissl["gain"], bissl["gain_95"]) == (1.67, 1.43)  # 2, 1 and 2; 4.303 * 0.577 / 3**0.5
    assert (second["gain"], second["lead"], second["lead_95"]) == (19, 1.67, 1.43)
    assert best["lead"] == alone["lead"] == ""


def test_rows_without_a_common_seed_have_no_gain():
    """As when seeds are shared out among several benches, and one is done before the other."""
    plain, best = line("simclr-finetune", "20", 50, 60), line("simclr-bi_tuning", "20", 71, 80)
    best["scores"] = "2:71 3:80"
    for row in bench_accuracy.mark([plain, best], CHAINS):
        assert row["gain"] == row["gain_95"] == row["lead"] == row["lead_95"] == ""


def test_of_the_controls_bissl_is_compared_with_each():
    cells = [line("SimCLR", "20", 50, 60, 70), line("BiSSL", "20", 52, 61, 72),
             line("more epochs", "20", 71, 80, 91)]
    plain, bissl, more = bench_accuracy.mark(cells, bench_accuracy.rows_of("bissl"))
    assert (plain["gain"], bissl["gain"], more["gain"]) == ("", 1.67, 20.67)
    assert (plain["lead"], bissl["lead"], more["lead"]) == (1.67, "", -19)


def test_of_equal_rows_hardly_one_is_called_the_best():
    """The highest of six beats the next by more than its interval in few of 500 tables."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(500):
        level = rng.normal(70, 8, 10)
        found += best_of([line(row, "20", *(level + rng.normal(0, 3, 10)))
                          for row in NAMES[:6]]) is not None
    assert found < 25
    level = rng.normal(70, 8, 10)
    cells = [line(row, "20", *(level + rng.normal(0, 3, 10))) for row in NAMES[:6]]
    cells[3] = line(NAMES[3], "20", *(level + 10))
    assert best_of(cells) == NAMES[3]


def test_the_scripts_own_flags_are_among_what_a_search_tries():
    for count in (0, 2):
        args = SimpleNamespace(rates=[], search=count)
        own, *others = bench_accuracy.trials(args, row_of("methods", "simclr-finetune"))
        assert own == ([], [], []) and len(others) == count


def test_the_search_takes_the_best_mean_over_its_seeds():
    scores = {0.1: (50, 70), 0.2: (61, 61), 0.3: (10, 90)}
    chains = []
    for i in range(2):
        chains.append(SimpleNamespace(score=lambda row, trial, judge, i=i: bench_accuracy.Scored(
            scores[trial.tuning[1]][i], 0, 0)))
    args = SimpleNamespace(rates=list(scores), search=0)
    tried = bench_accuracy.trials(args, None)
    assert bench_accuracy.best_trial(chains, "BiSSL", tried).tuning == ["--lr", 0.2]
    assert bench_accuracy.best_trial(chains[1:], "BiSSL", tried).tuning == ["--lr", 0.3]
    args.rates = []
    chains[0].score = None  # a single trial needs no run
    assert bench_accuracy.best_trial(chains, "", bench_accuracy.trials(args, "")) == ([], [], [])


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


def small_bench(monkeypatch, tmp_path, *flags):
    """The flags of a bench of a few pictures of petals and doodles, whose results go to
    tmp_path."""
    draw_nothing(monkeypatch)
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "PETAL_SPLITS", FEW)
    monkeypatch.setattr(common, "DOODLES", 128)
    monkeypatch.setattr(bench_accuracy, "EPOCHS", {"2": 1, "all": 3})
    small = "--image-size 16 --batch-size 8"
    return ["--device", "cpu", "--seeds", "0", "--labels", "2", "--name", "petals",
            "--finetune", small, "--stage",
            f"{SHORT_BISSL} {small}", "--pretext", f"--data doodles {small}", "--pretext-epochs",
            "1", "--runs", str(tmp_path / "runs"), *flags]


def book_of(tmp_path):
    return (tmp_path / "runs/runs.jsonl").read_text().splitlines()


def test_a_finished_run_is_not_made_again(folder, tmp_path, monkeypatch, capsys):
    """Two rows, two seeds, a search of two, from the pretext to the bench's figure; then once more,
    from the book."""
    draw_nothing(monkeypatch)
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    flags = ("--device cpu --image-size 16 --pretext-epochs 1 --epochs 8 --search 2 --seeds 0 1 "
             "--labels 5").split()
    flags += ["--name", "pictures"]
    flags += ["--stage", SHORT_BISSL]  # as much of the pretext is added to that of these rows
    flags += ["--data", str(folder), "--root", str(tmp_path / "root")]
    flags += ["--runs", str(tmp_path / "runs")]
    parser = simclr.parser

    def small_batches():
        p = parser()
        p.set_defaults(batch_size=8)
        return p

    monkeypatch.setattr(simclr, "parser", small_batches)
    for row in ("simclr-finetune", "simclr-coin-finetune"):
        bench_accuracy.main([*flags, "--rows", row])
    table = read(tmp_path / "methods-pictures.csv")
    assert [cell["row"] for cell in table] == ["simclr-finetune", "simclr-coin-finetune"]
    assert all(len(cell["scores"].split()) == 2 for cell in table)
    assert (tmp_path / "methods-pictures.png").exists()
    book = book_of(tmp_path)
    assert len([line for line in book if '-val"' in line]) == 2 * (1 + 2)
    assert len([line for line in book if '-test"' in line]) == 2 * 2

    for script in benches.SCRIPTS.values():
        monkeypatch.setattr(script, "main", lambda argv: pytest.fail("made again"))
    bench_accuracy.main([*flags, "--rows", "simclr-finetune"])
    assert book_of(tmp_path) == book


def test_bissls_labelled_epochs_are_counted_and_its_pretext_is_shorter(
        few_petals, ckpt, tmp_path, monkeypatch):
    argv = ["--device", "cpu", "--runs", str(tmp_path / "runs"), "--epochs", "3", "--name", "own",
            "--pretext", "--data petals", "--stage", f"{SHORT_BISSL} --lower-steps 5",
            "--pretext-epochs", "5"]
    bench, asked = benches.Bench(bench_accuracy.parse(argv)), []
    chain = bench_accuracy.Chain(bench, 0, "all")

    def main(script, out, flags):
        if script == "simclr":
            asked.append(flags[-1])
            shutil.copy(ckpt, bench.place / f"{out}.pt")
            return dict(knn=0)
        return benches.Bench.main(bench, script, out, flags)

    bench.main = main
    trial = bench_accuracy.Trial([], [], [])
    for name in ("simclr-bissl-core_tuning", "simclr-bissl_full-finetune", "simclr-finetune"):
        score, _, seconds = chain.score(row_of("methods", name), trial, "val")
        assert 0 <= score <= 100 and seconds > 0
    assert asked == [5, 6]  # its lower level shows 80 of 128 images
    epochs = {}
    for log in bench.place.glob("*-val.jsonl"):
        method = "core_tuning" if "core_tuning" in log.name else "finetune"
        epochs[method] = len([1 for line in log.open() if "epoch" in line])
    assert epochs == dict(core_tuning=1, finetune=3)  # 1 for the head, 1 for the upper level


@pytest.mark.parametrize("fails", [None, 0, 1])
def test_quick_makes_each_of_its_rows_once_in_two_processes(fails, monkeypatch, capsys):
    started = []

    def start(command, env):
        started.append(command)
        status = -9 if fails == len(started) - 1 else 0
        return SimpleNamespace(wait=lambda: status)

    monkeypatch.setattr(bench_accuracy.subprocess, "Popen", start)
    argv = ["--quick", "--root", "elsewhere"]
    if fails is None:
        bench_accuracy.main(argv)
    else:
        assert "--quick" in error_line(capsys, bench_accuracy.main, argv)
    halves = [bench_accuracy.parse(command[2:]) for command in started]
    assert sorted(halves[0].rows + halves[1].rows) == sorted(bench_accuracy.QUICK_ROWS)
    for half in halves:
        assert (half.quick, half.root, half.name) == (True, "elsewhere", "petals-quick")


def test_other_flags_for_the_stages_need_a_table_of_their_own(capsys):
    with pytest.raises(SystemExit):
        bench_accuracy.parse(["bissl", "--finetune=--freeze"])
    assert "--name" in capsys.readouterr().err
    assert bench_accuracy.parse(["bissl", "--name", "probe", "--finetune=--freeze"]).name == "probe"


def test_a_table_of_an_older_bench_is_not_mixed_with_new_rows(tmp_path, capsys):
    path = tmp_path / "table.csv"
    benches.write_table([dict(row="a", rate=1)], path, ("row", "rate"))
    line = error_line(capsys, benches.with_others, [dict(row="b", tuning="c")], path,
                      ("row", "tuning"))
    assert "table.csv" in line and "move it away" in line


def test_another_pretext_or_task_is_another_run(tmp_path, monkeypatch):
    """The rows of `methods` start from a longer pretext than those of `bissl`."""
    stage = f"{SHORT_BISSL} --lower-steps 50"
    argv = small_bench(monkeypatch, tmp_path, "--search", "0")
    asked = []
    for group, name, flags in (("methods", "simclr-finetune", []), ("bissl", "SimCLR", []),
                               ("bissl", "SimCLR", ["--task", "detect"])):
        bench = benches.Bench(bench_accuracy.parse([group, *argv, "--stage", stage, *flags]))
        bench.main = lambda script, out, flags: dict(knn=0)
        bench.on_test = lambda method, run, flags: dict(test_top1=len(asked), test_ap50=len(asked))
        trial = bench_accuracy.Trial([], [], [])
        chain = bench_accuracy.Chain(bench, 0, "2")
        asked.append(chain.score(row_of(group, name), trial, "test").score)
    assert asked == [0, 1, 2]


def test_a_flag_with_its_default_is_no_run_of_its_own(tmp_path, monkeypatch):
    bench = benches.Bench(bench_accuracy.parse(["lam", "--device", "cpu", "--runs", str(tmp_path)]))
    bench.main = lambda script, out, flags: dict(lower=out)
    chain = bench_accuracy.Chain(bench, 0, "20")
    usual = chain.bissl(row_of("bissl", "BiSSL"), [], [])[1]["run"]
    for row in bench_accuracy.rows_of("lam")[1:]:
        run = chain.bissl(row, [], [])[1]["run"]
        assert (run == usual) == (row.name == "lam 0.1")


@pytest.mark.parametrize("group", ["keys", "alpha", "ingredients", "losses"])
def test_one_thing_is_varied(group, tmp_path, monkeypatch):
    argv = small_bench(monkeypatch, tmp_path, "--search", "0", "--judge", "val", "--epochs", "2")
    few = dict(bench_accuracy.FLAGS, keys=("bi_tuning", (1, 40)), alpha=("coin", (0.5,)))
    monkeypatch.setattr(bench_accuracy, "FLAGS", few)
    bench_accuracy.main([group, *argv])
    rows = read(tmp_path / f"{group}-petals.csv")
    assert [row["row"] for row in rows] == [row.name for row in bench_accuracy.rows_of(group)]
    assert rows[0]["row"] == "SimCLR" and len(rows) > 1
    assert len(book_of(tmp_path)) == 1 + len(rows) + (group == "alpha")
    assert (tmp_path / f"{group}-petals.png").exists()


def test_a_part_that_is_left_out_leaves_the_others(tmp_path):
    f, y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    usual = core_tuning.hard_pairs(f, y, 3, 1.0)
    with bench_accuracy.without("hard positives"):
        f_pos, y_pos, f_neg, y_neg = core_tuning.hard_pairs(f, y, 3, 1.0)
    assert torch.equal(f_pos, f) and torch.equal(y_pos.argmax(1), y)
    assert f_neg.shape == usual[2].shape and not torch.equal(f_neg, f)
    z, positives = torch.randn(6, 4), y[:, None] == y
    positives.fill_diagonal_(False)
    weighted = core_tuning.focal_contrastive(z, positives, 0.5)
    with bench_accuracy.without("focal weight"):
        plain = core_tuning.focal_contrastive(z, positives, 0.5)
    assert plain.item() == pytest.approx(coin.supcon(z, y, 0.5).item(), abs=1e-6)
    assert weighted < plain
    cce, ccl = bi_tuning.contrastive_cross_entropy, bi_tuning.categorical_contrastive
    for part, left_out in (("CCE", (True, False)), ("CCL", (False, True)),
                           ("CCE and no CCL", (True, True)), ("", (False, False))):
        with bench_accuracy.without(part):
            assert (bi_tuning.contrastive_cross_entropy is not cce,
                    bi_tuning.categorical_contrastive is not ccl) == left_out


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


def test_bissl_and_its_controls_run_and_none_twice(tmp_path, monkeypatch, capsys):
    argv = small_bench(monkeypatch, tmp_path, "--search", "0")
    monkeypatch.setattr(bench_accuracy, "FLAGS", {"lam": ("bissl", (0.1, 1))})
    bench_accuracy.main(["bissl", *argv])
    rows = read(tmp_path / "bissl-petals.csv")
    assert [row["row"] for row in rows] == [row.name for row in bench_accuracy.rows_of("bissl")]
    assert (tmp_path / "bissl-petals.png").exists()
    book = book_of(tmp_path)
    bench_accuracy.main(["lam", *argv])
    assert len(read(tmp_path / "lam-petals.csv")) == 3
    grown = book_of(tmp_path)
    # 0.1 is the default: its stage is there already, and it is fine-tuned alone.
    assert grown[:len(book)] == book and len(grown) == len(book) + 1 + 2
    bench_accuracy.main(["bissl", *argv])
    assert book_of(tmp_path) == grown
    bench_accuracy.main(["bissl", *argv, "--rates", "0.01", "0.1", "--rows", "SimCLR", "BiSSL"])
    table = read(tmp_path / "bissl-petals.csv")
    assert len(table) == len(rows) + 2
    tuned = [row for row in table if row["tuning"] == "--rates 0.01 0.1"]
    assert [row["row"] for row in tuned] == ["SimCLR", "BiSSL"]
    assert all(row["flags"] in ("--lr 0.01", "--lr 0.1") for row in tuned)
    assert len([line for line in book_of(tmp_path) if '-val"' in line]) == 4
    bench_accuracy.main([*argv, "--parts", "--seeds", "0", "1"])
    assert "over pretexts: " in capsys.readouterr().out


def test_the_parts_of_a_variance_are_found_again():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        scores = rng.normal(0, 5, (6, 1)) + rng.normal(0, 3, (1, 6)) + rng.normal(0, 2, (6, 6))
        found.append(bench_accuracy.parts_of_variance(scores) ** 2)
    assert np.mean(found, 0) == pytest.approx([25, 9, 4], rel=0.1)
    assert bench_accuracy.parts_of_variance([[1, 1], [5, 5]]) == pytest.approx([8 ** 0.5, 0, 0])


def test_a_mixture_of_both_backbones_is_one(tmp_path):
    """c = 1 is phi_B, statistics and counters aside."""
    theta, phi = (common.build_backbone("resnet10", True).state_dict() for _ in range(2))
    path = tmp_path / "bissl.pt"
    torch.save(dict(backbone=theta, resume=dict(upper_backbone=phi)), path)
    mixed = torch.load(bench_accuracy.mixture(path, 1), weights_only=True)["backbone"]
    for name, value in phi.items():
        torch.testing.assert_close(mixed[name], value)
    half = bench_accuracy.mixture(path, 0.5)
    half = torch.load(half, weights_only=True)["backbone"]["conv1.weight"]
    torch.testing.assert_close(half, (theta["conv1.weight"] + phi["conv1.weight"]) / 2)


def test_the_bilevel_bench_runs(few_petals, ckpt, tmp_path, monkeypatch):
    """Two states, of which one has been through an alternation; every kind of lower run."""
    draw_nothing(monkeypatch)
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    for name, value in dict(AFTER=(0, 1), LENGTHS=(), MORE_LENGTHS_AFTER=(0,), SOLVE_STEPS=2,
                            LOWER_RUNS=[("sgd", 2), ("lars", 2)], USUAL_STEPS=1, N_U=2,
                            LONG_DIRECTIONS=("implicit 10",),
                            H_IMAGES=(8, 4), SOLVER_GAMMAS=(100,), EXACT_STEPS=2).items():
        monkeypatch.setattr(bench_bilevel, name, value)
    (tmp_path / "runs/seed0").mkdir(parents=True)
    shutil.copy(ckpt, tmp_path / "runs/seed0/simclr.pt")
    few = "--device cpu --image-size 16 --batch-size 8 --labels-per-class 2"
    argv = ["--seeds", "0", "--runs", str(tmp_path / "runs"), "--bissl",
            f"{few} {SHORT_BISSL} --alternations 3 --pretext-batch-size 8"]
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
    assert len(rows) == 2 * len(bench_bilevel.SOLVERS)
    assert [row["products"] for row in rows if row["solver"] == "5 steps"] == ["10"] * 2
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


@pytest.mark.parametrize("group, task, rows, metric", [
    ("bissl", "detect", ("SimCLR", "BiSSL"), "ap50"),
    ("methods", "segment", ("scratch-core_tuning", "simclr-bissl-finetune"), "miou")])
def test_the_other_tasks_are_measured_too(group, task, rows, metric, tmp_path, monkeypatch):
    argv = small_bench(monkeypatch, tmp_path, "--search", "0", "--task", task, "--epochs", "1")
    bench_accuracy.main([group, *argv, "--rows", *rows, "--name", task])
    table = read(tmp_path / f"{group}-{task}.csv")
    assert [row["row"] for row in table] == list(rows)
    assert {row["metric"] for row in table} == {metric}


def test_the_scale_bench_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_scale, "alone", bench_speed.seconds)
    for name, value in dict(BUDGET=0.05, BATCHES=[8, 16], SIDES=[42, 48], CLASSES=[3, 5]).items():
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
