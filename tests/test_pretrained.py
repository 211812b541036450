"""`load`: the trainer's encoder bit for bit, its preprocessing as the pipeline's, and what it refuses."""

import dataclasses
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import simclr_fast
from simclr_fast import checkpoint, load
from simclr_fast.checkpoint import CheckpointError
from simclr_fast.config import ConfigError
from simclr_fast.data import eval_images, open_dataset
from simclr_fast.methods.simclr import Config, Method
from simclr_fast.models import encoder as new_encoder
from simclr_fast.pretrained import Encoder, EncoderFlags, Recipe, run_file, run_folder
from tests.encoder_common import TINY, saved
from tests.train_common import images, run  # noqa: F401


def same(encoder: Encoder, method: Method) -> bool:
    x = torch.randn(4, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        h = method.encoder(x)
        return torch.equal(encoder(x), h) and torch.equal(encoder.head(encoder(x)), method.head(h))


def test_a_trained_run(images, tmp_path):  # noqa: F811
    assert run(images, tmp_path / "run", "--epochs", "1") == 0
    state = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")
    method = Method(Config.of(state["config"], "the checkpoint"))
    method.load_state_dict(state["method"])
    encoder = load(tmp_path / "run")
    assert same(encoder, method.eval())
    assert (encoder.step, encoder.data, encoder.image_size) == (state["step"], images.name, 16)
    expected = {f"encoder.{name}": value for name, value in encoder.network.state_dict().items()}
    expected |= {f"head.{name}": value for name, value in encoder.head.state_dict().items()}
    assert expected.keys() == state["method"].keys()
    assert all(torch.equal(value, state["method"][name]) for name, value in expected.items())


def test_the_last_and_the_best_checkpoint(tmp_path):
    best, last = saved(tmp_path), saved(tmp_path, 1)
    for source, method, step in (
        (tmp_path, last, 4),
        (str(tmp_path), last, 4),
        (tmp_path / "checkpoints" / "last.pt", last, 4),
        (tmp_path / "checkpoints" / "best.pt", best, 3),
    ):
        encoder = load(source)
        assert same(encoder, method)
        assert encoder.step == step
        assert run_folder(source) == tmp_path
    assert not same(load(tmp_path), best)


def test_it_is_for_inference(tmp_path):
    saved(tmp_path)
    encoder = simclr_fast.load(tmp_path)
    assert isinstance(encoder, torch.nn.Module)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before = encoder.digest()
    encoder(torch.randn(8, 3, 16, 16))
    assert encoder.digest() == before


def test_the_digest_is_of_all_weights_and_names(tmp_path):
    saved(tmp_path)
    found = {load(tmp_path).digest()}
    for name in ("bn1.running_var", "layer3.0.conv2.weight"):
        encoder = load(tmp_path)
        encoder.network.state_dict()[name].view(-1)[-1].add_(1e-6)
        found.add(encoder.digest())
    assert len(found) == 3


def test_timms_networks(tmp_path):
    method = saved(tmp_path, arch="timm:test_vit", width=1.0, image_size=96)
    encoder = load(tmp_path)
    assert same(encoder, method)
    assert encoder.num_features == method.encoder.num_features


@pytest.fixture(scope="module")
def photographs(shared: Path, tmp_path_factory) -> Path:
    """Real ones, some of them gray, and other modes of colour."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared / "data" / "photos-256.tar") as archive:
        members = [member for member in archive if member.isfile()][:14]
        contents = [archive.extractfile(member).read() for member in members]
    for number, content in enumerate(contents[:8]):
        (folder / f"{number:02}.jpg").write_bytes(content)
    for number, mode in enumerate(("L", "CMYK"), 8):
        Image.open(io.BytesIO(contents[number])).convert(mode).save(folder / f"{number:02}.jpg", quality=95)
    for number, mode in enumerate(("RGBA", "P", "LA", "L"), 10):
        Image.open(io.BytesIO(contents[number])).resize((90, 70)).convert(mode).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize(
    ("engine", "tolerance"),
    [("torchvision", 0.0), ("dali", 5e-4)],
)
@pytest.mark.parametrize(("size", "dialect"), [(32, "torchvision"), (64, "torchvision"), (96, "tf")])
def test_preprocessing_is_the_pipelines(photographs, engine, tolerance, size, dialect):
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI")
    encoder = Encoder(Recipe(**{**_recipe(), "image_size": size, "dialect": dialect}), "somewhere")
    split = open_dataset(str(photographs)).train
    batches = eval_images(split, encoder.policy, batch=5, workers=0 if engine == "torchvision" else 1, engine=engine)
    pipeline = torch.cat([batch for batch, _ in batches])
    ours = torch.stack([encoder.preprocess(photographs / name) for name in split.names])
    assert ours.shape == (14, 3, size, size)
    assert ours.dtype == torch.float32
    # Of a palette or CMYK, decoders round differently.
    plain = [k for k, name in enumerate(split.names) if not name.startswith(("09", "11"))]
    assert float((ours - pipeline)[plain].abs().max()) <= tolerance
    assert float((ours - pipeline).abs().mean()) <= tolerance


def _recipe() -> dict:
    return {name: value for name, value in TINY.items() if not name.startswith("head")}


def test_images_in_memory_are_prepared_alike(photographs):
    encoder = Encoder(Recipe(**_recipe()), "somewhere")
    for path in sorted(photographs.iterdir()):
        expected = encoder.preprocess(path)
        assert torch.equal(encoder.preprocess(str(path)), expected)
        with Image.open(path) as picture:
            assert torch.equal(encoder.preprocess(picture), expected)
            pixels = np.asarray(picture.convert("RGB"))
        assert torch.equal(encoder.preprocess(pixels), expected)
        assert torch.equal(encoder.preprocess(pixels[:, ::-1][:, ::-1]), expected)


def test_16_bits_are_scaled():
    encoder = Encoder(Recipe(**_recipe()), "somewhere")
    gray = np.linspace(0, 255, 400).astype(np.uint8).reshape(20, 20)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert torch.equal(encoder.preprocess(deep), encoder.preprocess(Image.fromarray(gray)))


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (torch.zeros(3, 4, 4), r"torch.float32 \[3, 4, 4\]"),
        (None, "NoneType"),
    ],
)
def test_other_images_are_refused(image, got):
    with pytest.raises(ValueError, match=rf"^image must be a path, a Pillow image or uint8 \[H, W, 3\], got {got}$"):
        Encoder(Recipe(**_recipe()), "somewhere").preprocess(image)


def test_weights_without_settings(tmp_path):
    torch.manual_seed(0)
    network = new_encoder("resnet8", width=0.125, image_size=16).eval()
    torch.save(network.state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    torch.save(network.state_dict(), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    x = torch.randn(2, 3, 16, 16)
    for name in ("a.pt", "b.pth", "c.pt"):
        encoder = load(tmp_path / name, arch="resnet8", width=0.125, image_size=16)
        assert torch.equal(encoder(x), network(x))
        assert (encoder.step, encoder.recipe.head) == (None, "none")
    with pytest.raises(ConfigError, match=r"a.pt has no such settings: give --arch \(and --width, --image-size\)"):
        load(tmp_path / "a.pt")
    with pytest.raises(
        ConfigError, match=r"^checkpoint=.*a.pt must hold weights of arch=resnet8, and .*--width differs"
    ):
        load(tmp_path / "a.pt", arch="resnet8", image_size=16)


@pytest.mark.parametrize(
    "more",
    [
        {"config": {"lr": 0.1, "name": "theirs"}},
        {"config": "a string"},
        {"config": "a string", "method": "moco"},
        {"recipe": "a3", "epoch": 7},
        {"recipe": {"arch": "theirs"}},
    ],
)
def test_settings_of_another_program_are_not_ours(tmp_path, more):
    network = new_encoder("resnet8", width=0.125, image_size=16).eval()
    torch.save({"state_dict": network.state_dict()} | more, tmp_path / "a.pt")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load(tmp_path / "a.pt", arch="resnet8", width=0.125, image_size=16)(x), network(x))
    with pytest.raises(ConfigError, match="^checkpoint must hold a run's settings .*a.pt has no such settings: give"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("held", [[torch.zeros(3)], torch.zeros(3), 7], ids=["list", "tensor", "number"])
def test_files_without_names_are_refused(tmp_path, held):
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=f"^checkpoint must hold .*, and .*a.pt holds a {type(held).__name__}$"):
        load(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"^checkpoint must be .*a.pt holds no named tensors$"):
        load(tmp_path / "a.pt", arch="resnet8", image_size=16)


def test_a_string_beside_a_recipe_changes_nothing(tmp_path):
    encoder = Encoder(Recipe(**_recipe()), "")
    weights = {f"encoder.{name}": value for name, value in encoder.network.state_dict().items()}
    torch.save({"recipe": vars(encoder.recipe), "config": "a string", "method": weights}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").digest() == encoder.digest()


def test_sources_that_are_refused(tmp_path):
    saved(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "absent", "nonsense"):
        with pytest.raises(
            ConfigError, match="^checkpoint must be a run's folder or a checkpoint file that exists, got"
        ):
            load(source)
    with pytest.raises(ConfigError, match=r"empty has no checkpoints/last.pt$"):
        load(tmp_path / "empty")
    with pytest.raises(ConfigError, match="arch must be that of the checkpoint, resnet8, got arch=resnet18"):
        load(tmp_path / "run", arch="resnet18", image_size=16)
    with pytest.raises(ConfigError, match="arch must be one of .*; did you mean 'resnet8'"):
        load(tmp_path / "run", arch="resnet7")


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_damaged_files_are_refused(tmp_path, keep):
    saved(tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    path = shutil.copy(path, tmp_path / "cut.pt")  # the other names are links to the same file
    os.truncate(path, int(keep * path.stat().st_size) if isinstance(keep, float) else keep)
    with pytest.raises(CheckpointError, match=r"^cannot read .*cut.pt: [^\n]+; weights .* need --arch$"):
        load(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"an image, say")
    with pytest.raises(CheckpointError, match="model.onnx: it is no checkpoint, or not a whole one; weights .* --arch"):
        load(tmp_path / "model.onnx")


def rewritten(folder: Path, **changes) -> Path:
    """A checkpoint whose settings say something else."""
    state = checkpoint.read(folder / "checkpoints" / "last.pt")
    torch.save(state | {"config": state["config"] | changes}, folder / "other.pt")
    return folder / "other.pt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arch="resnet18"), "other.pt must hold weights of resnet18, as its settings say: .*Missing key"),
        (dict(width=0.25), "other.pt must hold weights of resnet8, as its settings say: .*size mismatch for conv1"),
        (dict(head_layers=3), "must hold weights of resnet8, as its settings say: .*Missing key"),
        (dict(arch="resnet9"), "arch must be one of .*; did you mean 'resnet"),
        (dict(colour="red"), "setting must be one of .*got 'colour'"),
        (dict(method="simsiam"), "method must be one of .*got 'simsiam'"),
    ],
)
def test_settings_of_another_network_are_refused(tmp_path, changes, message):
    saved(tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        load(rewritten(tmp_path, **changes))
    assert "\n" not in str(raised.value)


def test_a_recipe_from_the_future_is_refused(tmp_path):
    torch.save({"recipe": _recipe() | {"colour": "red"}, "method": {}}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a.pt has settings that this version does not know: colour$"):
        load(tmp_path / "a.pt")


def test_what_a_path_stands_for(tmp_path):
    saved(tmp_path)
    assert run_file(tmp_path) == tmp_path / "checkpoints" / "last.pt"
    assert run_file(tmp_path / "absent") is None
    shutil.copy(tmp_path / "checkpoints" / "last.pt", tmp_path / "alone.pt")
    assert run_folder(tmp_path / "alone.pt") is None


def test_files_that_are_not_the_runs_checkpoints(tmp_path, monkeypatch):
    run = tmp_path / "run"
    saved(run)
    for name in ("tuned/enc.pt", "other.pt", "checkpoints/deep/enc.pt", "elsewhere/checkpoints/last.pt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "checkpoints" / "last.pt", run / name)
        assert run_folder(run / name) is None
    own = ("checkpoints/last.pt", "./checkpoints/best.pt", "tuned/../checkpoints/last.pt", ".", "../run")
    for place, inside, outside in (
        (run, own, ("other.pt", "tuned/enc.pt", "torchvision", "timm", "checkpoints/../other.pt", "absent.pt")),
        (run / "checkpoints", ("last.pt", "./best.pt", "..", "deep/../last.pt"), ("deep/enc.pt", "../other.pt")),
        (run / "tuned", ("../checkpoints/last.pt", ".."), ("enc.pt", "torchvision")),
        (tmp_path, ("run", "run/checkpoints/last.pt"), ("run/other.pt", "run/tuned/enc.pt")),
    ):
        monkeypatch.chdir(place)
        for source in inside:
            found = run_folder(source)
            assert found is not None, source
            assert found.samefile(run)
        assert [run_folder(source) for source in outside] == [None] * len(outside)
    assert run_folder("run/checkpoints/last.pt") == Path("run")  # as it was said, for messages


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(width=2.0), "width must be left out without --arch, got width=2.0"),
        (dict(arch="resnet18", width=-1.0), "width must be positive, got width=-1.0"),
        (dict(arch="resnet18", width=float("nan")), "width must be finite, got width=nan"),
        (dict(arch="resnet18", image_size=0), "image_size must be positive, got image_size=0"),
    ],
)
def test_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        EncoderFlags(checkpoint="a.pt", **flags)


def test_a_checkpoint_that_says_what_it_is_of_is_not_overruled(tmp_path):
    """--arch beside it changes nothing: not the layers, not the preprocessing, not the head."""
    recipe = Recipe(arch="resnet50", width=0.125, image_size=96, variant="official", dialect="tf", head="linear")
    encoder = Encoder(recipe, "")
    parts = ("encoder", encoder.network), ("head", encoder.head)
    weights = {f"{part}.{name}": value for part, module in parts for name, value in module.state_dict().items()}
    torch.save({"recipe": vars(recipe), "method": weights}, tmp_path / "own.pt")
    again = load(tmp_path / "own.pt", arch="resnet50")
    assert again.recipe == recipe
    assert again.digest() == encoder.digest()
    larger = load(tmp_path / "own.pt", image_size=128)
    assert (larger.recipe, larger.image_size) == (dataclasses.replace(recipe, image_size=128), 128)
    with pytest.raises(ConfigError, match="width must be that of the checkpoint, 0.125, got width=1.0"):
        load(tmp_path / "own.pt", arch="resnet50", width=1.0)
    with pytest.raises(ConfigError, match="setting must be one of .*; did you mean 'image_size'"):
        load(tmp_path / "own.pt", imagesize=128)
    torch.save(encoder.network.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ConfigError, match="arch must be given"):
        load(tmp_path / "bare.pt", image_size=64)


def test_a_damaged_checkpoint_names_the_others_and_a_new_run_has_none(tmp_path):
    saved(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "best.pt").unlink(missing_ok=True)
    whole = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot read .*last.pt: [^;]*$"):
        load(tmp_path / "run")
    (folder / "previous.pt").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"last.pt: .*; there is also .*previous.pt$"):
        load(tmp_path / "run")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="a run that has written one, and .*new has no checkpoints/last.pt yet"):
        load(tmp_path / "new")
