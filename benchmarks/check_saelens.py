"""Load SAELens folders with sae-lens itself and with hsae, and compare what they give.

Needs an environment with sae-lens (hsae does not depend on it). From a checkout, after `make quickstart`:

    python -m venv /tmp/peer && /tmp/peer/bin/pip install sae-lens
    PYTHONPATH=.view /tmp/peer/bin/python benchmarks/check_saelens.py quickstart/runs/*/saelens/*

Prints one line a folder and, last, one JSON document. Status 1 if any output differs.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import SAE

from hsae.train.model import saelens_folder


def check(folder: Path) -> dict[str, object]:
    """Largest differences between the two on 257 random vectors, large enough that latents fire."""
    ours, theirs = saelens_folder.load(folder), SAE.load_from_disk(str(folder))
    noise = torch.randn(257, ours.d_in, generator=torch.Generator().manual_seed(0))
    scale = float(ours.b_dec.norm()) / ours.d_in**0.5 + 1
    with torch.no_grad():
        x = ours.b_dec + scale * noise
        while (codes := ours.encode(x)).count_nonzero() < len(x) and scale < 1e9:
            scale *= 2
            x = ours.b_dec + scale * noise
        code_difference = (codes - theirs.encode(x)).abs().max().item()
        output_difference = (ours.decode(codes) - theirs(x)).abs().max().item()
    return {
        "folder": str(folder),
        "architecture": ours.architecture,
        "d_in": ours.d_in,
        "d_sae": ours.d_sae,
        "active": (codes > 0).sum(1).float().mean().item(),
        "code_difference": code_difference,
        "output_difference": output_difference,
    }


def main() -> None:
    results = [check(Path(folder)) for folder in sys.argv[1:]]
    for result in results:
        print(
            "{folder}: {architecture} {d_in} -> {d_sae}, L0 {active:.1f}, differences {code_difference:g} "
            "{output_difference:g}".format(**result)
        )
    print(json.dumps({"sae_lens": version("sae-lens"), "torch": torch.__version__, "results": results}))
    sys.exit(any(result["code_difference"] or result["output_difference"] for result in results))


if __name__ == "__main__":
    main()
