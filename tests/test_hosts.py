"""Several hosts: network namespaces with names, addresses and a cable of their own, torchrun in each of them."""

import os
import subprocess
import sys

import pytest

from simclr_fast.record import read_metrics
from tests import train_common
from tests.faults_common import SLOWED
from tests.processes import environment, until
from tests.train_common import SMALL, assert_same_bits

images = train_common.images
pytestmark = pytest.mark.slow
PORT = 29400
# What a host does at its start: it takes its name, and knows those of the others without asking a server.
ENTER = """echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2" /etc/hosts; mount --bind "$3" /etc/resolv.conf
shift 3; exec "$@"
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def needed():
    """Why there can be no hosts here, or None."""
    try:
        ip("netns", "add", f"simclr{os.getpid()}try")
        ip("netns", "del", f"simclr{os.getpid()}try")
    except (OSError, subprocess.CalledProcessError):
        return "needs root and network namespaces"


class Hosts:
    """Two hosts that share a file system and a cable, which can be pulled."""

    def __init__(self, root):
        self.root, self.spaces = root, [f"simclr{os.getpid()}n{n}" for n in (1, 2)]
        (root / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n")
        (root / "resolv.conf").touch()
        (root / "slowed.py").write_text(SLOWED)
        self.pause(0.2)
        for space in self.spaces:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            self.spaces[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            self.spaces[1],
        )
        for n, space in enumerate(self.spaces, 1):
            ip("-n", space, "addr", "add", f"10.77.0.{n}/24", "dev", "cable")
            ip("-n", space, "link", "set", "cable", "up")
            ip("-n", space, "link", "set", "lo", "up")
        self.started = []

    def start(self, n, *command, log):
        """Start a command on host n, 1 or 2."""
        env = environment(
            PYTHONPATH=self.root, PAUSE=self.root / "pause", STALL="nothing", TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        )
        files = [str(self.root / name) for name in ("hosts", "resolv.conf")]
        enter = ["ip", "netns", "exec", self.spaces[n - 1], "unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh"]
        cores = sorted(os.sched_getaffinity(0))
        core = ["taskset", "-c", str(cores[n % len(cores)])]  # one, so that sums have the same order in every test
        with open(log, "a") as file:
            process = subprocess.Popen([*enter, f"node{n}", *files, *core, *command], env=env, stdout=file, stderr=file)
        self.started.append(process)
        return process

    def pause(self, seconds):
        """Have every step take so much longer."""
        (self.root / "pause").write_text(str(seconds))

    def cable(self, state):
        """Pull the cable at host 2 (`down`), or put it back (`up`)."""
        ip("-n", self.spaces[1], "link", "set", "cable", state)

    def close(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()  # its ranks end with it
                process.wait()
        for space in self.spaces:
            ip("netns", "del", space)


@pytest.fixture
def hosts(tmp_path):
    if reason := needed():
        pytest.skip(reason)
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


class Job:
    """A run in a folder that both hosts see, started by torchrun on each."""

    def __init__(self, hosts, images, *flags, module="slowed"):
        self.hosts, self.out, self.module = hosts, hosts.root / "run", module
        self.flags = ["--data", str(images), *SMALL, *flags]

    def torchrun(self, n, *options, ranks=1):
        """Start the documented command on host n."""
        launcher = [
            f"--nproc-per-node={ranks}",
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=node1:{PORT}",
        ]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, *options, "-m", self.module]
        return self.hosts.start(n, *command, *self.flags, "--out", str(self.out), log=self.log(n))

    def alone(self, *flags):
        """Start the run on one host, which has no fault, in another folder; that, and its process."""
        out = self.hosts.root / "one"
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
        train = [sys.executable, "-m", "simclr_fast.train", *self.flags, "--out", str(out), *flags]
        command = ["taskset", "-c", cores, *train]
        with open(self.hosts.root / "one.log", "w") as log:
            process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        self.hosts.started.append(process)
        return out, process

    def log(self, n):
        return self.hosts.root / f"host{n}.log"

    def end(self, n):
        """The end of the log of host n."""
        return self.log(n).read_text()[-5000:]

    def reach(self, step, *processes):
        """Wait until this step is recorded, as long as all the processes run."""

        def ended():
            return any(one.poll() is not None for one in processes)

        until(lambda: [row["step"] for row in read_metrics(self.out)][-1:] >= [step] or ended(), lambda: self.end(1))
        assert not ended(), self.end(1)

    def says(self, n, text, *, times=1):
        """Wait until the log of host n holds this text so many times."""
        until(lambda: self.log(n).read_text().count(text) >= times, lambda: self.end(n))


def test_two_hosts_of_two_ranks_learn_what_one_host_of_four_learns_bit_for_bit(hosts, images):
    job = Job(hosts, images, module="simclr_fast.train")
    two = [job.torchrun(n, "--nnodes=2", ranks=2) for n in (1, 2)]
    out, one = job.alone("--ranks", "4")
    assert [process.wait(300) for process in (one, *two)] == [0, 0, 0], job.end(1)
    assert_same_bits(job.out, out)


def test_a_cable_that_is_pulled_and_put_back_costs_a_restart_and_changes_no_bit(hosts, images):
    job = Job(hosts, images, "--epochs", "10", "--timeout", "15")
    two = [job.torchrun(n, "--nnodes=2", "--rdzv-conf=read_timeout=300") for n in (1, 2)]
    out, one = job.alone("--ranks", "2")
    job.reach(3, *two)
    hosts.cable("down")
    job.says(1, "exitcode: 1")
    hosts.cable("up")
    assert [process.wait(300) for process in (one, *two)] == [0, 0, 0], job.end(1)
    assert_same_bits(job.out, out)


def test_the_host_that_is_left_goes_on_alone_and_the_other_one_comes_back(hosts, images):
    job = Job(hosts, images, "--epochs", "40", "--timeout", "15")
    options = ["--nnodes=1:2", "--rdzv-conf=read_timeout=300,last_call_timeout=5"]
    two = [job.torchrun(n, *options) for n in (1, 2)]
    out, one = job.alone("--ranks", "2")
    job.reach(3, *two)
    hosts.cable("down")
    hosts.pause(0.5)
    job.says(1, "(1 process,")
    hosts.cable("up")
    job.says(1, "(2 processes,", times=2)
    hosts.pause(0)
    assert [process.wait(300) for process in (one, *two)] == [0, 0, 0], job.end(1)
    assert [row["step"] for row in read_metrics(job.out)] == [row["step"] for row in read_metrics(out)]
    losses = [[row["loss"] for row in read_metrics(folder)][:20] for folder in (job.out, out)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # rounding grows from step to step
