"""jaxchat/files.py: writes are complete or not at all."""

import errno
import hashlib
import subprocess
from collections import namedtuple

import pytest

from jaxchat import files
from jaxchat.config import UserError


def test_a_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "new" / "file.json"
    files.write_json(path, {"a": "é"})
    with pytest.raises(OSError), files.atomic(path) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(TypeError):
        files.write_lines(path, [1, object()])
    assert path.read_text(encoding="utf-8") == '{\n "a": "é"\n}\n' and list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path):
    """Found before there is anything to write; what is not there yet is not made."""
    files.check_writable(tmp_path / "new/er")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "file/in/it"):
        with pytest.raises(FileExistsError, match="File exists: .*/(file|link)'"):
            files.check_writable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_a_kill_left_is_replaced(tmp_path):
    path = tmp_path / "name"
    (tmp_path / "name.part").mkdir()
    (tmp_path / "name.part" / "old").touch()
    files.write_text(path, "new\n")
    assert path.read_text() == "new\n" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_an_empty_one_only(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    for _ in range(2):
        if any(path.iterdir()):
            with pytest.raises(OSError), files.atomic(path) as part:
                part.mkdir()
        else:
            with files.atomic(path) as part:
                part.mkdir()
                (part / "file").write_text("first")
    assert [file.read_text() for file in path.iterdir()] == ["first"]


def test_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    assert files.read_lines(path) == []
    files.write_lines(path, [{"n": 0}])
    files.append_line(path, {"n": "ü"})
    with path.open("ab") as file:
        file.write(b'7\n{"n": 2, "te')
    assert files.read_lines(path) == [{"n": 0}, {"n": "ü"}]


def test_lines_hold_any_text(tmp_path):
    """What models write, and users' files: other line ends of Unicode, half of a surrogate pair."""
    rows = [{"text": text} for text in ("a\u2028b\x85c\x1cd\r\ne\n", "\ud83d", "\\ud83d 😀")]
    files.write_lines(tmp_path / "x.jsonl", rows)
    files.append_line(tmp_path / "x.jsonl", rows[1])
    assert files.read_lines(tmp_path / "x.jsonl") == [*rows, rows[1]]
    files.write_json(tmp_path / "x.json", rows[1])
    assert files.read_json(tmp_path / "x.json") == rows[1]


def test_too_little_space_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(5_000_000 * path.exists()))
    files.check_space(tmp_path / "not/yet", 5_000_000)
    with pytest.raises(UserError, match=r"not/yet needs 0.02 GB of disk space, and 5.00 MB are free there; free some"):
        files.check_space(tmp_path / "not/yet", 20_000_000)


def test_hashes(tmp_path):
    (tmp_path / "x").write_bytes(b"content" * 999)
    assert files.file_hash(tmp_path / "x") == hashlib.sha256(b"content" * 999).hexdigest()
    git = subprocess.run(["git", "hash-object", tmp_path / "x"], capture_output=True, text=True, check=True)
    assert files.file_hash(tmp_path / "x", "git") == git.stdout.strip()
