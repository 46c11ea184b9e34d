"""Ward clustering as a scikit-learn-compatible estimator. scikit-learn itself is not needed."""

import operator
import sys
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nac_gpu.clustering.linkage import ward_linkage

if TYPE_CHECKING:
    from sklearn.utils import Tags


_DEFAULT_CLUSTERS = 2  # the default of scikit-learn's AgglomerativeClustering


@dataclass(eq=False)
class WardClustering:
    """Exact Ward clustering on the device of the points, like `AgglomerativeClustering(linkage="ward")`.

    The points may be a tensor on any device, an array that supports DLPack or the CUDA array interface (CuPy, JAX), or
    anything that NumPy converts: arrays, lists, data frames. Work is done on the device of the points (the CPU for
    NumPy's), and the results are of the same type on the same device. They are tensors if the library of the points
    has no `from_dlpack` (Numba).

    The estimator works in scikit-learn's pipelines and passes `check_estimator`, with one exception: weights of zero
    are an error, because a point without mass fits every cluster equally well.

    Args:
        n_clusters: number of clusters, 1 to the number of points. None means 2 if `distance_threshold` is None too.
        distance_threshold: merges at this height or above are not made. Give at most one of the two parameters.

    Attributes:
        labels_: int64 [n], the cluster of every point, numbered by first appearance.
        children_: int64 [n - 1, 2], the two clusters that each merge joins: below n the points themselves, n + i the
            result of merge i.
        distances_: float64 [n - 1], the height of each merge, non-decreasing.
        n_clusters_: number of clusters found.
        n_leaves_: n, the number of points.
        n_features_in_: number of columns of the points.
        feature_names_in_: object [n_features_in_], the names of the columns, only for data frames whose column names
            are all strings.
        dendrogram_: the `Dendrogram` in float64, to be cut at other numbers of clusters.

    >>> nac_gpu.WardClustering(2).fit_predict([[0, 0], [0, 1], [5, 5]])
    array([0, 0, 1])
    """

    n_clusters: int | None = None
    distance_threshold: float | None = field(default=None, kw_only=True)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "WardClustering":
        """Cluster the points.

        Args:
            X: [n, d], n and d at least 1, finite real numbers of any dtype. Takes the memory of n² float64 at most.
            y: ignored; scikit-learn's pipelines pass it.
            sample_weight: [n], the mass of every point, positive; None for unit masses. A point of mass 3 counts as
                three equal points. May have another type, or be on another device, than X.

        Returns:
            This estimator.

        Raises:
            TypeError: X or sample_weight is sparse or not of numbers, or a parameter is of the wrong type.
            ValueError: the shape or values of X, sample_weight or a parameter are not as described, or both
                parameters are given.
        """
        points = _as_tensor(X, "X")
        _check_shape(points)
        n, d = points.shape
        names = _column_names(X)
        clusters, threshold = self._check_parameters(n)
        weights = None
        if sample_weight is not None:
            weights = _as_tensor(sample_weight, "sample_weight").to(points.device)
            if (weights == 0).any():
                raise ValueError("sample_weight has a zero, expected positive weights; drop points without mass")

        dendrogram = ward_linkage(points, weights)
        if threshold is not None:
            clusters = n - int((dendrogram.heights < threshold).sum())

        self.labels_ = _in_the_kind_of(X, dendrogram.cut(clusters))
        self.children_ = _in_the_kind_of(X, dendrogram.merges)
        self.distances_ = _in_the_kind_of(X, dendrogram.heights)
        self.n_clusters_, self.n_leaves_, self.n_features_in_ = clusters, n, d
        self.dendrogram_ = dendrogram
        if names is not None:
            self.feature_names_in_ = names
        elif hasattr(self, "feature_names_in_"):  # left over from an earlier fit
            del self.feature_names_in_
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """The labels that `fit` finds, int64 [n]. Arguments and errors are those of `fit`."""
        return self.fit(X, y, sample_weight).labels_

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name; `deep` has no effect, because no parameter is an estimator."""
        return {parameter.name: getattr(self, parameter.name) for parameter in fields(self)}

    def set_params(self, **params: Any) -> "WardClustering":
        """Change parameters, and return this estimator. `fit` checks them.

        Raises:
            ValueError: there is no such parameter. No parameter is changed then.
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise ValueError(f"{name!r} is no parameter of {self}; expected one of {', '.join(known)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> "Tags":
        from sklearn.utils import Tags, TargetTags  # imported here: only scikit-learn itself calls this method

        return Tags(estimator_type="clusterer", target_tags=TargetTags(required=False))

    def _check_parameters(self, n: int) -> tuple[int, float | None]:
        """The number of clusters, an int in [1, n], and the threshold, which takes precedence unless it is None."""
        clusters, threshold = self.n_clusters, self.distance_threshold
        if threshold is not None:
            if clusters is not None:
                raise ValueError(
                    f"n_clusters is {clusters!r} and distance_threshold is {threshold!r}, expected at most one of "
                    "them; set the other to None"
                )
            if isinstance(threshold, bool) or not isinstance(threshold, Real):
                raise TypeError(f"distance_threshold is {threshold!r}, expected a number; give a merge height")
            if not threshold >= 0:  # true for NaN too
                raise ValueError(f"distance_threshold is {threshold}, expected 0 or more; give a merge height")
            return n, float(threshold)
        try:
            if isinstance(clusters, bool):
                raise TypeError
            count = _DEFAULT_CLUSTERS if clusters is None else operator.index(clusters)
        except TypeError:
            raise TypeError(f"n_clusters is {clusters!r}, expected an integer from 1 to n_samples = {n}") from None
        if not 1 <= count <= n:
            raise ValueError(f"n_clusters is {count}, expected 1 to n_samples = {n}; choose it in that range")
        return count, None


def _as_tensor(values: Any, name: str) -> Tensor:
    """The values as a float64 tensor on their device; NumPy arrays and other dtypes are copied."""
    if hasattr(values, "todense") or (isinstance(values, Tensor) and values.layout != torch.strided):
        raise TypeError(f"{name} is sparse, expected a dense array; use {name}.toarray() or {name}.to_dense()")
    if isinstance(values, Tensor):
        tensor = values
    elif _lends_memory(values):
        # DLPack first: unlike the CUDA array interface, it also covers CPU memory and other accelerators.
        tensor = torch.from_dlpack(values) if hasattr(values, "__dlpack__") else torch.as_tensor(values)
    else:
        array = np.asarray(values)
        if array.dtype.kind not in "biufcO":
            raise TypeError(f"{name} has dtype {array.dtype}, expected numbers; encode it as numbers first")
        # A copy, because torch supports neither read-only memory nor negative strides nor foreign byte order.
        tensor = torch.from_numpy(np.array(array, dtype=None if array.dtype.kind == "c" else np.float64))
    if tensor.is_complex():
        # scikit-learn's check_estimator looks for the first words of this message.
        raise ValueError(f"Complex data not supported: {name} has dtype {tensor.dtype}, expected real numbers")
    return tensor.to(torch.float64)


def _in_the_kind_of(values: Any, result: Tensor) -> Any:
    """The result in the array type of the values: a tensor, a NumPy array, or another library's array by DLPack."""
    if isinstance(values, Tensor):
        return result
    if not _lends_memory(values):
        return result.numpy()
    if hasattr(values, "__array_namespace__"):
        library = values.__array_namespace__()
    else:
        library = sys.modules.get(type(values).__module__.partition(".")[0])
    from_dlpack = getattr(library, "from_dlpack", None)
    return result if from_dlpack is None else from_dlpack(result)


def _lends_memory(values: Any) -> bool:
    """Whether torch can use the memory of the values. Not for NumPy, whose arrays may have dtypes that torch lacks."""
    if isinstance(values, np.ndarray):
        return False
    return hasattr(values, "__dlpack__") or hasattr(values, "__cuda_array_interface__")


def _check_shape(points: Tensor) -> None:
    shape = tuple(points.shape)
    if points.ndim != 2:
        raise ValueError(f"X has shape {shape}, expected (n_samples, n_features); use X.reshape(n_samples, -1)")
    for number, what in zip(shape, ("sample(s)", "feature(s)"), strict=True):
        if number == 0:  # scikit-learn's check_estimator looks for exactly this message
            raise ValueError(f"X has 0 {what} (shape={shape}) while a minimum of 1 is required.")


def _column_names(values: Any) -> np.ndarray | None:
    """The column names of a data frame, object [d], if all are strings.

    Raises:
        TypeError: some are strings and some not.
    """
    columns = list(getattr(values, "columns", ()))
    strings = [isinstance(column, str) for column in columns]
    if not any(strings):
        return None
    if not all(strings):
        raise TypeError("X has columns with and without string names, expected all or none; use strings throughout")
    return np.array(columns, dtype=object)
