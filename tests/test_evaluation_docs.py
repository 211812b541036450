"""Every command of docs/evaluation.md, run to its end at toy size: the same words but for paths and sizes."""

import importlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest

import simclr_fast
from simclr_fast import train
from simclr_fast.evaluation.benchmarks import BENCHMARKS, layouts
from tests.tensorflow_common import official_variables
from tests.train_common import ROOT, jpeg
from tests.transfer_miniatures import make

PAGE = (ROOT / "docs" / "evaluation.md").read_text()
SIZES = {"--batch": "32", "--epochs": "1", "--steps": "2"}


def commands():
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


COMMANDS = [words for words in commands() if words[:2] == ["python", "-m"]]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 100), ("test", 10)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.jpg").write_bytes(
                    jpeg(1000 * label + number + 500 * (split == "test"))
                )
    return root


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run of a network that torchvision and timm have too."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = "--arch resnet18 --image-size 40 --batch 50 --epochs 1 --evaluations 1 --gpus 0 --precision fp32".split()
    assert train.main(["--data", str(images), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dtd", "voc2007"):
            make(name, folder, patch)
    return folder


def test_the_page_has_every_protocol_and_format():
    text = " ".join(word for words in COMMANDS for word in words)
    for name in ("knn", "linear", "finetune", "transfer", "probe", "compare", "embed", "import_tf"):
        assert name in text
    for form in ("torchvision", "timm", "safetensors", "onnx", "huggingface"):
        assert f"--format {form}" in text
    others = [words for words in commands() if words not in COMMANDS]
    assert others == [["python", f"bench/{name}_bench.py"] for name in ("knn", "linear")]  # in tests of their own


def test_what_has_to_be_there_is_named():
    readme = (ROOT / "README.md").read_text()
    assert "pip install -e '.[evaluate,export]'" in readme
    for extra in ("evaluate", "export", "timm", "tf"):
        assert f"simclr_fast[{extra}]" in PAGE
        assert f'"{extra}": ' in (ROOT / "setup.py").read_text()
    for name in (*layouts.FIRST_SPLIT.values(), layouts.BACKGROUND):
        assert f"`{name}`" in PAGE
    (sentence,) = re.findall(r"[^.]* have no\s+download", PAGE)
    assert set(re.findall(r"[A-Z]\w+ Cars|[A-Z]\w+", sentence)) == {
        one.title for one in BENCHMARKS.values() if not one.size
    }


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[2:]) for words in COMMANDS])
def test_commands(words, trained, images, sets, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "onnx" in words:
        pytest.importorskip("onnxruntime", reason="needs the extra export")
    if "import_tf" in words[2]:
        np.savez("VARIABLES.npz", **official_variables(request.getfixturevalue("vectors"), "r18_cifar_v1head"))
    paths = {"RUN": str(trained), "DIR": str(images), "SETS": str(sets)}
    if "OTHER" in words:
        paths["OTHER"] = str(shutil.copytree(trained, tmp_path / "other"))
    name, *given = words[2:]
    for place, word in enumerate(given):
        if word in SIZES:
            given[place + 1] = SIZES[word]
    given = [paths.get(word, word) for word in given]
    kind = given[0] if name.endswith("evaluate") else name.rpartition(".")[2]
    if kind == "transfer" and "finetune" in given:
        given += ["--lrs", "0.01", "--decays", "0"]
    if kind == "finetune":
        given += ["--epochs", "1"]
    if kind == "train":
        given += "--arch resnet8 --width 0.125 --image-size 16 --batch 50 --epochs 1 --out run --gpus 0".split()
    elif kind not in ("compare", "export", "import_tf"):
        given += ["--gpus", "0", "--precision", "fp32"]
    status = importlib.import_module(name).main(given)
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    check(kind, given, tmp_path, trained)


def check(kind, given, here, trained):
    """What a command leaves behind."""
    results = [json.loads(path.read_text()) for path in (trained / "evaluations").glob(f"{kind}-*.json")]
    if kind in ("knn", "linear", "finetune", "transfer", "probe"):
        assert results
        assert all(0 <= value <= 1 for result in results for value in result["figures"].values())
        title = {"finetune": "fine-tuned", "probe": "what h keeps"}.get(kind, kind)
        assert title in (trained / "report.html").read_text().lower()
    elif kind == "train":
        last = json.loads((here / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert {"online_top1", "knn_top1"} <= last.keys()
    elif kind == "embed":
        assert np.load(here / "features.npz")["features"].shape == (220, 512)
    elif kind == "compare":
        assert "</html>" in (here / "comparison.html").read_text()
    else:
        assert (here / given[-1]).exists()


@pytest.mark.slow
def test_the_python_of_the_page(trained, images):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    code = code.replace("runs/NAME", str(trained)).replace("image.jpg", str(images / "test" / "ant" / "0.jpg"))
    found = {"simclr_fast": simclr_fast}
    exec(code, found)
    assert found["features"].shape == (1, found["encoder"].num_features)
    assert found["features"].isfinite().all()
