"""How an evaluation tells what it does: the command line shows it, a notebook may leave it silent."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a phase, how many of its steps are done, and how many there are."""


class Listener:
    """Hears how an evaluation goes; this one is silent. Subclasses show what they like."""

    def status(self, text: str) -> None:
        """What is under way now."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` steps of a phase are finished; a phase may begin again."""

    def say(self, text: str) -> None:
        """A line for people."""

    def warn(self, text: str) -> None:
        """A line that people should not overlook."""

    def confirm(self, question: str) -> bool:
        """Whether a person wants to go on; False where nobody can be asked."""
        return False


SILENT = Listener()
