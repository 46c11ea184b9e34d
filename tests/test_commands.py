"""Every command on the pages is executed: here, with its page (test_docs.py), or where a table of this file says."""

import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pages import PAGES, ROOT, commands
from standins import write_mnist, write_tree

import nac_gpu as nac

FOUND = sorted({command.removeprefix("python ") for page in PAGES for command in commands(page)})
INSTALLATIONS = [command for command in FOUND if command.startswith("pip install ")]
#: What .ci/run calls from a fresh clone.
CI = ("make lint", "make test")
#: What other tests execute, with what is left open filled in.
TESTS = {
    "nac COMMAND --help": "test_cli.py::test_the_installed_command_explains_itself_and_its_exit_codes",
    "nac compress --finetune FOLDER": "test_cli.py::test_an_interrupted_training_goes_on",
    "make coverage": "test_commands.py::test_coverage_is_the_tests_with_a_count",
    "pre-commit install": "test_docs.py::test_pre_commit_runs_what_make_lint_runs",
    "nac compress FOLDER --calibration text.txt --output NEW_FOLDER": "test_texts.py::"
    "test_the_folder_of_a_language_model_is_complete",
    "nac compress --open": "test_cli.py::test_weights_that_stay_in_their_files",
    "nac compress --experts 0.5": "test_cli.py::test_fewer_experts_and_fewer_neurons",
    "torchrun --nproc-per-node 8": "test_experiments.py::test_two_processes_measure_what_one_does",
    # They need texts or inputs, and trained weights.
    "experiments/language.py --model FOLDER --calibration valid.txt --test test.txt more.txt --windows 12": (
        "test_language.py::test_every_method_is_measured_once"
    ),
    "experiments/language.py --task embeddings --model FOLDER --calibration valid.txt --test test.txt more.txt "
    "--tokens 8192 --sentences 200": "test_language.py::test_every_method_is_measured_once",
    "experiments/any_model.py MODULE:FUNCTION --inputs inputs.npy --test test.npy": (
        "test_any_model.py::test_every_way_is_measured_once"
    ),
    "experiments/mixtures.py --folder FOLDER --train valid.txt test.txt --test test.txt more.txt": (
        "test_mixtures_compared.py::test_every_method_is_measured_once"
    ),
    # On a CPU: its steps, by an interpreter that only pretends.
    "experiments/gpu_check.sh": "test_gpu_check.py::test_every_step_is_run_and_what_failed_is_told",
    "DEVICE=cpu experiments/gpu_check.sh OUTPUT_FOLDER": "test_gpu_check.py::test_packages_that_are_missing",
    "experiments/gpu_sanitise.sh": "test_gpu_check.py::test_compressions_and_the_second_script_are_rehearsed",
}
EXPERIMENTS = [command for command in FOUND if re.match(r"experiments/\w+\.py", command) and command not in TESTS]
HERE = ("make demo", "make docs", "docs/figures.py")

#: What stands at the end of an experiment's command: less of everything, and no file of the repository is written.
SMALLER = {
    "vgg_cifar": "--multiplier 0.0625 --epochs 1 --finetune-epochs 1 --batch-size 8 --device cpu",
    "mnist_dbn": "--data PATH --seeds 0 --rbm-epochs 1 --epochs 1 --finetune-epochs 1 1 --device cpu --results .",
    "mnist_cnn": "--seeds 0 --epochs 1 --finetune-epochs 1 --device cpu --results .",
    "compare": "--data PATH --multiplier 0.0625 --epochs 1 --shares 0.25 --images 16 --device cpu --rules 'L1 filters' "
    "'Ward, dreams (default)' Torch-Pruning 'GSM, zeros counted'",  # all of them: test_compare.py
    "combined": "--data PATH --multiplier 0.0625 --epochs 1 --images 16 --seconds 0.1",
    "budgets": "--models squeezenet1_1 --size 64 --results budgets.json",
    "compress_time": "--networks resnet20 --images 16 --refine 1 --steps 1 --device cpu --results compress_time.json",
    "latency": "--models squeezenet1_1 --size 64 --batch-sizes 1 2 --latencies --seconds 0.2 --device cpu "
    "--results latency.json",
    "bench_linkage": "--preset quick --repetitions 1 --providers scipy nac_gpu --device cpu --results linkage.json",
    "zoo": "--suite handwritten --models siren --results zoo.json",
}


def test_every_command_is_executed_somewhere() -> None:
    known = {*EXPERIMENTS, *INSTALLATIONS, *CI, *TESTS, *HERE}
    assert set(FOUND) == known, "on the left: nothing executes it; on the right: it is on no page any more"
    continuous = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert set(CI) <= set(continuous)
    for test in TESTS.values():
        file, _, name = test.partition("::")
        (path,) = (ROOT / "tests").rglob(file)
        assert f"\ndef {name}(" in path.read_text(encoding="utf-8"), test


def exit_code(script: str) -> object:
    """Run a script in this process, as `python` would."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.usefixtures("short_dreams")
@pytest.mark.parametrize("command", EXPERIMENTS)
def test_an_experiment_runs_as_the_page_says(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a few made-up images, and with less of everything; what the command says otherwise holds."""
    script, *given = shlex.split(command)
    name = Path(script).stem
    data = tmp_path / "data"
    (write_mnist if name.startswith("mnist") else write_tree)(data)
    given += shlex.split(SMALLER[name])
    arguments = [str(data) if argument == "PATH" else argument for argument in given]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
    assert not exit_code(sys.argv[0])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) >= 3
    (results,) = tmp_path.rglob("*.json")
    stored = json.loads(results.read_text(encoding="utf-8"))
    rows = (stored["seeds"]["0"] if "seeds" in stored else stored)["rows"]
    assert rows
    if name == "zoo":  # it goes on where a model failed
        assert all(row["seconds"] for row in rows.values())


def extras_with(extra: str) -> dict[str, set[str]]:
    """An extra and all that it asks for -> the packages of each."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, set[str]] = {}
    left = {extra}
    while left:
        extra = left.pop()
        asked = [Requirement(line) for line in project["optional-dependencies"][extra]]
        found[extra] = {one.name for one in asked} - {project["name"]}
        left |= {other for one in asked if one.name == project["name"] for other in one.extras} - set(found)
    return found


@pytest.mark.parametrize("command", INSTALLATIONS)
def test_what_is_to_be_installed_exists(command: str) -> None:
    """CI runs this command with the extra `lint`, which asks for all the others; so what they name is here."""
    assert command.startswith("pip install -e ")
    extras = Requirement(command.split()[-1].strip("'").replace(".", "nac-gpu", 1)).extras
    known = extras_with("lint")
    assert extras <= set(known)
    for extra in extras:
        assert all(metadata.version(package) for package in known[extra])
    assert "pip install --quiet --editable '.[$*]'" in (ROOT / "Makefile").read_text(encoding="utf-8")


def make(target: str, folder: Path, *variables: str) -> str:
    """What a target prints; its virtual environment is this interpreter's, so that nothing is installed."""
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    for extra in ("experiments", "docs", "test"):
        (folder / "venv" / f".{extra}").touch()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-C", ROOT, target, f"VENV={folder / 'venv'}", *variables]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip" not in done.stdout
    return done.stdout


def test_coverage_is_the_tests_with_a_count(tmp_path: Path) -> None:
    """That it would run what `make test` runs, and counts lines."""
    plain, counted = (make(target, tmp_path / target, "--dry-run") for target in ("test", "coverage"))
    command = plain.strip().replace(f"{tmp_path}/test/", f"{tmp_path}/coverage/")
    assert " -m pytest " in command
    assert "--cov" not in command
    assert counted.strip() == f"{command} --cov --cov-report=term --cov-fail-under=95"


def test_the_demo_trains_compresses_and_fine_tunes(tmp_path: Path) -> None:
    printed = make("demo", tmp_path, f"OUTPUT={tmp_path / 'runs'}").splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed if line.startswith("| ")]
    assert lines[0] == ["network", "parameters", "FLOPs", "error %", "fine-tuned %"]
    rows = {name: cells for name, *cells in lines[2:]}
    assert list(rows) == ["original", "default, without data", "with unlabelled images", "the paper's rule"]
    parameters = {name: int(cells[0].replace(",", "")) for name, cells in rows.items()}
    error = {name: float(cells[2]) for name, cells in rows.items()}
    tuned = {name: float(cells[3]) for name, cells in rows.items() if cells[3] != "-"}
    assert set(rows) - set(tuned) == {"original"}
    assert error["original"] < 4
    assert error["default, without data"] <= error["original"] + 2
    assert error["with unlabelled images"] <= error["original"] + 2
    assert all(found < 6 for found in tuned.values())
    assert all(8 * parameters[name] <= parameters["original"] for name in tuned)
    assert parameters["the paper's rule"] == parameters["default, without data"]
    last = r"gained: 8\.\d\d. fewer parameters, \d\.\d\d. fewer FLOPs, test error (\S+) % -> (\S+) % without data .*"
    gained = re.fullmatch(last, printed[-1])
    assert gained is not None
    assert [float(figure) for figure in gained.groups()] == [error["original"], error["default, without data"]]
    assert (tmp_path / "runs" / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_the_reference_has_every_public_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # of what is installed, not of what the current folder holds
    make("docs", tmp_path, f"REFERENCE={tmp_path / 'reference'}")
    reference = (tmp_path / "reference" / "nac_gpu.html").read_text(encoding="utf-8")
    modules = [name for name in nac.__all__ if inspect.ismodule(getattr(nac, name))]
    assert [name for name in nac.__all__ if f'id="{name}"' not in reference and name not in modules] == []
    assert (tmp_path / "reference" / "nac_gpu" / "testing.html").exists()
    for name in modules:
        page = getattr(nac, name).__name__.replace(".", "/") + ".html"
        assert (tmp_path / "reference" / page).exists(), page


def test_the_figures_are_drawn_from_the_tutorial(tmp_path: Path) -> None:
    for name in ("figures.py", "tutorial.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    runpy.run_path(str(tmp_path / "figures.py"), run_name="__main__")
    assert (tmp_path / "figures" / "tree.png").read_bytes()[:4] == b"\x89PNG"
