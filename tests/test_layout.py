"""House rules: import directions, every YAML parsed and classified, README and help true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

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


def test_readme_commands_exist() -> None:
    """Every `make x` is a target, every `kilocopy x` a command, every path of the tree there."""
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", readme)) <= targets
    help_text = subprocess.run([sys.executable, "-m", "kilocopy", "--help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    commands = set(re.findall(r"^[│ ]+([a-z]+)  ", help_text, re.MULTILINE))
    used = set(re.findall(r"^(?:\$ )?(?:\.venv/bin/)?kilocopy ([a-z]+)", readme, re.MULTILINE)) | set(
        re.findall(r"`kilocopy ([a-z]+)", readme)
    )
    assert used
    assert used <= commands
    tree = re.findall(r"^([A-Za-z.][\w./-]*\.(?:py|yaml|md|sh|j2|txt)) ", readme, re.MULTILINE)
    assert tree
    assert [name for name in tree if not (ROOT / name).exists()] == []


def test_every_source_file_is_in_the_readme_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in ("kilocopy", "cluster", "loadtests", "gpu"):
        for path in sources(folder):
            if not path.name.startswith("__"):
                assert f"{folder}/{path.name}" in readme, f"{folder}/{path.name} is missing from the README's tree"
