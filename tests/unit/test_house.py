"""The layout of the house: what stands where, and what nobody may do."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lepton_fed"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE = re.compile(r"\bLF\d{4}\b")
ROOMS_AT_THE_TOP = ("server", "clients", "strategies", "privacy", "simulations")


@pytest.mark.parametrize("room", ROOMS_AT_THE_TOP)
def test_a_room_at_the_top_is_a_relative_link_into_the_package(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert os.readlink(link) == f"lepton_fed/{room}"
    assert (link / "__init__.py").is_file()


def test_nothing_imports_through_the_links() -> None:
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            tops = {name.split(".")[0] for name in names}
            assert not tops & set(ROOMS_AT_THE_TOP), path


def test_no_module_is_named_for_nothing_or_too_long() -> None:
    for path in SOURCES:
        assert path.stem not in {"utils", "helpers", "common", "misc"}, path
        assert len(path.read_text().splitlines()) <= 600, path


def test_nothing_in_the_package_reads_pickles_or_seeds_a_global_generator() -> None:
    banned = re.compile(
        r"\bpickle\b|torch\.load\(|np\.random\.seed|random\.seed\(|(?<![.\w])eval\(|(?<![.\w])exec\("
    )
    for path in SOURCES:
        code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
        assert not banned.search(code), path


def test_only_building_and_training_touch_torchs_global_generator() -> None:
    shared = re.compile(r"torch\.(manual_seed|default_generator)\b")
    users = {p.name for p in SOURCES if shared.search(p.read_text())}
    assert users == {"build.py", "local.py"}  # both put it back


def test_every_error_code_is_documented_and_every_documented_one_is_used() -> None:
    used = {code for path in SOURCES for code in CODE.findall(path.read_text())}
    page = (ROOT / "docs/reference/errors.md").read_text()
    documented = set(CODE.findall(page))
    assert used - documented == set()
    assert documented - used == set()


def test_every_link_in_the_documents_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_installed_package_works_from_outside_the_repository(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        here, there = ROOT / name, source / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_symlink():
            there.symlink_to(os.readlink(here))
        elif here.exists():
            there.write_bytes(here.read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lepton_fed"}
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    program = (
        "import lepton_fed, pathlib, sys;"
        "assert pathlib.Path(lepton_fed.__file__).is_relative_to(sys.argv[1]), lepton_fed.__file__;"
        "from lepton_fed.config import plugins; assert 'fedavg' in plugins.names('strategies');"
        "sys.argv = ['lepton-fed', 'init', 'project'];"
        "from lepton_fed.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(site)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "project" / "conf" / "simulation.yaml").is_file()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree
