"""The reference of a plan's keys."""

import tomllib

import pytest

from hsae.train.config.checked import PlanError
from hsae.train.config.plan import load_plan, packaged_plans
from hsae.train.config.reference import plan_keys

KEYS = {key.name: key for key in plan_keys()}


def test_every_key_says_what_it_means():
    assert not [key.name for key in KEYS.values() if not key.meaning or "None" in (key.default or "")]
    assert len(KEYS) == len(plan_keys())


def test_types_defaults_and_bounds():
    context, dtype, levels = KEYS["cache.context"], KEYS["model.dtype"], KEYS["runs.N.level_weights"]
    assert (context.holds, context.default) == ("a whole number at least 2", "128")
    assert (dtype.holds, dtype.default) == ('"bfloat16", "float32", "float16"', '"bfloat16"')
    assert (levels.holds, levels.default) == ("a list of numbers", "not set")
    assert KEYS["cache.train.rows"].default is None  # must be given
    assert KEYS["unlearning.forget.corpus"].default == '"python-source"'  # of the table that holds it
    assert KEYS["runs.N.learning_rate"].holds == 'a number above 0 or "auto"'
    assert KEYS["autointerp.total_tokens"].holds == "a whole number at least 1, at most 16,777,216"


def test_tables_follow_the_key_that_holds_them():
    assert KEYS["runs.N.curriculum"].holds == '"none", "coarse-first", "fine-first" or a list of tables'
    assert "runs.N.curriculum[].until" in KEYS and "runs.N.composition.mode" in KEYS
    assert "runs.N.composition" not in KEYS and "runs.N.number" not in KEYS


@pytest.mark.parametrize("name", [key.name for key in plan_keys() if key.default not in (None, "not set")])
def test_defaults_are_toml_that_a_plan_takes(name):
    default = tomllib.loads(f"value = {KEYS[name].default}")["value"]
    if "[]" in name:
        return  # stages: no plan that extends tiny has room for one alone
    key = name.replace("runs.N", "runs.3")
    if key.startswith("autointerp.text."):
        return  # a table that needs a corpus
    table = key.rpartition(".")[0]  # a table of text is taken whole, and needs a corpus
    corpus = [f'{table}.corpus="python-docs"'] if f"{table}.corpus" in KEYS and table.startswith("unlearning") else []
    load_plan("tiny", [*corpus, f"{key}={KEYS[name].default}", "train.matched=false"])
    assert default is not None


def test_part_of_the_keys():
    assert plan_keys("cache.eval")[0].name == "cache.eval.corpus"
    assert [key.name for key in plan_keys("cache.context")] == ["cache.context"]
    with pytest.raises(PlanError, match=r"no key or table 'cache.contxt'; did you mean cache\.context"):
        plan_keys("cache.contxt")
    with pytest.raises(PlanError, match="`hsae plan keys` lists all"):
        plan_keys("zzz")


@pytest.mark.parametrize("name", packaged_plans())
def test_every_key_of_a_packaged_plan_is_in_it(name):
    from hsae.train.config.plan import planned_tables

    def named(table, prefix):
        for key, value in table.items():
            if isinstance(value, dict) and f"{prefix}{key}" not in KEYS:
                yield from named(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    plan, tables = planned_tables(name)
    tables.pop("name")
    runs, train = tables.pop("runs"), tables.pop("train")
    own = {name for run in runs.values() for name in named(run, "runs.N.")} | set(named(tables, ""))
    assert own <= KEYS.keys()
    assert all(f"train.{key}" in KEYS or f"runs.N.{key}" in KEYS or isinstance(train[key], dict) for key in train)
    assert plan == load_plan(name)
