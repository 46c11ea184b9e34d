"""Kernels that are kept, launched on a stand-in for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="without Triton there are no kernels")


@pytest.fixture(scope="module")
def told():
    """What the stand-in's driver was told, by the work that was asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "launch_standin.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    first, *rest = [json.loads(line) for line in run.stdout.splitlines()]
    return first, {row["work"]: row["runs"] for row in rest}


def test_what_was_compiled_is_launched_as_at_first(told):
    """Triton is asked once; then the same kernel gets the same arguments without it."""
    for name in ("distances", "panels", "search", "packing", "seeding"):
        first, *later = told[1][name]
        assert first["asked"] > 0
        for run in later:
            assert run["asked"] == 0, name
            assert run["launches"] == first["launches"], name


@pytest.mark.parametrize("name", ["rounds", "finishing"])
def test_the_number_of_the_round_is_passed_on(name, told):
    runs = told[1][name]
    numbers = {7, 8, 9} if name == "rounds" else {0, 1, 2}
    kernel, place = ("_merge_kernel", -2) if name == "rounds" else ("_finish_kernel", -4)
    found = [launch for run in runs for launch in run["launches"] if launch["function"] == f"function of {kernel}"]
    assert {launch["arguments"][place] for launch in found} == numbers
    for launch in found:
        launch["arguments"][place] = None
        assert launch == found[0]


@pytest.mark.parametrize("name", ["a_view", "a_view_in_a_group"])
def test_what_was_compiled_for_aligned_memory_is_not_launched_on_other(name, told):
    aligned, not_aligned, aligned_again = told[1][name]
    assert [run["asked"] for run in (aligned, not_aligned, aligned_again)] == [1, 1, 0]
    assert aligned["launches"] == aligned_again["launches"] != not_aligned["launches"]


def test_products_are_made_by_whom_the_compiled_code_asks_for(told):
    """On Hopper Triton 3.5 to 3.7 use the matrix instruction that runs at the full rate, 3.8 and 3.9 do not."""
    version = told[0]["triton"]
    if not version.startswith(("3.5.", "3.6.", "3.7.", "3.8.", "3.9.")):
        pytest.skip(f"not known of Triton {version}")
    assert told[0]["products"] == ("panels" if version.startswith(("3.8.", "3.9.")) else "tiles")
