"""The tasks of a suite: of SAEBench's data sets on the hub, of local files, or of what ships with Python."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError
from hsae.cache.suites.labelled_texts import SPLITS, DataSet, Record, TextTask, classes, quadrants
from hsae.cache.suites.python_tasks import python_sets
from hsae.cache.suites.saebench_sets import TPP_NAMES, saebench_sets
from hsae.cache.suites.specs import Suite, SuiteConfig
from hsae.cache.text.data_sets import read_tables, records


class LocalTask(Config):
    """One data set of a local tasks file."""

    name: str = Field(min_length=1)
    train: str
    """A data file, relative to the tasks file; rows without text, label or attribute are left out."""
    test: str
    text: str = "text"
    label: str = "label"
    classes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Labels to use, in order; none named uses all."""
    attribute: str | None = None
    """A second column, for SCR."""
    attribute_values: Annotated[tuple[str, ...], Field(strict=False, min_length=2, max_length=2)] | None = None
    """Its two values; the first plays the part of SAEBench's "male"."""
    pairs: Annotated[tuple[Annotated[tuple[str, str], Field(strict=False)], ...], Field(strict=False)] = ()
    """Pairs of labels for SCR."""


def text_tasks(suite: Suite, config: SuiteConfig) -> list[TextTask]:
    """The tasks of a suite. Raises CorpusError if a data set can't be had or is too small."""
    sets = _sets(config)
    if suite == "scr":
        tasks = [
            quadrants(data, data.read(), index, config)
            for data in sets
            if data.attribute_values
            for index in range(len(data.pairs))
        ]
    else:
        wanted = sets if suite == "sparse-probing" else [data for data in sets if suite_has_tpp(data, config)]
        tasks = [classes(data, data.read(), config) for data in wanted]
    if not tasks:
        raise CorpusError(
            f"suite.tasks {config.tasks!r} has no data for {suite}; SCR needs two attributes and pairs of labels"
        )
    return tasks


def suite_has_tpp(data: DataSet, config: SuiteConfig) -> bool:
    """SAEBench takes two of its data sets for TPP; elsewhere every data set of at least three classes serves."""
    return data.name in TPP_NAMES if config.tasks == "saebench" else len(data.classes) != 2


def _sets(config: SuiteConfig) -> list[DataSet]:
    if config.tasks == "saebench":
        return saebench_sets(config)
    if config.tasks == "python":
        return python_sets(config)
    return _local(Path(config.tasks).expanduser())


def _local(path: Path) -> list[DataSet]:
    if not path.is_file():
        raise CorpusError(
            f"suite.tasks {str(path)!r}: no such file; give saebench, python, or a TOML file with [[task]] tables"
        )
    return [_local_set(task, path.parent) for task in read_tables(path, "task", LocalTask)]


def _local_set(task: LocalTask, folder: Path) -> DataSet:
    def read() -> dict[str, list[Record]]:
        columns = [task.text, task.label, *([task.attribute] if task.attribute else [])]
        rows = {
            split: [
                Record(*map(str, values))
                for values in records(folder / file, columns)
                if None not in values and str(values[0]).strip()
            ]
            for split, file in zip(SPLITS, (task.train, task.test), strict=True)
        }
        texts = [{record.text for record in rows[split]} for split in SPLITS]
        if texts[1] and texts[1] <= texts[0]:
            raise CorpusError(
                f"task {task.name}: every test text is a training text; give {task.test} texts of its own"
            )
        return rows

    if task.pairs and task.attribute_values is None:
        raise CorpusError(f"task {task.name}: pairs are given, so SCR needs attribute and attribute_values too")
    return DataSet(
        name=task.name,
        read=read,
        source=f"{task.train}, {task.test}",
        classes=task.classes,
        pairs=task.pairs,
        attribute_values=None
        if task.attribute_values is None
        else (task.attribute_values[0], task.attribute_values[1]),
    )
