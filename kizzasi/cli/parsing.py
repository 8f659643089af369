"""Command lines: one parser a verb, made when it is known; errors in one line with a guess."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import kizzasi
from kizzasi.errors import KizzasiError

VERBS = {
    "search": "find a model",
    "worker": "find a model",
    "sweep": "find a model",
    "evolve": "find a model",
    "ask": "find a model",
    "tell": "find a model",
    "report": "find a model",
    "export": "find a model",
    "scale": "find a model",
    "distil": "find a model",
    "train": "use a model",
    "score": "use a model",
    "generate": "use a model",
    "info": "look at one",
    "validate": "look at one",
    "schema": "look at one",
    "convert": "use a model",
    "doctor": "look at one",
}
PROG = "kizzasi"
SEEDS = 2**63
SEED = "of everything random, 0 to 2^63 - 1 (default 0; generate takes a new one each time)"


class UsageError(KizzasiError):
    """A command line that means nothing; the message says what was meant, perhaps."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours, and which never guesses what a short flag means."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        guess = ""
        if unknown:
            words = unknown[1].split(" ")
            guess = did_you_mean(next((w for w in words if w.startswith("-")), words[0]), flags)
            message = f"{unknown[1]}: unknown"
        elif choice := re.match(r"(.*): invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = [word.strip().strip("'") for word in choice[3].split(",")]
            guess = did_you_mean(choice[2], known)
            message = f"{choice[1]}: {choice[2]}: choose from {', '.join(known)}"
        raise UsageError(f"{message}{guess}; see {self.prog} --help")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def seed(text: str) -> int:
    """The value of --seed."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < SEEDS:
        raise argparse.ArgumentTypeError(f"{text:.40} is no whole number from 0 to 2^63 - 1")
    return value


def parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module of the verb, and its arguments; `given` among them holds what was typed.

    Raises:
        UsageError: a verb, flag or value that is not known.
    """
    if not arguments:
        raise UsageError(f"give a verb: {', '.join(VERBS)}; see {PROG} --help")
    verb = arguments[0]
    if verb not in VERBS:
        return _without_verb(arguments)
    module = importlib.import_module(f"kizzasi.cli.{verb}")
    parser = parser_of(verb, module)
    args = parser.parse_args(arguments[1:])
    typed = argparse.Namespace(**dict.fromkeys(vars(args)))
    parser.parse_args(arguments[1:], typed)
    args.verb = verb
    args.given = {name: value for name, value in vars(typed).items() if value is not None}
    return module, args


def parser_of(verb: str, module: ModuleType) -> Parser:
    """The parser of one verb; its own flags first, then those that every verb has."""
    own = Parser(
        prog=f"{PROG} {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.set_defaults(seed=0)
    module.add_arguments(own)
    every = own.add_argument_group("every verb")
    every.add_argument("--seed", type=seed, help=SEED)
    every.add_argument(
        "--device", default="cpu", help='"cpu" (default), "cuda", "cuda:1"; "auto" in search'
    )
    every.add_argument("--json", action="store_true", help="print one JSON object instead")
    every.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first: a module of your own that registers mixers (may be repeated)",
    )
    return own


def _without_verb(arguments: Sequence[str]) -> NoReturn:
    """--help and --version, which end the program, or an error."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} VERB [options]",
        description=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROG} {kizzasi.__version__}", help="and no more"
    )
    word = arguments[0]
    if word.startswith("-"):
        parser.parse_args(arguments)
        raise UsageError(f"give a verb before {word}; see {PROG} --help")
    guess = did_you_mean(word, list(VERBS))
    raise UsageError(f"{word}: no such verb{guess}; choose from {', '.join(VERBS)}")


def overview() -> str:
    """What each verb is for, by what one wants to do."""
    lines = ["Sequence models and the search for good ones."]
    for title in dict.fromkeys(VERBS.values()):
        lines.append(f"\n{title}:")
        for verb in (v for v, group in VERBS.items() if group == title):
            text = importlib.import_module(f"kizzasi.cli.{verb}").__doc__ or ""
            lines.append(f"  {verb:9} {text.splitlines()[0]}")
    lines += [
        "",
        "example:",
        "  kizzasi search --data ~/notes --out runs/notes",
        '  kizzasi generate runs/notes --prompt "Today "',
        "",
        "kizzasi VERB --help has examples and all options of a verb.",
    ]
    return "\n".join(lines)
