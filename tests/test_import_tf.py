"""Official TensorFlow checkpoints: the official outputs, what network it was, the command, what is refused."""

import builtins
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr_fast import import_tf, load
from simclr_fast.config import ConfigError
from simclr_fast.models import encoder as new_encoder
from simclr_fast.models import tensorflow
from simclr_fast.models.weights import load_weights
from simclr_fast.pretrained import Encoder
from tests.tensorflow_common import official_variables

NETS = {
    "r18_cifar_v1head": dict(arch="resnet18", image_size=32, head_layers=2, sk_ratio=0.0),
    "r50_imagenet_v2head": dict(arch="resnet50", image_size=64, head_layers=3, sk_ratio=0.0),
    "r50_sk_v2head": dict(arch="resnet50", image_size=64, head_layers=3, sk_ratio=0.0625),
    "r50_imagenet_56": dict(arch="resnet50", image_size=56, head_layers=2, sk_ratio=0.0),
}
SLOW = ("r50_imagenet_v2head", "r50_sk_v2head", "r50_imagenet_56")


def file_of(tmp_path: Path, variables: dict[str, np.ndarray], name: str = "official.npz") -> str:
    np.savez(tmp_path / name, **variables)
    return str(tmp_path / name)


def loaded(tmp_path: Path, variables: dict[str, np.ndarray], image_size: int | None = None) -> Encoder:
    torch.save(import_tf.convert(variables, image_size), tmp_path / "encoder.pt")
    return load(tmp_path / "encoder.pt")


def small_variables(seed: int = 0, *, arch="resnet18", width=0.125, stem="small", sk_ratio=0.0, layers=2):
    """Of a narrow network, with random values, in the shapes that the importer asks for."""
    head = dict(head="nonlinear" if layers > 1 else "none", head_layers=max(layers, 2), head_features=16)
    places = tensorflow._targets(dict(arch=arch, width=width, stem=stem, sk_ratio=sk_ratio), head)
    rng = np.random.default_rng(seed)
    named = {tensorflow._named(place): target.shape for place, target in places.items()}
    return {name: (0.5 + rng.random(shape)).astype(np.float32) for name, shape in named.items()}


def error(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest reference value."""
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("net", [pytest.param(net, marks=[pytest.mark.slow] * (net in SLOW)) for net in NETS])
def test_the_official_outputs(tmp_path, vectors, net):
    expected = NETS[net]
    encoder = loaded(tmp_path, official_variables(vectors, net), expected["image_size"])
    assert {name: getattr(encoder.recipe, name) for name in expected} == expected
    assert (encoder.recipe.width, encoder.recipe.head, encoder.recipe.head_features) == (1.0, "nonlinear", 128)

    stages: dict[str, Tensor] = {}
    for name in encoder.network.groups:
        layer = encoder.network.get_submodule(name)
        layer.register_forward_hook(lambda module, inputs, output, name=name: stages.update({name: output}))
    with np.load(vectors / "net_forward.npz") as file:
        with torch.no_grad():
            h = encoder(torch.from_numpy(file[f"{net}/x"]).permute(0, 3, 1, 2))
            z = encoder.head(h)
        # The last group of the selective kernels amplifies float32's rounding, of the official code too.
        last = 4 if expected["sk_ratio"] else 5
        for k in range(1, last):
            values = stages[f"layer{k}"].permute(0, 2, 3, 1)
            summary = [values.mean(), values.std(correction=0), values.abs().max(), *values.flatten()[:8]]
            assert error(torch.tensor(summary), file[f"{net}/eval/ep_block_group{k}"]) < 1e-4
        tolerance = 2e-2 if expected["sk_ratio"] else 1e-5
        assert error(h, file[f"{net}/eval/h"]) < tolerance
        assert error(z, file[f"{net}/eval/z"]) < tolerance


@pytest.mark.slow
def test_the_usual_max_pool_would_not_give_them(tmp_path, vectors):
    net = "r50_imagenet_56"
    encoder = loaded(tmp_path, official_variables(vectors, net), 56)
    encoder.network.maxpool = torch.nn.MaxPool2d(3, 2, padding=1)
    with np.load(vectors / "net_forward.npz") as file, torch.no_grad():
        h = encoder(torch.from_numpy(file[f"{net}/x"]).permute(0, 3, 1, 2))
        assert error(h, file[f"{net}/eval/h"]) > 1e-2


def test_norms_are_the_official_ones(tmp_path):
    encoder = loaded(tmp_path, small_variables())
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert {norm.eps for norm in norms} == {1e-5}
    assert encoder.head[-1].bias is None


@pytest.mark.parametrize(("arch", "width", "stem", "sk_ratio"), [
    ("resnet18", 1, "imagenet", 0.0), ("resnet34", 2, "small", 0.0), ("resnet34", 1, "imagenet", 0.0),
    ("resnet50", 4, "imagenet", 0.0), ("resnet50", 1, "small", 0.0625), ("resnet50", 2, "imagenet", 0.0625),
    ("resnet50", 1, "imagenet", 0.125), ("resnet101", 2, "imagenet", 0.0), ("resnet101", 1, "small", 0.0),
    ("resnet101", 1, "imagenet", 0.0625), ("resnet152", 3, "imagenet", 0.0625)])  # fmt: skip
def test_networks_are_told_apart(arch, width, stem, sk_ratio):
    recipe = dict(arch=arch, width=width, stem=stem, sk_ratio=sk_ratio)
    head = dict(head="nonlinear", head_layers=3, head_features=64)
    targets = tensorflow._targets(recipe, head)
    assert tensorflow._nearest({place: target.shape for place, target in targets.items()}) == (recipe | head, targets)


def test_every_official_network_has_its_own_number_of_convolutions():
    for plain in ("imagenet", None):
        counts = [candidate[-1] for candidate in tensorflow._candidates(plain)]
        assert len(set(counts)) == len(counts)


def test_heads(tmp_path):
    assert loaded(tmp_path, small_variables(layers=1)).recipe.head == "none"
    linear = small_variables(layers=1) | {
        "head_contrastive/l_0/dense/kernel": np.ones((64, 16), np.float32),
        **{f"head_contrastive/l_0/batch_normalization/{name}": np.ones(16, np.float32)
           for name in ("gamma", "moving_mean", "moving_variance")},
    }  # fmt: skip
    encoder = loaded(tmp_path, linear)
    assert encoder.recipe.head == "linear"
    assert encoder.head(torch.ones(1, 64)).shape == (1, 16)


def test_names_of_the_second_version():
    variables = small_variables()
    renamed = {
        name.replace("base_model/", "resnet/block_group/")
        .replace("batch_normalization", "sync_batch_normalization")
        .replace("head_contrastive/", "projection_head/")
        + ":0": values
        for name, values in variables.items()
    }
    ours, theirs = import_tf.convert(variables), import_tf.convert(renamed)
    assert ours["recipe"] == theirs["recipe"]
    assert all(torch.equal(tensor, theirs["method"][name]) for name, tensor in ours["method"].items())


def test_what_has_no_use_is_left_out_and_listed(tmp_path, capsys):
    variables = small_variables()
    rest = {
        "base_model/conv2d/kernel/Momentum": np.zeros((3, 3, 3, 8)),
        "base_model/batch_normalization/gamma/LARSOptimizer": np.zeros(8),
        "global_step": np.int64(7),
        "head_supervised/linear_layer/dense/kernel": np.ones((64, 10)),
        "head_supervised/linear_layer/dense/bias": np.full(10, 5.0),
    }
    assert import_tf.main([file_of(tmp_path, variables | rest), str(tmp_path / "out.pt")]) == 0
    said = capsys.readouterr().out
    assert "resnet18, width 0.125, 32 px, nonlinear head of 2 layers: 114 tensors" in said
    for name in ("*/Momentum", "*/LARSOptimizer", "global_step", "dense/kernel", "dense/bias"):
        assert name in said
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    plain = import_tf.convert(variables)
    assert state["recipe"] == plain["recipe"]
    assert state["method"].keys() == plain["method"].keys()


def test_the_file_is_taken_by_load_and_init(tmp_path):
    variables = small_variables(arch="resnet50", stem="imagenet")
    assert import_tf.main([file_of(tmp_path, variables), str(tmp_path / "out.pt"), "--image-size", "64"]) == 0
    encoder = load(tmp_path / "out.pt")
    assert (encoder.recipe.variant, encoder.recipe.dialect, encoder.image_size) == ("official", "tf", 64)
    assert encoder.policy.mean == (0, 0, 0)
    kernel = torch.from_numpy(variables["base_model/conv2d/kernel"]).permute(3, 2, 0, 1)
    assert torch.equal(encoder.network.conv1.weight, kernel)

    target = new_encoder("resnet50", width=0.125, image_size=64)
    load_weights(target, str(tmp_path / "out.pt"), "resnet50")
    assert torch.equal(target.conv1.weight, kernel)


CONV, NORM = "base_model/conv2d_3/kernel", "base_model/batch_normalization_20/moving_variance"
FAULTS = {
    "missing": ({CONV: None, NORM: None}, rf"is missing: 2 \({CONV}, {NORM}\)"),
    "unknown": ({"base_model/prelu/alpha": np.ones(3)}, r"is unknown: 1 \(base_model/prelu/alpha\)"),
    "too deep": ({"base_model/conv2d_21/kernel": np.ones((3, 3, 64, 64))}, r"is unknown: 1 \(base_model/conv2d_21/"),
    "other shape": ({CONV: np.ones((3, 3, 8, 9))}, rf"shapes: 1 \({CONV} \[3, 3, 8, 9\] instead of \[3, 3, 8, 8\]"),
    "not finite": ({NORM: np.full(64, np.nan)}, rf"has values that are not finite: 1 \({NORM}\)"),
    "no first": ({"base_model/conv2d/kernel": None}, "it has no first convolution"),
    "twice": ({f"other/{CONV}": np.ones((3, 3, 8, 8))}, "source must hold each variable once, got .*conv2d_3"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_other_variables_are_refused(changes, message):
    variables = {name: array for name, array in (small_variables() | changes).items() if array is not None}
    with pytest.raises(ConfigError, match=message):
        import_tf.convert(variables)


@pytest.mark.parametrize(
    ("stem", "size", "message"),
    [
        ("small", 64, "image_size must be 1 to 32 for the small stem that the source has, got image_size=64"),
        ("imagenet", 32, "image_size must be over 32 for the imagenet stem that the source has, got image_size=32"),
        ("small", 0, "image_size must be 1 to 32 .*got image_size=0"),
    ],
)
def test_image_sizes_of_the_other_stem_are_refused(stem, size, message):
    with pytest.raises(ConfigError, match=message):
        import_tf.convert(small_variables(stem=stem), size)


def test_files_that_are_refused(tmp_path, capsys):
    def refused(source: object, out: object = tmp_path / "out.pt") -> str:
        assert import_tf.main([str(source), str(out)]) == 2
        assert not (tmp_path / "out.pt").exists()
        return capsys.readouterr().err

    good = file_of(tmp_path, small_variables())
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], object), allow_pickle=True)
    (tmp_path / "cut.npz").write_bytes(Path(good).read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    assert "source must hold variables of an official network" in refused(file_of(tmp_path, {}, "none.npz"))
    assert "source cannot be read, " in refused(tmp_path / "pickled.npz")
    assert "source cannot be read, " in refused(tmp_path / "cut.npz")
    assert "source cannot be read, " in refused(tmp_path / "absent.npz")
    assert "a TensorFlow checkpoint or a SavedModel's folder, got '" in refused(tmp_path / "absent")
    assert "has none" in refused(tmp_path / "empty")
    assert "out must end with .pt, got out=" in refused(good, tmp_path / "out.pth")
    for out in (tmp_path / "cut.npz" / "out.pt", Path("/proc/absent/out.pt")):
        assert f"error: out must be a file that can be written, got out={out}: " in refused(good, out)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"none of it", bytes(100)])
def test_files_that_are_no_npz_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^source cannot be read, .*a.npz: [^\n]+$"):
        import_tf.read(str(tmp_path / "a.npz"))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).normal(size=2000))
    content, errors = path.read_bytes(), []
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            import_tf.read(str(path))
        except ConfigError as error:
            errors.append(error)
    assert all(str(error).startswith(f"source cannot be read, {path}: ") for error in errors)
    assert zlib.error in {type(error.__cause__) for error in errors}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(["a"]), "and a in .*a.npz is none$"),
        (np.zeros(2, np.complex64), "and a in .*a.npz is none$"),
        (None, "and .*a.npz holds one array without a name$"),
        (b"text", "and a.txt in .*a.npz is none$"),
    ],
)
def test_other_contents_of_a_file_are_refused(tmp_path, value, message):
    path = tmp_path / "a.npz"
    with open(path, "wb") as file:
        if value is None:
            np.save(file, np.zeros(3))
        elif isinstance(value, bytes):
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a.txt", value)
        else:
            np.savez(file, a=value)
    with pytest.raises(ConfigError, match=f"^source must (be|hold) .*{message}"):
        import_tf.read(str(path))


def test_a_full_disk_is_said(tmp_path, capsys, monkeypatch):
    source = file_of(tmp_path, small_variables())

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert import_tf.main([source, str(tmp_path / "out.pt")]) == 1
    said = f"error: out must be a path that can be written, got out={tmp_path}/out.pt: No space left on device\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out.pt").exists()


def test_what_is_there_is_kept(tmp_path, capsys):
    source, out = file_of(tmp_path, small_variables()), tmp_path / "out.pt"
    out.write_text("mine")
    assert import_tf.main([source, str(out)]) == 2
    assert out.read_text() == "mine"
    assert "out must not exist yet" in capsys.readouterr().err
    assert import_tf.main([source, str(out), "--overwrite"]) == 0
    assert load(out).num_features == 64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorflows_own_files(tmp_path, capsys):
    tf = pytest.importorskip("tensorflow", reason="needs the extra tf")
    variables = small_variables()
    slots = {f"{name}/Momentum": values for name, values in variables.items() if name.endswith("kernel")}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.train.get_or_create_global_step()
        for name, values in (variables | slots).items():
            tf.compat.v1.get_variable(name, initializer=values)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "v1" / "model.ckpt-7"))
    module = tf.Module()
    module.kept = [tf.Variable(values, name=f"resnet/{name}") for name, values in variables.items()]
    tf.saved_model.save(module, str(tmp_path / "v2"))

    expected = import_tf.convert(variables)
    for source in ("v1", "v1/model.ckpt-7", "v1/model.ckpt-7.index", "v2"):
        assert import_tf.main([str(tmp_path / source), str(tmp_path / "out.pt"), "--overwrite"]) == 0
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert found["recipe"] == expected["recipe"]
        assert all(torch.equal(tensor, expected["method"][name]) for name, tensor in found["method"].items())
    assert "global_step" in capsys.readouterr().out
    assert import_tf.main([str(tmp_path / "v2" / "variables" / "variables"), str(tmp_path / "no.pt")]) == 2
    assert "source must have names for its variables" in capsys.readouterr().err


def test_tensorflow_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "tensorflow":
            raise ModuleNotFoundError("No module named 'tensorflow'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    (tmp_path / "model.ckpt.index").touch()
    assert import_tf.main([str(tmp_path / "model.ckpt"), str(tmp_path / "out.pt")]) == 2
    assert "needs TensorFlow; install it with: pip install 'simclr_fast[tf]', or give a .npz" in capsys.readouterr().err
