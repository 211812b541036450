"""Every command of docs/training.md, run to its end at toy size: the same words but for paths and sizes."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_fast.record import read_metrics
from tests.train_common import ROOT, images

__all__ = ["images"]  # a fixture is used by its name

PAGE = (ROOT / "docs" / "training.md").read_text()
TOY = "--arch resnet8 --width 0.125 --image-size 16 --batch 16 --epochs 1 --head-features 16 --precision fp32".split()
SIZES = {"--batch": "16", "--epochs": "1", "--bn-chunk": "8", "--arch": "resnet8", "--bn-group": "1"}
CPU = {"--gpus": ["--gpus", "0", "--ranks", "2"]}  # what GPUs do, processes on the CPU do here


def commands():
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def toy(words, images, out):
    """The command with small sizes, on the CPU."""
    words, found = [{"DIR": str(images), "RUN": str(out)}.get(word, word) for word in words], []
    while words:
        word = words.pop(0)
        if word in CPU:
            words.pop(0)
            found += CPU[word] if "torchrun" not in found[0] else ["--gpus", "0"]
        elif word in SIZES:
            words.pop(0)
            found += [word, SIZES[word]]
        else:
            found.append(word)
    return found


TRAIN = [words for words in commands() if words[:3] == ["python", "-m", "simclr_fast.train"]]


def environment():
    exported = dict(words[1].split("=") for words in commands() if words[0] == "export")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | exported


def test_every_kind_of_command_is_run_by_a_test():
    kinds = {words[0] if words[0] != "python" else words[2] if words[1] == "-m" else words[1] for words in commands()}
    # Those of bench/ run in tests/test_step_bench.py and test_cifar10_record.py, docs/slurm.sh in test_slurm.py.
    assert kinds <= {
        *("simclr_fast.train", "simclr_fast.doctor", "torchrun", "export"),
        *("bench/step_bench.py", "bench/cifar10_record.py"),
    }
    assert len(TRAIN) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAIN, ids=[" ".join(words[3:]) for words in TRAIN])
def test_training_commands(words, images, tmp_path):
    given = toy(words, images, tmp_path / "run")
    for flag, value in zip(TOY[::2], TOY[1::2], strict=True):
        given += [] if flag in given else [flag, value]
    given += [] if "--gpus" in given else ["--gpus", "0"]
    given += [] if "--out" in given else ["--out", str(tmp_path / "run")]
    done = subprocess.run(given, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--dry-run" in given:
        assert "learning rate" in done.stdout
        assert not (tmp_path / "run").exists()
    else:
        assert read_metrics(tmp_path / "run")[-1]["finished"]


@pytest.mark.slow
def test_torchrun_on_two_hosts(images, tmp_path):
    """Both on this machine; with networks of their own in test_hosts.py."""
    (words,) = (words for words in commands() if words[0] == "torchrun")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    given = [re.sub(r"HOST1:\d+", f"localhost:{port}", word) for word in toy(words, images, tmp_path / "run")]
    given = [re.sub(r"--nproc-per-node=\d+", "--nproc-per-node=1", word) for word in given]
    given += ["--gpus", "0", *TOY]
    hosts = [
        subprocess.Popen(given, env=environment(), cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    assert read_metrics(tmp_path / "run")[-1]["finished"]
