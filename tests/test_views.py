"""The views: the operations give what torchvision gives image by image, drawn as asked."""
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

import common

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
WHOLE = dict(crop=(1, 1))  # the only box with the area of the image is the image


def noise(count, side):
    """Random pictures whose right half mirrors the left one: a flip does not change them."""
    half = torch.randint(0, 256, (count, 3, side, side // 2), dtype=torch.uint8)
    return torch.cat([half, half.flip(-1)], -1)


# ------------------------------------------------------------ crop, resize, flip

BOXES = [  # top, left, height, width in a picture of side 40
    (0, 0, 40, 40), (0, 0, 39, 40), (3, 5, 30, 21), (10, 2, 25, 33),  # whole, large
    (4, 6, 8, 8), (31, 30, 9, 10), (20, 1, 3, 5),                     # small crops
    (0, 7, 1, 30), (39, 0, 1, 40), (7, 39, 30, 1), (39, 39, 1, 1),    # one pixel wide, at the edges
]


@pytest.mark.parametrize("size", [8, 17, 32, 40, 64])
@pytest.mark.parametrize("mirrored", [False, True])
def test_resample_equals_resized_crop_and_flip(size, mirrored):
    x = torch.rand(len(BOXES), 3, 40, 40)
    ours = common.resample(x, torch.tensor(BOXES), torch.full((len(BOXES),), mirrored), size)
    for image, box, view in zip(x, BOXES, ours):
        expected = tv.resized_crop(image, *box, [size, size], antialias=True)
        if mirrored:
            expected = tv.horizontal_flip(expected)
        assert torch.allclose(view, expected, atol=1e-5), box


@pytest.mark.parametrize("size", [8, 17, 32, 40, 64])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_cpu_gives_torchvisions_resized_crop_of_uint8(size, mirrored):
    x = torch.randint(0, 256, (len(BOXES), 3, 80, 80), dtype=torch.uint8)
    boxes = torch.tensor(BOXES) + torch.tensor([40, 40, 0, 0])  # at the far edges of larger images
    flip = torch.full((len(BOXES),), mirrored)
    ours = common.crop_resize_flip(x, boxes, flip, size)
    assert ours.shape == (len(BOXES), 3, size, size) and ours.dtype == torch.float32
    for image, box, view in zip(x, boxes.tolist(), ours):
        expected = tv.resized_crop(image, *box, [size, size], antialias=True)
        if mirrored:
            expected = tv.horizontal_flip(expected)
        assert torch.allclose(view, expected / 255, atol=1e-6), box


@pytest.mark.parametrize("side, size", [(40, 32), (128, 96), (80, 64), (80, 128)])
def test_a_cpu_and_a_gpu_crop_alike(side, size):
    x = torch.randint(0, 256, (200, 3, side, side), dtype=torch.uint8)
    box, flip = common.crop_boxes(200, side, (0.08, 1)), torch.rand(200) < 0.5
    one_by_one = common.crop_resize_flip(x, box, flip, size)
    together = common.resample(x / 255, box, flip, size)
    assert (one_by_one - together).abs().max() <= 1.5 / 255


@pytest.mark.parametrize("name", ["crop_resize_flip", "resample"])
def test_each_image_is_flipped_on_its_own(name):
    x = torch.randint(0, 256, (4, 3, 72, 72), dtype=torch.uint8)
    flip = torch.tensor([True, False, False, True])
    source = x / 255 if name == "resample" else x
    ours = getattr(common, name)(source, torch.tensor([[0, 0, 72, 72]] * 4), flip, 72)
    for image, flipped, view in zip(x / 255, flip, ours):
        assert torch.allclose(view, image.flip(-1) if flipped else image, atol=1e-6)


# ------------------------------------------------------------ colours and blur

OPERATIONS = {  # ours on a batch, torchvision's on an image, one parameter for each image
    "brightness": (common.brightness, tv.adjust_brightness, [0, 0.3, 1, 1.8]),
    "contrast": (common.contrast, tv.adjust_contrast, [0, 0.3, 1, 1.8]),
    "saturation": (common.saturation, tv.adjust_saturation, [0, 0.3, 1, 1.8]),
    "hue": (common.hue, tv.adjust_hue, [-0.5, -0.1, 0, 0.2, 0.5]),
    "blur, 3 taps": (lambda x, sigma: common.blur(x, sigma, 3),
                     lambda image, sigma: tv.gaussian_blur(image, [3, 3], [sigma, sigma]),
                     [0.1, 0.7, 2]),
    "blur, 9 taps": (lambda x, sigma: common.blur(x, sigma, 9),
                     lambda image, sigma: tv.gaussian_blur(image, [9, 9], [sigma, sigma]),
                     [0.1, 0.7, 2]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvision_with_a_parameter_for_each_image(name):
    ours, theirs, parameters = OPERATIONS[name]
    x = torch.rand(len(parameters), 3, 20, 20)
    expected = torch.stack([theirs(image, parameter) for image, parameter in zip(x, parameters)])
    assert torch.allclose(ours(x.clone(), torch.tensor(parameters)), expected, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_keeps_float64(name):
    ours, _, parameters = OPERATIONS[name]
    x = torch.rand(len(parameters), 3, 20, 20, dtype=torch.float64)
    assert ours(x, torch.tensor(parameters, dtype=torch.float64)).dtype == torch.float64


def test_resample_keeps_float64():
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    views = common.resample(x, torch.tensor([[1, 2, 9, 8]]), torch.tensor([False]), 16)
    assert views.dtype == torch.float64


COLOURS = {
    # colour        turned by -1/2, 1/3 and 1/2
    (1, 0, 0):     ((0, 1, 1), (0, 1, 0), (0, 1, 1)),
    (0, 1, 0):     ((1, 0, 1), (0, 0, 1), (1, 0, 1)),
    (0, 0, 1):     ((1, 1, 0), (1, 0, 0), (1, 1, 0)),
    (1, 1, 0):     ((0, 0, 1), (0, 1, 1), (0, 0, 1)),
    (.8, .2, .2):  ((.2, .8, .8), (.2, .8, .2), (.2, .8, .8)),
    (0, 0, 0):     ((0, 0, 0),) * 3,
    (.5, .5, .5):  ((.5, .5, .5),) * 3,
    (1, 1, 1):     ((1, 1, 1),) * 3,
}


@pytest.mark.parametrize("colour", COLOURS)
def test_hue_turns_pure_colours_and_leaves_greys(colour):
    x = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(3, 3, 2, 2)
    turned = common.hue(x, torch.tensor([-1 / 2, 1 / 3, 1 / 2]))[:, :, 0, 0]
    assert torch.allclose(turned, torch.tensor(COLOURS[colour], dtype=torch.float32), atol=1e-5)


WHOLE_OPERATIONS = {  # the switch of augment(), and what torchvision makes of a picture in 0..1
    "nothing": (dict(), lambda x: x),
    "grey": (dict(grey_p=1), lambda x: tv.rgb_to_grayscale(x, num_output_channels=3)),
    "solarise": (dict(solarise_p=1), lambda x: tv.solarize(x, 0.5)),
    "grey, then solarise": (dict(grey_p=1, solarise_p=1),
                            lambda x: tv.solarize(tv.rgb_to_grayscale(x, 3), 0.5)),
}


@pytest.mark.parametrize("name", WHOLE_OPERATIONS)
def test_augment_switches_on_what_torchvision_does(name):
    switch, theirs = WHOLE_OPERATIONS[name]
    x = noise(5, 16)
    expected = tv.normalize(theirs(x / 255), MEAN, STD)
    assert torch.allclose(common.augment(x, 16, **WHOLE, **switch), expected, atol=1e-5)


# ------------------------------------------------------------ the draws

SCALES = [(40, (0.08, 1)), (264, (0.2, 1)), (24, (0.5, 0.6)), (40, (0.001, 0.01)),
          (40, (1e-5, 1e-4)), (9, (1, 1))]  # less than a pixel; all of the image


@pytest.mark.parametrize("side, scale", SCALES)
def test_boxes_are_whole_pixels_inside_the_image(side, scale):
    boxes = common.crop_boxes(1000, side, scale)
    top, left, height, width = boxes.unbind(1)
    assert boxes.shape == (1000, 4)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all() and (left >= 0).all()
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= side).all() and (left + width <= side).all()


def test_boxes_have_the_area_and_the_aspect_asked_for():
    _, _, height, width = common.crop_boxes(1000, 1000, scale=(0.2, 0.5)).unbind(1)
    area, aspect = height * width / 1000 ** 2, width / height
    assert 0.199 < area.min() < 0.21 and 0.49 < area.max() < 0.501
    assert 0.748 < aspect.min() < 0.77 and 1.31 < aspect.max() < 1.336


def test_boxes_are_as_often_wide_as_high():
    _, _, height, width = common.crop_boxes(10_000, 1000, scale=(0.2, 0.5)).unbind(1)
    assert 0.48 < (width > height).float().mean() < 0.52


def test_boxes_are_spread_like_torchvisions():
    side, scale, ratio = 256, (0.08, 1), (3 / 4, 4 / 3)
    picture = torch.zeros(3, side, side)
    draws = [RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(4000)]
    theirs = torch.tensor(draws)
    ours = common.crop_boxes(4000, side, scale)

    def quantiles(boxes):
        top, left, height, width = boxes.double().unbind(1)
        measures = [height * width / side ** 2, width / height, top / side, left / side]
        at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double()
        return torch.stack(measures).quantile(at, dim=1)

    assert torch.allclose(quantiles(ours), quantiles(theirs), atol=0.04)


ALL = dict(jitter=(0.4, 0.4, 0.4, 0.1), grey_p=0.2, blur_p=0.5, solarise_p=0.2)


@pytest.mark.parametrize("count", [1, 5, 64, 65, 130])  # above 64, a CPU works part by part
def test_augment_gives_normalised_float32_in_channels_last(count):
    views = common.augment(noise(count, 24), 16, **ALL)
    assert views.shape == (count, 3, 16, 16)
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    pixels = views * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5


def test_augment_leaves_its_input_as_it_was():
    x = noise(5, 24)
    before = x.clone()
    common.augment(x, 16, **ALL)
    assert torch.equal(x, before)


def seeded_views(seed):
    torch.manual_seed(0)
    x = noise(70, 24)
    torch.manual_seed(seed)
    return common.augment(x, 16, **ALL)


def test_the_same_seed_gives_the_same_views():
    assert torch.equal(seeded_views(1), seeded_views(1))


def test_another_seed_gives_other_views():
    different = (seeded_views(1) != seeded_views(2)).flatten(1).any(1)
    assert different.all()


DRAWN = [dict(crop=(0.1, 1)), dict(jitter=(0.4, 0, 0, 0)), dict(jitter=(0, 0.4, 0, 0)),
         dict(jitter=(0, 0, 0.4, 0)), dict(jitter=(0, 0, 0, 0.2)), dict(blur_p=1)]


@pytest.mark.parametrize("switch", DRAWN, ids=str)
def test_every_image_of_a_batch_is_drawn_anew(switch):
    same = noise(1, 48).expand(8, -1, -1, -1)
    views = common.augment(same, 32, **{**WHOLE, **switch}, jitter_p=1)
    for i in range(8):
        for j in range(i):
            assert not torch.allclose(views[i], views[j], atol=1e-4), (i, j)


def test_no_part_of_a_large_batch_repeats_another():
    views = common.augment(noise(1, 24).expand(192, -1, -1, -1), 16, crop=(0.1, 1))
    first, second, third = views.split(64)
    for one, other in ((first, second), (first, third), (second, third)):
        assert (one != other).flatten(1).any(1).all()


def test_views_of_a_large_batch_keep_the_order_of_the_images():
    x = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    x = x.expand(-1, 3, 8, 8)  # image i is all i
    views = common.augment(x, 8)
    assert torch.allclose(views, tv.normalize(x / 255, MEAN, STD), atol=1e-5)


SWITCHES = [dict(grey_p=0.3), dict(blur_p=0.3), dict(solarise_p=0.3),
            dict(jitter=(0.4, 0, 0, 0), jitter_p=0.3)]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_probability_is_the_share_of_images_changed(switch):
    x = noise(2000, 8)
    plain, changed = common.augment(x, 8, **WHOLE), common.augment(x, 8, **WHOLE, **switch)
    share = (plain != changed).flatten(1).any(1).float().mean()
    assert 0.26 < share < 0.34


def test_half_of_the_images_are_flipped():
    x = torch.zeros(2000, 3, 8, 8, dtype=torch.uint8)
    x[..., 4:] = 255  # bright on the right
    views = common.augment(x, 8, **WHOLE)
    share = (views[:, 0, 0, 0] > views[:, 0, 0, -1]).float().mean()
    assert 0.46 < share < 0.54


def test_brightness_is_drawn_around_one():
    x = torch.full((2000, 3, 4, 4), 100, dtype=torch.uint8)
    views = common.augment(x, 4, jitter=(0.4, 0, 0, 0), jitter_p=1)
    factor = (views[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255 / 100
    assert 0.599 < factor.min() < 0.62 and 1.38 < factor.max() < 1.401
    assert 0.98 < factor.mean() < 1.02


def test_hue_is_drawn_around_zero():
    x = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(2000, 3, 4, 4)
    views = common.augment(x, 4, jitter=(0, 0, 0, 0.1), jitter_p=1)[:, :, 0, 0]
    views = views * torch.tensor(STD) + torch.tensor(MEAN)
    # Red turns towards green or towards blue, six sixths a turn.
    shift = (views[:, 1] - views[:, 2]) * 255 / 200 / 6
    assert -0.101 < shift.min() < -0.095 and 0.095 < shift.max() < 0.101


@pytest.mark.parametrize("size, reach", [(16, 1), (32, 1), (64, 3), (96, 4)])
def test_a_blur_reaches_a_twentieth_of_the_side(size, reach):
    x = torch.zeros(50, 3, size, size, dtype=torch.uint8)
    x[..., size // 2 - 1:size // 2 + 1] = 255  # two white columns in the middle of black
    views = common.augment(x, size, **WHOLE, blur_p=1)[:, 0]
    lit = (views > views.min()).flatten(0, 1).any(0)  # (size,)
    assert lit.sum() == reach + 2 + reach


# ------------------------------------------------------------ the evaluation's view

SIDES = [(40, 32), (80, 64), (264, 224), (24, 16), (56, 48), (48, 64)]


@pytest.mark.parametrize("side, size", SIDES)
def test_the_test_crop_is_a_centre_crop_resized(side, size):
    x = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    centre = tv.center_crop(x, round(0.875 * side))
    rounded = tv.resize(centre, [size, size], antialias=True) / 255
    exact = tv.resize(centre / 255, [size, size], antialias=True)
    assert (rounded - exact).abs().max() <= 1.01 / 255
    view = common.test_crop(x, size)
    expected = rounded if side > 64 else exact  # a CPU rounds larger images to uint8
    assert torch.allclose(view, tv.normalize(expected, MEAN, STD), atol=1e-4)
    assert view.is_contiguous(memory_format=torch.channels_last)
