"""Metrics, SAEBench-compatible results and the report."""

from typing import TYPE_CHECKING

from hsae._lazy import lazy_names

if TYPE_CHECKING:
    from hsae.eval.core.core import CoreOptions as CoreOptions
    from hsae.eval.core.core_result import CoreResult as CoreResult
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "CoreOptions": "hsae.eval.core.core",
            "CoreResult": "hsae.eval.core.core_result",
        },
    )
