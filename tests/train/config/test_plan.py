import re

import pytest

from hsae import registry
from hsae.cache import device
from hsae.cache.config import Config, CorpusConfig
from hsae.cache.errors import StoreError
from hsae.cache.format.spec import spec_of
from hsae.eval.core.current import interchangeable
from hsae.eval.unlearning.config import UnlearningConfig
from hsae.train.config.plan import PlanError, load_plan, packaged_plans
from hsae.train.runs.run_directory import identities


def test_packaged_plans_load_and_are_matched():
    assert packaged_plans() == ["gemma-2-2b", "gemma-2-2b-16k", "gemma-3-270m", "study", "tiny"]
    for name in packaged_plans():
        plan = load_plan(name)
        assert list(plan.runs) == list(range(17))
        assert len({sum(run.widths) for run in plan.runs.values()}) == 1
        assert len({sum(run.l0) for run in plan.runs.values()}) == 1


def test_default_plan_is_saebenchs_setting():
    plan = load_plan("gemma-2-2b")
    store = plan.store("eval")
    assert (plan.model.id, plan.model.dtype, plan.hook.names) == (
        "google/gemma-2-2b",
        "bfloat16",
        ("blocks.19.hook_resid_post",),
    )
    assert (store.clean_rows, store.rows, store.context, store.batch_rows) == (3200, 35200, 128, 16)
    assert {sum(run.widths) for run in plan.runs.values()} == {2304}
    assert {sum(run.widths) for run in load_plan("gemma-2-2b-16k").runs.values()} == {16384}


def test_default_plan_is_used_without_a_local_one_and_a_local_one_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_plan().name == "gemma-2-2b"
    (tmp_path / "hsae.toml").write_text('extends = "gemma-3-270m"\nname = "mine"\n[cache.train]\nrows = 77\n')
    assert (load_plan().name, load_plan().cache.train.rows) == ("mine", 77)
    assert load_plan("tiny").name == "tiny"


def test_overrides_are_toml_values_or_bare_words():
    plan = load_plan(
        "tiny", ["cache.train.rows=31", "model.id=some/folder", 'runs.3.name="other"', "train.learning_rate=1e-3"]
    )
    assert plan.cache.train.rows == 31
    assert plan.model.id == "some/folder"
    assert plan.runs[3].name == "other"
    assert {run.rate for run in plan.runs.values()} == {1e-3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.speed=3", "[train] has no key 'speed'; allowed: activation,"),
        ("cache.train.rows=0", "cache.train.rows: Input should be greater than or equal to 1 (given: 0)"),
        ("cache.context=many", "cache.context: Input should be a valid integer (given: 'many')"),
        ("model.kind=x", "unknown key model.kind; allowed: attention, dtype, id, revision"),
        ("hook.names=['blocks.1.mlp']", "hook.names: 'blocks.1.mlp' is not a hook hsae knows"),
        ("runs.3.widths=[31,57]", "runs.3: widths [31, 57] must fall strictly"),
        ("runs.3.l0=[6,31]", "runs.3: level 2: l0 31 must be below its width 31"),
        ("runs.3.widths=[58,31]", "runs differ in total width (run 0: 88, run 1: 88, run 2: 88, run 3: 89,"),
        ("runs.3.l0=[6,4]", "runs differ in total L0"),
        ("runs.3.tokens=5", "[runs.3] sets 'tokens', which all runs share; set it in [train]"),
        ("runs.x.name=a", "[runs.x]: runs are tables with a number"),
        ("runs.3.name=stacked", "two runs have one name: 'stacked'"),
        ("runs.0.composition.mode=normalised", "runs.0: composition needs two levels or more"),
        ("runs.3.activation=gated", "runs.3: activation 'gated' is for flat runs"),
        ("runs.1.selection=joint", "runs.1: selection 'joint' needs structure 'additive' and activation 'batchtopk'"),
        ("runs.1.child_gate=true", "runs.1: child_gate needs structure 'additive', a composition mode"),
        ("runs.5.child_gate=true", "runs.5: child_gate needs structure 'additive', a composition mode"),
        ("rows=3", "--set 'rows=3': write it as table.key=value"),
        ("cache.train.rows", "--set 'cache.train.rows': write it as table.key=value"),
        ("cache.context.x=1", "--set 'cache.context.x=1': 'context' is a value, not a table"),
        ("runs.3.curriculum=[{name='a',until=0.5,levels=[1,2]}]", "`until` must rise and the last must be 1.0"),
        ("runs.3.curriculum=[{name='a',until=1.0,levels=[3]}]", "names level(s) [3]; this run has 1 to 2"),
        ("runs.3.curriculum=[{name='a',until=1.0,levels=[1,1,2]}]", "names a level twice"),
        ("runs.3.curriculum=[{name='a',until=1.0,levels=[1,2],rates={1=0,2=0}}]", "no level learns: every rate is 0"),
        ("runs.3.curriculum=[{name='a',until=1.0,levels=[1]}]", "the last curriculum stage must train all 2 levels"),
        # FIX B: tables set to a value, values to a table, numbers and depth beyond reason
        ("suite=x", "suite is a table, not a value (given: 'x')"),
        ("autointerp=x", "autointerp is a table, not a value (given: 'x')"),
        ("runs=x", "runs is a table, not a value (given: 'x')"),
        ("model=3", "model is a table, not a value (given: 3)"),
        ("model.id.x=3", "'id' is a value, not a table"),
        ("train.dir.x=1", "train.dir: Input should be a valid string (given: {'x': 1})"),
        ("train.tokens=1\nname='q'", "train.tokens: Input should be a valid integer"),
        ("train.seed=" + "9" * 30, f"train.seed: whole numbers go to {2**62}"),
        ("train.seed=" + "9" * 5000, "(5,002 characters)"),
        ("train.seed=" + "[" * 5000, "(5,002 characters)"),
        ('train.dir="a\\u0000b"', "train.dir: text can't hold a NUL character"),
        ("train.dir='~no-such-user/runs'", "train.dir: there is no user whose folder is ~no-such-user/runs"),
        ("name=''", "name must be a line of 1 to 100 characters"),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_is_allowed(override, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        load_plan("tiny", [override])


def test_unreadable_plans_are_named(tmp_path):
    with pytest.raises(PlanError, match=r"no plan 'nowhere\.toml': neither a file nor one of gemma-2-2b"):
        load_plan("nowhere.toml")
    path = tmp_path / "plan.toml"
    for text, message in [
        ("x = ", "is not valid TOML"),
        ("[modle]", "unknown table 'modle'; allowed: autointerp, cache, extends"),
        (f"extends = '{path}'", "plans extend each other in a circle"),
        ("name = 'a'", r"table \[model\] is missing"),
    ]:
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            load_plan(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('extends = "tiny"\nname = "é"'.encode("latin-1"), "it is not UTF-8 (invalid continuation byte at byte 25)"),
        ('extends = "tiny"'.encode("utf-16"), "it is not UTF-8"),
        (b"x = " + b"[" * 100_000, "it is nested too deeply"),
        (b"[train]\nseed = " + b"9" * 5000, "is not valid TOML"),
        (b'extends = "tiny"\nsuite = 3', "suite is a table, not a value (given: 3)"),
        (b'extends = "tiny"\nruns = [1]', "runs is a table, not a value (given: [1])"),
        (b'extends = "tiny"\nname = ["a"]', "name must be a line of 1 to 100 characters"),
        (b'extends = "tiny"\n[runs.03]\nname = "x"', "[runs.03]: runs are tables with a number"),
        (b'extends = ["tiny"]', "it must name a packaged plan or a file"),
    ],
    ids=range(9),
)
def test_odd_plan_files_end_in_one_line(tmp_path, data, message):
    """FIX B: other encodings, deep TOML, huge numbers, tables that are none."""
    path = tmp_path / "plan.toml"
    path.write_bytes(data)
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        load_plan(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_odd_plan_paths_end_in_one_line(tmp_path):
    """FIX B: a folder, a name that no file can have, a circle of two; and a byte order mark, which is no mistake."""
    (tmp_path / "one.toml").write_text(f"extends = '{tmp_path}/two.toml'")
    (tmp_path / "two.toml").write_text(f"extends = '{tmp_path}/one.toml'")
    for plan, message in [
        (tmp_path, "is a folder; name a TOML file in it"),
        ("", "is a folder"),
        ("a" * 5000, "can't be read: File name too long"),
        (tmp_path / "one.toml" / "x", "no plan"),
        (tmp_path / "one.toml", "plans extend each other in a circle"),
    ]:
        with pytest.raises(PlanError, match=message):
            load_plan(str(plan))
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b'\xef\xbb\xbfextends = "tiny"')
    assert load_plan(str(marked)).source == str(marked)


def test_ranges_are_not_cut_to_the_runs_there_are():
    """FIX B: `--run 0-20` of a plan with fewer."""
    plan = load_plan("tiny")
    last = max(plan.runs)
    for text, missing in [
        (f"0-{last + 3}", f"no run '{last + 1}-{last + 3}' (--run 0-{last + 3})"),
        (f"{last}-{last + 1}", f"no run '{last + 1}' (--run"),
        ("3-1", "no run '3-1' in"),
        ("0-999999999999", "no run '0-999999999999' in"),
        ("", "no run '' in"),
        ("٣", "no run '٣' in"),
        ("9" * 5000, "no run '9999"),
    ]:
        with pytest.raises(PlanError, match=re.escape(missing)):
            plan.select(text)


def test_select_by_number_name_range_and_list():
    plan = load_plan("tiny")
    assert [run.number for run in plan.select("3")] == [3]
    assert [run.number for run in plan.select("0-2, full")] == [0, 1, 2, 3]
    assert [run.number for run in plan.select("no-curriculum")] == [4]
    with pytest.raises(
        PlanError, match=re.escape("no run '99' in plan tiny (packaged plan tiny); it has 0 (baseline), 1 (stacked)")
    ):
        plan.select("99")


def test_fingerprint_changes_with_everything_that_determines_the_content():
    names = {
        load_plan("tiny", [change] if change else []).store("train").name
        for change in (
            "",
            "cache.train.rows=121",
            "cache.context=41",
            "model.dtype=bfloat16",
            "cache.batch_rows=7",
            "cache.train.first_document=81",
            "cache.prepend_bos=false",
            "cache.codec=compact",
            "model.revision=abc",
        )
    }
    assert len(names) == 9
    assert load_plan("tiny", ["train.tokens=10_000"]).store("train").name in names


def test_the_codec_is_mappable_in_a_folder_and_compact_at_a_url_unless_one_is_named():
    for changes, wanted in (
        ([], "mappable"),
        (["cache.dir=file:///a/b"], "mappable"),
        (["cache.dir=memory://bucket/a"], "compact"),
        (["cache.dir=memory://bucket/a", "cache.codec=mappable"], "mappable"),
        (["cache.codec=int8"], "int8"),
    ):
        plan = load_plan("tiny", changes)
        assert {plan.store(split).codec for split in ("train", "eval", "forget")} == {wanted}


def test_seeds_train_beside_each_other():
    plan = load_plan("tiny", ["train.seed=5", "train.dir=here"])
    assert plan.seeded(0) is plan
    other = plan.seeded(2)
    assert (other.train.seed, other.run_dir(other.runs[3]).as_posix()) == (7, "here/seed2/3")
    assert other.store("train").name == plan.store("train").name and other.runs == plan.runs


def test_with_codec_auto_a_store_in_the_other_codec_will_do(tmp_path):
    plan = load_plan("tiny", [f'cache.dir="{tmp_path}"'])
    mappable = plan.store("train")
    compact = mappable.model_copy(update={"codec": "compact"})
    assert mappable.codec == "mappable"
    (tmp_path / compact.name).mkdir()
    assert plan.store("train") == compact and plan.store_path("train") == tmp_path / compact.name
    assert load_plan("tiny", [f'cache.dir="{tmp_path}"', "cache.codec=mappable"]).store("train") == mappable
    (tmp_path / mappable.name).mkdir()
    assert plan.store("train") == mappable and plan.store("eval").codec == "mappable"


def test_a_store_made_with_other_passes_will_do_where_the_plan_leaves_them_open(tmp_path, monkeypatch):
    sets = [f'cache.dir="{tmp_path}"']
    plan = load_plan("tiny", sets)
    plain = plan.store("train", "cpu")
    assert (plain.forward_rows, plain.compiled) == (None, False)
    monkeypatch.setattr(device, "can_compile", lambda name: name.startswith("cuda"))
    fast = plan.store("train", "cuda")
    assert (fast.forward_rows, fast.compiled, fast.codec) == (
        204,
        True,
        "mappable",
    )  # 34 batches of 6 rows of 40 tokens
    assert fast.name != plain.name and fast.plain == plain
    assert load_plan("tiny", [*sets, "cache.forward_rows=6"]).store("train", "cpu") == plain
    (tmp_path / fast.model_copy(update={"codec": "compact"}).name).mkdir()
    assert plan.store("train", "cpu") == plan.store("train", "cuda") != fast  # made on a GPU and recoded, used here
    eager = fast.model_copy(update={"compiled": False})
    (tmp_path / eager.name).mkdir()
    with pytest.raises(StoreError, match=r"has several train stores of the plan.* --set cache.forward_rows=ROWS"):
        plan.store("train", "cpu")
    named = load_plan("tiny", [*sets, "cache.compile=false"])
    assert named.store("train", "cpu") == eager
    (tmp_path / plain.name).mkdir()
    assert plan.store("train", "cpu") == plain and plan.store("train", "cuda").compiled
    own = load_plan("tiny", [*sets, "cache.forward_rows=12", "cache.compile=true"]).store("train", "cpu")
    assert (own.forward_rows, own.compiled) == (12, True) and own.plain.forward_rows == 12


def test_runs_and_results_are_known_wherever_their_store_was_made():
    plan, named = load_plan("tiny"), load_plan("tiny", ["cache.forward_rows=204", "cache.compile=true"])
    assert identities(plan, plan.runs[0]) == identities(named, named.runs[0])
    assert named.store("train").fingerprint in interchangeable(plan.requested("train"))


class ToyConfig(Config):
    """The table of an evaluation that only this file knows."""

    rows: int = 3

    def spec(self, split, model, hook, cache):
        return spec_of(split, model, hook.names, CorpusConfig(corpus="python-mix"), cache, rows=self.rows, clean_rows=0)


def test_an_evaluations_table_is_one_line_of_the_registry(monkeypatch):
    toy = registry.Table(f"{__name__}:ToyConfig", splits=("autointerp",))
    with pytest.raises(PlanError, match=r"write it as table\.key=value.*tables: autointerp, cache, "):
        load_plan("tiny", ["toy.rows=5"])
    monkeypatch.setitem(registry.TABLES, "toy", toy)
    monkeypatch.delitem(registry.TABLES, "autointerp")
    assert load_plan("tiny").table(ToyConfig) == ToyConfig()
    plan = load_plan("tiny", ["toy.rows=5"])
    assert (plan.table(ToyConfig).rows, plan.store("autointerp").rows) == (5, 5)
    assert plan.table(UnlearningConfig) == UnlearningConfig()
    for mistake, message in [
        ("toy.rows=x", "toy.rows: Input should be a valid integer (given: 'x')"),
        ("toy.row=1", "unknown key toy.row; allowed: rows"),
        ("toy=1", "toy is a table, not a value (given: 1)"),
    ]:
        with pytest.raises(PlanError, match=re.escape(message)):
            load_plan("tiny", [mistake])
