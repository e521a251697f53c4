"""`push` and `pull`: runs and activation stores in repositories of the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

from hsae.cache.building.verification import verify
from hsae.cache.errors import UserError
from hsae.cache.format.layout import METADATA
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.hub import Repository, downloaded, upload
from hsae.eval.sharing.privacy import check_public
from hsae.eval.sharing.shared_run import CARD, Files, run_files
from hsae.eval.sharing.store_card import store_card
from hsae.train.run_record import FILE as RECORD
from hsae.train.run_record import damaged_files, read_run

RUN_PATTERNS = ("*.json", "*.jsonl", "*.safetensors", "*.md", "*.png")
STORE_PATTERNS = ("*.zarr/**",)
TEXT = {".json", ".jsonl", ".md"}
HEADER_BYTES = 1 << 16
"""Of a safetensors file: its names and metadata come first."""


@dataclass(frozen=True)
class Sharing:
    """What goes where."""

    repository: Repository
    files: Files

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path in the repository."""
        return {
            name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in self.files.items()
        }


def prepare(source: str | Path, repository: str, *, model: str | None = None) -> Sharing:
    """What `push` would send, after all checks.

    Raises UserError if a run is not trained, a store is not complete, or a file holds a secret or a path of this
    machine.
    """
    path, target = Path(source).expanduser(), Repository.of(repository)
    is_store = (path / METADATA).is_file()
    if not is_store and not path.is_dir():
        raise UserError(f"there is no run and no store {path}; give a run's directory, such as runs/3, or a store")
    if is_store != (target.kind == "dataset"):
        kind, form = ("store", "datasets/owner/name") if is_store else ("run", "owner/name")
        raise UserError(f"{path} is a {kind}: its repository is written {form}")
    if is_store and model is not None:
        raise UserError("--model is for runs; a store's header says which model it is of")
    files = _store_files(path, target.id) if is_store else run_files(path, target.id, model)
    for name, data in files.items():
        check_public(name, _text_of(name, data))
    return Sharing(target, files)


def push(source: str | Path, repository: str, *, model: str | None = None, private: bool = False) -> str:
    """Send a trained run (a directory such as runs/3) or a complete store to the hub; returns the repository's URL.

    A run goes to `owner/name` with its model in hsae's and SAELens's formats, its log, its results and a model card; a
    store goes to `datasets/owner/name`. `model` is the language model's id on the hub, where the plan names it
    otherwise. What is there already is not sent again. Raises UserError as `prepare` does, and if the hub refuses.

    >>> hsae.eval.push("runs/3", "me/gemma-2-2b-hsae")  # doctest: +SKIP
    """
    sharing = prepare(source, repository, model=model)
    return upload(sharing.files, sharing.repository, last=(CARD, RECORD, *_heads(sharing.files)), private=private)


def pull(repository: str, folder: str | Path, *, revision: str | None = None) -> list[Path]:
    """Fetch a run into `folder`, or the stores of a data set's repository into it; returns what was made.

    Everything is checked against its checksums before it is put in place. Raises UserError if something is there
    already, is damaged, or is neither a run nor a store.

    >>> hsae.eval.pull("me/gemma-2-2b-hsae", "runs/3")  # doctest: +SKIP
    """
    source, target = Repository.of(repository), Path(folder).expanduser()
    if source.kind == "model":
        if target.exists():
            raise UserError(f"{target} is there already; give a folder that is not there")
        with downloaded(source, target, RUN_PATTERNS, revision) as partial:
            _check_run(partial, source)
            partial.rename(target)
        return [target]
    with downloaded(source, target / "stores", STORE_PATTERNS, revision) as partial:
        stores = sorted(path.parent for path in partial.glob(f"*.zarr/{METADATA}"))
        if not stores:
            raise UserError(f"{source} holds no activation store (a folder NAME.zarr with {METADATA})")
        for store in stores:
            if (target / store.name).exists():
                raise UserError(f"{target / store.name} is there already")
            if damage := verify(store):
                raise UserError(f"{store.name} of {source} is damaged: {damage[0]}; fetch it again")
        target.mkdir(parents=True, exist_ok=True)
        return [store.rename(target / store.name) for store in stores]


def _heads(files: Files) -> list[str]:
    """The headers of the stores, without which they are not complete."""
    return [name for name in files if name.count("/") == 1 and name.endswith(METADATA)]


def _store_files(root: Path, repository: str) -> Files:
    """The files of a complete store, and a card."""
    store = ActivationStore.open(root)
    files: Files = {
        f"{root.name}/{path.relative_to(root).as_posix()}": path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    return {**files, CARD: store_card(store, repository).encode()}


def _text_of(name: str, data: Path | bytes) -> str:
    """What of a file is text."""
    if isinstance(data, bytes):
        return data.decode("utf-8", "replace")
    if Path(name).suffix in TEXT:
        return data.read_text("utf-8", "replace")
    if name.endswith(".safetensors"):
        with data.open("rb") as file:
            return file.read(HEADER_BYTES).decode("utf-8", "replace")
    return ""


def _check_run(folder: Path, source: Repository) -> None:
    record = read_run(folder)
    if record is None:
        raise UserError(f"{source} holds no run of hsae: it has no {RECORD}")
    if harm := damaged_files(folder, record):
        name, problem = next(iter(harm.items()))
        raise UserError(f"{name} of {source} {problem}; fetch it again")
