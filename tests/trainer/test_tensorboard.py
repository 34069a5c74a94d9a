"""What TensorBoard gets of a run with a recipe."""

import pytest
from tiny import bert, make_trainer

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

RECIPE = """
modifiers:
  - !LearningRateFunctionModifier
    {lr_func: linear, init_lr: 0.01, final_lr: 0.0, start_epoch: 0, end_epoch: 4}
  - !GMPruningModifier
    {params: ['re:.*layer.*dense.weight'], init_sparsity: 0.2, final_sparsity: 0.8, start_epoch: 0, end_epoch: 2,
     update_frequency: 1}
"""


def test_sparsity_and_learning_rate_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(
        bert(), tmp_path / "out", recipe=RECIPE, report_to=["tensorboard"], num_train_epochs=None, learning_rate=None
    )
    trainer.train()
    (file,) = (tmp_path / "logs").rglob("events.out.*")
    events = accumulators.EventAccumulator(str(file)).Reload()
    series = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    layers = {tag: values for tag, values in series.items() if tag.startswith("train/sparsity/")}
    assert layers.keys() == {f"train/sparsity/{name}" for name in trainer.masks}
    for values in layers.values():
        steps, sparsities = zip(*values, strict=True)
        assert steps == (1, 5, 9)  # the steps of the updates
        assert sparsities == pytest.approx((0.2, 0.725, 0.8), abs=0.01)
    overall = dict(series["train/sparsity"])
    assert overall[16] == pytest.approx(trainer.session.sparsity().overall, abs=1e-4)
    assert 0 < overall[1] < overall[5] < overall[16]
    rates = dict(series["train/learning_rate"])
    assert rates[1] > rates[8] > rates[16] >= 0
