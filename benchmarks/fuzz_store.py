"""Fuzzing what a store's reader is given: no bytes in place of metadata or of a chunk may bring out anything but hsae's
own errors.

    pip install atheris
    python benchmarks/fuzz_store.py [CORPUS FOLDER] -max_total_time=600 -timeout=60 -rss_limit_mb=4096

Options are libFuzzer's. Of an input, the first byte picks a store (codec mappable, compact or int8), the second a file
of it, the rest is the file's content. Metadata is put into the store, and everything is read, as training and
evaluation do or (upper half of the first byte) as `hsae cache verify` does; the bytes of a chunk get a right checksum
and are decoded. An error that is none of hsae's stops the run, and the input is kept in a file.
"""

import copy
import importlib.util
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["hsae"]):
    from hsae.cache.building.copying import copy as copy_store
    from hsae.cache.building.verification import verify
    from hsae.cache.errors import UserError
    from hsae.cache.files import crc32c, sealed
    from hsae.cache.format.arrays import ArraySpec
    from hsae.cache.format.chunk_codec import decode_chunk
    from hsae.cache.format.layout import every_array, read_header
    from hsae.cache.reading.store import ActivationStore
    from hsae.cache.reading.token_stream import TokenStream

ROOT = Path(__file__).resolve().parent.parent
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10, 23, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, -(2**63), 0.5, 1e308,
    float("inf"), float("nan"), "", "\0",
    "../../etc", "/etc", "c/0", "float64", "bfloat16", "int8", "compact", "mappable", "eval", "train", "forget",
    "blocks.3.hook_resid_pre", [], {}, [0], [[]],
]  # fmt: skip


class Target:
    """Three small stores, and what is done with an input."""

    def __init__(self, folder: Path) -> None:
        where = importlib.util.spec_from_file_location("conftest", ROOT / "tests/conftest.py")
        assert where is not None and where.loader is not None
        module = importlib.util.module_from_spec(where)
        where.loader.exec_module(module)
        os.environ["HSAE_HOME"] = str(folder / "home")
        self.hook = module.HOOK
        mappable, _ = module.made(folder / "mappable")
        self.roots = [mappable, module.made(folder / "compact")[0], copy_store(mappable, folder / "int8", codec="int8")]
        for root in self.roots:
            rows = read_header(root).spec.rows
            (root / "documents.json").write_text(json.dumps([[number // 2, None] for number in range(rows)]))
        self.metadata = [sorted([*root.rglob("zarr.json"), root / "documents.json"]) for root in self.roots]
        self.arrays: list[list[ArraySpec]] = [every_array(read_header(root)) for root in self.roots]
        self.whole = self.seeds()
        self.done = {"metadata": 0, "chunks": 0, "accepted": 0}

    def file(self, data: bytes) -> tuple[Path, Path | ArraySpec]:
        """(store, metadata file or array) that an input is for."""
        number = data[0] % len(self.roots)
        every: list[Path | ArraySpec] = [*self.metadata[number], *self.arrays[number]]
        return self.roots[number], every[data[1] % len(every)]

    def __call__(self, data: bytes) -> None:
        """Do it; errors that are hsae's own are right."""
        if len(data) < 2:
            return
        root, file = self.file(data)
        content = data[2:]
        try:
            if isinstance(file, ArraySpec):
                self.done["chunks"] += 1
                checked = content + crc32c(content).to_bytes(4, "little")
                assert len(decode_chunk(root, root / "chunk", checked, file)) == file.chunk_bytes
            else:
                self.done["metadata"] += 1
                self.read(root, file, content, checks=data[0] >= 128)
            self.done["accepted"] += 1
        except UserError as error:
            assert str(error)

    def read(self, root: Path, file: Path, content: bytes, *, checks: bool) -> None:
        """Everything that is in a store, with other content in one file."""
        whole = file.read_bytes()
        file.write_bytes(content)
        try:
            if checks:
                verify(root)
                return
            store = ActivationStore.open(root, require_complete=False)
            store.tokens(0, store.rows)
            for hook in store.spec.hooks:
                store.acts(hook, 0, store.rows)
                TokenStream(store, hook, batch_tokens=11, seed=0).batch(0)
                store.statistics(hook)
            if store.clean_rows:
                store.clean("loss", 0, store.clean_rows)
                store.clean("final", 0, store.clean_rows)
            store.documents()
        finally:
            file.write_bytes(whole)

    def seeds(self) -> list[bytes]:
        """One whole input for every file."""
        found = []
        for number, root in enumerate(self.roots):
            files = [file.read_bytes() for file in self.metadata[number]]
            chunks = [spec.chunk_file(root, 0).read_bytes()[:-4] for spec in self.arrays[number]]
            found += [bytes([number, place]) + content for place, content in enumerate([*files, *chunks])]
        return found

    def mutate(self, data: bytes, most: int, seed: int) -> bytes:
        """Half of the time from a file as it was written. JSON: values replaced, removed or doubled, and mostly sealed;
        else, and now and then, libFuzzer's way.
        """
        chance = random.Random(seed)
        if chance.random() < 0.5:
            whole = chance.choice(self.whole)
            data = bytes([whole[0] + len(self.roots) * chance.choice((0, 50))]) + whole[1:]
        if len(data) > 2 and chance.random() < 0.8 and isinstance(self.file(data)[1], Path):
            try:
                tree = [json.loads(data[2:])]
            except (ValueError, RecursionError):
                return bytes(atheris.Mutate(data, most))
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                node, key = self._place(tree, chance)
                if chance.random() < 0.15 and node is not tree:
                    del node[key]
                elif chance.random() < 0.15:
                    node[key] = [node[key], node[key]]
                else:
                    node[key] = copy.deepcopy(chance.choice(HOSTILE))
            if chance.random() < 0.8:
                self._seal(tree[0])
            return (data[:2] + json.dumps(tree[0]).encode())[:most]
        return bytes(atheris.Mutate(data, most))

    @staticmethod
    def _seal(content: Any) -> None:
        """A header with a right checksum again: what reads it must not trust who knows how to make one."""
        attributes = content.get("attributes") if isinstance(content, dict) else None
        if isinstance(attributes, dict) and isinstance(attributes.get("hsae"), dict):
            attributes["hsae"] = sealed(attributes["hsae"])

    @staticmethod
    def _place(tree: Any, chance: random.Random) -> tuple[Any, Any]:
        """A container and a key in it, the deeper the likelier."""
        node, key = tree, 0
        while isinstance(inner := node[key], dict | list) and inner and chance.random() < 0.85:
            node, key = inner, chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        return node, key


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="hsae-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    target = Target(folder)
    corpus = next((Path(word) for word in sys.argv[1:] if not word.startswith("-")), None)
    if corpus is None:
        corpus = folder / "corpus"
        sys.argv.append(str(corpus))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.whole):
        target(seed)
        (corpus / f"seed-{number:03}").write_bytes(seed)
    assert target.done["accepted"] == target.done["metadata"] + target.done["chunks"], "a whole store is refused"

    def counted(data: bytes) -> None:
        target(data)
        if sum(target.done.values()) % 500 == 0:
            print(json.dumps(target.done), flush=True)

    atheris.Setup(sys.argv, counted, custom_mutator=target.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
