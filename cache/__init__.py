"""Activation stores: everything that touches bytes on disk or the language model."""

from typing import TYPE_CHECKING

from hsae._lazy import lazy_names

if TYPE_CHECKING:
    from hsae.cache.building.copying import copy as copy
    from hsae.cache.building.in_memory import build_in_memory as build_in_memory
    from hsae.cache.building.repair import repair as repair
    from hsae.cache.building.verification import verify as verify
    from hsae.cache.errors import CorpusError as CorpusError
    from hsae.cache.errors import ModelError as ModelError
    from hsae.cache.errors import NotApplicable as NotApplicable
    from hsae.cache.errors import StoreError as StoreError
    from hsae.cache.errors import UserError as UserError
    from hsae.cache.format.spec import StoreSpec as StoreSpec
    from hsae.cache.language_model.lm import LanguageModel as LanguageModel
    from hsae.cache.progress import Step as Step
    from hsae.cache.reading.store import ActivationStore as ActivationStore
    from hsae.cache.reading.store import HookStatistics as HookStatistics
    from hsae.cache.reading.token_stream import TokenStream as TokenStream
    from hsae.cache.storage.server import serve as serve
    from hsae.cache.suites.catalogue import list_stores as list_stores
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
