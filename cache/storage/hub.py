"""Repositories of the Hugging Face hub: files are sent in a few commits and arrive in a folder whole or not at all."""

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hsae.cache.errors import UserError
from hsae.cache.files import partial_name

FILES_A_COMMIT = 500
REPOSITORY = re.compile(r"(datasets/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")


@dataclass(frozen=True)
class Repository:
    """A repository on the hub: `owner/name` of a model, `datasets/owner/name` of a data set."""

    kind: Literal["model", "dataset"]
    id: str

    @classmethod
    def of(cls, text: str) -> "Repository":
        """What a user wrote. Raises UserError unless it has one of the two forms."""
        match = REPOSITORY.fullmatch(text.removeprefix("hf://").rstrip("/"))
        if match is None:
            raise UserError(
                f"{text!r} names no repository: write owner/name for a run, datasets/owner/name for a store"
            )
        return cls("dataset" if match[1] else "model", match[2])

    def __str__(self) -> str:
        return f"{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


def upload(
    files: Mapping[str, Path | bytes], repository: Repository, *, last: Sequence[str] = (), private: bool = False
) -> str:
    """Send files, by their paths in the repository, which is made if it isn't there; returns its URL.

    Files that are there already are not sent again, so that the same call goes on where one was cut off; those named
    in `last` come in the last commit, when all others have arrived. Raises UserError if the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    early = [name for name in files if name not in last]
    with explained(repository):
        url = api.create_repo(repository.id, repo_type=repository.kind, private=private, exist_ok=True)
        parts = [early[start : start + FILES_A_COMMIT] for start in range(0, len(early), FILES_A_COMMIT)]
        for names in filter(None, [*parts, [name for name in last if name in files]]):
            additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in names]
            api.create_commit(repository.id, additions, commit_message="Upload with hsae", repo_type=repository.kind)
    return str(url)


@contextlib.contextmanager
def downloaded(
    repository: Repository, beside: Path, patterns: Sequence[str], revision: str | None = None
) -> Iterator[Path]:
    """A folder beside a path, with the files of a repository that match the patterns; it is gone afterwards unless it
    was moved. Raises UserError if the hub refuses.
    """
    from huggingface_hub import snapshot_download

    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = partial_name(beside)
    try:
        with explained(repository):
            snapshot_download(
                repository.id,
                repo_type=repository.kind,
                revision=revision,
                local_dir=folder,
                allow_patterns=list(patterns),
            )
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # what the library remembers of its downloads
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Errors of the hub's client as a UserError in one line; those of this machine's disk stay as they are."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
        return
    except RevisionNotFoundError:
        text = f"{repository} has no such revision on the hub"
    except (RepositoryNotFoundError, GatedRepoError):
        text = f"the hub has no {repository} that you may use; see `hf auth whoami`, and log in with `hf auth login`"
    except HfHubHTTPError as error:
        code = error.response.status_code
        advice = "; log in with `hf auth login` as somebody who may" if code in (401, 403) else ""
        text = f"the hub refuses {repository} (status {code}){advice}"
    except OSError as error:
        if error.filename is not None:
            raise
        text = f"the hub can't be reached for {repository} ({type(error).__name__})"
    except Exception as error:
        text = f"the hub can't be reached for {repository} ({type(error).__name__})"
    raise UserError(text) from None
