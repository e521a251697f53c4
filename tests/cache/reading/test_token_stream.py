import itertools

import pytest
import torch

from hsae.cache.errors import StoreError
from hsae.cache.reading.token_stream import TokenStream

HOOK = "blocks.1.hook_resid_post"


class Rows:
    """A store in memory: D=3, T=5, 23 rows in chunks of 4; token 0 is special. Every vector says where it came from."""

    context, chunk_rows, rows, chunks, token_bytes, url = 5, 4, 23, 6, 12, "memory"

    def __init__(self):
        self.ids = torch.randint(0, 4, (23, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        self.vectors = torch.arange(23 * 5).float().view(23, 5, 1).expand(-1, -1, 3).contiguous()
        self.broken = False

    def tokens(self, start, stop):
        return self.ids[start:stop]

    def mapped_in_place(self, hook):
        return True

    @property
    def tokens_per_chunk(self):
        return torch.stack([(self.ids[i * 4 : i * 4 + 4] != 0).sum() for i in range(6)]).numpy()

    def prefetch(self, wanted):
        chunks = {path: [chunk for name, chunk in wanted if name == path] for path in ("tokens", f"acts/{HOOK}")}
        assert sorted(chunks["tokens"]) == sorted(chunks[f"acts/{HOOK}"])
        self.ordered = chunks[f"acts/{HOOK}"]

    def special_mask(self, tokens):
        return tokens == 0

    def acts_chunk(self, hook, index):
        assert hook == HOOK
        if self.broken:
            raise StoreError("chunk is damaged")
        return self.vectors[index * 4 : (index + 1) * 4]


def stream(store=None, batch_tokens=7, seed=3, **changes):
    return TokenStream(store or Rows(), HOOK, batch_tokens=batch_tokens, seed=seed, **changes)


def places(batches):
    return [int(value) for batch in batches for value in batch[:, 0]]


@pytest.mark.parametrize("window_tokens", [1 << 25, 30, 13, 1])
def test_every_token_once_an_epoch_no_special_one_and_nothing_dropped(window_tokens):
    one = stream(window_tokens=window_tokens)
    wanted = sorted(torch.arange(115).view(23, 5)[one.store.ids != 0].tolist())
    assert one.tokens_per_epoch == len(wanted)
    seen = places(one.batch(step) for step in range(4 * len(wanted)))
    for epoch in range(7):
        assert sorted(seen[epoch * len(wanted) : (epoch + 1) * len(wanted)]) == wanted
    epochs = [tuple(seen[epoch * len(wanted) : (epoch + 1) * len(wanted)]) for epoch in range(7)]
    assert len(set(epochs)) == 7
    assert all(batch.shape == (7, 3) for batch in (one.batch(0), one.batch(50)))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    one, other = stream(window_tokens=20), stream(window_tokens=20)
    forwards = [one.batch(step) for step in range(40)]
    for step in reversed(range(40)):
        assert torch.equal(other.batch(step), forwards[step])
    assert not torch.equal(stream(seed=4).batch(0), stream(seed=3).batch(0))


def test_threaded_batches_are_the_same_from_any_step():
    one = stream()
    for first in (0, 13):
        given = list(one.batches(first, first + 9))
        assert len(given) == 9
        assert all(torch.equal(batch, stream().batch(step)) for step, batch in enumerate(given, first))


def test_errors_of_the_thread_reach_the_caller_and_an_abandoned_stream_ends():
    store = Rows()
    one = stream(store)
    iterator = one.batches(0, 1000)
    next(iterator)
    store.broken = True
    with pytest.raises(StoreError, match="chunk is damaged"):
        list(iterator)
    store.broken = False
    assert len(list(itertools.islice(one.batches(0, 1000), 3))) == 3


def test_a_window_holds_only_its_own_tokens():
    one = stream(window_tokens=30)
    for step in range(0, 60, 5):
        one.batch(step)
        assert len(one._window.order) <= 30 + 20  # a window ends with a whole chunk


def test_what_is_fetched_ahead_is_what_the_next_batches_need():
    one = stream(window_tokens=30)
    for step in range(40):
        addresses = list(one._addresses(step * 7, step * 7 + 7))
        ordered = one.store.ordered
        assert set(addresses[-1] // 20) <= set(ordered) and len(ordered) == len(set(ordered))
        windows = len({tuple(group) for group in one._bounds[1]})
        assert windows > 2 and len(ordered) < 6


def test_mixing_of_a_full_shuffle_is_near_the_ideal():
    one = stream(batch_tokens=15)
    source_rows = {int(address) // one.store.context for part in one._addresses(0, 15) for address in part}
    rows = one.store.rows
    distinct, ideal = len(source_rows), rows * (1 - (1 - 1 / rows) ** 15)
    assert abs(distinct - ideal) < 5
