"""A Ray cluster of several nodes on this machine, started as an operator would, whose nodes can be lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
from runs import command_line, descendants
from servers import free_port

RAY = str(Path(sys.executable).with_name("ray"))


class Nodes:
    """A head and any number of worker nodes, each with a raylet of its own; `close` ends all of them.

    variables: of every node's environment, where credentials belong.
    """

    def __init__(self, folder: Path, *, head_cpus: int, variables: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.gcs, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **os.environ,
            **(variables or {}),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self._temporary = tempfile.mkdtemp(prefix="crossray-", dir="/tmp")  # sockets have short names or none
        self._start(
            "--head",
            f"--port={self.gcs}",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-port={dashboard}",
            num_cpus=head_cpus,
        )
        self._wait_for(f"{self.address}/api/version")

    def add_node(self, *, num_cpus: int, resources: Mapping[str, float] | None = None) -> int:
        """A further node, with custom resources where given; its number for `kill_node`.

        One after the other: raylets that start on one machine at the same moment now and then time out.
        """
        before = self._num_alive()
        for _ in range(3):
            offered = f"--resources={json.dumps(dict(resources or {}))}"
            self._start(f"--address=127.0.0.1:{self.gcs}", offered, num_cpus=num_cpus)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and self._processes[-1].poll() is None:
                if self._num_alive() > before:
                    return len(self._processes) - 1
                time.sleep(0.5)
            self.kill_node(len(self._processes) - 1)
        log = (self.folder / f"node-{len(self._processes) - 1}.log").read_text()
        pytest.fail(f"a node did not start: {log[-2000:]}")

    def pids(self) -> dict[int, int]:
        """Process ids of the nodes that run, by number; 0 is the head."""
        return {number: own.pid for number, own in enumerate(self._processes) if own.poll() is None}

    def with_process(self, title: str) -> list[int]:
        """The worker nodes on which a process of this title runs."""
        return [
            number
            for number, pid in self.pids().items()
            if number and any(title in command_line(own) for own in descendants(pid))
        ]

    def _num_alive(self) -> int:
        with urllib.request.urlopen(f"{self.address}/nodes?view=summary", timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
        return sum(node["raylet"]["state"] == "ALIVE" for node in summary)

    def kill_node(self, number: int) -> None:
        """SIGKILL everything of a node at once, as when its machine is gone."""
        process = self._processes[number]
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it went with its parent
        process.wait()

    def close(self) -> None:
        """End every node."""
        for number in reversed(range(len(self._processes))):
            if self._processes[number].poll() is None:
                self.kill_node(number)
        shutil.rmtree(self._temporary, ignore_errors=True)  # a killed node's last children may still write

    def _start(self, *options: str, num_cpus: int) -> None:
        first = 20_000 + os.getpid() % 200 * 200 + 50 * len(self._processes)
        command = [
            *(RAY, "start", "--block", "--disable-usage-stats", *options, f"--num-cpus={num_cpus}"),
            *(f"--min-worker-port={first}", f"--max-worker-port={first + 49}", "--object-store-memory=200000000"),
            f"--dashboard-agent-listen-port={free_port()}",  # jobs go through it; the usual one may be taken
            # A node that unpacks a job's files removes what lies there: two nodes must never share the place.
            f"--temp-dir={self._temporary}/{len(self._processes)}",
        ]
        with (self.folder / f"node-{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment)
        self._processes.append(process)

    def _wait_for(self, url: str) -> None:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    log = (self.folder / "node-0.log").read_text()
                    self.close()
                    pytest.fail(f"the cluster did not start: {log[-2000:]}")
            time.sleep(0.2)
