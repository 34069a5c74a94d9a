"""transformers' Trainer for networks whose weights are mostly zero."""

import copy
import inspect
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from huggingface_hub import HfApi, get_token
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    SaveStrategy,
    TrainOutput,
    rotate_checkpoints,
)
from transformers.training_args import OptimizerNames
from transformers.utils.hub import PushInProgress

from sparse_ft.channels import RemovalReport, remove_channels
from sparse_ft.checkpoint import (
    NATIVE_LAYERS,
    CheckpointError,
    SparseState,
    check_checkpoint,
    complete_folder,
    last_checkpoint,
    names_on_disk,
    read_session,
    read_sparse_state,
    write_masks_beside,
    write_session,
)
from sparse_ft.conversion import ConversionReport, convert, to_dense
from sparse_ft.hub.errors import ModelError, explain_hub_error
from sparse_ft.hub.load import from_pretrained
from sparse_ft.hub.publish import NOT_UPLOADED, files_to_publish, publish
from sparse_ft.hub.push import push_to_hub
from sparse_ft.hub.save import INFO_FILE, STALE_PATTERNS, save_pretrained
from sparse_ft.hub.timm_models import is_timm_model
from sparse_ft.interrupt import InterruptRequest, TrainingInterrupted
from sparse_ft.live import LiveForms, native_layers
from sparse_ft.masks import mask_state, sparsity
from sparse_ft.masks.targets import typed_layers
from sparse_ft.memory import keep_freed_memory, return_freed_memory
from sparse_ft.nn import FrozenMasks, SparseModule, freeze_masks
from sparse_ft.parallel import Replicas, convert_alike, ignore_patterns
from sparse_ft.randomness import preserved_random_state
from sparse_ft.recipes import Recipe
from sparse_ft.recipes.recipe import Compat
from sparse_ft.recipes.source import RECIPE_FILE
from sparse_ft.session import SparseSession
from sparse_ft.training_args import SparseTrainingArguments

if TYPE_CHECKING:
    from sparse_ft.sparseml_engine import SparsemlRecipe

logger = logging.getLogger(__name__)

_ONLY_TO_RESUME = ("sparse_session.safetensors", TRAINER_STATE_NAME)  # of a checkpoint's files, beside its pickles


class SparseTrainer(Trainer):
    """`transformers.Trainer` that trains the nonzeros of a pruned model and keeps the zeros.

    When `train` begins, the zeros of the model become its masks, and pruned layers become native sparse layers where
    these are faster. The other pruned layers stay dense and are held to their masks. Everything that `Trainer` does
    keeps working; what is saved has dense layout and loads in stock transformers or timm.

    A plain timm model, or another module whose `forward` returns logits and takes no `labels`, trains as well: its
    loss is the cross entropy of the logits and the batch's `labels`, with `label_smoothing_factor`. A
    `compute_loss_func(outputs, labels, num_items_in_batch)` replaces it and finds the logits in `outputs.logits`.

    A recipe (`args.recipe` or `recipe`) prunes while it trains, and sets what else it says: epochs and learning rate
    are the recipe's unless `args` gives them. Zeros that the model has before are kept, except in weights that the
    recipe prunes. A checkpoint counts as the best only once the recipe has done all its pruning.

    A resumed run (`resume_from_checkpoint`) takes masks and native layers from the checkpoint, whatever model it is
    given; on one thread it ends with the very bits of the uninterrupted run. Ctrl-C or SIGTERM finishes the step,
    saves a checkpoint and raises `TrainingInterrupted`.

    Args:
        args: `SparseTrainingArguments`.
        recipe: what `Recipe.load` reads, or a `Recipe`; goes before `args.recipe`.
        engine: "sparseml" lets that package run the recipe, in dense layers and without resuming; goes before
            `args.recipe_engine`.
        teacher: a model for recipes that distil, "self" or "disable"; goes before `args.distill_teacher`.
        card: entries of the model card (`license`, `datasets`, `base_model` ...), see `sparse_ft.save_pretrained`.
        Others: as for `transformers.Trainer`. Optimizers that need whole weight matrices (GaLore, APOLLO) refuse
            natively sparse layers. An optimizer object must be made after `sparse_ft.convert`; giving
            `optimizer_cls_and_kwargs` or `args.optim` needs no care.

    Attributes:
        masks: the masks of the run by weight name, from the beginning of `train` on: of weights whose zeros are kept,
            and of those that the recipe holds.
        recipe: what it follows, or None.
        session: the recipe at work, from the beginning of `train` on.
        conversion_report: what became of each layer; None if nothing was converted.
        removal_report: what `args.remove_channels` took out at the end of `train`; None before.
    """

    args: SparseTrainingArguments
    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: SparseTrainingArguments | None = None,
        *,
        recipe: str | Path | Recipe | None = None,
        engine: str | None = None,
        teacher: nn.Module | str | None = None,
        card: Mapping[str, Any] | None = None,
        compute_loss_func: Any = None,
        **trainer_arguments: Any,
    ):
        if args is None:
            args = SparseTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, SparseTrainingArguments):
            raise TypeError(f"args must be SparseTrainingArguments, not {type(args).__name__}")
        # Trainer reads the model's config when it smooths labels; a model that gives bare logits has none.
        smoothing = args.label_smoothing_factor
        bare = model is not None and _gives_bare_logits(model)
        if bare:
            args.label_smoothing_factor = 0.0
            compute_loss_func = compute_loss_func or _CrossEntropy(smoothing)
        super().__init__(model, args, compute_loss_func=compute_loss_func, **trainer_arguments)
        args.label_smoothing_factor = smoothing
        self._gives_bare_logits = _gives_bare_logits(self.model)
        if self._gives_bare_logits:
            self.label_names = self.label_names or ["labels"]
            self.compute_loss_func = self.compute_loss_func or _CrossEntropy(smoothing)  # model_init made the model

        self.card = dict(card or {})
        self._engine = self._load_engine(recipe or args.recipe, engine or args.recipe_engine)
        self.recipe = None if self._engine else self._load_recipe(recipe or args.recipe)
        self.teacher = _load_teacher(teacher or args.distill_teacher)
        self.session: SparseSession | None = None
        self._live: LiveForms | None = None
        self._replicas: Replicas | None = None
        self._kept_masks: dict[str, Tensor] = {}  # of the zeros that the model has before
        self._recipe_masks: dict[str, Tensor] = {}  # at the end of the recipe
        self._checkpoint_session: dict[str, Any] | None = None
        self.conversion_report: ConversionReport | None = None
        self.removal_report: RemovalReport | None = None
        self._checkpoint_state: SparseState | None = None
        self._frozen: FrozenMasks | None = None
        self._own_optimizer = False
        self._interrupt = InterruptRequest()
        self.add_callback(_SparseTraining(self))
        if self._engine is not None:
            self.add_callback(self._engine)

    # Recipe

    def _load_engine(self, source: str | Path | Recipe | None, engine: str) -> "SparsemlRecipe | None":
        """Hands the recipe to sparseml if it is to run it."""
        if engine not in ("sparse_ft", "sparseml"):
            raise ValueError(f'engine must be "sparse_ft" or "sparseml", not {engine!r}')
        if engine == "sparse_ft" or source is None:
            return None
        from sparse_ft.sparseml_engine import SparsemlRecipe

        recipe = SparsemlRecipe(
            source.to_flat().dump() if isinstance(source, Recipe) else source, self.args.recipe_args
        )
        if "num_train_epochs" not in self.args.given and self.args.max_steps <= 0 and recipe.max_epochs:
            self.args.num_train_epochs = float(recipe.max_epochs)
        self.announce(f"sparseml runs the recipe, which lasts {recipe.max_epochs} epochs")
        return recipe

    def _load_recipe(self, source: str | Path | Recipe | None) -> Recipe | None:
        """Reads the recipe and lets it set what the user has not."""
        args = self.args
        if source is None:
            return None
        compat: Compat = "sparseml" if args.recipe_compat == "sparseml" else None
        recipe = Recipe.load(source, args=args.recipe_args, compat=compat, ignore_unknown=args.ignore_unknown)
        recipe.check_supported()
        epochs = recipe.max_epochs
        if epochs and args.max_steps <= 0:
            if "num_train_epochs" not in args.given:
                args.num_train_epochs = float(epochs)
                self.announce(f"{epochs} epochs, as the recipe says")
            elif args.num_train_epochs != epochs:
                self.announce(f"{args.num_train_epochs:g} epochs as asked for, although the recipe lasts {epochs}")
        if recipe.sets_learning_rate:
            if "learning_rate" in args.given:
                recipe = recipe.without_learning_rates()
                self.announce(f"learning rate {args.learning_rate:g} as asked for; those of the recipe are left out")
            else:
                self.announce("learning rates as the recipe says")
        return recipe

    @property
    def masks(self) -> dict[str, Tensor]:
        return self._kept_masks | (self.session.masks if self.session else {}) | self._recipe_masks

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        recipe = self.recipe or self._engine
        if recipe is not None and recipe.sets_learning_rate and self.lr_scheduler is None:
            self.lr_scheduler = _SetByRecipe(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _start_session(self, max_steps: int, train_dataloader: DataLoader, resumes: bool) -> None:
        """Puts the recipe to work on the model and optimizer that are to be trained."""
        steps_per_epoch = self.set_initial_training_values(self.args, train_dataloader)[1]
        if self._engine is not None:
            if resumes:
                raise CheckpointError("a run with engine 'sparseml' cannot be resumed: sparseml keeps no masks")
            self._engine.begin(self.accelerator.unwrap_model(self.model), self.optimizer, steps_per_epoch)
            return
        if self.recipe is None:
            if self._checkpoint_session is not None:
                raise CheckpointError("the checkpoint is of a run with a recipe: give it again (its recipe.yaml)")
            return
        model = self.accelerator.unwrap_model(self.model)
        self.session = SparseSession(
            model,
            self.recipe,
            self.optimizer,
            steps_per_epoch,
            total_steps=max_steps,
            teacher=self.teacher,
            grad_sampler=self._sample_losses,
        )
        if not resumes:
            return
        if self._checkpoint_session is None:
            raise CheckpointError("the checkpoint is of a run without a recipe, which cannot go on with one")
        self.session.load_state_dict(self._checkpoint_session)

    def _start_live_forms(self) -> None:
        """Lets the layers that the recipe prunes take native form while their masks stand still."""
        args = self.args
        self._live = None
        if self.session is None or args.sparse_policy == "none" or args.device.type != "cpu":
            return
        if args.sparse_policy == "auto" and args.fp16:
            if self.recipe is not None and self.recipe.pruned_weights(self.session.training.model):
                self.announce("layers that the recipe prunes train dense: there are no native kernels for float16")
            return
        self._live = LiveForms(
            self.session,
            self._kept_masks,
            self.example_inputs,
            policy=args.sparse_policy,
            min_sparsity=args.min_sparsity,
            ignore=args.sparse_ignore or (),
        )

    def _follow_masks(self) -> None:
        if self._live is None:
            return
        with self._precision():
            changed = self._live.follow()
        if not changed:
            return
        model = self.accelerator.unwrap_model(self.model)
        if self._live.report is not None and self._live.report is not self.conversion_report:
            self.conversion_report = self._live.report
            count = len(native_layers(model))
            self.announce(f"step {self.state.global_step}: {count} layers run on the native sparse kernels now")
        if self._frozen is not None:
            self._frozen.remove()
        self._frozen = freeze_masks(model, self._kept_masks)
        if self._replicas is not None:
            self._replicas.renew()

    def _end_session(self) -> None:
        if self.session is not None:
            self._recipe_masks = self.session.masks
            self.session.finalize()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Before pruning is done the best model is one that is not sparse yet.
        if self.session is not None and not self.session.settled:
            return False
        return super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; see `transformers.Trainer.log`. With a recipe, the loss comes with the sparsity of the model."""
        if self.session is not None and "loss" in logs:
            logs["sparsity"] = round(self.session.sparsity().overall, 4)
            self._show_beside_progress(f"{logs['sparsity']:.1%} zeros")
        super().log(logs, start_time)

    def _show_beside_progress(self, text: str) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(text)

    def _log_layers(self) -> None:
        """Tells the loggers the sparsity of every weight under the recipe; a terminal has no room for it."""
        assert self.session is not None
        logs = {f"sparsity/{name}": 1 - float(mask.sum()) / mask.numel() for name, mask in self.session.masks.items()}
        logs["sparsity"] = self.session.sparsity().overall
        for callback in self.callback_handler.callbacks:
            if not isinstance(callback, PrinterCallback | ProgressCallback):
                callback.on_log(self.args, self.state, self.control, logs=dict(logs), model=self.model)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: folder of a checkpoint, or True for the last complete one in `args.output_dir`.

        Raises:
            CheckpointError: the checkpoint to resume from is not there or not complete, or one cannot be written.
            TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint has been saved.
            RuntimeError: a weight outside the masks is not zero at the end.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self._folder)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"no complete checkpoint to resume from in {str(self._folder)!r}")
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        if self.args.keep_freed_memory:
            self.announce(str(keep_freed_memory()))
        else:
            return_freed_memory()
        self._checkpoint_state = self._checkpoint_session = self.session = None
        self._recipe_masks = {}
        with self._interrupt:
            try:
                output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
            except _EvaluationStopped:
                self._save_checkpoint(self.model, trial)
            finally:
                self.is_in_train = False
        if self._interrupt.requested:
            step = self.state.global_step
            raise TrainingInterrupted(str(self._checkpoint_path(trial, step)), step)
        self._end_session()
        self._check_masks(self.masks)
        if self.args.remove_channels:
            self._remove_channels()
        return output

    def _remove_channels(self) -> None:
        """Takes dead channels out of the model, whose layers are dense from now on."""
        model = self.accelerator.unwrap_model(self.model)
        if self._frozen is not None:
            self._frozen.remove()
        to_dense(model)
        self.removal_report = remove_channels(model, self.example_inputs())
        self.announce(f"dead channels removed: {str(self.removal_report).splitlines()[-1]}")

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._make_sparse()
        ignore_patterns(self.accelerator.unwrap_model(self.model))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._start_session(max_steps, train_dataloader, resumes=resume_from_checkpoint is not None)
        self._start_live_forms()
        self._replicas = None
        if isinstance(self.model_wrapped, DistributedDataParallel):
            self._replicas = Replicas(self.model_wrapped, self._masks_of_gradients)
        return prepared

    def _masks_of_gradients(self) -> dict[str, Tensor]:
        """Masks that the gradients of this step keep to, by weight name."""
        if self.session is None or self.session.training.masks.dense_gradients:
            return self._kept_masks
        return self._kept_masks | self.session.masks

    def _make_sparse(self) -> None:
        """Records the masks, converts the model and holds the pruned layers left dense."""
        checkpoint = self._checkpoint_state or SparseState()
        model = self.accelerator.unwrap_model(self.model)
        masks = checkpoint.masks if checkpoint.masks is not None else mask_state(model)
        if self._engine is not None:
            masks = {}  # zeros are sparseml's to keep or to free
        pruned = set() if self.recipe is None else self.recipe.pruned_weights(model)
        self._kept_masks = masks = {name: mask for name, mask in masks.items() if name not in pruned}
        self._check_masks(masks)
        with preserved_random_state():
            self._convert(model, checkpoint.native_layers, [name.removesuffix(".weight") for name in pruned])
            self._check_loss_scale(model)
        if self._frozen is not None:
            self._frozen.remove()
        self._frozen = freeze_masks(model, masks)
        self._check_masks(masks, exactly=True)
        self._check_optimizer(model)
        self._announce_sparsity(model)

    def _convert(self, model: nn.Module, chosen: list[str] | None, pruned: Sequence[str]) -> None:
        args = self.args
        if not (self._kept_masks or chosen) or (args.sparse_policy == "none" and chosen is None):
            return
        if chosen is None and args.sparse_policy == "auto" and args.fp16:
            self.announce("there are no native kernels for float16, so every layer stays dense")
            return
        checkpoint = self._checkpoint_state
        masks = self._kept_masks if checkpoint is None or checkpoint.masks is None else checkpoint.masks
        options: dict[str, Any] = {"min_sparsity": args.min_sparsity, "masks": masks}
        if chosen is None:
            with self._precision():
                self.conversion_report = convert_alike(
                    model,
                    self.example_inputs,
                    policy=args.sparse_policy,
                    ignore=[*(args.sparse_ignore or ()), *(name for name in pruned if name in typed_layers(model))],
                    **options,
                )
            if self.conversion_report.note:
                self.announce(self.conversion_report.note)
        elif missing := [name for name in chosen if name not in native_layers(model)]:
            self.conversion_report = convert(model, layers=missing, **options)

    def _precision(self) -> torch.autocast:
        """What layers are timed under: training's own precision."""
        return torch.autocast("cpu", torch.bfloat16, enabled=bool(self.args.bf16))

    def _sample_losses(self, count: int, seed: int, batch_size: int | None) -> Iterator[Tensor]:
        """Losses of training batches in an order of their own, for second-order methods."""
        with preserved_random_state():
            batches = self._batches(batch_size or self._train_batch_size, torch.Generator().manual_seed(seed))
            for _ in range(count):
                inputs = self._prepare_inputs(next(batches))
                loss = super().compute_loss(self._callable(self.model), inputs)
                assert isinstance(loss, Tensor)
                yield loss

    def _batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
        dataset, collator = self._columns_for_the_model()
        while True:
            yield from DataLoader(
                dataset, batch_size=batch_size, collate_fn=collator, shuffle=True, generator=generator
            )

    def _columns_for_the_model(self) -> tuple[Any, Any]:
        """The training dataset and a collator, with what the model does not take left out."""
        if isinstance(self.train_dataset, datasets.Dataset):
            return self._remove_unused_columns(self.train_dataset, description="training"), self.data_collator
        return self.train_dataset, self._get_collator_with_removed_columns(self.data_collator, description="training")

    def example_inputs(self) -> Any:
        """The first training batch, as the model takes it; the dataset is read once more for it."""
        dataset, collator = self._columns_for_the_model()
        batch = next(iter(DataLoader(dataset, batch_size=self._train_batch_size, collate_fn=collator)))
        batch = self._prepare_inputs(batch)
        if not self._gives_bare_logits:
            return batch
        return tuple(value for name, value in batch.items() if name not in self.label_names)

    @torch.no_grad()
    def _check_loss_scale(self, model: nn.Module) -> None:
        """Finds models that take `num_items_in_batch` and ignore it, such as BERT for sequence classification.

        Trainer believes that they average their loss over all accumulated batches and all processes. It is their
        mean over one batch, and gradients would be too large by the number of batches and of processes.
        """
        if (
            self.args.gradient_accumulation_steps * self.args.world_size == 1
            or not self.model_accepts_loss_kwargs
            or self.compute_loss_func is not None
        ):
            return
        inputs = self.example_inputs()
        if "labels" not in inputs:
            return
        training = model.training
        model.eval()
        one, two = (model(**inputs, num_items_in_batch=torch.tensor(n)) for n in (1, 2))
        model.train(training)
        if isinstance(one, dict) and "loss" in one and torch.equal(one["loss"], two["loss"]) and one["loss"] != 0:
            self.model_accepts_loss_kwargs = False

    def _check_optimizer(self, model: nn.Module) -> None:
        """An optimizer from before the conversion would train weights that the model no longer has."""
        if self.optimizer is None:
            return
        current = {id(parameter) for parameter in model.parameters()}
        if all(id(p) in current for group in self.optimizer.param_groups for p in group["params"]):
            return
        if not self._own_optimizer:
            raise ValueError(
                "the optimizer was made for the dense weights of layers that are now sparse: call sparse_ft.convert "
                "on the model before making it, or give optimizer_cls_and_kwargs instead"
            )
        self.optimizer = self.lr_scheduler = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self._own_optimizer = True
            name = OptimizerNames(self.args.optim).value
            if name.startswith(("galore", "apollo")) and native_layers(self.model):
                raise ValueError(
                    f"optim={name} projects whole weight matrices, which natively sparse layers do not have: choose "
                    "another optimizer, or sparse_policy='none'"
                )
        return super().create_optimizer(model)

    def _check_masks(self, masks: Mapping[str, Tensor], *, exactly: bool = False) -> None:
        """Makes sure that no weight outside masks of the run is or can become nonzero.

        Args:
            exactly: native layers train all positions of their mask, too.
        """
        model = self.accelerator.unwrap_model(self.model)
        for name, mask in masks.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, SparseModule):
                trained = layer.mask()
                same = torch.equal(trained, mask.to(trained.device)) if exactly else not (trained & ~mask).any()
            else:
                weight = model.get_parameter(name)
                same = not torch.any(weight.detach()[~mask.to(weight.device)])
            if not same:
                raise RuntimeError(f"the mask of {name} was not kept: weights that were pruned are nonzero")

    def _announce_sparsity(self, model: nn.Module) -> None:
        if self.recipe is not None and (pruned := self.recipe.pruned_weights(model)):
            self.announce(f"the recipe prunes {len(pruned)} weights")
            if not self._kept_masks:
                return
        if not self._kept_masks:
            self.announce("the model has no zeros to keep: every layer trains dense")
            return
        native = [name for name in native_layers(model) if f"{name}.weight" in self._kept_masks]
        others = ", the others dense with their zeros kept" if len(native) < len(self._kept_masks) else ""
        self.announce(
            f"{len(native)} of {len(self._kept_masks)} pruned layers run on the native sparse kernels{others}; "
            f"overall sparsity {sparsity(model).overall:.2%}"
        )

    def announce(self, message: str) -> None:
        """Tells the user, once and beside the progress bar, unless `args.log_level` asks for errors only."""
        if self.is_world_process_zero() and self.args.get_process_log_level() <= logging.WARNING:
            tqdm.write(f"sparse_ft: {message}", file=sys.stderr)

    # Models that give bare logits

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        model = self._callable(model)
        if (
            self.session is None
            or not self.session.changes_loss
            or not self.is_in_train
            or not torch.is_grad_enabled()
        ):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)

        def again() -> Tensor:
            loss = super(SparseTrainer, self).compute_loss(model, dict(given), False, num_items_in_batch)
            assert isinstance(loss, Tensor)
            return loss

        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # Where the loss is part of the mean over all accumulated batches, Trainer does not divide it by their number.
        divided = (not self.model_accepts_loss_kwargs or num_items_in_batch is None) and self.compute_loss_func is None
        scale = 1.0 if divided else 1.0 / self.current_gradient_accumulation_steps
        loss = self.session.loss(loss, outputs, self._teacher_inputs(given), scale=scale, again=again)
        return (loss, outputs) if return_outputs else loss

    def _teacher_inputs(self, inputs: dict[str, Any]) -> Any:
        """Inputs as a teacher takes them: by name, or of a model that gives bare logits in their order."""
        given = {name: value for name, value in inputs.items() if name not in self.label_names}
        return tuple(given.values()) if self._gives_bare_logits else given

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return super().prediction_step(self._callable(model), inputs, prediction_loss_only, ignore_keys)

    def _callable(self, model: Any) -> Any:
        return _WithOutput(model) if self._gives_bare_logits and not isinstance(model, _WithOutput) else model

    def _set_signature_columns_if_needed(self) -> None:
        unset = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if unset and self._gives_bare_logits:
            assert self._signature_columns is not None
            self._signature_columns += ["pixel_values"]  # what collators call the images, whatever forward does

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; see `transformers.Trainer.evaluate`. Has no influence on the training that follows."""
        with preserved_random_state():
            return super().evaluate(*args, **kwargs)

    # Checkpoints

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _checkpoint_path(self, trial: Any, step: int) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """`Trainer._save_checkpoint` into a folder that is complete as soon as it has its name."""
        args = self.args
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        target = self._checkpoint_path(trial, self.state.global_step)
        if self.state.best_global_step:
            best = self._checkpoint_path(trial, self.state.best_global_step)
            if best == target or best.exists():
                self.state.best_model_checkpoint = str(best)
        with complete_folder(target, writes=args.should_save, wait=self.accelerator.wait_for_everyone) as folder:
            self.save_model(str(folder), _internal_call=True)
            if args.should_save and self.masks:
                write_masks_beside(folder, self.model, self.masks)
            if args.should_save and self.session is not None:
                write_session(folder, self.session.state_dict())
            if not args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if args.should_save:
                self._collect_callback_states()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if args.should_save:
            rotate_checkpoints(
                output_dir=str(target.parent),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _collect_callback_states(self) -> None:
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        by_name = {name: several if len(several) > 1 else several[0] for name, several in states.items()}
        self.state.stateful_callbacks = by_name  # type: ignore[assignment]  # declared as the list it begins as

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        # Back to dense: the checkpoint has masks of its own, and another choice of native layers.
        to_dense(model)
        self.model_wrapped = self.model
        self._checkpoint_state = read_sparse_state(Path(resume_from_checkpoint), model)
        self._checkpoint_session = read_session(Path(resume_from_checkpoint))
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            raise CheckpointError(
                f"checkpoint {resume_from_checkpoint!r} does not fit the model: {_detail(error)}"
            ) from error

    def _load_best_model(self) -> None:
        if not self._interrupt.requested:
            super()._load_best_model()

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if state_dict is not None or not (isinstance(model, PreTrainedModel) or is_timm_model(model)):
            if self.args.should_save:  # safetensors refuses other layouts, such as channels_last
                weights = model.state_dict() if state_dict is None else state_dict
                state_dict = {name: value.contiguous() for name, value in weights.items()}
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                self._save_recipe(Path(output_dir or self._folder))
                self._save_arguments(Path(output_dir or self._folder))
                info = json.dumps({NATIVE_LAYERS: native_layers(model)}, indent=2)
                Path(output_dir or self._folder, INFO_FILE).write_text(info + "\n", encoding="utf-8")
            return
        if not self.args.should_save:
            return
        folder = self._folder if output_dir is None else Path(output_dir)
        save_pretrained(
            model,
            folder,
            processor=self.processing_class or getattr(self.data_collator, "tokenizer", None),
            metrics=self._last_evaluation(),
            card=self.card | ({"model_id": self.hub_model_id} if self.hub_model_id else {}),
            extra={NATIVE_LAYERS: names_on_disk(model, native_layers(model))},
            compact=folder == self._folder,  # a checkpoint to resume from is read in dense layout
            recipe=self.recipe.dump() if self.recipe is not None and self.recipe.modifiers else None,
        )
        self._save_arguments(folder)

    def _save_arguments(self, folder: Path) -> None:
        args = copy.copy(self.args)
        args.hub_token = None  # a secret, and the folder may be given away
        torch.save(args, folder / TRAINING_ARGS_NAME)

    def _save_recipe(self, folder: Path) -> None:
        if self._engine is not None:
            self._engine.save(folder / RECIPE_FILE)
        elif self.recipe is not None and self.recipe.modifiers:
            self.recipe.save(folder / RECIPE_FILE)

    def _last_evaluation(self) -> dict[str, float]:
        skipped = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        for entry in reversed(self.state.log_history):
            if "eval_loss" in entry:
                return {
                    name.removeprefix("eval_"): value
                    for name, value in entry.items()
                    if name.startswith("eval_") and name not in skipped
                }
        return {}

    # Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # whatever the client and the transport below it raise
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            raise explain_hub_error(error, name, publishing=True) from None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publishes a checkpoint's model in the background, from links that stay when the checkpoint is removed."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        folder = self._folder / f"_pushing-{Path(checkpoint_folder).name}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint_folder, folder, copy_function=_link)
        steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch or 0)}"
        jobs = [HfApi().run_as_future(self._publish_checkpoint, folder, f"Training in progress, {when}")]
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            jobs += self.push_in_progress.jobs
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type,assignment]  # a list of them

    def _publish_checkpoint(self, folder: Path, message: str) -> None:
        """What a failed push costs is that push: training goes on, and is told."""
        args = self.args
        options: dict[str, Any] = {"revision": args.hub_revision, "commit_message": message}
        api = HfApi(token=args.hub_token or get_token())
        model = files_to_publish(folder, (*NOT_UPLOADED, *_ONLY_TO_RESUME))
        places = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: folder.name[len("_pushing-") :],
        }
        try:
            if place := places.get(HubStrategy(args.hub_strategy)):
                whole = files_to_publish(folder, (TRAINING_ARGS_NAME,))
                model |= {f"{place}/{name}": path for name, path in whole.items()}
            publish(model, api, str(self.hub_model_id), delete=STALE_PATTERNS, **options)
        except ModelError as error:
            self.announce(f"training goes on, but its model was not pushed: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def push_to_hub(  # type: ignore[override]  # gives the address
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves and pushes `args.output_dir` as `sparse_ft.push_to_hub` does; see `transformers.Trainer.push_to_hub`.

        Returns:
            Address of the commit; a future of it unless `blocking`.

        Raises:
            ModelError: the Hub refuses; one line says what to do.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        model_tags = getattr(self.model, "model_tags", None) or []
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        self.create_model_card(tags=[*tags, *(tag for tag in model_tags if tag not in tags)], **kwargs)
        self._finish_current_push()
        push = partial(
            push_to_hub,
            self._folder,
            str(self.hub_model_id),
            token=token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
        )
        return push() if blocking else HfApi().run_as_future(push)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the model card of `sparse_ft.save_pretrained`, with these entries added to `card`.

        `tasks` and `dataset_args` have no place in it.
        """
        given = {
            "language": language,
            "license": license,
            "tags": [tags] if isinstance(tags, str) else tags,
            "title": model_name,
            "base_model": finetuned_from,
            "datasets": dataset_tags,
            "dataset_name": dataset if isinstance(dataset, str) or dataset is None else dataset[0],
        }
        self.card |= {name: value for name, value in given.items() if value}
        self._save()


def _link(source: str, target: str) -> None:
    """The same file under another name where the disk can do that, otherwise a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class _EvaluationStopped(Exception):
    """Ctrl-C during an evaluation: the training steps are whole, so a checkpoint can be saved at once."""


class _SparseTraining(TrainerCallback):
    """What `SparseTrainer` does at each step."""

    def __init__(self, trainer: SparseTrainer):
        self.trainer = trainer
        self._acted = False  # whether the recipe did something at this step

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate tells the dataset its epoch except when it shards or skips batches; here it is always told.
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.session is not None:
            self._acted = self.trainer.session.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer._frozen is not None:
            self.trainer._frozen.apply()
        if self.trainer.session is not None:
            self.trainer.session.after_step()

    def on_step_end(self, args, state, control, **kwargs):
        if self._acted:
            self._acted = False
            self.trainer._log_layers()
        self.trainer._follow_masks()
        if self._agreed():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._agreed():
            # Unless the epoch was whole, this is not its end; and the checkpoint is saved already.
            control.should_evaluate = control.should_save = False
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.is_in_train and self.trainer.args.world_size == 1 and self.trainer._interrupt.requested:
            raise _EvaluationStopped

    def _agreed(self) -> bool:
        """Whether any process was interrupted: all have to stop after the same step."""
        interrupt = self.trainer._interrupt
        if self.trainer.args.world_size > 1:
            flag = torch.tensor(float(interrupt.requested), device=self.trainer.args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            interrupt.requested = bool(flag)
        return interrupt.requested


def _load_teacher(teacher: nn.Module | str | None) -> nn.Module | str | None:
    if not isinstance(teacher, str) or teacher in ("self", "disable"):
        return teacher
    return from_pretrained(teacher, convert=False, for_trainer=True)


class _SetByRecipe(torch.optim.lr_scheduler.LRScheduler):
    """Leaves the learning rate to the recipe."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Any]:
        return self.get_lr()


class _WithOutput:
    """Calls a model that gives bare logits and gives back the output object that Trainer expects."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, **inputs: Any) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.model(*inputs.values()))


class _CrossEntropy:
    """Mean cross entropy over all examples of an accumulated batch."""

    def __init__(self, label_smoothing: float):
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = nn.functional.cross_entropy(
            outputs.logits, labels, label_smoothing=self.label_smoothing, reduction=reduction
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def _gives_bare_logits(model: nn.Module) -> bool:
    """Whether the model has no loss of its own."""
    return not isinstance(model, PreTrainedModel) and "labels" not in inspect.signature(model.forward).parameters


def _detail(error: BaseException) -> str:
    """The first fact of an error of `load_state_dict`, whose first line names only the class."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    kept = [line for line in lines if line]
    return kept[1] if len(kept) > 1 else kept[0] if kept else type(error).__name__
