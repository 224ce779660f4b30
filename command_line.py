"""What the help texts of all commands share."""

from __future__ import annotations

import argparse
from typing import NoReturn


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 image", "2 images", "1 class", "2 classes"; the plural ends in "s" unless it is given."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


class HelpFormatter(argparse.HelpFormatter):
    """Shows a flag's default unless its text speaks of one itself, or there is none to show (unset, a switch)."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        shown = not (default is None or default is argparse.SUPPRESS or default == [] or isinstance(default, bool))
        if action.help is None or "default" in action.help or not shown:
            return action.help
        if not action.option_strings and action.nargs not in (argparse.OPTIONAL, argparse.ZERO_OR_MORE):
            return action.help
        if isinstance(default, (list, tuple)):
            separator = "," if action.nargs is None else " "
            return f"{action.help} (default: {separator.join(map(str, default))})"
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers a mistake with one line, as all other mistakes are answered; status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")
