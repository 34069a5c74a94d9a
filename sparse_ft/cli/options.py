"""Options and types that several commands share, and how they print."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

MODEL_HELP = (
    "a bundled name (resnet20-cifar10), a local folder, timm/ARCHITECTURE (random weights unless --pretrained), or a "
    "Hub id"
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, adds defaults that say something, and shows each option once."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        # transformers accepts each option with underscores and with dashes.
        names = [name for name in action.option_strings if "_" not in name] or action.option_strings
        switch = action.nargs == 0 or (action.nargs == "?" and action.const is True)
        value = "" if switch else " " + self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(names) + value

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if action.metavar is None and action.choices is not None and len(list(action.choices)) > 6:
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        quiet = action.default in (None, False, argparse.SUPPRESS, "", []) or action.default == {}
        if text and not quiet and "default" not in text and not isinstance(action, argparse._StoreTrueAction):
            text += " (default: %(default)s)"
        return text


def make_parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_debug_option(parser)
    return parser


def add_debug_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--debug", dest="traceback", action="store_true", help="show the traceback of an error")


def add_model_options(parser: argparse._ActionsContainer, *, positional: bool) -> None:
    """Adds the model and where it comes from; `positional` for commands about one model."""
    if positional:
        parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    else:
        parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--pretrained", action="store_true", help="for timm/ARCHITECTURE: timm's default weights, from the Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    add_checkpoint_options(parser)


def add_checkpoint_options(parser: argparse._ActionsContainer) -> None:
    """Adds what tells how to read a checkpoint file of another tool."""
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="what MODEL is a checkpoint file of (.pth, .safetensors): timm/ARCHITECTURE, a folder with config.json, "
        "or a Hub id",
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        type=rename,
        metavar="FROM=TO",
        help="regular expressions to replace in the names of its tensors",
    )
    parser.add_argument(
        "--zero-threshold", type=float, default=0.0, metavar="X", help="weights of at most this size become zero"
    )


def add_json_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else, to stdout")


def fraction(text: str) -> float:
    """An argument in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up to but not including 1, not {text}")
    return value


def rename(text: str) -> tuple[str, str]:
    """An argument of the form FROM=TO; TO may be empty."""
    old, separator, new = text.partition("=")
    if not old or not separator:
        raise argparse.ArgumentTypeError(f"must be FROM=TO, not {text}")
    return old, new


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


@contextmanager
def figures_only(json_wanted: bool) -> Iterator[TextIO]:
    """Gives the stream for results; with JSON all other output goes to stderr meanwhile."""
    stdout = sys.stdout
    if not json_wanted:
        yield stdout
        return
    with redirect_stdout(sys.stderr):
        yield stdout


def print_result(stream: TextIO, result: Any, as_json: bool) -> None:
    """Prints `str(result)`, or `result.to_dict()` (or a dict itself) as JSON."""
    if as_json:
        content = result if isinstance(result, dict) else result.to_dict()
        print(json.dumps(content, indent=2), file=stream)
    else:
        print(result, file=stream)
