"""Publishing on a real server on loopback: what goes up, what stays, what comes back, and what happens when it fails."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image

from siss_diffusers.errors import UsageError
from siss_diffusers.hub.contents import weights_digest
from siss_diffusers.hub.upload import collect_uploads
from tests.helpers.commands import to_argv
from tests.helpers.forked import Forker
from tests.helpers.paths import TINY_MODEL
from tests.helpers.pictures import read_metadata, write_metadata
from tests.helpers.publishing import BASE, READ_TOKEN, REPO, TOKEN, error_of, push
from tests.helpers.runs import LORA


def run_card(forker: Forker, card: bytes, folder: Path) -> Image.Image:
    """Run the code of a card as it stands; the picture that it makes with one seed."""
    (code,) = re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)
    script = folder / "card.py"
    script.write_text(f"import torch\ntorch.manual_seed(0)\n{code}image.save({str(folder / 'card.png')!r})\n")
    child = forker.run("python", [str(script)])
    assert child.returncode == 0, child.output
    return Image.open(folder / "card.png")


class TestWhatComesBack:
    def test_adapter(self, forker, hub, lora_run, pipeline_folder, tmp_path):
        child = push(forker, lora_run)
        assert child.returncode == 0, child.output
        files = hub.files(REPO)
        assert set(files) == {".gitattributes", LORA, "README.md", "unlearning.json"}
        assert files[LORA] == (lora_run / LORA).read_bytes()
        assert len(hub.commits(REPO)) == 2  # the first is the Hub's own

        pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
        pictures = {}
        for name in ("base", "unlearned"):
            torch.manual_seed(0)
            pictures[name] = pipeline("a photograph of the sea").images[0]
            pipeline.load_lora_weights(lora_run)
        found = run_card(forker, files["README.md"], tmp_path)
        assert found.tobytes() == pictures["unlearned"].tobytes() != pictures["base"].tobytes()

    def test_pipeline(self, forker, hub, full_run, tmp_path):
        assert push(forker, full_run).returncode == 0
        torch.manual_seed(0)
        expected = StableDiffusionPipeline.from_pretrained(full_run, safety_checker=None)("a photograph of the sea")
        found = run_card(forker, hub.files(REPO)["README.md"], tmp_path)
        assert found.tobytes() == expected.images[0].tobytes()

    def test_unconditional_pipeline_pushed_by_the_script(self, forker, hub, base_args, tmp_path):
        flags = base_args | {"--push_to_hub": None, "--hub_token": TOKEN, "--hub_private_repo": None}
        flags["--output_dir"] = str(tmp_path / "digits-without")
        child = forker.run("train_siss_unconditional", to_argv(flags))
        assert child.returncode == 0, child.output
        files = hub.files("founder/digits-without")
        assert hub.repos["founder/digits-without"].private
        assert str(TINY_MODEL).encode() not in hub.uploaded_bytes(), "where the base model was"
        assert files["README.md"] == (tmp_path / "digits-without" / "README.md").read_bytes()
        (tmp_path / "back").mkdir()
        for name, content in files.items():
            (tmp_path / "back" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "back" / name).write_bytes(content)
        pictures = []
        for folder in ("digits-without", "back"):
            generator = torch.Generator().manual_seed(0)
            pipeline = DDPMPipeline.from_pretrained(tmp_path / folder)
            pictures.append(pipeline(generator=generator, num_inference_steps=3, output_type="np").images)
        assert (pictures[0] == pictures[1]).all()


def test_nothing_of_what_was_forgotten_is_uploaded(forker, hub, captioned_folder, tmp_path):
    """Every byte that left the machine is searched: prompts, names of files and folders, pictures, their hashes, the
    receipt, states of the optimizer, logs."""
    data = shutil.copytree(captioned_folder, tmp_path / "secret-data")
    lines = read_metadata(data)
    for line in lines:
        if line["forget"]:
            (data / line["file_name"]).rename(data / f"jane_doe_{line['file_name']}")
            line |= {"file_name": f"jane_doe_{line['file_name']}", "text": "jane doe in her garden"}
        line["person"] = "jane-17" if line.pop("forget") else "nobody"
    write_metadata(data, lines)
    run = tmp_path / "out"
    flags = {
        "--pretrained_model_name_or_path": BASE,
        "--train_data_dir": str(data),
        "--forget_column": "person",
        "--forget_value": "jane-17",
        "--cache_dir": str(tmp_path / "cache"),
        "--output_dir": str(run),
        "--max_train_steps": "2",
        "--train_batch_size": "4",
        "--checkpointing_steps": "1",
        "--validation_steps": "1",
        "--num_validation_images": "2",
        "--num_inference_steps": "2",
        "--report_to": "tensorboard",
        "--calibrate_forgetting": "off",
        "--push_to_hub": None,
        "--hub_model_id": REPO,
        "--hub_token": TOKEN,
    }
    for more in ({"--use_lora": None}, {"--overwrite_output_dir": None}):
        child = forker.run("train_siss_sd", to_argv(flags | more))
        assert child.returncode == 0, child.output
        assert "jane" not in child.output

    # Then an evaluation, and a folder that became untidy.
    child = forker.run(
        "siss",
        to_argv(
            {
                "evaluate": None,
                "--base": BASE,
                "--unlearned": str(run),
                "--train_data_dir": str(data),
                "--forget_column": "person",
                "--forget_value": "jane-17",
                "--cache_dir": str(tmp_path / "cache"),
                "--output_dir": str(tmp_path / "evaluation"),
                "--num_samples": "8",
                "--num_ordinary_samples": "4",
                "--num_inference_steps": "2",
            }
        ),
    )
    assert child.returncode == 0, child.output
    shutil.copytree(tmp_path / "evaluation", run / "unet" / "pictures")
    shutil.copy(data / "jane_doe_20.png", run / "unet" / "jane_doe_20.png")
    shutil.copy(data / "jane_doe_20.png", run)
    shutil.copy(data / "metadata.jsonl", run / "tokenizer")
    shutil.copy(data / "jane_doe_20.png", run / "unet" / "jane_doe.safetensors")
    (run / "tokenizer" / "jane_doe.json").write_text('{"prompt": "jane doe"}')
    config = json.loads((run / "unet" / "config.json").read_text())
    (run / "unet" / "config.json").write_text(json.dumps(config | {"_name_or_path": str(data)}))
    evaluation = tmp_path / "evaluation" / "evaluation.json"
    assert json.loads(evaluation.read_text())["settings"]["unlearned_weights"] == weights_digest(run)
    child = push(forker, run, "--evaluation", str(evaluation))
    assert child.returncode == 0, child.output
    assert "jane" not in child.output
    assert "evaluation.json" in hub.files(REPO)
    assert "| base model | this model |" in hub.files(REPO)["README.md"].decode()

    uploaded = hub.uploaded_bytes()
    assert len(uploaded) > (run / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    receipt = json.loads((run / "receipt.json").read_text())
    forbidden = [b"jane", b"secret-data", str(tmp_path).encode(), receipt["key"].encode(), b"receipt", b"exp_avg"]
    forbidden += [digest.encode() for digest in receipt["forgotten"]]
    for line in lines:
        content = (data / line["file_name"]).read_bytes()
        pixels = Image.open(data / line["file_name"]).convert("RGB")
        digest = hashlib.blake2b(f"{pixels.size}".encode() + pixels.tobytes(), digest_size=16)
        found = [content[-64:], pixels.tobytes()[:192], hashlib.sha256(content).hexdigest().encode()]
        forbidden += [*found, hashlib.md5(content).hexdigest().encode(), digest.hexdigest().encode()]
    forbidden += [base64.b64encode(pattern)[:-4] for pattern in forbidden]
    forbidden += [path.read_bytes()[-64:] for path in (run / "logs").rglob("events*")]
    assert [pattern for pattern in forbidden if pattern in uploaded] == []
    names = {name for commit in hub.commits(REPO) for name in commit.files}
    assert not [name for name in names if re.search(r"png|jsonl|checkpoint|logs|receipt|optimizer|state|html", name)]


def test_the_listing_comes_first_and_dry_run_stops_there(forker, hub, lora_run):
    hub.requests.clear()
    child = push(forker, lora_run, "--dry_run")
    assert child.returncode == 0, child.output
    assert re.search(rf"To {REPO}, in one commit:\n  {LORA} +\d", child.output)
    assert "2 other files are not uploaded." in child.output and "Nothing was uploaded" in child.output
    assert {request.method for request in hub.requests} <= {"GET"}  # the licence of the base
    assert not (lora_run / "README.md").exists() and REPO not in hub.repos


def test_the_token_is_sent_with_every_request(forker, hub, lora_run):
    hub.requests.clear()
    assert push(forker, lora_run).returncode == 0
    asked = re.compile(rf"{REPO}|{BASE}|/api/repos/create")  # the storage has signed addresses, no token
    signed = [request for request in hub.requests if asked.search(request.path)]
    assert len(signed) > 4
    unsigned = [request.path for request in signed if request.headers.get("authorization") != f"Bearer {TOKEN}"]
    assert unsigned == []


def test_an_adapter_on_the_hub_that_is_a_pickle_is_refused(forker, hub, captioned_folder, tmp_path):
    hub.add_repo("founder/pickled", {"pytorch_lora_weights.bin": b"cos"})
    flags = {"--base": BASE, "--unlearned": "founder/pickled", "--train_data_dir": str(captioned_folder)}
    child = forker.run("siss", ["evaluate", *to_argv(flags | {"--output_dir": str(tmp_path / "evaluation")})])
    assert child.returncode == 2
    assert "--unlearned: founder/pickled holds its weights as pickles (pytorch_lora_weights.bin)" in error_of(child)
    assert not [request for request in hub.requests if request.path.endswith("/pytorch_lora_weights.bin")]


class TestBeforeTraining:
    """What is wrong with the repository is said before a model is loaded."""

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"--hub_token": "hf_wrong"}, "does not know the token"),
            ({"--hub_token": READ_TOKEN}, "may not write"),
            ({"--hub_model_id": "somebody/else"}, "may not write"),
            ({"--hub_model_id": "a/b/c"}, "--hub_model_id: 'a/b/c' cannot name a repository"),
            ({"--hub_model_id": "founder/public", "--hub_private_repo": None}, "exists already, and is public"),
        ],
        ids=["unknown token", "read token", "another's", "no name", "public"],
    )
    def test_refused(self, flags, expected, forker, hub, base_args, tmp_path):
        hub.add_repo("founder/public", {"README.md": b"mine"})
        flags = base_args | {"--push_to_hub": None, "--hub_token": TOKEN, "--hub_model_id": REPO} | flags
        child = forker.run("train_siss_unconditional", to_argv(flags))
        assert child.returncode == 2 and expected in error_of(child), child.output
        assert not (tmp_path / "out").exists()

    def test_no_hub(self, forker, base_args, tmp_path):
        """A fork of a parent that read another address."""
        with Forker(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path)) as other:
            child = other.run("train_siss_unconditional", to_argv(base_args | {"--push_to_hub": None}))
        assert child.returncode == 2 and "cannot be reached" in error_of(child)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no unlearning.json: no run has ended there"),
        ({"checkpoint-2/state.json": "{}"}, "its run has not finished"),
        ({"unlearning.json": "{"}, "cannot be read"),
        ({"unlearning.json": "{}"}, "neither an adapter nor a pipeline"),
    ],
)
def test_a_folder_that_holds_no_finished_run(files, expected, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=expected):
        collect_uploads(tmp_path, REPO, None)
