"""A recipe in SparseTrainer: what it sets, what it leaves behind, and how it is resumed."""

import json
import re

import pytest
import torch
from test_resume import ADAMW, SGD, assert_same_run
from tiny import bert, losses, make_trainer, pruned, resnet, timm_resnet
from torch import nn
from transformers import TrainerCallback

from sparse_ft import Recipe, RecipeError, from_pretrained, sparsity
from sparse_ft.checkpoint import CheckpointError
from sparse_ft.masks import prunable_layers
from sparse_ft.nn import SparseModule


def gmp(end=3, final=0.8, rates=""):
    return f"""
modifiers:
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: {end}}}
  - !GMPruningModifier
    params: ['re:.*(layers|layer).*(convolution|dense).weight']
    init_sparsity: 0.2
    final_sparsity: {final}
    start_epoch: 0
    end_epoch: {end - 1}
    update_frequency: 0.5
{rates}"""


RATES = """
  - !LearningRateFunctionModifier
    {lr_func: linear, init_lr: 0.02, final_lr: 0.002, start_epoch: 0, end_epoch: 3}
"""


def zeros(model):
    state = model.state_dict()  # dense, also of native layers
    weights = [state[name] for name in Recipe.load(gmp()).pruned_weights(model)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("make_model", [resnet, bert])
def test_a_recipe_prunes_and_leaves_everything_behind(tmp_path, make_model):
    model = make_model()
    trainer = make_trainer(model, tmp_path, recipe=gmp(), num_train_epochs=None)
    trainer.train()
    assert trainer.state.epoch == 3
    assert zeros(model) == pytest.approx(0.8, abs=2e-3)
    trainer.save_model()
    assert Recipe.load(tmp_path / "recipe.yaml") == trainer.recipe
    loaded = from_pretrained(tmp_path, convert=False)
    assert sparsity(loaded).nnz == sparsity(model).nnz
    info = json.loads((tmp_path / "sparse_ft.json").read_text())
    assert info["sparsity"]["sparsity"] == pytest.approx(sparsity(model).overall)
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert len(logged) == len(losses(trainer))
    assert logged == sorted(logged)
    assert logged[-1] == pytest.approx(sparsity(model).overall, abs=1e-4)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("make_model", [resnet, bert])
def test_resume_is_exact(tmp_path, make_model, optimizer):
    arguments = optimizer | {"save_strategy": "steps", "save_steps": 3, "recipe": gmp(), "num_train_epochs": 3}
    whole = make_trainer(make_model(), tmp_path, **arguments)
    whole.train()
    for step in (3, 9):
        resumed = make_trainer(make_model(seed=1), tmp_path / "again", **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)
        assert resumed.masks.keys() == whole.masks.keys()
        assert all(torch.equal(mask, whole.masks[name]) for name, mask in resumed.masks.items())


@pytest.mark.parametrize("method", ["GMPruning", "RigLPruning", "ACDCPruning"])
def test_layers_take_native_form_between_updates_and_resume_exactly(tmp_path, method):
    fields = {
        "GMPruning": "init_sparsity: 0.6, final_sparsity: 0.8, update_frequency: 5, start_epoch: 0, end_epoch: 10",
        "RigLPruning": "final_sparsity: 0.8, update_frequency: 3, start_epoch: 0, end_epoch: 10",
        "ACDCPruning": "compression_sparsity: 0.8, update_frequency: 3, start_epoch: 0, end_epoch: 12",
    }
    params = "params: ['re:.*layer.*dense.weight']"
    text = f"modifiers:\n  - !{method}Modifier {{{params}, {fields[method]}}}\n"
    arguments = ADAMW | {"save_strategy": "steps", "save_steps": 7, "recipe": text, "num_train_epochs": 12}
    forms = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            forms.append(any(isinstance(module, SparseModule) for module in model.modules()))

    whole = make_trainer(bert(), tmp_path, **arguments, trainer_options={"callbacks": [Watch()]})
    whole.train()
    assert sum(forms) > 20 and not all(forms[:40])
    # Of so few values, dropout stays torch's, and the dense run draws the same.
    plain = make_trainer(bert(), tmp_path / "plain", **arguments | {"sparse_policy": "none", "save_strategy": "no"})
    plain.train()
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-3, abs=1e-4)
    for step in (21, 42):
        resumed = make_trainer(bert(seed=1), tmp_path / "again", **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


def test_learning_rates_of_the_recipe(tmp_path):
    arguments = {"recipe": gmp(rates=RATES), "num_train_epochs": None}
    trainer = make_trainer(bert(), tmp_path, learning_rate=None, **arguments)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.02 - 0.018 * step / 12 for step in range(12)])


def test_what_the_user_gives_goes_before_the_recipe(tmp_path, capsys):
    arguments = {"recipe": gmp(rates=RATES), "num_train_epochs": 1, "learning_rate": 0.5, "log_level": "warning"}
    trainer = make_trainer(bert(), tmp_path, **arguments)
    trainer.train()
    told = capsys.readouterr().err
    assert "1 epochs as asked for, although the recipe lasts 3" in told
    assert "learning rate 0.5 as asked for; those of the recipe are left out" in told
    assert {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry} == {0.5}
    trainer.save_model()
    assert "LearningRate" not in (tmp_path / "recipe.yaml").read_text()


def test_what_the_recipe_sets_is_announced(tmp_path, capsys):
    make_trainer(
        bert(), tmp_path, recipe=gmp(rates=RATES), num_train_epochs=None, learning_rate=None, log_level="warning"
    )
    told = capsys.readouterr().err
    assert "3 epochs, as the recipe says" in told
    assert "learning rates as the recipe says" in told


def test_recipe_arguments(tmp_path):
    text = "last: 9\n" + gmp().replace("end_epoch: 3", "end_epoch: eval(last)")
    trainer = make_trainer(bert(), tmp_path, recipe=text, recipe_args="last=4", num_train_epochs=None)
    assert trainer.args.num_train_epochs == 4


def test_sparse_transfer_by_recipe(tmp_path):
    text = "modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n"
    recipe_run = make_trainer(pruned(bert()), tmp_path / "recipe", recipe=text)
    recipe_run.train()
    plain = make_trainer(pruned(bert()), tmp_path / "plain")
    plain.train()
    assert losses(recipe_run) == losses(plain)
    padding = {"bert.embeddings.word_embeddings.weight"}  # has a row of zeros, and is among __ALL_PRUNABLE__
    assert recipe_run.masks.keys() == plain.masks.keys() | padding


def test_zeros_that_the_recipe_does_not_prune_are_kept(tmp_path):
    model = resnet()
    pruned_by_recipe = Recipe.load(gmp()).pruned_weights(model)
    outside = next(name for name in prunable_layers(model, []) if f"{name}.weight" not in pruned_by_recipe)
    layer = model.get_submodule(outside)
    with torch.no_grad():
        layer.weight[0] = 0.0
    kept = int((layer.weight == 0).sum())
    trainer = make_trainer(model, tmp_path, recipe=gmp(), sparse_policy="none")
    trainer.train()
    assert int((model.get_submodule(outside).weight == 0).sum()) == kept


def test_the_best_model_is_a_finished_one(tmp_path):
    trainer = make_trainer(
        bert(), tmp_path, recipe=gmp(), num_train_epochs=4, learning_rate=0.5, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step >= 12
    assert zeros(trainer.model) == pytest.approx(0.8, abs=2e-3)


def test_checkpoints_with_and_without_recipe_do_not_mix(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(bert(), tmp_path / "a", recipe=gmp(), **saving).train()
    make_trainer(bert(), tmp_path / "b", **saving).train()
    with pytest.raises(CheckpointError, match="give it again"):
        make_trainer(bert(), tmp_path / "c", **saving).train(str(tmp_path / "a" / "checkpoint-3"))
    with pytest.raises(CheckpointError, match="without a recipe"):
        make_trainer(bert(), tmp_path / "c", recipe=gmp(), **saving).train(str(tmp_path / "b" / "checkpoint-3"))
    damaged = tmp_path / "a" / "checkpoint-3" / "sparse_session.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        make_trainer(bert(), tmp_path / "c", recipe=gmp(), **saving).train(str(tmp_path / "a" / "checkpoint-3"))


def test_a_recipe_that_does_not_fit_says_so_before_training(tmp_path):
    with pytest.raises(RecipeError, match="quantization is not supported here"):
        make_trainer(bert(), tmp_path, recipe=gmp() + "\n  - !QuantizationModifier {start_epoch: 1}\n")
    trainer = make_trainer(timm_resnet(), tmp_path, recipe=gmp())
    with pytest.raises(RecipeError, match="line 5: GMPruningModifier.params: .* matches no parameter"):
        trainer.train()


def test_gradients_accumulate(tmp_path):
    model = bert()
    make_trainer(model, tmp_path, recipe=gmp(), num_train_epochs=3, gradient_accumulation_steps=2).train()
    assert zeros(model) == pytest.approx(0.8, abs=2e-3)


def test_loggers_get_the_layers(tmp_path):
    class Collect(TrainerCallback):
        seen: dict[str, list[float]] = {}

        def on_log(self, args, state, control, logs=None, **kwargs):
            for name, value in logs.items():
                self.seen.setdefault(name, []).append(value)

    trainer = make_trainer(bert(), tmp_path, recipe=gmp(), num_train_epochs=3)
    trainer.add_callback(Collect())
    trainer.train()
    layers = {name: values for name, values in Collect.seen.items() if name.startswith("sparsity/")}
    assert layers.keys() == {f"sparsity/{name}" for name in trainer.masks}
    assert all(values[-1] == pytest.approx(0.8, abs=5e-3) for values in layers.values())
    assert isinstance(trainer.model, nn.Module)


def test_the_progress_bar_shows_the_sparsity(tmp_path, capsys):
    make_trainer(bert(), tmp_path, recipe=gmp(), num_train_epochs=3, disable_tqdm=False).train()
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(re.search(r"12/12 .*\d\d\.\d% zeros", line) for line in last), last[-5:]


@pytest.mark.parametrize("make_model", [bert, timm_resnet])
def test_distillation(tmp_path, make_model):
    text = "modifiers:\n  - !DistillationModifier {hardness: 1.0, temperature: 1.0}\n"
    teacher = make_model(seed=4)
    trainer = make_trainer(
        make_model(), tmp_path, recipe=text, num_train_epochs=8, trainer_options={"teacher": teacher}
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] / 2  # with hardness 1, all there is to learn is the teacher
    halves = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    model = bert(dropout=0.0) if make_model is bert else make_model()
    if make_model is bert:
        whole = make_trainer(model, tmp_path, recipe=text, num_train_epochs=1, trainer_options={"teacher": teacher})
        whole.train()
        other = bert(dropout=0.0)
        split = make_trainer(other, tmp_path, recipe=text, trainer_options={"teacher": teacher}, **halves)
        split.train()
        assert losses(split) == pytest.approx(losses(whole), rel=1e-3)


def test_a_run_that_learns_from_its_own_beginning_resumes_exactly(tmp_path):
    """Also where layers are native by then: the teacher is as dense as it was."""
    text = """
modifiers:
  - !GMPruningModifier
    {params: ['re:.*layer.*dense.weight'], init_sparsity: 0.6, final_sparsity: 0.8, update_frequency: 5,
     start_epoch: 0, end_epoch: 5}
  - !DistillationModifier {hardness: 0.5}
"""
    arguments = {"save_strategy": "steps", "save_steps": 15, "recipe": text, "num_train_epochs": 6}
    options = {"trainer_options": {"teacher": "self"}}
    whole = make_trainer(bert(), tmp_path, **arguments, **options)
    whole.train()
    resumed = make_trainer(bert(seed=1), tmp_path / "again", **arguments, **options)
    checkpoint = tmp_path / "checkpoint-15"
    assert json.loads((checkpoint / "sparse_ft.json").read_text())["native_layers"]
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_run(resumed, whole)


def test_second_order_pruning_samples_the_training_data(tmp_path):
    text = gmp().replace(
        "!GMPruningModifier", "!OBSPruningModifier\n    num_grads: 3\n    grad_sampler_kwargs: {batch_size: 2}"
    )
    arguments = ADAMW | {"recipe": text, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(bert(), tmp_path, **arguments)
    whole.train()
    assert zeros(whole.model) == pytest.approx(0.8, abs=2e-3)
    resumed = make_trainer(bert(seed=1), tmp_path / "again", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, whole)
