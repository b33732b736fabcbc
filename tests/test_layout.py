"""House rules: import directions, every YAML parsed and classified, README and help true."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML
from typer._click.exceptions import MissingParameter, NoArgsIsHelpError, UsageError
from typer.core import TyperGroup

from kilocopy import cli

ROOT = Path(__file__).parent.parent
SERVER_ONLY, DRIVER_ONLY = {"ray", "vllm", "torch", "transformers"}, {"locust", "gevent", "geventhttpclient"}


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kilocopy", SERVER_ONLY | DRIVER_ONLY | {"cluster", "loadtests"}),
        ("cluster", DRIVER_ONLY | {"loadtests"}),
        ("loadtests", SERVER_ONLY | {"cluster"}),
        ("gpu", SERVER_ONLY | DRIVER_ONLY),
    ],
)
def test_import_directions(folder: str, forbidden: set[str]) -> None:
    wrong = {str(path.relative_to(ROOT)): sorted(imported(path) & forbidden) for path in sources(folder) if imported(path) & forbidden}
    assert wrong == {}


def test_importing_kilocopy_starts_nothing_and_pulls_in_no_engine() -> None:
    code = "import sys, kilocopy.cli; print(sorted({'ray', 'vllm', 'torch', 'locust', 'gevent'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def test_every_yaml_parses_and_stands_where_its_kind_belongs() -> None:
    for path in tracked():
        if path.suffix in {".yaml", ".yml"}:
            places = {ROOT / "loadtests" / "specs", ROOT / "deploy", ROOT / "dashboards" / "rules"}
            assert path.parent in places or ROOT / "tests" / "golden" in path.parents, f"{path}: of which kind is it?"
            assert all(document is not None for document in YAML(typ="safe").load_all(path.read_text()))


def test_no_file_names_a_package_registry_or_a_secret() -> None:
    pattern = re.compile(r"(pypi|pythonhosted|npmjs|deb\.debian)\.org|hf_[A-Za-z0-9]{20}|sk-[A-Za-z0-9]{20}")
    for path in tracked():
        if path.suffix in {".py", ".md", ".txt", ".in", ".sh", ".toml", ".yaml", ".j2", ""} and path.name != Path(__file__).name:
            assert not pattern.search(path.read_text(errors="replace")), path


def test_readme_targets_and_tree_exist() -> None:
    """Every `make x` is a target, every path of the tree there."""
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", readme)) <= targets
    tree = re.findall(r"^([A-Za-z.][\w./-]*\.(?:py|yaml|md|sh|j2|txt)) ", readme, re.MULTILINE)
    assert tree
    assert [name for name in tree if not (ROOT / name).exists()] == []


TOLD = re.compile(r"(?:^|[`\s])(?:\.venv/bin/|python3? -m )?kilocopy ([a-z-].*)")
PLACEHOLDERS = {"N": "1", "...": "", "{target}": "kuberay"}


def told(path: Path) -> Iterator[tuple[str, bool]]:
    """kilocopy's command lines in a text, and whether each stands in a block, so that it is whole; elsewhere a sentence may name just its verb."""
    text = path.read_text()
    blocks = re.findall(r"(?ms)^```\n(.*?)^```", text) if path.suffix == ".md" else []
    for line in "\n".join(blocks).splitlines():
        for part in re.split(r"; |&& ", re.split(r"\s{2,}|\s# ", line.strip())[0]):
            if match := re.match(r"(?:taskset -c 0 )?" + TOLD.pattern.removeprefix("(?:^|[`\\s])"), part.strip()):
                yield match[1], True
    prose = re.sub(r"(?ms)^```.*?^```", "", text).replace("\n", " ") if path.suffix == ".md" else text
    for span in re.findall(r"`([^`\n]+)`", prose):
        if match := TOLD.match(span):
            yield match[1], False


def alternatives(line: str) -> Iterator[list[str]]:
    """The words of a command line, once for each way in which its `a|b|c` can be read."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)]
    yield from (list(filter(None, each)) for each in itertools.product(*(word.split("|") for word in words)))


def mistake(verb: Any, words: list[str], whole: bool) -> str | None:
    """What the parser says against a command line."""
    try:
        verb.make_context("kilocopy", words)
    except UsageError as error:
        left_out = isinstance(error, MissingParameter | NoArgsIsHelpError) or "requires an argument" in error.message
        return error.message if whole or not left_out else None
    return None


TELLING = [path for path in tracked() if (path.suffix == ".md" and path.name != "CHANGELOG.md") or (path.parent.name == "kilocopy" and path.suffix == ".py")]


@pytest.mark.parametrize("path", TELLING, ids=lambda path: path.name)
def test_every_command_that_is_told_is_one(path: Path) -> None:
    """Parsed by the CLI's own parser: in README, docs, and the sentences that say what to do. What a sentence leaves out may be missing; an option or verb may not be wrong."""
    for line, whole in told(path):
        for words in alternatives(line):
            verb: Any = typer.main.get_command(cli.app)
            while isinstance(verb, TyperGroup) and words:
                assert words[0] in verb.commands, f"{path.name}: kilocopy {line}"
                verb = verb.commands[words.pop(0)]
            wrong = mistake(verb, words, whole)
            assert wrong is None, f"{path.name}: kilocopy {line}: {wrong}"


def test_every_source_file_is_in_the_readme_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in ("kilocopy", "cluster", "loadtests", "gpu"):
        for path in sources(folder):
            if not path.name.startswith("__"):
                assert f"{folder}/{path.name}" in readme, f"{folder}/{path.name} is missing from the README's tree"
