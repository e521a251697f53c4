"""The signature test: does what was learned of one topic carry over to its sibling?

Latents are chosen on half of the documents of a topic, and the loss added is measured on its other documents, on the
sibling topic and on retain text, both ways.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from hsae.eval.harness.estimates import estimate_of
from hsae.eval.unlearning import selection
from hsae.eval.unlearning.arms import Setting, sae_arms
from hsae.eval.unlearning.intervention import Dictionary, Intervention
from hsae.eval.unlearning.loss_meter import Change, LossMeter
from hsae.eval.unlearning.pareto import DocumentBootstrap
from hsae.eval.unlearning.rows import Rows
from hsae.eval.unlearning.sweep import Sweep, digest_of

ROWS = 16  # of each text, at most


def evaluate_signature(sweep: Sweep) -> dict[str, Any]:
    """`signature` of the result file."""
    select = sweep.texts.rows["forget"]["select"]
    everything = Rows.all_of(select.store, select.hook)
    topics = choose_topics(everything, sweep.texts.config.topics)
    if len(topics) < 2:
        return {"explanation": "the forget text has no two topics with at least two documents each", "pairs": []}
    pairs = []
    for number, (own, sibling) in enumerate((topics, topics[::-1])):
        sweep.progress(f"signature {own} to {sibling}", number, 2)
        pairs.append(_carry_over(sweep, everything, own, sibling))
    return {"explanation": None, "pairs": pairs}


def choose_topics(rows: Rows, wanted: Sequence[str]) -> list[str]:
    """The two topics of the test: those wanted, or those with the most documents (two at least); or fewer."""
    documents: dict[str, set[int]] = {}
    for document, topic in zip(rows.documents, rows.topics, strict=True):
        if topic is not None:
            documents.setdefault(topic, set()).add(document)
    usable = [topic for topic, numbers in documents.items() if len(numbers) >= 2]
    if wanted:
        return [topic for topic in wanted if topic in usable]
    return sorted(usable, key=lambda topic: (-len(documents[topic]), topic))[:2]


def _carry_over(sweep: Sweep, everything: Rows, own: str, sibling: str) -> dict[str, Any]:
    """Latents selected on one topic (against retain text), tested on other documents of it and on the sibling."""
    texts, config, dictionary = sweep.texts, sweep.texts.config, sweep.dictionary
    own_rows = _of_topic(everything, own)
    selecting = set(list(dict.fromkeys(own_rows.documents))[::2])
    is_selecting = [document in selecting for document in own_rows.documents]
    select = own_rows.at(place for place, chosen in enumerate(is_selecting) if chosen)
    tests = {
        "own": own_rows.at(place for place, chosen in enumerate(is_selecting) if not chosen),
        "sibling": _of_topic(everything, sibling),
        "retain": texts.rows["retain"]["tune"],
    }
    tests = {name: rows.at(range(min(ROWS, len(rows.numbers)))) for name, rows in tests.items()}
    profile = selection.profile(dictionary, select.batches(), texts.rows["retain"]["select"].batches())
    multiplier = config.multipliers[len(config.multipliers) // 2]
    setting = Setting(latents=max(config.latents), multiplier=multiplier, quantile=None)
    meters = {name: texts.meter_on(rows) for name, rows in tests.items()}
    bootstraps = {
        name: DocumentBootstrap(rows.documents, config.resamples, config.seed + place)
        for place, (name, rows) in enumerate(tests.items())
    }
    results = {}
    for arm in sae_arms(sweep.model, dictionary, profile, config):
        latents = arm.chosen[setting.latents]
        if (arm.control_of is not None and arm.name != "descend-permuted") or not latents:
            continue
        clamp = Intervention(
            latents=latents, values=tuple(-multiplier * mean for mean in arm.profile.mean_F[list(latents)].tolist())
        )
        means = {}
        for name, meter in meters.items():
            key = f"signature/{digest_of([own, sibling, name, clamp.latents, clamp.values])}"
            change = sweep.changes.get(key, partial(_measure, meter, dictionary, clamp))
            means[name] = bootstraps[name].mean(change.loss_R, meter.counts)
        means["carried"] = means["sibling"] / means["own"]
        intervals = {name: estimate_of(values_S).to_dict() for name, values_S in means.items()}
        results[arm.name] = {**intervals, "clamped": len(latents)}
    return {
        "selected_on": own,
        "tested_on": sibling,
        "documents": {name: len(set(rows.documents)) for name, rows in [("selecting", select), *tests.items()]},
        "setting": asdict(setting),
        "arms": results,
    }


def _of_topic(rows: Rows, wanted: str) -> Rows:
    return rows.at(place for place, topic in enumerate(rows.topics) if topic == wanted)


def _measure(meter: LossMeter, dictionary: Dictionary, clamp: Intervention) -> Change:
    return meter.measure(clamp, meter.rows.activations(dictionary, clamp.latents), dictionary.directions_FD)
