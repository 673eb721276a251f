"""Promises about the sources themselves: what they depend on, and where they are unsafe."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: How often each file says ``unsafe``, with the reason that stands at its top.
LEDGER = ROOT / "tests" / "unsafe.txt"
#: Comments and texts, in which the word means nothing.
SILENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)


@pytest.fixture(scope="module")
def packages() -> list[dict[str, Any]]:
    """All packages of the tree, with every feature and for every system."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--all-features"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [package for package in json.loads(found.stdout)["packages"] if package["name"] != "tenpak"]


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    return tomllib.loads((ROOT / "deny.toml").read_text())


def allowed(expression: str, allow: list[str]) -> bool:
    """Whether one of the ways to read an SPDX expression consists of allowed licences."""
    expression = expression.replace("/", " OR ")
    tokens = re.findall(r"\(|\)|[^\s()]+(?:\s+WITH\s+[^\s()]+)?", expression)
    words = {"OR": "or", "AND": "and", "(": "(", ")": ")"}
    return bool(eval(" ".join(words.get(token) or str(" ".join(token.split()) in allow) for token in tokens)))


def test_an_spdx_expression_is_read_as_it_is_meant() -> None:
    assert allowed("MIT/Apache-2.0", ["Apache-2.0"]) and allowed("(GPL-3.0 OR MIT) AND ISC", ["MIT", "ISC"])
    assert not allowed("GPL-3.0 AND MIT", ["MIT"]) and not allowed("Apache-2.0 WITH LLVM-exception", ["Apache-2.0"])


def test_every_licence_is_permissive(packages: list[dict[str, Any]], rules: dict[str, Any]) -> None:
    allow = rules["licenses"]["allow"]
    wrong = {p["name"]: p["license"] for p in packages if not allowed(p["license"] or "none", allow)}
    assert len(packages) > 100 and wrong == {}


def test_every_package_comes_from_the_registry_and_none_is_banned(
    packages: list[dict[str, Any]], rules: dict[str, Any]
) -> None:
    sources = {package["source"] or "a path" for package in packages}
    assert len(sources) == 1 and all(source.startswith("registry+") for source in sources), sources
    assert not {p["name"] for p in packages} & set(rules["bans"]["deny"])


def test_every_direct_dependency_says_why_it_is_there_and_which_version() -> None:
    text = (ROOT / "Cargo.toml").read_text()
    names: set[str] = set()
    for section in re.findall(r"^\[[^\]\n]*dependencies\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL):
        for line in section.splitlines():
            if line.strip() and not line.startswith("#"):
                name, rest = line.split(" = ", 1)
                assert re.search(r"#\s+\S+", rest), f"{name} has no reason in Cargo.toml"
                assert "*" not in rest.split("#")[0], f"{name} takes any version"
                names.add(name)
    assert {"rayon", "wgpu", "cudarc", "pyo3", "numpy", "half"} <= names


def test_unsafe_code_grows_only_where_a_line_says_so() -> None:
    found: dict[str, int] = {}
    for path in sorted((ROOT / "src").rglob("*.rs")):
        count = len(re.findall(r"\bunsafe\b", SILENT.sub("", path.read_text())))
        if count:
            found[path.relative_to(ROOT).as_posix()] = count
    listed: dict[str, int] = {}
    for line in LEDGER.read_text().splitlines():
        if line and not line.startswith("#"):
            count, name, *reason = line.split(maxsplit=2)
            assert reason, f"{LEDGER.name}: {name} has no reason"
            listed[name] = int(count)
    grown = {name: count for name, count in found.items() if count > listed.get(name, 0)}
    assert grown == {}, f"write the new numbers, and why, into {LEDGER.relative_to(ROOT)}"
    shrunk = {name: found.get(name, 0) for name, count in listed.items() if count > found.get(name, 0)}
    assert shrunk == {}, f"well done; write the new numbers into {LEDGER.relative_to(ROOT)}"
