"""SparseTrainer computes what dense training under a mask computes."""

import pytest
import timm
import torch
from tiny import Images, bert, losses, make_trainer, pruned, resnet, timm_resnet
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparse_ft.masks import mask_state


def masked_dense_losses(model, dataset, make_optimizer, *, batch=6, epochs=2, max_norm=1.0, accumulate=1):
    """The reference: an ordinary loop that masks gradients before clipping and weights after the step."""
    parameters = dict(model.named_parameters())
    masks = {name: parameters[name] != 0 for name in mask_state(model)}
    optimizer = make_optimizer(model)
    model.train()
    history = []
    for _ in range(epochs):
        for start in range(0, len(dataset), batch * accumulate):
            total = 0.0
            for part in range(start, start + batch * accumulate, batch):
                rows = [dataset[i] for i in range(part, part + batch)]
                inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
                loss = loss_of(model, inputs) / accumulate
                loss.backward()
                total += loss.item()
            for name, mask in masks.items():
                parameters[name].grad.mul_(mask)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, mask in masks.items():
                    parameters[name].mul_(mask)
            history.append(total)
    return history


def loss_of(model, inputs):
    if isinstance(model, timm.models.ResNet):
        return nn.functional.cross_entropy(model(inputs["pixel_values"]), inputs["labels"])
    return model(**inputs).loss


def sgd(model, rate=0.05):
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=0.0)


def adamw(model, rate=0.01):
    # With the usual epsilon the sign of a gradient that is zero but for rounding would move a weight by the full rate.
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, eps=1e-3)


def compare(
    make_model, tmp_path, make_optimizer, policy, tolerance=1e-4, accumulate=1, epochs=2, rate=None, dataset=None
):
    reference_model, model = pruned(make_model()), pruned(make_model())
    arguments = {
        "sparse_policy": policy,
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 6 // accumulate,
        "num_train_epochs": epochs,
    }
    if make_optimizer is sgd:
        rate = rate or 0.05
        arguments |= {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": rate}
    else:
        rate = rate or 0.01
        arguments |= {"optim": "adamw_torch", "learning_rate": rate, "adam_epsilon": 1e-3}
    trainer = make_trainer(model, tmp_path, **arguments)
    if dataset is not None:
        trainer.train_dataset = dataset
    trainer.train()
    expected = masked_dense_losses(
        reference_model,
        trainer.train_dataset,
        lambda model: make_optimizer(model, rate),
        max_norm=0.5,
        batch=6 // accumulate,
        accumulate=accumulate,
        epochs=epochs,
    )
    history = losses(trainer)
    torch.testing.assert_close(history[:16], expected[:16], atol=tolerance, rtol=tolerance)
    if len(history) > 16:
        # Training is chaotic: a change of 1e-5 in the weights of this ResNet-18 moves later losses by 2e-2.
        torch.testing.assert_close(history, expected, atol=5e-2, rtol=5e-2)
        return
    # Batch statistics and the weights themselves, in the dense layout of both.
    torch.testing.assert_close(model.state_dict(), reference_model.state_dict(), atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("policy", ["always", "none"])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    "make_model", [resnet, lambda: bert(dropout=0.0), timm_resnet], ids=["resnet", "bert", "timm"]
)
def test_losses_are_those_of_masked_dense_training(tmp_path, make_model, make_optimizer, policy):
    compare(make_model, tmp_path, make_optimizer, policy)


@pytest.mark.parametrize("make_model", [lambda: bert(dropout=0.0), timm_resnet], ids=["bert", "timm"])
def test_accumulated_gradients_are_clipped_together(tmp_path, make_model):
    compare(make_model, tmp_path, sgd, "always", accumulate=2)


def test_label_smoothing_of_a_plain_model(tmp_path):
    trainer = make_trainer(
        pruned(timm_resnet()), tmp_path, label_smoothing_factor=0.2, train_sampling_strategy="sequential"
    )
    trainer.train()
    first = Images()
    inputs = torch.stack([first[i]["pixel_values"] for i in range(6)])
    labels = first.labels[:6]
    expected = nn.functional.cross_entropy(pruned(timm_resnet())(inputs), labels, label_smoothing=0.2)
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_resnet18_fifty_steps(tmp_path):
    def resnet18():
        torch.manual_seed(0)
        return timm.create_model("resnet18", num_classes=4)

    compare(resnet18, tmp_path, sgd, "always", epochs=13, rate=0.005, dataset=Images(size=64))


@pytest.mark.slow
def test_bert_base_layers_fifty_steps(tmp_path):
    def base():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, num_labels=3, max_position_embeddings=16, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_hidden_layers=4,
        )  # fmt: skip
        return BertForSequenceClassification(config)

    compare(base, tmp_path, adamw, "always", epochs=13, rate=0.001)
