"""The one error that loading, saving and pushing models raises, and the Hub's errors in words."""

import re
import textwrap

from huggingface_hub import constants, errors

LOGIN_HINT = "log in with `hf auth login` or set HF_TOKEN"
_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )[^\s'\"]+")


class ModelError(ValueError):
    """A model cannot be loaded, saved or pushed as asked; one line says what is wrong, where, and what to do."""


def one_line(error: Exception) -> str:
    """The message of an error of another library in one line, without its end if it is very long."""
    return textwrap.shorten(str(error), 300) or type(error).__name__


def explain_hub_error(
    error: Exception, repo_id: str, *, revision: str | None = None, publishing: bool = False
) -> ModelError:
    """The `ModelError` that says in one line what a call to the Hub about `repo_id` failed of.

    No token appears in it. With `publishing` it was to change the repository, which it has not.
    """
    outcome = "; nothing was published" if publishing else ""
    where = f"{repo_id!r} on {constants.ENDPOINT}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.GatedRepoError():
            text = f"{where} is gated: accept its terms on its page, then {LOGIN_HINT}"
        case errors.RepositoryNotFoundError():
            text = f"no model {where} that you may read; if it is private, {LOGIN_HINT}"
        case errors.RevisionNotFoundError():
            text = f"{where} has no branch, tag or commit {revision or 'main'!r}"
        case errors.HFValidationError():
            text = f"{repo_id!r} is not a valid Hub id: it should read user/name"
        case errors.LocalTokenNotFoundError():
            text = f"no Hub token: {LOGIN_HINT}"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
            text = f"{where} is not in the local cache and the Hub cannot be reached{offline}"
        case errors.EntryNotFoundError():
            text = f"{where} lacks a file that is needed: {summary(error)}"
        case errors.HfHubHTTPError() if status == 401:
            text = f"the Hub does not accept the token for {where}: {LOGIN_HINT}"
        case errors.HfHubHTTPError() if status == 403:
            text = f"the token may not write to {where}: make one with the write permission"
        case errors.HfHubHTTPError() if status in (409, 412):
            text = f"somebody else keeps committing to {where}{outcome}; try again"
        case errors.HfHubHTTPError() if status == 429:
            text = f"the Hub asks for fewer requests (429) about {where}{outcome}; try again in some minutes"
        case errors.HfHubHTTPError() if status is not None and status >= 500:
            text = f"the Hub has trouble of its own ({status}) with {where}{outcome}; try again later"
        case _:
            text = f"the Hub call about {where} failed{outcome}: {summary(error)}"
    return ModelError(text)


def summary(error: Exception) -> str:
    """The first line of an error's message, without any token in it."""
    text = str(error).strip()
    return _TOKEN.sub("<token>", text.splitlines()[0]) if text else type(error).__name__
