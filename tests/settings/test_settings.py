"""A setting is one field: its flag, its check, its help, its resume rule, and whether it may be published."""

from dataclasses import fields

import pytest

from siss_diffusers.errors import UsageError
from siss_diffusers.flags import add_flags, parse_settings
from siss_diffusers.methods import METHODS, SISS
from siss_diffusers.parsing import Parser, path
from siss_diffusers.settings import TextToImageSettings, UnconditionalSettings, flag_name, resolve
from siss_diffusers.training.resume import changes, compared_fields, described


KINDS = [UnconditionalSettings, TextToImageSettings]
MODEL = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "images"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_is_a_flag_of_its_name_with_help(kind):
    parser = Parser(prog="train")
    add_flags(parser, kind)
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for field in fields(kind):
        action = actions[f"--{flag_name(field)}"]
        assert action.dest == field.name and len(action.help) > 10 and action.help.endswith((".", ";", ")"))
    assert len({action.dest for action in parser._actions}) == len(fields(kind)) + 1  # and --help


def test_help_tells_the_default():
    parser = Parser(prog="train")
    add_flags(parser, TextToImageSettings)
    helps = {action.dest: action.help for action in parser._actions}
    assert helps["rank"] == "Rank of the adapter; default: 4."
    assert helps["num_redirect_images"].count("efault") == 1 and "efault" not in helps["use_lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_flags_left_out_are_the_defaults_of_python(kind):
    parsed = parse_settings(kind, "", MODEL)
    assert parsed == kind(pretrained_model_name_or_path="model", train_data_dir="images")


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_registered_later_is_a_choice(kind, monkeypatch):
    class Mine(SISS):
        name = "mine"

    with pytest.raises(SystemExit):
        parse_settings(kind, "", [*MODEL, "--method", "mine"])
    monkeypatch.setitem(METHODS, "mine", Mine)
    assert parse_settings(kind, "", [*MODEL, "--method", "mine"]).method == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_names_what_is_forgotten_is_public(kind):
    """Names, paths, prompts and values are texts: every text is private but a choice among names of ours."""
    secret = "the-secret"
    is_text = {
        field.name: field.metadata["parse"] in (str, path) and "bool" not in str(field.type) for field in fields(kind)
    }
    texts = {field.name: secret for field in fields(kind) if is_text[field.name] and not field.metadata["choices"]}
    assert {"forget_data_dir", "forget_files", "forget_value", "train_data_dir", "output_dir"} <= texts.keys()
    lists = {name: [secret] for name in texts if kind.__dataclass_fields__[name].metadata["nargs"] in ("+", "*")}
    assert secret not in str(kind(**texts | lists).public())


def test_what_may_be_published():
    public = UnconditionalSettings(seed=3, forget_value="me", hub_token="hf_x", num_train_epochs=2).public()
    assert public["seed"] == 3 and public["num_epochs"] == 2 and public["method"] == "redirect"
    assert not {"forget_value", "hub_token", "output_dir"} & public.keys()


def test_values_are_checked_as_flags_are():
    settings = UnconditionalSettings.from_values(
        {"method": "siss", "forget_timestep_ranges": [(300, 1000), (0, 300)], "forget_scale": 1}
    )
    assert resolve(settings)[0].forget_timestep_ranges == [(300, 1000), (0, 300)]
    assert settings.forget_scale == 1.0
    for values, expected in (
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"lr_scheduler": "sine"}, "lr_scheduler must be one of linear"),
        ({"use_ema": 1}, "use_ema must be True or False, not 1"),
        ({"sead": 1}, "there is no setting 'sead'"),
        ({"adam_beta1": float("nan")}, "adam_beta1 must be a finite number"),
    ):
        with pytest.raises(UsageError, match=expected):
            UnconditionalSettings.from_values(values)


def test_a_resumed_run_is_compared_by_the_rules_of_the_fields():
    rules = {field.name: field.metadata["resume"] for field in fields(TextToImageSettings)}
    assert rules["seed"] == "same" and rules["rank"] == "fixed" and rules["max_train_steps"] == "length"
    compared = {field.name for field in compared_fields(TextToImageSettings())}
    assert "seed" in compared and not {"output_dir", "max_train_steps", "forget_data_dir"} & compared
    compared = {field.name for field in compared_fields(TextToImageSettings(lr_scheduler="cosine"))}
    assert "max_train_steps" in compared


def test_a_description_hashes_what_is_private():
    seed, revision = (TextToImageSettings.__dataclass_fields__[name] for name in ("seed", "revision"))
    assert described(seed, 3, "00") == 3
    hidden = described(revision, "of-a-person", "00")
    assert hidden.startswith("hash:") and hidden == described(revision, "of-a-person", "00")
    assert hidden != described(revision, "of-a-person", "01")
    saved = {"arguments": {"seed": 1}, "method_args": {}, "pairs_per_step": 4, "data": {}}
    assert changes(saved, saved | {"arguments": {"seed": 2}}) == {"seed": "--seed was 1 and is 2"}
