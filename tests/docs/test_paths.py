"""What the pages name exists: files and folders of this repository, and links between them."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("infllm_pass", "lowering", "kernels", "tests", "benchmarks", "examples", "docs")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
FILE = re.compile(r"`([\w/]+\.(?:py|h|cpp|json))`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)")
MADE = {"adaptation.json", "config.json", "demo.json", "evaluation.json", "model.onnx", "run.json"}
"""Files that commands write, and one of every model folder."""

pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def names() -> set[str]:
    """The ends of all source paths: ``api.py``, ``frontend/api.py``, …"""
    ends = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.*"):
            parts = file.relative_to(ROOT).parts
            ends |= {"/".join(parts[start:]) for start in range(len(parts))}
    return ends


def test_paths_exist(page):
    missing = [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()]
    assert not missing


def test_files_named_without_their_folder_exist(page):
    known = names()
    assert not [name for name in FILE.findall(page.read_text()) if name not in known and name not in MADE]


def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert not [link for link in LINK.findall(text) if not (page.parent / link).exists()]
