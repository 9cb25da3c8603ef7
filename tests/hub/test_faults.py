from pathlib import Path

import pytest

from tests.helpers.commands import to_argv
from tests.helpers.forked import Forker
from tests.helpers.hub_server import HubServer
from tests.helpers.publishing import BASE, REPO, TOKEN, error_of, push
from tests.helpers.runs import LORA


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "README.md"}


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

    def test_after_training_the_run_is_whole(self, forker, hub, lora_run, captioned_folder, tmp_path):
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
