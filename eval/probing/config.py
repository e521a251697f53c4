"""What the `[suite]` table of a plan comes to."""

from hsae.cache.suites.specs import ProbeSpec, Suite, SuiteConfig
from hsae.train.config.plan import Plan


def probe_spec(plan: Plan, suite: Suite) -> ProbeSpec:
    """The probe store of one evaluation of a plan."""
    return ProbeSpec(suite=suite, model=plan.model, hooks=plan.hook.names, tasks=plan.table(SuiteConfig))
