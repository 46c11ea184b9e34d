"""The command `nac`, as people call it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import tinymodels
import torch
from PIL import Image
from safetensors.torch import save_file, save_model
from scipy.cluster.hierarchy import linkage
from torch import nn

import nac_gpu as nac
from nac_gpu.cli import main
from nac_gpu.cli.models import find

INSTALLED = Path(sys.executable).with_name("nac")
TINY = "tinymodels:small", "--inputs", "1,3,16,16"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command looks for `package.module:function` in the current folder, too; later tests do not."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def nac_command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """A new process, from the installed command."""
    environment = {**os.environ, "PYTHONPATH": str(Path(tinymodels.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([INSTALLED, *map(str, arguments)], capture_output=True, text=True, env=environment)


def called(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that an error is."""
    with pytest.raises(SystemExit) as error:
        called(*arguments)
    assert error.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nac: ") and "random" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("nac: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def folder_of_faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that hold nothing of what their names say, and modules that cannot be imported."""
    folder = tmp_path_factory.mktemp("faults")
    for name in ("broken.pt", "broken.pt2", "broken.safetensors", "broken.npy"):
        (folder / name).write_bytes(b"nothing of the kind\x80")
    (folder / "list.json").write_text("[1, 2]")
    save_file({}, folder / "empty.safetensors")
    (folder / "unimportable.py").write_text("1 / 0\n")
    (folder / "leaving.py").write_text("raise SystemExit(3)\n")
    (folder / "pictures" / "one").mkdir(parents=True)
    (folder / "pictures" / "one" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, of dark and of bright noise."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for place, name in enumerate(("dark", "bright")):
        (folder / name).mkdir()
        for number in range(12):
            pixels = generator.integers(0, 128, (24, 20, 3), dtype=np.uint8) + np.uint8(120 * place)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def vit(folder: Path) -> str:
    """A folder as `save_pretrained` writes it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=2, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["torchvision", "timm", "transformers", "module"])
def test_the_whole_way(kind: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan, compress, fine-tune; load in a new process; export; ONNX computes what the model computes."""
    pixels = torch.randn(3, 3, 32, 32)
    name, *inputs = {
        "torchvision": ("torchvision:mobilenet_v3_small", "--inputs", "1,3,32,32"),
        "timm": ("timm:resnet10t", "--inputs", "1,3,32,32"),
        "transformers": (vit(tmp_path / "vit") if kind == "transformers" else "",),
        "module": ("tinymodels:small", "--inputs", "1,3,32,32"),
    }[kind]
    plan, first, tuned, onnx = (tmp_path / file for file in ("p.json", "a.safetensors", "b.safetensors", "c.onnx"))
    called("plan", name, *inputs, "--width", "0.5", "--output", plan)
    assert "parameters: " in capsys.readouterr().out
    common = ("--epochs", "1", "--batch-size", "8", "--learning-rate", "1e-3", "--finetune", images)
    called("compress", name, *inputs, "--plan", plan, "--calibration", "none", "--output", first, "--json", *common)
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == json.loads(plan.read_text())
    assert found["bytes"] == first.stat().st_size
    assert len(found["epochs"]) == 1
    called("finetune", name, first, *inputs, "--output", tuned, *common)
    assert not list(tmp_path.glob("*.checkpoint"))
    process = nac_command("export", name, tuned, *inputs, "--output", onnx, "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["deviation"] < 1e-5
    small = nac.load(tuned, find(name).build)
    with torch.no_grad():
        made: Any = small(pixels)
    expected = made if isinstance(made, torch.Tensor) else made.logits
    session = onnxruntime.InferenceSession(onnx.read_bytes(), providers=["CPUExecutionProvider"])
    given: Any = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert torch.allclose(torch.from_numpy(given[0]), expected, rtol=1e-5, atol=1e-5)
    before = sum(p.numel() for p in find(name).build().parameters())
    assert sum(p.numel() for p in small.parameters()) < 0.8 * before


def test_a_folder_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is opened by `from_pretrained`, where the configuration can say the widths; else there is a reason."""
    from transformers import AutoModelForImageClassification

    name = vit(tmp_path / "vit")
    called("compress", name, "--width", "0.5", "--output", tmp_path / "half")
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "half")
    assert small.config.intermediate_size == 32
    assert small(torch.randn(1, 3, 32, 32)).logits.shape == (1, 2)
    capsys.readouterr()
    message = failed(capsys, "compress", name, "--width", "*layer*.0.*=0.25", "--output", tmp_path / "uneven")
    assert "has one width for all layers and cannot express" in message
    assert "uneven.safetensors, which nac_gpu.load opens" in message
    assert not (tmp_path / "uneven").exists()


def test_a_report_is_written(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.safetensors"
    called("compress", *TINY, "--width", "0.5", "--calibration", "none", "--output", path)
    options = ("--calibration", "none", "--data", images, "--seconds", "0.2", "--batch-sizes", "2")
    called("report", tinymodels.small.__module__ + ":small", path, *TINY[1:], *options, "--output", tmp_path / "r.html")
    assert "tinymodels:small, compressed" in capsys.readouterr().out
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    called("report", *TINY[:1], path, *TINY[1:], *options, "--json", "--output", tmp_path / "r.json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "r.json").read_text())


def test_calibration_on_a_folder_and_on_a_file(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called("plan", *TINY, "--params", "0.5", "--calibration", images, "--images", "16")
    assert "activations: 16 inputs of calibration data" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(70, 3, 16, 16)).astype(np.float32))
    called("plan", *TINY, "--params", "0.5", "--calibration", tmp_path / "x.npy")
    assert "activations: 70 inputs of calibration data" in capsys.readouterr().out


def test_a_budget_of_time_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = (*TINY, "--latency", "0.6", "--calibration", "none")
    with mock.patch("nac_gpu.planning.latency.seconds_in_turn", return_value=(np.ones(5), np.full(5, 0.595))):
        called("plan", *wanted)
        called("compress", *wanted, "--output", tmp_path / "small.safetensors")
    assert capsys.readouterr().out.count("latency on the example inputs: 1e+03 ms -> 595 ms (59.5 %)") == 2


def test_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model = tinymodels.small()
    nn.init.normal_(model[0].weight)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    called("compress", *TINY, "--weights", tmp_path / "w.pt", "--width", "4=4", "--calibration", "none", "--output",
           tmp_path / "s.safetensors")  # fmt: skip
    assert "random weights" not in capsys.readouterr().err
    small = nac.load(tmp_path / "s.safetensors", tinymodels.small)
    assert torch.equal(small[0].weight, model[0].weight)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no state dict" in failed(capsys, "plan", *TINY, "--weights", tmp_path / "list.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    assert "is of another model: Missing key" in failed(capsys, "plan", *TINY, "--weights", tmp_path / "other.pt")
    assert "no such file" in failed(capsys, "plan", *TINY, "--weights", tmp_path / "none.pt")


def test_weights_that_stay_in_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same result as in memory: of a state dict, and of a folder of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    file, small, other = (tmp_path / f"{name}.safetensors" for name in ("weights", "small", "other"))
    save_model(find("tinymodels:small").build(), str(file))
    common = (*TINY, "--weights", file, "--width", "0.5", "--calibration", "none")
    called("compress", *common, "--output", small)
    called("compress", *common, "--output", other, "--open")
    assert small.read_bytes() == other.read_bytes()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    llama = (tmp_path / "llama", "--inputs", "input_ids=int:1,8", "--open")
    capsys.readouterr()
    called("plan", *llama, "--params", "0.85")
    assert "without compensation: its weights are in files" in capsys.readouterr().out
    called("compress", *llama, "--width", "0.5", "--output", tmp_path / "small-llama")
    model: Any = find(str(tmp_path / "small-llama")).build()
    assert model.config.intermediate_size == 24
    capsys.readouterr()
    for more in ((), ("--weights", file, "--finetune", tmp_path)):
        output = ("--width", "0.5", "--output", tmp_path / "x.safetensors")
        assert "--open" in failed(capsys, "compress", *TINY, *more, *output, "--open")


def test_fewer_experts_and_fewer_neurons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("tinymixtures:listed", "--inputs", "4,16,6", "--calibration", "none", "--experts", 3)
    called("compress", *model, "--output", tmp_path / "experts.safetensors")
    called("compress", *model, "--width", 0.5, "--output", tmp_path / "both.safetensors")
    assert capsys.readouterr().out.count("experts: 6 experts became 3") == 2
    for name, width in (("experts", 14), ("both", 7)):
        small = nac.load(tmp_path / f"{name}.safetensors", find("tinymixtures:listed").build)
        widths = [expert[0].out_features for expert in small.experts]
        assert len(widths) == 3
        assert min(widths) == width  # of those that the inputs reach
    output = ("--width", 0.5, "--output", tmp_path / "x.safetensors")
    weights = tmp_path / "experts.safetensors"
    found = find("tinymixtures:listed").build()
    save_model(found, str(weights))
    assert "expected a model in memory" in failed(capsys, "compress", *model, "--weights", weights, "--open", *output)


def test_an_exported_program_is_taken_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(tinymodels.small().eval(), (torch.randn(2, 3, 16, 16),))
    torch.export.save(program, tmp_path / "x.pt2")
    path = tmp_path / "x.pt2"
    called("compress", path, "--inputs", "2,3,16,16", "--width", "0.5", "--calibration", "none", "--output",
           tmp_path / "s.safetensors")  # fmt: skip
    small = nac.load(tmp_path / "s.safetensors", find(str(path)).build)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in program.parameters())
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 2)


def test_points_are_clustered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = np.random.default_rng(0).normal(size=(50, 3))
    np.save(tmp_path / "x.npy", points)
    called("linkage", tmp_path / "x.npy", "--clusters", 4, "--output", tmp_path / "l.npy", "--matrix",
           tmp_path / "z.npy", "--json")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    labels, matrix = np.load(tmp_path / "l.npy"), np.load(tmp_path / "z.npy")
    assert found == {"points": 50, "dimensions": 3, "clusters": 4, "sizes": sorted(np.bincount(labels), reverse=True)}
    assert np.allclose(matrix, linkage(points, "ward"))
    called("linkage", tmp_path / "x.npy", "--height", 3.0)
    assert "clusters: " in capsys.readouterr().out
    assert "give --clusters or --height" in failed(capsys, "linkage", tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "nothing"), "unknown model 'nothing', expected torchvision:NAME"),
        (("plan", "torchvision:resnet19"), "torchvision has no model 'resnet19'; it has resnet"),
        (("plan", "timm:resnet19"), "timm has no model 'resnet19'; it has resnet"),
        (("plan", "nowhere:small"), "nowhere cannot be imported"),
        (("plan", "tinymodels:large"), "tinymodels has no large"),
        (("plan", "tinymodels:number"), "tinymodels:number gives int, expected a torch.nn.Module"),
        (("plan", "tinymodels:small"), "its inputs are not known; give --inputs"),
        (("plan", "tinymodels:small", "--pretrained"), "--pretrained is for torchvision: and timm:"),
        (("plan", *TINY), "expected width=, params=, flops= or latency="),
        (("plan", *TINY, "--latency", "2.0"), "latency=2.0, expected the share of the model's own time"),
        (("plan", "tinymodels:small", "--inputs", "1,x"), "no such file, and it is no shape"),
        (("plan", *TINY, "--width", "0.5", "0=3"), "--width: expected one share, or layer=number"),
        (("plan", *TINY, "--params", "0.5", "--calibration", "nowhere"), "nowhere is no tree <class>/<image>"),
        (("plan", *TINY, "--calibration", "x", "--mean", "0.5"), "--mean and --std belong together"),
        (("plan", *TINY, "--mean", "0.5", "0.5", "--std", "1"), "--mean and --std belong together"),
        (("plan", *TINY, "--mean", "0", "0", "--std", "1", "1"), "2 values each, expected 1 or one for each of 3"),
        (("plan", *TINY, "--mean", "0.5", "--std", "0"), "expected finite --mean and --std above 0"),
        (("plan", *TINY, "--mean", "nan", "--std", "1"), "expected finite --mean and --std above 0"),
        (("compress", *TINY, "--width", "0.5", "--output", "no/where.safetensors"), "there is no folder"),
        (("plan", "missing.pt2"), "missing.pt2: there is no such file"),
        (("plan", "broken.pt2"), "broken.pt2 cannot be read as an exported program: "),
        (("plan", "tinymodels:broken"), r"tinymodels:broken, called without arguments, raised KeyError: 'one\ntwo'"),
        (("plan", "tinymodels:Failing", "--inputs", "1,4", "--width", "0.5"), "raised KeyError: 'missing'"),
        (("plan", "tinymodels:Huge", "--inputs", "1,4", "--width", "0.5"), "memory"),
        (("plan", "unimportable:small"), "unimportable cannot be imported: ZeroDivisionError: division by zero"),
        (("plan", "leaving:small"), "leaving cannot be imported: SystemExit: 3"),
        (("plan", *TINY, "--width", "half"), "--width: 'half' is no number, expected one share (0.5), layer=number"),
        (("plan", *TINY, "--width", "0=x"), "--width: 'x' is no number"),
        (("plan", *TINY, "--width", "0="), "--width: '' is no number"),
        (("plan", *TINY, "--width", "0.5", "--weights", "broken.pt"), "broken.pt cannot be read as weights: "),
        (("plan", *TINY, "--width", "0.5", "--weights", "broken.safetensors"), "cannot be read as weights: "),
        (("plan", "tinymodels:small", "--inputs", "broken.pt"), "broken.pt cannot be read as tensors: "),
        (("plan", "tinymodels:small", "--inputs", "empty.safetensors"), "empty.safetensors holds no tensors"),
        (("plan", *TINY, "--params", "0.5", "--calibration", "pictures"), "cannot identify image file"),
        (("compress", *TINY, "--plan", "none.json", "--output", "s.safetensors"), "--plan none.json: there is no such"),
        (("compress", *TINY, "--plan", "broken.pt", "--output", "s.safetensors"), "--plan broken.pt: not the JSON"),
        (("compress", *TINY, "--plan", "list.json", "--output", "s.safetensors"), "--plan list.json: not the JSON"),
        (
            ("export", TINY[0], "broken.safetensors", *TINY[1:], "--output", "s.pt2"),
            "is not a safetensors file, or was cut off",
        ),
        (
            ("report", TINY[0], "none.safetensors", *TINY[1:], "--output", "s.txt"),
            "none.safetensors: there is no such file",
        ),
        (("linkage", "broken.npy", "--clusters", "2"), "broken.npy cannot be read as tensors: "),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder_of_faults: Path,
) -> None:
    monkeypatch.chdir(folder_of_faults)
    assert message in failed(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "suffix"),
    [
        (("plan", "nowhere:small"), ".json"),
        (("compress", *TINY, "--plan", "none.json"), ".safetensors"),
        (("finetune", "nowhere:small", "none.safetensors", "--finetune", "none"), ".safetensors"),
        (("export", "nowhere:small", "none.safetensors"), ".onnx"),
        (("report", "nowhere:small", "none.safetensors"), ".html"),
        (("linkage", "none.npy", "--clusters", "2"), ".npy"),
        (("linkage", "none.npy", "--matrix"), ".npy"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_outputs_are_checked_before_anything_is_done(
    arguments: tuple[str, ...],
    suffix: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each of these commands would fail for another reason, too, once it began."""
    monkeypatch.chdir(tmp_path)
    option = () if arguments[-1] == "--matrix" else ("--output",)
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    assert "there is no folder" in failed(capsys, *arguments, *option, f"no/where{suffix}")
    assert "there is no folder" in failed(capsys, *arguments, *option, f"file/where{suffix}")
    assert "is a folder, expected a file" in failed(capsys, *arguments, *option, f"folder{suffix}")
    assert "is no regular file" in failed(capsys, *arguments, *option, f"pipe{suffix}")
    if arguments[0] == "compress":  # any other name is a folder
        assert "exists already" in failed(capsys, *arguments, *option, "file")
    elif arguments[0] != "plan":
        assert "expected a name that ends in" in failed(capsys, *arguments, *option, "where.xyz")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert "cannot be written to" in failed(capsys, *arguments, *option, f"where{suffix}")


@pytest.mark.parametrize(
    "arguments", [("compress", "--help"), ("plan", *TINY, "--width", "0.5", "--calibration", "none")]
)
@pytest.mark.parametrize("closed", [("stdout",), ("stdout", "stderr")], ids="-".join)
def test_a_closed_pipe_ends_a_command_quietly(
    arguments: tuple[str, ...], closed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `nac plan ... | head -1` closes it."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        for name in closed:
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            called(*arguments)
        assert ended.value.code == 141
        print("what is still to be written while the interpreter ends", file=stream, flush=True)


def test_a_process_with_a_closed_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from nac_gpu.cli import main; main()", "plan", "--help"]
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


def test_the_installed_command_explains_itself_and_its_exit_codes(tmp_path: Path) -> None:
    for command in ("plan", "compress", "finetune", "report", "export", "linkage"):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
    process = nac_command("plan", *TINY, "--width", "0.5", "--json")
    assert process.returncode == 0
    assert nac.Plan.from_json(process.stdout).widths == {"0": 8, "4": 8}
    assert process.stderr == "nac: tinymodels:small has random weights; give --weights or --pretrained\n"
    with pytest.raises(SystemExit) as wrong:
        main(["plan"])
    assert wrong.value.code == 2


def test_an_interrupted_training_goes_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    arguments = ("compress", *TINY, "--width", "0.5", "--calibration", "none", "--finetune", images, "--epochs", "3",
                 "--batch-size", "8")  # fmt: skip
    called(*arguments, "--output", whole)
    count = 0

    def stop(text: str) -> None:
        nonlocal count
        count += text.startswith("epoch")
        if count == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nac_gpu.cli.options.note", stop)
        with pytest.raises(SystemExit) as stopped:
            called(*arguments, "--output", again)
    assert stopped.value.code == 130
    assert not again.exists()
    capsys.readouterr()
    called(*arguments, "--output", again)
    assert "epoch 1/3" not in capsys.readouterr().err
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.safetensors", "whole.safetensors"]
    small, expected = (nac.load(path, tinymodels.small) for path in (again, whole))
    for a, b in zip(small.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
