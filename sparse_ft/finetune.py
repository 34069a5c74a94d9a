"""Sparse fine-tuning from a model's name and a dataset to a finished folder."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from sparse_ft.bench import StepComparison, compare_steps
from sparse_ft.data import Data, PreparedData, Task, prepare
from sparse_ft.data.images import Augment
from sparse_ft.hub import ModelError, ModelSource, load_model, resolve
from sparse_ft.masks import sparsity
from sparse_ft.nn import SparseModule
from sparse_ft.report import write_report
from sparse_ft.trainer import SparseTrainer
from sparse_ft.training_args import SparseTrainingArguments
from sparse_ft.tune import processor as processor_name


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and from where.

    Attributes:
        name: bundled name, folder, `timm/ARCHITECTURE` or Hub id, see `sparse_ft.from_pretrained`.
        pretrained: for `timm/ARCHITECTURE`: timm's default weights instead of random ones.
        revision: branch, tag or commit on the Hub.
        token: Hub token; None uses the login's.
        reference, renames, zero_threshold: for a checkpoint file of another tool, see `sparse_ft.from_pretrained`.
    """

    name: str
    pretrained: bool = False
    revision: str | None = None
    token: str | None = None
    reference: str | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    zero_threshold: float = 0.0

    def source(self) -> ModelSource:
        return resolve(
            self.name,
            revision=self.revision,
            token=self.token,
            pretrained=self.pretrained,
            reference=self.reference,
        )


def load_for_training(choice: ModelChoice, data: Data) -> tuple[nn.Module, Any]:
    """Loads the model with a head for the data's classes, and its processor (None for timm models).

    The model is dense and has its zeros; `SparseTrainer` converts it. A timm model comes in transformers' wrapper.

    Raises:
        ModelError: the model is not there, not for this task, or a text model without tokenizer.
    """
    model = load_model(
        choice.name,
        label_names=data.label_names or None,
        task=data.task,
        for_trainer=True,
        pretrained=choice.pretrained,
        revision=choice.revision,
        token=choice.token,
        reference=choice.reference,
        renames=choice.renames,
        zero_threshold=choice.zero_threshold,
    )
    return model, load_processor(choice, data.task)


def load_processor(choice: ModelChoice, task: Task) -> Any:
    """Loads the tokenizer or image processor that lies beside the model; None for images where there is none.

    Raises:
        ModelError: a text model comes without tokenizer.
    """
    folder = choice.source().folder
    if task == "image-classification":
        known = folder is not None and (folder / "preprocessor_config.json").is_file()
        return AutoImageProcessor.from_pretrained(folder) if known else None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"model {choice.name!r} comes without a tokenizer, which {task} needs") from error


def default_learning_rate(model: nn.Module) -> float:
    """Learning rate for AdamW: 1e-3 where convolutions prevail, 1e-4 where matrices do (transformers)."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    matrices = sum(isinstance(module, nn.Linear) for module in model.modules())
    return 1e-3 if convolutions > matrices else 1e-4


def make_trainer(
    model: nn.Module, prepared: PreparedData, args: SparseTrainingArguments, *, card: dict[str, Any] | None = None
) -> SparseTrainer:
    """The trainer for prepared data, with its metrics."""
    return SparseTrainer(
        model,
        args,
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        data_collator=prepared.collator,
        processing_class=prepared.processor,
        compute_metrics=prepared.compute_metrics,
        preprocess_logits_for_metrics=prepared.preprocess_logits,
        card=card,
    )


@dataclass
class FinetuneResult:
    """What a run did; `str()` is the closing table, `to_dict()` the same for programs.

    Attributes:
        native_layers, pruned_layers: how many layers run natively, and how many have zeros.
        sparsity_before, sparsity_after: share of zeros over all layers that can be pruned, 0..1.
        metrics_before: evaluation before training, if `eval_on_start` asked for it.
        metrics_after: evaluation of the saved model.
        train: epochs, steps, seconds and mean loss.
        removal: what became smaller with `remove_channels`.
        steps: one training step dense against sparse on a real batch; None with the reason in `steps_note`.
        files: what was written, relative to `output_dir`.
    """

    model: str
    dataset: str
    task: str
    output_dir: str
    native_layers: int
    pruned_layers: int
    sparsity_before: float
    sparsity_after: float
    metrics_before: dict[str, float] | None
    metrics_after: dict[str, float]
    train: dict[str, float]
    steps: StepComparison | None
    steps_note: str = ""
    removal: str = ""
    files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "steps": None if self.steps is None else self.steps.to_dict()}

    def facts(self) -> dict[str, str]:
        """What the run was, for a person, by label."""
        return {
            "model": self.model,
            "dataset": f"{self.dataset} ({self.task})",
            "layers": f"{self.native_layers} of {self.pruned_layers} pruned layers run on the sparse kernels",
            "sparsity": f"{self.sparsity_before:.2%} before, {self.sparsity_after:.2%} after",
            "training": "{epochs:g} epochs, {steps:.0f} steps, {seconds:.1f} s, loss {loss:.4g}".format(**self.train),
            **({"channels": f"dead ones removed: {self.removal}"} if self.removal else {}),
        }

    def __str__(self) -> str:
        rows = {
            **self.facts(),
            **self._metric_rows(),
            "step": self.steps_note if self.steps is None else str(self.steps).removeprefix("training step: "),
            "files": f"{self.output_dir}: {', '.join(self.files)}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())

    def _metric_rows(self) -> dict[str, str]:
        before = self.metrics_before or {}
        return {
            name: (f"{before[name]:.4f} before, " if name in before else "") + f"{value:.4f} after"
            for name, value in self.metrics_after.items()
        }


def finetune(
    choice: ModelChoice,
    data: Data,
    args: SparseTrainingArguments,
    *,
    augment: Augment = "auto",
    image_size: int | None = None,
    max_length: int | None = None,
    resume: str | bool | None = None,
    compare: bool = True,
) -> FinetuneResult:
    """Trains, evaluates and saves; `args.output_dir` then holds the model, its card, figures and the report.

    Args:
        args: a learning rate that is not given is `default_learning_rate`, or that of the recipe.
        augment, image_size, max_length: see `sparse_ft.data.prepare`.
        resume: a checkpoint folder, or True for the last one in `args.output_dir`.
        compare: time one training step dense against sparse at the end.

    Raises:
        DataError, ModelError, CheckpointError: one line says what is wrong and what to do.
        TrainingInterrupted: on Ctrl-C, after a checkpoint has been saved.
    """
    set_seed(args.seed)  # weights that begin at random do so alike in every run
    model, processor = load_for_training(choice, data)
    if "learning_rate" not in args.given:
        args.learning_rate = default_learning_rate(model)
    prepared = prepare(
        data, model, processor, augment=augment, image_size=image_size, max_length=max_length, seed=args.seed
    )
    trainer = make_trainer(model, prepared, args, card=card_entries(choice, data))
    for note in [*data.notes, *prepared.notes]:
        trainer.announce(note)
    before = sparsity(model)
    output = trainer.train(resume_from_checkpoint=resume)
    evaluation = _final_evaluation(trainer)
    trainer.save_metrics("train", output.metrics, combined=False)
    trainer.save_metrics("eval", evaluation, combined=False)
    native = [name for name, layer in model.named_modules() if isinstance(layer, SparseModule)]
    steps, note = None, "not compared"
    if compare:
        steps, note = _compare(trainer, bool(native))
    if steps is not None:
        speed = {"dense_ms": steps.dense_ms, "sparse_ms": steps.sparse_ms}
        trainer.card["speed"] = {**speed, "processor": processor_name(), "threads": steps.threads}
    trainer.save_model()
    start = next((e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == 0), None)
    result = FinetuneResult(
        model=choice.name,
        dataset=data.name,
        task=data.task,
        output_dir=str(args.output_dir),
        native_layers=len([name for name in native if f"{name}.weight" in trainer.masks]),
        pruned_layers=len(trainer.masks),
        sparsity_before=before.overall,
        sparsity_after=sparsity(model).overall,
        metrics_before=None if start is None else _figures(start),
        metrics_after=_figures(evaluation),
        train={
            "epochs": float(trainer.state.epoch or 0),
            "steps": float(trainer.state.global_step),
            "seconds": output.metrics["train_runtime"],
            "loss": output.training_loss,
        },
        steps=steps,
        steps_note=note,
        removal=str(trainer.removal_report).splitlines()[-1] if trainer.removal_report else "",
    )
    write_report(
        Path(result.output_dir) / "report.html",
        title=f"{Path(choice.name).name} on {Path(data.name).name}",
        summary=result.facts(),
        sparsity=sparsity(model),
        conversion=trainer.conversion_report,
        history=trainer.state.log_history,
        comparison=steps,
        evals=result.metrics_after,
    )
    if args.push_to_hub:
        trainer.push_to_hub()
    result.files = sorted(
        path.name + "/" * path.is_dir()
        for path in Path(result.output_dir).iterdir()
        if not path.name.startswith(("_", "checkpoint-"))
    )
    return result


def _final_evaluation(trainer: SparseTrainer) -> dict[str, float]:
    """The evaluation of the last step, made now unless training ended with it."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last is None or last["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
        return trainer.evaluate()
    return {name: value for name, value in last.items() if name != "step"}


def _compare(trainer: SparseTrainer, any_native: bool) -> tuple[StepComparison | None, str]:
    if not any_native:
        return None, "no layer runs sparse: the step is the dense one"
    if trainer.args.device.type != "cpu":
        return None, "compared on CPUs only"
    optimizer = "sgd" if isinstance(getattr(trainer.optimizer, "optimizer", None), torch.optim.SGD) else "adamw"
    return compare_steps(trainer.model, trainer.example_inputs(), optimizer=optimizer), ""


def _figures(evaluation: dict[str, float]) -> dict[str, float]:
    """Loss and quality without the timings; perplexity where the loss is all there is (language modelling)."""
    figures = {
        name.removeprefix("eval_"): value
        for name, value in evaluation.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    }
    if set(figures) == {"loss"}:
        figures["perplexity"] = math.exp(min(figures["loss"], 700.0))
    return dict(sorted(figures.items()))


def card_entries(choice: ModelChoice, data: Data) -> dict[str, Any]:
    """What the model card can say of the run's origins."""
    source = choice.source()
    card: dict[str, Any] = {"dataset_name": Path(data.name).name}
    if source.hub_id is not None:
        card["base_model"] = source.hub_id
    return card


def discard_earlier_run(folder: Path) -> None:
    """Removes the checkpoints of an earlier run, which a new one must not be resumed from."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
