"""Models by name: loading, saving, and the Hugging Face Hub."""

from .bundled import BUNDLED_MODELS
from .errors import ModelError
from .load import from_pretrained, load_model
from .push import push_to_hub
from .save import save_pretrained
from .source import ModelSource, resolve

__all__ = [
    "BUNDLED_MODELS",
    "ModelError",
    "ModelSource",
    "from_pretrained",
    "load_model",
    "push_to_hub",
    "resolve",
    "save_pretrained",
]
