"""The data: blossoms, folders of pictures, flowers, their cache, their splits, the batches and the
k-NN probe."""
import faulthandler
import hashlib
import math
import os
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from conftest import error_line, options, write_folder
from PIL import Image
from scipy.io import savemat

import common
import finetune

# sha256 of petals(64, 40, 1). If the drawing was meant to change, renew it: print petals_hash().
PETALS_HASH = "863b1c56de5b1ebab4f8a524b0a37a2c91763dede5319ab60dd33213f1fc6f28"
DOODLES_HASH = "809ed8a84ec2c4d85844bc0d66ce203ead40ab9126e63ccafcb2455038299213"


def pictures(store):
    """The bytes of each picture of a store, to tell pictures apart."""
    return [store.images[row].numpy().tobytes() for row in store.rows]


# ------------------------------------------------------------ petals

def petals_hash():
    images, labels = common.petals(64, 40, 1)
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def test_petals_are_the_same_bytes_on_every_machine():
    assert petals_hash() == PETALS_HASH


@pytest.mark.parametrize("count, side", [(1, 24), (129, 24), (40, 40), (12, 72)])
def test_petals_are_balanced_at_any_count_and_side(count, side):
    images, labels = common.petals(count, side, seed=1)
    assert images.shape == (count, 3, side, side) and images.dtype == torch.uint8
    assert labels.shape == (count,) and labels.dtype == torch.int64
    of_each_class = torch.bincount(labels, minlength=10)
    assert len(of_each_class) == 10 and of_each_class.max() - of_each_class.min() <= 1


def test_petals_of_a_seed_are_always_the_same():
    images, labels = common.petals(20, 24, seed=3)
    torch.manual_seed(99)
    again, labels_again = common.petals(20, 24, seed=3)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)


def test_petals_of_another_seed_are_other_pictures():
    one, other = common.petals(20, 24, seed=3)[0], common.petals(20, 24, seed=4)[0]
    assert (one != other).flatten(1).any(1).all()


def test_petals_of_one_class_are_all_different():
    images, labels = common.petals(40, 24, seed=3)
    assert len({image.numpy().tobytes() for image in images[labels == 0]}) == 4


def test_doodles_are_the_same_bytes_on_every_machine():
    images = common.doodles(64, 40, 1)
    assert images.shape == (64, 3, 40, 40) and images.dtype == torch.uint8
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == DOODLES_HASH


def test_doodles_are_all_different_and_fill_the_range():
    images = common.doodles(200, 24, seed=3)
    assert len({image.numpy().tobytes() for image in images}) == 200
    assert images.min() < 10 and images.max() > 245
    assert torch.equal(images, common.doodles(200, 24, seed=3))
    assert not torch.equal(images, common.doodles(200, 24, seed=4))


def test_doodles_are_for_pretext_tasks_and_are_probed_on_petals(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "DOODLES", 30)
    for split in common.PETAL_SPLITS:
        monkeypatch.setitem(common.PETAL_SPLITS, split, 20)
    args = options("doodles", tmp_path)
    assert len(common.load_data(args, "unlabeled")) == 30
    for of_doodles, split in zip(common.load_probe(args), ("train", "val")):
        of_petals = common.load_data(options("petals", tmp_path), split)
        assert torch.equal(of_doodles.images[of_doodles.rows], of_petals.images[of_petals.rows])
        assert torch.equal(of_doodles.labels, of_petals.labels)
    for split in ("train", "val", "trainval", "test"):
        with pytest.raises(SystemExit) as stopped:
            common.load_data(args, split)
        assert stopped.value.code == 2
        assert "doodles has no labels" in capsys.readouterr().err


def test_petals_splits_share_no_picture(tmp_path, monkeypatch):
    for split in common.PETAL_SPLITS:
        monkeypatch.setitem(common.PETAL_SPLITS, split, 30)
    seen = []
    for split in ("unlabeled", "train", "val", "test"):
        store = common.load_data(options("petals", tmp_path), split)
        assert len(store) == 30 and len(store.classes) == 10
        seen += pictures(store)
    assert len(set(seen)) == 120


def test_petals_trainval_is_train_and_val(tmp_path, monkeypatch):
    for split in common.PETAL_SPLITS:
        monkeypatch.setitem(common.PETAL_SPLITS, split, 30)
    train, val, both = (common.load_data(options("petals", tmp_path), split)
                        for split in ("train", "val", "trainval"))
    assert pictures(both) == pictures(train) + pictures(val)
    assert torch.equal(both.labels, torch.cat([train.labels, val.labels]))


# ------------------------------------------------------------ sides, batches, subsets

def test_stored_images_are_larger_than_the_training_side_but_not_by_much():
    bad = [size for size in range(16, 257) if not 1.15 <= common.store_side(size) / size <= 1.35]
    assert bad == []


def numbered_store(n):
    """n images; all pixels of image i, and its label, are i."""
    numbers = torch.arange(n)
    images = numbers.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2)
    return common.Store(images, numbers, numbers, ["a"])


def labels_of(batches):
    return [labels for _, labels in batches]


@pytest.mark.parametrize("n", [2, 4, 5, 8, 33, 100])
def test_batches_hold_every_image_once(n):
    seen = torch.cat(labels_of(common.Batches(numbered_store(n), 4)))
    assert seen.sort().values.tolist() == list(range(n))


@pytest.mark.parametrize("n", [2, 4, 5, 8, 33, 100])
def test_batches_leave_no_rest_of_one(n):
    for batch_size in (4, 32):
        sizes = [len(labels) for labels in labels_of(common.Batches(numbered_store(n), batch_size))]
        assert 2 <= min(sizes) and max(sizes) <= batch_size


@pytest.mark.parametrize("n, steps", [(4, 1), (5, 1), (8, 2), (35, 8)])
def test_whole_only_drops_the_rest(n, steps):
    batches = common.Batches(numbered_store(n), 4, whole_only=True)
    seen = torch.cat(labels_of(batches)).tolist()
    assert [len(labels) for labels in labels_of(batches)] == [4] * steps
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(n))


@pytest.mark.parametrize("whole_only", [False, True])
@pytest.mark.parametrize("n", [4, 5, 8, 9, 33])
def test_the_length_of_batches_is_their_number(n, whole_only):
    batches = common.Batches(numbered_store(n), 4, whole_only)
    assert len(batches) == len(list(batches)) == (n // 4 if whole_only else math.ceil(n / 4))


def test_batches_keep_each_label_with_its_image():
    keep = torch.tensor([30, 7, 12, 3, 21])
    for images, labels in common.Batches(numbered_store(40).subset(keep), 4):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_batches_come_in_another_order_each_epoch_and_in_the_same_with_the_same_seed():
    batches = common.Batches(numbered_store(50), 8)
    first, second = (torch.cat(labels_of(batches)).tolist() for _ in range(2))
    assert first != second
    torch.manual_seed(7)
    again = torch.cat(labels_of(batches)).tolist()
    torch.manual_seed(7)
    assert again == torch.randperm(50).tolist()


def parts_of(monkeypatch, processes, *batches, **how):
    """The labels of each batch of an epoch, a list a process, all with the same draws."""
    monkeypatch.setattr(common, "world", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(common, "rank", lambda: process)
        torch.manual_seed(0)
        parts.append([labels.tolist() for labels in labels_of(common.Batches(*batches, **how))])
    return parts


@pytest.mark.parametrize("n, batch_size, processes, sizes", [
    (9, 4, 2, [2, 2]),
    (8, 4, 2, [2, 2]),
    (10, 4, 2, [3, 2]),
    (7, 4, 2, [3]),
    (4, 4, 2, [2]),
    (13, 8, 4, [3]),
    (16, 8, 4, [2, 2])])
def test_no_process_gets_a_batch_of_one(monkeypatch, n, batch_size, processes, sizes):
    parts = parts_of(monkeypatch, processes, numbered_store(n), batch_size)
    assert [[len(batch) for batch in own] for own in parts] == [sizes] * processes
    seen = [label for own in parts for batch in own for label in batch]
    assert len(set(seen)) == len(seen) == n - n % processes


def test_whole_batches_are_shared_by_the_processes(monkeypatch):
    parts = parts_of(monkeypatch, 2, numbered_store(11), 4, whole_only=True)
    assert [[len(batch) for batch in own] for own in parts] == [[2, 2]] * 2
    torch.manual_seed(0)
    order = torch.randperm(11).tolist()
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(order[:4]), sorted(order[4:8])]


@pytest.mark.parametrize("n, processes", [(1, 1), (3, 2), (7, 4)])
def test_too_few_images_for_the_processes_are_bad_input(monkeypatch, capsys, n, processes):
    monkeypatch.setattr(common, "world", lambda: processes)
    line = error_line(capsys, common.Batches, numbered_store(n), 8)
    assert f"{n} images" in line and "batches of 8" in line and f"({processes})" in line


def test_fewer_images_than_a_whole_batch_are_bad_input(capsys):
    assert "7 images" in error_line(capsys, common.Batches, numbered_store(7), 8, whole_only=True)


def test_a_subset_holds_the_images_it_was_asked_for():
    store = numbered_store(40).subset(torch.arange(10, 30)).subset(torch.tensor([5, 0]))
    assert store.labels.tolist() == [15, 10]
    assert store.images[store.rows][:, 0, 0, 0].tolist() == [15, 10]


SHUFFLED = torch.randperm(33, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0] * 20 + [1] * 10 + [2] * 3)[SHUFFLED]


@pytest.mark.parametrize(
    "size, of_each_class",
    [
        (dict(per_class=1), [1, 1, 1]),
        (dict(per_class=3), [3, 3, 3]),
        (dict(per_class=8), [8, 8, 3]),
        (dict(per_class=20), [20, 10, 3]),
        (dict(fraction=0.5), [10, 5, 2]),
        (dict(fraction=0.01), [1, 1, 1]),
        (dict(fraction=1), [20, 10, 3])],
    ids=str)
def test_a_labelled_subset_has_the_size_asked_for_in_each_class(size, of_each_class):
    keep = common.labelled_subset(LABELS, seed=0, **size)
    assert torch.bincount(LABELS[keep]).tolist() == of_each_class
    assert len(set(keep.tolist())) == len(keep)


def test_a_labelled_subset_is_drawn_by_its_seed():
    draw = lambda seed: sorted(common.labelled_subset(LABELS, seed, per_class=3).tolist())
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_more_labels_than_any_class_has_is_bad_input(capsys):
    assert "20" in error_line(capsys, common.labelled_subset, LABELS, seed=0, per_class=21)


# ------------------------------------------------------------ folders of pictures

def test_val_is_a_stratified_fifth_of_train_and_shares_nothing_with_it(tmp_path):
    write_folder(tmp_path, per_class=10)
    train, val, both = (common.load_data(options(tmp_path, tmp_path), split)
                        for split in ("train", "val", "trainval"))
    assert torch.bincount(train.labels).tolist() == [8, 8, 8]
    assert torch.bincount(val.labels).tolist() == [2, 2, 2]
    assert not set(pictures(train)) & set(pictures(val))
    assert set(pictures(train)) | set(pictures(val)) == set(pictures(both))
    assert len(both) == 30


def test_val_is_the_same_each_time(tmp_path):
    write_folder(tmp_path, per_class=10)
    one = pictures(common.load_data(options(tmp_path, tmp_path), "val"))
    torch.manual_seed(5)
    assert one == pictures(common.load_data(options(tmp_path, tmp_path), "val"))


def test_an_own_val_folder_is_used(tmp_path):
    write_folder(tmp_path, per_class=4, splits=("train", "test"))
    write_folder(tmp_path, per_class=2, side=24, splits=("val",))  # else train once more
    for split, size in (("train", 12), ("val", 6), ("trainval", 18), ("test", 12)):
        assert len(common.load_data(options(tmp_path, tmp_path), split)) == size


def test_unlabeled_is_its_own_folder_or_else_all_of_train(tmp_path):
    write_folder(tmp_path, per_class=5)
    assert len(common.load_data(options(tmp_path, tmp_path), "unlabeled")) == 15
    write_folder(tmp_path, classes=("all",), per_class=7, splits=("unlabeled",))
    assert len(common.load_data(options(tmp_path, tmp_path), "unlabeled")) == 7


def test_labels_belong_to_their_pictures(tmp_path):
    for name, grey in (("dark", 20), ("light", 220)):
        (tmp_path / "test" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (10, 10), grey + i).save(tmp_path / "test" / name / f"{i}.png")
    store = common.load_data(options(tmp_path, tmp_path), "test")
    assert store.classes == ["dark", "light"]
    for i in range(6):
        assert (store.images[store.rows[i]].float().mean() > 128) == store.labels[i]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(tmp_path, capsys, split):
    write_folder(tmp_path, splits=[other for other in ("train", "test") if other != split])
    line = error_line(capsys, common.load_data, options(tmp_path, tmp_path), split)
    assert str(tmp_path / split) in line


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_with_other_classes_than_train_is_bad_input(tmp_path, capsys, split):
    write_folder(tmp_path, splits=("train", "unlabeled"))
    write_folder(tmp_path, classes=("a", "c", "d", "e", "f", "g"), splits=(split,))
    for _ in range(2):  # also where there is a cache
        line = error_line(capsys, common.load_data, options(tmp_path, tmp_path), split)
        assert f"{split} does not have the classes" in line and line.endswith("b, d, e, f ...")
    assert len(common.load_data(options(tmp_path, tmp_path), "unlabeled")) == 36


def test_a_cached_test_split_is_still_compared_with_train(folder, tmp_path, capsys):
    common.load_data(options(folder, tmp_path), "test")
    write_folder(folder, classes=("new",), splits=("train",))
    line = error_line(capsys, common.load_data, options(folder, tmp_path), "test")
    assert "test does not have the classes" in line and "new" in line


def test_an_unknown_data_set_is_named(tmp_path, capsys):
    assert "nowhere" in error_line(capsys, common.load_data, options("nowhere", tmp_path), "train")


# ------------------------------------------------------------ kinds of pictures

def plain(mode, colour, size=(20, 20)):
    return Image.new(mode, size, colour)


def palette(colour):
    return plain("RGB", colour).convert("P", palette=Image.Palette.ADAPTIVE)


def grey_16_bit(value):
    return Image.fromarray(np.full((20, 20), value, np.uint16))


RED, WHITE = (255, 0, 0), (255, 255, 255)
PICTURES = {  # picture, how it is saved, the colour it has to have
    "colour": (plain("RGB", (10, 100, 200)), "png", {}, (10, 100, 200)),
    "grey": (plain("L", 100), "png", {}, (100, 100, 100)),
    "grey, opaque": (plain("LA", (100, 255)), "png", {}, (100, 100, 100)),
    "grey, transparent": (plain("LA", (100, 0)), "png", {}, WHITE),
    "grey with a transparent value": (plain("L", 100), "png", dict(transparency=100), WHITE),
    "colour, opaque": (plain("RGBA", (*RED, 255)), "png", {}, RED),
    "colour, half transparent": (plain("RGBA", (*RED, 128)), "png", {}, (255, 127, 127)),
    "colour, transparent": (plain("RGBA", (*RED, 0)), "png", {}, WHITE),
    "palette": (palette(RED), "png", {}, RED),
    "palette with a transparent entry": (
        palette(RED),
        "png",
        dict(transparency=palette(RED).getpixel((0, 0))),
        WHITE,
    ),
    "CMYK": (plain("CMYK", (0, 255, 255, 0)), "jpg", dict(quality=100), RED),
    "16-bit black": (grey_16_bit(0), "png", {}, (0, 0, 0)),
    "16-bit mid-grey": (grey_16_bit(32896), "png", {}, (128, 128, 128)),
    "16-bit white": (grey_16_bit(65535), "png", {}, WHITE),
    "1-bit black": (plain("1", 0), "png", {}, (0, 0, 0)),
    "1-bit white": (plain("1", 1), "png", {}, WHITE),
    "one pixel": (plain("RGB", RED, (1, 1)), "png", {}, RED),
    "very wide": (plain("RGB", RED, (500, 2)), "png", {}, RED),
    "very high": (plain("RGB", RED, (2, 500)), "png", {}, RED),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_has_the_right_colour(tmp_path, name):
    picture, ending, how, colour = PICTURES[name]
    (tmp_path / "test" / "only").mkdir(parents=True)
    picture.save(tmp_path / "test" / "only" / f"picture.{ending}", **how)
    image = common.load_data(options(tmp_path, tmp_path), "test").images[0]
    assert (image.float() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 2


def test_a_picture_is_scaled_by_its_short_side_and_cut_at_the_centre(tmp_path):
    pixels = np.zeros((24, 96, 3), np.uint8)
    pixels[:, 36:60] = 200  # the centre square is light, what is beside it black
    (tmp_path / "test" / "only").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "test" / "only" / "picture.png")
    side = common.store_side(16)
    image = common.load_data(options(tmp_path, tmp_path), "test").images[0]
    assert image.shape == (3, side, side)
    assert (image[..., 3:-3] == 200).all()  # bicubic resizing looks over the edge


BROKEN = {"empty": b"", "garbage": b"no picture at all", "cut off": None}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named(folder, tmp_path, capsys, name):
    path = folder / "test" / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:200] if BROKEN[name] is None else BROKEN[name])
    assert str(path) in error_line(capsys, common.load_data, options(folder, tmp_path), "test")


# ------------------------------------------------------------ the cache

@pytest.fixture
def decoded(monkeypatch):
    """The paths of the pictures decoded so far."""
    paths, read_image = [], common.read_image

    def spy(path, *side):
        paths.append(str(path))
        return read_image(path, *side)

    monkeypatch.setattr(common, "read_image", spy)
    return paths


def test_a_second_load_decodes_nothing(folder, tmp_path, decoded):
    first = common.load_data(options(folder, tmp_path), "test")
    assert len(decoded) == 36
    second = common.load_data(options(folder, tmp_path), "test")
    assert len(decoded) == 36
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_another_side_is_decoded_again(folder, tmp_path, decoded):
    common.load_data(options(folder, tmp_path, image_size=16), "test")
    store = common.load_data(options(folder, tmp_path, image_size=32), "test")
    assert len(decoded) == 72
    assert store.images.shape[-1] == common.store_side(32)


def test_a_changed_picture_is_decoded_again(folder, tmp_path):
    before = common.load_data(options(folder, tmp_path), "test").images.clone()
    Image.new("RGB", (20, 20), WHITE).save(folder / "test" / "a" / "0.png")
    after = common.load_data(options(folder, tmp_path), "test").images
    assert (after[0] == 255).all()
    assert torch.equal(after[1:], before[1:])


def test_an_added_picture_is_found(folder, tmp_path):
    common.load_data(options(folder, tmp_path), "test")
    Image.new("RGB", (20, 20), WHITE).save(folder / "test" / "c" / "new.png")
    assert len(common.load_data(options(folder, tmp_path), "test")) == 37


def test_links_that_moved_to_another_class_bring_new_labels(tmp_path):
    """The pictures themselves, their times and their sizes stay what they were."""
    pool = write_folder(tmp_path / "pool", classes=["all"], splits=["test"]) / "test" / "all"
    link = tmp_path / "pictures" / "test" / "a" / "0.png"
    for name in ("a", "b"):
        (tmp_path / "pictures" / "test" / name).mkdir(parents=True)
    for i in range(1, 6):
        (tmp_path / "pictures" / "test" / "b" / f"{i}.png").symlink_to(pool / f"{i}.png")
    link.symlink_to(pool / "0.png")
    before = common.load_data(options(tmp_path / "pictures", tmp_path), "test").labels
    link.rename(tmp_path / "pictures" / "test" / "b" / "0.png")
    after = common.load_data(options(tmp_path / "pictures", tmp_path), "test").labels
    assert before.bincount().tolist() == [1, 5] and after.tolist() == [1] * 6


def test_a_class_without_test_pictures_shifts_no_label(folder, tmp_path):
    before = common.load_data(options(folder, tmp_path), "test")
    write_folder(folder, classes=["aa"], splits=["train"])
    (folder / "test" / "aa").mkdir()
    after = common.load_data(options(folder, tmp_path), "test")
    assert after.classes == ["a", "aa", "b", "c"] and torch.equal(after.images, before.images)
    assert after.labels.unique().tolist() == [0, 2, 3]


def test_two_projects_with_equal_relative_names_do_not_share_a_cache(tmp_path, monkeypatch):
    means = []
    for project, grey in (("x", 20), ("y", 220)):
        path = tmp_path / project / "pictures" / "test" / "only" / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (20, 20), grey).save(path)
        os.utime(path, (0, 0))
        monkeypatch.chdir(tmp_path / project)
        store = common.load_data(options("pictures", tmp_path), "test")
        means.append(round(store.images.float().mean().item()))
    assert means == [20, 220]


def test_two_folders_of_one_name_do_not_share_a_cache(tmp_path):
    for parent, classes in (("x", ("a", "b")), ("y", ("a", "b", "c"))):
        write_folder(tmp_path / parent / "pictures", classes, per_class=2)
    x, y = (common.load_data(options(tmp_path / parent / "pictures", tmp_path), "test")
            for parent in ("x", "y"))
    assert len(x) == 4 and len(y) == 6


@pytest.mark.parametrize("moment", ["at the header", "at the 20th picture", "before the renaming"])
def test_a_cache_that_was_only_half_written_is_never_taken(folder, tmp_path, monkeypatch, moment):
    expected = common.load_data(options(folder, tmp_path / "whole"), "test").images
    calls = []

    def interrupted(*args):
        calls.append(args)
        if moment != "at the 20th picture" or len(calls) >= 20:
            raise KeyboardInterrupt
        return read_image(*args)

    read_image = common.read_image
    with monkeypatch.context() as patch:
        place, name = {
            "at the header": (np.lib.format, "write_array_header_1_0"),
            "at the 20th picture": (common, "read_image"),
            "before the renaming": (common.os, "replace"),
        }[moment]
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            common.load_data(options(folder, tmp_path), "test")
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert torch.equal(common.load_data(options(folder, tmp_path), "test").images, expected)


def test_a_stray_temporary_file_is_never_taken(folder, tmp_path):
    expected = common.load_data(options(folder, tmp_path), "test").images.clone()
    for path in list((tmp_path / "cache").glob("*.npy")):  # as if the power had failed before that
        path.rename(f"{path}.123.tmp").write_bytes(b"half of it")
    common.shared_images.cache_clear()  # as in another run
    assert torch.equal(common.load_data(options(folder, tmp_path), "test").images, expected)


def test_images_without_what_belongs_to_them_are_never_taken(folder, tmp_path):
    expected = common.load_data(options(folder, tmp_path), "test").labels
    next((tmp_path / "cache").glob("*.pt")).unlink()
    assert torch.equal(common.load_data(options(folder, tmp_path), "test").labels, expected)


def test_a_finished_cache_needs_no_right_to_write(folder, tmp_path, monkeypatch):
    root = tmp_path / "root"
    first = common.load_data(options(folder, root), "test")
    common.shared_images.cache_clear()  # as in another run

    def refuse(*args, **named):
        raise PermissionError("read-only")

    for place, name in (
        (common.Path, "mkdir"),
        (common.os, "replace"),
        (common.torch, "save"),
        (common.tempfile, "TemporaryDirectory"),
    ):
        monkeypatch.setattr(place, name, refuse)  # a mode of 0o555 does not keep root from writing
    (root / "cache").chmod(0o555)
    root.chmod(0o555)
    try:
        again = common.load_data(options(folder, root), "test")
    finally:
        root.chmod(0o755)
        (root / "cache").chmod(0o755)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, capsys):
    (tmp_path / "root").write_text("a file where a folder should be")
    line = error_line(capsys, common.load_data, options(folder, tmp_path / "root"), "test")
    assert f"--root {tmp_path / 'root'}" in line


def test_training_cannot_change_the_cache(folder, tmp_path):
    store = common.load_data(options(folder, tmp_path), "test")
    before = store.images.clone()
    child = os.fork()
    if child == 0:  # writing to a read-only mapping ends the process
        faulthandler.disable()
        store.images.zero_()
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
    assert torch.equal(common.load_data(options(folder, tmp_path), "test").images, before)


# ------------------------------------------------------------ flowers

FLOWERS = {"trnid": [3, 1], "valid": [2, 6], "tstid": [5, 4, 7]}
FLOWER_LABELS = [1, 102, 5, 5, 1, 102, 5]  # of images 1, 2, ..., counted from 1 as in the original


@pytest.fixture
def flowers(tmp_path, any_copy):
    """A root with a tiny copy of the original's files; image i is grey of value 30 i."""
    folder = tmp_path / "root" / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 8):
        path = folder / "jpg" / f"image_{i:05d}.jpg"
        Image.new("RGB", (30, 20), (30 * i,) * 3).save(path, quality=100)
    savemat(folder / "setid.mat", FLOWERS)
    savemat(folder / "imagelabels.mat", {"labels": FLOWER_LABELS})
    return tmp_path / "root"


@pytest.mark.parametrize("split, numbers", [
    ("train", [3, 1]),
    ("val", [2, 6]),
    ("test", [5, 4, 7]),
    ("trainval", [3, 1, 2, 6]),
    ("unlabeled", [3, 1, 2, 6])])
def test_flowers_are_read_as_torchvision_unpacks_them(flowers, split, numbers):
    store = common.load_data(options("flowers", flowers), split)
    assert len(store.classes) == 102 and store.classes[0] == "pink primrose"
    assert store.labels.tolist() == [FLOWER_LABELS[i - 1] - 1 for i in numbers]
    for row, i in zip(store.rows, numbers):
        assert (store.images[row].float() - 30 * i).abs().max() <= 2


def test_finetune_runs_on_flowers(flowers, tmp_path):
    result = finetune.main(
        ["--data", "flowers", "--root", str(flowers), "--out", str(tmp_path / "run"), "--device",
         "cpu", "--precision", "float32", "--image-size", "16", "--arch", "resnet10", "--epochs",
         "1"]
    )
    assert 0 <= result["test_top1"] <= 100
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["root", "run.jsonl", "run.png", "run.pt"]


def test_flowers_without_files_and_network_is_bad_input(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets.flowers102, "download_and_extract_archive", no_network)
    line = error_line(capsys, common.load_data, options("flowers", tmp_path), "train")
    for word in (str(tmp_path / "flowers-102"), "no network", "row flowers", "README.md"):
        assert word in line


def test_a_missing_flower_is_named(flowers, capsys):
    (flowers / "flowers-102" / "jpg" / "image_00005.jpg").unlink()
    line = error_line(capsys, common.load_data, options("flowers", flowers), "test")
    assert "image_00005.jpg" in line


# ------------------------------------------------------------ the k-NN probe

def slow_knn(memory, memory_labels, query, query_labels, k, temperature):
    """Each of the k most similar images in memory votes exp(similarity / temperature) for its
    class."""
    hits = 0
    for x, label in zip(query, query_labels.tolist()):
        similarity = [float(x @ m / (x.norm() * m.norm())) for m in memory]
        votes = {}
        for i in sorted(range(len(memory)), key=lambda i: -similarity[i])[:k]:
            voted = int(memory_labels[i])
            votes[voted] = votes.get(voted, 0) + math.exp(similarity[i] / temperature)
        hits += max(votes, key=votes.get) == label
    return 100 * hits / len(query)


@pytest.mark.parametrize("memory, query, k, temperature", [
    (40, 60, 1, 0.1),
    (40, 60, 5, 0.1),
    (40, 60, 20, 0.1),
    (40, 60, 20, 10.0),
    (6, 30, 20, 0.1),      # more neighbours asked for than there are
    (5, 1100, 3, 0.1)])    # more queries than are compared at once
def test_knn_accuracy_is_that_of_a_slow_loop(memory, query, k, temperature):
    centres = torch.randn(4, 8, dtype=torch.float64)
    memory_labels, query_labels = torch.randint(4, (memory,)), torch.randint(4, (query,))
    memory, query = (centres[labels] + 1.5 * torch.randn(len(labels), 8, dtype=torch.float64)
                     for labels in (memory_labels, query_labels))
    problem = memory, memory_labels, query, query_labels, k, temperature
    assert common.knn_accuracy(*problem) == pytest.approx(slow_knn(*problem))


def test_knn_of_the_memory_itself_is_always_right_with_one_neighbour():
    x, labels = torch.randn(20, 4), torch.randint(3, (20,))
    assert common.knn_accuracy(x, labels, x, labels, k=1) == 100
