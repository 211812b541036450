"""The command `evaluate`: what it prints, writes and refuses, on a small run; two at once; several processes."""

import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from simclr_fast import evaluate, load
from simclr_fast.config import ConfigError
from simclr_fast.data.sources.samples import alone
from simclr_fast.evaluation.job import Job
from simclr_fast.evaluation.knn import Settings
from simclr_fast.evaluation.measures import confusion, mean_per_class, per_class, top_k
from simclr_fast.evaluation.results import LOCK, in_training, read_all, turn
from simclr_fast.record import claimed
from tests.processes import environment
from tests.train_common import ROOT, images, jpeg, run

__all__ = ["images"]  # a fixture is used by its name


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(images, out) == 0
    return out


@pytest.fixture
def copy(trained, tmp_path, monkeypatch):
    """Of the run, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    return tmp_path / "run"


def knn(folder, *flags):
    return evaluate.main(["knn", "--checkpoint", str(folder), "--gpus", "0", "--precision", "fp32", *flags])


def results(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]


def test_a_result_is_printed_written_and_reported(copy, capsys):
    assert knn(copy) == 0
    said = capsys.readouterr().out
    (found,) = results(copy)
    assert f"top-1 {found['figures']['top-1']:.2%}" in said
    assert found["protocol"] == "knn"
    assert found["step"] == 8
    assert found["counts"] == {"training images": 40, "test images": 10, "neighbours": 20}
    assert found["settings"]["temperature"] == 0.1
    assert sum(number for _, _, number in found["confusion"]) == 10
    assert sum(number for k, j, number in found["confusion"] if k == j) / 10 == found["figures"]["top-1"]
    assert "knn" in (copy / "report.html").read_text().lower()
    assert knn(copy) == 0
    assert len(results(copy)) == 1  # it takes the place of the one before
    assert knn(copy, "--k", "3", "--layer", "both") == 0
    assert {"top-1 of z", "top-5 of z"} < results(copy)[0]["figures"].keys() | results(copy)[1]["figures"].keys()
    assert [one["settings"]["k"] for one in read_all(copy / "evaluations")] == [20, 3]
    assert knn(copy, "--k", "20") == 0
    assert len(results(copy)) == 2  # k is 20 without the flag too


def test_the_trainers_own_accuracy_is_the_same(copy):
    last = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    assert knn(copy) == 0
    assert results(copy)[0]["figures"]["top-1"] == pytest.approx(last["knn_top1"], abs=1e-6)


def test_two_processes_find_what_one_finds(copy):
    assert knn(copy, "--no-cache") == 0
    assert knn(copy, "--no-cache", "--ranks", "2", "--out", str(copy / "two")) == 0
    (one,), (two,) = results(copy), [json.loads(path.read_text()) for path in (copy / "two").glob("*.json")]
    for name in ("figures", "confusion", "counts", "name"):
        assert one[name] == two[name]


def test_a_run_in_training_is_said_and_its_report_left(copy, capsys):
    before = (copy / "report.html").read_text()
    assert not in_training(copy)
    with claimed(copy):
        assert in_training(copy)
        assert knn(copy) == 0
    said = capsys.readouterr().out
    assert f"{copy} is still being trained: this is of that file as it is" in said
    assert "last.pt, step 8" in said
    assert (copy / "report.html").read_text() == before
    assert len(results(copy)) == 1


def test_other_ranks_ask_no_trainer(copy, monkeypatch):
    """That would take its lock for an instant, once for each rank."""
    ranks = SimpleNamespace(main=False, say=print, from_main=lambda compute, **_: False)
    encoder = SimpleNamespace(step=8, origin="x", recipe=SimpleNamespace(arch="resnet8"))
    monkeypatch.setattr(evaluate, "Job", lambda *_: SimpleNamespace(run=copy, encoder=encoder))
    monkeypatch.setattr(evaluate, "in_training", None)
    asked = []
    evaluate.evaluate(SimpleNamespace(run=lambda *given: asked.append(given)), None, ranks)
    assert len(asked) == 1


def test_two_at_once(copy):
    command = [sys.executable, "-m", "simclr_fast.evaluate", "knn", "--checkpoint", str(copy), "--gpus", "0"]
    both = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [(one.communicate(timeout=300)[1], one.returncode) for one in both] == [("", 0), ("", 0)]
    (found,) = results(copy)
    assert found["figures"]
    assert (copy / "report.html").read_text().count("</html>") == 1


def folder(root, **parts):
    for part, classes in parts.items():
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                (root / part / name / f"{number}.jpg").write_bytes(jpeg(len(part) * 1000 + len(name) * 100 + number))
    return root


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"train": {"ant": 2, "bee": 2}, "test": {"ant": 1, "wasp": 2}}, r"none of 1 \(wasp\)"),
        ({"train": {"ant": 2, "bee": 2}, "test": {"wasp": 2, "fly": 1}}, r"none of 2 \(fly, wasp\)"),
        ({"train": {"ant": 2, "bee": 2}}, "must have labelled test images"),
        ({"train": {".": 4}, "test": {".": 4}}, "must have labels"),
    ],
)
def test_data_that_cannot_be_classified(copy, tmp_path, capsys, parts, said):
    assert knn(copy, "--data", str(folder(tmp_path / "other", **parts))) == 2
    capsys.readouterr()
    with pytest.raises(Exception, match=said):
        job(copy, tmp_path / "other").labelled()


def test_images_that_cannot_be_read_are_told_and_kept_in_the_result(copy, images, tmp_path, capsys):
    data = tmp_path / "damaged"
    subprocess.run(["cp", "-r", images, data], check=True)
    (data / "train" / "ant" / "3.jpg").write_text("no image")
    assert knn(copy, "--data", str(data)) == 0
    (found,) = results(copy)
    said = "left out 1 images that cannot be read, the first train/ant/3.jpg"
    assert any(note.startswith(said) for note in found["notes"])
    assert said in capsys.readouterr().out
    assert found["counts"]["training images"] == 39


def job(run_folder, data):
    from simclr_fast.distributed import Ranks

    return Job(Settings(checkpoint=str(run_folder), data=str(data)), Ranks(use_gpu=False), lambda text: None)


def test_one_image_a_class_and_a_class_that_is_not_tested(copy, tmp_path):
    data = folder(tmp_path / "other", train={"ant": 1, "bee": 1, "wasp": 1}, test={"ant": 1, "bee": 1})
    assert knn(copy, "--data", str(data), "--k", "1") == 0
    (found,) = results(copy)
    assert found["classes"] == ["ant", "bee", "wasp"]
    assert found["counts"]["test images"] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["knnn"], "did you mean 'knn'?"),
        (["knn", "--checkpoint", "NOWHERE"], "got 'NOWHERE'"),
        (["knn", "--checkpoint", "RUN", "--k", "0"], "k must be at least 1, got k=0"),
        (["knn", "--checkpoint", "RUN", "--layer", "g"], "invalid choice 'g'"),
        (["knn", "--checkpoint", "RUN", "--temperature", "nan"], "temperature must be finite, got temperature=nan"),
        (["knn", "--checkpoint", "RUN", "--width", "2"], "width must be left out without --arch, got width=2.0"),
        (["knn", "--checkpoint", "RUN", "--arch", "resnet50"], "arch must be that of the checkpoint, resnet8"),
        (["knn", "--checkpoint", "RUN", "--gpus", "99"], "gpus must be at most the number of visible GPUs"),
        (["knn", "--checkpoint", "RUN", "--data", "NOWHERE"], "data must be an existing path"),
    ],
)
def test_bad_flags(trained, capsys, flags, said):
    try:
        status = evaluate.main([str(trained) if flag == "RUN" else flag for flag in flags])
    except SystemExit as stopped:  # of the parser
        status = stopped.code
    assert status == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (trained / "evaluations").exists()


def test_ranks_with_other_encoders_or_data_are_refused(trained, images, monkeypatch):
    from simclr_fast.distributed import Ranks

    ranks, asked = Ranks(use_gpu=False), []

    def differ(value, complaint):
        asked.append(value)
        if len(asked) < 3 or len(asked) > 4:
            raise ConfigError(complaint)

    monkeypatch.setattr(ranks, "agree", differ)
    found = Job(Settings(checkpoint=str(trained), data=str(images)), ranks, lambda text: None)
    assert asked == [found.encoder.digest()] * 3  # a run that goes on writes other checkpoints meanwhile
    assert found.dataset
    asked.clear()
    asked += "abcd"
    with pytest.raises(ConfigError, match="checkpoint must be the same on every rank"):
        Job(Settings(checkpoint=str(trained)), ranks, lambda text: None)


def test_an_encoder_without_a_head_has_no_z(trained, tmp_path):
    torch.save(load(trained).network.state_dict(), tmp_path / "bare.pt")
    flags = ["--arch", "resnet8", "--width", "0.125", "--image-size", "16", "--layer", "both"]
    assert knn(tmp_path / "bare.pt", *flags, "--data", "shapes") == 2


def test_usage_and_help(capsys):
    assert evaluate.main([]) == 2
    assert "knn" in capsys.readouterr().err
    assert evaluate.main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    for protocol in evaluate.PROTOCOLS:
        with pytest.raises(SystemExit) as ended:
            evaluate.main([protocol, "--help"])
        assert ended.value.code == 0
        assert f"simclr_fast.evaluate {protocol}" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_cannot_be_written_is_said_before_the_work(copy, capsys, monkeypatch):
    (copy / "evaluations").write_text("a file")
    monkeypatch.setattr("simclr_fast.evaluation.knn.run", None)
    assert knn(copy) == 2
    assert "out must be a folder that can be written" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_printed_all_the_same(copy, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simclr_fast.evaluation.results.write_text", full)
    assert knn(copy) == 2
    said = capsys.readouterr()
    assert "top-1 " in said.out
    assert "out must be a folder that can be written, got" in said.err
    assert "No space left on device" in said.err
    assert results(copy) == []


def test_turns_are_taken_by_a_file_that_is_open_for_writing(tmp_path):
    """As locks of network file systems want it."""
    settings, entered = Settings(checkpoint="", out=str(tmp_path)), threading.Event()

    def wait():
        with turn(settings):
            entered.set()

    other = threading.Thread(target=wait)
    with alone(tmp_path / LOCK):
        other.start()
        assert not entered.wait(0.3)
    other.join(60)
    assert entered.is_set()


def test_measures():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]])
    truth = torch.tensor([1, 2, 2, 0])
    assert top_k(scores, truth, 1) == 0.5
    assert top_k(scores, truth, 2) == 1.0  # of equal scores the first wins
    tied = torch.zeros(10, 10)
    assert [top_k(tied, torch.arange(10), k) for k in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert top_k(tied.log(), torch.arange(10), 10) == 0.0
    assert top_k(scores, truth, 5) == 1.0
    counts = confusion(truth, scores.argmax(1), 4)
    assert counts == [[0, 1, 1], [1, 1, 1], [2, 0, 1], [2, 2, 1]]
    assert per_class(counts) == {0: 0.0, 1: 1.0, 2: 0.5}
    assert mean_per_class(counts) == 0.5
