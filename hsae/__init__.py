"""Hierarchical sparse autoencoders: cache a language model's activations once, then train and evaluate at will.

A plan says which model, which text and which runs:

>>> import hsae
>>> plan = hsae.load_plan("tiny")
>>> plan.runs[3].widths
(57, 31)

Names load their module when they are first used; `hsae.cache`, `hsae.train` and `hsae.eval` have more of them.
"""

from typing import TYPE_CHECKING

from hsae._lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hsae import cache as cache
    from hsae import eval as eval
    from hsae import train as train
    from hsae.cache.errors import UserError as UserError
    from hsae.cache.language_model.lm import LanguageModel as LanguageModel
    from hsae.cache.reading.store import ActivationStore as ActivationStore
    from hsae.eval.contexts import top_contexts as top_contexts
    from hsae.eval.harness.evaluation import evaluate as evaluate
    from hsae.eval.logit_effects import logit_effects as logit_effects
    from hsae.train.config.plan import Plan as Plan
    from hsae.train.config.plan import load_plan as load_plan
    from hsae.train.fitting import fit as fit
    from hsae.train.model.hierarchical_sae import HierarchicalSAE as HierarchicalSAE
    from hsae.train.model.model_files import load as load
    from hsae.train.stores import build as build
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
