import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="without Triton there are no kernels")


def test_every_kernel_compiles_ahead_of_time_without_spills(capsys):
    """For GPUs that need not be there, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_ahead.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    with capsys.disabled():
        print()
        for row in rows:
            print(
                "{kernel} {dtype} sm_{sm}: {instructions} instructions, {barriers} barriers, {registers} registers, "
                "{shared} bytes shared, product loop {product_loop}".format(**row)
            )
    assert {row["sm"] for row in rows} == {80, 90}
    assert {row["dtype"] for row in rows} == {"fp64", "fp32"}
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spill_stores"] == row["spill_loads"] == 0, row
        assert row["barriers"] == 0 or row["kernel"] != "_merge_kernel", row
    products = [row for row in rows if row["dtype"] == "fp64" and row["matrix_instructions"]]
    assert {row["kernel"] for row in products} == {"_distances_kernel", "_search_kernel", "_product_kernel"}
    for row in products:
        if row["kernel"] != "_product_kernel":
            length, matrix = row["product_loop"]  # of 32 steps of 8 x 8 x 4, or 4 of 16 x 8 x 16
            assert length - matrix < 100, row


def test_every_kernel_is_on_the_list():
    import ast

    root = Path(__file__).parents[2] / "kernels"
    script = (Path(__file__).parents[1] / "support" / "compile_ahead.py").read_text()
    found = 0
    for path in root.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found += 1
                assert node.name in script, f"{path.name}: {node.name} is not compiled ahead"
    assert found >= 12
