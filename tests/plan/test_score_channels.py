"""Which channels token scores read: what the plan, the report and the emitted calls say of them."""

import json
import logging

import pytest
import torch

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ConfigError
from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.plan.score_channels import checked_sets, from_rotary
from infllm_pass.sites.rotary import Rotary
from tests.sites.test_rotary import DIM, KV_HEADS, Attention, HalfSplit, Plain, same_rows
from tests.support.common import SMALL

TOKENS = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "scorer": "tokens", "dense_len": 0})
LOWEST = (*range(8, 16), *range(24, 32))
ROTARY = Rotary((), tuple((i, i + 16) for i in reversed(range(16))), "half-split", "")


class Layers(torch.nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def explained(model, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        return infllm_pass.explain(model, same_rows(), **options)


def geometries(model, **options):
    """The geometries of the calls that a model's sites become, without running them."""
    found = []

    class Recorder:
        name = "recorder"

        def accepts(self, request):
            found.append(request.geometry)
            return infllm_pass.rewrite.targets.Refusal("it only looks")

        def state(self, request):
            return None

    torch._dynamo.reset()
    with torch.no_grad():
        from infllm_pass.frontend.backend import SwitchableBackend
        from infllm_pass.plan.site_config import site_config_of
        from infllm_pass.rewrite.pipeline import SitePolicy

        policy = SitePolicy(options["config"], site_config_of(None, options.get("site_config")), (Recorder(),))
        torch.compile(model, backend=SwitchableBackend(lambda module, _: module.forward, policy))(same_rows())
    return found


def test_the_report_says_which_channels_are_read_and_why():
    report = explained(Layers(HalfSplit(), Plain()), config={**TOKENS.to_dict(), "dense_len": 4096})
    first, second = report.sites
    assert first.scores == "tokens 16 of 32: lowest rotary frequencies, half-split"
    assert first.channels == (LOWEST,)
    assert second.scores == (
        "tokens 32 of 32: no rotary embedding found: all channels are read; calibrate to use fewer"
    )
    assert second.channels == (tuple(range(DIM)),)
    assert "scores" in str(report)
    assert "half-split" in str(report)
    data = json.loads(report.to_json())["graphs"][0]["sites"]
    assert data[0]["channels"] == [list(LOWEST)]
    assert data[0]["scores"] == first.scores
    assert "half-split" in report.to_csv()


def test_pooled_scores_read_no_channels_and_dense_sites_have_no_scores():
    config = {**SMALL.to_dict(), "scorer": "pooled", "dense_len": 4096}
    (site,) = explained(HalfSplit(), config=config).sites
    assert (site.scores, site.channels) == ("pooled", ())
    report = explained(HalfSplit(), config=config, site_config=lambda site: None)
    assert report.sites[0].scores == ""
    assert "scores" not in str(report)


def test_a_function_of_sites_may_choose_the_scorer_and_the_channels():
    own = (*range(8), *range(16, 24))
    each = [own, LOWEST]

    def site_config(site):
        return {
            "layers.0": {},
            "layers.1": {"scorer": "pooled"},
            "layers.2": {"channels": own},
            "layers.3": {"channels": each, "channels_from": "two sets"},
            "layers.4": {"score_dims": 32},
        }[site.module_path]

    model = Layers(*(HalfSplit() for _ in range(5)))
    rows = explained(model, config={**TOKENS.to_dict(), "dense_len": 4096}, site_config=site_config).sites
    assert [row.scores for row in rows] == [
        "tokens 16 of 32: lowest rotary frequencies, half-split",
        "pooled",
        "tokens 16 of 32: given by site_config",
        "tokens 16 of 32: two sets",
        "tokens 32 of 32: all channels",
    ]
    assert [row.channels for row in rows] == [(LOWEST,), (), (own,), tuple(each), (tuple(range(32)),)]


def test_the_geometry_of_the_kernels_holds_the_channels():
    found = geometries(HalfSplit(), config=TOKENS)
    assert {geometry.channels for geometry in found} == {(LOWEST,)}
    assert BlockGeometry.parse(found[0].format()).channels == (LOWEST,)
    assert "score=tokens,ch=8-15+24-31,idx=key" in found[0].format()
    found = geometries(HalfSplit(), config=TOKENS, site_config=lambda site: {"scorer": "pooled"})
    assert {(geometry.scorer, geometry.channels) for geometry in found} == {("pooled", ())}


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ("0-15", "ascending channel numbers"),
        ([], "ascending channel numbers"),
        ([0.5] * 16, "ascending channel numbers"),
        (list(range(8)), "a multiple of 16"),
        ([list(range(16)), list(range(32))], "sets of one size"),
        ([list(range(16))] * 3, f"each of the site's {KV_HEADS} key/value heads"),
        (list(range(20, 36)), "0 to 31"),
        ([0, *range(15)], "different channels"),
        (list(reversed(range(16))), "ascending"),
    ],
)
def test_channels_that_do_not_fit_are_refused(channels, expected):
    with pytest.raises(ConfigError, match=expected):
        explained(HalfSplit(), config=TOKENS, site_config=lambda site: {"channels": channels})


def test_a_given_number_of_channels_is_kept_to():
    config = SparseAttentionConfig(scorer="tokens", score_dims=16)
    assert checked_sets(range(16), DIM, KV_HEADS, config) == (tuple(range(16)),)
    with pytest.raises(ConfigError, match="score_dims=16"):
        checked_sets(range(48), 64, KV_HEADS, config)
    with pytest.raises(ConfigError, match="at most the head size, 32"):
        from_rotary(ROTARY, DIM, SparseAttentionConfig(scorer="tokens", score_dims=48))
    with pytest.raises(ConfigError, match="at most the head size, 32"):
        explained(HalfSplit(), config={**TOKENS.to_dict(), "score_dims": 48})


def test_an_odd_channel_without_a_mate_breaks_no_pair():
    odd = Rotary((0,), tuple((1 + 2 * i, 2 + 2 * i) for i in range(15)), "interleaved", "")
    picked = from_rotary(odd, 31, SparseAttentionConfig(scorer="tokens", score_dims=16))
    assert picked.sets == (tuple(range(1, 17)),)


def test_the_steps_are_in_the_log(caplog):
    with caplog.at_level(logging.DEBUG, logger="infllm_pass"):
        explained(HalfSplit(), config={**TOKENS.to_dict(), "dense_len": 4096})
    text = caplog.text
    assert "channels: channel 0 is" in text
    assert "cos(" in text
    assert "inv_freq" in text
    assert "half-split" in text


class Broken(Attention):
    def rotate(self, x):
        return x.flip(-1)


def test_what_is_not_followed_reads_all_channels():
    (row,) = explained(Broken(), config={**TOKENS.to_dict(), "dense_len": 4096}).sites
    assert row.channels == (tuple(range(DIM)),)


def selected_attention(model, x, geometry):
    """A layer's attention over the blocks that the reference selects, in float64."""
    q, k, v = (f(x).view(1, x.shape[1], -1, DIM).transpose(1, 2)[0] for f in (model.q, model.k, model.v))
    q, k = model.rotate(q[None])[0].double(), model.rotate(k[None])[0].double()
    chosen = reference.select_sequence(q, k, geometry=geometry, scale=DIM**-0.5, offset=0)  # [Hkv, L, blocks]
    keys = torch.arange(x.shape[1])
    seen = chosen[..., keys // geometry.block_size] & (keys <= keys[:, None])
    logits = q.unflatten(0, (KV_HEADS, -1)) @ k[:, None].mT * DIM**-0.5
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return (weights @ v[:, None].double()).flatten(0, 1)[None], chosen


@pytest.mark.parametrize("sets", ["read off the graph", "given, one for each head"])
def test_a_sparsified_model_selects_by_these_channels(sets):
    model = HalfSplit().eval()
    x = 2.0 * torch.randn(1, 300, 16, generator=torch.Generator().manual_seed(4))
    each = (tuple(range(16)), (*range(4, 12), *range(20, 28)))
    given = sets.startswith("given")
    options = {"site_config": lambda site: {"channels": each}} if given else {}
    torch._dynamo.reset()
    with torch.no_grad():
        switched = infllm_pass.sparsify(torch.compile(model, backend="eager"), TOKENS, **options)
        result = switched(x)
        expected, chosen = selected_attention(model, x, TOKENS.geometry_for(DIM, each if given else (LOWEST,)))
        _, other = selected_attention(model, x, TOKENS.geometry_for(DIM, ((*range(8), *range(16, 24)),)))
    assert not torch.equal(chosen, other)  # the channels do matter here
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
    (row,) = infllm_pass.report(switched).sites
    assert (row.branch, row.channels) == ("sparse", each if given else (LOWEST,))
