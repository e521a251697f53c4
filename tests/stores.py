"""The small store of the tiny Gemma-2 that many tests build, and what a folder holds."""

import hashlib

from places import GOLDEN

from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.format.spec import StoreSpec

HOOK = "blocks.2.hook_resid_post"


def spec(**changes):
    values = {
        "split": "eval", "model": ModelConfig(id=str(GOLDEN / "model"), dtype="bfloat16"), "hooks": (HOOK,),
        "corpus": CorpusConfig(corpus="python-docs", last_document=30), "context": 21, "prepend_bos": True,
        "batch_rows": 5,
        "chunk_mib": 0.02, "codec": "mappable", "rows": 43, "clean_rows": 15,
    }  # fmt: skip
    return StoreSpec(**{**values, **changes})


def contents(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }
