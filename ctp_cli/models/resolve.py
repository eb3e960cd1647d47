"""From what a user typed to a folder with a checkpoint: the embedded model, a local folder, or a hub id."""

import difflib
import errno
import re
from dataclasses import dataclass
from pathlib import Path

from ctp_cli.errors import InputError, NetworkError
from ctp_cli.models import embedded
from ctp_cli.progress import SILENT, Progress

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class ResolvedModel:
    """A checkpoint folder, the short name outputs are called after, and whether it is the embedded default."""

    path: Path
    name: str
    embedded: bool


def resolve_model(given: str, progress: Progress = SILENT) -> ResolvedModel:
    """Raises InputError for a folder without a checkpoint or an unknown name, NetworkError without the hub."""
    path = Path(given)
    if given == embedded.NAME and not path.exists():
        return ResolvedModel(embedded.embedded_model(progress), embedded.NAME, True)
    if path.exists():
        if not (path / "config.json").is_file():
            what = "is a file" if path.is_file() else "has no config.json"
            raise InputError(f"{given}: not a model folder ({what})", hint="give a folder as save_pretrained writes it")
        return ResolvedModel(path.resolve(), path.resolve().name.lower(), False)
    if not _HUB_ID.match(given) or given.startswith(("./", "../")):
        close = difflib.get_close_matches(given, [embedded.NAME], n=1)
        suggestion = f"did you mean {close[0]}? " if close else ""
        raise InputError(
            f"unknown model {given!r}: no such folder, and not a hub id (owner/name)",
            hint=f"{suggestion}give a model folder, owner/name on the Hugging Face hub, or {embedded.NAME}",
        )
    progress.say(f"looking for {given} in the hub's cache and on the hub")
    return ResolvedModel(download_from_hub(given), given.rsplit("/", 1)[-1].lower(), False)


def download_from_hub(repository: str) -> Path:
    """A hub model's folder in the hub's own cache: safetensors, configuration and tokenizer only, never pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            repository, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        )
    except RepositoryNotFoundError:
        raise InputError(
            f"{repository}: the hub has no such model, or it needs a login", hint="check the name"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NetworkError(
            f"{repository}: not in the local cache, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__})",
            hint=f"give a model folder on this machine, or {embedded.NAME}, which needs only the Python package index",
        ) from None
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{repository}: no config.json in that repository", hint="is it a transformers model?")
    return Path(folder)
