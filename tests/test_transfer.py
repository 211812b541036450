"""The transfer protocol on miniatures of its 12 sets, with an untrained encoder; what is wrong is said."""

import json
from pathlib import Path

import pytest
import torch

from simclr_fast.config import ConfigError
from simclr_fast.data import DataError
from simclr_fast.distributed import Ranks
from simclr_fast.evaluate import main
from simclr_fast.evaluation import logistic, transfer
from simclr_fast.evaluation.benchmarks import BENCHMARKS, fingerprint, open_task
from simclr_fast.evaluation.job import Job
from simclr_fast.pretrained import Encoder, Recipe
from tests.transfer_common import L2_VALUES, checkpoint, evaluated, own_cache_and_fewer_values
from tests.transfer_miniatures import MAKERS, class_folders, make, pixels

__all__ = ["checkpoint", "own_cache_and_fewer_values"]  # fixtures are used by their names


def test_all_12_sets(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("scipy", reason="needs the extra evaluate")
    for name in MAKERS:
        make(name, tmp_path, monkeypatch)
    result = evaluated(checkpoint, tmp_path)
    table, images = result.tables
    assert [row[0] for row in table["rows"][:-1]] == [one.title for one in BENCHMARKS.values()]
    assert all(row[2] == 1.0 for row in table["rows"]), "a class is a colour"
    assert table["rows"][0] == ["Food-101", "top-1", 1.0, 0.684, 0.723]
    average = table["rows"][-1]
    assert average[0] == "average of the 12 that ran"
    assert average[3] == pytest.approx(
        sum([68.4, 90.6, 71.6, 37.4, 58.8, 50.3, 50.3, 80.5, 74.5, 83.6, 90.3, 91.2]) / 1200
    )
    assert next(iter(result.figures)) == "average of 12 sets"
    assert images["rows"][7][:5] == ["VOC2007", "3", "12", "12", "12"]
    assert result.data == "12-sets"


def test_as_a_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make("dtd", tmp_path / "kept", monkeypatch)
    flags = ["--checkpoint", str(checkpoint), "--gpus", "0", "--out", str(tmp_path / "out"), "--precision", "fp32"]
    assert main(["transfer", *flags]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["DTD", "top-1", "100.0%", "74.5%", "74.9%"] in rows
    assert "not there, and left out: food101, cifar10" in printed
    opened = open_task(BENCHMARKS["dtd"], tmp_path / "kept")
    assert opened is not None
    (file,) = (tmp_path / "out").glob("*.json")
    known = json.loads(file.read_text())
    assert known["figures"] == {"DTD": 1.0}
    assert known["data"] == "dtd"
    assert known["data_digest"] == fingerprint([opened])
    assert main(["transfer", *flags, "--sets", "dtd", "voc2007"]) == 2
    assert "voc2007 is not" in capsys.readouterr().err


def test_the_features_are_those_of_the_whole_shorter_side(checkpoint: Path, tmp_path: Path):
    """With 48 pixels, at which the usual central crop would leave out a border."""
    torch.manual_seed(0)
    encoder = Encoder(Recipe(arch="resnet8", width=0.25, image_size=48), "")
    path = tmp_path / "larger.pt"
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.network.state_dict().items()}
    torch.save({"recipe": vars(encoder.recipe), "method": weights}, path)
    seen = []

    class Spy(Job):
        def __init__(self, *args):
            super().__init__(*args)
            features = self.extractor.features
            self.extractor.features = lambda *a, **k: seen.append(k["policy"]) or features(*a, **k)

    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    settings = transfer.Settings(checkpoint=str(path), data=str(tmp_path), gpus=0, workers=1, precision="fp32")
    result = transfer.run(settings, Spy(settings, Ranks(use_gpu=False), lambda text: None))
    assert [(policy.size, policy.test_crop) for policy in seen] == [(48, 1.0)]
    assert result.figures["DTD"] == 1.0


def test_the_others_wait_for_what_the_main_rank_fetches_and_fits_as_long_as_it_takes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    waits, from_main = [], Ranks.from_main
    monkeypatch.setattr(
        Ranks, "from_main", lambda self, compute, patient=False: waits.append(patient) or from_main(self, compute)
    )
    evaluated(checkpoint, tmp_path, sets=("dtd",), cache=False)
    assert waits.count(True) == 2


def test_random_labels_are_at_chance(checkpoint: Path, tmp_path: Path):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 20), ("test", 100)):
        for label in "ab":
            (tmp_path / "food101" / part / label).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(pixels(int(rng.integers(3)), k)).save(tmp_path / "food101" / part / label / f"{k}.png")
    result = evaluated(checkpoint, tmp_path)
    assert 0.35 < result.figures["Food-101"] < 0.65


def test_the_metric_is_the_sets_own():
    scores = torch.eye(2)[[0, 0, 0, 0]]
    targets = torch.tensor([0, 0, 0, 1])
    assert transfer.measured(BENCHMARKS["food101"], scores, targets) == 0.75
    assert transfer.measured(BENCHMARKS["oxford_iiit_pet"], scores, targets) == 0.5
    several = torch.tensor([[1, 0], [0, 1]])
    assert transfer.measured(BENCHMARKS["voc2007"], several.float(), several) == pytest.approx(1.0)


def test_what_is_chosen_is_tested_once_after_a_fit_to_training_and_validation(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 4})
    monkeypatch.setattr(logistic, "L2_VALUES", L2_VALUES)
    tested, fitted = [], []
    measured, fit = transfer.measured, transfer.logistic.fit
    monkeypatch.setattr(transfer, "measured", lambda b, s, t: tested.append(len(s)) or measured(b, s, t))
    monkeypatch.setattr(transfer.logistic, "fit", lambda x, *a, **k: fitted.append(len(x)) or fit(x, *a, **k))
    evaluated(checkpoint, tmp_path)
    assert tested == [6] * 45 + [12]
    assert fitted == [15]


def test_a_set_that_was_named_must_be_there(checkpoint: Path, tmp_path: Path):
    with pytest.raises(
        ConfigError,
        match=rf"sets must be in {tmp_path}, and food101, birdsnap are not: there is no {tmp_path}/food101/food-101, "
        rf"{tmp_path}/birdsnap/train and test; --download fetches it \(food101 4.7 GiB\)",
    ):
        evaluated(checkpoint, tmp_path, sets=("food101", "birdsnap"))
    with pytest.raises(ConfigError, match="data must be a folder with a folder for .*, got .*none, which is not there"):
        evaluated(checkpoint, tmp_path / "none")
    with pytest.raises(ConfigError, match="sets must be one of .*, got 'cifar'; did you mean 'cifar1"):
        transfer.Settings(checkpoint="", sets=("cifar",))
    with pytest.raises(ConfigError, match="sets must be names that differ"):
        transfer.Settings(checkpoint="", sets=("dtd", "dtd"))
    with pytest.raises(ConfigError, match="sets must be named with --download"):
        transfer.Settings(checkpoint="", download=True)


def test_all_that_is_wrong_with_the_data_is_said_before_anything_is_encoded(checkpoint: Path, tmp_path: Path):
    class_folders(tmp_path / "dtd", {"train": 3, "val": 2, "test": 2})
    class_folders(tmp_path / "flowers102", {"train": 3})
    said: list[str] = []
    with pytest.raises(DataError, match="flowers102 in .* must hold test/CLASS"):
        evaluated(checkpoint, tmp_path, said)
    assert not any("features" in line for line in said)


def test_fine_tuning(checkpoint: Path, tmp_path: Path):
    class_folders(tmp_path / "dtd", {"train": 6, "val": 3, "test": 3})
    said: list[str] = []
    result = evaluated(checkpoint, tmp_path, said, mode="finetune", steps=12, lrs=(0.05,), decays=(1e-4,), batch=9)
    assert result.figures["DTD"] == 1.0
    assert "fine-tuned" in result.tables[0]["title"]
    assert result.tables[0]["rows"][0] == ["DTD", "top-1", 1.0, 0.732, 0.746]
    assert result.tables[1]["rows"][0][-1] == "lr 5.0e-02, decay 1.0e-04 / lr"
    assert any("12 steps with each of 1 pairs" in line for line in said)


def test_fine_tuning_with_several_classes_an_image(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make("voc2007", tmp_path, monkeypatch)
    result = evaluated(checkpoint, tmp_path, mode="finetune", steps=15, lrs=(0.05,), decays=(0.0,))
    assert result.figures["VOC2007"] > 0.9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lrs": (0.0,)}, "lrs must be positive"),
        ({"lrs": ()}, "lrs must be"),
    ]
    + [({"decays": (-1.0,)}, "decays must be numbers from 0"), ({"batch": 0}, "batch must be at least 2")]
    + [({"steps": 10}, "steps must be left out without --mode finetune, got steps=10")],
)
def test_settings_that_cannot_be(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        transfer.Settings(checkpoint="", **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_two_processes_find_what_one_does(mode: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make("voc2007", tmp_path, monkeypatch)
    flags = [
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(tmp_path),
        "--gpus",
        "0",
        "--precision",
        "fp32",
        "--no-cache",
    ]
    flags += ["--mode", mode]
    if mode == "finetune":
        flags += ["--steps", "4", "--lrs", "0.01", "0.03", "--decays", "0", "--batch", "12"]
    found = []
    for ranks in ("1", "2"):
        assert main(["transfer", *flags, "--ranks", ranks, "--out", str(tmp_path / ranks)]) == 0
        (file,) = (tmp_path / ranks).glob("*.json")
        found.append(json.loads(file.read_text()))
    assert found[0]["figures"]["VOC2007"] == pytest.approx(found[1]["figures"]["VOC2007"], abs=0.02)
    assert found[0]["tables"][1] == found[1]["tables"][1]
