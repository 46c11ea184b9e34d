"""What is ready for a GPU, rehearsed on a CPU: a step that fails, hangs, or lacks a package takes no other with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STEPS = ("machine", "smoke", "times", "neurons", "vgg16", "tests", "compress", "default", "large")


def run(script: str, output: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(output),
        "DEVICE": "cpu",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",  # other tests run beside this one
    } | settings
    return subprocess.run(
        [EXPERIMENTS / script, output], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def interpreter(folder: Path, body: str) -> str:
    """A program in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_every_step_is_run_and_what_failed_is_told(tmp_path: Path) -> None:
    """With an interpreter that refuses everything but benchmarks."""
    fake = interpreter(tmp_path, 'case "$*" in *" bench "*) echo "measured $*";; *) exit 3;; esac')
    done = run("gpu_check.sh", tmp_path / "out", PYTHON=fake)
    assert done.returncode == 1
    for name in STEPS:
        failed = name not in ("neurons", "vgg16", "large")
        assert f"=== {name}: exit status {3 if failed else 0}" in done.stdout
        assert (f"FAILED {name}: exit status 3" in done.stdout) == failed
    assert "measured experiments/gpu_steps.py bench --preset neurons" in done.stdout
    assert (tmp_path / "out" / "gpu_check.log").read_text() == done.stdout


def test_what_hangs_is_interrupted_and_then_killed(tmp_path: Path) -> None:
    """The one ends when it is interrupted and says so, the other does not listen; both lose only their own time."""
    body = """case "$*" in
        *" smoke "*) trap "echo so far; exit 1" INT; while :; do sleep 0.1; done;;
        *" times "*) trap "" INT; echo deaf; while :; do sleep 1; done;;
        *) echo "done $*";;
    esac"""
    fake = interpreter(tmp_path, body)
    done = run("gpu_check.sh", tmp_path / "out", PYTHON=fake, LIMIT="1", STEPS="smoke times neurons")
    assert done.returncode == 1
    for line in ("so far", "deaf", "FAILED smoke: stopped after 1 s", "FAILED times: stopped after 1 s"):
        assert line in done.stdout
    assert "=== neurons: exit status 0" in done.stdout


def test_when_the_time_is_used_up_the_rest_is_told(tmp_path: Path) -> None:
    fake = interpreter(tmp_path, "sleep 3")
    done = run("gpu_check.sh", tmp_path / "out", PYTHON=fake, BUDGET="2", STEPS="smoke times large")
    assert "FAILED smoke: stopped after 2 s" in done.stdout
    assert "FAILED times: not run, the time was used up" in done.stdout
    assert "FAILED large: not run, the time was used up" in done.stdout


def without(folder: Path, *packages: str) -> str:
    """A folder for PYTHONPATH in which these packages are not installed, as far as Python sees."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        hidden = name.partition('.')[0] in {packages}\n"
        "        return None if hidden else super().find_spec(name, path, target)\n"
        "sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    return str(folder)


def test_packages_that_are_missing(tmp_path: Path) -> None:
    hidden = without(tmp_path / "hidden", "scipy", "sklearn", "fastcluster", "tyro", "tqdm", "matplotlib", "pytest")
    done = run("gpu_check.sh", tmp_path / "out", PYTHONPATH=hidden, STEPS="machine smoke times neurons tests")
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    failed = {name: row["said"] for name, row in found["steps"]["smoke"].items() if not row["passed"]}
    assert set(failed) == {f"{way} 40x8 against SciPy" for way in ("batched", "resident", "matrix-free")}
    assert set(failed.values()) == {"ModuleNotFoundError: No module named 'scipy'"}
    assert all(row["passed"] for row in found["steps"]["times"].values())
    assert "=== neurons: exit status 0" in done.stdout
    rows = json.loads((tmp_path / "out" / "linkage_cpu.json").read_text())["rows"]
    assert {(row["provider"], row["status"]) for row in rows} == {("nac_gpu", "ok"), ("floor", "computed")}
    assert "FAILED tests: exit status 1" in done.stdout  # No module named pytest
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_compressions_and_the_second_script_are_rehearsed(tmp_path: Path) -> None:
    done = run("gpu_check.sh", tmp_path / "out", STEPS="compress")
    assert done.returncode == 0, done.stdout
    checks = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["steps"]["compress"]
    assert len(checks) >= 12
    done = run("gpu_sanitise.sh", tmp_path / "out", STEPS="memcheck compress_time")
    assert done.returncode == 0, done.stdout
    assert "all steps passed" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.fixture
def runner(tmp_path: Path) -> tuple[Path, Path]:
    """A program of four checks, of which the second fails and the third never ends; and its results."""
    program, results = tmp_path / "program.py", tmp_path / "checks.json"
    program.write_text(
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from common.runner import Runner\n"
        "def fail():\n    raise ValueError('wrong\\nand more')\n"
        "def hang():\n    time.sleep(100)\n"
        "first = int(sys.argv[-1].removeprefix('--first=')) if len(sys.argv) > 1 else 0\n"
        f"runner = Runner('step', torch.device('cpu'), Path({str(results)!r}), first, limit=1.0)\n"
        "checks = [('good', lambda: 'fine'), ('bad', fail), ('endless', hang), ('last', lambda: {'ms': 1.5})]\n"
        "sys.exit(runner.run(checks))\n"
    )
    return program, results


def test_a_check_that_fails_or_never_ends_takes_no_other_with_it(runner: tuple[Path, Path]) -> None:
    program, results = runner
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS)}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    checks = json.loads(results.read_text())["steps"]["step"]
    assert {name: row["said"] for name, row in checks.items()} == {
        "good": "fine",
        "bad": "ValueError: wrong",
        "endless": "no end after 1 s",
        "last": {"ms": 1.5},
    }
    assert [row["passed"] for row in checks.values()] == [True, False, False, True]
    assert "step: 2 passed, 2 failed" in done.stdout
