"""configs/elastic.sh on two machines: two network namespaces of this one, joined by a virtual cable.

Each waits for what it needs, up to a bound; none depends on how long something takes. `sh tests/run.sh --machines`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_run import ROOT, environment, losses, make_pictures, weights_differ, write_data

pytestmark = pytest.mark.machines

BOUND = 240
"""Seconds that anything may take before it counts as hanging."""
SAMPLES = 96
STEPS = 48
ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def cable() -> Iterator[None]:
    """Two namespaces, each with one end of a virtual cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the program ip (apt-get install iproute2)")
    try:
        for machine in ADDRESS:
            ip("netns", "add", f"vlm-{machine}")
        ip("link", "add", "end", "netns", "vlm-a", "type", "veth", "peer", "name", "end", "netns", "vlm-b")
    except subprocess.CalledProcessError as error:
        unplug()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        for machine, address in ADDRESS.items():
            ip("-n", f"vlm-{machine}", "addr", "add", f"{address}/24", "dev", "end")
            for link in ("lo", "end"):
                ip("-n", f"vlm-{machine}", "link", "set", link, "up")
        yield
    finally:
        unplug()


def unplug() -> None:
    for machine in ADDRESS:
        die(machine)
        subprocess.run(["ip", "netns", "del", f"vlm-{machine}"], capture_output=True)


def die(machine: str) -> None:
    """Kill every process of a machine at once."""
    found = subprocess.run(["ip", "netns", "pids", f"vlm-{machine}"], capture_output=True, text=True).stdout
    for process in found.split():
        os.kill(int(process), 9)


class Cluster:
    """Starts train.py on both machines through configs/elastic.sh, and reads what they have done so far."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.folder, self.flags = folder, flags
        self.run, self.record = folder / "run", folder / "record.jsonl"
        shim = folder / "bin/torchrun"  # in place of train.py, the program that also records
        shim.parent.mkdir()
        real = Path(sys.executable).parent / "torchrun"
        words = ["#!/bin/sh", 'for word do shift; [ "$word" = train.py ] && word=tests/recorded_train.py']
        shim.write_text("\n".join([*words, 'set -- "$@" "$word"; done', f'exec {real} "$@"', ""]))
        shim.chmod(0o755)

    def start(self, machine: str, **further: str) -> subprocess.Popen[bytes]:
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        is_first = str(int(machine == "a"))
        env = environment(PATH=path, HOST=ADDRESS["a"], LOCAL_ADDR=ADDRESS[machine], FIRST=is_first, GPUS="1")
        env |= {"GLOO_SOCKET_IFNAME": "end", "RECORD": str(self.record), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        env |= {"STEP_SECONDS": "0.3", **further}
        command = ["ip", "netns", "exec", f"vlm-{machine}", "sh", str(ROOT / "configs/elastic.sh"), *self.flags]
        with self.log(machine).open("ab") as log:
            return subprocess.Popen([*command, "--output_dir", str(self.run)], env=env, stdout=log, stderr=log)

    def log(self, machine: str) -> Path:
        return self.folder / f"{machine}.log"

    def batches(self, *, processes: int, after: int = 0) -> list[dict]:
        """The batches that so many processes have trained on, of those after the first `after`."""
        return [line for line in self.lines()[after:] if line["processes"] == processes]

    def lines(self) -> list[dict]:
        text = self.record.read_text() if self.record.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def until(self, what: str, condition: Callable[[], object]) -> None:
        end = time.monotonic() + BOUND
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(
                    self.log(machine).read_text()[-3000:] for machine in ADDRESS if self.log(machine).exists()
                )
                pytest.fail(f"{what}: not within {BOUND} seconds\n{logs}")
            time.sleep(0.1)


@pytest.fixture
def cluster(cable, base_flags, tmp_path) -> Cluster:
    colours = list(make_pictures(tmp_path / "pictures"))
    samples = [(f"{colours[i % 6]}.png", (f"Question {i}?<|extra_0|>", colours[i % 6])) for i in range(SAMPLES)]
    data = write_data(tmp_path, samples, tmp_path / "pictures")
    flags = ["--num_train_epochs", "1", "--per_device_train_batch_size", "1", "--global_batch_size", "2"]
    flags += ["--lora_rank", "4", "--lora_dropout", "0", "--learning_rate", "1e-3"]
    flags += ["--save_steps", "4", "--logging_steps", "1", "--report_to", "none"]
    return Cluster(tmp_path, [*map(str, base_flags), *map(str, data), *flags])


def test_a_machine_dies_returns_and_the_first_one_dies(cluster, tmp_path):
    a, b = cluster.start("a"), cluster.start("b")
    cluster.until("both train", lambda: len(cluster.batches(processes=2)) >= 12)

    die("b")
    done = len(cluster.lines())
    cluster.until("a trains alone", lambda: len(cluster.batches(processes=1, after=done)) >= 8)
    assert a.poll() is None

    done = len(cluster.lines())
    b = cluster.start("b")
    cluster.until("b is back", lambda: len(cluster.batches(processes=2, after=done)) >= 8)

    die("a")  # which holds the list of the machines
    cluster.until("b ends", lambda: b.poll() is not None)
    assert b.returncode == 1
    last = last_line(cluster, "b")
    for word in ("connection", "--resume_from_checkpoint auto"):
        assert word in last

    a = cluster.start("a", STEP_SECONDS="0")  # by hand
    assert a.wait(BOUND) == 0
    shutil.move(cluster.record, tmp_path / "disturbed.jsonl")
    shutil.move(cluster.run, tmp_path / "disturbed")

    assert cluster.start("a", STEP_SECONDS="0").wait(BOUND) == 0
    assert_same_training(cluster, tmp_path)


def test_a_cable_is_pulled(cluster, tmp_path):
    """A machine that is cut off says nothing, so that the other one waits for it as long as a group's timeout is."""
    patient = {"GROUP_TIMEOUT": "20"}
    a, b = (cluster.start(machine, **patient) for machine in ADDRESS)
    cluster.until("both train", lambda: len(cluster.batches(processes=2)) >= 12)
    ip("-n", "vlm-b", "link", "set", "end", "down")
    done = len(cluster.lines())
    cluster.until("a trains alone", lambda: len(cluster.batches(processes=1, after=done)) >= 1)
    assert a.wait(BOUND) == 0
    die("b")
    b.wait()
    shutil.move(cluster.record, tmp_path / "disturbed.jsonl")
    shutil.move(cluster.run, tmp_path / "disturbed")
    assert cluster.start("a", STEP_SECONDS="0").wait(BOUND) == 0
    assert_same_training(cluster, tmp_path)


def last_line(cluster: Cluster, machine: str) -> str:
    """The last line of a log; a program of its own writes it once torchrun has ended."""
    text = ""

    def is_said() -> bool:
        nonlocal text
        text = cluster.log(machine).read_text().rstrip().rsplit("\n", 1)[-1]
        return text.startswith("train.py: ")

    cluster.until(f"{machine} says why", is_said)
    return text


def assert_same_training(cluster: Cluster, tmp_path: Path) -> None:
    """What counts of the disturbed run: every sample once, and losses and weights of a run that nothing disturbed."""
    found, expected = effective_steps(tmp_path / "disturbed.jsonl"), effective_steps(cluster.record)
    assert {step: sorted(ids) for step, ids in found.items()} == {step: sorted(ids) for step, ids in expected.items()}
    assert len(found) == STEPS
    assert sorted(index for ids in found.values() for index in ids) == list(range(SAMPLES))
    last = f"checkpoint-{STEPS}"
    assert losses(tmp_path / "disturbed" / last) == pytest.approx(losses(cluster.run / last), rel=1e-4)
    assert weights_differ(tmp_path / "disturbed", cluster.run) <= 1e-4


def effective_steps(record: Path) -> dict[int, list[int]]:
    """The IDs of each step, of the last meeting of machines that took it; the work of earlier ones was lost."""
    taken: dict[int, dict[str, list[int]]] = {}
    for text in record.read_text().splitlines():
        line = json.loads(text)
        taken.setdefault(line["step"], {}).setdefault(line["meeting"], []).extend(line["ids"])
    return {step: list(meetings.values())[-1] for step, meetings in taken.items()}
