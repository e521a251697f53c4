"""Progress bars in a terminal or a notebook; elsewhere, as in the log of a job, a line now and then says the same."""

from datetime import datetime
from typing import Any

from rich.progress import Progress, TaskID
from rich.text import Text

LOG_EVERY = 30.0
"""Seconds between two lines of one task."""


class Bars(Progress):
    """Rich's bars. Without a terminal each task prints a line every `LOG_EVERY` seconds, and one at its end if it took
    as long.
    """

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._logged: dict[TaskID, float] = {}

    def add_task(self, *args: Any, **options: Any) -> TaskID:
        """A new task."""
        task = super().add_task(*args, **options)
        self._logged[task] = self.get_time()
        return task

    def update(self, task_id: TaskID, **options: Any) -> None:
        """Move a task."""
        super().update(task_id, **options)
        if not (self.console.is_terminal or self.console.is_jupyter):
            self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        now, task = self.get_time(), self._tasks[task_id]
        is_long = task.start_time is not None and now - task.start_time >= LOG_EVERY
        if now - self._logged[task_id] >= LOG_EVERY or (task.finished and is_long and self._logged[task_id] < now):
            self._logged[task_id] = now
            texts = [shown.plain for column in self.columns if isinstance(shown := column(task), Text)]  # type: ignore[operator]
            line = f"{datetime.now():%H:%M:%S} {'  '.join(filter(None, texts))}"
            self.console.print(Text(line), soft_wrap=True)
