"""SAE definitions, losses, the run plan and the training loop."""

from typing import TYPE_CHECKING

from hsae._lazy import lazy_names

if TYPE_CHECKING:
    from hsae.train.config.checked import PlanError as PlanError
    from hsae.train.config.plan import Plan as Plan
    from hsae.train.config.plan import load_plan as load_plan
    from hsae.train.config.plan import packaged_plans as packaged_plans
    from hsae.train.config.run_config import RunConfig as RunConfig
    from hsae.train.fitting import fit as fit
    from hsae.train.model.hierarchical_sae import HierarchicalSAE as HierarchicalSAE
    from hsae.train.model.model_files import load as load
    from hsae.train.model.sae import SAE as SAE
    from hsae.train.model.views import View as View
    from hsae.train.runs.planned_runs import stop_on_signals as stop_on_signals
    from hsae.train.runs.planned_runs import train_runs as train_runs
    from hsae.train.training.listener import Listener as Listener
    from hsae.train.training.listener import ProgressBars as ProgressBars
    from hsae.train.training.listener import Result as Result
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
