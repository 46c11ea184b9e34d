"""Many small checks in one process, of which none takes the others with it."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nac_gpu.network.machine import environment
from nac_gpu.network.timing import synchronise

#: What is checked: a name, and a function that raises, or gives what there is to say.
Check = tuple[str, Callable[[], Any]]


@dataclass
class Runner:
    """Runs checks one after another, and notes each in a file as soon as it is done.

    A check that fails says so and the next one runs. A kernel that reads where it must not leaves CUDA unusable in its
    process, and one that never ends cannot be stopped: then this process is replaced by a new one, which goes on with
    the check after it.

    Attributes:
        step: the name under which the file keeps the checks.
        device: where they run.
        path: the JSON file, which other steps write to as well.
        first: the check to begin with; those before were done by a process that this one replaces.
        limit: seconds that a check may take.
    """

    step: str
    device: torch.device
    path: Path
    first: int = 0
    limit: float = 60.0
    _content: dict[str, Any] = field(default_factory=dict)

    def run(self, checks: Sequence[Check]) -> int:
        """Run them; 1 if any failed, also of those that ran before, else 0."""
        self._content = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self._content.setdefault("environment", environment(self.device) | _versions())
        rows: dict[str, Any] = self._content.setdefault("steps", {}).setdefault(self.step, {})
        if self.first == 0:
            rows.clear()
        for number, (name, check) in enumerate(checks[self.first :], self.first):
            watch = threading.Timer(self.limit, self._go_on_after, (number, name, f"no end after {self.limit:.0f} s"))
            watch.daemon = True
            watch.start()
            start = time.perf_counter()
            try:
                said = check()
                synchronise(self.device)
            except Exception as error:  # one that fails must not stop the others
                watch.cancel()
                traceback.print_exc()
                why = f"{type(error).__name__}: {error}".splitlines()[0][:500]
                if not self._usable():
                    self._go_on_after(number, name, f"{why}; CUDA cannot be used any more in this process")
                self._note(name, False, time.perf_counter() - start, why)
                continue
            watch.cancel()
            self._note(name, True, time.perf_counter() - start, said)
        failed = [name for name, row in rows.items() if not row["passed"]]
        print(f"{self.step}: {len(rows) - len(failed)} passed, {len(failed)} failed", flush=True)
        return int(bool(failed))

    def _note(self, name: str, passed: bool, seconds: float, said: Any) -> None:
        self._content["steps"][self.step][name] = {"passed": passed, "seconds": round(seconds, 3), "said": said}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)
        words = said if isinstance(said, str) else "" if said is None else json.dumps(said)
        print(f"{'ok    ' if passed else 'FAILED'} {name} ({seconds:.2f} s) {words}", flush=True)

    def _go_on_after(self, number: int, name: str, why: str) -> None:
        """Replace this process by one that begins with the next check."""
        self._note(name, False, self.limit, why)
        sys.stdout.flush()
        sys.stderr.flush()
        arguments = [argument for argument in sys.argv if not argument.startswith("--first=")]
        os.execv(sys.executable, [sys.executable, *arguments, f"--first={number + 1}"])

    def _usable(self) -> bool:
        try:
            synchronise(self.device)
        except RuntimeError:
            return False
        return True


def _versions() -> dict[str, str]:
    """Of what matters here besides PyTorch; what is not installed is left out."""
    from importlib import metadata

    found = {}
    for package in ("triton", "numpy", "scipy", "scikit-learn", "fastcluster", "pytest", "torchvision", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
