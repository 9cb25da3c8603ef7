"""Input that somebody else wrote: models, data sets, pictures and arguments are read as data, or refused."""

import argparse
import ast
import builtins
import json
import os
import re
import shutil
import signal
import socket
import struct
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_MODEL, assert_refused, siss_error, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from tiny_sd import save_pipeline
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

import siss_diffusers
import train_siss_sd
import train_siss_unconditional
from siss_diffusers.assets.make_tiny_sd import make_tokenizer
from siss_diffusers.commands.audit import load_training_images
from siss_diffusers.commands.common import load_stable_diffusion
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.sources import check_image_paths, load_image_rows
from siss_diffusers.errors import UsageError
from siss_diffusers.families.trust import is_adapter
from siss_diffusers.flags import check_training_arguments, check_unlearning_arguments
from siss_diffusers.metrics.clip import Clip
from siss_diffusers.metrics.features import load_torchscript
from siss_diffusers.parsing import Parser


SOURCES = [*Path(siss_diffusers.__file__).parent.rglob("*.py")]
SOURCES += [Path(module.__file__) for module in (train_siss_sd, train_siss_unconditional)]
BOUNDED = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A request fails the test, even where its failure would have been taken for bad input."""
    requests = []

    def refuse(*address: object) -> None:
        requests.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not requests


@pytest.fixture(autouse=True)
def no_waiting():
    """What would wait for a pipe for ever fails."""

    def stop(*_: object) -> None:
        raise TimeoutError("still waiting")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def marker(tmp_path):
    """What the code in these tests writes when it is run."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')\nfrom diffusers import *\nfrom transformers import *\n"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


class Payload:
    """Runs where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        function(*args, **kwargs)
    (sentence,) = str(error.value).splitlines()
    return sentence


def sd_flags(model: Path, *more: str) -> list[str]:
    return ["audit", "--pretrained_model_name_or_path", str(model), "--prompts", "a", "--guidance_scale", "2", *more]


def sd_args(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"cache_dir": None, "dtype": "float32"} | values)


class TestModels:
    @pytest.fixture
    def model(self, pipeline, tmp_path):
        return shutil.copytree(pipeline, tmp_path / "model")

    @pytest.fixture
    def unconditional(self, tmp_path):
        return shutil.copytree(TINY_MODEL, tmp_path / "model")

    @pytest.fixture
    def clip(self, tmp_path):
        small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        config = CLIPConfig(text_config=small | {"vocab_size": 600}, vision_config=small | {"image_size": 32})
        CLIPModel(config).save_pretrained(tmp_path / "clip")
        make_tokenizer(("a photograph",)).save_pretrained(tmp_path / "clip")
        return tmp_path / "clip"

    def pickle_weights(self, folder: Path, marker: Path, name: str = "pytorch_model.bin") -> None:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        torch.save(Payload(marker), folder / name)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_pickles_are_refused_before_anything_is_loaded(self, model, marker, tmp_path, capfd, base_args, part):
        self.pickle_weights(model / part, marker)
        flags = base_args | {"--pretrained_model_name_or_path": str(model)}
        hint = f"--pretrained_model_name_or_path: {model} holds its weights as pickles (pytorch_model.bin)"
        assert_refused(train_siss_sd.main, flags, hint, tmp_path, capfd)
        message = siss_error(capfd, *sd_flags(model, "--output_dir", str(tmp_path / "out")))
        assert hint in message and "safe_serialization=True" in message

    def test_pickles_of_an_unconditional_model(self, unconditional, marker, tmp_path, capfd, base_args):
        self.pickle_weights(unconditional / "unet", marker, "diffusion_pytorch_model.bin")
        flags = base_args | {"--pretrained_model_name_or_path": str(unconditional)}
        assert_refused(train_siss_unconditional.main, flags, "safetensors", tmp_path, capfd)
        message = siss_error(
            *(capfd, "evaluate", "--base", str(unconditional), "--unlearned", str(TINY_MODEL)),
            *("--train_data_dir", base_args["--train_data_dir"], "--output_dir", str(tmp_path / "out")),
        )
        assert f"--base: {unconditional} holds its weights as pickles (diffusion_pytorch_model.bin)" in message

    def test_a_pickle_by_itself(self, marker, tmp_path, capfd):
        torch.save(Payload(marker), tmp_path / "v1-5.ckpt")
        message = siss_error(capfd, *sd_flags(tmp_path / "v1-5.ckpt", "--output_dir", str(tmp_path / "out")))
        assert "holds its weights as pickles (v1-5.ckpt)" in message

    def test_a_pickle_beside_safetensors_of_another_variant(self, model, marker):
        """The folder has safetensors, but not those that are asked for: no falling back."""
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
        torch.save(Payload(marker), weights.with_suffix(".bin"))
        message = refusal(load_stable_diffusion, sd_args(), str(model), "--base")
        assert message.startswith(f"--base: {model} cannot be loaded") and "pickles are not read" in message

    def test_a_checkpoint_of_all_formats_is_loaded_from_safetensors(self, model, marker):
        torch.save(Payload(marker), model / "v1-5.ckpt")
        torch.save(Payload(marker), model / "unet" / "diffusion_pytorch_model.bin")
        assert load_stable_diffusion(sd_args(), str(model), "--base").unet is not None

    def test_a_pickled_adapter(self, model, marker, tmp_path, capfd):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        torch.save(Payload(marker), adapter / "pytorch_lora_weights.bin")
        flags = sd_flags(model, "--adapter", str(adapter), "--output_dir", str(tmp_path / "audit"))
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])  # a base that is loaded first would be what is complained of
        assert f"--adapter: {adapter} holds its weights as pickles" in siss_error(capfd, *flags)
        weights.write_bytes(whole)
        assert "--unlearned" in refusal(is_adapter, str(adapter), "--unlearned")
        (adapter / "other.safetensors").write_bytes(b"")  # not enough to fall back on a pickle
        message = refusal(load_stable_diffusion, sd_args(), str(model), "--base", str(adapter), "--unlearned")
        assert message.startswith(f"--unlearned: {adapter} cannot be loaded")

    def test_a_pickled_network_and_clip(self, marker, clip, tmp_path):
        torch.save(Payload(marker), tmp_path / "sscd.pt")
        assert "not a TorchScript file" in refusal(load_torchscript, tmp_path / "sscd.pt", "--copy_detector")
        self.pickle_weights(clip, marker)
        assert "--clip_model" in refusal(Clip, str(clip), torch.device("cpu"), "--clip_model")

    @pytest.mark.parametrize("kind", ["pipeline", "component", "module", "none"])
    def test_code_beside_a_pipeline_is_not_run(self, model, marker, tmp_path, capfd, base_args, kind):
        if kind == "pipeline":
            (model / "mine.py").write_text(code(marker))
            edit_json(model / "model_index.json", _class_name=["mine", "StableDiffusionPipeline"])
        elif kind == "component":
            (model / "unet" / "mine.py").write_text(code(marker))
            edit_json(model / "model_index.json", unet=["mine", "UNet2DConditionModel"])
        elif kind == "module":
            edit_json(model / "model_index.json", unet=["os", "system"])
        else:  # diffusers takes it for the pipeline that was not named
            (model / "None.py").write_text(code(marker))
        message = siss_error(capfd, *sd_flags(model, "--output_dir", str(tmp_path / "out")))
        assert "--pretrained_model_name_or_path" in message and "which is never run" in message
        flags = base_args | {"--pretrained_model_name_or_path": str(model)}
        if kind != "none":
            assert_refused(train_siss_sd.main, flags, "which is never run", tmp_path, capfd)

    def test_code_beside_an_unconditional_model_is_not_run(self, unconditional, marker, tmp_path, capfd, base_args):
        (unconditional / "unet" / "mine.py").write_text(code(marker))
        edit_json(unconditional / "model_index.json", unet=["mine", "UNet2DModel"])
        flags = base_args | {"--pretrained_model_name_or_path": str(unconditional)}
        assert_refused(train_siss_unconditional.main, flags, "code", tmp_path, capfd)

    def test_an_auto_map_is_ignored(self, model, marker):
        for part in ("text_encoder", "tokenizer"):
            (model / part / "mine.py").write_text(code(marker))
        classes = ("AutoConfig", "AutoModel", "CLIPTextModel")
        edit_json(model / "text_encoder" / "config.json", auto_map={name: f"mine.{name}" for name in classes})
        edit_json(model / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.A", "mine.B"]})
        assert isinstance(load_stable_diffusion(sd_args(), str(model), "--base").text_encoder, CLIPTextModel)

    def test_nobody_is_asked_whether_to_run_the_code_of_a_clip(self, clip, marker, monkeypatch):
        (clip / "mine.py").write_text(code(marker))
        edit_json(clip / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.CLIPConfig"})
        config = {"auto_map": {"AutoTokenizer": [None, "mine.CLIPTokenizer"]}, "tokenizer_class": "Mine"}
        (clip / "tokenizer_config.json").write_text(json.dumps(config))
        monkeypatch.setattr(builtins, "input", lambda _: "y")
        message = refusal(Clip, str(clip), torch.device("cpu"), "--clip_model")
        assert message.startswith(f"--clip_model: {clip} brings code of its own")

    BROKEN = {
        "no object": ("model_index.json", b"[1]"),
        "no class": ("model_index.json", b"{}"),
        "no text": ("model_index.json", b"\xff\xfe"),
        "no UNet": ("unet/config.json", b"{}"),
        "no JSON": ("vae/config.json", b"{"),
        "a short header": ("text_encoder/model.safetensors", b"\x08"),
        "a header that lies": ("unet/diffusion_pytorch_model.safetensors", b"\xff" * 64),
        "no tokenizer": ("tokenizer/tokenizer.json", b"{}"),
    }

    @pytest.mark.parametrize("case", BROKEN)
    def test_broken_files_end_in_a_sentence(self, model, tmp_path, capfd, case):
        file, content = self.BROKEN[case]
        (model / file).write_bytes(content)
        message = siss_error(capfd, *sd_flags(model, "--output_dir", str(tmp_path / "out")))
        assert f"--pretrained_model_name_or_path: {model}" in message


def load(folder: Path, by_name: bool = False, column: str = "image", **values: str) -> datasets.Dataset:
    """As both scripts do, by --train_data_dir or by --dataset_name."""
    args = argparse.Namespace(
        train_data_dir=None if by_name else str(folder),
        dataset_name=str(folder) if by_name else None,
        dataset_config_name=None,
        cache_dir=str(folder.parent / "cache"),
        image_column=column,
    )
    return load_image_rows(args, "--dataset_name" if by_name else "--train_data_dir", args.train_data_dir)


def write_metadata(file: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pyarrow.parquet.write_table(table, file)


class TestDataSets:
    @pytest.fixture
    def folder(self, tmp_path):
        image = np.zeros((8, 8, 3), np.uint8)
        write_images(tmp_path, {"outside.png": image})
        return write_images(tmp_path / "set", {"a.png": image, "b.png": image})

    @pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
    @pytest.mark.parametrize(
        "name",
        [
            *("../outside.png", "x/../../outside.png", "..\\outside.png", "OUTSIDE", "file://OUTSIDE"),
            *("http://127.0.0.1:9/a.png", "hf://datasets/x/y/a.png", "zip://a.png::http://127.0.0.1:9/a.zip"),
        ],
    )
    def test_a_file_name_outside_of_the_folder_is_refused(self, folder, metadata, name):
        name = name.replace("OUTSIDE", str(folder.parent / "outside.png"))
        write_metadata(folder / metadata, [{"file_name": "a.png"}, {"file_name": name}])
        message = refusal(load, folder)
        assert message.startswith("--train_data_dir: ") and name in message and "file_name" in message

    def test_of_several_columns_of_files_each_is_checked(self, folder):
        write_metadata(folder / "metadata.jsonl", [{"file_name": "a.png", "mask_file_name": "../outside.png"}])
        assert "'../outside.png'" in refusal(load, folder)

    def test_pictures_of_other_columns_are_not_decoded(self, folder):
        """They would be with every row, and there is no mask."""
        rows = [{"file_name": "a.png", "mask_file_name": "no.png", "text": "x", "tags": ["y"], "forget": True}]
        write_metadata(folder / "metadata.jsonl", rows)
        rows = load(folder)
        assert set(rows.column_names) == {"image", "text", "tags", "forget"} and rows[0]["text"] == "x"

    def test_the_script_says_so_in_a_sentence(self, folder, tmp_path, capfd, base_args):
        write_metadata(folder / "metadata.jsonl", [{"file_name": "../outside.png"}])
        flags = base_args | {"--train_data_dir": str(folder), "--forget_files": "a.png", "--cache_dir": str(tmp_path)}
        with mock.patch.dict(os.environ, {"HF_DATASETS_CACHE": str(tmp_path)}):
            del flags["--cache_dir"]
            assert_refused(train_siss_unconditional.main, flags, "'../outside.png'", tmp_path, capfd)

    @pytest.mark.parametrize("content", ["", "{", "[1]", '{"text": "x"}', '{"file_name": 5}', "\0\ufffe"])
    def test_metadata_that_is_none(self, folder, content):
        (folder / "metadata.jsonl").write_text(content)
        assert "--train_data_dir" in refusal(load, folder)

    @pytest.mark.parametrize("name", [None, ""])
    def test_a_row_without_an_image(self, folder, name):
        write_metadata(folder / "metadata.jsonl", [{"file_name": "a.png"}, {"file_name": name}])
        assert "row 1 has no image" in refusal(load, folder)

    def test_an_archive(self, folder):
        with zipfile.ZipFile(folder / "more.zip", "w") as archive:
            archive.write(folder / "a.png", "c.png")
        assert "more.zip lies in an archive; unpack it" in refusal(load, folder)

    def test_links_may_lead_anywhere(self, folder, tmp_path):
        (folder / "c.png").symlink_to(tmp_path / "outside.png")
        (tmp_path / "link").symlink_to(folder)
        write_metadata(folder / "metadata.jsonl", [{"file_name": "c.png"}])
        for by_name in (False, True):
            (row,) = load(tmp_path / "link", by_name)
            assert Path(row["image"]["path"]).resolve() == tmp_path / "outside.png"

    @pytest.mark.parametrize("by_name", [False, True])
    def test_a_loading_script_is_not_run(self, folder, marker, by_name):
        (folder / "set.py").write_text(code(marker))
        if by_name:
            assert "scripts are no longer supported" in refusal(load, folder, by_name)
            assert "scripts are no longer supported" in refusal(load, folder / "set.py", by_name)
        else:
            assert len(load(folder)) == 2

    @pytest.mark.parametrize(
        "declared",
        [
            *('data_files: "../*.png"', 'data_files: ["a.png", "OUTSIDE"]', "data_dir: ../", "data_dir: /"),
            'data_files: [{split: train, path: ["a.png", "http://127.0.0.1:9/b.png"]}]',
            'data_files: [{split: train, path: "hf://datasets/x/y/*.png"}]',
        ],
    )
    @pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
    def test_a_card_names_no_files_outside(self, folder, card, declared):
        """Of these, `datasets` would read the local ones and request the others."""
        config = f"configs:\n- config_name: default\n  {declared}\n"
        config = config.replace("OUTSIDE", str(folder.parent / "outside.png"))
        (folder / card).write_text(f"---\n{config}---\n" if card == "README.md" else config)
        message = refusal(load, folder, True)
        assert f"{folder / card} names" in message and "outside" in message and message.startswith("--dataset_name")

    def test_a_card_with_files_within_is_read_and_one_with_code_is_not(self, folder, marker):
        card = "---\nconfigs:\n- config_name: default\n  data_files: a.png\n---\n"
        (folder / "README.md").write_text(card)
        assert len(load(folder, True)) == 1
        (folder / "README.md").write_text(f"---\nx: !!python/object/apply:os.system [touch {marker}]\n---\n")
        assert "README.md" in refusal(load, folder, True)

    @pytest.mark.parametrize(
        "path",
        [
            *("OUTSIDE", "../outside.png", "http://127.0.0.1:9/a.png", "set/../../a.png"),
            *(
                "TABLE/../outside.png",
                "TABLE/link/../outside.png",
            ),  # the second would be read beside the link's target
        ],
    )
    def test_a_table_names_no_files_outside(self, folder, path, monkeypatch):
        """Its card says that a text is the path of an image."""
        monkeypatch.chdir(folder)
        table = folder.parent / "table"
        table.mkdir()
        (table / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n---\n", encoding="utf-8"
        )
        (table / "link").symlink_to(folder)
        path = path.replace("OUTSIDE", str(folder.parent / "outside.png")).replace("TABLE", str(table))
        (table / "data.jsonl").write_text(json.dumps({"image": path}))
        assert f"{path} lies outside of the data set" in refusal(load, table, True)
        (table / "data.jsonl").write_text(json.dumps({"image": str(table / "a.png")}))
        assert len(load(table, True)) == 1

    def test_a_million_paths_are_not_looked_at_one_by_one(self):
        paths = [f"/set/{index}.png" for index in range(1_000_000)]
        cells = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], ["bytes", "path"])
        rows = datasets.Dataset(pa.table({"image": cells}))
        with mock.patch("os.path.abspath", wraps=os.path.abspath) as looked_at:
            check_image_paths(rows, "image", "--train_data_dir", ["/set"])
        assert looked_at.call_count < 10
        assert "/set/0.png lies outside" in refusal(check_image_paths, rows, "image", "--train_data_dir", ["/se"])

    @pytest.mark.parametrize("name", ["", "no/such/folder/there", "a" * 5_000, "http://127.0.0.1:9/a", "a\nb", "."])
    def test_names_of_nothing(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        args = argparse.Namespace(dataset_config_name=None, cache_dir=str(tmp_path), image_column="image")
        args.train_data_dir, args.dataset_name = name, name
        for flag, folder in (("--train_data_dir", name), ("--dataset_name", None)):
            with pytest.raises(UsageError, match=flag):
                load_image_rows(args, flag, folder)


def png(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    """Of one grey level a pixel; `chunks` are kind and content."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [header, *chunks, b"IDAT" + zlib.compress(rows), b"IEND"]
    framed = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_image(source: str | bytes, channels: int = 3, **transform: bool) -> Images:
    cell = {"bytes": None, "path": source} if isinstance(source, str) else {"bytes": source, "path": None}
    transform = ImageTransform(channels, resolution=8, center_crop=True, **transform)
    rows = datasets.Dataset.from_dict({"image": [cell]}, datasets.Features(image=datasets.Image(decode=False)))
    return Images(rows, "image", transform, "--train_data_dir")


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)).convert(mode)


BOMBS = {
    "a header of 50,000 x 50,000": png(50_000, 50_000),
    "a compressed text": png(8, 8, b"zTXtx\0\0" + zlib.compress(bytes(100_000_000)), rows=bytes(72)),
    "a compressed profile": png(8, 8, b"iTXtx\0\1\0\0\0" + zlib.compress(bytes(100_000_000)), rows=bytes(72)),
    "no bytes": b"",
    "a text": b"not a picture",
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "half a JPEG": encoded(noise(), "JPEG")[:400],
    "half a PNG": encoded(noise(), "PNG")[:200],
}


class TestPictures:
    @pytest.mark.parametrize("case", BOMBS)
    def test_what_is_no_picture_is_refused_by_name(self, case, tmp_path):
        file = tmp_path / "bad.png"
        file.write_bytes(BOMBS[case])
        for use in ("load", "digest"):
            message = refusal(getattr(one_image(str(file)), use), 0)
            assert message.startswith(f"--train_data_dir: cannot read {file} (") and "repair or remove" in message
        assert str(file) in refusal(load_training_images, str(tmp_path), 8)
        if "half" not in case:  # of these the header is whole
            assert str(file) in refusal(one_image(str(file)).all_square)

    def test_a_line_of_pixels_is_refused_before_it_is_resized(self, tmp_path):
        """A few kilobytes that would be 200 GB at a resolution of 512."""
        image = one_image(png(1, 1_000_000, rows=bytes(2_000_000)))
        image.transform = ImageTransform(3, resolution=512)
        assert "cannot use image 0: 1 x 1000000 pixels are too narrow" in refusal(image.digest, 0)

    def test_a_pipe_and_a_folder_are_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "folder.png").mkdir()
        for name in ("pipe.png", "folder.png", "none.png"):
            for use in (lambda image: image.digest(0), lambda image: image.all_square()):
                assert f"{name} (it is not there, or no regular file)" in refusal(use, one_image(str(tmp_path / name)))
        assert "no regular file" in refusal(load_training_images, str(tmp_path), 8)

    def test_postscript_is_not_run(self, tmp_path, marker, monkeypatch):
        """Pillow would have Ghostscript run it."""
        script = tmp_path / "gs"
        script.write_text(f"#!/bin/sh\ntouch {marker}\n")
        script.chmod(0o755)
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(script))
        file = tmp_path / "a.png"
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
        assert "cannot identify" in refusal(one_image(str(file)).digest, 0)
        assert "cannot identify" in refusal(load_training_images, str(tmp_path), 8)

    @pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
    def test_of_many_frames_the_first_is_read(self, kind):
        frames = [Image.new("RGB", (8, 8), (index % 256, index // 256, 0)) for index in range(1_000)]
        animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (one_image(animated).load(0) == -1).all()

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"])
    def test_every_kind_of_pixel_is_a_tensor(self, mode, channels):
        levels = np.linspace(0, 60_000, 120).reshape(12, 10)
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}.get(mode)
        grey = noise("L").convert("RGB")
        picture = grey.convert(mode) if dtype is None else Image.fromarray(levels.astype(dtype))
        options = {"transparency": 3} if mode == "P" else {}
        kinds = ["TIFF"] if mode in ("CMYK", "YCbCr", "LAB", "I;16B", "I", "F") else ["PNG"]
        kinds += ["JPEG"] if mode == "CMYK" else []
        for kind in kinds:
            for exact in (False, True):
                images = one_image(encoded(picture, kind, **options), channels, preserve_input_precision=exact)
                try:
                    check_picture(images)
                except UsageError as error:  # rounding has made it coloured
                    assert channels == 1 and mode in ("CMYK", "YCbCr", "LAB") and "colours" in str(error)

    @BOUNDED
    @given(st.data())
    def test_damaged_files_are_pictures_or_refused(self, data):
        kind = data.draw(st.sampled_from(["PNG", "JPEG"]))
        content = bytearray(WHOLE[kind])
        for position, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
            content[position] = value
        content = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        images = one_image(
            content, data.draw(st.sampled_from([1, 3])), preserve_input_precision=data.draw(st.booleans())
        )
        try:
            check_picture(images)
        except UsageError as error:
            assert str(error).startswith("--train_data_dir: cannot ") and len(str(error).splitlines()) == 1


STRIPES = Image.fromarray(np.repeat([0, 255, 100], 4).astype(np.uint8)[:, None].repeat(10, axis=1))
WHOLE = {kind: encoded(STRIPES, kind) for kind in ("PNG", "JPEG")}


def check_picture(images: Images) -> None:
    tensor, channels = images.load(0), images.transform.channels
    assert tensor.shape == (channels, 8, 8) and tensor.dtype == torch.float32
    assert tensor.isfinite().all() and -1 <= tensor.min() and tensor.max() <= 1
    assert len(images.digest(0)) == 16


class TestCuration:
    """`siss curate` reads what it wrote, and what somebody else may have written since."""

    def flip(self, capfd, folder: Path, content: str, name: str = "prompt000_0000.png") -> str:
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / "metadata.jsonl").write_text(content)
        return siss_error(capfd, "curate", "--output_dir", str(folder), "--flip", name)

    @pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", ""])
    def test_a_name_that_leads_elsewhere(self, tmp_path, capfd, name):
        line = json.dumps({"file_name": name, "text": "", "forget": False})
        assert "metadata.jsonl is not what" in self.flip(capfd, tmp_path, line, name or "a")
        assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["metadata.jsonl"]

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "1",
            "[]",
            "{}",
            '{"file_name": 1, "forget": true}',
            '{"file_name": "a.png", "forget": "no"}',
            '{"file_name": "a.png"}',
        ],
    )
    def test_lines_that_are_no_rows(self, tmp_path, capfd, line):
        assert "--output_dir" in self.flip(capfd, tmp_path, line)

    def test_a_picture_that_is_none(self, tmp_path, capfd):
        line = json.dumps({"file_name": "prompt000_0000.png", "text": "", "forget": False})
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "prompt000_0000.png").write_bytes(b"no")
        assert "prompt000_0000.png" in self.flip(capfd, tmp_path, line)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"prompts": 1}', '{"prompts": [{}]}'])
    def test_an_audit_that_is_none(self, tmp_path, capfd, content):
        (tmp_path / "audit.json").write_text(content)
        message = siss_error(
            *(capfd, "curate", "--pretrained_model_name_or_path", "x", "--audit", str(tmp_path)),
            *("--output_dir", str(tmp_path / "out")),
        )
        assert "--audit" in message


@pytest.mark.parametrize("content", ["", "[]", "\xff", "[" * 100_000])
@pytest.mark.parametrize("command, file", [("audit", "settings.json"), ("curate", "curation.json")])
def test_settings_that_are_none(tmp_path, capfd, command, file, content):
    (tmp_path / file).write_text(content, encoding="latin-1")
    flags = ["--pretrained_model_name_or_path", "x", "--prompts", "a", "--output_dir", str(tmp_path)]
    assert f"--output_dir: cannot read {tmp_path / file} (" in siss_error(capfd, command, *flags)


SCRIPTS = {"sd": (train_siss_sd, True), "unconditional": (train_siss_unconditional, False)}


def parser_of(module) -> argparse.ArgumentParser:
    """That of a script, which builds it only to use it."""
    with mock.patch.object(Parser, "parse_args", autospec=True, side_effect=StopIteration) as parse:
        with pytest.raises(StopIteration):
            module.parse_args([])
    return parse.call_args.args[0]


def check(module, calibrate_by_default: bool, argv: list[str]) -> str | None:
    """What the arguments are refused for; None where they are not."""
    printed = StringIO()
    with redirect_stderr(printed), redirect_stdout(StringIO()):
        try:
            args = module.parse_args(argv)
            check_training_arguments(args)
            check_unlearning_arguments(args, calibrate_by_default=calibrate_by_default)
        except UsageError as error:
            return str(error)
        except SystemExit as error:
            assert error.code == 2
            return printed.getvalue().removesuffix("\n")
    assert printed.getvalue() == ""
    return None


class TestArguments:
    VALUES = st.one_of(
        st.sampled_from(
            ["", "nan", "inf", "-inf", "-1", "-0", "1e999", "1e-999", "9" * 5_000, "[1, 2]", "%s", "٣", "²"]
        ),
        st.sampled_from(["off", "latest", "lam=nan", "lam=1e999", "lam=", "=", "lam=[]", "num_neighbors=1e9", "0.5"]),
        st.integers().map(str),
        st.floats().map(str),
        st.text(st.characters(exclude_categories=["Cc", "Zl", "Zp"])),
    )

    @pytest.mark.parametrize("script", SCRIPTS)
    @BOUNDED
    @given(data=st.data())
    def test_any_arguments_are_taken_or_refused_in_a_sentence(self, script, data):
        module, calibrate_by_default = SCRIPTS[script]
        actions = [action for action in PARSERS[script]._actions if "--help" not in action.option_strings]
        argv = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "images"]
        of_unlearning = [action for action in actions if action.container.title == "unlearning"]
        for action in data.draw(st.lists(st.sampled_from(of_unlearning) | st.sampled_from(actions), max_size=4)):
            # Mostly what gets past the parser, to the checks of several arguments together.
            wild = action.dest == "method_args" or data.draw(st.integers(0, 3)) == 0
            values = self.VALUES if wild else st.sampled_from(list(action.choices or ["1"]))
            most = 0 if action.nargs == 0 else 3 if action.nargs in ("*", "+", 2) else 1
            argv += [action.option_strings[0], *data.draw(st.lists(values, min_size=min(most, 1), max_size=most))]
        refused = check(module, calibrate_by_default, argv)
        assert refused is None or len(refused.splitlines()) == 1 and refused

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_a_line_break_makes_no_second_sentence(self, script):
        for value in ("1\n2", "1\r2", "1\x1b[2J2", "1\u20282"):
            refused = check(*SCRIPTS[script], ["--seed", value, "--pretrained_model_name_or_path", "x"])
            assert refused.isprintable(), refused

    @pytest.mark.parametrize("flag", ["output_dir", "pretrained_model_name_or_path"])
    def test_a_name_too_long_for_a_file(self, flag):
        module, _ = SCRIPTS["sd"]
        flags = {"pretrained_model_name_or_path": "x", "train_data_dir": "x", "forget_column": "x", flag: "a" * 5_000}
        argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
        assert f"--{flag}" in refusal(module.main, argv)


PARSERS = {name: parser_of(module) for name, (module, _) in SCRIPTS.items()}


class Forbidden(ast.NodeVisitor):
    """Collects what runs code or a shell, and what loads models without saying that pickles are not read."""

    MODULES = {"subprocess", "pickle", "marshal", "shelve", "dill", "cloudpickle", "runpy", "pty", "joblib"}
    NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
    CALLS = r"os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*)|torch\.load|np\.load|numpy\.load|yaml\.(unsafe_|full_)?load"

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [alias.name for alias in node.names if alias.name.partition(".")[0] in self.MODULES]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        self.found += [
            name for name in names if node.module.partition(".")[0] in self.MODULES or re.fullmatch(self.CALLS, name)
        ]

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in self.NAMES or re.fullmatch(self.CALLS, name):
            self.found.append(name)
        self.found += [f"{name}({key}=...)" for key in ("shell", "allow_pickle") if key in given]
        if given.get("trust_remote_code", "False") != "False":
            self.found.append(f"{name}(trust_remote_code=...)")
        loads = name.endswith((".from_pretrained", ".load_lora_weights")) and "Tokenizer" not in name
        if loads and given.get("use_safetensors") != "True" and None not in given:
            self.found.append(f"{name} without use_safetensors")
        self.generic_visit(node)


def forbidden(source: str) -> list[str]:
    visitor = Forbidden()
    visitor.visit(ast.parse(source))
    return visitor.found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_no_source_runs_code_or_a_shell(file):
    assert forbidden(file.read_text()) == []


def test_the_search_finds_what_it_looks_for():
    for source in (
        *(
            "import subprocess",
            "from pickle import loads",
            "import os\nos.system('x')",
            "eval('x')",
            "torch.load('x')",
        ),
        *("from os import popen", "run('x', shell=True)", "from torch import load", "A.from_pretrained('x')"),
        *("A.from_pretrained('x', use_safetensors=True, trust_remote_code=True)", "np.load('x', allow_pickle=True)"),
    ):
        assert forbidden(source), source
    assert not forbidden("model.eval()\nre.compile('x')\nA.from_pretrained('x', use_safetensors=True)")
