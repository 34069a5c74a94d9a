"""Small networks, one for each way in which channels can depend on each other."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(i, o, k=3, **options):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o))


class Plain(nn.Module):
    """Convolutions with a bias, flattened into linear layers, as a VGG."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 8, 3, padding=1)
        self.hidden = nn.Linear(8 * 4, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.one(x)), 2)
        x = F.max_pool2d(F.relu(self.two(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Residual(nn.Module):
    """Two blocks; the second pads its shortcut with zero channels, as ResNets for CIFAR do."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3, 6), conv(6, 7), conv(7, 6)
        self.c, self.d = conv(6, 9, stride=2), conv(9, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        x = F.relu(self.d(F.relu(self.c(x))) + shortcut)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, and a norm behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3, 6), conv(6, 4), conv(10, 4)
        self.norm = nn.BatchNorm2d(14)
        self.last = conv(14, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.head(self.last(F.relu(self.norm(x))).mean((2, 3)))


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, squeeze-and-excitation, hard swish."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = conv(3, 4), conv(4, 12, 1)
        self.depthwise, self.narrow = conv(12, 12, groups=12), conv(12, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.grouped, self.last = conv(12, 16, groups=4), conv(16, 8, 1)
        self.before = conv(4, 12, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        y = F.hardswish(self.depthwise(F.relu6(self.wide(x))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.narrow(y)
        x = F.relu(self.grouped(F.relu(self.before(x))))
        return self.head(self.last(x).mean((2, 3)))


class Mixer(nn.Module):
    """A layer norm on the stream, hidden units between two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 2, stride=2), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


NETWORKS = {kind.__name__.lower(): kind for kind in (Plain, Residual, Dense, Grouped, Mixer)}


def make(name, seed=0):
    """The network in double precision, with norms that have seen something, and a batch for it."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, torch.randn(4, 3, 8, 8, dtype=torch.float64)
