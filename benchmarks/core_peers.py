"""Core of SAEBench and of hsae, whole processes, on Gemma-3-270M: one SAE and six.

    python benchmarks/core_peers.py [--batches 1 16] [--activations FOLDER] [--into docs/results/core_peers.json]

Both evaluate the same random SAEs of 1,024 latents on as much of the same text. hsae's evaluation store is built first,
once, and its seconds are told apart; SAEBench has the same model from the same folder, in the environment that peers.py
makes (--venv). Prints, last, one JSON document.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HOOK = "blocks.12.hook_resid_post"


def make_saes(folder: Path, count: int) -> list[Path]:
    """Folders, in SAELens's format, of random SAEs with unit directions."""
    from hsae.train.model.sae import SAE
    from hsae.train.model.saelens_folder import save

    folders, width, latents = [], 640, 1024
    for number in range(count):
        directions = torch.nn.functional.normalize(torch.randn(latents, width), dim=1)
        biases = {"b_enc": torch.zeros(latents), "b_dec": torch.zeros(width)}
        settings = {"model_name": "gemma-3-270m", "hook_name": HOOK, "context_size": 128, "prepend_bos": True}
        weights = {"W_enc": directions.T.contiguous(), "W_dec": directions}
        sae = SAE(name=f"sae{number}", architecture="standard", metadata=settings, **weights, **biases)
        folders.append(folder / sae.name)
        save(sae, folders[-1])
    return folders


def seconds(command: list[str]) -> float:
    """Seconds of a process. Raises RuntimeError with what it says if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command[:3]}: {(done.stderr or done.stdout)[-2000:]}")
    return time.perf_counter() - began


def saebench(model: Path, text: Path, folders: list[Path], batches: tuple[int, int], out: Path) -> None:
    """In the peers' environment: SAEBench's core, with the model from a folder."""
    from sae_bench.evals.core import main as core
    from sae_lens import SAE
    from transformer_lens import HookedTransformer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load = HookedTransformer.from_pretrained_no_processing

    def load_here(name: str, **settings: Any) -> Any:
        language = AutoModelForCausalLM.from_pretrained(model, dtype=settings["dtype"])
        return load(name, hf_model=language, tokenizer=AutoTokenizer.from_pretrained(model), **settings)

    HookedTransformer.from_pretrained_no_processing = load_here
    results = core.multiple_evals(
        [(folder.name, SAE.load_from_disk(folder)) for folder in folders],
        n_eval_reconstruction_batches=batches[0],
        n_eval_sparsity_variance_batches=batches[1],
        eval_batch_size_prompts=16,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=str(text),
        context_size=128,
        output_folder=str(out),
        dtype="bfloat16",
        device="cpu",
        force_rerun=True,
    )
    if len(results) != len(folders):  # it goes on after an error
        sys.exit(f"SAEBench evaluated {len(results)} of {len(folders)} SAEs")


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds of both."""
    import hsae
    from hsae.cache.language_model.sources import model_folder
    from hsae.cache.text.corpora import open_corpus

    sizes = ("reconstruction", "variance")
    values = [f"cache.eval.batches_{name}={count}" for name, count in zip(sizes, options.batches, strict=True)]
    values += [f"cache.dir={options.activations or scratch / 'activations'}"]
    plan = hsae.load_plan("gemma-3-270m", values)
    began = time.perf_counter()
    hsae.build(plan, split="eval", device="cpu", progress=False)
    found: dict[str, Any] = {"build_s": time.perf_counter() - began, "batches": options.batches}
    text = scratch / "text"
    text.mkdir()
    with (text / "train.jsonl").open("w") as file:
        for document in open_corpus(plan.store("eval").corpus, "eval").open():
            file.write(json.dumps({"text": document}) + "\n")
    model = model_folder(plan.model)
    folders = make_saes(scratch / "saes", max(options.saes))
    code = "from hsae.cli.main import main; main()"
    settings = [part for value in values for part in ("--set", value)]
    for count in options.saes:
        named = [part for folder in folders[:count] for part in ("--sae", str(folder))]
        ours = [sys.executable, "-c", code, "eval", "core", *named, "--plan", "gemma-3-270m", *settings, "--force"]
        theirs = [str(options.venv / "bin/python"), __file__, "--saebench", str(model), str(text)]
        theirs += [str(scratch / "theirs"), *map(str, options.batches), *map(str, folders[:count])]
        found[f"hsae_{count}_s"] = seconds([*ours, "--out", str(scratch / "ours"), "--device", "cpu"])
        found[f"saebench_{count}_s"] = seconds(theirs)
        found[f"ratio_{count}"] = found[f"saebench_{count}_s"] / found[f"hsae_{count}_s"]
        print(f"{count} SAE(s): hsae {found[f'hsae_{count}_s']:.1f} s, SAEBench {found[f'saebench_{count}_s']:.1f} s")
    return found


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--saebench"]:
        model, text, out, first, second, *folders = sys.argv[2:]
        return saebench(Path(model), Path(text), [*map(Path, folders)], (int(first), int(second)), Path(out))
    from peers import machine, peers_environment

    from hsae.cache.files import home

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs=2, default=[1, 16], help="of reconstruction and of variance")
    parser.add_argument("--saes", type=int, nargs="+", default=[1, 6], help="how many in a process")
    parser.add_argument("--activations", type=Path, help="folder of the evaluation store; default a temporary one")
    parser.add_argument("--venv", type=Path, default=home() / "peers", help="environment of the peers")
    parser.add_argument("--into", type=Path, help="file for the JSON document")
    options = parser.parse_args()
    _, absent = peers_environment(options.venv)
    if "sae-bench" in absent:
        parser.error(f"sae-bench is absent: {absent['sae-bench']}")
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    document = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), **found}
    if options.into:
        options.into.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
