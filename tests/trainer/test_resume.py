"""A resumed run ends with the very bits of the uninterrupted one."""

import os
import signal
from pathlib import Path

import pytest
import torch
from tiny import bert, losses, make_trainer, pruned, resnet, timm_resnet
from transformers import TrainerCallback

from sparse_ft.checkpoint import CheckpointError, last_checkpoint
from sparse_ft.conversion import convert
from sparse_ft.data import load_data, prepare
from sparse_ft.interrupt import TrainingInterrupted
from sparse_ft.masks import mask_state
from sparse_ft.nn import SparseModule, dropout

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "linear"}


def native(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseModule)]


def assert_same_run(resumed, whole):
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    ours, theirs = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(ours[key][name]), torch.as_tensor(value)), (key, name)
    assert native(resumed.model) == native(whole.model)
    masks, expected = mask_state(resumed.model), mask_state(whole.model)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("make_model", [resnet, bert, timm_resnet])
def test_resume_is_exact(tmp_path, make_model, optimizer):
    arguments = optimizer | {
        "save_strategy": "steps",
        "save_steps": 2,  # four steps an epoch: in the middle of an epoch, and at its end
        "eval_strategy": "epoch",
        "sparse_ignore": ["re:.*1.*"],  # some layers native, some held to their masks
    }
    whole = make_trainer(pruned(make_model()), tmp_path, **arguments)
    whole.train()
    assert native(whole.model)
    assert whole._frozen.masks
    for step in (2, 4):
        # Neither the weights nor the zeros of this model are those of the run, nor would it choose these layers.
        other = make_model(seed=1)
        resumed = make_trainer(other, tmp_path / "again", **arguments | {"sparse_ignore": None})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


def test_resume_with_native_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr(dropout, "FEWEST_VALUES", 0)  # tests are small
    arguments = ADAMW | {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(pruned(bert()), tmp_path, **arguments)
    whole.train()
    assert any(isinstance(module, dropout.NativeDropout) for module in whole.model.modules())
    resumed = make_trainer(bert(seed=1), tmp_path / "again", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, whole)


def test_resume_of_a_converted_model_takes_the_masks_of_the_checkpoint(tmp_path):
    arguments = ADAMW | {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(pruned(bert()), tmp_path, **arguments)
    whole.train()
    other = pruned(bert(seed=1), sparsity=0.6)
    convert(other, policy="always")
    resumed = make_trainer(other, tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, whole)


def test_one_trainer_can_be_resumed_twice(tmp_path):
    arguments = SGD | {"save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(pruned(bert()), tmp_path, **arguments)
    trainer.train()
    expected = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_active_zeros_stay_active(tmp_path):
    """A weight that happens to be 0.0 when the checkpoint is written trains on after the resume."""

    class ZeroOne(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.get_parameter(name)[0] = 0.0

    model = pruned(bert())
    name = next(iter(mask_state(model)))
    arguments = SGD | {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(model, tmp_path, trainer_options={"callbacks": [ZeroOne()]}, **arguments)
    whole.train()
    resumed = make_trainer(bert(), tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("step", [2, 3])
def test_resume_with_augmented_images(tmp_path, step):
    """Batches are read ahead of the steps; the random crops of the resumed run are the same all the same."""

    def trainer(model):
        prepared = prepare(load_data("digits", max_train_samples=18, max_eval_samples=6), model, image_size=16)
        made = make_trainer(model, tmp_path, **SGD, save_strategy="steps", save_steps=1)
        made.train_dataset, made.eval_dataset = prepared.train, prepared.eval
        made.data_collator = prepared.collator
        return made

    import timm

    torch.manual_seed(0)
    whole = trainer(pruned(timm.create_model("test_resnet", num_classes=10)))
    whole.train()
    resumed = trainer(timm.create_model("test_resnet", num_classes=10))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same_run(resumed, whole)


def test_evaluation_has_no_influence_on_training(tmp_path):
    with_evaluation = make_trainer(pruned(bert()), tmp_path / "a", eval_strategy="steps", eval_steps=1)
    with_evaluation.train()
    without = make_trainer(pruned(bert()), tmp_path / "b")
    without.train()
    assert losses(with_evaluation) == losses(without)


class Interrupt(TrainerCallback):
    """Sends the process a signal at one moment of the run."""

    def __init__(self, event: str, step: int, number=signal.SIGINT):
        self.step, self.number, self.sent = step, number, False
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [
        ("on_step_begin", 2, 3),  # the step in progress is finished
        ("on_step_end", 2, 2),
        ("on_prediction_step", 4, 4),  # an evaluation is not
    ],
)
def test_interrupted_run_goes_on_where_it_stopped(tmp_path, event, step, saved):
    arguments = ADAMW | {"save_strategy": "epoch", "eval_strategy": "epoch"}
    whole = make_trainer(pruned(bert()), tmp_path / "whole", **arguments)
    whole.train()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    callbacks = {"callbacks": [Interrupt(event, step)]}
    stopped = make_trainer(pruned(bert()), tmp_path / "stopped", trainer_options=callbacks, **arguments)
    with pytest.raises(TrainingInterrupted) as caught:
        stopped.train()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert caught.value.step == saved
    assert caught.value.checkpoint == str(tmp_path / "stopped" / f"checkpoint-{saved}")
    assert f"resume_from_checkpoint={caught.value.checkpoint!r}" in str(caught.value)
    assert last_checkpoint(tmp_path / "stopped") == caught.value.checkpoint
    resumed = make_trainer(bert(seed=3), tmp_path / "stopped", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_termination_saves_too(tmp_path):
    callbacks = {"callbacks": [Interrupt("on_step_end", 1, signal.SIGTERM)]}
    trainer = make_trainer(pruned(resnet()), tmp_path, trainer_options=callbacks)
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_second_interrupt_stops_at_once(tmp_path):
    class Twice(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(pruned(resnet()), tmp_path, trainer_options={"callbacks": [Twice()]})
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert last_checkpoint(tmp_path) is None


def test_checkpoint_that_is_not_there(tmp_path):
    trainer = make_trainer(pruned(resnet()), tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from in .*empty"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="nowhere.*: no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    make_trainer(pruned(resnet()), tmp_path, save_strategy="steps", save_steps=3).train()
    complete = last_checkpoint(tmp_path)
    assert complete == str(tmp_path / "checkpoint-8")
    Path(complete, "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    trainer = make_trainer(resnet(), tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-8' is not complete: it has no trainer_state\.json"):
        trainer.train(resume_from_checkpoint=complete)


def test_checkpoint_of_another_architecture(tmp_path):
    make_trainer(pruned(resnet()), tmp_path, save_strategy="epoch").train()
    model = resnet()
    model.classifier[1] = torch.nn.Linear(16, 7)
    with pytest.raises(
        CheckpointError, match="does not fit the model: size mismatch for classifier.1.weight"
    ) as caught:
        make_trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)


def test_damaged_masks_are_refused(tmp_path):
    make_trainer(pruned(resnet()), tmp_path, save_strategy="epoch").train()
    (tmp_path / "checkpoint-8" / "sparse_masks.safetensors").write_bytes(b"no masks")
    with pytest.raises(CheckpointError, match="checkpoint-8 is damaged.*safetensors"):
        make_trainer(resnet(), tmp_path).train(resume_from_checkpoint=True)
