"""The benchmark of Ward linkage, on a few points; what it says about time is not tested."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage

import bench_linkage
import nac_gpu
from bench_linkage import Options
from common.device import copies_to_host
from common.linkage_report import draw, growth
from common.providers import PEERS, PROVIDERS, Inputs, Provider, disagreement, naive_ward, read
from common.workloads import PRESETS, Workload

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_linkage, "measure_rates", lambda _: {"copy_bytes_per_second": 1e10, "float64_product_flops": 1e11}
    )


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(preset="quick", repetitions=2, device="cpu", results=tmp_path / "results.json")


def rows_of(path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    assert path is not None
    rows = json.loads(path.read_text())["rows"]
    found = {(row["workload"], row["provider"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_every_provider_is_right_and_measured(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_linkage.main(options) == 0
    rows = rows_of(options.results)
    names = [name for name in options.providers if name == "floor" or PROVIDERS[name].installed]
    assert {"scipy", "sklearn", "naive", "nac_gpu", "floor"} <= set(names)
    assert set(rows) == {(workload, name) for workload in ("64x8", "128x8") for name in names}
    for (_, name), row in rows.items():
        assert not row["extrapolated"]
        assert row["peak_memory_bytes"] is None
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        if name == "floor":
            assert (row["status"], row["repetitions"], row["ratio"]) == ("computed", 0, None)
        else:
            assert (row["status"], row["repetitions"]) == ("ok", 2)
            assert row["checked"] == ("oracle" if name == "scipy" else "all points")
            assert row["peer"] in PEERS
            assert row["ratio"] == pytest.approx(rows[row["workload"], row["peer"]]["p50"] / row["p50"])
    n, d, moved = 128, 8, 9 * 128**2 * 8
    assert rows["128x8", "floor"]["p50"] == pytest.approx(n * n * d / 1e11 + moved / 1e10)
    printed = capsys.readouterr().out
    assert "| 128x8    |            nac_gpu |" in printed
    assert "nac_gpu's time grows as n^" in printed
    assert options.results is not None
    assert bench_linkage.main(replace(options, plot=options.results)) == 0
    assert options.results.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_measured_twice_unless_asked(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("scipy", "nac_gpu")
    assert bench_linkage.main(replace(options, providers=names)) == 0
    assert options.results is not None
    before = options.results.read_bytes()
    measured: list[tuple[str, ...]] = []
    measure = bench_linkage.measure

    def watched(workload: Workload, names: list[str], *rest: Any) -> list[dict[str, Any]]:
        measured.append((workload.name, *names))
        return measure(workload, names, *rest)

    monkeypatch.setattr(bench_linkage, "measure", watched)
    bench_linkage.main(replace(options, providers=names))
    assert measured == []
    assert options.results.read_bytes() == before
    bench_linkage.main(replace(options, providers=("nac_gpu", "sklearn")))
    assert measured == [("64x8", "sklearn"), ("128x8", "sklearn")]
    measured.clear()
    bench_linkage.main(replace(options, providers=names, again=True))
    assert measured == [("64x8", *names), ("128x8", *names)]
    with pytest.raises(ValueError, match="was measured with other"):
        bench_linkage.main(replace(options, points="blobs"))


@pytest.mark.parametrize(("factor", "status"), [(1 + 1e-8, "wrong"), (float("nan"), "wrong"), (None, "failed")])
def test_what_is_wrong_is_not_timed(
    factor: float | None,
    status: str,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def perturbed(points: torch.Tensor) -> nac_gpu.Dendrogram:
        if factor is None:
            raise RuntimeError("a kernel broke")
        found = ward(points)
        heights = found.heights.clone()
        heights[len(heights) // 2] *= factor
        return replace(found, heights=heights)

    ward = nac_gpu.ward_linkage
    options = replace(options, providers=("scipy", "nac_gpu"))
    with monkeypatch.context() as patch:
        patch.setattr(nac_gpu, "ward_linkage", perturbed)
        assert bench_linkage.main(options) == 1
        assert bench_linkage.main(options) == 1  # it is tried again, and is wrong again
    assert f"*** NOT TIMED, {status} *** nac_gpu at 64x8" in capsys.readouterr().err
    for (_, name), row in rows_of(options.results).items():
        assert row["status"] == ("ok" if name == "scipy" else status)
        assert (row["p50"] is None) == (name == "nac_gpu")
    assert bench_linkage.main(options) == 0  # repaired, it is measured
    assert all(row["status"] == "ok" for row in rows_of(options.results).values())


def test_running_out_of_memory_is_no_error(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_: torch.Tensor) -> nac_gpu.Dendrogram:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(nac_gpu, "ward_linkage", exhausted)
    assert bench_linkage.main(replace(options, providers=("nac_gpu",))) == 0
    assert {row["status"] for row in rows_of(options.results).values()} == {"out of memory"}


def test_merges_in_another_order_are_seen() -> None:
    right = read(linkage(normal(40, 3), "ward"))
    assert disagreement(right, right, 1e-9) == ""
    merges = right[0].copy()
    merges[[0, 30], [0, 0]] = merges[[30, 0], [0, 0]]
    assert "partition" in disagreement((merges, right[1]), right, 1e-9)
    assert "38 merges instead of 39" in disagreement((right[0][1:], right[1][1:]), right, 1e-9)


def test_beyond_the_limits_times_are_extrapolated_and_a_part_is_checked(options: Options) -> None:
    options = replace(options, providers=("scipy", "sklearn", "naive", "nac_gpu"))
    options = replace(options, peer_limit=64, naive_limit=64, oracle_limit=50)
    assert bench_linkage.main(options) == 0
    rows = rows_of(options.results)
    fastest = min(("scipy", "sklearn"), key=lambda name: rows["64x8", name]["p50"])
    assert {name for workload, name in rows if workload == "128x8"} == {fastest, "nac_gpu"}
    peer, ours = rows["128x8", fastest], rows["128x8", "nac_gpu"]
    assert peer["extrapolated"]
    assert (peer["repetitions"], peer["status"], peer["ratio"]) == (0, "n² from 64", None)
    assert peer["p50"] == pytest.approx(4 * rows["64x8", fastest]["p50"])
    assert ours["extrapolated"]  # its ratio is
    assert ours["repetitions"] == 2
    assert ours["ratio"] == pytest.approx(peer["p50"] / ours["p50"])
    assert ours["checked"] == "first 50 points"
    assert not rows["64x8", "nac_gpu"]["extrapolated"]
    assert options.results is not None
    before = options.results.read_bytes()
    bench_linkage.main(options)
    assert options.results.read_bytes() == before


def test_what_is_slow_is_timed_once_and_never_while_it_compiles(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    run = Inputs.run

    def watched(inputs: Inputs, name: str) -> tuple[float, Any]:
        runs.append(name)
        return run(inputs, name)

    monkeypatch.setattr(Inputs, "run", watched)
    assert bench_linkage.main(replace(options, providers=("scipy", "nac_gpu"), seconds=0)) == 0
    assert {row["repetitions"] for row in rows_of(options.results).values()} == {1}
    assert runs == ["scipy", "nac_gpu", "nac_gpu"] * 2


def test_providers_that_are_not_installed_are_left_out(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("scipy", "fastcluster", "fastcluster_vector"):
        monkeypatch.setitem(PROVIDERS, name, Provider(list, "no_such_module"))
    assert bench_linkage.main(replace(options, providers=("scipy", "sklearn", "nac_gpu"))) == 0
    assert "not installed: scipy" in capsys.readouterr().out
    rows = rows_of(options.results)
    assert {name for _, name in rows} == {"sklearn", "nac_gpu"}
    assert rows["64x8", "sklearn"]["checked"] == "oracle"


def test_many_layers_are_one_call(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = PRESETS["vgg16"][0].shapes
    assert (len(layers), layers[0], layers[-1]) == (15, (64, 28), (4096, 4097))
    monkeypatch.setitem(PRESETS, "vgg16", (Workload("vgg16", ((9, 4), (20, 3), (20, 5))),))
    calls: list[int] = []
    ward = nac_gpu.ward_linkage

    def batched(points: list[torch.Tensor]) -> list[nac_gpu.Dendrogram]:
        calls.append(len(points))
        return [ward(layer) for layer in points]

    monkeypatch.setattr(nac_gpu, "ward_linkage", batched)
    names = ("scipy", "naive", "nac_gpu", "floor")
    assert bench_linkage.main(replace(options, preset="vgg16", providers=names, repetitions=1)) == 0
    rows = rows_of(options.results)
    assert calls == [3, 3]
    assert {row["status"] for row in rows.values()} == {"ok", "computed"}
    assert {(row["n"], row["d"]) for row in rows.values()} == {(None, None)}
    assert options.results is not None
    assert draw(options.results).exists()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("points", ["normal", "blobs"])
def test_other_points(points: Any, dtype: Any, options: Options) -> None:
    assert bench_linkage.main(replace(options, points=points, dtype=dtype, repetitions=1)) == 0
    rows = rows_of(options.results)
    assert (rows["64x8", "nac_gpu"]["dtype"], rows["64x8", "scipy"]["dtype"]) == (dtype, "float64")


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 2), (60, 2), (90, 40)])
def test_the_naive_loop_equals_scipy(n: int, d: int, device: torch.device) -> None:
    points = normal(n, d)
    merges, heights = read(naive_ward(torch.tensor(points, device=device)))
    expected = linkage(points, "ward")
    np.testing.assert_array_equal(np.sort(merges, axis=1), np.sort(expected[:, :2], axis=1))
    np.testing.assert_allclose(heights, expected[:, 2], rtol=1e-10)


def test_growth_is_the_slope_of_the_logarithms() -> None:
    rows = [
        {"provider": name, "n": n, "d": d, "repetitions": 3, "p50": factor * n**power}
        for name, factor, power in (("nac_gpu", 3e-9, 1.7), ("scipy", 1e-8, 2.0))
        for n, d in ((100, 5), (300, 5), (900, 5), (100, 7))
    ]
    assert growth(rows) == {"5": pytest.approx(1.7)}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_copies_to_the_host_are_read_from_a_trace(suffix: str, tmp_path: Path) -> None:
    events = [
        {"name": "Memcpy DtoH (Device -> Pinned)", "ts": 3, "args": {"bytes": 8}},
        {"name": "Memcpy DtoH (Device -> Pageable)", "ts": 1, "args": {"bytes": "16"}},
        {"name": "Memcpy DtoH (Device -> Pageable)", "ts": 5},
        {"name": "Memcpy HtoD (Pageable -> Device)", "ts": 2, "args": {"bytes": 1000}},
        {"ph": "M"},
    ]
    path, text = tmp_path / f"trace{suffix}", json.dumps({"traceEvents": events}).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    assert copies_to_host(path) == [16, 8, None]


def test_a_profile_needs_cuda(options: Options, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs CUDA"):
        bench_linkage.main(replace(options, trace=tmp_path / "trace.json"))


def test_without_any_peer_the_check_is_the_cpu_itself(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PEERS:
        monkeypatch.setitem(PROVIDERS, name, Provider(list, "no_such_module"))
    assert bench_linkage.main(replace(options, providers=("nac_gpu", "naive"))) == 0
    rows = rows_of(options.results)
    assert rows["64x8", "nac_gpu"]["checked"] == "all points, against itself on the CPU"
    assert rows["64x8", "naive"]["checked"] == "all points"
    assert {row["ratio"] for row in rows.values()} == {None}
