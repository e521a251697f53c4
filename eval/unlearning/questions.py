"""Multiple-choice questions: where they come from, how an instruction-tuned model is asked, and which it answers.

A local file is jsonl: `{"question": "...", "choices": ["...", "..."], "answer": 0}` (or a letter), with an optional
"subject". A set on the hub is `owner/name:subset`, split `test`, with the same columns (as cais/wmdp and cais/mmlu
have).

Shapes: Q questions.
"""

import importlib.util
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import parse_json
from hsae.cache.text.data_sets import replace_surrogates

LETTERS = "ABCDEFGH"
PROBE = "hsae probe text"
PACKAGED = ("python-facts", "general-facts")
"""Small question sets that come with hsae."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with lettered choices."""

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str

    def permuted(self, order: Sequence[int]) -> "Question":
        """The same with its choices in another order."""
        choices = tuple(self.choices[place] for place in order)
        return Question(text=self.text, choices=choices, answer=list(order).index(self.answer), subject=self.subject)

    def orders(self, most: int) -> list[tuple[int, ...]]:
        """The first `most` orders of the choices; the first is the order given."""
        return list(itertools.islice(itertools.permutations(range(len(self.choices))), most))


def read_questions(name: str, revisions: Mapping[str, str] | None = None) -> list[Question]:
    """The questions of a packaged set, a jsonl file or a set on the hub, at its revision if given. Raises UserError."""
    if name in PACKAGED:
        text = resources.files("hsae.eval.unlearning").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
        return _lines(text, name, name)
    path = Path(name).expanduser()
    if path.is_file():
        try:
            return _lines(path.read_bytes().decode("utf-8-sig", "surrogatepass"), str(path), path.stem)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} can't be read: {error}; save it as UTF-8") from None
    if path.suffix == ".jsonl" or name.count("/") != 1 or ":" not in name:
        raise UserError(
            f"no questions {name!r}: give a .jsonl file, a set on the hub as owner/name:subset, or a packaged one "
            f"({', '.join(PACKAGED)})"
        )
    return _hub(name, (revisions or {}).get(name.partition(":")[0]))


def _lines(text: str, where: str, subject: str) -> list[Question]:
    questions = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}, line {number} is not JSON: {error}") from None
        questions.append(_question(record, f"{where}, line {number}", subject))
    if not questions:
        raise UserError(f"{where} holds no question")
    return questions


def _question(record: Any, where: str, subject: str) -> Question:
    match record:
        case {"question": str(text), "choices": list(choices), "answer": int() | str() as answer}:
            if isinstance(answer, str):
                answer = LETTERS.find(answer.upper()) if len(answer) == 1 else -1
            is_choice = all(isinstance(choice, str) for choice in choices)
            if is_choice and 2 <= len(choices) <= len(LETTERS) and 0 <= answer < len(choices):
                return Question(
                    text=replace_surrogates(text.strip()),
                    choices=tuple(map(replace_surrogates, choices)),
                    answer=answer,
                    subject=replace_surrogates(str(record.get("subject", subject))),
                )
    raise UserError(
        f"{where} is not a question; write "
        '{"question": "...", "choices": ["...", "..."], "answer": 0}, with the answer\'s number or letter'
    )


def _hub(name: str, revision: str | None) -> list[Question]:
    owner_name, _, subset = name.partition(":")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"questions {name!r} are a data set on the hub, which needs the package datasets; "
            "run: pip install 'hsae[hub]', or give a .jsonl file with --set unlearning.qa.forget=FILE"
        )
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    try:
        data = load_dataset(owner_name, subset, split="test", revision=revision, trust_remote_code=False)
    except Exception as error:  # the client has no common base for network, access and naming errors
        first = str(error).partition("\n")[0]
        raise UserError(
            f"questions {name!r} can't be had from the hub ({type(error).__name__}: {first}); check the id and the "
            f"network; if the set is gated, accept its terms at https://huggingface.co/datasets/{owner_name} and run "
            "`hf auth login`; or give a .jsonl file with "
            "--set unlearning.qa.forget=FILE --set unlearning.qa.retain=FILE"
        ) from None
    return [_question(dict(record), f"data set {name}, row {row}", subset) for row, record in enumerate(data)]


def check_template(tokenizer: Any, model: str) -> None:
    """Raise UserError unless the tokenizer has a chat template that shows a user's text once and opens an answer."""
    instead = (
        "use an instruction-tuned model such as google/gemma-2-2b-it, or offline --set model.id=smollm2-135m-instruct"
    )
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{model} has no chat template, so it is not instruction-tuned and can't be asked questions; {instead}"
        )
    try:
        opened, closed = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=wanted
            )
            for wanted in (True, False)
        )
    except Exception as error:  # a template is a program of the model's; it can fail in any way
        first = str(error).partition("\n")[0]
        raise UserError(
            f"the chat template of {model} can't be used ({type(error).__name__}: {first}); {instead}"
        ) from None
    if opened.count(PROBE) != 1 or len(opened) <= len(closed) or not opened.startswith(closed.rstrip()):
        raise UserError(
            f"the chat template of {model} is of a kind hsae doesn't know: it must show the user's text once and open "
            f"the model's answer behind it; {instead}"
        )


def prompt(question: Question, tokenizer: Any) -> list[int]:
    """Token ids of the question in the model's chat format, up to the start of an answer: a letter should be next."""
    subject = question.subject.replace("_", " ").replace("-", " ")
    lines = [f"Here is a multiple-choice question about {subject}. Answer with a letter.", "", question.text]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    message = [{"role": "user", "content": "\n".join(lines)}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + "Answer: ("
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [int(bos), *ids]


def letter_tokens(tokenizer: Any) -> list[list[int]]:
    """For each letter its tokens with and without a space before it, where those are single tokens."""
    tokens = []
    for letter in LETTERS:
        forms = [tokenizer(form, add_special_tokens=False, verbose=False).input_ids for form in (letter, f" {letter}")]
        tokens.append([ids[-1] for ids in forms if len(ids) == 1] or [forms[0][0]])
    return tokens


def predicted(logits_V: Tensor, letters: Sequence[Sequence[int]], choices: int) -> int:
    """The choice whose letter is likeliest, in either form."""
    probabilities_V = torch.softmax(logits_V, -1)
    likeliest = [max(float(probabilities_V[token]) for token in letters[place]) for place in range(choices)]
    return max(range(choices), key=lambda place: (likeliest[place], -place))
