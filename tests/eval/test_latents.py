"""What people ask of a latent: where it is active, and which tokens it speaks for."""

import pytest
import torch
from models import HOOK, random_model
from places import GOLDEN

import hsae
from hsae.cache.config import ModelConfig


@pytest.fixture(scope="module")
def lm():
    return hsae.LanguageModel.load(ModelConfig(id=str(GOLDEN / "model"), dtype="float32"))


@pytest.mark.parametrize("structure", ["flat", "additive", "stacked"])
def test_logit_effects_are_the_directions_through_norm_and_unembedding(lm, structure):
    model = random_model(structure, d_in=lm.d_model)
    latent = (len(model.levels), 3)
    effects = hsae.logit_effects(model, lm, latent, count=4)
    norm, head = lm.model.get_decoder().norm, lm.model.get_output_embeddings()
    with torch.no_grad():
        logits = head(norm(model.direction(latent)))
    if cap := getattr(lm.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    assert [effect.id for effect in effects.promoted] == logits.topk(4).indices.tolist()
    assert [effect.id for effect in effects.suppressed] == (-logits).topk(4).indices.tolist()
    for effect in (*effects.promoted, *effects.suppressed):
        assert effect.logit == pytest.approx(logits[effect.id].item(), rel=1e-4, abs=1e-5)
    assert str(effects).startswith("promotes: ") and len(str(effects).splitlines()) == 2


def test_logit_effects_of_another_width_or_latent_are_refused(lm):
    with pytest.raises(hsae.UserError, match="the SAE reads residuals of width 8"):
        hsae.logit_effects(random_model("flat"), lm, (1, 0))
    with pytest.raises(hsae.UserError, match="level 1 has no latent 32"):
        hsae.logit_effects(random_model("flat", d_in=lm.d_model), lm, (1, 32))


@pytest.mark.parametrize("structure", ["flat", "additive", "stacked"])
def test_top_contexts_are_where_a_latent_is_most_active(activations, structure):
    (folder,) = activations.glob("*-train-*.zarr")
    store = hsae.ActivationStore.open(folder)
    model = random_model(structure, d_in=store.header.d_model, hook_name=store.hooks[0], model_name=store.spec.model.id)
    latents = [(len(model.levels), 3), (1, 2), (1, 5)]
    contexts = hsae.top_contexts(model, store, *latents, count=2)
    assert list(contexts) == sorted(latents, key=lambda latent: -latent[0])
    special = store.special_mask(store.tokens(0, store.rows))
    for level, latent in latents:
        acts = model.codes(store.acts(store.hooks[0], 0, store.rows).float())[level - 1]
        largest = acts[..., latent].masked_fill(special, 0).max().item()
        found = contexts[level, latent]
        assert 0 < len(found) <= 2 and found[0].activation == pytest.approx(largest, rel=1e-4)
        assert str(found[0]).count("«") == 1
    with pytest.raises(hsae.UserError, match="there is no level 9"):
        hsae.top_contexts(model, store, (9, 0))
    with pytest.raises(hsae.UserError, match="reads vectors of width 8"):
        hsae.top_contexts(random_model(structure, hook_name=HOOK), store, (1, 0))
