"""`--help` answers at once: no command imports a heavy package before it knows what is asked of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("symbols", "gluon", "graph", "engines", "data_prep", "training")
# Take no options: one fixed job, and what training.launch starts.
WITHOUT_OPTIONS = {"demo.py", "engines/kv_server.py", "training/launch_processes.py"}
HEAVY = ("cv2", "gluoncv", "matplotlib", "mxnet", "onnx", "onnxruntime", "pandas", "scipy", "torch")

ASK_FOR_HELP = """
import runpy, sys
sys.path.insert(0, {root!r})
sys.argv = ["command", "--help"]
try:
    {run}
except SystemExit as stop:
    status = stop.code
print("imported:", *(name for name in {heavy!r} if name in sys.modules))
sys.exit(status)
"""


def is_command(path: Path) -> bool:
    """Whether the file does something when it is run: it has an `if __name__ == "__main__"`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)


def commands() -> list[str]:
    """Every command of the project, as paths relative to its root."""
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    found = sorted(str(path.relative_to(ROOT)) for path in files if is_command(path))
    return [path for path in found if path not in WITHOUT_OPTIONS]


@pytest.mark.parametrize("command", commands())
def test_help_imports_nothing_heavy(command):
    module = command.removesuffix("/__main__.py").removesuffix(".py").replace("/", ".")
    run = f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    process = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP.format(root=str(ROOT), run=run, heavy=HEAVY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: ")
    assert process.stdout.splitlines()[-1] == "imported:"
