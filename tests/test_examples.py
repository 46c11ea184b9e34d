"""Every public function and class has a short example in its docstring, and the examples run."""

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

import nac_gpu
import nac_gpu.testing

#: Public names without code of their own: types of arguments, and modules whose functions are listed one by one.
TYPES = set("Calibration ExampleInputs LimitsByLayer Method Names Neurons Rule Share Width methods testing".split())
#: Records that the library returns and nobody has to make.
RECORDS = set("Cost Epoch LeftAlone AssignmentMethod".split())


def public() -> dict[str, object]:
    """Public functions and classes by name."""
    found = {name: getattr(nac_gpu, name) for name in nac_gpu.__all__ if name not in TYPES}
    methods = {f"methods.{name}": value for name, value in vars(nac_gpu.methods).items() if is_own(value)}
    return {**found, **methods, "testing.check_copies": nac_gpu.testing.check_copies}


def is_own(value: object) -> bool:
    """Whether a name of `nac_gpu.methods` is a public function or class that is defined there."""
    named = inspect.isfunction(value) or inspect.isclass(value)
    return named and value.__module__ == nac_gpu.methods.__name__ and not value.__name__.startswith("_")


def texts(value: object) -> Iterator[str]:
    """The docstrings of a function, or of a class with its public methods and properties."""
    yield inspect.getdoc(value) or ""
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if not name.startswith("_") and (callable(member) or isinstance(member, property | staticmethod)):
                yield inspect.getdoc(member) or ""


def examples(name: str) -> Iterator[doctest.DocTest]:
    """The docstrings that have examples, each with names of its own."""
    for number, text in enumerate(texts(public()[name])):
        names = {"torch": torch, "nn": nn, "nac_gpu": nac_gpu}
        test = doctest.DocTestParser().get_doctest(text, names, f"{name}#{number}", None, None)
        if test.examples:
            yield test


@pytest.mark.parametrize("name", sorted(public()))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    tests = list(examples(name))
    assert tests or name.removeprefix("methods.") in RECORDS, f"{name} has no example in its docstring"
    for test in tests:
        torch.manual_seed(0)
        said: list[str] = []
        outcome = doctest.DocTestRunner().run(test, out=said.append)
        assert not outcome.failed, "".join(said)
