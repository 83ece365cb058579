"""Files that are wholly there or not at all, and what identifies their contents."""

import shutil
from pathlib import Path

import pytest

from adagrpo_train.runtime.files import fingerprint, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_replaces_the_one_before_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with whole_folder(tmp_path / "export") as draft:
            (draft / content).write_text(content)
    assert names(tmp_path) == ["export"]
    assert names(tmp_path / "export") == ["new"]


def test_an_error_half_way_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "export") as draft:
        (draft / "old").write_text("old")
    with pytest.raises(OSError, match="disk full"), whole_folder(tmp_path / "export") as draft:
        (draft / "half").write_text("half")
        raise OSError("disk full")
    assert names(tmp_path / "export") == ["old"]


def test_a_folder_whose_replacement_was_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".replaced_export").mkdir()
    (tmp_path / ".replaced_export" / "old").write_text("old")
    with pytest.raises(OSError, match="disk full"), whole_folder(tmp_path / "export"):
        raise OSError("disk full")
    assert names(tmp_path / "export") == ["old"]


def test_a_file_is_replaced_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in ("old", "new"):
        write_whole(tmp_path / "summary.json", content)
    assert names(tmp_path) == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "new"


def test_a_fingerprint_is_of_the_contents_not_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "inner" / "weights").write_bytes(b"1234")
    (tmp_path / "a" / "config").write_text("{}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "config").rename(tmp_path / "b" / "conf")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_bookkeeping_of_git_and_of_downloads_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("weights")
    before = fingerprint(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_text("now")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("position", [0, 2**23, -1])
def test_a_large_file_is_known_by_its_size_and_ends(position: int, tmp_path: Path) -> None:
    content = bytearray(17 * 2**20)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)
        content[position] ^= 1
    same = fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert same == (position == 2**23)
    (tmp_path / "b").write_bytes(bytes(len(content) + 1))
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
