"""Neuron agglomerative clustering: make a trained PyTorch model smaller by merging similar neurons.

small = nac_gpu.compress(model, example_inputs, width=0.5)
labels = nac_gpu.ward_linkage(points).cut(10)
"""

from nac_gpu.clustering import METHODS, AssignmentMethod, kmeans, random, ward
from nac_gpu.compress import compress
from nac_gpu.cost import Cost, cost
from nac_gpu.dendrogram import Dendrogram
from nac_gpu.estimator import WardClustering
from nac_gpu.experts import merge_experts
from nac_gpu.export import export
from nac_gpu.files import load, save
from nac_gpu.finetune import Epoch, finetune
from nac_gpu.groups import LeftAlone
from nac_gpu.linkage import ward_linkage
from nac_gpu.opening import open_model
from nac_gpu.plan import GroupPlan, Plan, plan
from nac_gpu.report import Report, report
from nac_gpu.widths import Calibration, LimitsByLayer, Share, Width

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "AssignmentMethod",
    "Calibration",
    "Cost",
    "Dendrogram",
    "Epoch",
    "GroupPlan",
    "LeftAlone",
    "LimitsByLayer",
    "Plan",
    "Report",
    "Share",
    "WardClustering",
    "Width",
    "compress",
    "cost",
    "export",
    "finetune",
    "kmeans",
    "load",
    "merge_experts",
    "open_model",
    "plan",
    "random",
    "report",
    "save",
    "ward",
    "ward_linkage",
]
