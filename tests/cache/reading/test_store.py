"""An opened store as the library's users see it."""

import itertools

import pytest
import torch
from stores import HOOK, spec

from hsae.cache.building.build import build
from hsae.cache.errors import StoreError, UserError
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ActivationStore.open(build([spec()], tmp_path_factory.mktemp("stores"))[0])


def test_batches_are_one_shuffled_pass_over_the_tokens_that_are_not_special(store):
    batches = list(store.batches(batch_tokens=16, seed=3))
    assert len(batches) == store.header.kept_tokens // 16 > 10
    assert all(batch.shape == (16, store.d_model) and batch.dtype == torch.bfloat16 for batch in batches)
    stream = TokenStream(store, HOOK, batch_tokens=16, seed=3)
    assert all(torch.equal(batch, stream.batch(step)) for step, batch in enumerate(batches))
    assert not torch.equal(next(store.batches(batch_tokens=16, seed=4)), batches[0])


def test_epochs_follow_each_other_without_a_gap_and_may_be_endless(store):
    tokens = store.header.kept_tokens
    two = list(store.batches(HOOK, batch_tokens=100, epochs=2))
    assert len(two) == 2 * tokens // 100 > 2 * (tokens // 100)
    endless = list(itertools.islice(store.batches(HOOK, batch_tokens=100, epochs=None), len(two) + 5))
    assert all(map(torch.equal, two, endless))


def test_what_can_not_be_given_is_refused_before_the_first_batch(store):
    with pytest.raises(StoreError, match=r"less than a batch of 1,000,000; lower batch_tokens"):
        store.batches(batch_tokens=1_000_000)
    with pytest.raises(UserError, match="give numbers from 1 on"):
        store.batches(batch_tokens=0)
    with pytest.raises(StoreError, match=f"holds {HOOK}, not blocks.1.hook_resid_post"):
        store.batches("blocks.1.hook_resid_post")


def test_a_store_of_several_hooks_asks_which(tmp_path):
    hooks = ("blocks.1.hook_resid_post", HOOK)
    store = ActivationStore.open(build([spec(hooks=hooks, split="train", clean_rows=0)], tmp_path)[0])
    with pytest.raises(StoreError, match=f"several hooks: name one of {', '.join(hooks)}"):
        store.batches()
    assert next(store.batches(HOOK, batch_tokens=8)).shape == (8, store.d_model)


def test_a_store_says_what_it_is(store):
    assert len(store) == store.rows == 43
    said = repr(store)
    assert f"eval store of {store.spec.model.id} at {HOOK}; 43 rows of 21 tokens, width 48, bfloat16)" in said
