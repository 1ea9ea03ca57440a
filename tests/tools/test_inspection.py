"""Capturing what a site computes with, and measuring what its blocks hold."""

import pytest
import torch

import infllm_pass
from infllm_pass.errors import NoAttentionSiteError, UnsupportedModelError
from infllm_pass.kernels import reference
from infllm_pass.tools.inspection import attention_inputs, attention_mass, recent_blocks

transformers = pytest.importorskip("transformers")

CONFIG = infllm_pass.SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=100, scorer="pooled"
)
LENGTH = 200


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def as_sets(blocks, count):
    """Indices, -1 where unused, as booleans ``[..., count]``."""
    blocks = blocks.long()
    chosen = torch.zeros(*blocks.shape[:-1], count + 1, dtype=torch.bool)
    return chosen.scatter_(-1, torch.where(blocks < 0, count, blocks), True)[..., :count]


@pytest.mark.parametrize("site", [0, 2])
def test_inputs_are_those_of_the_site(model, ids, site):
    seen = attention_inputs(model, site, input_ids=ids, use_cache=False, config=CONFIG)
    assert seen.q.shape == (2, 6, LENGTH, 16)
    assert seen.k.shape == seen.v.shape == (2, 2, LENGTH, 16)
    assert seen.blocks.shape == (2, 2, LENGTH, CONFIG.selected_blocks)
    assert seen.blocks.dtype == torch.int32
    assert seen.key_mask is None
    assert seen.scale == pytest.approx(0.25)
    assert seen.config is CONFIG
    expected = reference.select_blocks(seen.q, seen.k, geometry=CONFIG.geometry, scale=seen.scale, offset=0)
    agreement = (as_sets(seen.blocks, expected.shape[-1]) == expected).float().mean()
    assert agreement > 0.999  # float32 against float64: a near tie may go the other way


def test_sites_are_counted_in_the_order_they_run(model, ids):
    keys = [attention_inputs(model, site, input_ids=ids, use_cache=False, config=CONFIG).k for site in range(3)]
    with torch.no_grad():
        cache = infllm_pass.sparsify(torch.compile(model, backend="eager"), CONFIG)(
            input_ids=ids, use_cache=True
        ).past_key_values
    for site, key in enumerate(keys):
        torch.testing.assert_close(key, cache.layers[site].keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"window": 70}, "a sliding window"),
        ({"segment_ids": torch.arange(LENGTH)[None] // 150}, "packed sequences"),
        ({"offset": torch.tensor([0]), "window": 70}, "an offset and a sliding window"),
        ({"offset": 3}, "an offset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::infllm_pass.errors.NoAttentionSiteWarning")
def test_sites_that_the_record_does_not_describe_are_refused(arguments, found):
    q, k, v = (torch.randn(1, heads, LENGTH, 16) for heads in (4, 2, 2))
    with pytest.raises(UnsupportedModelError, match=f"site 0 has {found}: choose a site"):
        attention_inputs(
            lambda q, k, v: infllm_pass.switchable_attention(q, k, v, CONFIG, **arguments), 0, q, k, v, config=CONFIG
        )
    seen = attention_inputs(
        lambda q, k, v: infllm_pass.switchable_attention(q, k, v, CONFIG, offset=0), 0, q, k, v, config=CONFIG
    )
    assert torch.equal(seen.q, q)


def test_padding_reaches_the_record(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    seen = attention_inputs(model, 1, input_ids=ids, attention_mask=mask, use_cache=False, config=CONFIG)
    assert torch.equal(seen.key_mask, mask.bool())
    assert int(seen.blocks[0].max()) == (LENGTH - 40 - 1) // 16
    assert int(seen.blocks[1].max()) == (LENGTH - 1) // 16


def test_model_is_left_as_it_was(model, ids):
    with torch.no_grad():
        before = model(input_ids=ids).logits
        attention_inputs(model, 1, input_ids=ids, config=CONFIG)
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(("site", "length"), [(3, LENGTH), (0, 99)], ids=["too-few-layers", "too-short"])
def test_site_that_does_not_run_is_refused(model, ids, site, length):
    with pytest.raises(NoAttentionSiteError, match=f"site {site} was asked for"):
        attention_inputs(model, site, input_ids=ids[:, :length], use_cache=False, config=CONFIG)


def brute_force_mass(q, k, sets, scale, block_size, key_mask):
    """Dense weights in float64, summed over the keys of each query's set."""
    batch, heads_q, length_q, _ = q.shape
    heads, length_k = k.shape[1:3]
    mass = torch.zeros(batch, heads, length_q, dtype=torch.float64)
    for row in range(batch):
        first = int(key_mask[row].int().argmax())
        for head in range(heads_q):
            own = head // (heads_q // heads)
            for query in range(length_q):
                last = length_k - length_q + query
                seen = [key for key in range(last + 1) if key_mask[row, key]]
                if not seen:
                    continue
                weights = (scale * k[row, own, seen].double() @ q[row, head, query].double()).softmax(0)
                visited = sets[row, own, query][[(key - first) // block_size for key in seen]]
                mass[row, own, query] += weights[visited].sum() / (heads_q // heads)
    return mass


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("queries", [37, 11])
def test_attention_mass_is_that_of_dense_weights(padded, queries, monkeypatch):
    monkeypatch.setattr("infllm_pass.tools.inspection.CHUNK_ELEMENTS", 4 * 37 * 5)  # several chunks
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k = torch.randn(2, 2, 37, 8, generator=generator)
    blocks = torch.randint(-1, 5, (2, 2, queries, 3), generator=generator, dtype=torch.int32)
    mask = torch.ones(2, 37, dtype=torch.bool)
    if padded:
        mask[0, :9] = False
        mask[1, 20] = False
    got = attention_mass(q, k, blocks, block_size=8, scale=0.7, key_mask=mask if padded else None)
    expected = brute_force_mass(q, k, as_sets(blocks, 5), 0.7, 8, mask)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)


def test_every_block_holds_everything():
    q, k = torch.randn(1, 3, 50, 8), torch.randn(1, 1, 50, 8)
    blocks = torch.arange(4, dtype=torch.int32).expand(1, 1, 50, 4)
    mass = attention_mass(q, k, blocks, block_size=16, scale=1.0)
    torch.testing.assert_close(mass, torch.ones(1, 1, 50))


def test_recent_blocks_spend_the_budget_on_the_past():
    sets = as_sets(recent_blocks(CONFIG.geometry, 8, LENGTH), 13)  # six blocks, one of them initial
    assert sets[-1].nonzero().flatten().tolist() == [0, 8, 9, 10, 11, 12]
    early = as_sets(recent_blocks(CONFIG.geometry, 40, 40), 3)
    assert early[[0, 16, 39]].sum(-1).tolist() == [1, 2, 3]


def test_picture_is_a_png(model, ids):
    pytest.importorskip("matplotlib")
    from infllm_pass.tools.plots import draw_selection, selection_map

    seen = attention_inputs(model, 1, input_ids=ids, use_cache=False, config=CONFIG)
    mass = attention_mass(seen.q, seen.k, seen.blocks, block_size=16, scale=seen.scale)
    assert selection_map(seen, 0, 1).shape == (13, LENGTH, 3)
    assert draw_selection(seen, mass, mass, title="tiny").startswith(b"\x89PNG")
