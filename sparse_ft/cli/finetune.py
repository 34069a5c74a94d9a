"""`sparse-ft finetune`: train a sparse model, its zeros kept."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from sparse_ft.cli import options
from sparse_ft.cli.errors import UsageError

EXAMPLES = """  sparse-ft finetune --model resnet20-cifar10 --dataset digits --output-dir out/digits
  sparse-ft finetune --model out/resnet18-90 --dataset photos/ --epochs 5 --lr 0.002 --output-dir out/photos
  sparse-ft finetune --model user/sparse-bert --dataset nyu-mll/glue --dataset-config sst2 --output-dir out/sst2
  sparse-ft finetune --model out/llama-70 --dataset tales.txt --task text-generation --output-dir out/tales
  sparse-ft finetune ... --output-dir out/digits --resume        # after Ctrl-C: the same command with --resume"""

# Options of TrainingArguments that --help shows; --help-all shows the rest.
COMMON = {
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "optim_args", "label_smoothing_factor", "max_grad_norm", "bf16", "seed", "eval_strategy", "eval_steps",
    "eval_on_start", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end",
    "metric_for_best_model", "logging_steps", "dataloader_num_workers", "report_to", "push_to_hub",
    "hub_model_id", "disable_tqdm",
    "distill_teacher", "recipe", "recipe_args", "recipe_compat", "ignore_unknown",
    "sparse_policy", "min_sparsity", "sparse_ignore", "remove_channels", "keep_freed_memory",
    "resume_from_checkpoint",
}  # fmt: skip

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "seed": 42,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 0.02,
    "logging_first_step": True,
    "report_to": "none",
}


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, help="show every option of TrainingArguments, too"
        )

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


def make_parser(prog: str) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    from sparse_ft.data import TASKS
    from sparse_ft.data.images import AUGMENTS
    from sparse_ft.training_args import SparseTrainingArguments

    parser = HfArgumentParser(
        cast(Any, SparseTrainingArguments),
        prog=prog,
        usage=f"{prog} --model MODEL --dataset DATASET --output-dir DIR [options]",
        description="Train a sparse model on a dataset. Its zeros stay zero, and pruned layers run on the native\n"
        "sparse kernels where these are faster. Every option of transformers' TrainingArguments is accepted.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=options.HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        conflict_handler="resolve",  # --debug is every command's, not the one of TrainingArguments
    )
    training = parser._action_groups.pop()
    training.title = "training (options of TrainingArguments)"
    for action in parser._actions:
        if action.dest not in COMMON:
            vars(action)["full_help"] = action.help
            action.help = argparse.SUPPRESS
    # A progress bar in a file is one long line of noise.
    parser.set_defaults(**DEFAULTS, compare=True, disable_tqdm=not sys.stderr.isatty())

    model = parser.add_argument_group("model")
    options.add_model_options(model, positional=False)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        required=True,
        help="digits (bundled), a folder of images by class, a parquet, csv, json or txt file or a folder of such "
        "files named train*, validation*, test*, or a Hub id",
    )
    data.add_argument("--dataset-config", help="configuration of a Hub dataset, such as sst2")
    data.add_argument("--task", choices=TASKS, help="by default what the columns suggest")
    data.add_argument("--label-column", help="column of the classes")
    data.add_argument("--image-column", help="column of the images")
    data.add_argument("--text-columns", nargs="+", default=[], help="one column of texts, or two of sentence pairs")
    data.add_argument("--max-train-samples", type=options.positive, help="use at most so many training rows")
    data.add_argument("--max-eval-samples", type=options.positive, help="use at most so many evaluation rows")
    data.add_argument(
        "--augment",
        choices=AUGMENTS,
        default="auto",
        help="distortion of training images: random crop of at least 70%% of the area (light, which is auto), of at "
        "least 8%% (standard), or none; mirrored except for digits",
    )
    data.add_argument("--image-size", type=options.positive, help="side length in pixels instead of the model's")
    data.add_argument("--max-length", type=options.positive, help="tokens of a text; 128, or 256 to generate text")

    running = parser.add_argument_group("run")
    output_dir = next(action for action in parser._actions if action.dest == "output_dir")
    output_dir.required, output_dir.metavar, output_dir.help = True, "DIR", "where everything is written"
    training._group_actions.remove(output_dir)
    running._group_actions.append(output_dir)
    for option, dest, kind in (
        ("--epochs", "num_train_epochs", float),
        ("--batch-size", "per_device_train_batch_size", int),
        ("--lr", "learning_rate", float),
    ):
        short_for = f"short for --{dest.replace('_', '-')}"
        running.add_argument(option, dest=dest, default=argparse.SUPPRESS, type=kind, metavar="N", help=short_for)
    running.add_argument("--threads", type=options.positive, help="threads, as torch.set_num_threads")
    running.add_argument(
        "--resume", action="store_true", help="go on from the last complete checkpoint in --output-dir"
    )
    running.add_argument("--overwrite", action="store_true", help="start anew where --output-dir holds an earlier run")
    running.add_argument(
        "--no-keep-memory", dest="keep_freed_memory", action="store_false", default=argparse.SUPPRESS,
        help="short for --no-keep-freed-memory",
    )  # fmt: skip
    running.add_argument(
        "--no-compare",
        dest="compare",
        action="store_false",
        default=argparse.SUPPRESS,
        help="do not time dense against sparse at the end",
    )
    options.add_json_option(running)
    options.add_debug_option(running)
    running.add_argument("-h", "--help", action="help", help="show this help message and exit")
    running.add_argument("--help-all", action=_HelpAll)
    parser._action_groups.append(training)  # what is asked for first comes first
    return parser


def run(args: argparse.Namespace) -> None:
    import torch

    from sparse_ft.cli.models import origin, quieten_loading
    from sparse_ft.data import load_data
    from sparse_ft.finetune import ModelChoice, discard_earlier_run, finetune
    from sparse_ft.interrupt import TrainingInterrupted

    with options.figures_only(args.json) as out:
        if args.threads:
            torch.set_num_threads(args.threads)
        quieten_loading()
        training_args = training_arguments(args)
        _check_folder(args)
        data = load_data(
            args.dataset,
            task=args.task,
            config=args.dataset_config,
            image_column=args.image_column,
            text_columns=args.text_columns,
            label_column=args.label_column,
            seed=training_args.seed,
            max_train_samples=args.max_train_samples,
            max_eval_samples=args.max_eval_samples,
        )
        if args.overwrite:
            discard_earlier_run(Path(args.output_dir))
        try:
            result = finetune(
                ModelChoice(args.model, **origin(args)),
                data,
                training_args,
                augment=args.augment,
                image_size=args.image_size,
                max_length=args.max_length,
                resume=args.resume_from_checkpoint or args.resume,
                compare=args.compare,
            )
        except TrainingInterrupted as interrupt:
            raise KeyboardInterrupt(
                f"interrupted after step {interrupt.step}; {interrupt.checkpoint} is complete; go on with\n"
                f"  {resume_command(sys.argv)}"
            ) from interrupt
        options.print_result(out, result, args.json)


def training_arguments(args: argparse.Namespace) -> Any:
    """The `SparseTrainingArguments` among the options.

    Raises:
        UsageError: transformers finds them contradictory.
    """
    from sparse_ft.training_args import SparseTrainingArguments

    fields = [field.name for field in dataclasses.fields(SparseTrainingArguments) if field.init]
    try:
        return SparseTrainingArguments(**{name: getattr(args, name) for name in fields if hasattr(args, name)})
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error).strip().splitlines()[0]) from error


def _check_folder(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    resumes = args.resume or args.resume_from_checkpoint
    if args.overwrite and resumes:
        raise UsageError("--overwrite starts anew and --resume goes on: give one of them")
    if args.overwrite or resumes or not folder.is_dir():
        return
    if any(folder.glob("checkpoint-*")) or (folder / "model.safetensors").exists():
        raise UsageError(f"{folder} holds an earlier run: --resume goes on with it, --overwrite starts anew")


def resume_command(argv: Sequence[str]) -> str:
    """The command line that goes on with an interrupted run."""
    program = "python -m sparse_ft" if Path(argv[0]).name == "__main__.py" else Path(argv[0]).name
    rest = [argument for argument in argv[1:] if argument not in ("--overwrite", "--resume")]
    return f"{program} {shlex.join([*rest, '--resume'])}"
