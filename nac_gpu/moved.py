"""Old names, which keep working through this release: of pickled models, and of this package.

A pickled model names the modules in which the classes of its plan were defined when it was written. Each of these modules
is a stand-in here that looks in the new place; the first one that is asked warns. They are registered, not imported,
because importing `nac_gpu.plan` would put the module in the place of the function.
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
    """A module that is not there any more."""

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
    """Let pickled models find the old modules."""
    for name in _CLASSES:
        sys.modules.setdefault(f"nac_gpu.{name}", _Moved(f"nac_gpu.{name}"))


def public(name: str) -> object:
    """What an old name of the package stands for.

    Raises:
        AttributeError: it is no old name.
    """
    if name not in _METHODS:
        raise AttributeError(f"module 'nac_gpu' has no attribute {name!r}")
    text = f"nac_gpu.{name} is now nac_gpu.methods.{name}; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module("nac_gpu.clustering.methods"), name)
