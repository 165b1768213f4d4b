"""What benchmarks/tables.py reads out of the programs' output, and what benchmarks/machine.py out of the system's files."""
import contextlib
import copy
import importlib.util
import io
import re
import unittest

import support
import floor
import machine
import results
import tables

compare = importlib.util.module_from_spec(importlib.util.spec_from_file_location("compare", support.BENCHMARKS / "kernels" / "compare.py"))
compare.__spec__.loader.exec_module(compare)


def by_name(figures):
    return {(f.name, f.beside): f for f in figures}


class Tables(unittest.TestCase):
    def test_kernels_beside_aten_and_the_peaks(self):
        found = by_name(tables.kernels(support.KERNELS))
        norm = found["layer_norm/4096x768/fp32/forward", "ATen"]
        self.assertEqual((norm.unit, norm.aim, norm.count), ("GB/s", 1, 2))
        product = found["linear/784x384x384/bf16/forward", "ATen"]
        self.assertEqual(product.unit, "GFLOP/s")
        self.expect_medians(product, "linear/784x384x384/bf16/forward/own", "linear/784x384x384/bf16/forward/aten")
        for beside, peak in (("amx_bf16 in registers", "registers"), ("amx_bf16 from the first-level cache", "l1")):
            share = found["linear/784x384x384/bf16/forward", beside]
            self.expect_medians(share, "linear/784x384x384/bf16/forward/own", f"peak/amx_bf16/{peak}")
            self.assertEqual(share.aim, 0.9)
        attention = found["attention/4x1024/12x64/causal/bf16/forward", "amx_bf16 in registers"]
        self.assertAlmostEqual(attention.aim, 300 / 469)
        self.assertEqual(len(found), 6)

    def expect_medians(self, figure, own, peer):
        """The figure's are Google Benchmark's own, which we do not read."""
        medians = {entry["run_name"]: entry["FLOP/s"] for entry in support.KERNELS["benchmarks"]
                   if entry.get("aggregate_name") == "median" and "FLOP/s" in entry}
        self.assertAlmostEqual(figure.value, medians[f"{own}/real_time"] / 1e9, delta=1e-5 * figure.value)
        self.assertAlmostEqual(figure.ratio, medians[f"{own}/real_time"] / medians[f"{peer}/real_time"], delta=1e-5)

    def test_attention_on_the_machine_that_its_aim_was_made_for(self):
        record = copy.deepcopy(support.KERNELS)
        record["context"]["instruction_set"] = "avx512_bf16"
        for entry in record["benchmarks"]:
            entry["run_name"] = entry["run_name"].replace("amx_bf16", "avx512_bf16")
        found = by_name(tables.kernels(record))
        alone = found["attention/4x1024/12x64/causal/bf16/forward, alone", None]
        self.assertEqual((alone.aim, alone.ratio), (300, None))
        self.assertIsNone(found["attention/4x1024/12x64/causal/bf16/forward", "avx512_bf16 in registers"].aim)

    def test_kernels_without_peaks_are_beside_aten_alone(self):
        record = support.KERNELS | {"benchmarks": [entry for entry in support.KERNELS["benchmarks"] if "peak/" not in entry["run_name"]]}
        self.assertEqual({beside for _, beside in by_name(tables.kernels(record))}, {"ATen"})

    def test_what_google_benchmark_does_not_write_is_refused(self):
        def expect(change, words):
            record = copy.deepcopy(support.KERNELS)
            change(record)
            with self.assertRaisesRegex(results.Problem, words):
                tables.kernels(record)
        runs = [number for number, entry in enumerate(support.KERNELS["benchmarks"]) if "layer_norm" in entry["run_name"]]
        first = runs[0]
        expect(lambda r: r.pop("benchmarks"), "not what Google Benchmark writes")
        expect(lambda r: r["benchmarks"][first].pop("run_name"), "not what Google Benchmark writes")
        expect(lambda r: r["benchmarks"].clear(), "no benchmark")
        expect(lambda r: r["benchmarks"][first].update({"bytes/s": 0}), "layer_norm.*is 0")
        expect(lambda r: r["benchmarks"][first].pop("bytes/s"), "layer_norm.*is null")
        expect(lambda r: r["benchmarks"][first].update(error_occurred=True, error_message="no tiles"), "layer_norm.*no tiles")
        expect(lambda r: r["benchmarks"].pop(first), "not as many results of ATen")
        expect(lambda r: r.update(benchmarks=[e for e in r["benchmarks"] if "/own" not in e["run_name"]]), "no table row")

    def test_rows_and_what_each_is_started_with(self):
        names = ["peak/amx_bf16/registers", "peak/amx_bf16/l1", "peak/avx2_fp32/l1", "linear/2x3x4/bf16/dx/own", "linear/2x3x4/bf16/dx/aten",
                 "linear/2x3x4/fp32/dx/own", "rope/5/bf16/both/own", "rope/5/bf16/forward/aten"]
        self.assertEqual(compare.rows_of(names), {"linear/2x3x4/bf16": "bf16", "linear/2x3x4/fp32": "fp32", "rope/5/bf16": "bf16"})
        started = {row: [name for name in names if re.search(compare.pattern_of(row, dtype, names), name)]
                   for row, dtype in compare.rows_of(names).items()}
        self.assertEqual(started, {"linear/2x3x4/bf16": names[:2] + names[3:5], "linear/2x3x4/fp32": [names[2], names[5]],
                                   "rope/5/bf16": names[6:]})

    def test_optimizer_beside_the_best_plain_loop(self):
        found = by_name(tables.optimizer(support.OPTIMIZER))
        self.assertEqual(set(name for name, _ in found), {"AdamW fp32", "AdamW bf16 moments"})
        self.assertEqual(found["AdamW fp32", "the best plain loop"].ratio, 1.05)
        self.assertEqual(found["AdamW fp32", "the best plain loop"].aim, 0.7)
        self.assertEqual(found["AdamW bf16 moments", "the best plain loop"].ratio, 0.75)

    def test_overlap_as_the_step_with_communication_beside_that_without(self):
        ddp, zero3, gathered = tables.overlap(support.OVERLAP)
        self.assertAlmostEqual(ddp.ratio, 1 + 0.5 * 0.055)
        self.assertAlmostEqual(ddp.aim, 1.05)
        self.assertAlmostEqual(zero3.ratio, 0.995)
        self.assertFalse(ddp.has_missed or zero3.has_missed)
        self.assertAlmostEqual(gathered.ratio, 1.075)
        self.assertIsNone(gathered.aim)

    def test_collectives_beside_both_peers_with_aims_up_to_32_mib_at_2_ranks(self):
        found = by_name(tables.collectives(support.COLLECTIVES))
        self.assertEqual(len(found), 12)
        own = found["all_reduce fp32, 64 KiB, 2 ranks, own", "Open MPI"]
        self.assertEqual((own.value, own.ratio, own.aim), (50, 0.4, None))
        buffers = found["all_reduce fp32, 64 KiB, 2 ranks, own, in buffers", "gloo"]
        self.assertEqual((buffers.value, buffers.ratio, buffers.aim), (5, 40, 10))
        self.assertIsNone(found["all_reduce bf16, 262144 KiB, 2 ranks, own, in buffers", "gloo"].aim)
        self.assertIsNone(found["all_reduce fp32, 64 KiB, 4 ranks, own, in buffers", "Open MPI"].aim)

    def test_output_that_has_changed_is_refused_with_the_line(self):
        for parse, text in ((tables.optimizer, support.OPTIMIZER), (tables.overlap, support.OVERLAP),
                            (tables.collectives, support.COLLECTIVES)):
            with self.assertRaisesRegex(results.Problem, "no table row"):
                parse(text.splitlines()[0])
        for broken in ("nan", "0.00"):
            with self.assertRaisesRegex(results.Problem, f"'{broken}'.*ddp"):
                tables.overlap(support.OVERLAP.replace("400.0", broken, 1))
        with self.assertRaisesRegex(results.Problem, "6 cells under 9 headings"):
            tables.collectives(support.COLLECTIVES.replace("| 50.0 (0.4, 4.0) | 18.5 (1.4, 10.4) | 5.0 (4.0, 40.0) ", ""))


class Floor(unittest.TestCase):
    # 2 rows of 3 tokens, so 6 tokens and 2 x (1 + 2 + 3) = 12 pairs of a query and a key that it sees.
    def test_gpt2_by_hand(self):
        config = {"model_type": "gpt2", "n_embd": 4, "n_layer": 2, "n_head": 2, "vocab_size": 10}
        layer = 4 * 12 + 4 * 4 + 4 * 16 + 16 * 4  # qkv, attention's output, MLP
        weights = 2 * layer + 4 * 10
        attention = 12 * 4 * 2                    # pairs, width, layers
        self.assertEqual(floor.flops_of_step(config, 2, 3), 6 * 6 * weights + 12 * attention)
        self.assertEqual(floor.flops_of_step(config | {"n_inner": 8}, 2, 3), 6 * 6 * (weights - 2 * 64) + 12 * attention)

    def test_llama_with_grouped_queries_by_hand(self):
        config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 10}
        weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 5 + 8 * 10
        self.assertEqual(floor.flops_of_step(config, 2, 3), 6 * 6 * weights + 12 * 12 * 8)
        # Heads of 3 instead of 2: queries and output 12 wide, keys and values 6.
        wide = 2 * 8 * 12 + 2 * 8 * 6 + 3 * 8 * 5 + 8 * 10
        self.assertEqual(floor.flops_of_step(config | {"head_dim": 3}, 2, 3), 6 * 6 * wide + 12 * 12 * 12)

    def test_gpt2_124m_without_attention_is_what_performance_md_says(self):
        weights, head, _, _ = floor.shape_of({"model_type": "gpt2"})
        self.assertEqual(round(6 * (weights + head) * 4096 / 1e9), 3036)

    def test_the_share_is_the_floor_in_a_step(self):
        figures = results.Figures("training", None)
        config = {"model_type": "gpt2", "n_embd": 4, "n_layer": 2, "n_head": 2, "vocab_size": 10}
        seconds, peak = 0.5, 1e-6  # a step of 2 x 3 tokens, GFLOP/s
        measured = {"registers": {"avx2_fp32": peak / 2, "avx512_bf16": peak}, "memory": 1.0}
        with contextlib.redirect_stdout(io.StringIO()):
            floor.add_share(figures, "tiny", config, 3, [[6 / seconds]], [measured], aim=0.85)
            floor.add_share(figures, "tiny", config, 3, [[6 / seconds]], [None])
            floor.add_share(figures, "tiny", config, 3, [[6 / seconds]], [{"registers": {}, "memory": 1.0}])
        self.assertEqual([figure.beside for figure in figures.all], ["avx512_bf16 in registers"])
        self.assertAlmostEqual(figures.all[0].ratio, floor.flops_of_step(config, 2, 3) / 1e9 / peak / seconds)

    def test_other_models_are_refused(self):
        with self.assertRaisesRegex(results.Problem, "'bert'"):
            floor.flops_of_step({"model_type": "bert"}, 1, 1)


class Machine(unittest.TestCase):
    def test_the_type_follows_the_kernels_choice(self):
        wide = ["avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"]
        for flags, name in (([], "portable"), (["avx2"], "avx2"), (wide[:-1], "avx2"), (wide, "avx512"), ([*wide, "avx512_bf16"],
                            "avx512_bf16"), ([*wide, "avx512_bf16", "amx_tile", "amx_bf16"], "amx"), ([*wide, "amx_tile"], "avx512")):
            self.assertEqual(machine.instruction_set(flags), name)
        self.assertEqual(machine.flags_of("processor : 0\nflags\t\t: fpu avx2 avx512_bf16 sse\n"), ["avx2", "avx512_bf16"])

    def test_only_cores_we_may_use_are_counted(self):
        stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 50 800 10 0 0 40 7 0\ncpu1 999 999 999 999 0 0 0 999 0 0\nintr 5\n"
        self.assertEqual(machine.core_seconds(stat, [0], 100), (1.5, 0.4, 10.0))

    def test_what_we_do_ourselves_is_not_the_others(self):
        found = machine.shares((10.0, 1.0, 100.0, 5.0), (16.0, 1.5, 110.0, 10.0))
        self.assertEqual(found, {"others": 0.1, "stolen": 0.05})

    def test_complaints(self):
        idle = {"others": 0.01, "stolen": 0.001}
        self.assertIsNone(machine.complaint(idle, 2))
        self.assertIsNone(machine.complaint(idle | {"load": 0.9}, 2))
        self.assertIn("load average is 1.10", machine.complaint(idle | {"load": 1.1}, 2))
        self.assertIn("other processes take 20.0%", machine.complaint(idle | {"others": 0.2}, 2))
        self.assertIn("steal", machine.complaint(idle | {"stolen": 0.03}, 2))


if __name__ == "__main__":
    unittest.main()
