"""What the tests of commands on the tiny model share."""

import csv
import json
import os
import random

import torch
from typer.testing import CliRunner

from hsae.cli.main import app
from hsae.train.model.sae import SAE

LAYER, HOOK, D = 2, "blocks.2.hook_resid_post", 48
TOPICS = {
    "lists": ["list", "item", "sequence", "index", "append"],
    "files": ["file", "path", "open", "read", "directory"],
}
TASKS = """
[[task]]
name = "topic"
train = "train.jsonl"
test = "test.jsonl"
text = "body"
label = "topic"
attribute = "form"
attribute_values = ["call", "sentence"]
pairs = [["lists", "files"]]
classes = ["lists", "files", "numbers"]
"""
ENTITIES = [
    "list",
    "string",
    "file",
    "module",
    "class",
    "method",
    "object",
    "value",
    "integer",
    "number",
    "type",
    "name",
    "error",
    "path",
    "thread",
    "socket",
    "tuple",
    "dict",
    "code",
    "event",
]
TEMPLATES = {"Base": "class {entity}(", "Place": "the {entity} to the", "Sort": "The {entity} is a"}


def settings(overrides):
    return ["--plan", "tiny", "--device", "cpu", *(part for value in overrides for part in ("--set", value))]


def invoke(*arguments):
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": os.environ.get("COLUMNS", "160")}
    )


def an_sae(latents, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D, latents, generator=generator)
    W /= W.norm(dim=0)
    parts = {"W_enc": W, "W_dec": W.T.clone(), "b_enc": torch.zeros(latents), "b_dec": torch.zeros(D)}
    return SAE(**({"name": "sae", "architecture": "standard", "metadata": {"hook_name": HOOK}} | parts | changes))


def write_texts(folder):
    """Three topics in two forms: 12 training and 7 test texts of each combination."""
    mixed = random.Random(5)
    words = {**TOPICS, "numbers": ["integer", "float", "sum", "number", "complex"]}
    for split, count in (("train", 12), ("test", 7)):
        lines = []
        for number in range(count):
            for topic, held in words.items():
                one, two = mixed.sample(held, 2)
                forms = {
                    "call": f"{one}.{two}({number}) = {one}",
                    "sentence": f"The {one} and the {two} {number} are there.",
                }
                lines += [{"body": text, "topic": topic, "form": form} for form, text in forms.items()]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "tasks.toml").write_text(TASKS)


def greedy(language, ids, count, change=None):
    """Tokens by full forward passes, each with a hook that changes the residual after the layer."""
    ids, layer = list(ids), language.model.get_decoder().layers[LAYER]
    handle = layer.register_forward_hook(lambda module, args, output: change(output)) if change else None
    try:
        for _ in range(count):
            ids.append(int(language.logits(torch.tensor([ids]))[0, -1].argmax()))
    finally:
        if handle:
            handle.remove()
    return ids[-count:]


def write_entities(folder, language):
    """`words.toml`: entities whose labels are what the model says, but for one that is wrong."""
    rows = []
    for word in ENTITIES:
        row = {"word": word}
        for attribute, template in TEMPLATES.items():
            ids = language.tokenizer(template.format(entity=word)).input_ids
            said = language.tokenizer.decode(greedy(language, ids, 4)).strip().split()
            row[attribute] = said[0] if said and '"' not in said[0] else ""
        rows.append(row)
    assert rows[2]["Place"]
    rows[2]["Place"] = "nothing like it"
    with (folder / "words.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["word", *TEMPLATES])
        writer.writeheader()
        writer.writerows(rows)
    prompts = "\n".join(f"{key} = {json.dumps([text])}" for key, text in TEMPLATES.items())
    (folder / "words.toml").write_text(
        f'[[entity]]\nname = "word"\nfile = "words.csv"\ncolumn = "word"\n[entity.prompts]\n{prompts}\n'
    )
