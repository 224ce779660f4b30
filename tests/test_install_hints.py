"""A failed import ends a command with one line on what to install, unless the defect is our own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from errors import run_command
from install_hints import REQUIREMENTS, explain_import_error

ROOT = Path(__file__).resolve().parent.parent


def not_found(soname: str) -> ImportError:
    """The error that importing an extension module raises when the loader misses a library."""
    return ImportError(f"{soname}: cannot open shared object file: No such file or directory", name="cv2")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (not_found("libquadmath.so.0"), "apt install libquadmath0"),
        (not_found("libgomp.so.1"), "apt install libgomp1"),
        (not_found("libGL.so.1"), "apt install libgl1 (Debian, Ubuntu), or put opencv-python-headless"),
        (not_found("libX11.so.6"), "libX11.so.6 is missing: install the package that holds it"),
        (
            ModuleNotFoundError("No module named 'cv2'", name="cv2"),
            "'cv2' is not installed: pip install -r requ",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            "pip install -r requirements-torch.txt",
        ),
    ],
)
def test_missing_installation(capsys, error, expected):
    def main():
        raise error

    assert run_command(main) == 1
    stderr = capsys.readouterr().err
    assert expected in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'training.nothing'", name="training.nothing"),
        ModuleNotFoundError("No module named 'torch.nothing'", name="torch.nothing"),
        ImportError("cannot import name 'nothing' from 'torch'", name="torch"),
    ],
)
def test_our_own_defects_keep_their_traceback(error):
    assert explain_import_error(error) is None

    def main():
        raise error

    with pytest.raises(ImportError):
        run_command(main)


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_the_named_file_installs_the_package(name):
    """Following the hint must help: the file, or one that it includes, lists the package."""
    package = {"cv2": "opencv-python"}.get(name, name)
    assert package in listed_packages(ROOT / REQUIREMENTS[name])


def listed_packages(path: Path) -> set[str]:
    packages = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            packages |= listed_packages(path.parent / line[3:].strip())
        elif match := re.match(r"[\w.-]+", line):
            packages.add(match[0])
    return packages
