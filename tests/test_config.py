import dataclasses
import functools
import json

import pytest

from simclr_fast import cli, methods
from simclr_fast.config import NEUTRAL, ConfigError, choose
from simclr_fast.methods.simclr import PRESETS, Config

parse = functools.partial(cli.parse, "simclr_fast.train")


def test_no_flags_are_the_shapes_preset():
    cfg = parse([])
    assert cfg.data == "shapes"
    assert all(getattr(cfg, name) == value for name, value in PRESETS["shapes"].items())


def test_the_width_of_a_preset_is_for_its_own_network():
    assert parse(["--arch", "resnet8"]).width == PRESETS["shapes"]["width"]
    assert parse(["--arch=resnet18"]).width == 1
    assert parse(["--arch", "resnet18", "--width", "2"]).width == 2


def test_a_folder_of_that_name_does_not_hide_the_shapes(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse([]).data == "shapes"
    assert parse(["--data", "./shapes"]).data == str(tmp_path / "shapes")


def test_other_data_without_a_preset_are_the_defaults(tmp_path):
    cfg = parse(["--data", str(tmp_path)])
    assert cfg == Config(data=str(tmp_path))


@pytest.mark.parametrize("preset", ["imagenet", "cifar10"])
def test_flags_override_the_preset(preset):
    cfg = parse(["--preset", preset, "--data", "somewhere", "--temperature=0.2", "--head_layers", "4"])
    assert cfg.temperature == 0.2
    assert cfg.head_layers == 4
    assert cfg.arch == PRESETS[preset]["arch"]


def test_paper_settings():
    imagenet, cifar = parse(["--preset", "imagenet"]), parse(["--preset", "cifar10"])
    assert (imagenet.arch, imagenet.batch, imagenet.weight_decay, imagenet.dialect) == ("resnet50", 4096, 1e-6, "tf")
    assert (cifar.arch, cifar.batch, cifar.temperature, cifar.base_lr) == ("resnet18", 512, 0.5, 1.0)
    assert imagenet.loss_scale == cifar.loss_scale == "simclr_tf"


def test_a_config_file_repeats_a_run(tmp_path):
    first = parse(["--preset", "cifar10", "--data", "x", "--out", "a", "--gpus", "0"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(first)))
    again = parse(["--config", str(path)])
    assert again.settings() == first.settings()
    assert again.out is None
    assert parse(["--config", str(path), "--seed", "3"]).differences(first.settings()) == ["seed: 0 -> 3"]
    with pytest.raises(ConfigError, match="preset must not be given with config"):
        parse(["--config", str(path), "--preset", "imagenet"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "config must be a readable config.json"),
        ('{"bacth": 3}', "did you mean 'batch'"),
        ("[1]", "config must be a readable config.json"),
        ('{"precision": "bfloat16"}', "precision must be one of auto, fp32, bf16"),
        ('{"batch": "many"}', "batch must be of type int, got 'many'"),
        ('{"bn_chunk": "4"}', "bn_chunk must be of type int or null, got '4'"),
        ('{"warmup_epochs": "5"}', "warmup_epochs must be of type float or null, got '5'"),
        ('{"init": 7}', "init must be of type str or null, got 7"),
        ('{"knn_every": 1.5}', "knn_every must be of type int or null, got 1.5"),
        ('{"gpus": true}', "gpus must be of type int or null, got True"),
        ('{"precision": 3}', "precision must be one of auto, fp32, bf16, got '3'"),
    ],
)
def test_bad_config_files(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=match):
        parse(["--config", str(tmp_path / "config.json")])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--temperature", "0"], "temperature must be positive, got temperature=0.0"),
        (["--temperature", "nan"], "temperature must be finite"),
        (["--batch", "1"], "no negatives"),
        (["--epochs", "0"], "epochs must be at least 1, got epochs=0"),
        (["--epochs", "100000000000000000000"], "epochs must be at most 1,000,000, got epochs=1000"),
        (["--workers", "100000"], "workers must be at most 1,024, got workers=100000"),
        (["--timeout", "1e300"], "timeout must be at most 2,592,000 s, got timeout=1e"),
        (["--arch", "resnet51"], "did you mean 'resnet50'"),
        (["--width", "-1"], "width must be positive"),
        (["--width", "0.001"], "large enough"),
        (["--temperature", "inf"], "temperature must be finite"),
        (["--head-layers", "1"], "head_layers must be at least 2"),
        (["--gpus", "-1"], "gpus must be 0 or more"),
        (["--temprature", "1"], "--temperature"),
        (["--resume", "nver"], "never"),
    ],
)
def test_bad_flags_name_the_rule(capsys, flags, match):
    with pytest.raises(SystemExit) as stopped:
        parse(flags)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    boxed = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert match in boxed


def test_unknown_preset_and_method():
    with pytest.raises(ConfigError, match="did you mean 'imagenet'"):
        parse(["--preset", "imagnet"])
    with pytest.raises(ConfigError, match="did you mean 'simclr'"):
        parse(["--method", "simclar"])
    assert methods.names() == ["simclr"]


def test_neutral_fields_do_not_change_the_name_of_a_run():
    base = Config()
    other = Config(preset="none", gpus=0, ranks=2, workers=3, resume="never", config="x")
    assert base.folder() == other.folder()
    assert base.folder() != Config(seed=1).folder()
    assert {"out", *base.settings()} | set(NEUTRAL) == {field.name for field in dataclasses.fields(Config)}


def test_choose():
    assert choose("x", "a", ["a"]) == "a"
    with pytest.raises(ConfigError, match="x must be one of a, b, got 'zz'$"):
        choose("x", "zz", ["a", "b"])


def test_help_reads_as_documentation(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for flag in ("--data", "--preset", "--batch", "--temperature", "--gpus", "--ranks", "--resume", "--dialect"):
        assert flag in text
