"""A tiny network, data, and a plain training loop with a session."""

import torch
import torch.nn.functional as F
from torch import nn

from sparse_ft import SparseSession

STEPS = 5  # of an epoch


class Network(nn.Module):
    """Two convolutions, a hidden layer and a classifier; a step takes half a millisecond."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 9, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(F.relu(self.stem(x)))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


def batch(step, seed=1):
    """The batch of a step: four classes of bright quadrants."""
    generator = torch.Generator().manual_seed(1000 * seed + step % STEPS)
    labels = torch.randint(0, 4, (16,), generator=generator)
    images = 0.3 * torch.randn(16, 1, 6, 6, generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = 3 * (int(label) // 2), 3 * (int(label) % 2)
        image[0, row : row + 3, column : column + 3] += 1
    return images, labels


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-3),
}


def losses_of(model):
    """A sampler of losses for second-order methods."""

    def sample(count, seed, batch_size):
        for i in range(count):
            images, labels = batch(i, seed=seed + 7)
            yield F.cross_entropy(model(images[:batch_size]), labels[:batch_size])

    return sample


def make(recipe, *, optimizer="sgd", epochs=4, seed=0, steps=STEPS, **options):
    model = Network(seed)
    made = OPTIMIZERS[optimizer](model.parameters())
    options.setdefault("grad_sampler", losses_of(model))
    session = SparseSession(model, recipe, made, steps, total_steps=epochs * steps, **options)
    return model, made, session


def training_loss(session, model, images, labels):
    """The loss as a loop has it that serves every modifier."""

    def compute():
        return F.cross_entropy(model(images), labels)

    loss = compute()
    return session.loss(loss, None, images, again=compute) if session.changes_loss else loss


def train(model, optimizer, session, steps, *, each=None):
    """Trains so many steps from where the session is; `each(step)` after every one."""
    for _ in range(steps):
        step = session.step
        images, labels = batch(step)
        optimizer.zero_grad()
        training_loss(session, model, images, labels).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        if each is not None:
            each(step)


def zeros(model, *names):
    weights = [model.get_parameter(name) for name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


PRUNABLE = ("stem.weight", "conv.weight", "hidden.weight", "head.weight")


def gmp(**fields):
    """A recipe with a GMPruningModifier."""
    values = {
        "params": "['conv.weight', 'hidden.weight']", "init_sparsity": 0.1, "final_sparsity": 0.8, "start_epoch": 0,
        "end_epoch": 3, "update_frequency": 0.4,
    } | fields  # fmt: skip
    return "modifiers:\n  - !GMPruningModifier\n" + "".join(f"    {k}: {v}\n" for k, v in values.items())
