import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import to_argv
from tests.helpers.forked import Forker
from tests.helpers.hub_server import HubServer
from tests.helpers.publishing import BASE, READ_TOKEN, TOKEN, serve_base_model


@pytest.fixture(scope="package")
def server():
    with HubServer(tokens={TOKEN: "founder", READ_TOKEN: ("founder", "read")}) as server:
        yield server


@pytest.fixture(scope="package")
def forker(server, tmp_path_factory):
    """Processes that know of no other Hub than the one on loopback."""
    environment = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    environment |= {"HF_HOME": str(tmp_path_factory.mktemp("hf_home"))}
    with Forker(tmp_path_factory.mktemp("logs"), **environment) as forker:
        yield forker


@pytest.fixture
def hub(server, pipeline_folder):
    """The server with nothing but a base model on it."""
    serve_base_model(server, pipeline_folder)
    return server


@pytest.fixture(scope="package")
def finished(forker, server, tmp_path_factory, pipeline_folder, captioned_folder):
    """Runs that ended, by kind; copied for each test that pushes one."""
    serve_base_model(server, pipeline_folder)
    folder = tmp_path_factory.mktemp("finished")
    flags = {
        "--pretrained_model_name_or_path": BASE,
        "--train_data_dir": str(captioned_folder),
        "--cache_dir": str(folder / "cache"),
        "--max_train_steps": "2",
        "--train_batch_size": "4",
        "--learning_rate": "1e-2",
        "--report_to": "none",
        "--method": "siss",
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
