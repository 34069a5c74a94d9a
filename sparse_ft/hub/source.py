"""What a model's name stands for: a bundled model, a folder, a timm architecture or a repository on the Hub."""

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import timm
from huggingface_hub import HfApi, snapshot_download

from .bitmap import MASK_FILE
from .bundled import BUNDLED_MODELS
from .compact import COMPACT_FILE, COMPACT_FOLDER
from .compact_folder import WEIGHTS, WEIGHTS_INDEX, has_weights
from .errors import ModelError, explain_hub_error
from .foreign import CHECKPOINT_SUFFIXES
from .retry import retrying

Form = Literal["auto", "dense", "compact"]
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_DESCRIPTION_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.yaml"]
_DENSE_FILES = ["model.safetensors", "model-*.safetensors", MASK_FILE]
_COMPACT_FILES = [f"{COMPACT_FOLDER}/*.safetensors"]
_HUB_IGNORED = ["checkpoint-*", "last-checkpoint/*", "onnx/*", "runs/*"]
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")


@dataclass(frozen=True)
class ModelSource:
    """A resolved model: either a `folder` with config.json and safetensors, or a timm `architecture` without weights.

    `hub_id` is the repository that the folder was downloaded from, if it was. With a `checkpoint`, a file that
    another tool wrote, the weights are that file's, and the others say what model they are of. `compact` says that the
    weights to read are those of the folder's compact form.
    """

    folder: Path | None = None
    architecture: str | None = None
    hub_id: str | None = None
    checkpoint: Path | None = None
    compact: bool = False


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    pretrained: bool = False,
    reference: str | Path | None = None,
    form: Form = "auto",
) -> ModelSource:
    """Find the model that `name_or_path` stands for, downloading it if it is on the Hub.

    Args:
        name_or_path: In this order of preference: a bundled name (``resnet20-cifar10``); a local folder, also as
            ``local-dir:FOLDER``; ``timm/ARCHITECTURE``, as in ``timm/resnet50``; a Hub id, also as
            ``hf-hub:USER/NAME``, either with ``@REVISION``. A timm name with a tag, as in
            ``timm/resnet50.a1_in1k``, names weights and is the Hub id. With `reference`, a checkpoint file.
        revision: Branch, tag or commit of a Hub repository.
        token: Hub token; None uses the one of the login, if any.
        pretrained: For ``timm/ARCHITECTURE``: the weights that timm holds as its default, from the Hub.
        reference: The model that a checkpoint file is of: a name as above, also a folder or repository that has a
            config.json and no weights.
        form: Which of the weights: ``"dense"``, ``"compact"``, or ``"auto"``: from the Hub the compact form alone
            where there is one, in a folder the dense weights where there are such.

    Raises:
        ModelError: Nothing usable is there; a repository that has only pickled weights is not usable.
    """
    if form not in get_args(Form):
        raise ModelError(f"form must be one of {', '.join(get_args(Form))}, not {form!r}")
    name = str(name_or_path)
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if reference is not None:
        if not path.is_file():
            raise ModelError(f"{name!r} is not a file; a reference is for the checkpoint file of another tool")
        return replace(_resolve(reference, revision, token, pretrained=False, form=None), checkpoint=path)
    return _resolve(name_or_path, revision, token, pretrained=pretrained, form=form)


def _resolve(
    name_or_path: str | Path, revision: str | None, token: str | None, *, pretrained: bool, form: Form | None
) -> ModelSource:
    """As `resolve`; without a `form` of the weights a model's description is enough."""
    name = str(name_or_path)
    if (repository := hub_repository(name_or_path)) is not None:
        return _download(repository, revision, token, form)
    if name in BUNDLED_MODELS:
        return _from_folder(BUNDLED_MODELS[name], form)
    if _is_architecture(name_or_path):
        architecture = name.removeprefix("timm/")
        return _pretrained(architecture, token) if pretrained else ModelSource(architecture=architecture)
    return _from_folder(Path(name.removeprefix("local-dir:")).expanduser(), form)


def hub_repository(name_or_path: str | Path) -> str | None:
    """The Hub id, perhaps with ``@REVISION``, that a model's name stands for; None if it is something else's."""
    name = str(name_or_path)
    for prefix in _HUB_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    local = name in BUNDLED_MODELS or _is_local(name_or_path) or _is_architecture(name_or_path)
    return None if local else name


def _is_local(name_or_path: str | Path) -> bool:
    name = str(name_or_path)
    path = Path(name.removeprefix("local-dir:")).expanduser()
    return path.exists() or isinstance(name_or_path, Path) or _looks_like_path(name)


def _is_architecture(name_or_path: str | Path) -> bool:
    name = str(name_or_path)
    if _is_local(name_or_path) or not name.startswith("timm/") or "." in name:
        return False
    return timm.is_model(name.removeprefix("timm/"))


def _looks_like_path(name: str) -> bool:
    return name.startswith(("local-dir:", "/", ".", "~")) or name.count("/") > 1 or "\\" in name


def _from_folder(path: Path, form: Form | None) -> ModelSource:
    if not path.exists():
        raise ModelError(f"model folder {str(path)!r} does not exist; bundled models: {', '.join(BUNDLED_MODELS)}")
    if path.name.endswith(CHECKPOINT_SUFFIXES) and path.is_file():
        raise ModelError(
            f"{str(path)!r} is a checkpoint file, which does not say what model it is of: give as reference a folder "
            "with config.json, a Hub id or timm/ARCHITECTURE"
        )
    if not path.is_dir():
        raise ModelError(
            f"model {str(path)!r} is a file; give the folder that holds config.json and model.safetensors"
        )
    files = [file.relative_to(path).as_posix() for file in path.iterdir()]
    if "config.json" not in files:
        checkpoints = sorted(fnmatch.filter(files, "checkpoint-*"), key=lambda name: (len(name), name))
        hint = f"; did you mean {str(path / checkpoints[-1])!r}?" if checkpoints else ""
        raise ModelError(f"model folder {str(path)!r} has no config.json{hint}")
    where = f"model folder {str(path)!r}"
    if form is not None and not _has_any_weights(path):
        raise _no_weights(where, files, lambda file: (f"{path / file}", f"{path}"))
    return ModelSource(folder=path, compact=form is not None and _is_compact(where, path, form))


def _has_any_weights(folder: Path) -> bool:
    return has_weights(folder) or has_weights(folder / COMPACT_FOLDER)


def _is_compact(where: str, folder: Path, form: Form) -> bool:
    """Whether to read the compact form of a folder that has weights.

    Raises:
        ModelError: There are no weights in the wanted form.
    """
    dense, compact = has_weights(folder), has_weights(folder / COMPACT_FOLDER)
    if form == "auto":
        return not dense
    if not (dense if form == "dense" else compact):
        raise ModelError(f"{where} has its weights in {'dense' if dense else 'compact'} form only, not in {form} form")
    return form == "compact"


def _no_weights(where: str, files: list[str], way_out: Callable[[str], tuple[str, str]]) -> ModelError:
    """`way_out` gives for a pickle what `sparse-ft import` needs to read it: the file and the reference."""
    pickles = [file for pattern in _PICKLES for file in fnmatch.filter(files, pattern) if file != "training_args.bin"]
    if pickles:
        pickled, reference = way_out(pickles[0])
        return ModelError(
            f"{where} has only pickled weights ({pickles[0]}), which are never read unasked: they can run code; "
            f"`sparse-ft import {pickled} --reference {reference} --output-dir DIR` reads such a file without running "
            "code, and writes safetensors"
        )
    return ModelError(f"{where} has no weights: neither model.safetensors nor {COMPACT_FILE}")


def _pretrained(architecture: str, token: str | None) -> ModelSource:
    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        raise ModelError(f"timm has no pretrained weights on the Hub for the architecture {architecture!r}")
    return _download(config.hf_hub_id, None, token, "auto")


def _download(name: str, revision: str | None, token: str | None, form: Form | None) -> ModelSource:
    repo_id, _, named_revision = name.partition("@")
    revision = revision or named_revision or None
    where = f"model {repo_id!r} on the Hub"

    def snapshot(files: list[str], revision: str | None) -> Path:
        return Path(
            retrying(
                lambda: snapshot_download(
                    repo_id, revision=revision, token=token, allow_patterns=files, ignore_patterns=_HUB_IGNORED
                )
            )
        )

    try:
        weights = {"dense": _DENSE_FILES, "compact": _COMPACT_FILES, "auto": _COMPACT_FILES, None: []}[form]
        folder = snapshot([*_DESCRIPTION_FILES, *weights], revision)
        if form == "auto" and has_weights(folder / COMPACT_FOLDER):
            form = "compact"
        elif form == "auto":
            folder = snapshot(_DENSE_FILES, folder.name)  # of the same commit, whatever is pushed meanwhile
        if not (folder / "config.json").is_file():
            raise ModelError(f"{where} has no config.json")
        if form is not None and not _has_any_weights(folder):
            files = HfApi(token=token).list_repo_files(repo_id, revision=revision)
            raise _no_weights(where, files, lambda file: (f"$(hf download {repo_id} {file} --quiet)", repo_id))
        compact = form is not None and _is_compact(where, folder, form)
    except ModelError:
        raise
    except Exception as error:  # whatever the client and the transport below it raise
        raise ModelError(f"{explain_hub_error(error, repo_id, revision=revision)}{_hint(name)}") from None
    return ModelSource(folder=folder, compact=compact, hub_id=repo_id)


def _hint(name: str) -> str:
    """What else a name that could not be downloaded may have meant."""
    architecture = name.removeprefix("timm/")
    if "/" in architecture:
        return f"; nor is there a local folder {name!r}"
    if timm.is_model(architecture):
        return f"; for the architecture with random weights, write timm/{architecture.partition('.')[0]}"
    near = difflib.get_close_matches(name, BUNDLED_MODELS)
    near += [f"timm/{model}" for model in difflib.get_close_matches(architecture, timm.list_models())]
    return f"; names that exist: {', '.join(near)}" if near else ""
