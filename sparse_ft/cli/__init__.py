"""The command line `sparse-ft`: one file a command, loaded when it is called."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import sparse_ft
from sparse_ft.cli.errors import INTERRUPTED, UsageError, error_line

COMMANDS = {
    "finetune": "train a sparse model on a dataset, its zeros kept",
    "train": "prune or train a sparse model from the beginning, as a recipe says",
    "prune": "set the least important weights of a model to zero",
    "inspect": "show the sparsity of each layer, and what runs natively",
    "bench": "time training steps, dense against sparse",
    "report": "compare finished runs on one page",
    "recipe": "check, show and convert recipes",
    "import": "bring a checkpoint of another tool into this one's layout",
    "export": "write a model as ONNX, as a torch.export program, or dense",
    "push": "upload a finished folder to the Hugging Face Hub",
    "env": "show versions, instruction set and threads",
}

EPILOG = """examples:
  sparse-ft finetune --model resnet20-cifar10 --dataset digits --output-dir out/digits
  sparse-ft prune --model timm/resnet18 --pretrained --sparsity 0.9 --output-dir out/resnet18-90
  sparse-ft recipe show recipe.yaml
  sparse-ft inspect out/resnet18-90
  sparse-ft bench out/resnet18-90 --batch-size 32

'sparse-ft COMMAND --help' tells more. Exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (0 done, 1 failed, 2 wrong use, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv)
    except SystemExit as exit:  # argparse after --help, --version and wrong use
        return exit.code if isinstance(exit.code, int) else 1
    except BrokenPipeError:
        # The reader of a pipe has left (`| head`); nothing more can be said to it, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        _top_parser().parse_args(argv or ["--help"])
    command = importlib.import_module(f"sparse_ft.cli.{name}")
    parser: argparse.ArgumentParser = command.make_parser(f"sparse-ft {name}")
    args = parser.parse_args(argv[1:])
    try:
        command.run(args)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt as interrupt:
        print(f"sparse-ft {name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.traceback:
            raise
        print(f"sparse-ft {name}: error: {error_line(error)}", file=sys.stderr)
        return 1
    return 0


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sparse-ft",
        usage="sparse-ft COMMAND [options]",
        description=f"Fine-tune sparse networks on ordinary CPUs, faster than dense ones.\n\ncommands:\n{commands}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparse-ft {sparse_ft.__version__}")
    parser.add_argument("command", type=_command, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _command(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    raise argparse.ArgumentTypeError(f"no command {name!r}; {hint}")
