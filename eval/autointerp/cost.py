"""What is still to be asked of a judge, and the most that it can cost."""

from collections.abc import Iterable
from dataclasses import dataclass

from hsae.eval.autointerp import explain
from hsae.eval.autointerp.config import AutointerpConfig
from hsae.eval.autointerp.interpretation import interpret
from hsae.eval.autointerp.judge import Answer, Judge, Prices, Question
from hsae.eval.autointerp.windows import Case


@dataclass(kw_only=True)
class Cost:
    """Requests and tokens, if every answer has the form that is asked for."""

    latents: int = 0
    requests: int = 0
    stored: int = 0
    """Answers that are there already."""
    input_tokens: int = 0
    """By the tokenizer of the language model that is studied."""
    output_tokens: int = 0
    """At most."""

    def money(self, prices: Prices) -> float:
        """Money, at most."""
        return prices.of(self.input_tokens, self.output_tokens)

    def describe(self, judge: Judge) -> str:
        """A line for people."""
        text = (
            f"{self.latents:,} latents: {self.requests:,} requests to {judge.config.model} at {judge.config.base_url}, "
            f"about {self.input_tokens:,} tokens in and at most {self.output_tokens:,} out; "
            f"{self.stored:,} answers are there already"
        )
        if judge.prices is None:
            return text
        money = self.money(judge.prices)
        return f"{text}; at most {money:.4f} (more only for answers that are not of the form asked for)"


def estimate_cost(cases: Iterable[Case], judge: Judge, config: AutointerpConfig) -> Cost:
    """What is still to be asked of latents; an explanation that is not there yet counts as long as it may be."""
    cost, questions = Cost(), set[Question]()
    longest = "one " * config.max_tokens_in_explanation
    for case in cases:
        cost.latents += 1
        missing: list[Question] = []

        def recall(question: Question, attempt: int, missing: list[Question] = missing) -> Answer | None:
            answer = judge.recall(question, attempt)
            if answer is None:
                missing.append(question)
            else:
                cost.stored += 1
            return answer

        interpret(case, recall, config)
        if missing == [explain.explaining(case, config)]:
            missing.append(explain.predicting(case, longest))
        questions.update(missing)
    cost.requests = len(questions)
    for question in questions:
        cost.input_tokens += judge.count(question.system) + judge.count(question.user)
        cost.output_tokens += question.max_tokens + config.judge.spare_tokens
    return cost
