"""Which model families hsae cuts rightly: `python benchmarks/families.py docs/results/families` writes families.md and
families.json there.

Of every type of decoder that the installed transformers has, a tiny random model is made, saved and loaded as any
other, in float32 and bfloat16. Prefix, suffix and unembedding are compared with the model's own pass, number by number.
What hsae refuses stands with its reason.
"""

import argparse
import json
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from hsae.cache.config import ModelConfig
from hsae.cache.errors import ModelError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.language_model.loading import quiet

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden/model"
LAYER, SECONDS, MOST = 2, 120, 5_000_000
SIZES = {
    64: "hidden_size d_model n_embd word_embed_proj_dim mamba_d_ssm lru_width embedding_size state_size_total",
    96: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size dense_intermediate_size shared_intermediate_size "
    "intermediate_size_mlp "
    "shared_expert_intermediate_size prefix_dense_intermediate_size conv_dim decoder_ffn_dim",
    32: "moe_intermediate_size expert_ffn_hidden_size kv_lora_rank moe_shared_expert_intermediate_size block_size",
    24: "q_lora_rank",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads "
    "attention_heads expert_count",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_top_k linear_num_key_heads num_mem_blocks "
    "index_n_heads "
    "swa_num_key_value_heads",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_shared_experts mamba_n_groups n_groups "
    "eos_token_id",
    16: "head_dim kv_channels linear_key_head_dim linear_value_head_dim mamba_d_head attention_head_dim swa_head_dim "
    "sliding_window qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim hidden_size_per_layer_input rotary_dim "
    "attention_chunk_size local_window_size",
    8: "mamba_d_state state_size ssm_state_size index_topk chunk_size mamba_chunk_size",
    256: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx context_length",
    800: "vocab_size vocab_size_per_layer_input",
}  # fmt: skip
TINY = {name: size for size, names in SIZES.items() for name in names.split()} | {"pad_token_id": 0, "bos_token_id": 2}
OWN = {
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.0156},
    "hyperclovax": {"logits_scaling": 0.25},
    "minicpm3": {"scale_emb": 3, "dim_model_base": 16, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "bamba": {"mamba_n_heads": 8}, "granitemoehybrid": {"mamba_n_heads": 8, "logits_scaling": 8.0},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "opt": {"word_embed_proj_dim": 24},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16}, "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    },
}  # fmt: skip


def tiny_config(family: str):
    """A configuration of the family with small sizes, and every other setting as the family has it."""
    known = AutoConfig.for_model(family)
    if known.get_text_config() is not known or known.is_encoder_decoder:
        raise ValueError("a model of several parts: see the type of its text part")
    given = known.to_dict()
    if "qk_rope_head_dim" in given:
        OWN.setdefault(family, {"num_key_value_heads": 4})  # latent attention has no groups
    fitting = {
        name: size
        for name, size in TINY.items()
        if (given.get(name) is not None or name in type(known).attribute_map) or name.endswith("_id")
    }
    return AutoConfig.for_model(family, **{**fitting, **OWN.get(family, {})})


def make(family: str, folder: Path) -> None:
    """Save a tiny random model of a family, with the tokenizer of the golden model. Raises whatever the family's code
    raises.
    """
    config = tiny_config(family)
    with torch.device("meta"):
        if (weights := sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())) > MOST:
            raise ValueError(f"{weights:,} weights at small sizes: it has others that this script doesn't know")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.15) if weight.ndim >= 2 else weight.add_(0.1 * torch.randn_like(weight))
    with torch.no_grad():
        model.eval()(
            input_ids=torch.arange(5, 17)[None], use_cache=False
        )  # a tiny model that does not run tells nothing
    with quiet():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, folder)


def try_cut(folder: Path, dtype: str) -> tuple[str, str]:
    """(`to the bit`, `within rounding` or `refused`, the reason) of a saved model."""
    hook = f"blocks.{LAYER}.hook_resid_post"
    try:
        model = LanguageModel.load(ModelConfig(id=str(folder), dtype=dtype))
        model.check_hooks([hook])
    except ModelError as error:
        return "refused", str(error).replace(str(folder), "FOLDER")
    caught = []
    model._layers[LAYER].register_forward_hook(
        lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    tokens = torch.randint(5, 800, (3, 29), generator=torch.Generator().manual_seed(1))
    logits = model.logits(tokens)
    resid = model.prefix(tokens, [hook])[hook]
    same = torch.equal(resid, caught[0]) and torch.equal(model.unembed(model.suffix(hook, resid)), logits)
    try:
        model.check_ablation([hook])
    except ModelError as error:
        return "to the bit" if same else "within rounding", str(error)
    return "to the bit" if same else "within rounding", ""


def measure(family: str) -> dict[str, str]:
    """What becomes of one family."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        try:
            make(family, place)
        except Exception as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return {"family": family, "made": f"{type(error).__name__}: {first[:160]}"}
        found = {"family": family, "class": str(CAUSAL[family])}
        for dtype in ("float32", "bfloat16"):
            found[dtype], found[f"{dtype} note"] = try_cut(place, dtype)
        return found


def table(found: list[dict[str, str]]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    made = [row for row in found if "made" not in row]
    agree = [row for row in made if "refused" not in (row["float32"], row["bfloat16"])]
    refused = [row for row in made if row not in agree]
    lines = [
        "# Model families",
        "",
        f"Made by `python benchmarks/families.py docs/results/families` with transformers {transformers.__version__}, "
        f"torch {torch.__version__}, on "
        "a processor. Each family is a tiny random model of four layers, cut after its third. `to the bit`: residual "
        "and logits are those "
        "of the model's own pass, number by number.",
        "",
        f"## Families that agree: {len(agree)}",
        "",
        "A family whose note speaks of a zeroed residual can have training stores; evaluation stores of it are "
        "refused.",
        "",
        "| family | float32 | bfloat16 | note |",
        "|---|---|---|---|",
        *(f"| {row['family']} | {row['float32']} | {row['bfloat16']} | {cell(row['float32 note'])} |" for row in agree),
        "",
        f"## Families that are refused: {len(refused)}",
        "",
        "| family | in one line |",
        "|---|---|",
        *(f"| {row['family']} | {cell(row['float32 note'] or row['bfloat16 note'])} |" for row in refused),
        "",
        f"## Not tried: {len(found) - len(made)}",
        "",
        "No tiny model of these could be made by rule; one that is given is checked on loading like any other.",
        "",
        "| family | why |",
        "|---|---|",
        *(f"| {row['family']} | {cell(row['made'])} |" for row in found if "made" in row),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="path of the results, without .md and .json")
    parser.add_argument("families", nargs="*", help="all, if none is named")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)

    def late(signal: int, frame: object) -> None:
        raise TimeoutError(f"it took longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    found = []
    for family in options.families or sorted(CAUSAL):
        signal.alarm(SECONDS)
        try:
            found.append(measure(family))
        except Exception as error:
            found.append({"family": family, "made": f"{type(error).__name__}: {error}"})
        finally:
            signal.alarm(0)
        print(json.dumps(found[-1]), flush=True)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
