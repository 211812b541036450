"""Weights to start from: runs, files of all kinds, published ones; what is refused, and that nothing is half loaded."""

import builtins
import os
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from simclr_fast import checkpoint
from simclr_fast.config import ConfigError
from simclr_fast.methods.simclr import Config, Method
from simclr_fast.models import encoder
from simclr_fast.models.weights import check_init, load_weights

SMALL = dict(width=1 / 16, image_size=64)


def network(seed: int, arch: str = "resnet18", **options) -> nn.Module:
    """An encoder none of whose tensors is that of another seed."""
    torch.manual_seed(seed)
    module = encoder(arch, **(SMALL | options))
    for tensor in module.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(seed))
    return module


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def with_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"fc.weight": torch.ones(10, 32), "fc.bias": torch.ones(10)}


@pytest.fixture
def source() -> nn.Module:
    return network(1)


def test_own_checkpoints_and_runs(tmp_path):
    method = Method(Config(arch="resnet18", width=1 / 16, image_size=64))
    method.encoder = network(1)
    checkpoint.save(tmp_path / "checkpoints", {"step": 3, "method": method.state_dict()}, best=True)
    method.encoder = network(2)
    checkpoint.save(tmp_path / "checkpoints", {"step": 4, "method": method.state_dict()}, best=False)

    for source, seed in ((tmp_path, 2), (tmp_path / "checkpoints" / "best.pt", 1)):
        target = network(0)
        check_init(str(source), "resnet18")
        sentence = load_weights(target, str(source), "resnet18")
        assert same(target, network(seed))
        assert f"{tmp_path}/checkpoints" in sentence
        assert "not used: 11 (head." in sentence


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        *((None, prefix) for prefix in ("", "module.", "encoder.", "backbone.", "encoder_q.", "_orig_mod.module.")),
        *((key, "") for key in ("state_dict", "model", "method")),
        ("state_dict", "module.encoder_q."),  # MoCo
        ("state_dict", "backbone."),  # solo-learn
        ("model", "module.backbone."),
    ],
)
def test_wrappers_of_other_trainers(tmp_path, source, prefix, key):
    state = {prefix + name: value for name, value in with_classifier(source.state_dict()).items()}
    state |= {"module.encoder_k." + name: torch.zeros_like(value) for name, value in source.state_dict().items()}
    torch.save({key: state, "epoch": 3, "optimizer": {"lr": 0.1}} if key else state, tmp_path / "other.pth")
    target = network(0)
    sentence = load_weights(target, str(tmp_path / "other.pth"), "resnet18")
    assert same(target, source)
    assert f"{len(source.state_dict())} tensors" in sentence
    assert f"{prefix}fc.weight" in sentence


def test_safetensors(tmp_path, source):
    path = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(with_classifier(source.state_dict()), path)
    target = network(0)
    load_weights(target, str(path), "resnet18")
    assert same(target, source)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"init cannot be read, .*encoder.safetensors: "):
        load_weights(target, str(path), "resnet18")


def test_safetensors_that_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "encoder.safetensors").write_bytes(b"")
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError("No module named 'safetensors'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"needs safetensors; install it with: pip install safetensors$"):
        check_init(str(tmp_path / "encoder.safetensors"), "resnet18")


def test_half_precision_and_old_files_without_counters(tmp_path, source):
    state = {name: value.half() for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    target = network(0)
    load_weights(target, str(tmp_path / "old.pth"), "resnet18")
    torch.testing.assert_close(target.conv1.weight, source.conv1.weight.half().float(), rtol=0, atol=0)
    assert target.bn1.num_batches_tracked == 0


def refused(target: nn.Module, path: Path, message: str, arch: str = "resnet18") -> None:
    """The error says `message`, and the encoder keeps all of its weights."""
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        load_weights(target, str(path), arch)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            dict(image_size=64),
            dict(image_size=32),
            r"has other shapes of 1 \(conv1.weight \[4, 3, 7, 7\] instead of \[4, 3, 3, 3\]\). Its first convolution "
            "is 7x7, here it is 3x3: ResNets have 3x3 for --image-size up to 32, and 7x7 above",
        ),
        (dict(image_size=32), dict(image_size=64), "Its first convolution is 3x3, here it is 7x7"),
        (dict(width=1 / 8), {}, r"has other shapes of 10\d \(.*It begins with 8 channels, here there are 4: --width"),
        (dict(arch="resnet34"), {}, r"has layers that the encoder lacks: 9\d \(layer1.2.conv1.weight, "),
        ({}, dict(arch="resnet34"), r"does not have 8\d \(layer1.2.conv1.weight, "),
        (dict(arch="resnet50"), {}, "has other shapes of .*; has layers that the encoder lacks: "),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, there, here, message):
    torch.save(with_classifier(network(1, **there).state_dict()), tmp_path / "other.pt")
    arch = here.get("arch", "resnet18")
    refused(network(0, **here), tmp_path / "other.pt", f"must hold weights of arch={arch}, and .*{message}", arch)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer4.1.bn2.running_var", None, r"does not have 1 \(layer4.1.bn2.running_var\)"),
        ("layer4.1.bn2.bias", torch.full((32,), torch.nan), r"not finite in 1 \(layer4.1.bn2.bias\)"),
        ("layer4.1.bn2.bias", torch.ones(32, dtype=torch.int8), r"other types of 1 \(layer4.1.bn2.bias torch.int8\)"),
        ("layer4.1.bn2.bias", torch.ones(31), r"other shapes of 1 \(layer4.1.bn2.bias \[31\] instead of \[32\]\)"),
        ("layer4.1.bn3.bias", torch.ones(32), r"layers that the encoder lacks: 1 \(layer4.1.bn3.bias\)"),
    ],
)
def test_one_wrong_tensor_at_the_end_is_enough(tmp_path, source, name, value, message):
    state = source.state_dict()
    state.pop(name, None)
    torch.save(state if value is None else state | {name: value}, tmp_path / "wrong.pt")
    refused(network(0), tmp_path / "wrong.pt", message)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, source, keep):
    path = tmp_path / "cut.pt"
    torch.save(source.state_dict(), path)
    os.truncate(path, int(keep * path.stat().st_size) if isinstance(keep, float) else keep)
    refused(network(0), path, r"^init cannot be read, .*cut.pt: [^\n]+$")


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Attack()}, tmp_path / "code.pt")
    refused(network(0), tmp_path / "code.pt", r"nothing but weights, and .*code.pt asks for posix.mkdir; save")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    refused(network(0), tmp_path / "module.pt", r"asks for torch.nn.modules.linear.Linear; save its")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.ones(2)], torch.ones(2), {0: torch.ones(2)}])
def test_files_without_named_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    refused(network(0), tmp_path / "odd.pt", "must be a checkpoint or a state dict, and .* holds no named tensors")


@pytest.mark.parametrize(
    ("source", "arch", "message"),
    [
        ("nowhere.pt", "resnet18", "init must be torchvision, timm or a path that exists, got 'nowhere.pt'$"),
        ("torchvison", "resnet18", "got 'torchvison'; did you mean 'torchvision'"),
        (".", "resnet18", "init must be a run's folder or a file, and . has no checkpoints/last.pt$"),
        ("torchvision", "resnet8", "init=torchvision has no weights of arch=resnet8"),
        ("torchvision", "timm:resnet18", "must be timm or a path for an arch of timm's, got init=torchvision"),
        ("timm", "resnet18", "init=timm needs an arch of timm's, timm:NAME, got arch='resnet18'"),
        ("timm", "timm:resnet10t.a1", "init=timm has no weights of arch=timm:resnet10t.a1"),
    ],
)
def test_sources_are_checked_early(tmp_path, monkeypatch, source, arch, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_init(source, arch)


def test_torchvisions_weights(monkeypatch):
    theirs = torchvision.models.resnet18()
    asked = []

    def fetched(url, **options):
        asked.append(url)
        assert options["weights_only"]
        assert options["check_hash"]
        return theirs.state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetched)
    check_init("torchvision", "resnet18")
    assert not asked
    ours = encoder("resnet18")
    sentence = load_weights(ours, "torchvision", "resnet18")
    assert sentence == (
        "the encoder starts from torchvision's ResNet18_Weights.IMAGENET1K_V1, 120 tensors; "
        "not used: 2 (fc.weight, fc.bias)"
    )
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_timms_weights(tmp_path, monkeypatch):
    theirs = timm.create_model("test_vit", img_size=160)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *args, **kwargs: theirs.state_dict())
    ours = encoder("timm:test_vit", image_size=96)
    sentence = load_weights(ours, "timm", "timm:test_vit")
    assert "timm's test_vit.r160_in1k" in sentence
    assert "not used: 2 (head.weight, head.bias)" in sentence
    names = [name for name, value in ours.state_dict().items() if not torch.equal(value, theirs.state_dict()[name])]
    assert names == ["pos_embed"]  # timm has resized it for 96 px


def test_timms_weights_that_are_not_complete_are_refused(monkeypatch):
    state = timm.create_model("test_resnet").state_dict()
    del state["conv1.0.weight"]
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *args, **kwargs: state)
    with pytest.raises(ConfigError, match="init=timm cannot fetch the weights of timm:test_resnet: "):
        load_weights(encoder("timm:test_resnet", image_size=64), "timm", "timm:test_resnet")


def test_a_run_of_timms_model(tmp_path):
    source = network(1, "timm:test_resnet", width=1.0)
    torch.save({"method": {f"encoder.{name}": value for name, value in source.state_dict().items()}}, tmp_path / "a.pt")
    target = network(0, "timm:test_resnet", width=1.0)
    load_weights(target, str(tmp_path / "a.pt"), "timm:test_resnet")
    assert same(target, source)


@pytest.mark.parametrize(
    ("source", "arch", "where"),
    [
        ("torchvision", "resnet18", (torch.hub, "download_url_to_file")),
        ("timm", "timm:test_resnet", (timm.models._builder, "load_state_dict_from_hf")),
    ],
)
def test_no_network(tmp_path, monkeypatch, source, arch, where):
    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(*where, unreachable)
    target = encoder(arch, image_size=64, width=1.0 if source == "timm" else 1 / 16)
    refused(target, source, f"init={source} cannot fetch .*Name or service not known.*where there is no network", arch)
