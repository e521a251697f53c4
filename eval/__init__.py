"""Evaluations of SAEs, SAEBench-compatible results, and the report."""

from typing import TYPE_CHECKING

from hsae._lazy import lazy_names

if TYPE_CHECKING:
    from hsae.eval.ablation.ablations import run_ablations as run_ablations
    from hsae.eval.core.core import CoreOptions as CoreOptions
    from hsae.eval.core.core_result import CoreResult as CoreResult
    from hsae.eval.harness.evaluate_all import evaluate_all as evaluate_all
    from hsae.eval.harness.evaluation import Evaluation as Evaluation
    from hsae.eval.harness.evaluation import Result as Result
    from hsae.eval.harness.evaluation import evaluate as evaluate
    from hsae.eval.harness.evaluation import evaluate_plan as evaluate_plan
    from hsae.eval.harness.options import Options as Options
    from hsae.eval.harness.targets import Selection as Selection
    from hsae.eval.pipeline import run_quickstart as run_quickstart
    from hsae.eval.report.page import write_report as write_report
    from hsae.eval.sharing.share import pull as pull
    from hsae.eval.sharing.share import push as push
    from hsae.eval.synthetic.synthetic_evaluation import evaluate_synthetic as evaluate_synthetic
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
