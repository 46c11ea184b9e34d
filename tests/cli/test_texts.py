"""Models that read text on the command line: calibration on text files, and folders that are complete."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from test_cli import TINY, called, failed
from tinytext import WORDS, words
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import nac_gpu as nac
from nac_gpu.cli.texts import is_text

TEXT = "the cat sat on the mat\nthe dog sat\nthe cat sat on the dog\n" * 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def language_model(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, **SIZES))
    model.generation_config.update(do_sample=True, temperature=0.25)
    model.save_pretrained(folder)
    words(**options).save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    words(specials=True, model_input_names=names).save_pretrained(folder)
    return folder


def batches_of(*arguments: object) -> list[dict[str, Tensor]]:
    """The calibration batches that a command gives to the library."""
    with mock.patch("nac_gpu.plan", side_effect=KeyboardInterrupt) as plan, pytest.raises(SystemExit):
        called("plan", *arguments, "--width", "0.5")
    return plan.call_args.kwargs["calibration"]


def test_the_folder_of_a_language_model_is_complete(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compressed on a text; what is written has the tokenizer and the settings of generation."""
    name, output = language_model(tmp_path / "model"), tmp_path / "small"
    called("compress", name, "--width", "0.5", "--calibration", text, "--length", "8", "--refine", "2", "--output",
           output, "--json")  # fmt: skip
    assert json.loads(capsys.readouterr().out)["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    small: Any = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert small.config.intermediate_size == 24
    assert small.generation_config.temperature == 0.25
    assert tokenizer("the cat")["input_ids"] == words()("the cat")["input_ids"]
    assert small.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
    called("plan", name, "--params", "0.9", "--calibration", text, "--tokens", "64", "--length", "8")
    assert "of calibration data" in capsys.readouterr().out


def test_texts_of_language_models_are_joined_and_those_of_encoders_are_not(text: Path, tmp_path: Path) -> None:
    model = language_model(tmp_path / "model")
    (batch,) = batches_of(model, "--calibration", text, "--length", "8", "--tokens", "40")
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), (5, 8)
    )
    long = tmp_path / "long.txt"
    long.write_text(f"{TEXT}\n\n{TEXT}")
    (batch,) = batches_of(model, "--calibration", long)
    assert batch["input_ids"].shape == (1, 64), "no more than the model reads at once"
    first, second = batches_of(encoder(tmp_path / "encoder"), "--calibration", text)
    assert set(first) == {"input_ids", "attention_mask", "token_type_ids"}
    assert first["input_ids"].shape == (8, 8)
    assert len(second["input_ids"]) == 4
    assert first["attention_mask"].sum(1).tolist() == [8, 5, 8, 8, 5, 8, 8, 5]
    config = tmp_path / "encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": None}))
    first, _ = batches_of(tmp_path / "encoder", "--calibration", text)
    assert set(first) == {"input_ids", "attention_mask"}, "of a class that is not named"


def test_an_encoder_is_compressed_on_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = encoder(tmp_path / "encoder")
    called("compress", name, "--width", "0.5", "--only", "*intermediate*", "--calibration", text, "--refine", "2",
           "--output", tmp_path / "small")  # fmt: skip
    assert BertModel.from_pretrained(tmp_path / "small").config.intermediate_size == 24
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == len(WORDS)


def test_a_decoder_reads_the_same_text_one_token_later(text: Path, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS), **sizes)).save_pretrained(tmp_path / "t5")
    words().save_pretrained(tmp_path / "t5")
    batch = batches_of(tmp_path / "t5", "--calibration", text)[0]
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert not batch["decoder_input_ids"][:, 0].any()


def test_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, expected in ((TEXT.encode(), True), ("ä".encode() * 40_000, True), (b"\x80", False), (b"\0", False)):
        path.write_bytes(content)
        assert is_text(path) == expected
    path.write_bytes(b"a" + "ä".encode() * 40_000)
    assert is_text(path), "a character is cut where reading ends"
    np.save(tmp_path / "x.npy", np.zeros(3))
    assert not is_text(tmp_path / "x.npy")
    assert not is_text(tmp_path)
    assert is_text(tmp_path / "missing.md")
    assert not is_text(tmp_path / "missing")


def test_what_a_text_needs_is_explained(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(model: object, path: object = text, *more: object) -> str:
        return failed(capsys, "plan", model, "--width", "0.5", "--calibration", path, *more)

    model = language_model(tmp_path / "model")
    assert "expected a folder of transformers as the model" in refusal(TINY[0], text, *TINY[1:])
    assert "there is no such file" in refusal(model, tmp_path / "none.txt")
    assert "expected --inputs input_ids=int:1,16 or none" in refusal(model, text, "--inputs", "int:1,16")
    assert "--tokens 0: expected at least 1" in refusal(model, text, "--tokens", "0")
    assert "--length 0: expected at least 1" in refusal(model, text, "--length", "0")
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt: the text is empty" in refusal(model, tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\x80")
    assert "is not a text in UTF-8" in refusal(model, tmp_path / "binary.txt")
    (model / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be opened" in refusal(model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "model has no tokenizer, expected tokenizer.json" in refusal(model)
    vit = tmp_path / "vit"
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(vit)
    words().save_pretrained(vit)
    assert "the model takes no input_ids" in refusal(vit)


def test_a_folder_without_a_tokenizer_and_one_with_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = language_model(tmp_path / "model")
    options = ("--width", "0.5", "--calibration", "none", "--output")
    (model / "tokenizer.json").write_text("{")
    called("compress", model, *options, tmp_path / "damaged")
    assert f"nac: the tokenizer of {model} was not copied: " in capsys.readouterr().err
    for path in model.glob("tokenizer*"):
        path.unlink()
    called("compress", model, *options, tmp_path / "without")
    assert "was not copied" not in capsys.readouterr().err
    for name in ("damaged", "without"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }


@pytest.mark.parametrize("way", ["width", "plan", "params"])
def test_what_a_folder_cannot_express_is_said_before_the_work(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = encoder(tmp_path / "encoder")
    said = {
        "width": ("--width", "0.5"),
        "plan": ("--plan", tmp_path / "plan.json"),
        "params": ("--params", "0.8", "--calibration", "none", "--only", "*intermediate*"),
    }[way]
    if way == "plan":
        called("plan", model, "--width", "0.5", "--output", said[1])
    with mock.patch("nac_gpu.compress") as compress:
        message = failed(capsys, "compress", model, *said, "--output", tmp_path / "small")
    assert not compress.called
    if way == "params":
        assert "has one width for all layers and cannot express different ones" in message
        assert "--width 0.5" in message
    else:
        assert "heads were merged (encoder.layer.0.attention.self.query: 4 -> 2, and 1 more)" in message
        assert "--only '*intermediate*'" in message
    assert "small.safetensors, which nac_gpu.load opens" in message
    assert not (tmp_path / "small").exists()


def test_plans_of_deep_models_are_short_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {**SIZES, "num_hidden_layers": 6}
    model = tmp_path / "deep"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(model)
    arguments = (model, "--width", "0.5", "--calibration", "none")
    printed = []
    for command in (("plan",), ("compress", "--output", tmp_path / "a"), ("compress", "--output", tmp_path / "b")):
        called(command[0], *arguments, *command[1:], *(["--verbose"] if command[-1] == tmp_path / "b" else []))
        printed.append(capsys.readouterr().out)
    assert "model.layers.{0..5}.mlp.gate_proj" in printed[0]
    assert printed[1].startswith(printed[0])
    assert "model.layers.5.mlp.gate_proj" in printed[2]
    assert "{" not in printed[2]
    called("plan", *arguments, "--verbose")
    assert printed[2].startswith(capsys.readouterr().out)
    called("plan", *arguments, "--json")
    assert len(nac.Plan.from_json(capsys.readouterr().out).groups) == 6
