"""The benches' own arithmetic, and one of them run from end to end on a few pictures. What they measure is never asserted."""
import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_ablation
import bench_accuracy
import bench_alignment


def points(n=24, dim=3, classes=4):
    return torch.randn(n, dim, dtype=torch.float64), torch.arange(n) % classes


def slow_silhouette(x, y):
    scores = []
    for i in range(len(x)):
        mean = {c: [math.dist(x[i], x[j]) for j in range(len(x)) if y[j] == c and j != i] for c in set(y.tolist())}
        own = mean.pop(int(y[i]))
        if not own:
            scores.append(0.0)
            continue
        a, b = sum(own) / len(own), min(sum(d) / len(d) for d in mean.values())
        scores.append((b - a) / max(a, b))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("alone", [False, True])
def test_silhouette_against_a_loop(alone):
    x, y = points()
    if alone:
        y[0] = 9
    assert bench_alignment.silhouette(x, y) == pytest.approx(slow_silhouette(x.tolist(), y), abs=1e-12)


def test_silhouette_of_two_far_points_is_1_and_of_mixed_ones_below_0():
    x, y = torch.tensor([[0.0], [0.0], [9.0], [9.0]]), torch.tensor([0, 0, 1, 1])
    assert bench_alignment.silhouette(x, y) == pytest.approx(1)
    assert bench_alignment.silhouette(x, torch.tensor([0, 1, 0, 1])) < 0


def test_alignment_and_uniformity_against_a_loop():
    x, y = points()
    x = F.normalize(x, dim=1)
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    squared = {(i, j): math.dist(x[i], x[j]) ** 2 for i, j in pairs}
    same = [squared[i, j] for i, j in pairs if y[i] == y[j]]
    alignment, uniformity = bench_alignment.alignment_and_uniformity(x, y)
    assert alignment == pytest.approx(sum(same) / len(same), abs=1e-12)
    assert uniformity == pytest.approx(math.log(sum(math.exp(-2 * d) for d in squared.values()) / len(squared)), abs=1e-12)


def test_linear_probe_tells_what_a_plane_separates():
    x = torch.randn(400, 5)
    y = (x[:, 0] > 0).long()
    assert bench_alignment.linear_probe(x[:300], y[:300], x[300:], y[300:]) > 95
    assert bench_alignment.linear_probe(x[:300], y[:300], x[300:], 1 - y[300:]) < 5


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_search_has_one_pair_in_each_part_of_either_range(count):
    lr, weight_decay = np.log10(bench_accuracy.pairs_to_search(count)).T
    for values, low, width in ((lr, -2.5, 2), (weight_decay, -5, 3)):
        assert sorted(np.floor((values - low) / width * count).astype(int)) == list(range(count))


def line(row, labels, scores):
    return dict(row=row, labels=labels, scores=" ".join(map(str, scores)), mean=float(np.mean(scores)), std=float(np.std(scores, ddof=1)))


def test_a_row_is_marked_if_it_is_best_and_beats_the_plain_one_by_more_than_the_spread():
    cells = [line("simclr-finetune", "20", (50, 60, 70)), line("simclr-bissl-finetune", "20", (52, 61, 72)),
             line("simclr-bi_tuning", "20", (70, 80, 90)), line("simclr-core_tuning", "20", (69, 79, 89)),
             line("simclr-bi_tuning", "5", (9, 9, 9))]
    plain, bissl, best, second, no_plain = bench_accuracy.mark(cells)
    assert [cell["marked"] for cell in cells] == [False, False, True, False, False]
    assert plain["gain"] == no_plain["gain"] == ""
    assert (bissl["gain"], bissl["gain_std"]) == (1.67, 0.58)  # differences 2, 1 and 2
    assert best["pooled_std"] == 10


def test_an_ablation_takes_each_variants_best_pair_and_compares_seed_by_seed():
    scores = {"all": [[50, 60], [52, 66]], "no focal weight": [[49, 10], [51, 10]]}  # variant: seeds of pairs
    ablation = object.__new__(bench_ablation.Ablation)
    ablation.args = SimpleNamespace(seeds=2, pairs=["0.1,0", "0.2,0"])
    ablation.run = lambda group, value, seed: (dict(residual=0.5), [
        dict(val=val, seconds=3) for val in scores.get(value, [[40, 41], [40, 41]])[seed]])
    rows = {row["variant"]: row for row in ablation.rows("ingredients")}
    assert (rows["all"]["val"], rows["all"]["pair"], rows["all"]["gain"]) == (63, "0.2,0", 0)
    assert (rows["no focal weight"]["val"], rows["no focal weight"]["pair"]) == (50, "0.1,0")
    assert (rows["no focal weight"]["gain"], rows["no focal weight"]["gain_std"]) == (-13, 2.83)  # -11 and -15
    assert rows["all"]["residual"] == 0.5 and rows["all"]["scores"] == "60.0 66.0"


def test_a_finished_run_is_not_made_again(folder, tmp_path, monkeypatch, capsys):
    """Two rows, two seeds, a search of two, from drawing the pretext's views to the figure; then once more, from the book."""
    monkeypatch.setattr(bench_accuracy, "RESULTS", tmp_path)
    flags = ["--data", str(folder), "--root", str(tmp_path / "root"), "--runs", str(tmp_path / "runs"), "--device", "cpu",
             "--image-size", "16", "--pretext-epochs", "1", "--epochs", "4", "--search", "2", "--seeds", "2", "--labels", "5"]
    parser = bench_accuracy.simclr.parser
    monkeypatch.setattr(bench_accuracy.simclr, "parser", lambda: small_batches(parser()))
    for row in ("simclr-finetune", "simclr-coin"):
        bench_accuracy.main([*flags, "--rows", row])
    table = list(csv.DictReader((tmp_path / "accuracy-pictures.csv").open()))
    assert [cell["row"] for cell in table] == ["simclr-finetune", "simclr-coin-finetune"]
    assert all(len(cell["scores"].split()) == 2 for cell in table)
    assert (tmp_path / "accuracy-pictures.png").exists()
    book = (tmp_path / "runs" / "runs.jsonl").read_text()
    assert book.count("-val") == 2 * 2 and book.count("-test") == 2 * 2

    for script in bench_accuracy.SCRIPTS.values():
        monkeypatch.setattr(script, "main", lambda argv: pytest.fail("made again"))
    bench_accuracy.main([*flags, "--rows", "simclr-finetune"])
    assert (tmp_path / "runs" / "runs.jsonl").read_text() == book


def small_batches(parser):
    parser.set_defaults(batch_size=8)
    return parser
