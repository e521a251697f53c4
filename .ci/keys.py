"""The reference of plans: every key that a plan may have. `python .ci/keys.py` writes it into docs/plan.md."""

from pathlib import Path

from hsae.train.config.reference import plan_keys

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plan.md"
HEAD = """# What may stand in a plan

A plan is a TOML file. `hsae plan keys` prints this page's list, `hsae plan show` a whole plan, and `hsae plan check`
says what is wrong with one and how far its stores and runs are. A plan may begin with `extends = "NAME"`, a packaged
plan or a file, and state only what differs; `name` is what tables call it. On the command line `--set KEY=VALUE` sets
any key below. A key of `[runs.N]` may also stand in `[train]`, for all runs that don't say otherwise. `[]` stands for
each table of a list. Made by `make map`; a test compares it with the code.
"""


def drawn() -> str:
    """The page: a section for each table, a list of its keys."""
    lines, section = [HEAD], ""
    for key in plan_keys():
        table, _, name = key.name.rpartition(".")
        if table != section:
            lines += [f"\n## `[{table}]`\n"]
            section = table
        default = f"default `{key.default}`" if key.default not in (None, "not set") else key.default or "must be given"
        lines.append(f"* **`{name}`** ({key.holds}; {default}): {key.meaning}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(drawn())
