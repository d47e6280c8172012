"""The scores of detection and segmentation: against slow loops written from their definitions,
examples worked by hand, and figures of COCO's own program."""
import copy

import numpy as np
import pytest
import torch

import finetune

BOX_SCORES = {"ap", "ap50", "ap75", "ap50_voc07"}
MASK_SCORES = {"miou", "mean_accuracy", "fwiou", "pixel_accuracy"}


# ---------------------------------------------------------------------------------- boxes at random

def crowd(rng, places, class_of, count, reach):
    """Boxes (count, 4) around some places, and their labels (count,), mostly the place's class."""
    place = (rng.rand(count) * len(places)).astype(int)
    boxes = places[place] + reach * (2 * rng.rand(count, 4) - 1)
    stray = rng.rand(count) * (class_of.max() + 1)
    labels = np.where(rng.rand(count) < 0.8, class_of[place], stray)
    return torch.tensor(boxes).float(), torch.tensor(labels).long()


def random_images(seed, images, classes, objects, detections, difficult=0.0):
    """Lists of what is found and what is there. The first image has as many objects and detections
    as are allowed, the second no objects, the third no detections, the others anything between."""
    rng = np.random.RandomState(seed)  # its rand() is the same in every version of numpy
    found, true = [], []
    for i in range(images):
        places = np.concatenate([rng.rand(5, 2) * 40, 60 + rng.rand(5, 2) * 40], 1)
        class_of = np.floor(rng.rand(5) * classes)
        m, n = rng.rand(2) if i else (1, 1)
        m = 0 if i == 1 else round(m * objects)
        n = 0 if i == 2 else round(n * detections)
        boxes, labels = crowd(rng, places, class_of, m, 5)
        hard = torch.tensor(rng.rand(m) < difficult)
        true.append(dict(boxes=boxes, labels=labels, difficult=hard))
        boxes, labels = crowd(rng, places, class_of, n, 6)
        tenths = torch.tensor(np.ceil(rng.rand(n) * 10))  # so that many tie
        found.append(dict(boxes=boxes, labels=labels, scores=(tenths / 10).float()))
    return found, true


# ------------------------------------------------------------------------- boxes against slow loops

def overlap(a, b):
    """Intersection over union of two boxes: left, top, right, bottom."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def detections_of(one, label):
    """Pairs (score, box) of a class in an image, the best score first; equal ones stay in order."""
    rows = []
    for box, kind, score in zip(one["boxes"].tolist(), one["labels"], one["scores"].tolist()):
        if kind == label:
            rows.append((score, box))
    return sorted(rows, key=lambda row: -row[0])


def objects_of(one, label):
    """Pairs (box, difficult) of a class in an image."""
    rows = []
    for box, kind, hard in zip(one["boxes"].tolist(), one["labels"], one["difficult"].tolist()):
        if kind == label:
            rows.append((box, hard))
    return rows


def coco_hits(detections, objects, threshold):
    """Pairs (score, outcome) of an image: right, wrong or ignored."""
    claimed, hits = set(), []
    for score, box in detections[:100]:
        chosen, most = None, 0
        for j, (place, hard) in enumerate(objects):
            if not hard and j not in claimed and overlap(box, place) >= max(threshold, most):
                chosen, most = j, overlap(box, place)
        if chosen is not None:
            claimed.add(chosen)
            hits.append((score, "right"))
        elif any(hard and overlap(box, place) >= threshold for place, hard in objects):
            hits.append((score, "ignored"))
        else:
            hits.append((score, "wrong"))
    return hits


def voc_hits(detections, objects):
    """Pairs (score, outcome) of an image, as the devkit of VOC 2007 has them."""
    claimed, hits = set(), []
    for score, box in detections:
        best, most = None, 0
        for j, (place, _) in enumerate(objects):
            if overlap(box, place) > most:
                best, most = j, overlap(box, place)
        if most < 0.5:
            hits.append((score, "wrong"))
        elif objects[best][1]:
            hits.append((score, "ignored"))
        elif best in claimed:
            hits.append((score, "wrong"))
        else:
            claimed.add(best)
            hits.append((score, "right"))
    return hits


def recall_and_precision(hits, total):
    """At each rank that counts, all images' detections together, the best score first."""
    right, counted, points = 0, 0, []
    for _, outcome in sorted(hits, key=lambda hit: -hit[0]):
        if outcome != "ignored":
            right += outcome == "right"
            counted += 1
            points.append((right / total, right / counted))
    return points


def average_precision(points, levels):
    """The mean over levels of recall of the highest precision at that recall or more."""
    best = []
    for level in levels:
        best.append(max([precision for recall, precision in points if recall >= level], default=0))
    return sum(best) / len(levels)


def mean(values):
    return sum(values) / len(values)


def slow_box_scores(found, true):
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    hundredths = [0.01 * i for i in range(101)]  # as COCO's program rounds them: 0.07 > 7 / 100
    tenths = [i / 10 for i in range(11)]
    coco, voc = [[] for _ in thresholds], []  # of each class
    for label in set(torch.cat([one["labels"] for one in true]).tolist()):
        images, total = [], 0
        for one, there in zip(found, true):
            images.append((detections_of(one, label), objects_of(there, label)))
            total += sum(not hard for _, hard in images[-1][1])
        if not total:
            continue
        for threshold, column in zip(thresholds, coco):
            hits = []
            for detections, objects in images:
                hits += coco_hits(detections, objects, threshold)
            column.append(average_precision(recall_and_precision(hits, total), hundredths))
        hits = []
        for detections, objects in images:
            hits += voc_hits(detections, objects)
        voc.append(average_precision(recall_and_precision(hits, total), tenths))
    ap = [100 * mean(column) for column in coco]
    return dict(ap=mean(ap), ap50=ap[0], ap75=ap[5], ap50_voc07=100 * mean(voc))


@pytest.mark.parametrize("sizes", [
    dict(images=3, classes=1, objects=4, detections=8),
    dict(images=3, classes=1, objects=4, detections=8, difficult=0.4),
    dict(images=6, classes=2, objects=6, detections=12),
    dict(images=6, classes=2, objects=6, detections=12, difficult=0.3),
    dict(images=8, classes=5, objects=8, detections=10, difficult=0.5),
    dict(images=12, classes=3, objects=2, detections=3, difficult=0.2),
    dict(images=4, classes=7, objects=3, detections=20)])  # most classes are not there
@pytest.mark.parametrize("seed", range(12))
def test_box_scores_are_those_of_slow_loops(seed, sizes):
    found, true = random_images(seed, **sizes)
    assert finetune.box_scores(found, true) == pytest.approx(slow_box_scores(found, true), rel=1e-9)


def test_box_scores_are_those_of_slow_loops_beyond_100_detections():
    found, true = random_images(0, images=4, classes=1, objects=20, detections=140, difficult=0.2)
    assert max(len(one["labels"]) for one in found) == 140
    assert finetune.box_scores(found, true) == pytest.approx(slow_box_scores(found, true), rel=1e-9)


# ----------------------------------------------------------------------------- boxes worked by hand

A, B = (0, 0, 10, 10), (20, 0, 30, 10)
PART = (0, 0, 10, 8.25)     # overlaps A by 0.825: enough at 0.5, 0.55 ... 0.8, which are 7 of 10
NOTHING = (50, 50, 60, 60)


def found_image(*rows):
    """What is found in an image: rows of a box, a score and a label, which is 0 if left out."""
    boxes = torch.tensor([row[0] for row in rows]).float().view(-1, 4)
    labels = torch.tensor([sum(row[2:]) for row in rows]).long()
    return dict(boxes=boxes, labels=labels, scores=torch.tensor([row[1] for row in rows]).float())


def true_image(*boxes, labels=None, difficult=()):
    """What is there in an image: label 0 unless others are given; which boxes are difficult."""
    hard = torch.zeros(len(boxes), dtype=torch.bool)
    hard[list(difficult)] = True
    labels = torch.tensor(labels or [0] * len(boxes)).long()
    return dict(boxes=torch.tensor(boxes).float().view(-1, 4), labels=labels, difficult=hard)


def check_by_hand(found, true, ap, ap50, ap75, voc):
    scores = finetune.box_scores(found, true)
    assert scores == pytest.approx(dict(ap=ap, ap50=ap50, ap75=ap75, ap50_voc07=voc), rel=1e-9)


def test_boxes_that_are_all_found_exactly_score_100():
    found = [found_image((A, 0.9), (B, 0.3, 1)), found_image(), found_image((B, 0.2))]
    true = [true_image(A, B, labels=[0, 1]), true_image(), true_image(B)]
    check_by_hand(found, true, 100, 100, 100, 100)


def test_a_second_hit_on_an_object_is_wrong():
    # right, wrong, right of 2: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. Up to 1/2 the best is
    # 1 (0, 0.01 ... 0.5: 51 levels of 101; 0, 0.1 ... 0.5: 6 of 11), from there on 2/3
    coco = 100 * (51 + 50 * 2 / 3) / 101
    check_by_hand([found_image((A, 0.9), (A, 0.8), (B, 0.7))], [true_image(A, B)],
                  coco, coco, coco, 100 * (6 + 5 * 2 / 3) / 11)


def test_precision_at_a_recall_is_the_best_at_that_recall_or_more():
    # wrong, right, right of 2: precision 0, 1/2, 2/3 at recall 0, 1/2, 1
    value = 100 * 2 / 3
    check_by_hand([found_image((NOTHING, 0.9), (A, 0.8), (B, 0.7))], [true_image(A, B)],
                  value, value, value, value)


def test_an_object_that_is_not_found_limits_recall():
    # precision 1 up to recall 1/2, then 0
    coco = 100 * 51 / 101
    check_by_hand([found_image((A, 0.9))], [true_image(A, B)], coco, coco, coco, 100 * 6 / 11)


@pytest.mark.parametrize("box, enough", [
    ((0, 0, 10, 4.99), 0),
    ((0, 0, 10, 5), 1),         # 0.5 itself
    ((0, 0, 10, 7.49), 5),
    ((0, 0, 10, 7.5), 6),       # 0.5, 0.55 ... 0.75
    ((0, 0, 10, 20), 1),        # 100 / 200
    ((0, 0, 20, 20), 0)])       # all of the object, but 100 / 400
def test_an_overlap_counts_from_the_threshold_on(box, enough):
    half = 100 * (enough > 0)
    check_by_hand([found_image((box, 0.9))], [true_image(A)],
                  10 * enough, half, 100 * (enough > 5), half)


@pytest.mark.parametrize("hits", [0, 1, 2, 5])
def test_hits_on_a_difficult_object_are_neither_right_nor_wrong(hits):
    # one object counts, and what is surer than its detection is ignored: precision 1 at recall 1
    sure = [(B, 0.9 - 0.01 * i) for i in range(hits)]
    check_by_hand([found_image(*sure, (A, 0.5))], [true_image(A, B, difficult=[1])],
                  100, 100, 100, 100)


def test_a_difficult_object_is_taken_only_if_no_other_fits():
    # The detection is PART itself, which is difficult, but overlaps A enough at 7 thresholds: there
    # it is right, at the other 3 ignored, and nothing is found. VOC looks at PART alone.
    check_by_hand([found_image((PART, 0.9))], [true_image(PART, A, difficult=[0])],
                  70, 100, 100, 0)


def test_a_second_hit_is_ignored_where_a_difficult_object_fits():
    # right, ignored, right at 7 thresholds, else right, wrong, right. VOC: A is claimed, so wrong.
    wrong = 100 * (51 + 50 * 2 / 3) / 101
    check_by_hand([found_image((A, 0.9), (A, 0.8), (B, 0.7))],
                  [true_image(A, PART, B, difficult=[1])],
                  (7 * 100 + 3 * wrong) / 10, 100, 100, 100 * (6 + 5 * 2 / 3) / 11)


def test_the_second_best_object_is_taken_if_the_best_is_claimed_but_not_in_voc():
    # At 7 thresholds the second detection of A takes PART, and both are found. At the other 3, and
    # for VOC, it is wrong: precision 1 up to recall 1/2, then 0.
    check_by_hand([found_image((A, 0.9), (A, 0.8))], [true_image(A, PART)],
                  (7 * 100 + 3 * 100 * 51 / 101) / 10, 100, 100, 100 * 6 / 11)


def test_a_detection_takes_the_object_that_it_overlaps_most():
    # PART first takes PART, though A stands first and fits at 7 thresholds: A is left for the next
    check_by_hand([found_image((PART, 0.9), (A, 0.8))], [true_image(A, PART)], 100, 100, 100, 100)


def test_a_class_that_is_never_found_scores_0():
    # the mean of 100 and 0
    check_by_hand([found_image((A, 0.9))], [true_image(A, B, labels=[0, 1])], 50, 50, 50, 50)


@pytest.mark.parametrize("found", [
    [],                             # nothing at all
    [(A, 0.9, 1)],                  # the right place, of a class that is not there
    [(NOTHING, 0.9)],
    [(NOTHING, 0.9), (B, 0.8)]])
def test_what_is_found_wrongly_or_not_at_all_scores_0(found):
    check_by_hand([found_image(*found)], [true_image(A)], 0, 0, 0, 0)


def test_a_detection_of_the_wrong_class_is_wrong_in_its_own_class():
    # class 0: wrong, right of 1: 1/2. Class 1: right of 1: 1
    found = [found_image((B, 0.9), (A, 0.8), (B, 0.7, 1))]
    check_by_hand(found, [true_image(A, B, labels=[0, 1])], 75, 75, 75, 75)


@pytest.mark.parametrize("there", [
    true_image(A),                                          # no object of class 1
    true_image(A, B, labels=[0, 1], difficult=[1]),         # only a difficult one
    true_image(A, B, labels=[0, 300], difficult=[1])])
def test_a_class_without_an_object_that_counts_is_left_out(there):
    found = [found_image((A, 0.5), (NOTHING, 0.9, 1), (B, 0.9, 1))]
    check_by_hand(found, [there], 100, 100, 100, 100)


def test_detections_in_an_image_without_objects_are_wrong():
    # wrong, right of 1: precision 1/2 at recall 1
    check_by_hand([found_image((A, 0.9)), found_image((A, 0.8))], [true_image(), true_image(A)],
                  50, 50, 50, 50)


def test_detections_rank_by_score_over_all_images_and_where_it_ties_in_their_order():
    # right (0.9), wrong (0.7, first image), right (0.7, second): precision 1, 1/2, 2/3
    found = [found_image((NOTHING, 0.7)), found_image((B, 0.7), (A, 0.9))]
    coco = 100 * (51 + 50 * 2 / 3) / 101
    voc = 100 * (6 + 5 * 2 / 3) / 11
    check_by_hand(found, [true_image(), true_image(A, B)], coco, coco, coco, voc)
    # right, right, wrong if the images change places
    check_by_hand(found[::-1], [true_image(A, B), true_image()], 100, 100, 100, 100)


@pytest.mark.parametrize("wrong, score, coco, voc", [
    (99, 0.1, 100 / 100, 100 / 100),        # the 100th: precision 1/100
    (100, 0.1, 0, 100 / 101),               # the 101st counts for VOC only
    (250, 0.1, 0, 100 / 251),
    (100, 0.9, 100, 100),                   # the last in the list, but the best by score
    (100, 0.5, 0, 100 / 101)])              # equal scores: the last in the list is the 101st
def test_coco_counts_the_100_best_detections_of_a_class_and_image(wrong, score, coco, voc):
    found = [found_image(*[(NOTHING, 0.5)] * wrong, (A, score))]
    check_by_hand(found, [true_image(A)], coco, coco, coco, voc)


def test_detections_of_another_class_or_image_do_not_use_up_the_100():
    other_class = found_image(*[(NOTHING, 0.5, 1)] * 100, (A, 0.1))
    check_by_hand([other_class], [true_image(A)], 100, 100, 100, 100)
    value = 100 / 101
    check_by_hand([found_image(*[(NOTHING, 0.5)] * 100), found_image((A, 0.1))],
                  [true_image(), true_image(A)], value, value, value, value)


# ---------------------------------------------------------------------- boxes as COCO's own program

def some_of_20():
    """17 of 20 objects are found, each with a wrong detection behind it. Recall goes through 7/20
    and 14/20, which round to less than the levels 0.35 and 0.7 of COCO's program."""
    boxes = [(20 * i, 0, 20 * i + 10, 10) for i in range(20)]
    found = []
    for i, box in enumerate(boxes[:17]):
        found += [(box, 0.9 - 0.01 * i), (NOTHING, 0.9 - 0.01 * i)]
    return [found_image(*found)], [true_image(*boxes)]


def with_classes_missing():
    """No object has class 1, and class 3 is never detected."""
    found, true = random_images(2, images=20, classes=4, objects=8, detections=12)
    for one in true:
        one["labels"][one["labels"] == 1] = 0
    for one in found:
        one["labels"][one["labels"] == 3] = 1
    return found, true


COCO_CASES = {
    "several classes": lambda: random_images(1, 30, 3, objects=6, detections=12),
    "classes missing": with_classes_missing,
    "over 100 detections": lambda: random_images(3, 6, 1, objects=20, detections=160),
    "recall in twentieths": some_of_20}


# What pycocotools 2.0.11 says of them (COCOeval, "bbox", all areas, 100 detections), in per cent
@pytest.mark.parametrize("case, ap, ap50, ap75", [
    ("several classes", 8.902721452, 18.724189897, 6.881745001),
    ("classes missing", 6.856539351, 11.412049726, 7.436743674),
    ("over 100 detections", 30.140198389, 47.747821799, 36.898442877),
    ("recall in twentieths", 48.999682157, 48.999682157, 48.999682157)])
def test_box_scores_are_those_of_pycocotools(case, ap, ap50, ap75):
    scores = finetune.box_scores(*COCO_CASES[case]())
    assert scores["ap"] == pytest.approx(ap, abs=1e-6)
    assert scores["ap50"] == pytest.approx(ap50, abs=1e-6)
    assert scores["ap75"] == pytest.approx(ap75, abs=1e-6)


# -------------------------------------------------------------------------------------------- masks

def slow_mask_scores(confusion):
    """Class by class, from lists."""
    classes = range(len(confusion))
    pixels = sum(sum(row) for row in confusion)
    ious, accuracies, weighted, right = [], [], 0, 0
    for c in classes:
        hit = confusion[c][c]
        size = sum(confusion[c])
        predicted = sum(confusion[other][c] for other in classes)
        right += hit
        if size:
            accuracies.append(hit / size)
        if size or predicted:
            ious.append(hit / (size + predicted - hit))
            weighted += size / pixels * ious[-1]
    return dict(miou=100 * mean(ious), mean_accuracy=100 * mean(accuracies), fwiou=100 * weighted,
                pixel_accuracy=100 * right / pixels)


def random_confusion(seed, classes, most):
    """Counts (C, C) with some classes that are not there, some that are never predicted, and some
    that are neither; the last class is there."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(most, size=(classes, classes)) + most * np.eye(classes, dtype=int)
    counts[:-1][rng.random(classes - 1) < 0.3] = 0
    counts[:, :-1][:, rng.random(classes - 1) < 0.3] = 0
    return torch.tensor(counts)


@pytest.mark.parametrize("classes, most", [(1, 10), (2, 5), (5, 2), (21, 1000), (7, 10 ** 12)])
@pytest.mark.parametrize("seed", range(5))
def test_mask_scores_are_those_of_slow_loops(seed, classes, most):
    confusion = random_confusion(seed, classes, most)
    slow = slow_mask_scores(confusion.tolist())
    assert finetune.mask_scores(confusion) == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize("confusion, miou, mean_accuracy, fwiou, pixel_accuracy", [
    ([[5, 0], [0, 7]], 1, 1, 1, 1),
    ([[9]], 1, 1, 1, 1),
    ([[0, 5], [7, 0]], 0, 0, 0, 0),
    # all predictions equally frequent: IoU 1 / (2 C - 1), accuracy 1 / C
    ([[4, 4, 4], [4, 4, 4], [4, 4, 4]], 1 / 5, 1 / 3, 1 / 5, 1 / 3),
    # IoU 3 / (3 + 1 + 2) and 4 / (4 + 1 + 2), accuracy 3/4 and 4/6, sizes 4 and 6 of 10
    ([[3, 1], [2, 4]], (1 / 2 + 4 / 7) / 2, (3 / 4 + 2 / 3) / 2, 0.4 / 2 + 0.6 * 4 / 7, 7 / 10),
    # rows and columns exchanged: the same IoU, but accuracy 3/5 and 4/5, sizes 5 and 5
    ([[3, 2], [1, 4]], (1 / 2 + 4 / 7) / 2, (3 / 5 + 4 / 5) / 2, 0.5 / 2 + 0.5 * 4 / 7, 7 / 10),
    # always class 0: IoU 8/10 and 0
    ([[8, 0], [2, 0]], 0.4, 0.5, 0.64, 0.8),
    # a class without pixels, never predicted: as if it were not there
    ([[3, 0, 1], [0, 0, 0], [2, 0, 4]],
     (1 / 2 + 4 / 7) / 2, (3 / 4 + 2 / 3) / 2, 0.4 / 2 + 0.6 * 4 / 7, 7 / 10),
    # a class without pixels, predicted once: IoU 5/6, 1 and 0, accuracy 5/6 and 1, sizes 6 and 4
    ([[5, 0, 1], [0, 4, 0], [0, 0, 0]], (5 / 6 + 1) / 3, (5 / 6 + 1) / 2, 0.6 * 5 / 6 + 0.4, 0.9)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_mask_scores_of_examples_worked_by_hand(confusion, miou, mean_accuracy, fwiou,
                                                pixel_accuracy, dtype):
    scores = finetune.mask_scores(torch.tensor(confusion, dtype=dtype))
    by_hand = dict(miou=100 * miou, mean_accuracy=100 * mean_accuracy, fwiou=100 * fwiou,
                   pixel_accuracy=100 * pixel_accuracy)
    assert scores == pytest.approx(by_hand, rel=1e-12)


def test_mask_scores_do_not_depend_on_the_number_of_pixels_or_the_order_of_classes():
    confusion = random_confusion(0, classes=6, most=50)
    scores = pytest.approx(finetune.mask_scores(confusion), rel=1e-12)
    order = torch.randperm(6)
    assert finetune.mask_scores(1000 * confusion) == scores
    assert finetune.mask_scores(confusion[order][:, order]) == scores


# ------------------------------------------------------------------------------------- both of them

def test_scores_are_plain_floats_by_their_documented_names():
    boxes = finetune.box_scores(*random_images(0, 4, 2, objects=4, detections=6, difficult=0.3))
    masks = finetune.mask_scores(random_confusion(0, classes=4, most=9))
    assert set(boxes) == BOX_SCORES and set(masks) == MASK_SCORES
    assert {type(value) for value in [*boxes.values(), *masks.values()]} == {float}


@pytest.mark.parametrize("detections", [6, 120])
def test_box_scores_leave_their_arguments_as_they_were(detections):
    found, true = random_images(0, 4, 2, objects=4, detections=detections, difficult=0.3)
    before = copy.deepcopy((found, true))
    finetune.box_scores(found, true)
    assert len(found) == len(before[0]) and len(true) == len(before[1])
    for one, same in zip([*found, *true], [*before[0], *before[1]]):
        assert list(one) == list(same)
        for key, value in one.items():
            assert value.dtype == same[key].dtype and torch.equal(value, same[key])


def test_mask_scores_leave_their_argument_as_it_was():
    confusion = random_confusion(0, classes=4, most=9)
    before = confusion.clone()
    finetune.mask_scores(confusion)
    assert confusion.dtype == before.dtype and torch.equal(confusion, before)
