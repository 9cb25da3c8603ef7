"""The card of what is published, and the figures in it."""

import json

import pytest

from siss_diffusers.errors import UsageError
from siss_diffusers.hub.card import CARD_MARK
from siss_diffusers.hub.contents import only_figures, read_public_evaluation, weights_digest
from siss_diffusers.hub.upload import collect_uploads
from tests.helpers.publishing import BASE, REPO, error_of, push


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


def test_only_figures_are_left_of_an_evaluation():
    content = {
        "share": 0.5,
        "none": None,
        "flag": True,
        "name": "jane",
        "points": [{"step": 1, "who": "jane"}, "jane"],
    }
    assert only_figures(content) == {"share": 0.5, "none": None, "flag": True, "points": [{"step": 1}]}


@pytest.mark.parametrize(
    "content", [{"base": {}}, {"base": {}, "unlearned": []}, {"base": {}, "unlearned": {}, "settings": 1}]
)
def test_json_that_is_no_evaluation(content, tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="does not compare a base with an unlearned model"):
        read_public_evaluation(tmp_path, None)
