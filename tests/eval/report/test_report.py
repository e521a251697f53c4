"""The report from real tiny runs: complete, self-contained, escaped, the same bytes twice."""

import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import torch
from places import GOLDEN

from hsae.cache.building.build import build
from hsae.cache.errors import UserError
from hsae.cache.language_model.lm import load_tokenizer
from hsae.cache.reading.store import ActivationStore
from hsae.eval import contexts, figures
from hsae.eval.core.core_evaluation import Core
from hsae.eval.core.core_result import read_core
from hsae.eval.harness.evaluation import evaluate_targets
from hsae.eval.harness.listener import Listener
from hsae.eval.harness.result_files import write_result
from hsae.eval.harness.targets import RunTarget, run_targets
from hsae.eval.hierarchy import maps
from hsae.eval.hierarchy.composition_evaluation import Composition, Sources
from hsae.eval.hierarchy.composition_file import read_composition
from hsae.eval.report import tables
from hsae.eval.report.page import Report, write_report
from hsae.eval.report.run_section import Material
from hsae.train.config.plan import load_plan
from hsae.train.model.model_files import load_model
from hsae.train.run_record import write_run
from hsae.train.runs.planned_runs import train_runs

USER_BASELINE = GOLDEN / "user_baseline_core.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs 0, 1 and 3 of the tiny plan, trained and evaluated; text with markup in it."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / "corpus.jsonl"
    lines = [
        f"<script>alert(1)</script> & <b>bold</b> words of a document, number {n}: {'tokens and rows ' * 40}"
        for n in range(90)
    ]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    places = [
        f"model.id={str(GOLDEN / 'model')!r}",
        f"cache.dir={str(folder / 'activations')!r}",
        f"train.dir={str(folder / 'runs')!r}",
    ]
    places += [f"cache.{split}.corpus={str(text)!r}" for split in ("train", "eval")]
    plan = load_plan("tiny", [*places, "cache.eval.last_document=30", "cache.train.first_document=30"])
    build([plan.store("eval"), plan.store("train")], plan.cache.dir)
    runs = plan.select("0,1,3")
    train_runs(plan, runs, device="cpu")
    store = ActivationStore.of(plan.store("eval"), plan.cache.dir)
    targets = [target for run in runs for target in run_targets(plan, run)]
    evaluate_targets(Core(store), targets)
    return plan, [plan.run_dir(run) for run in runs], store, load_tokenizer(plan.model)


def written(made, out, **changes):
    _, run_dirs, store, tokenizer = made
    compare = changes.pop("compare", [USER_BASELINE])
    material = Material(**{"specs": {}, "store": store, "tokenizer": tokenizer} | changes)
    Report(run_dirs, material, compare=compare).write(out)
    return (out / "index.html").read_text(), (out / "report.md").read_text()


class Warnings(Listener):
    def __init__(self, texts):
        self.texts = texts

    def warn(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def report(made, tmp_path_factory):
    """(the folder of the report of these runs and the user's result, its page, its Markdown)."""
    folder = tmp_path_factory.mktemp("written")
    return folder, *written(made, folder)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_self_contained_and_says_what_there_is(made, report):
    plan, (folder, html, markdown) = made[0], report
    page = Page(html)
    text = " ".join(" ".join(page.words).split())
    for words in (
        "0 baseline",
        "1 stacked · level 2",
        "3 full · level 1",
        "What each level is worth",
        "Hierarchical sparse autoencoders on",
        plan.store("train").name,
        "Composition",
        "participation ratio",
        "Stages, in tokens:",
        "level 2 alone",
    ):
        assert words in text, words
    assert not [
        value
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:"))
    ]
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert set(re.findall(r"https?://[^\s\"'<)]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in html and "default-src 'none'" in html
    assert not re.findall(r"url\((?!#)", html)
    identifiers = [value for name, value in page.attributes if name == "id" and value.startswith("run")]
    assert identifiers == ["run0", "run1", "run3"]
    assert html.count("<svg") == 1 + 3 + 2 * 2  # comparison, three runs' curves, two maps and their trees
    assert len(html) < 5_000_000
    assert markdown.count("\n|") == 2 + 6 + 2 + 6 + 1  # the user's result is in SAEBench's table only
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_corpus_text_is_shown_and_never_becomes_markup(report):
    _, html, _ = report
    assert "<script" not in html
    contexts_shown = re.findall(r'<div class="text">(.*?)</div>', html, re.DOTALL)
    assert len(contexts_shown) > 20
    assert any("&lt;" in context for context in contexts_shown)
    for context in contexts_shown:
        assert set(Page(context).tags) <= {"b"}


def test_names_and_warnings_are_data_too(made, tmp_path, undrawn):
    """Run names, stage names, warnings and release names may hold markup and TeX; none of it is interpreted."""
    hostile = "<script>alert(1)</script> $x_{$ | `a`"
    copy = tmp_path / "runs/3"
    shutil.copytree(made[1][2], copy)
    info = json.loads((copy / "run.json").read_text())
    write_run(copy, {**info, "name": hostile, "model": hostile, "hardware": hostile})
    log = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    log = [{**line, "stage": hostile} if line["kind"] == "stage" else line for line in log]
    log.append({"kind": "warning", "step": 1, "message": hostile})
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(USER_BASELINE.read_text()), "sae_lens_release_id": hostile}))
    path = Report([copy], compare=[other]).write(tmp_path / "out")
    html, markdown = path.read_text(), path.with_name("report.md").read_text()
    page = Page(html)
    assert "<script" not in html and "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert f"During training, step 1: {hostile}" in " ".join(page.words)
    assert "<script" not in markdown.replace("\\<", "")
    table = [line for line in markdown.partition("## SAEBench")[2].splitlines() if line.startswith("|")]
    assert len(table) > 2 and len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_the_same_inputs_give_the_same_bytes_whatever_matplotlibs_settings(made, report, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "lines.linewidth": 7, "svg.fonttype": "path"}):
        own = dict(matplotlib.rcParams)
        written(made, tmp_path)
        assert dict(matplotlib.rcParams) == own
    for name in ("index.html", "report.md", "summary.png"):
        assert (tmp_path / name).read_bytes() == (report[0] / name).read_bytes()


def test_a_dead_sae_of_saebenchs_is_a_row_that_says_so(report):
    _, html, markdown = report
    text = " ".join(" ".join(Page(html).words).split())
    assert "google/gemma-2-2b_layer_19_sae dead" in text
    for words in (
        "The SAE is dead: no latent fired on any token",
        "Scores are negative because",
        "Legacy SAEBench layout",
    ):
        assert words in text and words in markdown
    (row,) = [line for line in markdown.splitlines() if line.startswith("| google/gemma-2-2b_layer_19_sae (dead)")]
    assert "-0.5855" in row and "-0.528" in row and "2304" in row


def test_the_numbers_are_those_of_the_result_files(made, report):
    _, _, markdown = report
    result = json.loads(next(made[1][0].glob("eval/core/*.json")).read_text())
    measure = result["hsae"]["measures"]["explained_variance"]
    assert f"{measure['value']:.3f} ({measure['low']:.3f} – {measure['high']:.3f})" in markdown


def test_hierarchy_measures_stand_beside_their_nulls(made, tmp_path, undrawn, monkeypatch):
    """Run 3 measured: tables, failures, fitted maps; a result of another model is left out and named."""
    monkeypatch.setattr("hsae.eval.harness.estimates.RESAMPLES", 20)
    monkeypatch.setattr("hsae.eval.hierarchy.probes.STEPS", 3)
    plan, run_dirs, *_ = made
    copied = load_plan("tiny", [f"cache.dir={plan.cache.dir!r}", f"train.dir={str(tmp_path / 'runs')!r}"])
    copied = dataclasses.replace(plan, train=copied.train)
    shutil.copytree(run_dirs[2], tmp_path / "runs/3")
    (item,) = evaluate_targets(Composition(Sources.of(plan)), [RunTarget.of(copied, plan.runs[3])])
    content = json.loads(item.path.read_text())
    content["failures"] = [{"name": "copy", "level": 2, "text": "copy: <b>half</b> of level 2"}]
    write_result(item.path, content)
    path = Report([tmp_path / "runs/3"]).write(tmp_path / "out")
    html, markdown = path.read_text(), path.with_name("report.md").read_text()
    text = " ".join(" ".join(Page(html).words).split())
    for words in ("Level 2 of level 1, learned map", "Level 2 of level 1, fitted map", "coverage lift", "or agreement",
                  "copy: <b>half</b> of level 2", "Failures not looked for: coarse-hurts-fine"):  # fmt: skip
        assert words in text, words
    assert html.count("<svg") == 1 + 1 + 2 * 2
    coverage = read_composition(tmp_path / "runs/3").result.pairs[0].readings["fitted"].measures["coverage"]
    assert f">{coverage.value:.3g}<" in html and f"{coverage.nulls['random'].z:+.1f}" in html
    assert "| 3 full · level 2 | fitted |" in markdown and "**3 full**: copy: \\<b>half\\<" in markdown
    assert f"{coverage.value:.3g} ({coverage.nulls['permuted'].z:+.1f}, {coverage.nulls['random'].z:+.1f})" in markdown
    write_result(item.path, {key: value for key, value in content.items() if key != "failures"})
    page = Report([tmp_path / "runs/3"]).write(tmp_path / "out").read_text()
    assert "failures have not been looked for; run" in page and "coverage lift" in page
    content["inputs"]["sae"] = "0" * 64
    write_result(item.path, content)
    page = Report([tmp_path / "runs/3"]).write(tmp_path / "out").read_text()
    assert "composition.json is of another model than the one here" in page and "fitted map" not in page


def test_missing_pieces_are_said(made, tmp_path, undrawn):
    copy = tmp_path / "runs/3"
    shutil.copytree(made[1][2], copy)
    shutil.rmtree(copy / "eval")
    shutil.rmtree(copy / "model")
    path = Report([copy, tmp_path / "runs/4"]).write(tmp_path / "out")
    text = " ".join(Page(path.read_text()).words)
    for words in (
        "No run has been evaluated yet",
        "train the run with: hsae train --run 3",
        "no core evaluation yet; run `hsae eval core`",
        "Not trained yet: 4.",
        "not evaluated",
    ):
        assert words in text
    assert not (tmp_path / "out/summary.png").exists()
    (copy / "metrics.jsonl").unlink()
    assert "no training metrics" in Report([copy]).write(tmp_path / "out").read_text()
    html, _ = written(made, tmp_path / "more", store=None, tokenizer=None)
    assert "no contexts: the evaluation store or the tokenizer is not there" in html
    with pytest.raises(UserError, match="there is nothing to report: no run has been trained yet"):
        Report([tmp_path / "nothing"]).write(tmp_path / "none")


def test_a_plans_report_opens_its_store_and_refuses_runs_that_are_not_trained(made, tmp_path, undrawn):
    plan, said = made[0], []
    path = write_report(plan, plan.select("0,3"), tmp_path / "out", listener=Warnings(said))
    text = " ".join(Page(path.read_text()).words)
    assert "3 full" in text and "1 stacked" not in text and not [line for line in said if "no contexts" in line]
    with pytest.raises(
        UserError, match=r"run 4 \S+ of plan tiny has not been trained in .*; train it with: hsae train"
    ):
        write_report(plan, plan.select("3,4"), tmp_path / "none")
    write_report(plan, out=tmp_path / "all")
    assert "Not trained yet: 2, 4" in (tmp_path / "all/index.html").read_text()


def test_a_run_whose_run_json_is_damaged_is_named_and_the_others_are_shown(made, tmp_path, undrawn):
    """FIX C3."""
    for number in (3, 4):
        shutil.copytree(made[1][2], tmp_path / f"runs/{number}")
    (tmp_path / "runs/4/run.json").write_text("{")
    said = []
    path = Report([tmp_path / "runs/3", tmp_path / "runs/4"], listener=Warnings(said)).write(tmp_path / "out")
    assert any("runs/4/run.json is damaged" in text for text in said)
    text = " ".join(Page(path.read_text()).words)
    assert "runs/4/run.json is damaged" in text and "3 full" in text and "Not trained yet" not in text
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        Report([tmp_path / "runs/4"]).write(tmp_path / "none")


def test_a_damaged_result_is_said_and_the_others_are_shown(made, tmp_path, undrawn):
    copy = tmp_path / "runs/3"
    shutil.copytree(made[1][2], copy)
    victim, said = sorted((copy / "eval/core").glob("*.json"))[0], []
    text = victim.read_text()
    victim.write_text(re.sub(r'("l0": \d*)(\d)', lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", text, count=1))
    path = Report([copy], listener=Warnings(said)).write(tmp_path / "out")
    wrong = f"{victim} is damaged (it fails its checksum); make it again with: hsae eval core --run 3"
    assert victim.read_text() != text and wrong in " ".join(Page(path.read_text()).words)
    assert f"run 3 full: {wrong}" in said
    victim.write_text("{")
    path = Report([copy]).write(tmp_path / "out")
    assert f"{victim} is not JSON" in " ".join(Page(path.read_text()).words)
    assert path.with_name("report.md").read_text().count("\n|") == 2 + 2


def test_a_report_of_foreign_results_alone(tmp_path, undrawn):
    path = Report([], compare=[USER_BASELINE, USER_BASELINE]).write(tmp_path)
    markdown = path.with_name("report.md").read_text()
    assert markdown.count(f"| google/gemma-2-2b_layer_19_sae ({USER_BASELINE.name}) (dead) | 2304 |") == 2


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_before_any_work(made, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=re.escape(f"the report: this needs the package {package}; run: pip install 'hsae[report]'")
    ):
        written(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def measured(name, value, low, high, store="a"):
    block = {"store": store, "measures": {"explained_variance": {"value": value, "low": low, "high": high}}}
    result = dataclasses.replace(read_core(USER_BASELINE), hsae=block)
    return tables.Row(run=name, view="sae", latents=7, result=result, notes=[])


def test_best_is_marked_only_where_the_intervals_support_it():
    def best(*rows):
        return [row.run for row, cells in tables.results(rows) if cells[0].best]

    assert best(measured("a", 0.8, 0.78, 0.82), measured("b", 0.7, 0.68, 0.72)) == ["a"]
    assert best(measured("a", 0.8, 0.70, 0.90), measured("b", 0.7, 0.68, 0.72)) == []
    assert best(measured("a", 0.8, 0.78, 0.82)) == []
    assert best(measured("a", 0.8, 0.78, 0.82), measured("b", 0.7, 0.68, 0.72, store="b")) == []


def test_the_value_of_a_level_is_what_it_adds_to_those_above():
    rows = [
        dataclasses.replace(measured("a", value, value - 0.01, value + 0.01), view=view)
        for view, value in (("sae", 0.9), ("level1", 0.2), ("level2", 0.3), ("level3", 0.5))
    ]
    log = [{"kind": "metrics", "level_explained_variance": [0.8, 0.7, None]}]
    lines = tables.levels(rows, "additive", [11, 5, 3], log)
    assert [(line.level, line.latents) for line in lines] == [(3, 3), (2, 5), (1, 11)]
    assert [line.cells[2].text for line in lines] == ["0.500", "not evaluated", "0.900"]
    assert [line.cells[4].text for line in lines] == ["not recorded", "0.700", "0.800"]
    stacked = tables.levels(rows[1:], "stacked", [11, 5, 3], log)
    assert [line.cells[2].text for line in stacked] == ["0.500", "0.300", "0.200"]


def naive_peaks(acts_RTF, tokens_RT, bos_id, latent):
    """The highest activation in each document, by walking over every token."""
    best, document = {}, 0
    for row in range(len(tokens_RT)):
        for place, token in enumerate(tokens_RT[row].tolist()):
            document += place > 0 and token == bos_id
            best[document] = max(best.get(document, 0.0), float(acts_RTF[row, place, latent]))
    return sorted((value for value in best.values() if value > 0), reverse=True)


@pytest.mark.parametrize("elements", [1, 1 << 24])
def test_the_survey_finds_the_peaks_of_each_document(made, monkeypatch, elements):
    """Against a walk over every token, in batches of one row and in one batch."""
    monkeypatch.setattr(contexts, "BATCH_ELEMENTS", elements)
    plan, run_dirs, store, _ = made
    view, hook = load_model(run_dirs[2] / "model").views()["level2"], plan.hook.names[0]
    tokens = store.tokens(0, store.rows)
    kept = ~store.special_mask(tokens)
    acts = view.encode(store.acts(hook, 0, store.rows).float()) * kept[..., None]
    seen = contexts.survey(view, store, hook)
    torch.testing.assert_close(seen.density_F, (acts > 0).sum((0, 1)).double() / kept.sum())
    torch.testing.assert_close(seen.mass_F, acts.sum((0, 1)).double() / kept.sum())
    for latent in range(view.d_sae):
        wanted = naive_peaks(acts, tokens, store.header.bos_id, latent)[: contexts.PEAKS_KEPT]
        found = seen.peaks_PF[: len(wanted), latent]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), rtol=1e-5, atol=1e-5)
        assert not seen.peaks_PF[len(wanted) :, latent].any()
        for value, place in zip(found.tolist(), seen.places_PF[:, latent].tolist(), strict=False):
            assert float(acts[*divmod(place, store.context), latent]) == pytest.approx(value, rel=1e-5)


def test_top_contexts_are_cut_at_documents_and_shown_once(made):
    plan, run_dirs, store, tokenizer = made
    view, hook = load_model(run_dirs[2] / "model").views()["level2"], plan.hook.names[0]
    seen = contexts.survey(view, store, hook)
    latents = contexts.heaviest(seen, 3, common=1.0)
    assert latents == seen.mass_F.topk(3).indices.tolist()
    found = contexts.find_contexts(view, store, hook, tokenizer, seen, latents, 4)
    special = set(contexts.token_texts(tokenizer, store.header.special_ids))
    for latent in latents:
        values = [context.activation for context in found[latent]]
        assert (
            values
            and values == sorted(values, reverse=True)
            and values[0] == pytest.approx(float(seen.peaks_PF[0, latent]))
        )
        texts = ["".join(piece.text for piece in context.pieces) for context in found[latent]]
        assert len(set(texts)) == len(texts) <= 4
        assert all(max(piece.strength for piece in context.pieces) == 1 for context in found[latent])
        assert not special & {piece.text for context in found[latent] for piece in context.pieces}


def test_documents_of_rows():
    bos, rows = 2, torch.tensor([[2, 5, 6, 2, 7], [2, 8, 9, 9, 9], [2, 9, 2, 5, 2]])
    assert contexts.documents(rows, bos) == [(0, 3, True), (3, 12, False), (12, 14, False), (14, 15, False)]
    assert contexts.documents(torch.tensor([[5, 6, 7], [8, 9, 9]]), bos) == [(0, 3, False), (3, 6, False)]


def test_common_latents_come_last():
    seen = contexts.Survey(
        density_F=torch.tensor([0.5, 0.01, 0.0, 0.02]), mass_F=torch.tensor([9.0, 1.0, 0.0, 2.0]),
        peaks_PF=torch.zeros(1, 4), places_PF=torch.zeros(1, 4, dtype=torch.long), rows=1,
    )  # fmt: skip
    assert contexts.heaviest(seen, 4, common=0.05) == [3, 1, 0]


def test_tokens_are_readable_on_one_line(made):
    class Pieces:
        def convert_ids_to_tokens(self, ids):
            return [["▁the", "a\nb", "▁▁▁▁", "\u202e", "\x00", "▁"][index] for index in ids]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    assert contexts.token_texts(Pieces(), range(6)) == [" the", "a↵b", "␣×4", "\\u202e", "\\u0000", " "]


def test_participation_ratio_and_its_null():
    rows = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    torch.testing.assert_close(maps.participation_ratio(rows), torch.tensor([1.0, 2, 4, 0]))
    null = figures.reference(rows)
    assert torch.equal((null > 0).sum(1), (rows > 0).sum(1)) and not torch.equal(null, rows)


def test_results_of_another_model_than_the_one_present_are_left_out_and_named(made, tmp_path, undrawn):
    _plan, run_dirs, *_ = made
    copy = tmp_path / "runs/3"
    shutil.copytree(run_dirs[2], copy)
    shutil.copytree(run_dirs[1] / "model", copy / "model", dirs_exist_ok=True)
    path = Report([copy]).write(tmp_path / "out")
    text = " ".join(Page(path.read_text()).words)
    assert "is of another model than the one here; run `hsae eval core --force`" in text


# ---- one table, one store, one kind of number (FIX A7) ---------------------------------------------------------------


def changed(path, **inputs):
    content = json.loads(path.read_text())
    content["hsae"]["inputs"] |= inputs
    del content["hsae"]["checksum"]  # as older results have none
    return content


def test_results_of_other_settings_stores_and_texts_are_left_out_and_named(made, tmp_path, undrawn):
    _, run_dirs, store, _ = made
    copies = [shutil.copytree(run_dir, tmp_path / run_dir.name) for run_dir in run_dirs[:2]]
    (whole,) = copies[0].glob("eval/core/*.json")
    standard = (
        Report(copies, Material(specs={"eval": store.spec})).write(tmp_path / "out").with_name("report.md").read_text()
    )
    every = whole.with_name(whole.name.replace("_eval", "_all-tokens_eval"))
    every.write_text(json.dumps(changed(whole, exclude_special_tokens=False)))
    said = (
        Report(copies, Material(specs={"eval": store.spec})).write(tmp_path / "out").with_name("report.md").read_text()
    )
    assert f"**0 baseline**: {every.name} is of other settings (--all-tokens); left out" in said.replace("\\", "")
    assert [line for line in said.splitlines() if line.startswith("|")] == [
        line for line in standard.splitlines() if line.startswith("|")
    ]
    compact = store.spec.model_copy(update={"codec": "compact"})
    for inputs, words in (
        ({"store": "0" * 16}, f"is of another store ({'0' * 16}) than the plan's evaluation store {store.spec.name}"),
        ({"corpus": "0" * 64}, f"is of another state of {store.spec.name}, with other text"),
        ({"store": compact.fingerprint}, None),
    ):
        original = whole.read_text()
        whole.write_text(json.dumps(changed(whole, **inputs)))
        path = Report(copies, Material(specs={}, store=store)).write(tmp_path / "out")
        said = path.with_name("report.md").read_text()
        assert ("| 0 baseline |" in said) is (words is None) and "| 1 stacked" in said
        if words is not None:
            assert words in said and words in " ".join(Page(path.read_text()).words)
        whole.write_text(original)


def test_saebenchs_explained_variance_never_stands_in_the_column_of_the_corrected_one(made, tmp_path, undrawn):
    """A result of SAEBench 0.6.0 has an explained variance too, of another meaning; so have the runs' own files."""
    current = GOLDEN / "core" if (GOLDEN / "core").is_dir() else GOLDEN
    files = [path for path in sorted(current.rglob("*.json")) if b'"explained_variance_legacy"' in path.read_bytes()]
    foreign = tmp_path / "foreign.json"
    content = json.loads(files[0].read_text())
    content.pop("hsae", None)
    foreign.write_text(json.dumps({**content, "sae_lens_release_id": "foreign"}))
    _, markdown = written(made, tmp_path / "out", compare=[foreign])
    first, _, second = markdown.partition("## SAEBench's own numbers")
    assert "| foreign" not in first.partition("\n- **")[0] and "| 3 full |" in first
    assert "| foreign" in second and "| 3 full |" in second and "is not the explained variance above" in second
    assert "Made otherwise than the rows of this plan" in second
