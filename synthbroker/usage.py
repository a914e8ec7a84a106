"""How the command line says that it was called wrongly: what, and what may have been meant, in one line."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that spares a person the list of all options, and whose commands refuse what they do not know.

    argparse leaves what a command does not know to the parser above it, which can name neither the command nor its
    options.
    """

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with 2."""
        self.exit(2, f"`{self.prog} --help` says how to call it\n{self.prog}: error: {message}\n")

    def parse_known_args(  # type: ignore[override]  # argparse's has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[Any, list[str]]:
        """Parse, and refuse what is left over."""
        given = sys.argv[1:] if args is None else list(args)
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return found, []

    def _meant(self, unknown: Sequence[str]) -> str:
        names = {option.lstrip("-"): option for option in self._option_string_actions}
        words = [word.partition("=")[0].lstrip("-") for word in unknown if word.startswith("-")]
        meant = [names[name] for word in words for name in difflib.get_close_matches(word, names, n=1, cutoff=0.7)]
        return f" (is {' or '.join(meant)} meant?)" if meant else ""
