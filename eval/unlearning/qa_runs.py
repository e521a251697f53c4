"""`hsae eval unlearning --qa` for the runs of a plan: `runs/<N>/eval/unlearning_qa.json`, made anew when an input changes."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from hsae.cache.language_model.lm import LanguageModel, load_tokenizer, pinned
from hsae.cache.language_model.provenance import check_model
from hsae.eval.harness.result_files import write_result
from hsae.eval.unlearning import qa, selection
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.intervention import of_model
from hsae.eval.unlearning.passes import Rows
from hsae.eval.unlearning.questions import Question, check_template
from hsae.eval.unlearning.runs import Unlearned, check_trained, found_at, inputs_of, open_texts, versions
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model.model_files import load_model

FILE = "unlearning_qa.json"
Progress = Callable[[str, int, int], None]


def check(plan: Plan) -> dict[Side, list[Question]]:
    """The questions, once everything that can be missing is there. Raises UserError before any compute."""
    check_template(load_tokenizer(pinned(plan.model, plan.cache.dir)), plan.model.id)
    sets = qa.read_sets(plan.table(UnlearningConfig).qa)
    open_texts(plan)
    return sets


def evaluate_runs(
    runs: Sequence[tuple[Plan, RunConfig]],
    sets: dict[Side, list[Question]],
    load: Callable[[], LanguageModel],
    *,
    force: bool = False,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Unlearned]:
    """The score of every level, and of all levels together, of each run. `sets` are from `check`; `say` is told which earlier results give way."""
    plan, config = runs[0][0], runs[0][0].table(UnlearningConfig).qa
    stores, hook = open_texts(plan), plan.hook.names[0]
    check_trained(runs, stores["forget"])
    done: list[Unlearned] = []
    exam: qa.Exam | None = None
    for seeded, run in runs:
        folder = seeded.run_dir(run) / "eval"
        asked = hashlib.sha256(config.model_dump_json(exclude={"forget", "retain", "revisions"}).encode()).hexdigest()[
            :16
        ]
        inputs = {**inputs_of(seeded, run, stores), "config": asked, "questions": qa.digest(sets)}
        result = None if force else found_at(folder / FILE, inputs, seeded.label(run), say)
        reused = result is not None
        if result is None:
            if exam is None:
                language = load()
                for store in stores.values():
                    check_model(store.root, store.header, language)
                exam = qa.Exam.set(language, hook, sets, config, progress)
            model = load_model(seeded.run_dir(run) / "model")
            dictionary = of_model(model, device)
            density = {
                side: selection.densities(dictionary, Rows.all_of(stores[side], hook).batches())[0] for side in SIDES
            }
            levels = range(1, len(dictionary.widths) + 1)
            arms = {f"level{number}": list(dictionary.level(number)) for number in levels if len(levels) > 1}
            if model.is_nested:
                arms = {"sae": list(range(sum(dictionary.widths))), **arms}
            label = seeded.label(run)
            scores: dict[str, Any] = {}
            for name, among in arms.items():

                def told(count: int, total: int, text: str = f"{label}: {name}") -> None:
                    progress(text, count, total)

                scores[name] = qa.evaluate(dictionary, among, density, exam, config, told)
            result = {
                "eval_type_id": "unlearning",
                "run": {"plan": plan.name, "number": run.number, "name": run.name, "seed": seeded.train.seed},
                "arms": scores,
                "questions": {side: {"given": exam.given[side], "answered": len(exam.asked[side])} for side in SIDES},
                "passes": {"run": exam.passes, "spared": exam.spared},
                "inputs": inputs,
                "versions": versions(),
            }
            write_result(folder / FILE, result, allow_nan=True)
        done.append(Unlearned(plan=seeded, run=run, result=result, reused=reused))
    return done
