"""`python -m graph COMMAND`: one module a command, imported only when its command is called."""

from __future__ import annotations

import importlib
import sys

from errors import UsageError, run_command

# Command -> (module with a function `main` that takes the arguments, what the command does).
COMMANDS = {
    "import-weights": ("graph.import_weights", "weights of GluonCV, timm or Cadene in one of our networks"),
    "export-onnx": ("graph.export_onnx", "a trained network as ONNX, checked with onnxruntime"),
    "export-torch": ("graph.export_torch", "a trained network as a torch.export program"),
    "run": ("graph.run", "the five most probable classes of pictures"),
}


def usage() -> str:
    """The help text: every command with one line."""
    lines = [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: python -m graph COMMAND [OPTIONS]", "", "commands (each has --help):", *lines])


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        raise UsageError(f"no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    module, _ = COMMANDS[arguments[0]]
    return importlib.import_module(module).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
