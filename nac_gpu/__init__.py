"""Neuron agglomerative clustering: make a trained PyTorch model smaller by merging similar neurons.

small = nac_gpu.compress(model, example_inputs, params=0.25)
labels = nac_gpu.ward_linkage(points).cut(10)
"""

from nac_gpu import moved, testing
from nac_gpu.assembly.settings import Method, Neurons, Rule
from nac_gpu.calibration.batches import Calibration
from nac_gpu.calibration.text import text_batches
from nac_gpu.clustering import methods
from nac_gpu.clustering.dendrogram import Dendrogram
from nac_gpu.clustering.estimator import WardClustering
from nac_gpu.clustering.linkage import ward_linkage
from nac_gpu.clustering.methods import AssignmentMethod
from nac_gpu.compression import compress, plan
from nac_gpu.experts.merging import merge_experts
from nac_gpu.files.exporting import export
from nac_gpu.files.models import load, save
from nac_gpu.files.opening import open_model
from nac_gpu.network.costs import Cost
from nac_gpu.network.counting import cost
from nac_gpu.network.machine import package_version
from nac_gpu.network.running import ExampleInputs
from nac_gpu.planning.plans import GroupPlan, Plan
from nac_gpu.planning.request import LimitsByLayer, Names, Share, Width
from nac_gpu.reporting.contents import Report
from nac_gpu.reporting.making import report
from nac_gpu.tracing.graph import LeftAlone
from nac_gpu.training.finetuning import Epoch, finetune

__version__ = package_version()

__all__ = [
    "AssignmentMethod",
    "Calibration",
    "Cost",
    "Dendrogram",
    "Epoch",
    "ExampleInputs",
    "GroupPlan",
    "LeftAlone",
    "LimitsByLayer",
    "Method",
    "Names",
    "Neurons",
    "Plan",
    "Report",
    "Rule",
    "Share",
    "WardClustering",
    "Width",
    "compress",
    "cost",
    "export",
    "finetune",
    "load",
    "merge_experts",
    "methods",
    "open_model",
    "plan",
    "report",
    "save",
    "testing",
    "text_batches",
    "ward_linkage",
]

moved.register()


def __getattr__(name: str) -> object:
    """Names that moved since version 0.2, with a deprecation warning: see `nac_gpu.moved`."""
    return moved.public(name)
