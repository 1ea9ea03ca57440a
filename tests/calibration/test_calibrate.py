"""Calibration: channels by variance, recommendations by what the worst rows miss, and files that are checked."""

import json
import pickle

import pytest
import torch
from torch import nn

import infllm_pass
from infllm_pass import Calibration, SparseAttentionConfig
from infllm_pass.calibration.channels import by_variance
from infllm_pass.calibration.judge import Rows, attention_mass, missed, visits, worst
from infllm_pass.calibration.measure import Observed, with_repetition
from infllm_pass.errors import CalibrationError, ConfigError
from infllm_pass.kernels import reference
from infllm_pass.sites.rotary import Rotary
from tests.sites.test_rotary import DIM, HEADS, KV_HEADS, HalfSplit, Plain
from tests.support.common import SMALL

VOCABULARY = 50
CONFIG = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "scorer": "tokens"})


class Model(nn.Module):
    def __init__(self, *layers, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(layers or [HalfSplit(), Plain()])
        self.out = nn.ModuleList([nn.Linear(HEADS * DIM, width) for _ in self.layers])

    def forward(self, ids):
        x = self.embedding(ids)
        for layer, out in zip(self.layers, self.out, strict=True):
            x = x + out(layer(x).transpose(1, 2).flatten(2))
        return x


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (300,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def calibration(ids):
    torch._dynamo.reset()
    return infllm_pass.calibrate(Model().eval(), ids, config=CONFIG, progress=False)


def keys_of(model, ids):
    """The keys of both layers, computed by hand: ``[Hkv, L, D]``."""
    found = []
    with torch.no_grad():
        x = model.embedding(ids[None])
        for layer, out in zip(model.layers, model.out, strict=True):
            k = layer.k(x).view(1, len(ids), -1, DIM).transpose(1, 2)
            found.append(layer.rotate(k)[0].double())
            x = x + out(layer(x).transpose(1, 2).flatten(2))
    return found


def candidates(site):
    """Both sets of a head that a calibration chooses from, where there is a rotary embedding."""
    rotary = Rotary((), tuple((i, i + 16) for i in reversed(range(16))), "half-split", "")
    return by_variance(site.variance, rotary, 16), ((*range(8, 16), *range(24, 32)),) * KV_HEADS


def test_variances_are_those_of_the_keys_and_channels_follow_them(calibration, ids):
    assert [site.key for site in calibration.sites] == [("layers.0", 0), ("layers.1", 0)]
    assert (calibration.model, calibration.tokens) == ("Model", 300)
    for site, keys in zip(calibration.sites, keys_of(Model().eval(), ids), strict=True):
        expected = keys.var(1, unbiased=False)
        torch.testing.assert_close(torch.tensor(site.variance, dtype=torch.float64), expected, rtol=1e-5, atol=1e-9)
        assert len(site.channels) == KV_HEADS
    rotated, plain = calibration.sites
    for channels, *either in zip(rotated.channels, *candidates(rotated), strict=True):
        assert channels in either
    assert plain.chosen_by == "largest key variance"
    for channels, row in zip(plain.channels, plain.variance, strict=True):
        assert set(channels) == set(sorted(range(DIM), key=lambda i: -row[i])[:16])


def test_pairs_are_taken_whole_and_channels_without_rotation_in_twos():
    variance = [[float(v) for v in (9, 1, 1, 1, 1, 1, 5, 4, 3, 2, 9, 1)]]
    rotary = Rotary((0, 6, 7, 8, 9), ((1, 10), (2, 3), (4, 5)), "pairs of its own", "")
    assert by_variance(variance, rotary, 2) == ((0, 6),)
    assert by_variance(variance, rotary, 4) == ((0, 1, 6, 10),)
    row = [float(i % 7) for i in range(DIM)]
    half = Rotary((), tuple((i, i + 16) for i in range(16)), "half-split", "")
    pairs = sorted(range(16), key=lambda i: -(row[i] + row[i + 16]))[:8]
    assert by_variance([row], half, 16) == (tuple(sorted([*pairs, *(i + 16 for i in pairs)])),)
    assert by_variance(variance, "none", 4) == ((0, 6, 7, 10),)
    assert by_variance(variance, rotary, 12) == (tuple(range(12)),)


def test_the_model_runs_as_it_is_and_is_left_as_it_was(ids):
    model = Model(HalfSplit(), Plain())
    model.layers[0].train()
    model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    infllm_pass.calibrate(model, ids, config=CONFIG, progress=False)
    assert model.layers[0].training
    assert not model.layers[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_sparsified_and_a_compiled_model_are_calibrated_like_the_plain_one(calibration, ids):
    model = Model().eval()
    for made in (infllm_pass.sparsify(model, CONFIG), torch.compile(model, backend="eager")):
        torch._dynamo.reset()
        assert infllm_pass.calibrate(made, ids, config=CONFIG, progress=False) == calibration


def test_texts_are_cut_and_steps_told(ids):
    steps = []
    calibration = infllm_pass.calibrate(
        Model().eval(), ids.repeat(2, 1), config=CONFIG, length=100, progress=lambda *step: steps.append(step)
    )
    assert calibration.tokens == 600
    done = [done for _, done, _ in steps]
    assert done == list(range(len(done)))
    assert {total for *_, total in steps} == {done[-1]}
    assert steps[0][0] == "variance of keys"


def rows(length=256, count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(h, n, DIM, generator=generator) for h, n in ((HEADS, count), (KV_HEADS, length)))
    return Rows(q, k, DIM**-0.5)


def rows_with_a_sharp_hit(length=1024, at=333):
    """All queries look up one key, whose neighbours say nothing; keys of other blocks are all a little like them."""
    noise = rows(length)
    wanted = torch.randn(KV_HEADS, 1, DIM, generator=torch.Generator().manual_seed(5))
    k = 0.3 * noise.k
    k[:, 400:900] += 0.3 * wanted
    k[:, at] = 1.6 * wanted[:, 0]
    return Rows(wanted.repeat_interleave(HEADS // KV_HEADS, 0) + 0.1 * noise.q, k, noise.scale)


def test_mass_is_that_of_attention_and_orders_are_those_of_the_reference():
    found, geometry = rows(), CONFIG.geometry
    mass = attention_mass(found, geometry.block_size)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:-1]))
    logits = (found.q.unflatten(0, (KV_HEADS, -1)) @ found.k[:, None].mT * found.scale).float()
    logits = logits.masked_fill(torch.arange(256) > found.positions[:, None], float("-inf"))
    expected = logits.softmax(-1).unflatten(-1, (-1, geometry.block_size)).sum(-1)
    torch.testing.assert_close(mass, expected)
    windowed = Rows(found.q, found.k, found.scale, window=100)
    for each in (found, windowed):
        for asked in (geometry, CONFIG.geometry_for(DIM, (tuple(range(16)), tuple(range(16, 32))))):
            chosen = reference.select_sequence(
                each.q, each.k, geometry=asked, scale=each.scale, offset=240, window=each.window
            )
            first = visits(each.block_scores(asked), each, asked)[..., : asked.selected_blocks]
            again = torch.zeros_like(chosen).scatter_(-1, first, True)
            visible = each.visible.unflatten(-1, (-1, asked.block_size)).any(-1)
            assert torch.equal(again & visible, chosen & visible)


def test_a_sharp_hit_is_missed_by_pooled_scores_and_found_by_token_scores():
    config = SparseAttentionConfig.from_dict({**CONFIG.to_dict(), "topk": 3})
    found = rows_with_a_sharp_hit()
    full = config.selected_blocks
    lost = missed(found, config, {"tokens": (tuple(range(DIM)),) * KV_HEADS}, [full - 1, full])
    assert set(lost) == {"pooled", "tokens"}
    for by_budget in lost.values():
        assert by_budget[full].shape == (KV_HEADS, HEADS // KV_HEADS * 16)
        assert bool((by_budget[full - 1] >= by_budget[full] - 1e-6).all())
    assert worst(lost["tokens"][full]) < 0.1 < worst(lost["pooled"][full])


def observed_site(rotary):
    site = Observed(rotary, DIM**-0.5, None, SparseAttentionConfig.from_dict({**CONFIG.to_dict(), "topk": 3}))
    found = rows_with_a_sharp_hit()
    site.sums.add(found.k[None])
    site.choose()
    site.judge(found.q[None], found.k[None], 16)
    return site, site.found(("here", 0))


def test_each_head_gets_the_channels_that_miss_less_and_a_scorer_that_does():
    rotary = Rotary((), tuple((i, i + 16) for i in range(16)), "half-split", "")
    site, found = observed_site(rotary)
    assert list(site.candidates) == ["largest key variance", "lowest rotary frequencies"]
    full = site.budgets[-1]
    for head, channels in enumerate(found.channels):
        lost = {name: worst(site.lost[name][full][0][head]) for name in site.candidates}
        assert channels == site.candidates[min(lost, key=lost.get)][head]
    assert found.scorer == "tokens"
    assert found.missed["tokens"] < 0.1 < found.missed["pooled"]
    assert found.topk <= 3
    assert list(observed_site("none")[0].candidates) == ["largest key variance"]


def test_the_published_score_is_recommended_where_it_misses_no_more():
    site = Observed("none", DIM**-0.5, None, SparseAttentionConfig.from_dict({**CONFIG.to_dict(), "topk": 4}))
    site.sums.add(rows().k[None])
    site.choose()
    for name, loss in (("pooled", 0.3), ("largest key variance", 0.4)):
        site.lost[name] = {budget: [torch.full((KV_HEADS, 100), loss)] for budget in site.budgets}
    found = site.found(("here", 0))
    assert (found.scorer, found.topk) == ("pooled", site.budgets[0] - site.config.local_blocks)
    site.lost["pooled"][site.budgets[-1]] = [torch.full((KV_HEADS, 100), 0.5)]
    assert site.found(("here", 0)).scorer == "tokens"
    for budget in site.budgets[:-1]:
        site.lost["largest key variance"][budget] = [torch.full((KV_HEADS, 100), 0.6)]
    assert site.found(("here", 0)).topk == 4


def test_the_worst_rows_count_and_not_the_mean():
    values = torch.zeros(1000)
    values[7] = 0.9
    values[8:17] = 0.3
    assert worst(values) == pytest.approx((0.9 + 9 * 0.3) / 10)
    assert worst(values.view(10, 100)) == worst(values)  # one head may have them all
    assert worst(torch.tensor([0.2])) == pytest.approx(0.2)
    assert worst(torch.full((10,), -0.1)) == 0.0


def test_the_end_repeats_a_passage():
    ids = torch.arange(64)[None]
    changed = with_repetition(ids, 8, 3)
    assert torch.equal(changed[:, :-8], ids[:, :-8])
    start = int(changed[0, -8])
    assert start < 32
    assert changed[0, -8:].tolist() == list(range(start, start + 8))


def test_a_short_text_recommends_nothing(ids):
    config = SparseAttentionConfig.from_dict({**CONFIG.to_dict(), "topk": 40})
    calibration = infllm_pass.calibrate(Model().eval(), ids, config=config, progress=False)
    assert {(site.scorer, site.topk) for site in calibration.sites} == {(None, None)}
    assert all(not site.missed for site in calibration.sites)


def explained(model, calibration, ids, **options):
    torch._dynamo.reset()
    return infllm_pass.explain(model, ids[None], calibration=calibration, **{"config": CONFIG, **options}).sites


def test_a_sparsified_model_reads_the_calibrated_channels(calibration, ids, tmp_path):
    model = Model().eval()
    calibration.save(tmp_path / "c.json")
    for given in (calibration, tmp_path / "c.json", str(tmp_path / "c.json")):
        found = explained(model, given, ids, config={**CONFIG.to_dict(), "dense_len": 4096})
        assert [row.channels for row in found] == [site.channels for site in calibration.sites]
        origins = [f"tokens 16 of 32: calibrated, {site.chosen_by}" for site in calibration.sites]
        assert [row.scores for row in found] == origins
    switched = infllm_pass.sparsify(model, {**CONFIG.to_dict(), "dense_len": 4096}, calibration=calibration)
    switched(ids[None])
    assert [row.channels for row in infllm_pass.report(switched).sites] == [s.channels for s in calibration.sites]
    assert pickle.loads(pickle.dumps(calibration)) == calibration


def test_what_site_config_says_comes_before_the_calibration(calibration, ids):
    def site_config(site):
        return {"scorer": "pooled"} if site.module_path.endswith("0") else {"channels": tuple(range(16))}

    first, second = explained(
        Model().eval(), calibration, ids, config={**CONFIG.to_dict(), "dense_len": 4096}, site_config=site_config
    )
    assert first.scores == "pooled"
    assert second.channels == (tuple(range(16)),)
    found = explained(Model().eval(), calibration, ids, site_config=lambda site: None)
    assert {row.reason for row in found} == {"EXCLUDED"}


def test_recommendations_are_followed_only_where_asked_for(calibration, ids):
    recommended = Calibration.from_dict(
        {
            **calibration.to_dict(),
            "sites": [
                {**site, "scorer": scorer, "topk": topk}
                for site, scorer, topk in zip(calibration.to_dict()["sites"], ("pooled", "tokens"), (3, 4), strict=True)
            ],
        }
    )
    config = {**CONFIG.to_dict(), "dense_len": 4096}
    plain = explained(Model().eval(), recommended, ids, config=config)
    assert [row.scores.split()[0] for row in plain] == ["tokens", "tokens"]
    both = explained(Model().eval(), recommended.with_recommendations(), ids, config=config)
    assert [row.scores.split()[0] for row in both] == ["pooled", "tokens"]
    assert [row.config.get("topk", CONFIG.topk) for row in both] == [3, 4]
    budgets = explained(Model().eval(), recommended.with_recommendations(scorer=False), ids, config=config)
    assert [row.scores.split()[0] for row in budgets] == ["tokens", "tokens"]


def test_a_calibration_is_saved_and_loaded(calibration, tmp_path):
    path = tmp_path / "c.json"
    calibration.save(path)
    assert Calibration.load(path) == calibration
    followed = calibration.with_recommendations()
    followed.save(path)
    assert Calibration.load(path) == followed
    assert path.read_text().startswith("{")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "something else"}, "not a calibration"),
        ({"sites": []}, "lists no sites"),
        ({"sites": "all"}, "lists no sites"),
        ({"model": 3}, "model is 3"),
        ({"tokens": "many"}, "tokens is 'many'"),
        ({"follows": ["everything"]}, "follows"),
    ],
)
def test_damaged_files_are_refused(calibration, change, expected):
    with pytest.raises(CalibrationError, match=expected):
        Calibration.from_dict({**calibration.to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"channels": "0-7/0-7"}, "a multiple of 16"),
        ({"channels": "0-15/0-31"}, "sets of one size"),
        ({"channels": "20-35/20-35"}, "below head_dim=32"),
        ({"channels": "15-0"}, "sets of one size"),
        ({"channels": "all"}, "channels or variances"),
        ({"variance": [[1.0] * 32]}, "variances are not 2 rows of 32"),
        ({"variance": "none"}, "channels or variances"),
        ({"head_dim": "wide"}, "head_dim is 'wide'"),
        ({"chosen_by": 1}, "chosen_by is 1"),
        ({"scorer": "best"}, "scorer 'best'"),
        ({"topk": 0}, "topk is 0"),
        ({"missed": {"pooled": "much"}}, "not given as numbers"),
        ({"order": True}, "order is True"),
    ],
)
def test_damaged_sites_are_refused(calibration, change, expected):
    data = calibration.to_dict()
    data["sites"][0] = {**data["sites"][0], **change}
    with pytest.raises(CalibrationError, match=expected):
        Calibration.from_dict(data)


def test_a_site_twice_is_refused(calibration):
    data = calibration.to_dict()
    data["sites"] *= 2
    with pytest.raises(CalibrationError, match="twice"):
        Calibration.from_dict(data)


def test_files_that_are_none_are_refused(calibration, tmp_path):
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "missing.json")
    for name, data in (("text", b"hello"), ("binary", bytes(range(256))), ("list", b"[1]")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CalibrationError):
            Calibration.load(tmp_path / name)
    (tmp_path / "pickle").write_bytes(pickle.dumps(calibration))
    with pytest.raises(CalibrationError):
        Calibration.load(tmp_path / "pickle")
    with pytest.raises(CalibrationError, match="folder that exists"):
        calibration.save(tmp_path / "no" / "c.json")
    with pytest.raises(CalibrationError, match="folder that exists"):
        calibration.save(tmp_path)
    with pytest.raises(CalibrationError, match="got int"):
        Calibration.coerce(3)


def test_a_calibration_of_another_model_is_refused(calibration, ids):
    with pytest.raises(CalibrationError, match="calibrate this model"):
        infllm_pass.sparsify(Model(HalfSplit()).eval(), CONFIG, calibration=calibration)
    data = calibration.to_dict()
    fewer = Calibration.from_dict({**data, "sites": data["sites"][:1]})
    with pytest.raises(CalibrationError, match=r"1 sites and none at layers\.1"):
        explained(Model().eval(), fewer, ids)
    wide = [
        {**site, "channels": site["channels"].split("/")[0], "variance": site["variance"][:1]} for site in data["sites"]
    ]
    with pytest.raises(CalibrationError, match="2 key/value heads of 32 channels, the calibration 1 of 32"):
        explained(Model().eval(), Calibration.from_dict({**data, "sites": wide}), ids)
    with pytest.raises(ConfigError, match="score_dims=32"):
        explained(Model().eval(), calibration, ids, config={**CONFIG.to_dict(), "score_dims": 32})


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        (torch.zeros(0, dtype=torch.int64), {}, "not empty"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "not empty"),
        (torch.zeros(100), {}, "float32"),
        ([1, 2, 3], {}, "list"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), {}, r"\[1, 2, 3\]"),
        (torch.zeros(10, dtype=torch.int64), {}, "give 16"),
        (torch.zeros(100, dtype=torch.int64), {"length": 101}, "rows of 100"),
        (torch.zeros(100, dtype=torch.int64), {"length": 0}, "give 16"),
    ],
)
def test_texts_that_are_none_are_refused(given, options, expected):
    with pytest.raises(CalibrationError, match=expected):
        infllm_pass.calibrate(Model().eval(), given, config=CONFIG, progress=False, **options)


def test_too_many_channels_are_refused(ids):
    with pytest.raises(ConfigError, match="at most the head size, 32"):
        infllm_pass.calibrate(Model().eval(), ids, config={**CONFIG.to_dict(), "score_dims": 48}, progress=False)
    with pytest.raises(ConfigError, match="multiple of 16"):
        infllm_pass.calibrate(Model().eval(), ids, config={"score_dims": 24}, progress=False)


def test_a_model_without_attention_is_refused(ids):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 8)

        def forward(self, ids):
            return self.embedding(ids).cumsum(1)

    with pytest.raises(CalibrationError, match="nothing to calibrate"):
        infllm_pass.calibrate(Bare(), ids, config=CONFIG, progress=False)


def test_the_file_holds_data_only(calibration, tmp_path):
    calibration.save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    assert set(data) == {"format", "model", "parameters", "tokens", "sites", "follows"}
    assert data["sites"][0]["channels"].count("/") == KV_HEADS - 1


def test_a_calibrated_model_runs_sparse_and_exact_with_a_budget_that_covers_the_length(calibration, ids):
    model = Model().eval()
    covering = {**CONFIG.to_dict(), "dense_len": 0, "topk": 40}
    with torch.no_grad():
        expected = model(ids[None])
        exact = infllm_pass.sparsify(torch.compile(model, backend="eager"), covering, calibration=calibration)
        torch.testing.assert_close(exact(ids[None]), expected, rtol=1e-4, atol=1e-4)
        small = infllm_pass.sparsify(
            torch.compile(model, backend="eager"), {**covering, "topk": 3}, calibration=calibration
        )
        assert float((small(ids[None]) - expected).abs().max()) > 1e-3
    for switched in (exact, small):
        rows = infllm_pass.report(switched).sites
        assert [(row.branch, row.channels) for row in rows] == [("sparse", s.channels) for s in calibration.sites]
