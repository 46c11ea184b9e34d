"""Old names, which keep working through this release: of pickled models, and of this package.

A model that version 0.2 compressed and `torch.save` wrote names the modules in which its plan was defined then. Each of
them is a stand-in here that warns once and looks in the new place. It is registered, not imported, because importing
`nac_gpu.plan` would put the module in the place of the function.
"""

import importlib
import sys
import types
import warnings

#: By the old module, where each of the classes is now that pickled models name.
_CLASSES = {
    "attention": {"MultiheadAttention": "network.attention"},
    "cost": {"Cost": "network.costs"},
    "groups": {"LeftAlone": "tracing.graph"},
    "origin": {"Origin": "files.origin"},
    "plan": {"GroupPlan": "planning.plans", "Plan": "planning.plans"},
}
#: Names of the package that are now in `nac_gpu.methods`.
_METHODS = ("METHODS", "kmeans", "random", "ward")


class _Moved(types.ModuleType):
    """A module that is not there any more."""

    def __getattr__(self, name: str) -> object:
        old = self.__name__.rpartition(".")[2]
        place = _CLASSES[old].get(name)
        if place is None:
            raise AttributeError(f"{self.__name__} is gone, and {name!r} with it; expected public names of nac_gpu")
        _warn(f"{self.__name__}.{name} is now nac_gpu.{place}.{name}; save the model again")
        found = getattr(importlib.import_module(f"nac_gpu.{place}"), name)
        setattr(self, name, found)  # the next time without a warning
        return found


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
    _warn(f"nac_gpu.{name} is now nac_gpu.methods.{name}")
    return getattr(importlib.import_module("nac_gpu.clustering.methods"), name)


def _warn(text: str) -> None:
    warnings.warn(text + "; the old name goes with the next release", DeprecationWarning, stacklevel=3)
