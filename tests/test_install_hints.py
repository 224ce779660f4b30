"""A failed import ends a command with one line on what to install, unless the defect is our own."""

from __future__ import annotations

import pytest

from errors import run_command
from install_hints import explain_import_error


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
