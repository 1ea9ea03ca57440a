"""The GPU benchmarks' own logic, on tiny CPU tensors: data, floors, masks of baselines, rows, files, plots."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import infllm_pass
from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.tile_tables import TilePlan, TileShape
from infllm_pass.tools.output import OutputFormat
from tests.support import ROOT
from tests.support.common import SMALL
from tests.support.triton_support import lists_from_sets

GEOMETRY = SMALL.geometry
CPU = torch.device("cpu")
SCRIPTS = ("prefill", "backward", "memory", "breakeven", "model", "generate", "train_kernels")


@pytest.fixture(autouse=True)
def _folder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def bench():
    """Imports a module of the benchmarks' folder by name."""
    return importlib.import_module


def plan_of(length, group):
    """The plan of one sequence, as the device builds it."""
    shape = TileShape.choose(group)
    panels = []
    for begin in range(0, length, shape.panel_tokens):
        panels.append([0, begin, 0, min(shape.panel_tokens, length - begin), begin, 0, length, 0])
    panels.append([0, length, 0, 0, length, 0, length, 0])
    return TilePlan(torch.zeros(1, 8, dtype=torch.int32), False, shape, torch.tensor(panels, dtype=torch.int32))


def sets_of(length, heads, heads_kv):
    torch.manual_seed(0)
    q, k = torch.randn(1, heads, length, 16), torch.randn(1, heads_kv, length, 16)
    return reference.select_blocks(q, k, geometry=GEOMETRY, scale=0.25, offset=0)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
def test_correlated_data_follow_the_recursion(bench, length):
    noise = torch.randn(length, 3, dtype=torch.float64)
    expected = noise.clone()
    for token in range(1, length):
        expected[token] = 0.9 * expected[token - 1] + (1 - 0.81) ** 0.5 * noise[token]
    torch.testing.assert_close(bench("_data").correlated(noise, 0.9), expected)


def test_local_data_are_local_and_values_are_not(bench):
    data = bench("_data")
    for tensor, correlation in zip(
        data.make_data("local", data.Heads(2, 1, 32), 5000, CPU), (0.98, 0.98, 0.0), strict=True
    ):
        x = tensor[0, 0].float()
        assert x.var() == pytest.approx(1.0, abs=0.1)
        assert (x[1:] * x[:-1]).mean() == pytest.approx(correlation, abs=0.1)


def test_heads_are_read_and_refused(bench):
    heads = bench("_data").Heads
    assert str(heads.parse("28x4x128")) == "28x4x128"
    assert heads.parse("28x4x128").group == 7
    with pytest.raises(ValueError, match="9x2x64"):
        heads.parse("9x2x64")


@pytest.mark.parametrize("length", [1, 37, 64, 301])
def test_the_floor_counts_each_pair_that_is_computed(bench, length):
    work = bench("_work")
    chosen = sets_of(length, 2, 1)[0, 0]  # [N, blocks]
    key = torch.arange(length)
    visited = chosen[:, key // GEOMETRY.block_size] & (key <= key[:, None])
    assert work.visited_pairs(length, GEOMETRY) == int(visited.sum())


@pytest.mark.parametrize("geometry", [GEOMETRY, BlockGeometry(6, 2, 8, 2, 2, 6)], ids=["default ratio", "l = 3 s"])
def test_the_floor_counts_each_score_that_selection_needs(bench, geometry):
    g, length, expected = geometry, 250, 0
    fine = range(0, length - g.kernel_size + 1, g.kernel_stride)
    coarse = range(0, length - 4 * g.kernel_size + 1, 4 * g.kernel_stride)
    for position in range(length):
        own = position // g.block_size
        if own < g.selected_blocks:
            continue
        begin, end = g.init_blocks * g.block_size, (own - g.local_blocks) * g.block_size
        expected += sum(start < end and start + g.kernel_size > begin for start in fine)
        expected += sum(start + 4 * g.kernel_size - 1 <= position for start in coarse)
    assert bench("_work").scored_keys(length, geometry) == expected


def test_floors_take_the_tighter_ceiling(bench):
    work = bench("_work")
    ceilings = work.Ceilings(flops=2e12, bandwidth=1e9)
    assert work.Work(4e9, 1e3).floor_ms(ceilings) == pytest.approx(2.0)
    assert (work.Work(0, 1e6) + work.Work(4e9, 4e6)).floor_ms(ceilings) == pytest.approx(5.0)


def test_break_even_is_interpolated(bench):
    break_even = bench("_common").break_even
    rows = [{"length": 4096, "ratio": 2.0}, {"length": 16384, "ratio": 0.5}]
    assert break_even(rows) == "8192"
    assert break_even(rows[:1]) == "above 4096"
    assert break_even(rows[1:]) == "below 16384"


@pytest.mark.parametrize(("heads", "heads_kv"), [(4, 2), (16, 1), (2, 2)], ids=str)
def test_lists_become_the_sets_that_they_came_from(bench, heads, heads_kv):
    selected = sets_of(200, heads, heads_kv)
    plan = plan_of(200, heads // heads_kv)
    selection = SimpleNamespace(lists=lists_from_sets(selected, plan, selected.shape[-1]), plan=plan)
    assert torch.equal(bench("_baselines").chosen_blocks(selection, 200, selected.shape[-1]), selected[0])


def check_mask(mask, allowed, block):
    """The lists of a mask hold exactly the blocks with a visible key, and its full blocks hide none."""
    heads, length, _ = allowed.shape
    blocks = allowed.view(heads, length // 128, 128, length // block, block)
    assert torch.equal(mask.to_dense().bool().expand(1, heads, -1, -1)[0], blocks.any(4).any(2))
    whole = blocks.all(4).all(2)
    for head in range(mask.full_kv_num_blocks.shape[1]):
        for tile in range(length // 128):
            count = mask.full_kv_num_blocks[0, head, tile]
            listed = torch.zeros(length // block, dtype=torch.bool)
            listed[mask.full_kv_indices[0, head, tile, :count].long()] = True
            assert torch.equal(listed, whole[head, tile])
    index = torch.arange(length)
    seen = [mask.mask_mod(0, torch.tensor(head), index[:, None], index) for head in range(heads)]
    assert torch.equal(torch.stack(seen), allowed)


def test_flex_masks_hide_what_the_kernels_hide(bench):
    baselines, index = bench("_baselines"), torch.arange(384)
    causal = index <= index[:, None]
    check_mask(baselines.causal_mask(384, CPU), causal[None], 128)
    chosen = sets_of(384, 4, 2)[0]
    chosen[:, :, 0] = True  # blocks that whole tiles visit
    allowed = chosen[..., index // 8] & causal
    check_mask(baselines.blocks_mask(chosen, 2, 8), allowed.repeat_interleave(2, 0), 8)


def fake_stages():
    """Dense attention in the place of the kernels."""
    sizes = SimpleNamespace(counts=torch.full((4, 1), 3, dtype=torch.int32))
    selection = SimpleNamespace(lists=sizes, plan=None)

    def attend(q, k, v, *_):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out, out[..., 0].float()

    return SimpleNamespace(
        select=lambda q, k, config: selection,
        compress=lambda k, plan, config: k.mean(2),
        attend=attend,
        forward=lambda q, k, v, config: attend(q, k, v)[0],
        backward=lambda grad, q, k, v, *_: (grad, k, v),
    )


@pytest.fixture
def results(bench, monkeypatch):
    """Rows of every attention benchmark, measured on the CPU."""
    heads, ceilings = bench("_data").Heads(4, 2, 16), bench("_work").Ceilings(1e12, 1e11)
    prefill, backward, memory, breakeven = (bench(name) for name in SCRIPTS[:4])
    for module in (prefill, backward, memory, breakeven):
        monkeypatch.setattr(module, "stages", fake_stages())
    points = [prefill.Point(heads, (64, 96), length, data) for length in (128, 256) for data in ("local", "random")]
    return {
        "prefill": [row for point in points for row in prefill.measure(point, ceilings, CPU)],
        "backward": [backward.measure(heads, 64, length, "local", ceilings, CPU) for length in (128, 256)],
        "memory": memory.measure(heads, 64, 128, CPU),
        "breakeven": [breakeven.measure(heads, 96, length, "local", ceilings, CPU) for length in (128, 256)],
        "model": [
            {"variant": variant, "layers": 4, "length": length, "data": data, "ms": ms, "peak_gb": ms and 9.0}
            for variant, data, ms in (
                ("eager_sdpa", "random", 5.0),
                ("compiled_sdpa", "random", None),
                ("sparsified", "random", 2.0),
                ("sparsified", "local", 1.0),
            )
            for length in (128, 256)
        ],
        "generate": [
            {"variant": variant, "layers": 32, "length": length, "batch": 1, "ms": ms, "ttft_s": None}
            | {"speedup": 2.0 / ms}
            for variant, ms in (("dense", 2.0), ("sparsified", 1.0))
            for length in (128, 256)
        ],
    }


def test_rows_carry_their_case_and_their_ratio(results):
    cases = [row["case"] for row in results["prefill"]]
    assert cases[:3] == [f"{kind}/4x2x16/64/128/local/tokens-auto-key" for kind in ("fwd", "select", "attend")]
    assert len(set(cases)) == len(cases) == 24
    for row in results["prefill"] + results["backward"] + results["breakeven"]:
        assert row["ms"] > 0
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
        if row["kind"] in ("fwd", "bwd"):
            assert row["ratio"] == pytest.approx(row["ms"] / row["dense_ms"])
    assert [row["kind"] for row in results["memory"]] == ["memory_fwd", "memory_bwd"]


def test_the_scorer_is_an_option(bench):
    gpu, data = bench("_gpu"), bench("_data")
    for script in ("prefill", "decode", "model", "breakeven"):
        assert gpu.scoring_of(bench(script).parser().parse_args([])) == gpu.TOKENS
    given = ["--scorer", "pooled", "--query-block", "16"]
    (point, *_) = bench("prefill").points(bench("prefill").parser().parse_args(["--quick", *given]))
    assert (point.scoring, point.scoring.suffix) == (gpu.Scoring("pooled", query_block=16), "/qb16")
    config = gpu.config_for(96, 0, gpu.Scoring(score_dims=32, score_dtype="fp8"))
    geometry = gpu.geometry_of(config, 128)
    assert geometry.channels == ((*range(48, 64), *range(112, 128)),)
    heads, length = data.Heads(4, 1, 128), 8192
    chosen = length * (length + 1) // 2 - 6144 * 6145 // 2
    assert bench("_work").selection_work(heads, length, geometry).flops == 2 * 4 * 32 * chosen
    read = length * (32 + 4) + 4 * 128 * min(length, 96 * 64)
    assert bench("decode").floor_bytes(heads, 1, length, geometry, sparse=True) == read


def test_results_are_written_shown_and_drawn(bench, results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    header = {"device": "NVIDIA H100 80GB HBM3", "torch": "2", "matmul_tflops": 1.0, "break_even": {"4x2x16": "200"}}
    gpu = bench("_gpu")
    for script, rows in results.items():
        path = gpu.save(script, tmp_path, header, rows)
        assert path == tmp_path / "nvidia-h100-80gb-hbm3" / f"{script}.json"
        assert json.loads(path.read_text()) == {"header": header, "rows": rows}
    bench("_common").show(OutputFormat.TABLE, results["prefill"], bench("prefill").COLUMNS, bench("prefill").FORMATS)
    assert "attend/4x2x16/96/256/random" in capsys.readouterr().out
    drawn = bench("_plot_gpu").draw_all(tmp_path / "nvidia-h100-80gb-hbm3", tmp_path / "images")
    assert [path.name for path in drawn] == [
        f"gpu_{n}.png" for n in ("prefill", "roofline", *SCRIPTS[1:2], *SCRIPTS[3:-1])
    ]
    assert all(path.stat().st_size > 10000 for path in drawn)


def test_a_baseline_that_cannot_run_leaves_its_reason(bench):
    def fails():
        raise RuntimeError("\nNo available kernel.\nAborting")

    row = {}
    bench("_gpu").attempt(row, "flash", fails)
    assert row == {"flash_ms": None, "flash_note": "RuntimeError: No available kernel."}


def test_default_points_cover_both_geometries(bench):
    prefill = bench("prefill")
    chosen = list(prefill.points(prefill.parser().parse_args([])))
    assert sum(point.length == 131072 for point in chosen) == 4
    assert {point.length for point in chosen if point.flex} == {32768}
    assert [point.heads for point in chosen[12:]] == [*prefill.EXTRA, bench("_data").SMOLLM2]
    assert len(list(prefill.points(prefill.parser().parse_args(["--quick"])))) == 2


def test_a_mixed_batch_keeps_the_end_of_each_row(bench, monkeypatch):
    prefill, seen = bench("prefill"), {}

    def attention(q, k, v, config, *, key_mask):
        seen.update(q=q, key_mask=key_mask)
        return q

    monkeypatch.setattr(prefill.infllm_pass, "switchable_attention", attention)
    row = prefill.measure_mixed(CPU, bench("_data").Heads(2, 1, 16), (40, 100))
    assert row["case"] == "mixed/2x1x16/96/100/local/tokens-auto-key"
    assert seen["key_mask"].sum(1).tolist() == [40, 100]
    assert not seen["q"][0, :, :60].any()
    assert seen["q"][0, :, 60:].any(-1).all()


def test_a_model_is_measured_dense_and_sparse(bench):
    pytest.importorskip("transformers")
    model = bench("model")
    sizes = model.LLAMA_3_8B | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
    plain = model.build(1, sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}, CPU, torch.float32)
    rows = [
        row
        for variant in ("eager_sdpa", "sparsified")
        for row in model.measure(variant, plain, [128], SMALL, data=["random", "local"], train=False)
    ]
    model.add_ratios(rows)
    cases = ["eager_sdpa/1/128/random", "sparsified/1/128/random", "sparsified/1/128/local"]
    assert [row["case"] for row in rows] == [f"model/{case}" for case in cases]
    assert rows[1]["ratio"] == pytest.approx(rows[1]["ms"] / rows[0]["ms"])


def test_a_training_step_is_divided_into_kinds_of_kernels(bench, monkeypatch):
    pytest.importorskip("transformers")
    model, script = bench("model"), bench("train_kernels")
    monkeypatch.setitem(
        model.VARIANTS,
        "sparsified",
        ("sdpa", lambda model, config: infllm_pass.sparsify(torch.compile(model, backend="eager"), config)),
    )
    sizes = model.LLAMA_3_8B | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    plain = model.build(1, sizes, CPU, torch.float32).train()
    kinds, single = script.measure("sparsified", plain, 128, SMALL, optimizer=True, steps=1)
    *parts, idle, step = kinds
    assert sum(row["ms"] for row in (*parts, idle)) == pytest.approx(step["ms"])
    assert {row["case"] for row in parts} == {*script.KINDS, script.REST}
    products = next(row for row in parts if row["case"] == "matrix products")
    assert products["ms"] > 0
    assert products["launches"] >= 21  # 7 of a layer, 14 of their gradients
    assert next(row for row in parts if row["case"] == "optimizer")["ms"] > 0
    assert [row["ms"] for row in single] == sorted((row["ms"] for row in single), reverse=True)


def test_every_kernel_of_training_is_of_a_kind(bench):
    script = bench("train_kernels")
    sources = [path for path in (ROOT / "kernels/triton").rglob("*.py") if "decode" not in path.parts]
    launched = {name for path in sources for name in re.findall(r"wrap_triton\((\w+_kernel)\)", path.read_text())}
    assert len(launched) > 15
    assert not {name for name in launched if script.kind_of(name) in (script.REST, "matrix products")}
    backward = [
        name
        for path in sources
        if path.parent.name == "backward"
        for name in launched
        if f"def {name}(" in path.read_text()
    ]
    assert len(backward) > 5
    assert {script.kind_of(name) for name in backward} == {"attention backward"}
    assert script.kind_of("_scattered_kernel") == "attention forward"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x128x64", "attention backward"),
        ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true>", "attention backward"),
        ("triton_tem_fused_flex_attention_0", "attention forward"),
        ("triton_tem_fused_flex_attention_backward_1", "attention backward"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "elementwise and reductions"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<3>>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_kernels_of_libraries_are_of_a_kind(bench, kernel, kind):
    assert bench("train_kernels").kind_of(kernel) == kind


def test_generation_is_measured_dense_and_sparse(bench):
    pytest.importorskip("transformers")
    generate = bench("generate")
    sizes = generate.LLAMA_3_8B | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
    plain = generate.build(
        1, sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}, CPU, torch.float32, head=True
    )
    rows = [
        generate.measure(variant, plain, 2, 64, SMALL, chunk=chunk, steps=3)
        for variant, chunk in (("dense", None), ("sparsified", 32))
    ]
    generate.add_speedups(rows)
    assert [row["case"] for row in rows] == ["generate/dense/1/64/2", "generate/sparsified/1/64/2"]
    assert rows[1]["speedup"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    assert rows[0]["ttft_s"] is None
    assert rows[1]["ttft_s"] > 0
    assert [(row["graphs"], row["recompiled"]) for row in rows] == [(1, 0), (2, 0)]


def test_a_prompt_that_is_no_multiple_of_the_chunk_is_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate", "--lengths", "10000"])
    with pytest.raises(SystemExit) as leaving:
        bench("generate").main()
    assert leaving.value.code == 2
    assert "10000 is no multiple of --chunk 8192" in capsys.readouterr().err


def test_a_package_is_measured_against_the_compiled_model(bench, monkeypatch):
    pytest.importorskip("transformers")
    package, sizes = bench("package"), {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    plain = package.build(1, package.SIZES | sizes | {"intermediate_size": 32}, CPU, torch.float32, head=True)
    model = package.Logits(plain).eval()

    def prepare(variant, model, example, config, folder):
        return infllm_pass.sparsify(torch.compile(model, backend="eager"), config)

    monkeypatch.setattr(package, "prepare", prepare)  # compiling takes most of a minute
    monkeypatch.setattr(package, "build_program", lambda folder: folder / "logits")
    runs = prepare("package", model, None, SMALL, None)
    monkeypatch.setattr(package, "run_program", lambda program, path, ids: runs(ids)[0, -1])
    *rows, short, long = package.measure(model, [70, 40], SMALL, variants=("compiled", "package", "cpp"))
    assert [row["case"] for row in rows] == ["compiled/40", "compiled/70", "package/40", "package/70"]
    assert [row["ratio"] for row in rows[:2]] == [1, 1]
    assert all(row["ratio"] > 0 and row["error"] <= 1e-6 and row["ms"] > 0 for row in rows)
    assert [row["case"] for row in (short, long)] == ["cpp/40", "cpp/70"]
    assert max(short["error"], long["error"]) <= 1e-6
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    (row,) = package.program_rows({}, {}, Path())
    assert row["note"] == "no cmake"


@pytest.mark.parametrize("scorer", ["pooled", "tokens"])
def test_a_training_step_on_the_cpu_is_the_sum_of_its_stages(bench, scorer):
    script = bench("cpu_training")
    options = SimpleNamespace(clock="processor", repeats=1, heads=2, heads_kv=1, dim=64)
    row = script.measure("random", 2048, scorer, 26, options)
    assert row["ms"] == pytest.approx(row["select_ms"] + row["forward_ms"] + row["backward_ms"])
    assert row["dense_ms"] == pytest.approx(row["dense_forward_ms"] + row["dense_backward_ms"])
    assert row["case"] == f"train/2x1x64/26/2048/random/{scorer}"


@pytest.mark.parametrize("script", [*SCRIPTS, "package"])
def test_without_a_gpu_one_line_says_so(bench, monkeypatch, capsys, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [script])
    with pytest.raises(SystemExit) as leaving:
        bench(script).main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "this benchmark needs a CUDA device, and torch sees none\n"


def test_compile_time_is_measured_with_and_without_the_pass(bench):
    pytest.importorskip("transformers")
    row = bench("compile_time").measure(2, "sdpa", False, 1)
    assert row["switchable"] == 2
    assert 0 < row["pass_s"] < row["with_s"]
    assert row["share"] == row["pass_s"] / row["without_s"]


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_a_script_prints_its_rows_for_programs(bench, monkeypatch, tmp_path, capsys, form):
    script = bench("cpu_decode")
    arguments = ["cpu_decode", "--lengths", "128", "--steps", "2", "--dim", "16", "--heads", "2", "--heads-kv", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--output", str(tmp_path / "rows.json"), form])
    script.main()
    out, err = capsys.readouterr()
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    if form == "--json":
        assert json.loads(out) == written
    else:
        heading, *lines = out.splitlines()
        rows = [dict(zip(heading.split(","), line.split(","), strict=True)) for line in lines]
        assert rows == [{name: str(value) for name, value in row.items()} for row in written]
    assert "written to" in err


def test_score_terms_are_measured_against_none(bench):
    terms = bench("score_terms")
    rows = terms.measure(bench("_data").Heads(4, 2, 16), 150, SMALL, "local", CPU)
    assert [row["term"] for row in rows] == ["none", "softcap", "key_bias", "sinks"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / rows[0]["ms"])
        assert row["bwd_ratio"] == pytest.approx(row["bwd_ms"] / rows[0]["bwd_ms"])


@pytest.mark.parametrize(("name", "term"), [("gpt-oss-20b", "sinks"), ("gemma-2-9b", "capped")])
def test_models_with_terms_are_measured_dense_and_sparse(bench, name, term):
    pytest.importorskip("transformers")
    script = bench("term_models")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain = script.build(name, CPU, torch.float32, **sizes, head_dim=16, sliding_window=32)
    reports = []

    def sparsified(model, config):
        handle = infllm_pass.sparsify(torch.compile(model, backend="eager"), config, strict=True)
        reports.append(handle)
        return handle

    variants = {"eager": script.VARIANTS["eager"], "sparsified": ("eager", sparsified)}
    rows = [
        row
        for variant in variants
        for row in script.measure(variant, plain, [128], SMALL, data=["local"], train=False, variants=variants)
    ]
    assert [row["variant"] for row in rows] == ["eager", "sparsified"]
    sites = infllm_pass.report(reports[0]).sites
    assert {term in site.mask for site in sites} == {True}
    assert [site.reason for site in sites] == ["WINDOW_WITHIN_BUDGET", "SWITCHABLE"]
