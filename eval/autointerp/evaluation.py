"""SAEBench's autointerp: a judge explains latents from windows of text, and predicts from the explanation where they are active.

Windows come from a store of residuals, so no language model is run; answers of the judge are kept, so none is asked for twice. The
same answers are scored twice: as SAEBench does (every random window counts as inactive), and by what the latent really does.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from random import Random
from statistics import stdev
from threading import Thread
from typing import Any

from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.eval.autointerp import explain
from hsae.eval.autointerp.autointerp_file import AutointerpFile, SaebenchAutointerpConfig
from hsae.eval.autointerp.config import AutointerpConfig
from hsae.eval.autointerp.interpretation import MEASURES, Interpreted, interpret, measures, told, windows
from hsae.eval.autointerp.judge import Answer, Judge, Prices, Question
from hsae.eval.autointerp.windows import Case, Sampler
from hsae.eval.core.core import check_views
from hsae.eval.harness import estimates
from hsae.eval.harness.result_files import hsae_version
from hsae.eval.harness.saebench_file import read_measured, write_envelope
from hsae.eval.harness.targets import Found, Target, find
from hsae.train.run_record import check_same_model

SUITE = "autointerp"
GRACE = 3.0  # seconds that answers under way have to arrive after a failure
Progress = Callable[[int], None]
"""Told how many latents are done."""


HEADLINES = ("balanced_accuracy", "sensitivity", "specificity")
"""Measures that are shown."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A target's result file, as JSON."""

    target: Target
    content: dict[str, Any]
    reused: bool

    @property
    def measures(self) -> dict[str, dict[str, Any]]:
        """Measures with intervals over latents."""
        measures: dict[str, dict[str, Any]] = self.content["hsae"]["measures"]
        return measures

    def metric(self, name: str) -> float | None:
        """One of SAEBench's numbers by its key."""
        return next((values[name] for values in self.content["eval_result_metrics"].values() if name in values), None)


class NotAskedError(Exception):
    """A question that has no kept answer."""

    def __init__(self, question: Question) -> None:
        super().__init__("not asked yet")
        self.question = question


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A target with the windows of the latents that will be explained."""

    target: Target
    cases: list[Case]
    alive: int
    dead: int
    few: list[int]
    """Chosen latents that fire in too few places for their windows."""


@dataclass(kw_only=True)
class Estimate:
    """What is still to be asked, if every answer has the form that is asked for."""

    latents: int = 0
    requests: int = 0
    kept: int = 0
    """Answers that are there already."""
    input_tokens: int = 0
    """By the tokenizer of the language model that is studied."""
    output_tokens: int = 0
    """At most."""

    def cost(self, prices: Prices) -> float:
        """Money, at most."""
        return prices.of(self.input_tokens, self.output_tokens)


class Autointerp:
    """One store, ready to evaluate SAEs."""

    def __init__(
        self, store: ActivationStore, tokenizer: Any, config: AutointerpConfig, judge: Judge, device: str = "cpu"
    ) -> None:
        if store.context <= 2 * config.buffer:
            raise UserError(
                f"rows of {store.context} tokens hold no window of {2 * config.buffer + 1}; lower autointerp.buffer"
            )
        self.store, self.tokenizer, self.config, self.judge, self.device = store, tokenizer, config, judge, device
        self._samplers: dict[str, Sampler] = {}

    # --- before the judge is asked ---------------------------------------------------------------------------------------

    def _find(self, target: Target) -> Found[dict[str, Any]]:
        return find(target, self.inputs(target), partial(read_measured, kind=AutointerpFile, evaluation=SUITE))

    def found(self, target: Target) -> Scored | None:
        """The result that lies there, if it was made of the same inputs."""
        content = self._find(target).result
        return Scored(target=target, content=content, reused=True) if content is not None else None

    def changed(self, target: Target) -> str:
        """In what the inputs differ from those of the result that gives way, if one does."""
        return self._find(target).changed

    def check(self, target: Target) -> None:
        """Refuse an SAE that does not belong to the store. Raises UserError."""
        check_views([target.view], self.store, target.hook)
        check_same_model(target.run_dir, self.store.url, self.store.header)

    def prepare(self, target: Target) -> Prepared:
        """Choose latents and draw their windows."""
        sampler = self._sampler(target.hook)
        fired_F = sampler.fired(target.view)
        alive = (fired_F > self.config.dead_latent_threshold).nonzero()[:, 0].tolist()
        chosen = Random(self.config.seed).sample(alive, min(self.config.n_latents, len(alive)))
        cases = dict(sampler.cases(target.view, chosen, fired_F))
        return Prepared(
            target=target,
            cases=[case for case in cases.values() if case is not None],
            alive=len(alive),
            dead=target.view.d_sae - len(alive),
            few=[latent for latent, case in cases.items() if case is None],
        )

    def _sampler(self, hook: str) -> Sampler:
        if hook not in self._samplers:
            self._samplers[hook] = Sampler(self.store, hook, self.tokenizer, self.config, self.device)
        return self._samplers[hook]

    def estimate(self, prepared: Sequence[Prepared]) -> Estimate:
        """What is still to be asked."""
        total, seen = Estimate(), set[Question]()

        def recalled(question: Question, attempt: int) -> Answer:
            held = self.judge.recall(question, attempt)
            if held is None:
                raise NotAskedError(question)
            total.kept += 1
            return held

        for case in (case for item in prepared for case in item.cases):
            total.latents += 1
            try:
                interpret(case, recalled, self.config)
                continue
            except NotAskedError as missing:
                questions = [missing.question]
            first = explain.explaining(case, self.config)
            if questions == [first]:
                longest = "one " * self.config.max_tokens_in_explanation
                questions.append(explain.predicting(case, longest))
            for question in questions:
                if question not in seen:
                    seen.add(question)
                    total.requests += 1
                    total.input_tokens += self.judge.count(question.system) + self.judge.count(question.user)
                    total.output_tokens += question.max_tokens + self.config.judge.spare_tokens
        return total

    # --- asking and scoring ----------------------------------------------------------------------------------------------

    def evaluate(self, prepared: Prepared, progress: Progress = lambda done: None) -> Scored:
        """Ask the judge, score its answers and write the result. Raises UserError if it fails, or answers in another form too often."""
        interpreted = self._interpreted(prepared.cases, progress)
        content = self._content(prepared, interpreted)
        write_envelope(self._find(prepared.target).path, content)
        return Scored(target=prepared.target, content=content, reused=False)

    def _interpreted(self, cases: Sequence[Case], progress: Progress) -> list[Interpreted]:
        """Every case in order, several under way; the first failure ends all of them.

        Threads are daemons: one that sleeps until a further try must not keep a failed command from ending.
        """
        todo, done = SimpleQueue[int](), SimpleQueue[tuple[int, Interpreted | BaseException]]()
        for index in range(len(cases)):
            todo.put(index)

        def work() -> None:
            with suppress(Empty):
                while True:
                    index = todo.get_nowait()
                    try:
                        done.put((index, interpret(cases[index], self.judge.ask, self.config)))
                    except BaseException as error:
                        done.put((index, error))

        threads = [
            Thread(target=work, name="hsae-judge", daemon=True)
            for _ in range(min(self.config.judge.concurrency, len(cases)))
        ]
        for thread in threads:
            thread.start()
        found: dict[int, Interpreted] = {}
        try:
            while len(found) < len(cases):
                index, item = done.get()
                if isinstance(item, BaseException):
                    raise item
                found[index] = item
                self._refuse([item for item in found.values() if item.predicted is None], len(cases))
                progress(len(found))
        except BaseException:
            with suppress(Empty):
                while True:
                    todo.get_nowait()
            self.judge.stop()
            until = time.monotonic() + GRACE
            for thread in threads:  # what is under way is paid for: let it arrive
                thread.join(max(0.0, until - time.monotonic()))
            raise
        return [found[index] for index in range(len(cases))]

    def _refuse(self, failed: Sequence[Interpreted], count: int) -> None:
        """Raise UserError if too many latents have no answer of the right form."""
        judge = self.config.judge
        if len(failed) > judge.malformed_share * count:
            said = failed[-1].log[-1].rpartition("\n> ")[2]
            raise UserError(
                f"{judge.model} at {judge.base_url} did not answer as asked for {len(failed)} of {count} latents (autointerp.judge."
                f"malformed_share allows {judge.malformed_share:g}); the last time it said {said[:120]!r}. Use another model, give it room "
                "with autointerp.judge.spare_tokens if it thinks first, or raise that share"
            )

    def _content(self, prepared: Prepared, interpreted: Sequence[Interpreted]) -> dict[str, Any]:
        target, scored = prepared.target, [item for item in interpreted if item.predicted is not None]
        scores = [item.score() for item in scored]
        answers = [answer for item in interpreted for answer in item.answers]
        malformed = [item.case.latent for item in interpreted if item.predicted is None]
        return AutointerpFile.content(
            eval_config=self._eval_config(),
            metrics={
                SUITE: {
                    "autointerp_score": sum(scores) / len(scores) if scores else None,
                    "autointerp_std_dev": stdev(scores) if len(scores) > 1 else None,
                }
            },
            details=[],
            sae_config={**target.view.config, "dtype": "float32", "device": self.device},
            unstructured={str(item.case.latent): told(item) for item in scored},
            hsae={
                "version": hsae_version(),
                "measures": measures(scored),
                "interval": "95 % bootstrap interval over latents",
                "lm_passes": 0,
                "latents": {
                    "scored": len(scored),
                    "alive": prepared.alive,
                    "dead": prepared.dead,
                    "too_few_examples": prepared.few,
                    "malformed": malformed,
                },
                "windows": {str(item.case.latent): windows(item) for item in scored},
                "judge": {
                    "model": self.config.judge.model,
                    "base_url": self.config.judge.base_url,
                    "answers": len(answers),
                    "malformed_answers": sum(item.malformed for item in interpreted),
                    "input_tokens": sum(answer.input_tokens for answer in answers),
                    "output_tokens": sum(answer.output_tokens for answer in answers),
                },
                "store": {"name": self.store.spec.name, "rows": self._sampler(target.hook).rows},
                "inputs": self.inputs(target),
            },
            release=target.release,
            sae_id=target.sae_id,
        )

    def inputs(self, target: Target) -> dict[str, Any]:
        """All that a result depends on."""
        header = self.store.header
        settings = self.config.model_dump(
            mode="json", exclude={"judge": {"concurrency", "timeout_s", "retries", "malformed_share"}}
        )
        return {
            **target.inputs,
            "store": self.store.spec.fingerprint,
            "model": header.model_digest,
            "tokenizer": header.tokenizer_digest,
            "corpus": header.corpus_digest,
            "autointerp": settings,
        }

    def _eval_config(self) -> SaebenchAutointerpConfig:
        """SAEBench's `eval_config`."""
        config, spec = self.config, self.store.spec
        return SaebenchAutointerpConfig(
            model_name=spec.model.id,
            n_latents=config.n_latents,
            override_latents=None,
            dead_latent_threshold=config.dead_latent_threshold,
            random_seed=config.seed,
            dataset_name=spec.corpus.corpus,
            llm_context_size=spec.context,
            llm_batch_size=spec.batch_rows,
            llm_dtype=spec.model.dtype,
            buffer=config.buffer,
            no_overlap=True,
            act_threshold_frac=config.act_threshold_frac,
            total_tokens=min(self.store.rows * spec.context, config.total_tokens),
            scoring=True,
            max_tokens_in_explanation=config.max_tokens_in_explanation,
            use_demos_in_explanation=True,
            n_top_ex_for_generation=config.n_top_ex_for_generation,
            n_iw_sampled_ex_for_generation=config.n_iw_sampled_ex_for_generation,
            n_top_ex_for_scoring=config.n_top_ex_for_scoring,
            n_random_ex_for_scoring=config.n_random_ex_for_scoring,
            n_iw_sampled_ex_for_scoring=config.n_iw_sampled_ex_for_scoring,
        )


def noise_note(results: Sequence[Scored]) -> str | None:
    """Which SAEs can't be told from the one with the highest balanced accuracy; None with fewer than two SAEs."""
    name = MEASURES[0]
    measures = {result.target.label: estimates.Estimate.of_dict(result.measures[name]) for result in results}
    return estimates.describe_noise(
        name, {label: measure for label, measure in measures.items() if measure.low is not None}
    )
