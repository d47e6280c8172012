"""Boxes and masks from folders in the layout of PASCAL VOC: what is read and what is refused, the
splits, the cache, and subsets of images that show several classes."""
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, error_line, options
from PIL import Image, ImageOps

import common

SIZES = [(40, 30), (24, 32)]  # of the pictures 1, 2, 3, ... in turn
OBJECT = ("<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
          "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>")
EVERYWHERE = (1, 1, 24, 30)  # a box inside both sizes


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(common.sets, "VOCDetection", lambda *args, **how: 1 / 0)


# ------------------------------------------------------------ writing the layout

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def noise(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def size_of(name):
    """Of the picture with this name, a number."""
    return SIZES[(int(name) + 1) % 2]


def write_pictures(folder, names):
    """A picture of its own noise for each name."""
    (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for name in names:
        seed = int.from_bytes(f"{folder.name} {name}".encode(), "big")
        noise(size_of(name), seed).save(folder / "JPEGImages" / f"{name}.png")


def write_lists(folder, kind, lists):
    for split, names in lists.items():
        write(folder / "ImageSets" / kind / f"{split}.txt", "".join(f"{name}\n" for name in names))


def annotation(objects, before=""):
    """objects: (class, xmin, ymin, xmax, ymax), and 1 behind them if it is difficult."""
    text = ""
    for name, left, top, right, bottom, *difficult in objects:
        text += OBJECT.format(name, *difficult or [0], left, top, right, bottom)
    return f"<annotation>{before}{text}</annotation>"


def write_boxes(folder, targets, class_names=None, **lists):
    """targets: the objects in each picture, by its name."""
    write_pictures(folder, targets)
    for name, objects in targets.items():
        write(folder / "Annotations" / f"{name}.xml", annotation(objects))
    write_lists(folder, "Main", lists)
    if class_names:
        write(folder / "class_names.txt", "".join(f"{name}\n" for name in class_names))
    return folder


def palette_mask(numbers):
    """Numbers of classes as a picture with VOC's colours."""
    mask = Image.fromarray(np.asarray(numbers, np.uint8))
    colours = np.random.default_rng(0).integers(0, 256, 768).tolist()
    colours[:6] = [0, 0, 0, 128, 0, 0]
    mask.putpalette(colours)
    assert mask.mode == "P"
    return mask


def write_masks(folder, targets, class_names=("background", "cat", "dog"), place="Class", **lists):
    """targets: for each picture the numbers of the classes that share its right half."""
    write_pictures(folder, targets)
    (folder / f"Segmentation{place}").mkdir(parents=True, exist_ok=True)
    for name, shown in targets.items():
        width, height = size_of(name)
        numbers = np.zeros((height, width), np.uint8)
        for i, number in enumerate(shown):
            first = width // 2 + i * (width // 2) // len(shown)
            numbers[:, first:] = number
        palette_mask(numbers).save(folder / f"Segmentation{place}" / f"{name}.png")
    write_lists(folder, "Segmentation", lists)
    if class_names:
        write(folder / "class_names.txt", "".join(f"{name}\n" for name in class_names))
    return folder


def flags(folder, task="detect"):
    return options(folder, folder.parent / "root", task=task)


def load(folder, split="train", task="detect"):
    return common.load_data(flags(folder, task), split)


def refusal(capsys, folder, split="train", task="detect"):
    return error_line(capsys, common.load_data, flags(folder, task), split)


def pictures(store):
    """The bytes of each picture of a store, to tell pictures apart."""
    return [store.images[row].numpy().tobytes() for row in store.rows]


def squashed(picture):
    """A picture as it is stored, squashed to the square."""
    small = picture.convert("RGB").resize((20, 20), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def stored(folder, names):
    """The bytes of these pictures as a store holds them."""
    paths = [folder / "JPEGImages" / f"{name}.png" for name in names]
    return [squashed(Image.open(path)).contiguous().numpy().tobytes() for path in paths]


# ------------------------------------------------------------ boxes

def boxes_of(folder, objects):
    """The rows that the only image of a test split, 40 x 30 pixels, has for these objects."""
    write_boxes(folder, {"1": objects}, class_names=("cat", "dog"), test=["1"])
    return load(folder, "test").labels[0]


@pytest.mark.parametrize("box, expected", [
    ((1, 1, 40, 30), (0, 0, 1, 1)),
    ((1, 1, 1, 1), (0, 0, 1 / 40, 1 / 30)),
    ((40, 30, 40, 30), (39 / 40, 29 / 30, 1, 1)),
    ((11, 7, 20, 15), (0.25, 0.2, 0.5, 0.5)),
    ((11.5, 7, 20.25, "15.0"), (10.5 / 40, 0.2, 20.25 / 40, 0.5)),
    ((" 11 ", "7\n", "2e1", 15), (0.25, 0.2, 0.5, 0.5)),
    ((0, 0, 20, 15), (0, 0, 0.5, 0.5)),
    ((-9, -5, 50, 40), (0, 0, 1, 1)),
    ((31, 16, 1e9, "inf"), (0.75, 0.5, 1, 1)),
    (("-inf", -1, 40, 30.5), (0, 0, 1, 1))])
def test_a_box_is_shares_of_the_sides_and_is_cut_at_them(tmp_path, box, expected):
    rows = boxes_of(tmp_path / "voc", [("dog", *box)])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.tensor([[*expected, 1, 0.0]]))


@pytest.mark.parametrize("box", [
    (21, 1, 20, 30),
    (30, 1, 10, 30),
    (1, 16, 40, 15),
    (1, 30, 40, 1),
    (-20, 1, 0, 30),
    (41, 1, 60, 30),
    (1, -9, 40, -1),
    (1, 31, 40, 50),
    ("nan", 1, 40, 30),
    (1, 1, 40, "nan"),
    ("inf", 1, "inf", 30)],
    ids=str)
def test_a_box_without_area_is_left_out_and_said(tmp_path, capsys, box):
    rows = boxes_of(tmp_path / "voc", [("dog", *box), ("cat", 1, 1, 20, 30)])
    torch.testing.assert_close(rows, torch.tensor([[0, 0, 0.5, 1, 0, 0]]))
    said = [line for line in capsys.readouterr().out.splitlines() if "1.xml" in line]
    assert len(said) == 1 and "dog" in said[0] and "left out" in said[0]


def test_a_box_with_area_is_no_cause_for_words(tmp_path, capsys):
    boxes_of(tmp_path / "voc", [("dog", 1, 1, 40, 30)])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("tag, expected", [
    ("<difficult>1</difficult>", 1),
    ("<difficult>0</difficult>", 0),
    ("", 0)])
def test_difficult_is_read(tmp_path, tag, expected):
    folder = write_boxes(tmp_path / "voc", {"1": []}, class_names=("cat", "dog"), test=["1"])
    text = annotation([("cat", *EVERYWHERE)]).replace("<difficult>0</difficult>", tag)
    write(folder / "Annotations" / "1.xml", text)
    assert load(folder, "test").labels[0, :, 4:].tolist() == [[0, expected]]


def test_a_published_annotation_is_read_without_its_parts(tmp_path):
    folder = write_boxes(tmp_path / "voc", {"1": []}, class_names=("cat", "dog"), test=["1"])
    write(folder / "Annotations" / "1.xml", """<?xml version="1.0" encoding="UTF-8"?>
        <annotation>
            <folder>VOC2012</folder>
            <filename>1.jpg</filename>
            <source><database>The VOC2008 Database</database></source>
            <size>
                <width>40</width>
                <height>30</height>
                <depth>3</depth>
            </size>
            <object>
                <name>dog</name>
                <pose>Left</pose>
                <difficult>0</difficult>
                <part><name>head</name><bndbox>
                    <xmin>2</xmin><ymin>2</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>
                <bndbox>
                    <xmax>20</xmax>
                    <xmin>11</xmin>
                    <ymax>15</ymax>
                    <ymin>7</ymin>
                </bndbox>
            </object>
        </annotation>""".strip())
    torch.testing.assert_close(load(folder, "test").labels,
                               torch.tensor([[[0.25, 0.2, 0.5, 0.5, 1, 0]]]))


def test_spaces_around_what_an_annotation_says_do_not_matter(tmp_path):
    folder = write_boxes(tmp_path / "voc", {"1": []}, class_names=("cat", "dog"), test=["1"])
    size = "<size><width>40</width><height>30</height></size>"
    text = annotation([("dog", 11, 7, 20, 15, 1)], size)
    write(folder / "Annotations" / "1.xml", re.sub(r">(\w+)<", r">\n  \1\n<", text))
    torch.testing.assert_close(load(folder, "test").labels,
                               torch.tensor([[[0.25, 0.2, 0.5, 0.5, 1, 1]]]))


def test_rows_without_an_object_are_minus_one(tmp_path):
    cat, dog = ("cat", *EVERYWHERE), ("dog", *EVERYWHERE)
    targets = {"1": [cat], "2": [cat, dog, cat], "3": [], "4": [dog, dog]}
    folder = write_boxes(tmp_path / "voc", {**targets, "5": []}, train=list(targets), val=["5"],
                         test=["1"])
    labels = load(folder).labels
    assert labels.shape == (4, 3, 6) and labels.dtype == torch.float32
    assert labels[:, :, 4].tolist() == [[0, -1, -1], [0, 1, 0], [-1, -1, -1], [1, 1, -1]]
    empty = labels[:, :, 4] == -1
    assert (labels[empty] == -1).all() and (labels[~empty] >= 0).all()


def test_a_list_that_names_an_image_twice_has_it_once(tmp_path):
    cat = [("cat", *EVERYWHERE)]
    folder = write_boxes(tmp_path / "voc", {"1": cat, "2": cat}, train="1122", test="1")
    everything = load(folder, "trainval")
    assert pictures(everything) == stored(folder, ["1", "2"])


def test_an_image_in_two_lists_of_which_one_is_held_out_ends_the_run(tmp_path, capsys):
    folder = write_boxes(tmp_path / "voc", {"1": [("cat", *EVERYWHERE)], "2": []}, train="12",
                         val="2", test="1")
    line = error_line(capsys, load, folder, "val")
    assert "train and val" in line and "2.png" in line


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_no_image_may_be_trained_on_and_in_test(tmp_path, capsys, task):
    if task == "detect":
        folder = write_boxes(tmp_path / "voc", dict.fromkeys("123", [("cat", *EVERYWHERE)]),
                             train="1", val="2", test="23")
    else:
        folder = write_masks(tmp_path / "voc", dict.fromkeys("123", [1]), ("background", "cat"),
                             train="1", val="2", test="23")
    assert len(load(folder, "trainval", task)) == 2
    line = refusal(capsys, folder, "test", task)
    assert "train and val and test share" in line and "2.png" in line


def test_a_list_that_is_edited_later_is_compared_again(tmp_path, capsys):
    folder = write_boxes(tmp_path / "voc", dict.fromkeys("123", [("cat", *EVERYWHERE)]),
                         train="1", val="2", test="3")
    assert len(load(folder, "test")) == 1  # its cache is there now
    write_lists(folder, "Main", dict(val="23"))
    assert "3.png" in refusal(capsys, folder, "test")


def test_masks_of_0_and_255_alone_are_refused(tmp_path, capsys):
    folder = write_masks(tmp_path / "voc", dict.fromkeys("12", [255]), ("background", "cat"),
                         train="1", test="2")
    line = refusal(capsys, folder, "train", "segment")
    assert "255, which counts as nothing, but no class" in line


def test_a_test_split_without_any_object_has_no_rows_and_is_said(tmp_path, capsys):
    targets = {"1": [("cat", *EVERYWHERE)], "2": [], "3": []}
    folder = write_boxes(tmp_path / "voc", targets, train=["1"], test=["2", "3"])
    store = load(folder, "test")
    assert store.labels.shape == (2, 0, 6) and pictures(store) == stored(folder, ["2", "3"])
    assert "no image of 1 of 1 classes: cat" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize("val", [{}, {"val": ["4"], "test": ["4"]}], ids=["no val", "val"])
def test_images_of_a_train_split_that_shows_no_class_are_in_train_or_val(
        tmp_path, capsys, task, val):
    if task == "detect":
        folder = write_boxes(tmp_path / "voc", dict.fromkeys("1234", []), ("cat",),
                             train=list("123"), **val)
    else:
        folder = write_masks(tmp_path / "voc", dict.fromkeys("1234", []), ("background", "cat"),
                             train=list("123"), **val)
    train, held_out = (pictures(load(folder, split, task)) for split in ("train", "val"))
    assert sorted(train + held_out) == sorted(stored(folder, ["1", "2", "3", *val.get("val", [])]))
    assert len(held_out) == 1
    assert "cat" in capsys.readouterr().out


# ------------------------------------------------------------ pictures

@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_picture_is_squashed_and_not_cut(tmp_path, ending):
    folder = write_boxes(tmp_path / "voc", {"1": [], "2": []}, class_names=("cat",), test="12")
    for name, size in zip("12", SIZES):
        (folder / "JPEGImages" / f"{name}.png").unlink()
        noise(size, int(name)).save(folder / "JPEGImages" / f"{name}.{ending}")
    store = load(folder, "test")
    assert store.images.shape == (2, 3, 20, 20) and store.images.dtype == torch.uint8
    for name, image in zip("12", store.images[store.rows]):
        assert torch.equal(image, squashed(Image.open(folder / "JPEGImages" / f"{name}.{ending}")))


@pytest.mark.parametrize("kind", ["L", "P", "RGBA"])
def test_a_picture_of_another_kind_than_colour_is_read_too(tmp_path, kind):
    folder = write_boxes(tmp_path / "voc", {"1": []}, class_names=("cat",), test="1")
    picture = noise((40, 30)).convert(kind)
    picture.save(folder / "JPEGImages" / "1.png")
    assert torch.equal(load(folder, "test").images[0], squashed(picture))


@pytest.mark.parametrize("beside", ["1.json", "1.txt", "1.xml", ".1.png"])
def test_what_lies_beside_a_picture_is_no_picture(tmp_path, beside):
    folder = write_boxes(tmp_path / "voc", {"1": []}, class_names=("cat",), test="1")
    write(folder / "JPEGImages" / beside, "no picture")
    assert pictures(load(folder, "test")) == stored(folder, "1")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_of_two_pictures_of_one_name_none_is_chosen(tmp_path, capsys, task):
    folder = write_shown(tmp_path / "voc", ["a"] * 2, task, train="0", test="1")
    Image.new("L", (40, 30)).save(folder / "JPEGImages" / "1.jpg")  # as where masks lie there too
    assert len(load(folder, "train", task)) == 1  # whose lists name other pictures
    line = refusal(capsys, folder, "test", task)
    assert "1.jpg and" in line and "1.png" in line


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_measured_as_it_is_shown(tmp_path, capsys, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown, kept = ((40, 30), (30, 40)) if orientation < 5 else ((30, 40), (40, 30))
    folder = write_boxes(tmp_path / "voc", {"1": []}, ("cat", "dog"), test="1")
    write_masks(folder, {"1": [1]}, ("cat", "dog"), test="1")
    (folder / "JPEGImages" / "1.png").unlink()
    path = folder / "JPEGImages" / "1.jpg"
    noise((40, 30)).save(path, exif=exif)

    size = "<size><width>{}</width><height>{}</height></size>"
    box = [("dog", 1, 1, shown[0] / 2, shown[1])]
    write(folder / "Annotations" / "1.xml", annotation(box, size.format(*shown)))
    store = load(folder, "test")
    torch.testing.assert_close(store.labels, torch.tensor([[[0, 0, 0.5, 1, 1, 0]]]))
    assert torch.equal(store.images[0], squashed(ImageOps.exif_transpose(Image.open(path))))
    write(folder / "Annotations" / "1.xml", annotation(box, size.format(*kept)))
    assert "1.xml" in refusal(capsys, folder, "test")

    mask = folder / "SegmentationClass" / "1.png"
    palette_mask(np.ones(shown[::-1])).save(mask)
    assert (load(folder, "test", "segment").labels == 1).all()
    palette_mask(np.ones(kept[::-1])).save(mask)
    assert str(mask) in refusal(capsys, folder, "test", "segment")


def test_a_turned_tiff_is_measured_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = write_boxes(tmp_path / "voc", {"1": [("dog", 1, 1, 30, 40)]}, ("cat", "dog"), test="1")
    (folder / "JPEGImages" / "1.png").unlink()
    noise((40, 30)).save(folder / "JPEGImages" / "1.tif", exif=exif)
    store = load(folder, "test")
    torch.testing.assert_close(store.labels, torch.tensor([[[0, 0, 1.0, 1, 1, 0]]]))


def test_two_spellings_of_a_class_are_refused(tmp_path, capsys):
    targets = {name: [(shown, *EVERYWHERE)] for name, shown in zip("123", ("cat", "Cat", "dog"))}
    folder = write_boxes(tmp_path / "voc", targets, train="123", test="1")
    assert "two spellings, of Cat, cat, dog" in refusal(capsys, folder)


# ------------------------------------------------------------ masks

@pytest.mark.parametrize("kind", ["its own palette", "4 bits"])
def test_masks_whose_numbers_mean_something_else_are_refused(tmp_path, capsys, kind):
    folder = write_masks(tmp_path / "voc", {"1": [1], "2": [1]}, train="12", test="1")
    file = folder / "SegmentationClass" / "2.png"
    numbers = np.array(Image.open(file))
    if kind == "4 bits":
        save_grey_of_4_bits(file, numbers)
        assert "grey with 2 or 4 bits" in refusal(capsys, folder, "train", "segment")
        return
    Image.open(file).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE).save(file)
    assert (np.array(Image.open(file)) != numbers).any()
    line = refusal(capsys, folder, "train", "segment")
    assert "2.png" in line and "another colour" in line


def save_grey_of_4_bits(file, numbers):
    """Pillow writes none itself: a PNG from its chunks."""
    height, width = numbers.shape
    rows = b""
    for row in numbers:
        pairs = np.pad(row, (0, width % 2)).reshape(-1, 2)
        rows += b"\0" + (16 * pairs[:, 0] + pairs[:, 1]).astype(np.uint8).tobytes()
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    file.write_bytes(content)


def nearest(length, side):
    """For each of `side` pixels the positions of the pixels of `length` that are the nearest: one,
    or two where it lies on their edge."""
    positions = []
    for i in range(side):
        index, rest = divmod((2 * i + 1) * length, 2 * side)  # floor((i + 0.5) * length / side)
        positions.append([index] if rest else [index - 1, index])
    return positions


@pytest.mark.parametrize("size", [*SIZES, (7, 61), (21, 19), (1, 1), (100, 50), (500, 375)])
@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_a_mask_keeps_the_number_of_the_nearest_pixel(tmp_path, mode, size):
    highest = 2 if mode == "1" else 4
    numbers = np.random.default_rng(0).integers(0, highest, (size[1], size[0])).astype(np.uint8)
    if mode != "1":
        numbers[numbers == 3] = 255
    folder = write_masks(tmp_path / "voc", {"1": []}, test="1")
    noise(size).save(folder / "JPEGImages" / "1.png")
    kinds = {"P": palette_mask(numbers), "L": Image.fromarray(numbers),
             "1": Image.fromarray(numbers.astype(bool))}
    kinds[mode].save(folder / "SegmentationClass" / "1.png")
    assert Image.open(folder / "SegmentationClass" / "1.png").mode == mode

    label = load(folder, "test", "segment").labels
    assert label.shape == (1, 20, 20) and label.dtype == torch.uint8
    rows, columns = nearest(size[1], 20), nearest(size[0], 20)
    for i in range(20):
        for j in range(20):
            assert label[0, i, j] in numbers[np.ix_(rows[i], columns[j])]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_palette_of_few_colours_keeps_the_numbers_too(tmp_path, depth):
    folder = write_masks(tmp_path / "voc", {"1": []}, test="1")
    numbers = np.zeros((30, 40), np.uint8)
    numbers[:, 20:] = 1
    palette_mask(numbers).save(folder / "SegmentationClass" / "1.png", bits=depth)
    label = load(folder, "test", "segment").labels[0]
    assert (label[:, :10] == 0).all() and (label[:, 10:] == 1).all()


def test_masks_and_pictures_belong_together(tmp_path):
    folder = write_masks(tmp_path / "voc", {"1": [1], "2": [2], "3": [255, 1], "4": [1]},
                         train="312", val="4", test="1")
    store = load(folder, "train", "segment")
    assert store.classes == ["background", "cat", "dog"]
    assert pictures(store) == stored(folder, "312")
    assert (store.labels[:, :, :10] == 0).all()
    assert store.labels[:, 0, 10:].tolist() == [[255] * 5 + [1] * 5, [1] * 10, [2] * 10]


MASKS = {  # what is no mask for a picture of 40 x 30 pixels and three classes, what is to be said
    "colour": (noise((40, 30)), "RGB"),
    "transparency": (noise((40, 30)).convert("RGBA"), "RGBA"),
    "16 bit": (Image.fromarray(np.ones((30, 40), np.uint16)), "I;16"),
    "turned": (palette_mask(np.ones((40, 30))), "30, 40"),
    "larger": (palette_mask(np.ones((30, 41))), "41, 30"),
    "one class too many": (palette_mask(np.full((30, 40), 3)), "class 3"),
    "class 254": (palette_mask(np.full((30, 40), 254)), "class 254"),
    "broken": (None, "identify"),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_no_mask_is_named(tmp_path, capsys, name):
    mask, said = MASKS[name]
    for split, other in (("train", "test"), ("test", "train")):
        folder = write_masks(tmp_path / split, dict.fromkeys("12", [1]), **{split: "1", other: "2"})
        path = folder / "SegmentationClass" / "1.png"
        path.write_bytes(b"no picture")
        if mask:
            mask.save(path)
        line = refusal(capsys, folder, split, "segment")
        assert str(path) in line and said in line


# ------------------------------------------------------------ bad files

def wanting(old, new=""):
    """An annotation of a cat with a part replaced."""
    text = annotation([("cat", *EVERYWHERE)])
    assert old in text
    return text.replace(old, new)


LIST, XML, PICTURE = "ImageSets/Main/train.txt", "Annotations/2.xml", "JPEGImages/2.png"
BAD_BOXES = {  # a file, what stands in it instead (None: it is missing), what has to be named
    "broken XML": (XML, "<annotation><object>", XML),
    "empty XML": (XML, "", XML),
    "no XML": (XML, b"\xff\xfe\x00", XML),
    "missing XML": (XML, None, XML),
    "missing bndbox": (XML, re.sub("<bndbox>.*</bndbox>", "", wanting("")), "a cat has no bndbox"),
    "shares of the sides": (XML, annotation([("cat", 0.1, 0.2, 0.9, 1)]), "VOC counts pixels"),
    "missing xmax": (XML, wanting("<xmax>24</xmax>"), XML),
    "empty xmax": (XML, wanting("24"), XML),
    "text for a number": (XML, wanting("24", "wide"), XML),
    "missing name": (XML, wanting("<name>cat</name>"), XML),
    "missing picture": (PICTURE, None, "JPEGImages/2"),
    "broken picture": (PICTURE, "no picture", PICTURE),
    "empty picture": (PICTURE, "", PICTURE),
    "missing list": (LIST, None, LIST),
    "empty list": (LIST, "", LIST),
    "blank list": (LIST, "\n\n  \n", LIST),
    "list of other names": (LIST, "1\nanother\n", LIST),
    "list that is no text": (LIST, b"\xff\xfe\x00", LIST),
}


def spoil(path, content):
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)


@pytest.mark.parametrize("class_names", [None, ("cat",)], ids=["found", "class_names.txt"])
@pytest.mark.parametrize("name", BAD_BOXES)
def test_a_bad_file_of_boxes_is_named(tmp_path, capsys, name, class_names):
    file, content, named = BAD_BOXES[name]
    targets = dict.fromkeys("1234", [("cat", *EVERYWHERE)])
    folder = write_boxes(tmp_path / "voc", targets, class_names, train="12", val="3", test="4")
    spoil(folder / file, content)
    line = refusal(capsys, folder)
    assert str(folder) in line and named in line


BAD_MASKS = {
    "missing mask": ("SegmentationClass/2.png", None, "SegmentationClass/2.png"),
    "missing picture": (PICTURE, None, "JPEGImages/2"),
    "broken picture": (PICTURE, "no picture", PICTURE),
    "missing list": ("ImageSets/Segmentation/train.txt", None, "ImageSets/Segmentation/train.txt"),
    "empty list": ("ImageSets/Segmentation/train.txt", "", "ImageSets/Segmentation/train.txt"),
    "missing class_names.txt": ("class_names.txt", None, "class_names.txt"),
    "empty class_names.txt": ("class_names.txt", "", "SegmentationClass/1.png"),  # has a class 1
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_bad_file_of_masks_is_named(tmp_path, capsys, name):
    file, content, named = BAD_MASKS[name]
    targets = dict.fromkeys("1234", [1])
    folder = write_masks(tmp_path / "voc", targets, train="12", val="3", test="4")
    spoil(folder / file, content)
    line = refusal(capsys, folder, "train", "segment")
    assert str(folder) in line and named in line


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("task, kind", [("detect", "Main"), ("segment", "Segmentation")])
@pytest.mark.parametrize("content", ["", "another"], ids=["empty", "another"])
def test_a_bad_list_of_a_further_split_is_named(tmp_path, capsys, task, kind, split, content):
    folder = write_shown(tmp_path / "voc", ["a"] * 4, task, train="01", val="2", test="3")
    spoil(folder / "ImageSets" / kind / f"{split}.txt", content)
    assert f"ImageSets/{kind}/{split}.txt" in refusal(capsys, folder, split, task)


def test_a_test_that_no_list_names_is_named(tmp_path, capsys):
    folder = write_shown(tmp_path / "voc", ["a"] * 4, "detect", train="0123")
    assert "ImageSets/Main/test.txt" in refusal(capsys, folder, "test")


@pytest.mark.parametrize("part", ["ImageSets", "ImageSets/Main", "JPEGImages", "Annotations"])
def test_a_missing_folder_is_named(tmp_path, capsys, part):
    targets = dict.fromkeys("12", [("cat", *EVERYWHERE)])
    folder = write_boxes(tmp_path / "voc", targets, train="1", test="2")
    shutil.rmtree(folder / part)
    for split in ("train", "test"):
        line = refusal(capsys, folder, split)
        assert str(folder) in line and part in line


def test_a_missing_folder_of_all_is_named(tmp_path, capsys):
    assert str(tmp_path / "voc") in refusal(capsys, tmp_path / "voc")


@pytest.mark.parametrize("size, fits", [
    ("", True),
    ("<size><depth>3</depth></size>", True),
    ("<size><width>0</width><height>0</height></size>", True),
    ("<size><width>40</width><height>30</height></size>", True),
    ("<size><width>30</width><height>40</height></size>", False),
    ("<size><width>41</width><height>30</height></size>", False),
    ("<size><width>40</width><height>60</height></size>", False),
    ("<size><width>wide</width><height>30</height></size>", False)])
def test_a_size_that_contradicts_the_picture_is_bad_input(tmp_path, capsys, size, fits):
    folder = write_boxes(tmp_path / "voc", {"1": []}, ("cat",), test="1")
    file = folder / "Annotations" / "1.xml"
    write(file, annotation([("cat", *EVERYWHERE)], size))
    if fits:
        assert len(load(folder, "test")) == 1
    else:
        line = refusal(capsys, folder, "test")
        assert str(file) in line and "40 x 30" in line and str(folder / "JPEGImages") in line


# ------------------------------------------------------------ classes

def test_classes_are_what_train_names_in_order(tmp_path):
    objects = {"1": [("dog", *EVERYWHERE)], "2": [("cat", *EVERYWHERE), ("ant", *EVERYWHERE)],
               "3": [], "4": [("dog", *EVERYWHERE)]}
    folder = write_boxes(tmp_path / "voc", objects, train="12", val="3", test="4")
    store = load(folder)
    assert store.classes == load(folder, "test").classes == ["ant", "cat", "dog"]
    assert store.labels[:, :, 4].tolist() == [[2, -1], [1, 0]]


@pytest.mark.parametrize("text", [
    "dog\nbird\ncat\n", "dog\nbird\ncat", "dog\r\nbird\r\ncat\r\n\n",
    "\ufeffdog\nbird\ncat\n"])  # a byte-order mark, as editors on Windows write it
def test_class_names_fix_the_classes_and_their_order(tmp_path, capsys, text):
    objects = {"1": [("dog", *EVERYWHERE)], "2": [("cat", *EVERYWHERE), ("dog", *EVERYWHERE)],
               "3": []}
    folder = write_boxes(tmp_path / "voc", objects, train="12", val="3", test="1")
    (folder / "class_names.txt").write_bytes(text.encode())
    store = load(folder)
    assert store.classes == ["dog", "bird", "cat"]
    assert store.labels[:, :, 4].tolist() == [[0, -1], [2, 0]]
    assert "no image of 1 of 3 classes: bird" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("class_names", [None, ("cat",)], ids=["found", "class_names.txt"])
def test_an_unknown_class_is_named(tmp_path, capsys, split, class_names):
    objects = {"1": [("cat", *EVERYWHERE)], "2": [("cat", *EVERYWHERE)],
               "3": [("cat", *EVERYWHERE), ("dodo", *EVERYWHERE)]}
    lists = {"train": "1", "val": "2", "test": "2", split: "3"}
    folder = write_boxes(tmp_path / "voc", objects, class_names, **lists)
    line = refusal(capsys, folder, split)
    assert str(folder / "Annotations" / "3.xml") in line and "dodo" in line


# ------------------------------------------------------------ splits

def write_shown(folder, shown, task, **lists):
    """A picture 0, 1, ... for each group of letters, a class each, that it shows."""
    names, class_names = [str(i) for i in range(len(shown))], sorted(set("".join(shown)))
    lists = lists or {"train": names}
    if task == "segment":
        numbers = [[1 + class_names.index(letter) for letter in letters] for letters in shown]
        return write_masks(folder, dict(zip(names, numbers)), ["-", *class_names], **lists)
    objects = [[(letter, *EVERYWHERE) for letter in letters] for letters in shown]
    return write_boxes(folder, dict(zip(names, objects)), **lists)


def letters_of(store):
    """How often each class is shown by the images of a store."""
    counts = {}
    for labels in common.classes_shown(store.labels):
        for label in set(labels.tolist()) - {-1}:
            name = store.classes[label]
            counts[name] = counts.get(name, 0) + 1
    return counts


@pytest.mark.parametrize("shown, size, counts", [
    (["a"] * 10 + ["b"] * 5, 3, {"a": 2, "b": 1}),
    (["a"] * 5 + ["b"] * 2, 2, {"a": 1, "b": 1}),
    (["a"] * 10 + [""] * 5, 3, {"a": 2}),
    (["a"] * 10 + ["b"], 2, {"a": 2}),
    (["ab"] * 10, 2, {"a": 2, "b": 2}),
    (["ab"] * 10 + ["b"] * 10, 4, {"a": 2, "b": 4}),
    (["aaa"] * 5 + ["bb"] * 5, 2, {"a": 1, "b": 1}),
    (["a"] * 10 + ["bb"], 2, {"a": 2}),
    (["a", "b", ""], 0, {})])
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_without_its_own_val_is_a_fifth_of_train(tmp_path, task, shown, size, counts):
    folder = write_shown(tmp_path / "voc", shown, task)
    train, val, both = (load(folder, split, task) for split in ("train", "val", "trainval"))
    assert pictures(both) == stored(folder, range(len(shown)))
    assert not set(pictures(train)) & set(pictures(val))
    assert set(pictures(train)) | set(pictures(val)) == set(pictures(both))
    assert letters_of(train).keys() == letters_of(both).keys()  # none is lost
    assert len(val) == size and letters_of(val) == counts


def test_the_fifth_is_the_same_each_time(tmp_path):
    folder = write_shown(tmp_path / "voc", ["a", "ab", "b", "c"] * 5, "detect")
    one = pictures(load(folder, "val"))
    torch.manual_seed(5)
    assert pictures(load(folder, "val")) == one


@pytest.mark.parametrize("lists, expected", [
    (dict(train="012", val="34", test="5"),
     dict(train="012", val="34", trainval="01234", unlabeled="01234", test="5")),
    (dict(train="210", val="43", test="5", trainval="012345", a_train="5", train_val="5"),
     dict(train="210", val="43", trainval="21043", unlabeled="21043", test="5")),
    (dict(train="0123", test="45"),
     dict(trainval="0123", unlabeled="0123", test="45")),
    (dict(train="0123", val="45"),
     dict(trainval="0123", unlabeled="0123", test="45"))],
    ids=["all", "further lists", "no val", "no test"])
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_split_is_what_its_list_names(tmp_path, task, lists, expected):
    folder = write_shown(tmp_path / "voc", ["a", "b"] * 3, task, **lists)
    for split, names in expected.items():
        assert pictures(load(folder, split, task)) == stored(folder, names)


@pytest.mark.parametrize("content", ["2\n1", "2\r\n1\r\n", "\n2\n1\n\n", " 2 \n1\n", "2\n\n1\n"],
                         ids=repr)
def test_blank_lines_and_spaces_in_a_list_do_not_matter(tmp_path, content):
    folder = write_boxes(tmp_path / "voc", {"1": [], "2": []}, class_names=("cat",))
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "test.txt").write_bytes(content.encode())
    assert pictures(load(folder, "test")) == stored(folder, "21")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_where_val_is_the_test_a_part_of_train_is_val(tmp_path, capsys, task):
    names = [str(i) for i in range(15)]
    folder = write_shown(tmp_path / "voc", ["a", "b", "b"] * 5, task, train=names[:10],
                         val=names[10:])
    train, val, test = (set(pictures(load(folder, split, task)))
                        for split in ("train", "val", "test"))
    assert train | val == set(stored(folder, names[:10])) and not train & val
    assert test == set(stored(folder, names[10:]))
    assert len(val) == 2 and letters_of(load(folder, "val", task)) == {"a": 1, "b": 1}
    assert capsys.readouterr().out.count("val.txt is its test, a fifth of train its val") == 1


# ------------------------------------------------------------ --data voc

@pytest.fixture
def devkit(tmp_path):
    """root/VOCdevkit with a few pictures of each year."""
    top = tmp_path / "root" / "VOCdevkit"
    cat, dog = ("cat", *EVERYWHERE), ("dog", *EVERYWHERE)
    objects = {"1": [cat], "2": [dog], "3": [dog, cat], "4": [("person", *EVERYWHERE, 1)]}
    write_boxes(top / "VOC2007", objects, train="1", val="2", trainval="12", test="34")
    write_boxes(top / "VOC2012", objects, train="4", val="31", trainval="134")
    numbers = {"1": [8], "2": [12], "3": [15], "4": [20]}
    write_masks(top / "VOC2007", numbers, None, train="1", val="2", trainval="12", test="34")
    write_masks(top / "VOC2012", numbers, None, train="41", val="3", trainval="134")
    return top


def load_voc(devkit, split, task="detect"):
    return common.load_data(options("voc", devkit.parent, task=task), split)


@pytest.mark.parametrize("split, of_2007, of_2012", [
    ("train", "1", "4"),
    ("val", "2", "31"),
    ("trainval", None, None),
    ("test", "34", "")])
def test_boxes_of_voc_are_those_of_both_years(devkit, split, of_2007, of_2012):
    store = load_voc(devkit, split)
    assert store.classes == common.VOC_CLASSES
    if split == "trainval":
        parts = [load_voc(devkit, part) for part in ("train", "val")]
        assert pictures(store) == pictures(parts[0]) + pictures(parts[1])
        assert torch.equal(store.labels, torch.cat([part.labels for part in parts]))
    else:
        assert pictures(store) == (stored(devkit / "VOC2007", of_2007)
                                   + stored(devkit / "VOC2012", of_2012))


def test_boxes_of_voc_have_its_classes(devkit):
    labels = load_voc(devkit, "test").labels[:, :, 4:].tolist()
    cat, dog, person = (common.VOC_CLASSES.index(name) for name in ("cat", "dog", "person"))
    assert labels == [[[dog, 0], [cat, 0]], [[person, 1], [-1, -1]]]


@pytest.mark.parametrize("list_name, further_masks, names", [
    ("train_aug", True, "412"),
    ("trainaug", True, "412"),
    ("train_aug", False, "41"),
    ("trainaug", False, "41"),
    (None, True, "41"),
    (None, False, "41")])
def test_masks_of_voc_are_those_of_2012_and_the_further_ones(devkit, list_name, further_masks,
                                                             names):
    folder = devkit / "VOC2012"
    if list_name:
        write_lists(folder, "Segmentation", {list_name: "412"})
    if further_masks:
        write_masks(folder, dict.fromkeys("1234", [7]), None, place="ClassAug")
    trainval, test = (load_voc(devkit, split, "segment") for split in ("trainval", "test"))
    assert trainval.classes == test.classes == ["background", *common.VOC_CLASSES]
    assert pictures(trainval) == stored(folder, names)
    assert pictures(test) == stored(folder, "3")
    numbers = trainval.labels[:, 0, -1].tolist()
    if list_name and further_masks:
        assert numbers == [7, 7, 7]
    elif not further_masks:
        assert numbers == [20, 8]


def test_masks_of_the_test_are_voc_s_own(devkit):
    """The further ones are to train on."""
    folder = devkit / "VOC2012"
    write_lists(folder, "Segmentation", {"train_aug": "412"})
    write_masks(folder, dict.fromkeys("1234", [7]), None, place="ClassAug")
    assert load_voc(devkit, "test", "segment").labels[:, 0, -1].tolist() == [15]


def test_two_lists_of_the_further_masks_name_each_picture_once(devkit):
    folder = devkit / "VOC2012"
    write_lists(folder, "Segmentation", {"train_aug": "412", "trainaug": "412"})
    write_masks(folder, dict.fromkeys("1234", [7]), None, place="ClassAug")
    assert pictures(load_voc(devkit, "trainval", "segment")) == stored(folder, "412")


def test_masks_of_both_folders_make_train(devkit):
    """As in the lists that name SBD's masks beside VOC's own."""
    folder = devkit / "VOC2012"
    write_lists(folder, "Segmentation", {"trainaug": "142"})
    write_masks(folder, {"2": [7]}, None, place="ClassAug")
    assert load_voc(devkit, "trainval", "segment").labels[:, 0, -1].tolist() == [8, 20, 7]


@pytest.mark.parametrize("task, kind", [("detect", "Main"), ("segment", "Segmentation")])
def test_the_archive_of_2012_s_test_has_no_targets_and_is_no_test(devkit, task, kind):
    before = pictures(load_voc(devkit, "test", task))
    write_lists(devkit / "VOC2012", kind, {"test": ["2012_000001"]})
    noise((40, 30), 7).save(devkit / "VOC2012" / "JPEGImages" / "2012_000001.jpg")
    assert pictures(load_voc(devkit, "test", task)) == before


@pytest.mark.parametrize("year, split", [("2007", "trainval"), ("2007", "test"),
                                         ("2012", "trainval")])
def test_what_is_absent_of_voc_is_downloaded(devkit, monkeypatch, year, split):
    asked, names = [], devkit / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt"

    def download(root, year, split, download):
        asked.append((root, year, split, download))
        names.write_text(text)

    monkeypatch.setattr(common.sets, "VOCDetection", download)
    before = pictures(load_voc(devkit, "test"))
    assert asked == []
    text = names.read_text()
    names.unlink()
    assert pictures(load_voc(devkit, "test")) == before
    assert asked == [(str(devkit.parent), year, split, True)]


def test_masks_ask_for_no_other_year_than_theirs(devkit):
    before = pictures(load_voc(devkit, "test", "segment"))
    shutil.rmtree(devkit / "VOC2007")
    assert pictures(load_voc(devkit, "test", "segment")) == before


def test_a_root_that_is_called_like_a_year_changes_no_list(devkit, tmp_path):
    write_lists(devkit / "VOC2012", "Main", {"test": ["2012_000001"]})  # without its targets
    before = pictures(load_voc(devkit, "test"))
    shutil.copytree(devkit, tmp_path / "VOC2007" / "VOCdevkit")
    moved = pictures(load_voc(tmp_path / "VOC2007" / "VOCdevkit", "test"))
    assert moved == before


TO_SCORE = ["--image-size", "32", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]


@pytest.mark.parametrize("split, images", [("val", "56"), ("test", "78")])
def test_a_split_whose_objects_are_all_difficult_is_one_line(
        split, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cat = "cat", *EVERYWHERE
    boxes = dict.fromkeys("12345678", [cat, ("dog", *EVERYWHERE)])
    boxes.update(dict.fromkeys(images, [(*cat, 1)]))  # difficult
    folder = write_boxes(tmp_path / "voc", boxes, train="1234", val="56", test="78")
    line = error_line(capsys, SCRIPTS["finetune"].main, [
        "--data", str(folder), "--task", "detect", "--search", "1", *TO_SCORE])
    assert f"{split} of" in line and "nothing that counts" in line and "learning rate" not in line
    assert not list(tmp_path.glob("finetune.*"))  # it is said before the training


@pytest.mark.parametrize("task, script", [("segment", "finetune"), ("segment", "core_tuning")])
def test_a_test_whose_pixels_are_all_void_is_one_line(task, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    masks = dict.fromkeys("123456", [1, 2])
    masks.update(dict.fromkeys("78", [255]))
    folder = write_masks(tmp_path / "voc", masks, train="1234", val="56", test="78")
    for path in ("7", "8"):  # all of it, not the right half alone
        file = folder / "SegmentationClass" / f"{path}.png"
        palette_mask(np.full_like(np.array(Image.open(file)), 255)).save(file)
    line = error_line(capsys, SCRIPTS[script].main, [
        "--data", str(folder), "--task", task, *TO_SCORE])
    assert "test of" in line and "nothing that counts" in line
    assert not list(tmp_path.glob(f"{script}.*"))


def test_bissl_without_a_pretext_s_images_asks_for_them(tmp_path, capsys):
    boxes = dict.fromkeys("12345678", [("cat", *EVERYWHERE), ("dog", *EVERYWHERE)])
    folder = write_boxes(tmp_path / "voc", boxes, train="1234", val="56", test="78")
    flags = ["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    line = error_line(capsys, SCRIPTS["bissl"].main,
                      ["--data", str(folder), "--task", "detect", "--batch-size", "4", *flags])
    assert "no pretext images" in line and "--pretext-data" in line


def test_voc_that_cannot_be_downloaded_is_one_line(tmp_path, capsys):
    for task in ("detect", "segment"):
        args = options("voc", tmp_path, task=task)
        assert "voc" in error_line(capsys, common.load_data, args, "train")


@pytest.mark.parametrize("script", SCRIPTS)
def test_voc_has_no_classes_of_images(tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, SCRIPTS[script].main, ["--data", "voc", "--device", "cpu"])
    assert "--data voc" in line and "voc07" in line
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("script", ["finetune", "bissl"])
@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize("data", ["flowers", "voc07"])
def test_classes_of_images_are_no_boxes_and_no_masks(tmp_path, monkeypatch, capsys, script, task,
                                                     data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "open_dataset", lambda *args: 1 / 0)  # nothing is downloaded
    line = error_line(capsys, SCRIPTS[script].main,
                      ["--task", task, "--data", data, "--device", "cpu"])
    assert f"--data {data}" in line and f"--task {task}" in line
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("data", ["nowhere", "empty"])
def test_a_folder_in_another_layout_is_one_line(tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    line = error_line(capsys, SCRIPTS["finetune"].main,
                      ["--task", "detect", "--data", data, "--device", "cpu"])
    assert data in line


# ------------------------------------------------------------ the cache

def caches(folder):
    return sorted(path.name for path in (folder.parent / "root" / "cache").glob("*.npy"))


@pytest.fixture
def both_tasks(tmp_path):
    """A folder with boxes and masks of the same pictures; its classes are in class_names.txt."""
    folder = write_shown(tmp_path / "voc", ["a", "b"] * 3, "segment", train="012", val="3",
                         test="45")
    return write_shown(folder, ["a", "b"] * 3, "detect", train="012", val="3", test="45")


def test_a_second_call_reads_the_same(both_tasks, monkeypatch):
    found = {}
    for task in ("detect", "segment"):
        for split in ("train", "val", "test"):
            found[task, split] = load(both_tasks, split, task)
    assert len(caches(both_tasks)) == 4  # train and val are one file
    common.shared_images.cache_clear()  # as in another run
    monkeypatch.setattr(common, "build_cache", lambda *args: 1 / 0)
    for (task, split), before in found.items():
        after = load(both_tasks, split, task)
        assert torch.equal(after.images, before.images) and torch.equal(after.rows, before.rows)
        assert torch.equal(after.labels, before.labels) and after.classes == before.classes


def test_each_task_has_a_cache_of_its_own(both_tasks):
    load(both_tasks, "test", "detect")
    one = caches(both_tasks)
    load(both_tasks, "test", "segment")
    two = caches(both_tasks)
    assert len(one) == 1 and len(two) == 2 and set(one) < set(two)
    assert one[0].startswith("detect-") and (set(two) - set(one)).pop().startswith("segment-")


@pytest.mark.parametrize("task, file", [
    ("detect", "Annotations/4.xml"),
    ("detect", "JPEGImages/4.png"),
    ("segment", "SegmentationClass/4.png"),
    ("segment", "JPEGImages/4.png")])
def test_a_file_with_another_time_leads_to_another_cache(both_tasks, task, file):
    load(both_tasks, "test", task)
    os.utime(both_tasks / file, ns=(0, 0))
    load(both_tasks, "test", task)
    assert len(caches(both_tasks)) == 2


def test_changed_boxes_are_read(both_tasks):
    before = load(both_tasks, "test").labels
    write(both_tasks / "Annotations" / "4.xml", annotation([("b", 1, 1, 20, 30)] * 2))
    after = load(both_tasks, "test").labels
    assert before.shape == (2, 1, 6) and after.shape == (2, 2, 6)
    assert after[0, :, 4].tolist() == [2, 2]


def test_a_changed_list_is_read(both_tasks):
    for split in ("train", "val"):
        load(both_tasks, split)
    write_lists(both_tasks, "Main", {"train": "01", "val": "23"})
    assert pictures(load(both_tasks, "train")) == stored(both_tasks, "01")
    assert pictures(load(both_tasks, "val")) == stored(both_tasks, "23")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_changed_class_names_are_read(both_tasks, task):
    assert load(both_tasks, "test", task).classes == ["-", "a", "b"]
    write(both_tasks / "class_names.txt", "-\nb\na\n")
    store = load(both_tasks, "test", task)
    assert store.classes == ["-", "b", "a"]
    if task == "detect":
        assert store.labels[:, 0, 4].tolist() == [2, 1]


def test_a_new_class_in_train_is_one_of_the_test_too(both_tasks):
    (both_tasks / "class_names.txt").unlink()
    assert load(both_tasks, "train").classes == load(both_tasks, "test").classes == ["a", "b"]
    write(both_tasks / "Annotations" / "0.xml", annotation([("_", *EVERYWHERE)]))
    assert load(both_tasks, "train").classes == ["_", "a", "b"]
    store = load(both_tasks, "test")
    assert store.classes == ["_", "a", "b"] and store.labels[:, 0, 4].tolist() == [1, 2]


def test_another_path_to_the_folder_leads_to_the_same_cache(both_tasks, monkeypatch):
    monkeypatch.chdir(both_tasks.parent)
    for path in ("./voc", "voc/", f"../{both_tasks.parent.name}/voc", both_tasks):
        common.load_data(options(path, "root", task="detect"), "test")
    assert len(caches(both_tasks)) == 1


def test_voc_s_cache_serves_every_current_folder(devkit, tmp_path, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        load_voc(devkit, "test")
    assert len(list((devkit.parent / "cache").glob("*.npy"))) == 1


# ------------------------------------------------------------ subsets of every kind of labels

KINDS = ("one class", "matrix", "boxes", "masks")


def as_labels(kind, shown):
    """Labels of a kind for images that show these lists of classes, from 1 on; whatever else a
    kind can hold is between them."""
    if kind == "one class":
        return torch.tensor([classes[0] for classes in shown])
    rng = np.random.default_rng(0)
    if kind == "matrix":
        labels = -torch.from_numpy(rng.integers(0, 2, (len(shown), 6)))  # absent or ignored
        for row, classes in zip(labels, shown):
            row[classes] = 1
        return labels
    if kind == "boxes":
        labels = torch.full((len(shown), 9, 6), -1.0)
        for rows, classes in zip(labels, shown):
            for row, label in zip(rows, classes):
                row[:4] = torch.tensor([0.1, 0.2, 0.8, 0.9])
                row[4:] = torch.tensor([label, rng.integers(0, 2)])
        return labels
    labels = torch.from_numpy(rng.choice([0, 255], (len(shown), 5, 5)).astype(np.uint8))
    for mask, classes in zip(labels, shown):
        places = rng.permutation(25)[:len(classes)]
        mask.view(-1)[places] = torch.tensor(classes, dtype=torch.uint8)
    return labels


def slow_classes(labels, i):
    """The classes that image i shows."""
    if labels.ndim == 1:
        return {int(labels[i])}
    shown = set()
    if labels.dtype == torch.int64:
        for label in range(labels.shape[1]):
            if labels[i, label] == 1:
                shown.add(label)
    elif labels.dtype == torch.float32:
        for box in labels[i].tolist():
            if box != [-1] * 6:
                shown.add(int(box[4]))
    else:
        for number in labels[i].flatten().tolist():
            if number not in (0, 255):
                shown.add(number)
    return shown


@pytest.mark.parametrize("kind", KINDS)
def test_classes_shown_are_those_of_a_slow_loop(kind):
    rng = np.random.default_rng(1)
    fewest = 1 if kind == "one class" else 0
    lists = [rng.integers(1, 6, rng.integers(fewest, 9)).tolist() for _ in range(50)]
    labels = as_labels(kind, lists)
    shown = common.classes_shown(labels)
    assert shown.dtype == torch.int64 and shown.ndim == 2 and len(shown) == 50
    for i in range(50):
        expected = set(lists[i][:1]) if kind == "one class" else set(lists[i])
        assert slow_classes(labels, i) == expected
        assert set(shown[i].tolist()) - {-1} == expected


A, B, AB, NONE = [1], [2], [1, 2], []
SUBSETS = [  # images, what is asked for, images of class 1 and 2 and of all
    ([A] * 10 + [B] * 10, dict(per_class=3), (3, 3, 6)),
    ([A] * 3 + [B] * 10, dict(per_class=5), (3, 5, 8)),
    ([A] * 10 + [B] * 10, dict(per_class=10), (10, 10, 20)),
    ([A] * 20 + [B] * 10, dict(fraction=0.5), (10, 5, 15)),
    ([A] * 20 + [B] * 3, dict(fraction=0.01), (1, 1, 2)),
    ([A] * 20 + [B] * 3, dict(fraction=1), (20, 3, 23)),
    ([AB] * 10, dict(per_class=3), (3, 3, 3)),
    ([AB] * 10 + [B] * 5, dict(per_class=5), (5, 5, 5)),
    ([AB] * 2 + [A] * 2 + [B] * 9, dict(per_class=4), (4, 4, 6)),
    ([[1, 1, 1]] * 10 + [[2, 2]] * 5, dict(per_class=4), (4, 4, 8)),
    ([[2, 1, 2, 1]] * 10, dict(fraction=0.5), (5, 5, 5)),
    ([NONE] * 9 + [A] * 10 + [B] * 10 + [NONE], dict(per_class=2), (2, 2, 4)),
    ([NONE] * 9 + [AB] * 10, dict(fraction=0.2), (2, 2, 4)),
]
ROWS = []
for row in SUBSETS:
    one_class = {len(classes) for classes in row[0]} == {1}
    for kind in KINDS if one_class else KINDS[1:]:
        ROWS.append((kind, *row))


@pytest.mark.parametrize("kind, shown, size, expected", ROWS)
def test_a_subset_has_the_images_asked_for_of_each_class(kind, shown, size, expected):
    order = np.random.default_rng(0).permutation(len(shown))
    shown = [shown[i] for i in order]
    for seed in range(5):
        keep = common.labelled_subset(as_labels(kind, shown), seed, **size).tolist()
        of_1 = [i for i in keep if 1 in shown[i]]
        of_2 = [i for i in keep if 2 in shown[i]]
        assert len(set(keep)) == len(keep)
        assert NONE not in [shown[i] for i in keep] or "fraction" in size
        assert (len(of_1), len(of_2), len(keep)) == expected


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("per_class", [1, 4, 9])
def test_each_of_many_classes_has_its_images_and_none_is_drawn_without_need(kind, per_class):
    rng = np.random.default_rng(2)
    shown = [rng.integers(1, 6, rng.integers(0, 3)).tolist() for _ in range(60)]
    keep = common.labelled_subset(as_labels(kind, shown), 0, per_class=per_class).tolist()
    for label in range(1, 6):
        there = [i for i in range(60) if label in shown[i]]
        assert len(set(there) & set(keep)) >= min(per_class, len(there))
    assert len(keep) <= 5 * per_class


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_of_any_kind_is_drawn_by_its_seed(kind):
    labels = as_labels(kind, [A, B] * 15)
    draw = lambda seed: common.labelled_subset(labels, seed, per_class=4).tolist()
    one = draw(0)
    torch.manual_seed(5)
    assert draw(0) == one and sorted(draw(1)) != sorted(one)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_the_same_labels_gives_the_same_subset(kind):
    shown = [A, B, A, B, B] * 6
    expected = common.labelled_subset(as_labels("one class", shown), 0, per_class=4)
    assert torch.equal(common.labelled_subset(as_labels(kind, shown), 0, per_class=4), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_more_images_than_any_class_has_is_bad_input(kind, capsys):
    labels = as_labels(kind, [A] * 7 + [B] * 3)
    assert "7 images" in error_line(capsys, common.labelled_subset, labels, 0, per_class=8)
    assert len(common.labelled_subset(labels, 0, per_class=7)) == 10


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_labels_per_class_counts_the_images_that_show_it(tmp_path, task):
    folder = write_shown(tmp_path / "voc", ["a"] * 10 + ["b"] * 5 + [""] * 3, task)
    args = flags(folder, task)
    args.labels_per_class, args.fraction = 3, None
    assert letters_of(common.load_labelled(args, seed=0)) == {"a": 3, "b": 3}
