"""The card of a run on the hub: how to load it, what it scores, how it was trained."""

from typing import Any

import tomli_w

from hsae.eval.report import tables
from hsae.eval.report.run_section import RunSection
from hsae.train.run_record import VIEW

CURVES = "training.png"
TAGS = ["hsae", "sparse-autoencoder", "hierarchical-sparse-autoencoder", "mechanistic-interpretability"]


def model_card(section: RunSection, record: dict[str, Any], repository: str) -> str:
    """README.md of a run's repository; `record` is run.json as it is sent."""
    views = sorted({part for name in record["files"] if VIEW.fullmatch(part := name.split("/")[1])})
    first = "sae" if "sae" in views else views[0]
    digests = [f"{name.removesuffix('_digest')} `{value[:16]}`" for name, value in record["content"].items()]
    versions = [f"{name} {value}" for name, value in record["versions"].items()]
    parts = [
        _front(record),
        f"# {repository.rpartition('/')[2]}",
        f"Sparse autoencoder of [{record['model']}](https://huggingface.co/{record['model']}) at "
        f"`{record['hook']}` ({record['d_in']}-dimensional): {section.about}. "
        f"Trained on {record['config']['tokens']:,} tokens as run {section.label} of plan {record['plan']}.",
        "## Load it",
        f"```python\n# pip install hsae\nimport hsae\n\nmodel = hsae.load('{repository.rpartition('/')[2]}')"
        f"  # after: hsae pull {repository} {repository.rpartition('/')[2]}\n```",
        f"```python\n# pip install sae-lens\nfrom sae_lens import SAE\n\n"
        f'sae = SAE.from_pretrained("{repository}", "saelens/{first}")\n```',
        f"Folders for SAELens: {', '.join(f'`saelens/{view}`' for view in views)}.",
        "## Results",
        _results(section),
        "## Training",
        f"![Training curves]({CURVES})" if section.is_measured else "There is no training log.",
        f"Hardware: {record.get('hardware', 'not recorded')}. Versions: {', '.join(versions)}. "
        f"Made from: {', '.join(digests)}.",
        f"```toml\n{tomli_w.dumps(_without_none({'run': record['config']})).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front(record: dict[str, Any]) -> str:
    """The YAML that the hub reads; values are JSON, which YAML takes as it is."""
    import json

    lines = {"library_name": "saelens", "base_model": record["model"], "tags": TAGS}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in lines.items()), "---"])


def _results(section: RunSection) -> str:
    """Tables of the core evaluation and of composition, as in the report."""
    from hsae.eval.report.composed import markdown as composed_markdown

    if not section.rows:
        return "It was not evaluated."
    text = tables.markdown("", section.rows) + composed_markdown([(section.label, section.composed)])
    return text.removeprefix("# \n\n").replace("\n# ", "\n### ").replace("\n## ", "\n### ").strip()


def _without_none(value: Any) -> Any:
    """The same tables without keys that have no value, which TOML can't say."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
