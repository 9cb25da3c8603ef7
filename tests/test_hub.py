"""Publishing on a real server on loopback: what goes up, what stays, what comes back, and what happens when it fails."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, to_argv
from diffusers import DDPMPipeline, StableDiffusionPipeline
from forked import Child, Forker
from hub_server import HubServer
from PIL import Image
from test_train_siss_sd import LORA, captioned_folder, full_args, lora_args, model, read_metadata, write_metadata  # noqa: F401

from siss_diffusers.errors import UsageError
from siss_diffusers.hub.card import CARD_MARK
from siss_diffusers.hub.contents import only_figures, weights_digest
from siss_diffusers.hub.upload import collect_uploads


BASE, TOKEN, READ_TOKEN = "base/tiny-sd", "hf_write", "hf_read"
REPO = "founder/forgetful"
BASE_CARD = b"---\nlicense: creativeml-openrail-m\n---\n# A tiny model\n"


@pytest.fixture(scope="module")
def server():
    with HubServer(tokens={TOKEN: "founder", READ_TOKEN: ("founder", "read")}) as server:
        yield server


@pytest.fixture(scope="module")
def forker(server, tmp_path_factory):
    """Processes that know of no other Hub than the one on loopback."""
    environment = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    environment |= {"HF_HOME": str(tmp_path_factory.mktemp("hf_home"))}
    with Forker(tmp_path_factory.mktemp("logs"), **environment) as forker:
        yield forker


@pytest.fixture
def hub(server, model):  # noqa: F811
    """The server with nothing but a base model on it."""
    server.reset()
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    server.add_repo(BASE, files | {"README.md": BASE_CARD})
    return server


@pytest.fixture(scope="module")
def finished(forker, server, tmp_path_factory, model, captioned_folder):  # noqa: F811
    """Runs that ended, by kind; copied for each test that pushes one."""
    server.reset()
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    server.add_repo(BASE, files | {"README.md": BASE_CARD})
    folder = tmp_path_factory.mktemp("finished")
    flags = {
        "--pretrained_model_name_or_path": BASE,
        "--train_data_dir": str(captioned_folder),
        "--cache_dir": str(folder / "cache"),
        "--max_train_steps": "2",
        "--train_batch_size": "4",
        "--learning_rate": "1e-2",
        "--report_to": "none",
        "--calibrate_forgetting": "off",
    }
    for kind, more in (("lora", {"--use_lora": None}), ("full", {})):
        child = forker.run("train_siss_sd", to_argv(flags | more | {"--output_dir": str(folder / kind)}))
        assert child.returncode == 0, child.output
    return folder


@pytest.fixture
def lora_run(finished, tmp_path) -> Path:
    return shutil.copytree(finished / "lora", tmp_path / "forgetful")


@pytest.fixture
def full_run(finished, tmp_path) -> Path:
    return shutil.copytree(finished / "full", tmp_path / "forgetful")


def push(forker: Forker, run: Path, *flags: str, token: str = TOKEN) -> Child:
    return forker.run("siss", ["push", str(run), "--hub_token", token, "--hub_model_id", REPO, *flags])


def error_of(child: Child) -> str:
    assert "Traceback" not in child.output, child.output
    (sentence,) = [line for line in child.output.splitlines() if "error: " in line]
    return sentence


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "README.md"}


def run_card(forker: Forker, card: bytes, folder: Path) -> Image.Image:
    """Run the code of a card as it stands; the picture that it makes with one seed."""
    (code,) = re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)
    script = folder / "card.py"
    script.write_text(f"import torch\ntorch.manual_seed(0)\n{code}image.save({str(folder / 'card.png')!r})\n")
    child = forker.run("python", [str(script)])
    assert child.returncode == 0, child.output
    return Image.open(folder / "card.png")


class TestWhatComesBack:
    def test_adapter(self, forker, hub, lora_run, model, tmp_path):  # noqa: F811
        child = push(forker, lora_run)
        assert child.returncode == 0, child.output
        files = hub.files(REPO)
        assert set(files) == {".gitattributes", LORA, "README.md", "unlearning.json"}
        assert files[LORA] == (lora_run / LORA).read_bytes()
        assert len(hub.commits(REPO)) == 2  # the first is the Hub's own

        pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
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


class TestCard:
    def metadata(self, card: bytes) -> dict:
        import yaml

        return yaml.safe_load(card.decode().split("---")[1])

    def test_metadata(self, forker, hub, lora_run):
        assert push(forker, lora_run).returncode == 0
        assert self.metadata(hub.files(REPO)["README.md"]) == {
            "base_model": BASE,
            "base_model_relation": "adapter",
            "library_name": "diffusers",
            "license": "creativeml-openrail-m",
            "pipeline_tag": "text-to-image",
            "tags": ["data-unlearning", "siss", "lora", "diffusers-training"],
        }

    def test_a_fine_tuned_pipeline_is_no_adapter(self, forker, hub, full_run):
        assert push(forker, full_run).returncode == 0
        card = hub.files(REPO)["README.md"]
        assert self.metadata(card)["base_model_relation"] == "finetune"
        assert "lora" not in self.metadata(card)["tags"] and b"The adapter can be removed" not in card

    def test_says_how_many_and_that_nothing_was_evaluated(self, forker, hub, lora_run):
        assert push(forker, lora_run).returncode == 0
        card = hub.files(REPO)["README.md"].decode()
        assert "3 images of the training set" in card and "20 other images to keep" in card
        assert "**Nothing was measured.**" in card and "The adapter can be removed" in card

    def test_a_table_from_an_evaluation_with_its_figures_and_no_words(self, forker, hub, lora_run, tmp_path):
        entry = {"samples": 256, "copy_share": 0.863, "copy_share_low": 0.816, "copy_share_high": 0.9, "note": "jane"}
        after = entry | {"copy_share": 0.0, "copy_share_low": 0.0, "copy_share_high": 0.015, "fid": 12.345}
        settings = {"unlearned_weights": weights_digest(lora_run), "skipped": {"kid": "cannot read jane.png"}}
        content = {"base": entry, "unlearned": after, "jane": entry, "settings": settings}
        (tmp_path / "evaluation.json").write_text(json.dumps(content))
        assert push(forker, lora_run, "--evaluation", str(tmp_path)).returncode == 0
        files = hub.files(REPO)
        assert "| Copies | 86.3 % [81.6, 90.0] | 0.0 % [0.0, 1.5] |" in files["README.md"].decode()
        assert "| FID | - | 12.35 | lower |" in files["README.md"].decode()
        assert b"jane" not in files["README.md"] + files["evaluation.json"]
        assert json.loads(files["evaluation.json"])["settings"]["skipped"] == ["kid"]

    def test_an_evaluation_of_other_weights_is_refused(self, forker, hub, lora_run):
        content = {"base": {}, "unlearned": {}, "settings": {"unlearned_weights": "0" * 32}}
        (lora_run / "evaluation.json").write_text(json.dumps(content))
        child = push(forker, lora_run)
        assert child.returncode == 2 and "--evaluation" in error_of(child) and "other weights" in error_of(child)
        assert REPO not in hub.repos

    def test_made_anew_until_somebody_edits_it(self, forker, hub, lora_run):
        assert push(forker, lora_run).returncode == 0
        (lora_run / "evaluation.json").write_text(json.dumps({"base": {}, "unlearned": {"fid": 1.5}}))
        assert push(forker, lora_run).returncode == 0
        card = hub.files(REPO)["README.md"].decode()
        assert "**Nothing was measured.**" not in card
        mine = card.replace("## Limitations", "## My limitations")
        (lora_run / "README.md").write_text(mine)
        child = push(forker, lora_run)
        assert child.returncode == 0 and "edited by hand" in child.output
        assert hub.files(REPO)["README.md"].decode() == mine

    def test_a_base_from_a_folder_is_not_named(self, lora_run, tmp_path):
        report = json.loads((lora_run / "unlearning.json").read_text())
        (lora_run / "unlearning.json").write_text(json.dumps(report | {"base_model": None}))
        (card,) = [file.source for file in collect_uploads(lora_run, REPO, None) if file.path_in_repo == "README.md"]
        assert b"base_model" not in card and b"THE BASE MODEL" in card and CARD_MARK.encode() in card


def test_nothing_of_what_was_forgotten_is_uploaded(forker, hub, captioned_folder, tmp_path):  # noqa: F811
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


class TestFaults:
    """Whatever fails: one sentence that says what helps, the run as it was, nothing on the Hub, and the next push works."""

    FAULTS = {
        "401 at the commit": (("POST", "/commit/", 401), "--hub_token"),
        "403 at the commit": (("POST", "/commit/", 403), "may not write"),
        "409": (("POST", "/commit/", 409), "changed by somebody else"),
        "412": (("POST", "/commit/", 412), "changed by somebody else"),
        "413": (("POST", "/commit/", 413), "answered 413"),
    }

    def check(self, forker: Forker, hub: HubServer, run: Path, expected: str) -> None:
        before = contents(run)
        child = push(forker, run)
        assert child.returncode == 1, child.output
        sentence = error_of(child)
        assert expected in sentence and f"`siss push {run} --hub_model_id {REPO}`" in sentence
        assert contents(run) == before
        assert len(hub.commits(REPO)) == 1, "nothing, or only a part, was committed"
        hub.faults.clear()
        assert push(forker, run).returncode == 0
        assert LORA in hub.files(REPO)

    @pytest.mark.parametrize("case", FAULTS)
    def test_refused(self, case, forker, hub, lora_run):
        (method, path, status), expected = self.FAULTS[case]
        hub.fail(method, path, status, times=50)
        self.check(forker, hub, lora_run, expected)

    def test_too_many_requests_for_long(self, forker, hub, lora_run):
        hub.fail("POST", "/commit/", 429, times=50, headers={"Retry-After": "1"})
        self.check(forker, hub, lora_run, "wait 1 seconds")

    @pytest.mark.slow
    def test_storage_broken_for_long(self, forker, hub, lora_run):
        hub.fail("PUT", "/storage/", 500, times=50)
        self.check(forker, hub, lora_run, "500")

    @pytest.mark.slow
    def test_connection_lost_for_long(self, forker, hub, lora_run):
        hub.fail("PUT", "/storage/", drop_after=100, times=50)
        self.check(forker, hub, lora_run, "cannot be reached")

    @pytest.mark.parametrize(
        "fault",
        [
            ("POST", "/commit/", 429, {"headers": {"Retry-After": "1"}}),
            ("POST", "/preupload/", 429, {"headers": {"Retry-After": "1"}}),
            ("PUT", "/storage/", 500, {}),
            ("PUT", "/storage/", None, {"drop_after": 100}),
            ("POST", "/commit/", 503, {}),
        ],
        ids=lambda fault: f"{fault[1].strip('/')}-{fault[2] or 'dropped'}",
    )
    def test_what_passes_is_waited_for(self, fault, forker, hub, lora_run):
        method, path, status, options = fault
        hub.fail(method, path, status, **options)
        child = push(forker, lora_run)
        assert child.returncode == 0, child.output
        assert not hub.faults and len(hub.commits(REPO)) == 2
        assert hub.files(REPO)[LORA] == (lora_run / LORA).read_bytes()

    def test_a_commit_whose_answer_is_lost_is_not_made_twice(self, forker, hub, lora_run):
        hub.fail("POST", "/commit/", after_bytes=0)
        push(forker, lora_run)
        assert hub.files(REPO)[LORA] == (lora_run / LORA).read_bytes()
        assert len(hub.commits(REPO)) == 2

    def test_full_disk_on_this_side(self, forker, hub, lora_run):
        """The card cannot be written beside the run; then nothing goes up either."""
        before = contents(lora_run)
        arguments = ["push", str(lora_run), "--hub_token", TOKEN, "--hub_model_id", REPO]
        child = forker.run("siss", arguments, file_size_limit=1024)
        assert child.returncode == 1 and "README.md could not be written" in error_of(child), child.output
        assert contents(lora_run) == before and len(hub.commits(REPO)) == 1
        assert push(forker, lora_run).returncode == 0

    def test_after_training_the_run_is_whole(self, forker, hub, lora_run, captioned_folder, tmp_path):  # noqa: F811
        out = tmp_path / "trained"
        flags = {
            "--pretrained_model_name_or_path": BASE,
            "--train_data_dir": str(captioned_folder),
            "--output_dir": str(out),
            "--cache_dir": str(tmp_path / "cache"),
            "--max_train_steps": "1",
            "--train_batch_size": "2",
            "--report_to": "none",
            "--calibrate_forgetting": "off",
            "--use_lora": None,
            "--push_to_hub": None,
            "--hub_model_id": REPO,
            "--hub_token": TOKEN,
        }
        hub.fail("POST", "/commit/", 403, times=50)
        child = forker.run("train_siss_sd", to_argv(flags))
        assert child.returncode == 1 and f"siss push {out}" in error_of(child)
        assert (out / LORA).exists() and (out / "receipt.json").exists()


def test_an_adapter_on_the_hub_that_is_a_pickle_is_refused(forker, hub, captioned_folder, tmp_path):  # noqa: F811
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


def test_only_figures_are_left_of_an_evaluation():
    content = {
        "share": 0.5,
        "none": None,
        "flag": True,
        "name": "jane",
        "points": [{"step": 1, "who": "jane"}, "jane"],
    }
    assert only_figures(content) == {"share": 0.5, "none": None, "flag": True, "points": [{"step": 1}]}
