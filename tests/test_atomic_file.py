"""Files appear complete or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys

import pytest

import atomic_file
from atomic_file import AtomicFile


def test_content_size_and_hash(tmp_path):
    with AtomicFile(tmp_path / "a.bin") as file:
        file.write(b"hello ")
        file.write(memoryview(b"world"))
        file.write(b"")
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"hello world"
    assert file.size == 11
    assert file.sha256() == hashlib.sha256(b"hello world").hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_exception_leaves_the_old_file_alone(tmp_path):
    atomic_file.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="stop"), AtomicFile(tmp_path / "a.txt") as file:
        file.write(b"half of the n")
        raise RuntimeError("stop")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_new_file_obeys_umask(tmp_path):
    atomic_file.write_bytes(tmp_path / "a", b"")
    previous = os.umask(0)
    os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~previous


def test_file_too_large_for_the_limit(tmp_path, file_size_limit):
    atomic_file.write_bytes(tmp_path / "a", b"old")
    with file_size_limit(5000), pytest.raises(OSError, match="too large"):
        atomic_file.write_bytes(tmp_path / "a", bytes(20000))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_killed_writer_leaves_the_old_file_and_a_name_the_pattern_matches(tmp_path):
    atomic_file.write_bytes(tmp_path / "a", b"old")
    code = (
        "import os, sys; from atomic_file import AtomicFile; f = AtomicFile(sys.argv[1]);"
        "f.write(bytes(100000)); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.glob(atomic_file.temporary_pattern("a")))) == 1
    assert len(list(tmp_path.iterdir())) == 2
