"""Old names of this package and of pickled models, which keep working through this release.

A pickled model contains the old names of the modules that defined its classes. For each of them there is a stand-in
module that forwards to the new place; the first one that is used warns. They are registered in `sys.modules` and not
imported as submodules, because the module `nac_gpu.plan` would replace the function of that name.
"""

import importlib
import sys
import types
import warnings

#: By the old module, where each of the classes is now that pickled models name.
_CLASSES = {
    "attention": {"MultiheadAttention": "network.attention"},
    "cost": {"Cost": "network.costs"},
    "dendrogram": {"Dendrogram": "clustering.dendrogram"},
    "estimator": {"WardClustering": "clustering.estimator"},
    "finetune": {"Epoch": "training.finetuning"},
    "groups": {"LeftAlone": "tracing.graph"},
    "origin": {"Origin": "files.origin"},
    "plan": {"GroupPlan": "planning.plans", "Plan": "planning.plans"},
}
#: Names of the package that are now in `nac_gpu.methods`.
_METHODS = ("METHODS", "kmeans", "random", "ward")


_warned = False


class _Moved(types.ModuleType):
    """A stand-in for a module that was moved."""

    def __getattr__(self, name: str) -> object:
        global _warned
        old = self.__name__.rpartition(".")[2]
        place = _CLASSES[old].get(name)
        if place is None:
            raise AttributeError(f"{self.__name__} is gone, and {name!r} with it; expected public names of nac_gpu")
        if not _warned:
            _warned = True
            warnings.warn(
                f"{self.__name__}.{name} is now nac_gpu.{place}.{name}: this was pickled by an earlier version of "
                "nac_gpu; save it again, the next release cannot read it",
                FutureWarning,
                stacklevel=2,
            )
        return getattr(importlib.import_module(f"nac_gpu.{place}"), name)


def register() -> None:
    """Register the stand-ins, so that pickled models find the old modules."""
    for name in _CLASSES:
        sys.modules.setdefault(f"nac_gpu.{name}", _Moved(f"nac_gpu.{name}"))


def public(name: str) -> object:
    """The object that an old name of the package refers to.

    Raises:
        AttributeError: it is not an old name.
    """
    if name not in _METHODS:
        raise AttributeError(f"module 'nac_gpu' has no attribute {name!r}")
    text = f"nac_gpu.{name} is now nac_gpu.methods.{name}; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module("nac_gpu.clustering.methods"), name)
