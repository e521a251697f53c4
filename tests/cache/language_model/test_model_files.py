"""What a model's folder may hold (FIX A1, A2, A4, A9, B, C9, D1, D2): whatever would give other numbers than the
model's is refused."""

import json
import os
import re
import shutil

import pytest
import torch
from places import GOLDEN_MODEL as GOLDEN
from safetensors.torch import load_file, save_file

from hsae.cache.building.build import build
from hsae.cache.building.contents import StoreContents
from hsae.cache.building.estimate import estimate
from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.errors import CorpusError, ModelError
from hsae.cache.files import files_digest
from hsae.cache.format.layout import read_header
from hsae.cache.format.spec import StoreSpec
from hsae.cache.language_model import gguf, model_files, sources
from hsae.cache.language_model.lm import LanguageModel, load_tokenizer
from hsae.cache.reading.provenance import pin_commit

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "model")
    return tmp_path / "model"


def load(folder, dtype="float32"):
    return LanguageModel.load(ModelConfig(id=str(folder), dtype=dtype))


def spec(model, corpus, **changes):
    wanted = {
        "model": model if isinstance(model, ModelConfig) else ModelConfig(id=str(model), dtype="float32"),
        "split": "train", "hooks": (HOOK,), "corpus": CorpusConfig(corpus=str(corpus)),
        "context": 16, "prepend_bos": True, "batch_rows": 2, "chunk_mib": 0.02, "codec": "mappable", "rows": 6,
        "clean_rows": 0,
    }  # fmt: skip
    return StoreSpec(**{**wanted, **changes})


def change_weights(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def shard(folder, names=lambda number: f"part{number}.safetensors"):
    """Cut the weights into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    where = {key: names(number % 2) for number, key in enumerate(tensors)}
    for name in set(where.values()):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


# --- weights that don't fit: FIX A1 ---------------------------------------------------------------------


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def prefixed(prefix):
    return lambda tensors: {prefix + key: value for key, value in tensors.items()}


def reshaped(tensors):
    return {key: value[:-1].clone() if "0.mlp.down_proj" in key else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed("_orig_mod."), "named _orig_mod.…, as torch.compile does"),
        (prefixed("module."), "named module.…, as DataParallel"),
        (prefixed("base_model.model."), "merge the adapter first"),
        (without("layers.1.mlp.down_proj"),
        "tensors 1 missing (model.layers.1.mlp.down_proj.weight); it would run with random"),
        (without("layers.1."), "missing (model.layers.1."),
        (lambda tensors: {**tensors, "model.layers.9.mlp.down_proj.weight": torch.zeros(2)},
        "1 that the model has no place for"),
        (lambda tensors: {**tensors, "model.layers.0.mlp.lora_A.weight": torch.zeros(2)}, "merge it first"),
        (reshaped, "1 of another shape (model.layers.0.mlp.down_proj.weight (47, 96) for (48, 96))"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ModelError, match=re.escape(message)):
        load(folder)


def test_more_or_fewer_layers_in_the_configuration_than_in_the_file_are_refused(folder):
    kinds = json.loads((folder / "config.json").read_text())["layer_types"]
    for layers in (4, 6):
        change_config(folder, num_hidden_layers=layers, layer_types=[*kinds, "full_attention"][:layers])
        with pytest.raises(
            ModelError, match=r"don't fit its config.json: tensors \d+ (missing|that the model has no place for)"
        ):
            load(folder)


def test_an_output_layer_that_was_left_out_is_refused_and_a_tied_one_is_not(folder):
    tied = load(folder)
    assert tied.logits(torch.tensor([[2, 5, 7]])).shape == (1, 3, 800)
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(ModelError, match="it has no output layer, as AutoModel saves it"):
        load(folder)


# --- tokenizers: FIX A2, B ---------------------------------------------------------------------


def test_a_folder_without_tokenizer_files_is_refused_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr("hsae.cache.language_model.loading.load_causal", None)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        ModelError, match=r"has no tokenizer: tokenizer.json is missing in .*copy the tokenizer's files"
    ):
        load(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load(folder)


def byte_pairs(folder, vocabulary, merges):
    """A folder whose tokenizer is GPT-2's two files."""
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(merges)


def test_vocabularies_beside_no_tokenizer_json_are_in_the_digest_and_none_of_them_may_lack(folder):
    golden = model_files.tokenizer_digest(folder)
    (folder / "merges.txt").write_text("a b")
    assert model_files.tokenizer_digest(folder) == golden  # tokenizer.json decides, and stores made before stay
    words = {token: number for number, token in enumerate(["<|endoftext|>", "a", "b", "c", "ab"])}
    byte_pairs(folder, words, "#version: 0.2\na b\n")
    first = model_files.tokenizer_digest(folder)
    assert load_tokenizer(ModelConfig(id=str(folder)))("abc").input_ids == [4, 3]
    byte_pairs(folder, words, "#version: 0.2\nb c\n")
    assert model_files.tokenizer_digest(folder) not in (first, golden)
    (folder / "merges.txt").unlink()
    with pytest.raises(ModelError, match="merges"):
        load_tokenizer(ModelConfig(id=str(folder)))


def test_text_that_the_tokenizer_does_not_know_is_refused_before_compute(folder, tmp_path):
    held = json.loads((folder / "tokenizer.json").read_text())
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "known": 4, "word": 5}
    held["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    held["pre_tokenizer"], held["normalizer"], held["decoder"] = {"type": "Whitespace"}, None, None
    (folder / "tokenizer.json").write_text(json.dumps(held))
    (tmp_path / "text.txt").write_text("known word other\n\n" * 200)
    with pytest.raises(
        CorpusError, match=r"of the tokens of corpus .* are '<unk>': the tokenizer of .* does not know this text"
    ):
        build([spec(folder, tmp_path / "text.txt")], tmp_path / "stores")
    (tmp_path / "text.txt").write_text("known word known word known word\n\n" * 200)
    build([spec(folder, tmp_path / "text.txt")], tmp_path / "stores")  # nothing of the refused store is in the way


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused_before_compute(folder, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(ModelConfig(id=str(folder)))
    tokenizer.add_tokens(["Python", "the "])
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("Python is the word\n\n" * 200)
    monkeypatch.setattr(StoreContents, "compute", None)
    with pytest.raises(ModelError, match=r"gives id 80[01], and the model's embedding ends at 799"):
        build([spec(folder, tmp_path / "text.txt")], tmp_path / "stores")


# --- what else a folder may hold ---------------------------------------------------------------------


def test_an_adapter_beside_the_model_is_refused(folder):  # FIX A9
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter .*merge it into the model"):
        load(folder)
    with pytest.raises(ModelError, match="owner/name holds an adapter"):
        model_files.check_names("owner/name", ["config.json", "model.safetensors", "adapter_model.safetensors"])


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantised_models_are_refused_by_their_method(folder, method):  # FIX B
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"is quantised \\({method}\\)"):
        load(folder)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:300000])


def pointer(folder, name="model.safetensors"):
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064d}\nsize 624376\n")


def eight_bit(folder):
    change_weights(folder, lambda tensors: {key: (value * 9).to(torch.int8) for key, value in tensors.items()})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "model.safetensors is cut short or damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "is cut short or damaged"),
        (pointer, "is a pointer of git-LFS, not the file itself; run `git lfs pull`"),
        (lambda folder: pointer(folder, "tokenizer.json"), "is a pointer of git-LFS"),
        (eight_bit, "holds numbers of type I8: quantised weights are not read"),
        (lambda folder: (folder / "config.json").write_text("[" * 100000), "nested too deeply"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "holds no JSON object"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{"), "can't be read as JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 100000), "the tokenizer of .* can't be loaded"),
        (lambda folder: change_config(folder, model_type="none such"), "transformers can't read config.json"),
        (lambda folder: change_config(folder, hidden_size="wide"), "transformers can't read config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
        "is no decoder-only language model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
        "is no decoder-only language model"),
        (lambda folder: change_config(folder, transformers_weights="../x.safetensors"), "has no ../x.safetensors"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files_are_told_in_one_line(folder, harm, message):  # FIX B, C14
    harm(folder)
    with pytest.raises(ModelError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_context_beyond_the_models_positions_is_refused_by_the_estimate(folder, tmp_path):  # FIX B
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(
        ModelError, match=r"rows of 257 tokens were asked for; .* has positions for 256: --set cache.context=256"
    ):
        estimate(spec(folder, tmp_path / "text.txt", context=257), tmp_path, "cpu")


def test_float16_is_refused_by_the_family_and_not_by_the_path(tmp_path):  # FIX B
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path / "not-gemma"
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "vocab_size": 800,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / name, place)
    model = load(place, "float16")
    model.check_hooks(["blocks.1.hook_resid_post"])
    assert model.dtype == torch.float16


# --- code and pickles: FIX D1, D2 ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma2", "own"])
def test_code_in_a_folder_is_never_run_nor_asked_about(folder, tmp_path, monkeypatch, kind):
    (folder / "code.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Own: pass\nclass OwnConfig: pass\n")
    own = {
        "AutoConfig": "code.OwnConfig",
        "AutoModelForCausalLM": "code.Own",
        "AutoTokenizer": ["code.Own", "code.Own"],
    }
    change_config(folder, model_type=kind, auto_map=own)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": own}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load(folder)
    except ModelError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "trace").exists()


def test_an_index_may_name_safetensors_beside_it_only(folder):
    where = shard(folder)
    load(folder)
    tensors = {key: value for name in set(where.values()) for key, value in load_file(folder / name).items()}
    (folder / "sub").mkdir()
    save_file(tensors, folder / "sub/w.safetensors", {"format": "pt"})
    torch.save(tensors, folder / "w.bin")
    for name, message in (
        ("w.bin", "only .safetensors files are read"),
        ("sub/w.safetensors", "must lie beside it"),
        ("../model/part0.safetensors", "must lie beside it"),
        ("part7.safetensors", "which is not there"),
    ):
        index = {"metadata": {}, "weight_map": dict.fromkeys(where, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=message):
            load(folder)


def test_which_files_an_index_names_is_in_the_digest_where_there_are_others(folder):
    shard(folder)
    plain = model_files.weights_digest(folder)
    parts = [folder / f"part{number}.safetensors" for number in range(2)]
    assert plain == files_digest([folder / "config.json", *parts])  # as in stores that were made before
    shutil.copy(parts[1], folder / "part2.safetensors")
    before = model_files.weights_digest(folder)
    index = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(index.replace("part1", "part2"))
    assert len({plain, before, model_files.weights_digest(folder)}) == 3


# --- rot: FIX C9 ---------------------------------------------------------------------


def test_bits_that_rot_under_an_unchanged_time_are_seen_when_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HSAE_HOME", str(tmp_path / "home"))
    whole = load(folder).model_digest
    path = folder / "model.safetensors"
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_files.weights_digest(folder) == whole  # remembered
    assert load(folder).model_digest != whole
    assert model_files.weights_digest(folder) != whole  # and now the memory knows
    for memory in (tmp_path / "home/digests").iterdir():
        memory.write_text(memory.read_text().replace('"sha256": "', '"sha256": "0'))
    assert model_files.weights_digest(folder) == load(folder).model_digest  # a harmed memory is none


# --- the hub: FIX A4, B ---------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's local cache with two commits of one model; gives a function that moves its main branch."""
    place = tmp_path / "hub/models--owner--name"
    (place / "refs").mkdir(parents=True)
    for number in range(2):
        shutil.copytree(GOLDEN, place / f"snapshots/{number:040d}")
    change_weights(place / f"snapshots/{1:040d}", lambda tensors: {key: value * 1.5 for key, value in tensors.items()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return lambda number: (place / "refs/main").write_text(f"{number:040d}")


def test_the_commit_of_a_hub_model_is_kept_with_the_store(hub, tmp_path):
    hub(0)
    (tmp_path / "text.txt").write_text("some words of text\n\n" * 200)
    model = ModelConfig(id="owner/name", dtype="float32")
    path = build([spec(model, tmp_path / "text.txt")], "stores")[0]
    header = read_header(path)
    assert header.model_commit == f"{0:040d}"
    hub(1)
    assert LanguageModel.load(model).model_digest != header.model_digest
    assert LanguageModel.load(pin_commit(model, "stores")).model_digest == header.model_digest
    other = build([spec(model, tmp_path / "text.txt", rows=8)], "stores")[0]
    assert read_header(other).model_digest == header.model_digest  # main has moved, the stores stay of one model
    assert pin_commit(ModelConfig(id=str(GOLDEN)), "stores").revision is None


def test_a_tokenizer_is_fetched_without_the_weights(hub, tmp_path, monkeypatch):
    hub(0)
    for path in (tmp_path / "hub/models--owner--name/snapshots").glob("*/model.safetensors"):
        path.unlink()
    monkeypatch.setattr(sources, "model_folder", None)
    assert len(load_tokenizer(ModelConfig(id="owner/name"))) == 800
    asked = []
    monkeypatch.setattr(sources, "_hub_info", lambda config: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: asked.append(options) or str(GOLDEN))
    monkeypatch.setattr(sources, "_hub_snapshot", lambda config: None)
    load_tokenizer(ModelConfig(id="owner/name"))
    assert not any("safetensors" in pattern for pattern in asked[0]["allow_patterns"])
    assert {"tokenizer.json", "merges.txt", "vocab.json", "vocab.txt", "tekken.json", "*.model"} <= set(
        asked[0]["allow_patterns"]
    )


def test_what_a_killed_conversion_left_goes_with_the_next(tmp_path, monkeypatch):  # FIX C11
    from transformers import AutoTokenizer

    def fail(*given, **named):
        raise ValueError("no such architecture")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    left = tmp_path / ".small-0123.0123456789abcdef.partial"
    left.mkdir()
    (left / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="can't be converted: no such architecture"):
        gguf._convert(tmp_path / "small.gguf", tmp_path / "small-0123", lambda text: None)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_gguf_file_is_read_once_in_a_process_unless_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("HSAE_HOME", str(tmp_path / "home"))
    read, hashed = [], gguf.file_sha256
    monkeypatch.setattr(gguf, "file_sha256", lambda path: read.append(path) or hashed(path))
    monkeypatch.setattr(gguf, "_convert", lambda path, done, say: done.mkdir(parents=True) or done)
    path = tmp_path / "small.gguf"
    path.write_bytes(b"one")
    config = ModelConfig(id=str(path), dtype="float32")
    first = sources.model_folder(config)
    assert sources.folder_here(config) == sources.tokenizer_folder(config) == first and read == [path]
    path.write_bytes(b"another")
    assert sources.folder_here(config) is None and sources.model_folder(config) != first and read == [path, path]
