"""Files and folders that are whole or not there."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.files import write_folder, write_text

KILLED = """
import os, sys
from pathlib import Path
from mbrl_text_env import files

target = Path(sys.argv[1])
if sys.argv[2] == "folder":
    with files.write_folder(target) as scratch:
        (scratch / "new.txt").write_text("half")
        os._exit(9)
files.os.fsync = lambda descriptor: os._exit(9)
files.write_text(target, "new")
"""


class TestWriteText:
    def test_makes_folders_and_writes_the_bytes_given(self, tmp_path):
        path = tmp_path / "a" / "b" / "report.md"
        write_text(path, "Grüße\n世界\n")
        assert path.read_bytes() == "Grüße\n世界\n".encode()
        assert [p.name for p in path.parent.iterdir()] == ["report.md"]

    def test_takes_a_string_and_overwrites(self, tmp_path):
        path = tmp_path / "x.json"
        write_text(str(path), "a long first text")
        write_text(str(path), "short")
        assert path.read_text() == "short"

    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "x.txt"
        write_text(path, "old")
        with pytest.raises(UnicodeEncodeError):
            write_text(path, "new \ud800")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_target_that_is_a_folder(self, tmp_path):
        (tmp_path / "x" / "y").mkdir(parents=True)
        with pytest.raises(OSError, match="x"):
            write_text(tmp_path / "x", "text")
        assert list(tmp_path.iterdir()) == [tmp_path / "x"]

    def test_the_mode_is_that_of_any_new_file(self, tmp_path):
        write_text(tmp_path / "x", "text")
        with write_folder(tmp_path / "folder"):
            pass
        (tmp_path / "usual").touch()
        (tmp_path / "usual-folder").mkdir()
        for made, usual in (("x", "usual"), ("folder", "usual-folder")):
            assert (tmp_path / made).stat().st_mode == (tmp_path / usual).stat().st_mode

    def test_writers_at_once_leave_one_whole_text(self, tmp_path):
        texts = [f"{i}\n" * 20_000 for i in range(8)]
        threads = [
            threading.Thread(target=write_text, args=(tmp_path / "x", text)) for text in texts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (tmp_path / "x").read_text() in texts
        assert len(list(tmp_path.iterdir())) == 1

    def test_being_killed_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "x.txt"
        write_text(path, "old")
        assert subprocess.run([sys.executable, "-c", KILLED, path, "text"]).returncode == 9
        assert path.read_text() == "old"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r")))
def test_any_text_comes_back(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    write_text(path, text)
    assert path.read_text(encoding="utf-8") == text


class TestWriteFolder:
    def fill(self, folder: Path, content: str) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "file.txt").write_text(content)

    def test_appears_when_the_block_ends(self, tmp_path):
        target = tmp_path / "made" / "results"
        with write_folder(target) as scratch:
            assert not target.exists()
            assert scratch.parent == target.parent
            self.fill(scratch, "text")
        assert (target / "sub" / "file.txt").read_text() == "text"
        assert list(target.parent.iterdir()) == [target]

    def test_takes_the_place_of_the_old_one(self, tmp_path):
        target = tmp_path / "results"
        target.mkdir()
        (target / "stale.txt").write_text("old")
        with write_folder(str(target)) as scratch:
            self.fill(scratch, "new")
            assert (target / "stale.txt").read_text() == "old"
        assert [p.name for p in target.iterdir()] == ["sub"]
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_leaves_the_old_one_and_nothing_else(self, tmp_path, error):
        target = tmp_path / "results"
        with write_folder(target) as scratch:
            self.fill(scratch, "old")
        with pytest.raises(error), write_folder(target) as scratch:  # noqa: PT012 - it has to raise
            self.fill(scratch, "new")
            raise error
        assert (target / "sub" / "file.txt").read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_an_error_in_the_first_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError), write_folder(tmp_path / "results"):
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []

    def test_being_killed_leaves_the_old_one(self, tmp_path):
        target = tmp_path / "results"
        with write_folder(target) as scratch:
            self.fill(scratch, "old")
        assert subprocess.run([sys.executable, "-c", KILLED, target, "folder"]).returncode == 9
        assert (target / "sub" / "file.txt").read_text() == "old"
        assert not (target / "new.txt").exists()
