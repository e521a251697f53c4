"""The plan: one TOML file that says which model, which text, and which runs.

Tables `[model] [hook] [cache] [cache.train] [cache.eval] [train]`, if need be those of evaluations
(`hsae.registry.TABLES`), and one `[runs.N]` for each run, whose keys override those of `[train]`. `./hsae.toml` wins
over the packaged default plan; a name or file given by the user wins over both. A plan may begin with `extends =
"NAME"` and state only what differs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from hsae.cache.config import CacheConfig, Config, HookConfig, ModelConfig, Split
from hsae.cache.errors import StoreError
from hsae.cache.files import parse_toml
from hsae.cache.format.spec import StoreSpec, gpu_rows, store_spec
from hsae.cache.storage.paths import Place, exists, place
from hsae.cache.text.common_text import common_text
from hsae.cache.text.corpora import TEXT_TABLES
from hsae.registry import TABLES, resolve
from hsae.train.config.checked import SHOWN, ConfigT, PlanError, check_table, checked, shorten
from hsae.train.config.run_config import RunConfig, StreamConfig

DEFAULT_PLAN = "gemma-2-2b"
LOCAL_PLAN = "hsae.toml"
DEEPEST = 100
"""Plans that may extend each other."""
OWN_TABLES = {"extends", "name", "model", "hook", "cache", "train", "runs"}
"""What a plan may hold besides the tables of evaluations."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan whose every value has been checked."""

    name: str
    source: str
    """File or packaged name the plan came from."""
    model: ModelConfig
    hook: HookConfig
    cache: CacheConfig
    train: StreamConfig
    runs: dict[int, RunConfig]
    tables: dict[type[Config], Config]
    """Tables of evaluations that the plan has, by their class."""
    overrides: tuple[str, ...] = ()
    """What the user set beside it, as `key=value`."""
    seed_index: int = 0
    """Which of several seeds of one plan this is."""

    def table(self, kind: type[ConfigT]) -> ConfigT:
        """An evaluation's table: what the plan says, or the defaults of its class."""
        table = self.tables.get(kind)
        return table if isinstance(table, kind) else kind()

    def store(self, split: Split, device: str | None = None) -> StoreSpec:
        """The activation store the plan asks for: as `device` (None: the best there is) makes it, or one that is there
        and differs only in what `[cache]` leaves open. Raises StoreError if there are several such.
        """
        wanted, *others = self._fitting(split, device)
        home = place(self.cache.dir)
        if not others or exists(home / wanted.name):
            return wanted
        there = [spec for spec in others if exists(home / spec.name)]
        there = [spec for spec in there if _passes(spec) == _passes(wanted)] or there
        if len(set(map(_passes, there))) > 1:
            raise StoreError(
                f"{home} has several {split} stores of the plan, made with other forward passes: "
                f"{', '.join(spec.name for spec in there)}. Choose one with --set cache.forward_rows=ROWS "
                "--set cache.compile=true|false (hsae cache info STORE shows both), or move the others away"
            )
        return there[0] if there else wanted

    def _fitting(self, split: Split, device: str | None) -> list[StoreSpec]:
        """Every store that the plan may mean, first that which `device` makes."""
        spec, cache = self.requested(split), self.cache
        codecs, rows, compiled = [spec.codec], [spec.forward_rows], [spec.compiled]
        if cache.codec == "auto":
            codecs.append("compact" if spec.codec == "mappable" else "mappable")
        if "auto" in (cache.forward_rows, cache.compile):
            from hsae.cache.device import can_compile, pick_device  # which loads torch

            device = device or pick_device("auto")
            if cache.forward_rows == "auto":
                rows = [None, gpu_rows(spec.context, spec.batch_rows)][:: -1 if device.startswith("cuda") else 1]
            if cache.compile == "auto":
                compiled = [True, False] if can_compile(device) else [False, True]
        choices = dict.fromkeys(product(rows, compiled, codecs))  # rows may be the same on either device
        fields = ("forward_rows", "compiled", "codec")
        return [spec.model_copy(update=dict(zip(fields, choice, strict=True))) for choice in choices]

    def requested(self, split: Split) -> StoreSpec:
        """The same as a processor makes it, whatever is there; runs and results are known by it."""
        if split == "train" or split == "eval":  # written so that the type is narrowed
            return store_spec(split, self.model, self.hook, self.cache)
        kind = next(resolve(table.kind) for table in TABLES.values() if split in table.splits)
        spec: StoreSpec = self.table(kind).spec(split, self.model, self.hook, self.cache)
        return spec

    def store_path(self, split: Split) -> Place:
        """Where that store lies."""
        return place(self.cache.dir) / self.store(split).name

    def common_text(self, split: Split, other: Split = "train") -> str | None:
        """The text that the stores of two splits share, in words, with the keys that part them; None if there is none.

        Raises CorpusError if the text can't be read.
        """
        specs = [self.requested(split), self.requested(other)]
        common = common_text(specs[0].corpus, specs[1].corpus)
        tables = " and ".join(f"[{TEXT_TABLES[spec.split]}]" for spec in specs)
        return common and (
            f"{tables} overlap: {common}. Set first_document and last_document so that no document is in both, "
            "or use other text"
        )

    def run_dir(self, run: RunConfig) -> Path:
        """Where a run's results lie: `<train.dir>/<number>`."""
        return Path(self.train.dir).expanduser() / str(run.number)

    def seeded(self, index: int) -> "Plan":
        """The plan for seed number `index`: 0 is the plan itself, others have a seed and a folder of their own."""
        if index == 0:
            return self
        changes = {"seed": self.train.seed + index, "dir": str(Path(self.train.dir) / f"seed{index}")}
        return replace(self, train=self.train.model_copy(update=changes), seed_index=self.seed_index + index)

    @property
    def stream(self) -> StreamConfig:
        """The stream that the runs of every seed read: it has the order of the first one's."""
        return self.train.model_copy(update={"seed": self.train.seed - self.seed_index})

    def label(self, run: RunConfig) -> str:
        """A run's number and name, and which seed it is if it is not the first."""
        return f"{run.number} {run.name}" + (f" seed {self.seed_index}" if self.seed_index else "")

    def select(self, text: str) -> list[RunConfig]:
        """Runs named by `3`, `0-5`, `baseline` or a comma-separated list of those, in the order of their numbers."""
        return select_runs(self.runs, text, f"plan {self.name} ({self.source})")


def _passes(spec: StoreSpec) -> tuple[int, bool]:
    return spec.pass_rows, spec.compiled


def select_runs(runs: dict[int, RunConfig], text: str, where: str) -> list[RunConfig]:
    """The runs that `text` names, as `Plan.select` says. Raises PlanError naming `where` and those missing."""
    selected: set[int] = set()
    named = {run.name: number for number, run in runs.items()}
    for part in (piece.strip() for piece in text.split(",")):
        first, dash, last = part.partition("-")
        numbers: list[int] = []
        missing = [] if part in named else [shorten(part)]
        if part in named:
            numbers = [named[part]]
        elif _is_number(first) and _is_number(last if dash else first):
            low, high = int(first), int(last if dash else first)
            numbers = [number for number in runs if low <= number <= high]
            missing = _gaps([low - 1, *numbers, high + 1]) if low <= high else missing
        if missing:
            have = ", ".join(f"{number} ({run.name})" for number, run in runs.items())
            named_by = f" (--run {part})" if dash and numbers else ""
            raise PlanError(f"no run {', '.join(missing)}{named_by} in {where}; it has {have}")
        selected.update(numbers)
    return [runs[number] for number in sorted(selected)]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _gaps(numbers: list[int]) -> list[str]:
    """The runs of whole numbers between sorted ones, such as `6-20`."""
    between = [(low + 1, high - 1) for low, high in pairwise(numbers) if low + 1 < high]
    return [repr(str(low)) if low == high else repr(f"{low}-{high}") for low, high in between]


def packaged_plans() -> list[str]:
    """Names of the plans that come with hsae."""
    files = resources.files("hsae.train.config.plans").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_plan(plan: str | None = None, overrides: Sequence[str] = ()) -> Plan:
    """Read a plan by packaged name or file, apply `key=value` overrides, and check it.

    Raises PlanError naming the file, the key, the value and what is allowed.
    """
    return planned_tables(plan, overrides)[0]


def planned_tables(plan: str | None = None, overrides: Sequence[str] = ()) -> tuple[Plan, dict[str, Any]]:
    """What `load_plan` gives, and the tables that it was made of: those of the file, of the plans that it extends, and
    what `overrides` set. Defaults of keys that none of them has are not in them.
    """
    source, tables = read_tables(
        plan if plan is not None else LOCAL_PLAN if Path(LOCAL_PLAN).is_file() else DEFAULT_PLAN
    )
    for override in overrides:
        apply_override(tables, override, _table_names() - {"extends"})
    return replace(_checked(source, tables), overrides=tuple(overrides)), tables


def _table_names() -> set[str]:
    return OWN_TABLES | TABLES.keys()


def read_tables(plan: str, chain: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
    """Where a plan comes from and its tables, with those it extends merged in, unchecked. Raises PlanError."""
    packaged = plan in packaged_plans()
    source = f"packaged plan {plan}" if packaged else plan
    file = resources.files("hsae.train.config.plans").joinpath(f"{plan}.toml") if packaged else Path(plan)
    try:
        tables = parse_toml(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise PlanError(f"no plan {plan!r}: neither a file nor one of {', '.join(packaged_plans())}") from None
    except IsADirectoryError:
        raise PlanError(
            f"plan {plan!r} is a folder; name a TOML file in it, or one of {', '.join(packaged_plans())}"
        ) from None
    except OSError as error:
        raise PlanError(f"plan {shorten(plan)} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise PlanError(f"{source} is not valid TOML: {error}") from None
    if unknown := tables.keys() - _table_names():
        raise PlanError(f"{source}: unknown table {sorted(unknown)[0]!r}; allowed: {', '.join(sorted(_table_names()))}")
    base = tables.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise PlanError(f"{source}: extends = {shorten(base)}; it must name a packaged plan or a file")
        if base in (*chain, plan) or len(chain) > DEEPEST:
            raise PlanError(
                f"{source}: plans extend each other in a circle: {' -> '.join((*chain, plan, base)[-5:])}; "
                "one of them must not extend another"
            )
        tables = _merged(read_tables(base, (*chain, plan))[1], tables)
    tables.setdefault("name", Path(plan).stem)
    return source, tables


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def apply_override(tables: dict[str, Any], override: str, allowed: Collection[str]) -> None:
    """Set what `table.key=value` says; the table must be one of `allowed`. Raises PlanError."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path) or path[0] not in allowed:
        raise PlanError(
            f"--set {shorten(override)}: write it as table.key=value, for example --set cache.train.rows=2000; "
            f"tables: {', '.join(sorted(allowed))}"
        )
    try:
        parsed = parse_toml(f"value = {text}")
    except ValueError:
        parsed = {}
    place = tables
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise PlanError(f"--set {shorten(override)}: {part!r} is a value, not a table")
    place[path[-1]] = parsed["value"] if parsed.keys() == {"value"} else text  # a bare word is a string


def _checked(source: str, tables: dict[str, Any]) -> Plan:
    for table in ("model", "hook", "cache", "train", "runs"):
        if table not in tables:
            raise PlanError(f"{source}: table [{table}] is missing")
    name = tables["name"]
    if not isinstance(name, str) or not 0 < len(name) <= SHOWN or not name.isprintable():
        raise PlanError(f"{source}: name must be a line of 1 to {SHOWN} characters (given: {shorten(name)})")
    stream, runs = checked_runs(source, tables["train"], tables["runs"])
    try:
        Path(stream.dir).expanduser()
    except RuntimeError:
        raise PlanError(f"{source}: train.dir: there is no user whose folder is {stream.dir}") from None
    kinds = {table: resolve(TABLES[table].kind) for table in TABLES if table in tables}
    return Plan(
        name=name,
        source=source,
        model=checked(source, "model", ModelConfig, tables["model"]),
        hook=checked(source, "hook", HookConfig, tables["hook"]),
        cache=checked(source, "cache", CacheConfig, tables["cache"]),
        train=stream,
        runs=runs,
        tables={kind: checked(source, table, kind, tables[table]) for table, kind in kinds.items()},
    )


def checked_runs(
    source: str, train: dict[str, Any], tables: dict[str, Any]
) -> tuple[StreamConfig, dict[int, RunConfig]]:
    """What `[train]` and the tables `[runs.N]` say, checked and matched; runs in the order of their numbers."""
    for name, table in (("train", train), ("runs", tables)):
        check_table(source, name, table)
    shared = {key: value for key, value in train.items() if key in StreamConfig.model_fields}
    defaults = {key: value for key, value in train.items() if key not in StreamConfig.model_fields}
    for key in defaults:
        if key not in RunConfig.model_fields or key in ("number", "name"):
            allowed = sorted({*StreamConfig.model_fields, *RunConfig.model_fields} - {"number", "name"})
            raise PlanError(f"{source}: [train] has no key {key!r}; allowed: {', '.join(allowed)}")
    runs: dict[int, RunConfig] = {}
    for key, table in tables.items():
        if not _is_number(key) or key != str(int(key)) or not isinstance(table, dict):
            raise PlanError(f"{source}: [runs.{key}]: runs are tables with a number, such as [runs.3]")
        if fixed := table.keys() & {*StreamConfig.model_fields}:
            raise PlanError(
                f"{source}: [runs.{key}] sets {sorted(fixed)[0]!r}, which all runs share; set it in [train]"
            )
        values = {**_merged(defaults, table), "number": int(key)}
        runs[int(key)] = checked(source, f"runs.{key}", RunConfig, values)
    if not runs:
        raise PlanError(f"{source}: there is no run; add a table [runs.0]")
    stream = checked(source, "train", StreamConfig, shared)
    runs = dict(sorted(runs.items()))
    _check_matched(source, stream, runs)
    return stream, runs


def _check_matched(source: str, stream: StreamConfig, runs: dict[int, RunConfig]) -> None:
    names = [run.name for run in runs.values()]
    if shared := sorted(name for name in names if names.count(name) > 1):
        raise PlanError(f"{source}: two runs have one name: {shared[0]!r}")
    widths: dict[int, float] = {number: sum(run.widths) for number, run in runs.items()}
    l0s = {number: sum(run.l0) for number, run in runs.items()}
    for what, totals in (("width", widths), ("L0", l0s)):
        if stream.matched and len(set(totals.values())) > 1:
            listed = ", ".join(f"run {number}: {value:g}" for number, value in totals.items())
            raise PlanError(
                f"{source}: runs differ in total {what} ({listed}), so their results can't be compared; "
                "match them, or set train.matched=false"
            )
