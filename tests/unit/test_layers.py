"""Who may import whom, what must not be loaded, and that what is written about the package is so."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab
from trimtab import errors

ROOT = Path(__file__).parents[2]
SDK = sorted((ROOT / "sdk" / "trimtab").rglob("*.py"))
RUNTIME = sorted((ROOT / "entrypoints" / "trimtab_runtime").rglob("*.py"))

PURE = {
    f"trimtab.{module}"
    for module in ("errors", "secrets", "spec", "layout", "events", "ledger", "estimate", "families", "sizes", "counting")
}
CLIENT_ONLY = {"boto3", "botocore", "click", "docker", "langchain_community", "requests", "rich", "sagemaker"}
HEAVY = CLIENT_ONLY - {"click"} | {
    "accelerate", "bitsandbytes", "bs4", "h11", "huggingface_hub", "langchain", "lxml", "numpy", "openvino", "openvino_genai",
    "peft", "safetensors", "tokenizers", "torch", "trafilatura", "transformers",
}  # fmt: skip


def imports(file: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, wherever in it; `from a import b` gives a, or a.b where that is a module."""
    package = file.relative_to(ROOT / "sdk" if ROOT / "sdk" in file.parents else ROOT / "entrypoints").parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT / "sdk" / Path(*module.split("."), alias.name)
                yield f"{module}.{alias.name}" if inner.is_dir() or inner.with_suffix(".py").exists() else module


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", RUNTIME, ids=name)
def test_the_runtime_sees_only_the_pure_modules(file):
    ours = {module for module in imports(file) if module.partition(".")[0] == "trimtab"}
    assert ours <= PURE
    assert {module.partition(".")[0] for module in imports(file)} & CLIENT_ONLY == set()


@pytest.mark.parametrize("file", SDK, ids=name)
def test_the_sdk_never_imports_the_runtime(file):
    assert {module for module in imports(file) if module.partition(".")[0] == "trimtab_runtime"} == set()


@pytest.mark.parametrize("file", [file for file in SDK if f"trimtab.{file.stem}" in PURE and file.parent.name == "trimtab"], ids=name)
def test_the_pure_modules_need_pydantic_and_the_standard_library(file):
    for module in imports(file):
        top = module.partition(".")[0]
        assert module in PURE or top in sys.stdlib_module_names or top == "pydantic", module


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("trimtab", HEAVY | {"click", "pydantic"}),
        ("trimtab.cli", HEAVY),
        ("trimtab.job", HEAVY | {"click"}),
        ("trimtab.run", HEAVY | {"click"}),
        ("trimtab.staging", HEAVY | {"click"}),
        ("trimtab.backends.process", HEAVY | {"click"}),
        ("trimtab_runtime.__main__", HEAVY | {"click", "trimtab.backends", "trimtab.cli", "trimtab.job", "trimtab.run"}),
    ],
)
def test_an_import_stays_light(module, banned):
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {banned!r}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


def tree(root: type, depth: int = 0) -> Iterator[str]:
    yield "    " * depth + root.__name__
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


def test_the_tree_in_the_docstring_is_the_tree():
    assert list(tree(errors.TrimtabError)) == inspect.cleandoc(errors.__doc__).split("\n\n")[1].splitlines()


def test_every_error_is_public():
    assert {line.strip() for line in tree(errors.TrimtabError)} <= set(trimtab.__all__)


@pytest.mark.parametrize("public", trimtab.__all__)
def test_what_is_public_is_there_and_says_what_it_is(public):
    found = getattr(trimtab, public)
    assert found.__name__ == public
    assert inspect.getdoc(found)


def test_all_is_the_public_api():
    assert sorted(trimtab.__all__) == trimtab.__all__
    assert {found for found in dir(trimtab) if found[0].isupper() and found not in ("Any", "TYPE_CHECKING")} == set(trimtab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Jobs'"):
        trimtab.Jobs  # noqa: B018
