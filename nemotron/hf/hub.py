"""Models of the Hugging Face Hub by their names: downloads into its cache, uploads of exports."""

import re
from pathlib import Path

from nemotron.errors import UserError

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
"""OWNER/NAME, optionally with @REVISION: a branch, a tag or a commit."""

READ = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")
"""Files of a repository that are downloaded; none of them holds code that is executed."""


def find_folder(place: str | Path) -> Path:
    """Return the path if it exists, or else the downloaded folder of a model of the Hub.

    Files in the Hub's cache (`HF_HOME`) are used again; a name without a revision means `main`.

    Raises:
        UserError: when neither a file nor a model has this name, or the Hub cannot be reached.
    """
    path, named = Path(place), NAME.fullmatch(str(place))
    if path.exists() or named is None:
        return path
    from huggingface_hub import constants, errors, snapshot_download  # 0.4 s, and only here

    repo, revision = named["repo"], named["revision"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*READ]))
    except errors.RevisionNotFoundError:
        problem = f"the model {repo} of the Hub has no revision {revision or 'main'}"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = "the Hub has no model of this name that you may read"
    except errors.LocalEntryNotFoundError:
        problem = f"{constants.ENDPOINT} cannot be reached, nor is the model in the Hub's cache"
    except _failures() as error:
        problem = f"{constants.ENDPOINT} did not give it: {_first_line(error)}"
    raise UserError(
        f"does not exist, and {problem}; give a run, checkpoint or export, or "
        "OWNER/NAME of a model on the Hub.",
        where=str(path.absolute()),
    )


def is_name(place: str) -> bool:
    """Say whether nothing of this name exists here, and a model of the Hub may have it."""
    return not Path(place).exists() and NAME.fullmatch(place) is not None


def push_folder(folder: Path, repo: str) -> str:
    """Upload an exported folder as a model, which is private if it is new; returns its address.

    The token is that of the environment (`HF_TOKEN`) or of `hf auth login`.

    Raises:
        UserError: when the Hub does not take it.
    """
    from huggingface_hub import HfApi, constants, errors

    api = HfApi()
    try:
        created = api.create_repo(repo, exist_ok=True, private=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload an export of nemotron-train",
            ignore_patterns=[".*"],
        )
    except _failures() as error:
        rule = f"could not be sent to {constants.ENDPOINT}: {_first_line(error)}; send it later"
        if isinstance(error, errors.HfHubHTTPError | errors.LocalTokenNotFoundError | ValueError):
            rule = f"was refused by {constants.ENDPOINT}: {_first_line(error)}; set HF_TOKEN to a "
            rule += "token that may write, and send it"
        way = f"hf upload --private {repo} {folder}"
        raise UserError(
            f"{rule}: {way}; the export is complete.", key="--push", value=repo
        ) from None
    return str(created)


def check_name(repo: str) -> None:
    """Check that a model can be uploaded under this name, before anything is done.

    Raises:
        UserError: when it cannot.
    """
    named = NAME.fullmatch(repo)
    if named is None or named["revision"] is not None:
        raise UserError("is not a name on the Hub; give OWNER/NAME.", key="--push", value=repo)


def _failures() -> tuple[type[Exception], ...]:
    """Return what the Hub's library raises when a request fails, its HTTP client's own included."""
    from huggingface_hub.errors import HfHubHTTPError

    return (
        *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
        OSError,
        ValueError,
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
