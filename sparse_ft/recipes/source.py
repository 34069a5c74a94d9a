"""Where a recipe comes from: a file, a text, a folder, or a repository on the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import RecipeError
from .yaml_text import MAX_CHARACTERS

RECIPE_FILE = "recipe.yaml"
_SUFFIXES = (".yaml", ".yml", ".md", ".json")
_HUB_ID = re.compile(r"(hf-hub:)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILE = re.compile(r"hf-hub:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+)(@(?P<revision>[\w./-]+))?")
_MARKERS = ("---", "+++")
_TEXT = "recipe text"


@dataclass(frozen=True)
class RecipeText:
    """A recipe's text; `name` for errors. In Markdown the recipe is the front matter, and must be there."""

    name: str
    text: str
    markdown: bool = False


def read_source(source: str | Path) -> RecipeText:
    """Reads a recipe.

    Args:
        source: a file (.yaml, .yml, .md or .json), a folder with a recipe.yaml, a text (it has a line break), or a Hub
            id: `user/name`, `user/name@revision`, or `hf-hub:user/name/path/to/file.yaml` for another file than
            recipe.yaml.

    Raises:
        RecipeError: there is no such recipe, or it is no text.
    """
    if isinstance(source, str) and "\n" in source:
        return RecipeText(_TEXT, source)
    name = str(source)
    if name.startswith("zoo:"):
        raise RecipeError("SparseZoo is closed; give a file or a repository on the Hugging Face Hub", recipe=name)
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / RECIPE_FILE
        if not path.is_file():
            raise RecipeError(f"is a folder without {RECIPE_FILE}", recipe=name)
    if path.is_file():
        return _read_file(path, name=str(path))
    hub = _HUB_FILE.fullmatch(name) or (None if name.endswith(_SUFFIXES) else _HUB_ID.fullmatch(name))
    if isinstance(source, Path) or hub is None:
        if ":" in name and not name.endswith(_SUFFIXES):
            raise RecipeError("is neither a file nor a recipe: a text needs more than one line", recipe=name)
        raise RecipeError("no such file", recipe=name)
    return _download(name, hub)


def _read_file(path: Path, name: str) -> RecipeText:
    if path.suffix.lower() not in _SUFFIXES:
        raise RecipeError(
            f"a recipe is a {', '.join(_SUFFIXES)} file, not {path.suffix or 'one without suffix'}", recipe=name
        )
    if path.stat().st_size > 4 * MAX_CHARACTERS:
        raise RecipeError(f"has {path.stat().st_size:,} bytes, which is no recipe", recipe=name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError("is not a text in UTF-8", recipe=name) from None
    return RecipeText(name, text, markdown=path.suffix.lower() == ".md")


def _download(name: str, hub: re.Match[str]) -> RecipeText:
    from huggingface_hub import hf_hub_download

    groups = hub.groupdict()
    file = groups.get("file") or RECIPE_FILE
    try:
        path = hf_hub_download(groups["repo"], file, revision=groups.get("revision"))
    except Exception as error:  # whatever the client and the transport below it raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"is no file here, and {file} of {groups['repo']} cannot be had from the Hub: {reason}", recipe=name
        ) from None
    return _read_file(Path(path), name=f"{name} ({file})" if file == RECIPE_FILE else name)


def front_matter(source: RecipeText) -> str:
    """The YAML of a recipe, in its lines: what is before front matter becomes empty lines.

    Front matter stands between two lines that are `---` (or `+++`) alone. Before it there may be a comment.

    Raises:
        RecipeError: Markdown without front matter, or one that does not end.
    """
    lines = source.text.split("\n")
    markers = [i for i, line in enumerate(lines) if line.rstrip() in _MARKERS]
    # In YAML a first `---` begins the document, and there may be no second one.
    if source.markdown and len(markers) < 2:
        missing = (
            "no front matter: lines of --- alone before and after the recipe" if not markers else "no --- that ends it"
        )
        raise RecipeError(f"has {missing}", recipe=source.name, line=markers[0] + 1 if markers else None)
    if not markers:
        return source.text
    first = markers[0]
    last = next((i for i in markers[1:] if lines[i].rstrip() == lines[first].rstrip()), len(lines))
    before = [line for line in lines[:first] if line.strip() and not line.lstrip().startswith("#")]
    if before and not source.markdown and not before[0].lstrip().startswith("<!--"):
        return source.text
    return "\n" * (first + 1) + "\n".join(lines[first + 1 : last])
