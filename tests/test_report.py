"""The report from real tiny runs: complete, self-contained, escaped, the same bytes twice."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hsae.cache.build import build
from hsae.cache.errors import UserError
from hsae.cache.lm import LanguageModel, load_tokenizer
from hsae.cache.store import ActivationStore
from hsae.eval import contexts, figures
from hsae.eval.core import CoreOptions
from hsae.eval.report import write_report
from hsae.eval.targets import evaluate_targets, run_targets
from hsae.train.model import load_model
from hsae.train.plan import load_plan
from hsae.train.trainer import train

GOLDEN = Path(__file__).parent / "golden"
USER_BASELINE = GOLDEN / "user_baseline_core.json"


class Quiet:
    def started(self, run, step, steps):
        pass

    def metrics(self, run, metrics):
        pass

    def warning(self, run, message):
        pass


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
    train(plan, runs, Quiet(), device="cpu")
    store = ActivationStore.open(plan.store_path("eval"))
    targets = [target for run in runs for target in run_targets(plan, run)]
    evaluate_targets(targets, store, lambda: LanguageModel.load(plan.model), options=CoreOptions())
    return plan, [plan.run_dir(run) for run in runs], store, load_tokenizer(plan.model)


def written(made, out, **changes):
    plan, run_dirs, store, tokenizer = made
    values = {"store": store, "tokenizer": tokenizer, "hook": plan.hook.names[0], "compare": [USER_BASELINE]}
    write_report(run_dirs, out, **{**values, **changes})
    return (out / "index.html").read_text(), (out / "report.md").read_text()


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


def test_the_page_is_self_contained_and_says_what_there_is(made, tmp_path):
    html, markdown = written(made, tmp_path)
    page = Page(html)
    text = " ".join(" ".join(page.words).split())
    for words in (
        "0 baseline",
        "1 stacked · level2",
        "3 full · level1",
        "Composition",
        "participation ratio",
        "Stages:",
        "level 2 alone",
    ):
        assert words in text, words
    assert not [
        value
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:"))
    ]
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "url(http" not in html and "@import" not in html
    assert html.count("<svg") == 1 + 3 + 2  # comparison, three runs' curves, two maps
    assert len(html) < 5_000_000
    assert markdown.count("\n|") == 2 + 6 + 1
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_corpus_text_is_shown_and_never_becomes_markup(made, tmp_path):
    html, _ = written(made, tmp_path)
    assert "<script" not in html
    contexts_shown = re.findall(r'<div class="context".*?</div>', html, re.DOTALL)
    assert len(contexts_shown) > 20
    assert any("&lt;" in context for context in contexts_shown)
    for context in contexts_shown:
        assert set(Page(context).tags) <= {"div", "b"}


def test_the_same_inputs_give_the_same_bytes(made, tmp_path):
    written(made, tmp_path / "a")
    written(made, tmp_path / "b")
    for name in ("index.html", "report.md", "summary.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_dead_sae_of_saebenchs_is_a_row_that_says_so(made, tmp_path):
    html, markdown = written(made, tmp_path)
    text = " ".join(" ".join(Page(html).words).split())
    assert "google/gemma-2-2b_layer_19_sae dead" in text
    for words in (
        "The SAE is dead: no latent fired on any token",
        "Scores are negative because",
        "Legacy SAEBench layout",
    ):
        assert words in text and words in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| google/gemma-2-2b_layer_19_sae (dead)"))
    assert "-0.586" in row and "-0.528" in row and "2304" in row


def test_the_numbers_are_those_of_the_result_files(made, tmp_path):
    _, markdown = written(made, tmp_path)
    result = json.loads(next(made[1][0].glob("eval/core/*.json")).read_text())
    measure = result["hsae"]["measures"]["explained_variance"]
    assert f"{measure['value']:.3f} ({measure['low']:.3f} – {measure['high']:.3f})" in markdown


def test_missing_pieces_are_said(made, tmp_path):
    plan, run_dirs, *_ = made
    copy = tmp_path / "runs/3"
    shutil.copytree(run_dirs[2], copy)
    shutil.rmtree(copy / "eval")
    shutil.rmtree(copy / "model")
    path = write_report([copy], tmp_path / "out", hook=plan.hook.names[0])
    text = " ".join(Page(path.read_text()).words)
    for words in (
        "No run has been evaluated yet",
        "no trained model: the run was not finished",
        "no core evaluation yet; run `hsae eval core`",
    ):
        assert words in text
    html, _ = written(made, tmp_path / "more", store=None, tokenizer=None)
    assert "no contexts: the evaluation store or the tokenizer is not there" in html
    with pytest.raises(UserError, match="there is nothing to report: no run has been trained yet"):
        write_report([tmp_path / "nothing"], tmp_path / "none")


def test_top_contexts_are_the_largest_activations(made):
    plan, run_dirs, store, tokenizer = made
    view, hook = load_model(run_dirs[2] / "model").views()["level2"], plan.hook.names[0]
    acts = (
        view.encode(store.acts(hook, 0, store.rows).float())
        * ~store.special_mask(store.tokens(0, store.rows))[..., None]
    )
    latents = acts.sum((0, 1)).topk(3).indices.tolist()
    found = contexts.top_contexts(view, store, hook, tokenizer, latents, 4)
    for latent in latents:
        peaks = acts[..., latent].amax(1)
        torch.testing.assert_close(
            torch.tensor([context.activation for context in found[latent]]), peaks.sort(descending=True).values[:4]
        )
        assert len({context.row for context in found[latent]}) == 4
        assert all(max(piece.strength for piece in context.pieces) == 1 for context in found[latent])
    firing = contexts.firing(view, store, hook)
    kept = (~store.special_mask(store.tokens(0, store.rows))).sum()
    torch.testing.assert_close(firing.density_F, (acts > 0).sum((0, 1)).double() / kept)


def test_participation_ratio_and_its_null():
    rows = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    torch.testing.assert_close(figures.participation_ratio(rows), torch.tensor([1.0, 2, 4, 0]))
    null = figures.permuted(rows)
    assert torch.equal(null.flatten().sort().values, rows.flatten().sort().values) and not torch.equal(null, rows)
