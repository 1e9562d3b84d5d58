"""A peer in a process of its own, seen from here. It may crash, hang, or print what it likes: that is a refusal.

Rounds stay interleaved, since a process measures only when it is asked; between two questions it sleeps.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any

import numpy as np

from . import exchange, threads
from .peers.row import Peer
from .scenarios import Scenario

PATIENCE = 120.0  # seconds for an answer; the slowest one imports a framework and compiles


class Refused(Exception):
    """What a process says instead of an answer."""


class Process:
    """One worker. After a refusal that ended it, the next question starts a new one."""

    def __init__(self, peer: Peer, count: int, patience: float) -> None:
        self.peer, self.count, self.patience = peer, count, patience
        self.child: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; Refused if it is a refusal, or if there is none."""
        child = self.child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            line = self.lines.get(timeout=self.patience)
        except queue.Empty:
            self.end()
            raise Refused(f"was ended: no answer within {self.patience:g} s") from None
        except OSError:  # it is gone already
            line = ""
        if not line:
            raise Refused(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "refusal" in answer:
            raise Refused(answer["refusal"])
        return answer

    def end(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.reader.join()
            assert self.child.stdin is not None
            with suppress(BrokenPipeError):
                self.child.stdin.close()
            self.child = None
            self.errors.close()

    def _start(self) -> subprocess.Popen[str]:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed in `end`)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            f"{__package__}.worker",
            self.peer.apart,
            str(self.count),
        ]
        child = subprocess.Popen(
            command,
            env=threads.environment(self.count),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who asks
        )
        self.reader = Thread(target=_read, args=(child.stdout, self.lines), daemon=True)
        self.reader.start()
        self.child = child  # from now on there is a reader to be joined; an interrupt may come at any moment
        return child

    def _last_words(self) -> str:
        """Why the process ended, as well as can be told."""
        assert self.child is not None
        code = self.child.wait()
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        self.end()
        return f"its process ended with code {code}" + (f": {said[-1].strip()}" if said else "")


def _read(answers: IO[str], lines: queue.SimpleQueue[str]) -> None:
    with answers:
        for line in answers:
            lines.put(line)
    lines.put("")  # nothing more will come


class Apart:
    """A peer's call in its process: built, with the result of one call, then timed when asked."""

    def __init__(self, process: Process, folder: Path, scenario: Scenario) -> None:
        self.process = process
        name = f"result-{process.peer.name}"
        build = {"folder": str(folder), "scenario": scenario.name, "dtype": scenario.dtype, "result": name}
        self.once: float = process.ask(**build)["seconds"]
        self.result: np.ndarray = exchange.get(folder, name)

    def seconds(self, times: int) -> float:
        took: float = self.process.ask(times=times)["seconds"]
        return took


class Company:
    """The processes of a run, one for each peer that needs one, and the folder where scenarios lie for them."""

    def __init__(self, count: int, patience: float = PATIENCE) -> None:
        self.count, self.patience = count, patience
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> Company:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, at: TracebackType | None) -> None:
        for process in self.processes.values():
            process.end()

    def invite(self, peer: Peer, folder: Path, scenario: Scenario) -> Apart:
        """Build a peer's call; Refused if it cannot."""
        if peer.name not in self.processes:
            self.processes[peer.name] = Process(peer, self.count, self.patience)
        return Apart(self.processes[peer.name], folder, scenario)
