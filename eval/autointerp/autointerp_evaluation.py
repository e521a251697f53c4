"""`hsae eval autointerp`: a judge explains latents from windows of text, and predicts from that where they are active.

Windows come from a store of residuals, so no language model is run. Answers of the judge are stored, so none is asked
for twice. The same answers are scored twice: as SAEBench does, where every random window counts as inactive, and by
what the latent really does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import stdev
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from hsae.cache.config import at_commit
from hsae.cache.errors import UserError
from hsae.cache.language_model.lm import LanguageModel, load_tokenizer
from hsae.cache.reading.provenance import check_tokenizer
from hsae.cache.reading.store import ActivationStore
from hsae.eval.autointerp.autointerp_file import AutointerpFile, SaebenchAutointerpConfig
from hsae.eval.autointerp.config import AutointerpConfig, JudgeConfig
from hsae.eval.autointerp.cost import Cost, estimate_cost
from hsae.eval.autointerp.interpretation import interpret_all, measures
from hsae.eval.autointerp.judge import Judge, Prices
from hsae.eval.autointerp.windows import Case, Sampler
from hsae.eval.harness.evaluation import Evaluation, Result, cached_method
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.options import Options
from hsae.eval.harness.result_files import hsae_version
from hsae.eval.harness.tables import Table
from hsae.eval.harness.targets import Target
from hsae.train.config.checked import checked
from hsae.train.config.plan import Plan


class AutointerpOptions(Options):
    """Options of `hsae eval autointerp`: who is asked, and what that may cost."""

    whole: bool = Field(
        default=False, description="Of a run only all levels together (of a stack level 1), not each level too."
    )
    judge: str | None = Field(
        default=None,
        description="Chat model; default autointerp.judge.model.",
        json_schema_extra={"metavar": "MODEL", "envvar": "HSAE_JUDGE_MODEL"},
    )
    base_url: str | None = Field(
        default=None,
        description=("OpenAI-compatible API; default autointerp.judge.base_url. Its key is read from OPENAI_API_KEY."),
        json_schema_extra={"metavar": "URL", "envvar": "OPENAI_BASE_URL"},
    )
    price_in: float | None = Field(
        default=None, ge=0, description="Price of a million input tokens.", json_schema_extra={"metavar": "X"}
    )
    price_out: float | None = Field(
        default=None, ge=0, description="Price of a million output tokens.", json_schema_extra={"metavar": "X"}
    )
    max_cost: float | None = Field(
        default=None,
        ge=0,
        description="Spend no more than this; then no question is asked here.",
        json_schema_extra={"metavar": "X"},
    )
    yes: bool = Field(default=False, description="Start without asking.", json_schema_extra={"flags": ["--yes", "-y"]})
    dry_run: bool = Field(default=False, description="Show what would be asked and what it costs.")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.yes and self.dry_run:
            raise ValueError("--yes and --dry-run exclude each other")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("--price-in and --price-out go together")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("--max-cost needs prices: --price-in and --price-out, for a million tokens each")
        return self

    @property
    def prices(self) -> Prices | None:
        """What tokens cost, if that is known."""
        if self.price_in is None or self.price_out is None:
            return None
        return Prices(input=self.price_in, output=self.price_out)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The latents of a target that will be explained, with their windows."""

    cases: list[Case]
    alive: int
    dead: int
    too_few: list[int]
    """Chosen latents that fire in too few places for their windows."""


class Autointerp(Evaluation[ActivationStore, Target]):
    """Whether a chat model can explain latents, and predict from its explanations where they are active."""

    name = "autointerp"
    file_kind = AutointerpFile
    options_kind = AutointerpOptions
    config_kind = AutointerpConfig
    over = "latents"
    reads_splits = ("autointerp",)
    shares_passes = True
    headlines: ClassVar[dict[str, str]] = {
        "balanced": "balanced_accuracy",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
    }

    def __init__(
        self,
        store: ActivationStore,
        options: AutointerpOptions | None = None,
        config: AutointerpConfig | None = None,
        *,
        device: str = "cpu",
        listener: Listener = SILENT,
        lm: LanguageModel | None = None,
    ) -> None:
        """Raises UserError if the tokenizer, the settings or the address of the judge can't be used."""
        super().__init__(store, options, config, device=device, listener=listener, lm=lm)
        chosen = {"model": self.options.judge, "base_url": self.options.base_url}
        judge = self.config.judge.model_dump() | {key: value for key, value in chosen.items() if value is not None}
        judge_config = checked("the judge", "autointerp.judge", JudgeConfig, judge)
        self.config = self.config.model_copy(update={"judge": judge_config})
        width = 2 * self.config.buffer + 1
        if store.context < width:
            raise UserError(f"rows of {store.context} tokens hold no window of {width}; lower autointerp.buffer")
        self.tokenizer = lm.tokenizer if lm else load_tokenizer(at_commit(store.spec.model, store.header.model_commit))
        check_tokenizer(store.root, store.header, self.tokenizer)
        self.judge = Judge(
            judge_config,
            store.root.parent / "answers",
            lambda text: len(self.tokenizer(text, verbose=False).input_ids),
            prices=self.options.prices,
            max_cost=self.options.max_cost,
            is_named=self.options.base_url is not None,
        )

    @classmethod
    def of_plan(
        cls, plan: Plan, options: Options | None = None, *, device: str = "cpu", listener: Listener = SILENT
    ) -> Self:
        """The evaluation as a plan describes it; an address that overrides the plan's was named by the user."""
        options = options or AutointerpOptions()
        is_named = any("judge.base_url" in override.partition("=")[0] for override in plan.overrides)
        if is_named and getattr(options, "base_url", None) is None:
            options = options.model_copy(update={"base_url": plan.table(AutointerpConfig).judge.base_url})
        return super().of_plan(plan, options, device=device, listener=listener)

    @classmethod
    def packages(cls, options: Options) -> tuple[tuple[str, str, str], ...]:
        """The judge is asked by OpenAI's client."""
        return (("openai", "openai", "autointerp"),)

    @classmethod
    def open_store(cls, plan: Plan) -> ActivationStore:
        """The evaluation store, or one of text of its own."""
        return ActivationStore.of(plan.store("autointerp"), plan.cache.dir)

    def inputs(self, target: Target) -> dict[str, Any]:
        """All that a result depends on."""
        not_inputs = {"judge": {"concurrency", "timeout_s", "retries", "malformed_share"}}
        return {**super().inputs(target), "autointerp": self.config.model_dump(mode="json", exclude=not_inputs)}

    # --- before the judge is asked ---

    def begin(self, targets: Sequence[Target]) -> bool:
        """Draw windows, say what is still to be asked, and agree on the cost. Raises UserError if it is too high."""
        for target in targets:
            self.listener.status(f"{self.name}: {target.label}: drawing windows")
            self.sample(target)
        if targets:
            cases = [case for target in targets for case in self.sample(target).cases]
            cost = estimate_cost(cases, self.judge, self.config)
            self.listener.say(cost.describe(self.judge))
            if cost.requests and not self.options.dry_run:
                self._agree(cost)
        return not self.options.dry_run

    def _agree(self, cost: Cost) -> None:
        """Return only if the questions may be asked. Raises UserError otherwise."""
        prices, most = self.options.prices, self.options.max_cost
        if prices is not None and most is not None:
            if (money := cost.money(prices)) > most:
                raise UserError(
                    f"this may cost {money:.4f}, more than --max-cost {most:g}; "
                    "lower autointerp.n_latents, or name fewer runs"
                )
        elif not self.options.yes and not self.listener.confirm("Start?"):
            raise UserError(
                f"{cost.requests:,} requests would be sent to {self.config.judge.base_url}; "
                "say --yes, or set a limit with --max-cost"
            )

    @cached_method
    def sample(self, target: Target) -> Sample:
        """Choose latents of a target and draw their windows."""
        sampler = self.sampler(target.hook)
        fired_F = sampler.count_fired(target.view)
        alive = (fired_F > self.config.dead_latent_threshold).nonzero()[:, 0].tolist()
        chosen = Random(self.config.seed).sample(alive, min(self.config.n_latents, len(alive)))
        cases = dict(sampler.cases(target.view, chosen, fired_F))
        return Sample(
            cases=[case for case in cases.values() if case is not None],
            alive=len(alive),
            dead=target.view.d_sae - len(alive),
            too_few=[latent for latent, case in cases.items() if case is None],
        )

    @cached_method
    def sampler(self, hook: str) -> Sampler:
        """Draws windows at a hook."""
        return Sampler(self.store, hook, self.tokenizer, self.config, self.device)

    # --- asking and scoring ---

    def measure_all(self, targets: Sequence[Target]) -> Iterator[dict[str, Any]]:
        """The results in order."""
        with self.judge:
            for target in targets:
                yield self.measure(target)

    def measure(self, target: Target) -> dict[str, Any]:
        """Ask the judge and score its answers. Raises UserError if it fails, or answers in another form too often."""
        sample, total = self.sample(target), len(self.sample(target).cases)

        def progress(done: int) -> None:
            self.listener.progress(f"{target.label}: latents", done, total)

        interpretations = interpret_all(sample.cases, self.judge, self.config, progress)
        scored = [item for item in interpretations if item.predicted is not None]
        scores = [item.score for item in scored]
        answers = [answer for item in interpretations for answer in item.answers]
        return AutointerpFile.content(
            eval_config=self._saebench_config(),
            metrics={
                "autointerp": {
                    "autointerp_score": sum(scores) / len(scores) if scores else None,
                    "autointerp_std_dev": stdev(scores) if len(scores) > 1 else None,
                }
            },
            details=[],
            sae_config={**target.view.config, "dtype": "float32", "device": self.device},
            unstructured={str(item.case.latent): item.saebench_entry() for item in scored},
            hsae={
                "version": hsae_version(),
                "measures": measures(scored),
                "interval": "95 % bootstrap interval over latents",
                "lm_passes": 0,
                "latents": {
                    "scored": len(scored),
                    "alive": sample.alive,
                    "dead": sample.dead,
                    "too_few_examples": sample.too_few,
                    "malformed": [item.case.latent for item in interpretations if item.predicted is None],
                },
                "windows": {str(item.case.latent): item.windows_entry() for item in scored},
                "judge": {
                    "model": self.config.judge.model,
                    "base_url": self.config.judge.base_url,
                    "answers": len(answers),
                    "malformed_answers": sum(item.malformed for item in interpretations),
                    "input_tokens": sum(answer.input_tokens for answer in answers),
                    "output_tokens": sum(answer.output_tokens for answer in answers),
                },
                "store": {"name": self.store.spec.name, "rows": self.sampler(target.hook).rows},
                "inputs": self.inputs(target),
            },
            release=target.release,
            sae_id=target.sae_id,
        )

    def _saebench_config(self) -> SaebenchAutointerpConfig:
        """SAEBench's `eval_config`."""
        config, spec = self.config, self.store.spec
        return SaebenchAutointerpConfig(
            model_name=spec.model.id,
            override_latents=None,
            random_seed=config.seed,
            dataset_name=spec.corpus.corpus,
            llm_context_size=spec.context,
            llm_batch_size=spec.batch_rows,
            llm_dtype=spec.model.dtype,
            no_overlap=True,
            total_tokens=min(self.store.rows * spec.context, config.total_tokens),
            scoring=True,
            use_demos_in_explanation=True,
            **config.model_dump(exclude={"text", "total_tokens", "seed", "judge"}),
        )

    # --- what people see ---

    def tables(self, results: Sequence[Result[Target]]) -> list[Table]:
        """SAEBench's score, the headline measures, and what became of the latents."""
        table = Table(self.title(results), ("SAE", "SAEBench", *self.headlines, "latents"))
        for result in results:
            score = result.content["eval_result_metrics"]["autointerp"]["autointerp_score"]
            cells = [self.cell(result.measures[name]) for name in self.headlines.values()]
            latents, judge = result.content["hsae"]["latents"], result.content["hsae"]["judge"]
            table.add(result.label, "undefined" if score is None else f"{score:.3f}", *cells, str(latents["scored"]))
            facts = [f"{latents['alive']:,} latents alive, {latents['dead']:,} dead"]
            if latents["too_few_examples"]:
                facts.append(f"{len(latents['too_few_examples'])} fire in too few places")
            if judge["malformed_answers"]:
                left_out = f"{len(latents['malformed'])} latents left out for it"
                facts.append(f"{judge['malformed_answers']} answers not as asked, {left_out}")
            table.notes.append(f"{result.label}: {'; '.join(facts)}")
        return [table]

    def notes(self, results: Sequence[Result[Target]]) -> list[str]:
        """What was sent and spent, and which SAEs can't be told apart."""
        judge, notes = self.judge, super().notes(results)
        if all(result.is_reused for result in results):
            return notes
        unread = f", {judge.unread} replies held no answer" if judge.unread else ""
        spent = f", {judge.spent:.4f} spent" if judge.prices else ""
        return [f"{judge.requests:,} requests sent{unread}{spent}", *notes]
