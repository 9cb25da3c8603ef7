"""No source runs code or a shell, or reads pickles."""

import ast
import re
from pathlib import Path

import pytest

import siss_diffusers
import train_siss_sd
import train_siss_unconditional


SOURCES = [*Path(siss_diffusers.__file__).parent.rglob("*.py")]
SOURCES += [Path(module.__file__) for module in (train_siss_sd, train_siss_unconditional)]


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
