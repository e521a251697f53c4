"""RAVEL: entities and answers, the exchange against full forward passes with a hook, a planted attribute, and the
commands.
"""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import HOOK, LAYER, TEMPLATES, D, an_sae, greedy, invoke, settings, write_entities
from places import GOLDEN

from hsae.cache.config import ModelConfig
from hsae.cache.errors import CorpusError, NotApplicable, UserError
from hsae.cache.language_model.generation import PassCounts, PendingPrompt, complete
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.suites.build import build_suites
from hsae.cache.suites.entities import judge_answer, read_entities, token_at
from hsae.cache.suites.ravel_store import Prompt, RavelStore
from hsae.cache.suites.specs import EntitiesConfig
from hsae.eval.harness.options import DrawOptions
from hsae.eval.harness.saebench_file import read_file
from hsae.eval.ravel.config import RavelConfig, ravel_spec
from hsae.eval.ravel.exchange import Exchange, Pair, own_scores, pairs_of, saebench_scores, split_entities
from hsae.eval.ravel.ravel_file import RavelFile
from hsae.eval.ravel.ravel_runs import MEASURES, Ravel
from hsae.train import run_record
from hsae.train.config.plan import load_plan
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import AdditiveSAE
from hsae.train.model.sae import SAE
from hsae.train.runs import run_directory

# ---- entities and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "label", "expected"),
    [
        (" Paris, the", "Paris", True),
        (" Par", "Paris", None),
        (" Parma", "Paris", False),
        ("", "Paris", None),
        (" South America", "South America", True),
        (" South", "South America", None),
        (' Oslo" and', "Oslo, Bergen", True),
        (" Swedish", "Finnish, Swedish", True),
        (" the United", "United States", None),
        (" the United Sta", "United States", None),
        (" the US", "United States", False),
        (" England", "United Kingdom", True),
        (" Chinese", "Mandarin", True),
        (' "quoted', "Paris", False),
        (" S\ufffd", "São Paulo", None),
    ],
)
def test_an_answer_is_decided_as_soon_as_no_more_text_can_change_it(completion, label, expected):
    assert judge_answer(completion, label) is expected
    if expected is not None:
        assert judge_answer(completion + " and more", label) is expected
        assert judge_answer(completion, label, final=True) is expected


def test_an_answer_that_ends_early_counts_as_saebench_counts_it():
    assert judge_answer(" Par", "Paris", final=True) is True
    assert judge_answer("  ", "Paris", final=True) is False


def test_the_entity_is_found_in_the_prompts_own_tokens():
    assert token_at([(0, 0), (0, 3), (3, 5), (5, 9), (9, 12)], 9) == 3
    assert token_at([(0, 0), (0, 3), (3, 6), (6, 9)], 5) == 2
    assert token_at([(0, 0), (0, 3)], 5) is None


def test_the_packaged_facts_are_whole():
    kinds = read_entities(EntitiesConfig(entities="facts"))
    assert [kind.name for kind in kinds] == ["country", "city"]
    for kind in kinds:
        assert len(kind.labels) > 50 and set().union(*kind.labels.values()) == set(kind.prompts)
    assert kinds[0].labels["France"] == {"Capital": "Paris", "Continent": "Europe", "Language": "French"}
    assert "Capital" not in kinds[0].labels["Brazil"]  # Brasilia is tokenised into the country's own name


def test_ravels_own_files_are_read_from_a_folder(tmp_path):
    labels = {
        name: {"Country": name[0], "Continent": name[1], "Language": name[2], "URL": "x"} for name in ("abc", "bcd")
    }
    prompts = {key: [f"%s has the {key}"] for key in ("Country", "Continent", "Language", "URL")}
    for part, content in (("entity_attributes", labels), ("attribute_to_prompts", prompts)):
        (tmp_path / f"ravel_city_{part}.json").write_text(json.dumps(content))
    (kind,) = read_entities(EntitiesConfig(entities=str(tmp_path)))
    assert kind.name == "city" and list(kind.prompts) == ["Country", "Continent", "Language"]
    assert kind.prompts["Country"] == ("{entity} has the Country",)
    assert kind.labels["bcd"] == {"Country": "b", "Continent": "c", "Language": "d"}


def test_what_is_wrong_with_entities_is_said(tmp_path):
    def refused(text, name="entities.toml"):
        (tmp_path / "rows.csv").write_text("entity,A,B\nx,1,2\ny,1,3\n")
        (tmp_path / name).write_text(text)
        with pytest.raises(CorpusError) as raised:
            read_entities(EntitiesConfig(entities=str(tmp_path / name)))
        return str(raised.value)

    head = '[[entity]]\nname = "k"\nfile = "rows.csv"\n[entity.prompts]\n'
    assert "all have the same A" in refused(head + 'A = ["{entity} a"]\nB = ["{entity} b"]')
    assert "must have {entity} once, with text behind it" in refused(head + 'A = ["a {entity}"]\nB = ["{entity} b"]')
    assert "no column 'C' (there is: entity, A, B)" in refused(head + 'C = ["{entity} c"]\nB = ["{entity} b"]')
    assert "prompts: Dictionary should have at least 2 items" in refused(head + 'B = ["{entity} b"]')
    assert "no [[entity]] table" in refused("x = 1")
    with pytest.raises(CorpusError, match="give saebench, facts, a TOML file"):
        read_entities(EntitiesConfig(entities="nothing"))


def test_without_the_hub_it_is_said_what_to_do(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(CorpusError) as raised:
        read_entities(EntitiesConfig(revision="0123abc"))
    assert str(raised.value) == (
        "data set 'adamkarvonen/ravel_prompts' can't be found on the hub (ConnectionError: no route); check the "
        "network, or use entities that come with hsae with --set ravel.entities=facts, or your own with --set "
        "ravel.entities=FILE.toml"
    )


# ---- a planted attribute ---------------------------------------------------------------------------------------------


class Planted:
    """A language model that copies: its answer is colour or size of the entity before, as the last token asks.

    Residual: 0 colour, 1 size (each 0 or 1), 2 and 3 what is asked, the rest is noise that nothing reads.
    """

    tokenizer = SimpleNamespace(
        eos_token_id=None, decode=lambda ids, **_: " ".join(("red", "blue", "big", "small")[i] for i in ids)
    )

    def suffix(self, hook, resid_BTD, *, grad=False):
        entity_B2 = resid_BTD.cumsum(1)[..., :2]
        return torch.cat([entity_B2 * resid_BTD[..., 2:4], resid_BTD[..., 2:4]], -1)

    def unembed(self, final, *, grad=False):
        value, asked = 2 * final[..., :2] - final[..., 2:4], final[..., 2:4]
        logits = torch.stack([-value[..., 0], value[..., 0], -value[..., 1], value[..., 1]], -1)
        return 6 * logits + 20 * (asked.repeat_interleave(2, -1) - 1)


class PlantedStore:
    """Twenty entities, both attributes asked of each; two tokens before the entity, one behind it."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.rows, self.prompts = [], {"colour": [], "size": []}
        for number in range(20):
            bits = (number % 2, number // 2 % 2)
            noise_7 = torch.rand(7, generator=generator) + 0.1
            for place, (attribute, words) in enumerate({"colour": ("red", "blue"), "size": ("big", "small")}.items()):
                x_TD = torch.zeros(4, 11)
                x_TD[2, :2], x_TD[2, 4:] = torch.tensor(bits, dtype=torch.float32), noise_7
                x_TD[3, 2 + place] = 1
                held = {"kind": "thing", "attribute": attribute, "entity": f"e{number}", "label": words[bits[place]]}
                prompt = Prompt(
                    row=len(self.rows), **held, ids=(0, 0, 0, 0), position=2, first_token=2 * place + bits[place]
                )
                self.rows.append(x_TD)
                self.prompts[attribute].append(prompt)

    def resid(self, prompt, hook):
        return self.rows[prompt.row]

    def entity(self, prompts, hook):
        return torch.stack([self.resid(prompt, hook)[prompt.position] for prompt in prompts])


@pytest.fixture
def planted():
    """An exchange, the store, and an SAE whose latent i is residual coordinate i (and two that never fire)."""
    store = PlantedStore()
    W_enc = torch.zeros(11, 13)
    W_enc[:, :11] = torch.eye(11)
    parts = {"W_enc": W_enc, "W_dec": W_enc.T.clone(), "b_enc": torch.zeros(13), "b_dec": torch.zeros(11)}
    view = SAE(name="planted", architecture="standard", **parts)
    config = RavelConfig(pairs=20, batch_pairs=5, epochs=3)
    return Exchange(store=store, hook=HOOK, language=Planted(), config=config), store, view


def only(*latents):
    mask_F = torch.zeros(13, dtype=torch.bool)
    mask_F[list(latents)] = True
    return mask_F


@pytest.mark.parametrize("keep_error", [True, False])
def test_the_latent_that_carries_an_attribute_scores_one_and_others_do_not(planted, keep_error):
    exchange, store, view = planted
    pairs = pairs_of(store.prompts, "colour", 20, random.Random(1))
    assert sum(pair.cause for pair in pairs) == 20 == len(pairs) - 20

    def of(mask_F):
        return own_scores(pairs, exchange.outcomes(view, pairs, mask_F, keep_error=keep_error))

    assert of(only(0)) == {"cause_score": 1.0, "isolation_score": 1.0, "disentangle_score": 1.0}
    assert of(only(7))["cause_score"] == 0.0  # a random one
    assert of(only(1)) == {
        "cause_score": 0.0,
        "isolation_score": 0.0,
        "disentangle_score": 0.0,
    }  # carries the other attribute
    assert of(only(0, 1))["isolation_score"] == 0.0 and of(only(0, 1))["cause_score"] == 1.0
    trained_F = exchange.train(view, pairs, keep_error=keep_error)
    assert trained_F[0] and not trained_F[1] and not trained_F[[11, 12]].any()
    assert of(trained_F)["disentangle_score"] == 1.0


def test_nothing_is_asked_where_no_chosen_latent_differs(planted):
    exchange, store, view = planted
    pairs = pairs_of(store.prompts, "size", 20, random.Random(2))
    exchange.passes = PassCounts()
    outcomes = exchange.outcomes(view, pairs, only(11, 12), keep_error=True)
    assert exchange.passes == PassCounts(spared=40)
    assert outcomes == [not pair.cause for pair in pairs]
    exchange.passes = PassCounts()
    assert exchange.outcomes(view, pairs, only(11), keep_error=False) == outcomes  # this SAE has no error
    asked = len({(pair.base.row, pair.target) for pair in pairs})
    assert exchange.passes.suffix + exchange.passes.spared == 40 and asked <= exchange.passes.suffix < 41
    again = exchange.outcomes(view, pairs, only(1), keep_error=True)
    touched = [pair for pair in pairs if (store.entity([pair.base], HOOK) != store.entity([pair.source], HOOK))[0, 1]]
    assert exchange.passes.suffix >= len(touched) and len(again) == 40


@pytest.mark.parametrize("keep_error", [True, False])
def test_the_masks_algebra_is_that_of_a_loop_over_pairs_and_latents(planted, keep_error):
    exchange, store, _ = planted
    generator = torch.Generator().manual_seed(9)
    parts = {"W_enc": torch.randn(11, 17, generator=generator), "W_dec": torch.randn(17, 11, generator=generator)}
    parts |= {"b_enc": torch.randn(17, generator=generator), "b_dec": torch.randn(11, generator=generator)}
    view = SAE(name="dense", architecture="standard", **parts)
    pairs = pairs_of(store.prompts, "size", 3, random.Random(4))
    gate_F = torch.rand(17, generator=generator).requires_grad_()
    moved_BD = exchange.moved(view, pairs, exchange.latents(view, pairs), gate_F, keep_error=keep_error)
    loss = exchange.loss(view, pairs, gate_F, keep_error=keep_error)
    loss.backward()
    naive_F = gate_F.detach().clone().requires_grad_()
    losses = []
    for number, pair in enumerate(pairs):
        base_D, source_D = (store.resid(p, HOOK)[2] for p in (pair.base, pair.source))
        before_F, other_F = view.encode(base_D), view.encode(source_D)
        x_D = base_D - view.decode(before_F) if keep_error else torch.zeros(11)
        x_D = x_D + view.b_dec
        for latent in range(17):
            value = (1 - naive_F[latent]) * before_F[latent] + naive_F[latent] * other_F[latent]
            x_D = x_D + value * view.W_dec[latent]
        torch.testing.assert_close(moved_BD[number], x_D)
        x_TD = torch.cat([store.resid(pair.base, HOOK)[:2], x_D[None], store.resid(pair.base, HOOK)[3:]])
        logits_V = exchange.language.unembed(exchange.language.suffix(HOOK, x_TD[None]))[0, -1]
        losses.append(-logits_V.log_softmax(-1)[pair.token])
    naive = torch.stack(losses).mean()
    naive.backward()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(gate_F.grad, naive_F.grad, atol=1e-5, rtol=1e-4)


def test_pairs_differ_in_the_answer_and_splits_in_the_entities(planted):
    _, store, _ = planted
    for pair in pairs_of(store.prompts, "colour", 9, random.Random(3)):
        assert pair.base.attribute == pair.source.attribute == ("colour" if pair.cause else "size")
        assert pair.base.label != pair.source.label
        assert pair.target == (pair.source if pair.cause else pair.base).label
    train, test = split_entities(store.prompts, 0.7, random.Random(1))
    sides = [{prompt.entity for held in side.values() for prompt in held} for side in (train, test)]
    assert not sides[0] & sides[1] and len(sides[0]) == 14 and len(sides[1]) == 6
    alike = {"colour": store.prompts["colour"][:1], "size": store.prompts["size"][:3]}
    with pytest.raises(UserError, match="can't be split"):
        split_entities(alike, 0.7, random.Random(1))


def test_saebench_calls_a_pair_isolation_if_both_answers_begin_alike(planted):
    _, store, _ = planted
    red, blue = store.prompts["colour"][:2]
    alike = replace(
        Pair(base=red, source=blue, cause=True), source=blue.model_copy(update={"first_token": red.first_token})
    )
    pairs = [Pair(base=red, source=blue, cause=True), alike, Pair(base=red, source=blue, cause=False)]
    found = saebench_scores(pairs, [True, False, True])
    assert found == {"cause_score": 1.0, "isolation_score": 0.5, "disentangle_score": 0.75}
    assert saebench_scores(pairs[:1], [True])["disentangle_score"] is None
    assert own_scores(pairs, [True, False, True])["cause_score"] == 0.5


# ---- a real store ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language():
    return LanguageModel.load(ModelConfig(id=str(GOLDEN / "model"), dtype="float32"))


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, language):
    """Overrides of the tiny plan whose entities' labels are what the model says, but for one that is wrong; the store
    is built by the command.
    """
    folder = tmp_path_factory.mktemp("ravel")
    write_entities(folder, language)
    values = {
        "model.id": str(GOLDEN / "model"),
        "cache.dir": str(folder / "activations"),
        "train.dir": str(folder / "runs"),
        "ravel.entities": str(folder / "words.toml"),
        "ravel.min_prompts": 5,
        "ravel.pairs": 10,
        "ravel.batch_pairs": 3,
        "ravel.batch_rows": 7,
        "ravel.learning_rate": 0.1,
        "ravel.least_ceiling": 0,
    }
    chosen = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    done = invoke("cache", "build", "--suite", "ravel", *settings(chosen))
    assert done.exit_code == 0, (done.output, done.exception)
    assert "answered right and kept: word: Base " in done.output
    return chosen


@pytest.fixture(scope="module")
def plan(overrides):
    return load_plan("tiny", overrides)


@pytest.fixture(scope="module")
def store(plan):
    return RavelStore(ravel_spec(plan), plan.cache.dir)


def test_a_store_keeps_the_prompts_that_are_answered_right(store, language):
    header = store.header
    assert header.right["word"]["Place"] == header.asked["word"]["Place"] - 1  # the wrong label
    assert header.right["word"]["Base"] == header.asked["word"]["Base"] >= 5
    assert header.passes == header.count == sum(header.asked["word"].values())
    prompt = store.prompts["word"]["Base"][3]
    ids = language.tokenizer(TEMPLATES["Base"].format(entity=prompt.entity)).input_ids
    assert list(prompt.ids) == list(ids) and prompt.position == len(ids) - 2
    assert prompt.first_token == greedy(language, ids, 1)[0]
    alone_TD = language.prefix(torch.tensor([ids]), [HOOK])[HOOK][0]
    torch.testing.assert_close(store.resid(prompt, HOOK), alone_TD, atol=1e-4, rtol=1e-4)


def test_prefix_and_suffix_write_what_a_full_forward_pass_with_a_hook_writes(store, language):
    generator = torch.Generator().manual_seed(2)
    prompts = [held[place] for held in store.prompts["word"].values() for place in (0, 4)]
    moves = [torch.randn(D, generator=generator) * 9 for _ in prompts]
    opened, expected, unchanged = [], [], []
    for prompt, move_D in zip(prompts, moves, strict=True):
        resid_TD = store.resid(prompt, HOOK).clone()
        resid_TD[prompt.position] += move_D

        def change(output, prompt=prompt, move_D=move_D):
            first = output[0] if isinstance(output, tuple) else output
            first[:, prompt.position] += move_D
            return output

        opened.append(PendingPrompt(ids=prompt.ids, resid_TD=resid_TD, is_decided=lambda text: False))
        expected.append(greedy(language, prompt.ids, 3, change))
        unchanged.append(greedy(language, prompt.ids, 3))
    passes = PassCounts()
    complete(language, HOOK, opened, 3, 4, passes)
    assert [item.written for item in opened] == expected != unchanged
    assert passes == PassCounts(prefix=2 * len(prompts), suffix=3 * len(prompts))


def test_gradients_go_through_the_suffix_as_through_the_whole_model(store, language, plan):
    exchange = Exchange(store=store, hook=HOOK, language=language, config=plan.table(RavelConfig))
    view = an_sae(21, seed=1)
    pairs = pairs_of(store.prompts["word"], "Base", 3, random.Random(5))
    gate_F = torch.full((21,), 0.4, requires_grad=True)
    loss = exchange.loss(view, pairs, gate_F, keep_error=True)
    loss.backward()
    moved_F = torch.full((21,), 0.4, requires_grad=True)
    total = torch.zeros(())
    for pair in pairs:
        (moved_D,) = exchange.moved(view, [pair], exchange.latents(view, [pair]), moved_F, keep_error=True)

        def change(module, args, output, pair=pair, moved_D=moved_D):
            first = output[0] if isinstance(output, tuple) else output
            place = (torch.tensor([0]), torch.tensor([pair.base.position]))
            first = first.index_put(place, moved_D[None])
            return (first, *output[1:]) if isinstance(output, tuple) else first

        handle = language.model.get_decoder().layers[LAYER].register_forward_hook(change)
        logits_V = language.model(input_ids=torch.tensor([pair.base.ids]), use_cache=False).logits[0, -1]
        handle.remove()
        total = total - logits_V.log_softmax(-1)[pair.token]
    (total / len(pairs)).backward()
    torch.testing.assert_close(loss, total / len(pairs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gate_F.grad, moved_F.grad, atol=1e-5, rtol=1e-3)
    assert gate_F.grad.abs().max() > 1e-4


def test_a_build_goes_on_where_it_was(store, plan, tmp_path, language):
    path = build_suites([ravel_spec(plan)], tmp_path, model=language)[0]
    assert path.read_bytes() == store.path.read_bytes()
    path.unlink()
    asked = []
    build_suites([ravel_spec(plan)], tmp_path, model=SimpleNamespaceModel(language, asked))
    assert path.read_bytes() == store.path.read_bytes() and asked == []


class SimpleNamespaceModel:
    """A language model that notes every pass."""

    def __init__(self, model, asked):
        self._model, self._asked = model, asked

    def __getattr__(self, name):
        if name in ("prefix", "suffix"):
            self._asked.append(name)
        return getattr(self._model, name)


def test_too_few_right_answers_are_an_error(plan, language, tmp_path):
    spec = ravel_spec(plan)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"min_prompts": 300})})
    with pytest.raises(CorpusError) as raised:
        build_suites([spec], tmp_path, model=language)
    assert "no type of entity has two attributes with 300 right answers each" in str(raised.value)
    assert "word: Base " in str(raised.value) and not spec.path(tmp_path).is_file()


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(plan):
    """Run 3, as if it had been trained: two levels of random weights."""
    config = plan.runs[3]
    levels = tuple(an_sae(latents, latents, name=f"level{n}") for n, latents in enumerate((13, 7), 1))
    digests = dict.fromkeys(("model_digest", "tokenizer_digest", "corpus_digest"), "0" * 64)
    store = SimpleNamespace(spec=plan.store("train"), header=SimpleNamespace(d_model=D, **digests))
    run_directory.prepare(plan, config, store, "cpu", resume=False, restart=False)
    run_dir = plan.run_dir(config)
    AdditiveSAE(levels).save(run_dir / "model")
    run_record.write_run(run_dir, {**run_record.read_run(run_dir), "complete": True, "content": None})
    return run_dir


def test_an_sae_and_every_level_of_a_run_are_evaluated(overrides, store, trained):
    done = invoke("eval", "ravel", "--run", 3, "--draws", 3, *settings(overrides))
    assert done.exit_code == 0, (done.output, done.exception)
    assert "disentanglement" in done.output and "spared because no chosen latent differs" in done.output
    folder = trained / "eval" / "ravel"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        f"hsae_tiny_3-full_{view}_eval_results.json" for view in ("level1", "level2", "sae")
    ]
    for file in files:
        content = read_file(file, RavelFile, "ravel")
        RavelFile.model_validate(content)
        names = {f"word_{attribute}" for attribute in store.prompts["word"]}
        assert set(content["eval_result_unstructured"]["word_results"]) == names == set(content["hsae"]["attributes"])
        means = content["eval_result_metrics"]["ravel"]
        entries = content["eval_result_unstructured"]["word_results"].values()
        for name, short in MEASURES.items():
            values = [
                entry[short] for entry in entries
            ]  # all answers to "Place" begin with one token: no cause pairs by SAEBench's rule
            assert means[name] == (None if None in values else pytest.approx(sum(values) / len(values)))
        assert means["isolation_score"] is not None
        assert all(len(measure["seeds"]) == 3 for measure in content["hsae"]["measures"].values())
        assert content["hsae"]["random"]["isolation_score"]["value"] is not None
        spent = content["hsae"]["lm_passes"]
        assert spent["measures"]["backward"] > 0 and spent["saebench"]["suffix"] > spent["saebench"]["backward"]
        assert content["hsae"]["right"] == store.header.right
    again = invoke("eval", "ravel", "--run", 3, "--draws", 3, *settings(overrides))
    assert "3 of 3 were there already" in again.output, (again.output, again.exception)
    other = invoke("eval", "ravel", "--run", 3, "--draws", 3, *settings([*overrides, "ravel.pairs=8"]))
    assert other.exit_code == 0 and "were there already" not in other.output


def test_all_leaves_out_what_lacks_its_store_or_means_nothing(overrides, plan, trained, tmp_path, wide):
    saelens_folder.save(an_sae(11), tmp_path / "sae")
    chosen = ["--sae", tmp_path / "sae", "--out", tmp_path / "out", "--draws", 1]
    done = invoke("eval", "all", *chosen, *settings([*overrides, "ravel.least_ceiling=1.0"]))
    summary = done.output[done.output.index("summary") :]
    assert "skipped: unlearning is of trained runs, all levels together; it takes no --sae" in summary
    assert "skipped: exchanging the whole residual of an entity at blocks.2.hook_resid_post changes" in summary
    assert "5 of 7 evaluations failed" in summary
    done = invoke("eval", "all", "--run", 3, "--draws", 1, *settings([*overrides, "ravel.min_prompts=6"]))
    summary = done.output[done.output.index("summary") :]
    assert "skipped: there is no probe store" in summary and "--suite ravel" in summary
    assert "skipped: no forget store at" in summary and "--suite unlearning" in summary
    with pytest.raises(NotApplicable):
        config = plan.table(RavelConfig).model_copy(update={"least_ceiling": 1.0})
        Ravel(RavelStore(ravel_spec(plan), plan.cache.dir), config=config).residual(HOOK)


@pytest.mark.slow
def test_gemma_knows_the_packaged_facts_and_carries_them_until_the_middle(tmp_path):
    packaged, countries = (
        GOLDEN.parents[1] / "cache/suites",
        tmp_path / "countries.toml",
    )  # half of them: the whole takes minutes
    countries.write_text((packaged / "facts.toml").read_text().rpartition("[[entity]]")[0])
    lines = (packaged / "countries.csv").read_text().splitlines(keepends=True)
    (tmp_path / "countries.csv").write_text("".join(lines[:1] + lines[1::2]))
    hooks = ("blocks.9.hook_resid_post", "blocks.12.hook_resid_post")
    entities = f"ravel.entities={json.dumps(str(countries))}"
    plan = load_plan("gemma-3-270m", [f"hook.names={json.dumps(hooks)}", "ravel.pairs=20", entities])
    language = LanguageModel.load(plan.model)
    build_suites([ravel_spec(plan)], tmp_path, model=language)
    store = RavelStore(ravel_spec(plan), tmp_path)
    assert set(store.prompts) == {"country"} and len(store.header.prompts) > 150
    evaluation = Ravel(store, DrawOptions(draws=2), plan.table(RavelConfig))
    evaluation.language = language
    early = evaluation.residual(hooks[0])
    assert early["cause_score"]["value"] > 0.6
    with pytest.raises(NotApplicable, match=r"at blocks\.12\.hook_resid_post changes \d% of the answers"):
        evaluation.residual(hooks[1])
