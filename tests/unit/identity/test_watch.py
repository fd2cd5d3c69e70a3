"""A change of files is told once, when it is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_fed.identity.watch import FileWatch


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    pair = (tmp_path / "a", tmp_path / "b")
    for path in pair:
        path.write_text("1")
    return pair


def replace(path: Path, content: str) -> None:
    aside = path.with_suffix(".aside")
    aside.write_text(content)
    aside.replace(path)


def test_what_stays_as_it_is_is_no_change(files: tuple[Path, Path]) -> None:
    watch = FileWatch(*files)
    assert [watch.look() for _ in range(3)] == [False, False, False]


def test_a_change_is_told_once_when_the_files_keep_still(files: tuple[Path, Path]) -> None:
    watch = FileWatch(*files)
    replace(files[0], "22")
    assert not watch.look(), "the other one may follow"
    replace(files[1], "22")
    assert not watch.look()
    assert watch.look()
    assert not watch.look()


def test_it_may_have_to_keep_still_for_longer(files: tuple[Path, Path]) -> None:
    watch = FileWatch(*files, still=3)
    replace(files[0], "22")
    assert [watch.look() for _ in range(5)] == [False, False, False, True, False]


def test_going_and_coming_back_are_changes_and_so_are_rights(files: tuple[Path, Path]) -> None:
    watch = FileWatch(*files)
    files[0].rename(files[0].with_name("elsewhere"))
    assert [watch.look(), watch.look()] == [False, True]
    files[0].with_name("elsewhere").rename(files[0])
    assert [watch.look(), watch.look()] == [False, True]
    files[1].chmod(0o600)
    assert [watch.look(), watch.look()] == [False, True]


def test_another_file_behind_a_link_is_a_change(tmp_path: Path, files: tuple[Path, Path]) -> None:
    link = tmp_path / "current"
    link.symlink_to(files[0])
    watch = FileWatch(link)
    link.unlink()
    link.symlink_to(files[1])
    assert [watch.look(), watch.look()] == [False, True]
