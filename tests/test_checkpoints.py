"""The checkpoints: written whole or not at all, and read from any script and any library, or
refused in one line."""
import io
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import common
from conftest import backbone_flags, error_line


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key in expected:
        assert torch.equal(state[key], expected[key]), key


def write(path, **changes):
    """A small checkpoint of ours at path; returns what was written."""
    contents = dict(method="simclr", arch="resnet10", image_size=32,
                    backbone=common.build_backbone("resnet10", True), head=nn.Linear(256, 4),
                    projector=nn.Linear(256, 8), classes=["a", "b"],
                    config=dict(lr=0.1, data="petals"), resume=dict(history=[]))
    contents.update(changes)
    common.save_checkpoint(path, **contents)
    return contents


# ------------------------------------------------------------------------------------ our own files

def test_what_was_saved_is_loaded(tmp_path):
    saved = write(tmp_path / "a.pt")
    loaded = common.load_checkpoint(tmp_path / "a.pt")
    assert loaded.keys() == saved.keys()
    for name in ("method", "arch", "image_size", "classes", "config", "resume"):
        assert loaded[name] == saved[name]
    for name in ("backbone", "head", "projector"):
        assert_same(loaded[name], saved[name].state_dict())


def test_a_checkpoint_of_before_there_were_projectors_is_read_as_one_without(tmp_path):
    write(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    del content["projector"]
    torch.save(content, tmp_path / "old.pt")
    assert common.load_checkpoint(tmp_path / "old.pt")["projector"] is None


def test_a_checkpoint_starts_the_backbone_that_it_holds(tmp_path):
    saved, args = write(tmp_path / "a.pt"), backbone_flags(tmp_path / "a.pt", image_size=None)
    backbone, _ = common.start_backbone(args)
    assert (args.arch, args.image_size) == ("resnet10", 32)
    assert_same(backbone.state_dict(), saved["backbone"].state_dict())


def test_a_checkpoint_keeps_its_first_layer_at_another_image_size(tmp_path):
    saved, args = write(tmp_path / "a.pt"), backbone_flags(tmp_path / "a.pt", image_size=224)
    backbone, _ = common.start_backbone(args)
    assert args.image_size == 224
    assert torch.equal(backbone.conv1.weight, saved["backbone"].conv1.weight)


def test_a_backbone_without_a_head_can_be_saved(tmp_path):
    write(tmp_path / "a.pt", head=None, resume=None)
    assert common.load_checkpoint(tmp_path / "a.pt")["head"] is None


def test_saving_leaves_no_other_file(tmp_path):
    write(tmp_path / "a.pt")
    write(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("error, ending", [
    pytest.param(OSError(28, "No space left on device"), SystemExit, id="full disk"),
    pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="Ctrl-C")])
def test_an_error_while_saving_leaves_the_old_file_as_it_was(tmp_path, monkeypatch, error, ending):
    def half(contents, file, *args, **kwargs):
        (file if hasattr(file, "write") else open(file, "wb")).write(b"half of it")
        raise error

    write(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(ending):
        write(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part, key", [
    ("backbone", "layer2.0.conv1.weight"), ("backbone", "bn1.running_var"), ("head", "bias")])
def test_weights_that_are_not_finite_are_refused_and_the_old_file_stays(
        tmp_path, capsys, part, key, value):
    good = write(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    bad = {name: tensor.clone() for name, tensor in good[part].state_dict().items()}
    bad[key][0] = value
    line = error_line(capsys, lambda: write(tmp_path / "a.pt", **{part: bad}))
    assert key in line
    assert (tmp_path / "a.pt").read_bytes() == before


def test_torchvisions_resnet18_loads_our_backbone_as_it_is(tmp_path):
    backbone = common.build_backbone("resnet18", small_stem=False).eval()
    write(tmp_path / "a.pt", backbone=backbone, arch="resnet18", image_size=64)
    theirs = torchvision.models.resnet18().eval()
    state = torch.load(tmp_path / "a.pt", weights_only=True)["backbone"]
    problems = theirs.load_state_dict(state, strict=False)
    assert problems.missing_keys == ["fc.weight", "fc.bias"] and problems.unexpected_keys == []
    theirs.fc = nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(backbone(x), theirs(x), atol=1e-5)


# --------------------------------------------------------------------------- other libraries' files

def random_resnet18():
    """A ResNet whose statistics are random too, so that no tensor could be taken for another."""
    model = torchvision.models.resnet18()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    return model


def prefixed(**states):
    """One state dict of several; __ in a name stands for the dot."""
    merged = {}
    for name, state in states.items():
        for key, value in state.items():
            merged[f"{name}.{key}".replace("__", ".")] = value
    return merged


def without_fc(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def sequential(model):
    """Keys 0.weight, 1.weight, ..., 4.0.conv1.weight, ...: the children in a row, without the last
    layer."""
    return nn.Sequential(*list(model.children())[:-1]).state_dict()


HEAD = {"0.weight": torch.rand(4, 4), "0.bias": torch.rand(4)}
STYLES = {  # from the trained ResNet and one of the same kind that follows it as a moving average
    "torchvision": lambda model, other: model.state_dict(),
    "timm": lambda model, other: {"arch": "resnet18", "epoch": 3, "state_dict": model.state_dict()},
    "a classifier of another name": lambda model, other: {
        **without_fc(model.state_dict()), "classifier.weight": HEAD["0.weight"]},
    "MoCo v2": lambda model, other: {
        "epoch": 200, "arch": "resnet18", "optimizer": {"state": {}}, "state_dict": {
            **prefixed(module__encoder_q=model.state_dict(), module__encoder_k=other.state_dict()),
            "module.queue": torch.rand(4, 8),
            "module.queue_ptr": torch.zeros(1, dtype=torch.long)}},
    "MoCo v3": lambda model, other: {"epoch": 300, "state_dict": prefixed(
        module__base_encoder=model.state_dict(), module__momentum_encoder=other.state_dict(),
        module__predictor=HEAD)},
    "solo-learn": lambda model, other: {"epoch": 1, "global_step": 5, "state_dict": prefixed(
        backbone=without_fc(model.state_dict()), projector=HEAD,
        momentum_backbone=without_fc(other.state_dict()), momentum_projector=HEAD)},
    "lightly": lambda model, other: prefixed(
        backbone=sequential(model), projection_head__layers=HEAD),
    "lightly with momentum": lambda model, other: {"state_dict": prefixed(
        backbone=sequential(model), projection_head__layers=HEAD,
        backbone_momentum=sequential(other))},
    "Sequential alone": lambda model, other: sequential(model),
    "VISSL": lambda model, other: {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": {
        "trunk": prefixed(_feature_blocks=without_fc(model.state_dict())), "heads": HEAD}}}},
    "VISSL, flat": lambda model, other: prefixed(
        classy_state_dict__base_model__model__trunk___feature_blocks=without_fc(
            model.state_dict())),
    "BYOL": lambda model, other: prefixed(
        online_network__encoder=model.state_dict(), online_network__projector=HEAD,
        target_network__encoder=other.state_dict(), target_network__projector=HEAD),
    "BYOL in two dicts": lambda model, other: {
        "online_network_state_dict": prefixed(encoder=sequential(model), projetion__net=HEAD),
        "target_network_state_dict": prefixed(encoder=sequential(other), projetion__net=HEAD)},
}


@pytest.fixture(scope="module")
def resnets():
    return random_resnet18(), random_resnet18()


@pytest.mark.parametrize("style", STYLES)
def test_a_foreign_file_gives_exactly_its_backbone(tmp_path, resnets, style):
    torch.save(STYLES[style](*resnets), tmp_path / "foreign.pt")
    backbone, _ = common.start_backbone(backbone_flags(tmp_path / "foreign.pt", "resnet18"))
    assert_same(backbone.state_dict(), without_fc(resnets[0].state_dict()))


def test_a_file_of_before_batchnorm_counted_its_batches_loads(tmp_path, resnets):
    state = {key: value for key, value in resnets[0].state_dict().items()
             if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    backbone, _ = common.start_backbone(backbone_flags(tmp_path / "old.pt", "resnet18"))
    name = "layer4.1.conv2.weight"
    assert torch.equal(backbone.state_dict()[name], state[name])


@pytest.mark.parametrize("arch, with_fc", [
    ("resnet18", False), ("resnet18", True), ("resnet34", True), ("resnet50", True)])
def test_the_arch_of_a_foreign_file_is_found(tmp_path, arch, with_fc):
    state = getattr(torchvision.models, arch)().state_dict()
    torch.save(state if with_fc else without_fc(state), tmp_path / "foreign.pt")
    args = backbone_flags(tmp_path / "foreign.pt")
    common.start_backbone(args)
    assert args.arch == arch


def test_a_foreign_file_needs_an_image_size(tmp_path, capsys, resnets):
    torch.save(resnets[0].state_dict(), tmp_path / "foreign.pt")
    args = backbone_flags(tmp_path / "foreign.pt", image_size=None)
    assert "--image-size" in error_line(capsys, common.start_backbone, args)


# ---------------------------------------------------------------------------- files that do not fit

SPOILED = {  # key, and what becomes of it; None: it is missing
    "missing convolution": ("layer3.0.conv2.weight", None),
    "missing statistics": ("layer2.1.bn1.running_mean", None),
    "missing first convolution of a block": ("layer4.0.conv1.weight", None),
    "missing first layer": ("conv1.weight", None),
    "missing first block": ("layer1.0.conv1.weight", None),
    "misshapen convolution": ("layer3.0.conv2.weight", torch.rand(256, 256, 1, 1)),
    "misshapen first layer": ("conv1.weight", torch.rand(64, 1, 7, 7)),
    "misshapen statistics": ("bn1.running_var", torch.rand(32)),
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("arch", ["resnet18", None], ids=["with --arch", "without"])
def test_a_missing_or_misshapen_key_is_named(tmp_path, capsys, resnets, name, arch):
    key, value = SPOILED[name]
    state = {**resnets[0].state_dict(), key: value}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "foreign.pt")
    line = error_line(capsys, common.start_backbone, backbone_flags(tmp_path / "foreign.pt", arch))
    assert key in line.split()


@pytest.mark.parametrize("arch", ["resnet10", "resnet34", "resnet50"])
def test_another_arch_than_the_files_is_bad_input(tmp_path, capsys, resnets, arch):
    torch.save(resnets[0].state_dict(), tmp_path / "foreign.pt")
    args = backbone_flags(tmp_path / "foreign.pt", arch)
    assert arch in error_line(capsys, common.start_backbone, args)


def test_another_arch_than_our_own_files_is_bad_input(tmp_path, capsys):
    write(tmp_path / "a.pt")
    args = backbone_flags(tmp_path / "a.pt", "resnet18")
    assert "resnet18" in error_line(capsys, common.start_backbone, args)


def saved(content):
    """The bytes of a file that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


OURS = dict(method="simclr", arch="resnet10", image_size=32, head=None, classes=None, config={},
            resume=None)


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [
    pickle.dumps,
    saved,
    lambda evil: saved({**OURS, "backbone": {}, "head": evil}),
], ids=["pickle", "torch.save", "a checkpoint of ours with it inside"])
def test_no_code_in_a_file_is_run(tmp_path, capsys, recwarn, wrap):
    trace = tmp_path / "the code was run"
    (tmp_path / "evil.pt").write_bytes(wrap(RunsCode(trace)))
    error_line(capsys, common.load_checkpoint, tmp_path / "evil.pt")
    assert not trace.exists()
    assert not list(recwarn)  # a warning would be a second line on stderr


BAD_FILES = {
    "empty": lambda: b"",
    "text": lambda: b"this is no checkpoint\n" * 50,
    "random bytes": lambda: bytes(torch.randint(0, 256, (5000,), dtype=torch.uint8).tolist()),
    "cut in the middle": lambda: saved({"conv1.weight": torch.rand(200, 200)})[:80_000],
    "only its last byte missing": lambda: saved({"conv1.weight": torch.rand(200, 200)})[:-1],
    "a number": lambda: saved(3),
    "a tensor": lambda: saved(torch.rand(3)),
    "a list of tensors": lambda: saved([torch.rand(3)]),
    "an empty dict": lambda: saved({}),
    "a whole module": lambda: saved(nn.Linear(2, 2)),
    "no backbone": lambda: saved(nn.Linear(2, 2).state_dict()),
    "another network": lambda: saved(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2)).state_dict()),
    "ours, but its backbone is empty": lambda: saved({**OURS, "backbone": {}}),
    "ours, but its backbone is none": lambda: saved({**OURS, "backbone": None})}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys, recwarn, name):
    path = tmp_path / "bad.pt"
    path.write_bytes(BAD_FILES[name]())
    assert str(path) in error_line(capsys, common.load_checkpoint, path)
    assert not list(recwarn)  # a warning would be a second line on stderr


@pytest.mark.parametrize("name", [
    pytest.param("", id="a folder"),
    pytest.param("no.pt", id="a missing file"),
    pytest.param("no/no.pt", id="a file in a missing folder")])
def test_a_path_without_a_file_is_refused_in_one_line(tmp_path, capsys, name):
    path = tmp_path / name
    assert str(path) in error_line(capsys, common.load_checkpoint, path)
