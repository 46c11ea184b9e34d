import copy
import pickle
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone, is_clusterer
from sklearn.cluster import AgglomerativeClustering
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_clustering, parametrize_with_checks

from nac_gpu import WardClustering, ward_linkage
from nac_gpu.clustering.estimator import _as_tensor

EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": "weights of zero are an error: such points are in no cluster",
}

with warnings.catch_warnings():
    # WardClustering cannot inherit from BaseEstimator without needing scikit-learn.
    warnings.filterwarnings("ignore", "Estimator WardClustering does not inherit from `sklearn.base.BaseEstimator`")
    scikit_learn_checks = parametrize_with_checks(
        [WardClustering()], expected_failed_checks=lambda estimator: EXPECTED_FAILURES
    )


@scikit_learn_checks
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("readonly_memmap", [False, True])
def test_scikit_learn_check_of_clusterers(readonly_memmap):
    """scikit-learn yields this one only for what inherits from its ClusterMixin."""
    check_clustering("WardClustering", WardClustering(), readonly_memmap=readonly_memmap)


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def blobs(n, d, count, spread, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, d))[rng.integers(0, count, n)] + spread * rng.standard_normal((n, d))


def first_appearance(labels):
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse]


# No two merges of any of these have the same height, so there is one right answer.
INPUTS = {
    "two": lambda: normal(2, 1),
    "low": lambda: normal(200, 2),
    "high": lambda: normal(90, 300),
    "blobs": lambda: blobs(300, 8, 12, 0.1),
    "far": lambda: normal(80, 5) + 1e4,
    "single precision": lambda: normal(100, 6).astype(np.float32),
    "half precision": lambda: normal(40, 6).astype(np.float16),
    "integers": lambda: np.random.default_rng(0).integers(0, 10**6, (60, 3)),
    "unsigned integers": lambda: np.random.default_rng(0).integers(0, 2**16, (60, 3), dtype=np.uint16),
    "big-endian": lambda: normal(50, 4).astype(">f8"),
    "objects": lambda: normal(30, 4).astype(object),
    "list": lambda: normal(30, 4).tolist(),
    "upside down": lambda: normal(60, 4)[::-1, ::-1],
    "by column": lambda: np.asfortranarray(normal(60, 4)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_equals_scikit_learn(name):
    X = INPUTS[name]()
    k = max(2, len(X) // 7)
    expected = AgglomerativeClustering(k, linkage="ward", compute_distances=True).fit(X)
    found = WardClustering(k).fit(X)
    np.testing.assert_array_equal(found.labels_, first_appearance(expected.labels_))
    np.testing.assert_array_equal(found.children_, expected.children_)
    np.testing.assert_allclose(found.distances_, expected.distances_, rtol=1e-10)
    assert found.n_clusters_ == expected.n_clusters_ == k
    assert found.n_leaves_ == expected.n_leaves_ == len(X)
    assert found.n_features_in_ == expected.n_features_in_
    for values, dtype in ((found.labels_, np.int64), (found.children_, np.int64), (found.distances_, np.float64)):
        assert type(values) is np.ndarray
        assert values.dtype == dtype


def test_two_clusters_by_default():
    X = normal(50, 3)
    np.testing.assert_array_equal(
        WardClustering().fit_predict(X), first_appearance(AgglomerativeClustering().fit_predict(X))
    )


@pytest.mark.parametrize("threshold", [0.5, 2, np.float32(3), 1e9])
def test_threshold_equals_scikit_learn(threshold):
    X = normal(120, 3)
    expected = AgglomerativeClustering(None, distance_threshold=threshold).fit(X)
    found = WardClustering(distance_threshold=threshold).fit(X)
    np.testing.assert_array_equal(found.labels_, first_appearance(expected.labels_))
    assert found.n_clusters_ == expected.n_clusters_ == found.labels_.max() + 1


@pytest.mark.parametrize(
    ("threshold", "clusters"), [(0, 8), (0.5, 7), (1, 7), (1.5, 5), (2, 5), (np.nextafter(2, 3), 4)]
)
def test_threshold_equal_to_a_height(threshold, clusters):
    """The merges are at 0, 1, 1 and 2, exactly, and then far higher: one at the threshold is not made."""
    X = np.array([[0], [0], [100], [101], [300], [301], [500], [502]])
    found = WardClustering(distance_threshold=threshold).fit(X)
    expected = AgglomerativeClustering(None, distance_threshold=threshold).fit(X)
    np.testing.assert_array_equal(found.labels_, first_appearance(expected.labels_))
    assert found.n_clusters_ == expected.n_clusters_ == clusters


def test_threshold_equal_to_its_own_heights():
    X = normal(60, 4)
    heights = WardClustering().fit(X).distances_
    for row, height in enumerate(heights.tolist()):
        assert WardClustering(distance_threshold=height).fit(X).n_clusters_ == 60 - row
    assert WardClustering(distance_threshold=float("inf")).fit(X).n_clusters_ == 1


@pytest.mark.parametrize("kind", [list, np.array, lambda masses: torch.tensor(masses, dtype=torch.int32)])
def test_weights_are_repeated_points(kind):
    X = normal(40, 5)
    masses = np.random.default_rng(1).integers(1, 5, 40)
    weighted = WardClustering(7).fit(X, sample_weight=kind(masses.tolist()))
    repeated = WardClustering(7).fit(X.repeat(masses, axis=0))
    np.testing.assert_array_equal(weighted.labels_.repeat(masses), repeated.labels_)
    np.testing.assert_allclose(weighted.distances_, repeated.distances_[-39:], rtol=1e-11)
    np.testing.assert_array_equal(WardClustering(7).fit_predict(X, None, masses), weighted.labels_)
    assert (WardClustering(7).fit(X).distances_ != weighted.distances_).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16])
def test_tensors_stay_tensors_on_their_device(dtype, device):
    X = (10 * torch.tensor(normal(70, 6), device=device)).to(dtype)
    before = X.clone()
    if dtype.is_floating_point:
        X.requires_grad_()
    found = WardClustering(5).fit(X, sample_weight=np.arange(1, 71))
    expected = ward_linkage(X.detach().double(), torch.arange(1, 71, device=device))
    assert torch.equal(found.labels_, expected.cut(5))
    assert torch.equal(found.children_, expected.merges)
    assert torch.equal(found.distances_, expected.heights)
    assert found.distances_.dtype == torch.float64
    for values in (found.labels_, found.children_, found.distances_, found.dendrogram_.sizes):
        assert values.device.type == device.type
        assert not values.requires_grad
    assert torch.equal(X.detach(), before)
    assert torch.equal(found.dendrogram_.cut(9), expected.cut(9))


def test_one_point(device):
    found = WardClustering(1).fit(torch.ones(1, 3, device=device))
    assert found.labels_.tolist() == [0]
    assert found.children_.shape == (0, 2)
    assert found.distances_.shape == (0,)
    assert WardClustering(distance_threshold=0).fit([[3.0]]).n_clusters_ == 1


class Lender:
    """What torch knows nothing of, but which lends its memory as DLPack."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class StandardLender(Lender):
    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda values: StandardLender(torch.from_dlpack(values)))


@pytest.fixture
def cupy_like(monkeypatch):
    """A class in the inner module of a package that has from_dlpack, as CuPy's ndarray."""
    library = types.ModuleType("cupy_like")
    array = type("ndarray", (Lender,), {"__module__": "cupy_like._core.core"})
    library.from_dlpack = lambda values: array(torch.from_dlpack(values))
    monkeypatch.setitem(sys.modules, "cupy_like", library)
    return array


def assert_lent(kind, result_kind, device):
    X = torch.tensor(normal(50, 4), device=device)
    expected = WardClustering(6).fit(X)
    found = WardClustering(6).fit(kind(X), sample_weight=kind(torch.ones(50, device=device)))
    for name in ("labels_", "children_", "distances_"):
        values = getattr(found, name)
        assert type(values) is result_kind
        assert torch.equal(values if result_kind is torch.Tensor else values.tensor, getattr(expected, name))


def test_dlpack_of_a_library_with_from_dlpack(cupy_like, device):
    assert_lent(cupy_like, cupy_like, device)


def test_dlpack_of_an_array_namespace(device):
    assert_lent(StandardLender, StandardLender, device)


def test_dlpack_of_a_library_that_only_lends(device):
    assert_lent(Lender, torch.Tensor, device)


def test_dlpack_copies_nothing(device):
    tensor = torch.tensor(normal(5, 2), device=device)
    assert _as_tensor(Lender(tensor), "X").data_ptr() == _as_tensor(tensor, "X").data_ptr() == tensor.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only memory of CUDA has the CUDA array interface")
def test_cuda_array_interface():
    class Interface:
        def __init__(self, tensor):
            self.__cuda_array_interface__ = tensor.__cuda_array_interface__

    tensor = torch.tensor(normal(5, 2), device="cuda")
    assert _as_tensor(Interface(tensor), "X").data_ptr() == tensor.data_ptr()
    assert_lent(Interface, torch.Tensor, "cuda")


class Frame:
    """A data frame, as far as NumPy and WardClustering look."""

    def __init__(self, values, columns):
        self.values, self.columns = values, columns

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def test_names_of_a_data_frame():
    X = normal(9, 3)
    estimator = WardClustering(3).fit(Frame(X, ["b", "a", "c"]))
    np.testing.assert_array_equal(estimator.labels_, WardClustering(3).fit_predict(X))
    assert estimator.feature_names_in_.tolist() == ["b", "a", "c"]
    assert estimator.feature_names_in_.dtype == object
    assert not hasattr(estimator.fit(X), "feature_names_in_")
    assert not hasattr(estimator.fit(Frame(X, range(3))), "feature_names_in_")
    with pytest.raises(TypeError, match="columns with and without string names, expected all or none; use strings"):
        estimator.fit(Frame(X, ["a", 1, "c"]))


def test_parameters():
    estimator = WardClustering(3)
    assert estimator.get_params() == estimator.get_params(deep=False) == {"n_clusters": 3, "distance_threshold": None}
    assert repr(estimator) == "WardClustering(n_clusters=3, distance_threshold=None)"
    assert estimator.set_params(n_clusters=None, distance_threshold=2.5) is estimator
    assert estimator.get_params() == {"n_clusters": None, "distance_threshold": 2.5}
    with pytest.raises(ValueError, match=r"'linkage' is no parameter of WardClustering\(.*; expected one of n_"):
        estimator.set_params(n_clusters=8, linkage="ward")
    assert estimator.n_clusters is None
    with pytest.raises(TypeError):
        WardClustering(3, 2.5)


def test_pickle_and_copy(device):
    estimator = WardClustering(4).fit(torch.tensor(normal(30, 2), device=device))
    for other in (pickle.loads(pickle.dumps(estimator)), copy.copy(estimator), copy.deepcopy(estimator)):
        assert other.get_params() == estimator.get_params()
        assert torch.equal(other.labels_, estimator.labels_)
        assert torch.equal(other.dendrogram_.cut(7), estimator.dendrogram_.cut(7))


def test_clone_is_not_fitted():
    other = clone(WardClustering(4).fit(normal(30, 2)))
    assert other.get_params() == {"n_clusters": 4, "distance_threshold": None}
    assert not hasattr(other, "labels_")


def test_in_a_pipeline():
    X, weights = blobs(60, 3, 5, 0.1) * [1, 10, 100], np.linspace(1, 9, 60)
    pipeline = make_pipeline(StandardScaler(), WardClustering())
    pipeline.set_params(wardclustering__n_clusters=5)
    assert is_clusterer(pipeline)
    found = pipeline.fit_predict(X, wardclustering__sample_weight=weights)
    expected = WardClustering(5).fit_predict(StandardScaler().fit_transform(X), sample_weight=weights)
    np.testing.assert_array_equal(found, expected)


BAD_X = {
    "vector": (np.ones(3), ValueError, r"X has shape \(3,\), expected \(n_samples, n_features\); use X.reshape"),
    "number": (3.0, ValueError, r"X has shape \(\), expected \(n_samples, n_features\)"),
    "images": (torch.ones(3, 2, 2), ValueError, r"X has shape \(3, 2, 2\), expected \(n_samples, n_features\)"),
    "no samples": (np.ones((0, 3)), ValueError, r"X has 0 sample\(s\) \(shape=\(0, 3\)\) while a minimum of 1 is"),
    "no features": (torch.ones(3, 0), ValueError, r"X has 0 feature\(s\) \(shape=\(3, 0\)\) while a minimum of 1 is"),
    "nan": (np.array([[1.0], [np.nan]]), ValueError, "NaN or infinity, first in row 1"),
    "complex": (np.ones((2, 2), dtype=complex), ValueError, "Complex data not supported: X has dtype torch.complex128"),
    "complex tensor": (torch.ones(2, 2, dtype=torch.cfloat), ValueError, "X has dtype torch.complex64, expected real"),
    "sparse": (sparse.eye_array(3), TypeError, r"X is sparse, expected a dense array; use X.toarray\(\)"),
    "sparse tensor": (torch.eye(3).to_sparse(), TypeError, r"X is sparse, .* or X.to_dense\(\)"),
    "strings": ([["a"], ["b"]], TypeError, "X has dtype <U1, expected numbers"),
    "dates": (np.ones((2, 2), dtype="M8[s]"), TypeError, r"X has dtype datetime64\[s\], expected numbers"),
}


@pytest.mark.parametrize("name", BAD_X)
def test_bad_x(name):
    X, error, message = BAD_X[name]
    with pytest.raises(error, match=message):
        WardClustering(1).fit(X)


BAD_WEIGHTS = {
    "zero": ([1, 0, 1], ValueError, "sample_weight has a zero, expected positive weights; drop points without mass"),
    "negative": ([1, -2.5, 1], ValueError, r"weights\[1\] is -2.5, expected a positive finite mass"),
    "nan": ([1, 1, np.nan], ValueError, r"weights\[2\] is nan, expected a positive finite mass"),
    "short": ([1, 1], ValueError, r"weights has shape \(2,\), expected \(3,\), one mass per point"),
    "column": (np.ones((3, 1)), ValueError, r"weights has shape \(3, 1\), expected \(3,\)"),
    "complex": (np.ones(3, dtype=complex), ValueError, "sample_weight has dtype torch.complex128, expected real"),
    "strings": (["a", "b", "c"], TypeError, "sample_weight has dtype <U1, expected numbers"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(name):
    weights, error, message = BAD_WEIGHTS[name]
    with pytest.raises(error, match=message):
        WardClustering(1).fit(normal(3, 2), sample_weight=weights)


BAD_PARAMETERS = {
    "both": ((3, 1.0), ValueError, "n_clusters is 3 and distance_threshold is 1.0, expected at most one of them; set"),
    "zero": ((0, None), ValueError, "n_clusters is 0, expected 1 to n_samples = 5; choose it in that range"),
    "too many": ((6, None), ValueError, "n_clusters is 6, expected 1 to n_samples = 5"),
    "fraction": ((2.0, None), TypeError, "n_clusters is 2.0, expected an integer from 1 to n_samples = 5"),
    "true": ((True, None), TypeError, "n_clusters is True, expected an integer"),
    "negative": ((None, -1), ValueError, "distance_threshold is -1, expected 0 or more; give a merge height"),
    "nan": ((None, np.nan), ValueError, "distance_threshold is nan, expected 0 or more"),
    "string": ((None, "1"), TypeError, "distance_threshold is '1', expected a number"),
    "false": ((None, False), TypeError, "distance_threshold is False, expected a number"),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_bad_parameters(name):
    (clusters, threshold), error, message = BAD_PARAMETERS[name]
    estimator = WardClustering(clusters, distance_threshold=threshold)
    with pytest.raises(error, match=message):
        estimator.fit(normal(5, 2))


def test_default_needs_two_points():
    with pytest.raises(ValueError, match="n_clusters is 2, expected 1 to n_samples = 1"):
        WardClustering().fit([[1.0]])


def test_scikit_learn_is_not_needed(tmp_path):
    """Neither to import nac_gpu nor to cluster."""
    program = (
        "import sys, nac_gpu; estimator = nac_gpu.WardClustering(2)\n"
        "assert estimator.fit_predict([[0.0], [1.0], [5.0]]).tolist() == [0, 0, 1]\n"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, cwd=tmp_path)
