"""Any arguments are taken, or refused in one sentence."""

import argparse
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_siss_sd
from siss_diffusers.errors import UsageError
from siss_diffusers.flags import add_flags, parse_settings
from siss_diffusers.parsing import Parser
from siss_diffusers.settings import TextToImageSettings, UnconditionalSettings, resolve
from tests.helpers.untrusted import BOUNDED, refusal


pytestmark = pytest.mark.usefixtures("no_network", "no_waiting")


SCRIPTS = {"sd": TextToImageSettings, "unconditional": UnconditionalSettings}


def parser_of(settings_class) -> argparse.ArgumentParser:
    parser = Parser(prog="train")
    add_flags(parser, settings_class)
    return parser


def check(settings_class, argv: list[str]) -> str | None:
    """What the arguments are refused for; None where they are not."""
    printed = StringIO()
    with redirect_stderr(printed), redirect_stdout(StringIO()):
        try:
            resolve(parse_settings(settings_class, "", argv))
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
        actions = [action for action in PARSERS[script]._actions if "--help" not in action.option_strings]
        argv = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "images"]
        of_unlearning = [action for action in actions if action.container.title == "unlearning"]
        for action in data.draw(st.lists(st.sampled_from(of_unlearning) | st.sampled_from(actions), max_size=4)):
            # Mostly what gets past the parser, to the checks of several arguments together.
            wild = action.dest == "method_args" or data.draw(st.integers(0, 3)) == 0
            values = self.VALUES if wild else st.sampled_from(list(action.choices or ["1"]))
            most = 0 if action.nargs == 0 else 3 if action.nargs in ("*", "+", 2) else 1
            argv += [action.option_strings[0], *data.draw(st.lists(values, min_size=min(most, 1), max_size=most))]
        refused = check(SCRIPTS[script], argv)
        assert refused is None or len(refused.splitlines()) == 1 and refused

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_a_line_break_makes_no_second_sentence(self, script):
        for value in ("1\n2", "1\r2", "1\x1b[2J2", "1\u20282"):
            refused = check(SCRIPTS[script], ["--seed", value, "--pretrained_model_name_or_path", "x"])
            assert refused.isprintable(), refused

    @pytest.mark.parametrize("flag", ["output_dir", "pretrained_model_name_or_path"])
    def test_a_name_too_long_for_a_file(self, flag):
        flags = {"pretrained_model_name_or_path": "x", "train_data_dir": "x", "forget_column": "x", flag: "a" * 5_000}
        argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
        assert f"--{flag}" in refusal(train_siss_sd.main, argv)


PARSERS = {name: parser_of(module) for name, module in SCRIPTS.items()}
