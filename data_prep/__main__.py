"""`python -m data_prep COMMAND`: one module a command, imported only when its command is called."""

from __future__ import annotations

import importlib
import sys

from errors import UsageError, run_command

# Command -> (module, its function that takes the arguments, what the command does).
COMMANDS = {
    "list": ("data_prep.lists_command", "main", "write a .lst from a folder a class, a text file or a table"),
    "im2rec": ("data_prep.im2rec", "main", "pack the images of a .lst; understands the options of MXNet's tool"),
    "folder": ("data_prep.lists_command", "folder_main", "list and im2rec in one step"),
    "imagenet": ("data_prep.imagenet", "main", "ImageNet from its tar files or folders"),
    "cifar10": ("data_prep.cifar10", "main", "CIFAR-10 from its binary or Python archive"),
    "fashion-mnist": ("data_prep.fashion_mnist", "main", "Fashion-MNIST, or its embedded subset"),
    "verify": ("data_prep.verify", "main", "check every record of a pack and its index"),
    "stats": ("data_prep.stats", "main", "mean and standard deviation of the channels"),
    "cat": ("data_prep.edit", "cat_main", "merge packs"),
    "split": ("data_prep.edit", "split_main", "deal a pack out to several"),
    "extract": ("data_prep.edit", "extract_main", "write the images of a pack as files"),
    "show": ("data_prep.show", "main", "draw samples with their labels"),
}


def usage() -> str:
    """The help text: every command with one line."""
    lines = [f"  {name:<14} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: python -m data_prep COMMAND [OPTIONS]", "", "commands (each has --help):", *lines])


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        raise UsageError(f"no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    module, function, _ = COMMANDS[arguments[0]]
    return getattr(importlib.import_module(module), function)(arguments[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
