"""What benchmarks/tables.py reads out of the programs' output, and what benchmarks/machine.py out of the system's files."""
import unittest

import support
import machine
import results
import tables


def by_name(figures):
    return {(f.name, f.beside): f for f in figures}


class Tables(unittest.TestCase):
    def test_kernels(self):
        found = by_name(tables.kernels(support.KERNELS))
        self.assertEqual(len(found), 7)
        attention = found["attention 4 x 1024, 12 x 64, causal, bf16, forward", "ATen"]
        self.assertEqual((attention.value, attention.unit, attention.ratio), (10, "ms", 2.4))
        self.assertEqual(found["attention 4 x 1024, 12 x 64, causal, bf16, forward and backward", "ATen"].ratio, 2)
        self.assertTrue(found["layer norm [4096, 768], fp32, forward", "ATen"].is_behind)
        product = found["bf16 product 4096 x 768 x 768, y", "ATen"]
        self.assertEqual((product.value, product.unit, product.ratio), (970, "GFLOP/s", 0.97))
        self.assertAlmostEqual(found["bf16 product 4096 x 768 x 768, dW", "ATen"].ratio, 933 / 692)

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
        for parse, text in ((tables.kernels, support.KERNELS), (tables.optimizer, support.OPTIMIZER), (tables.overlap, support.OVERLAP),
                            (tables.collectives, support.COLLECTIVES)):
            with self.assertRaisesRegex(results.Problem, "no table row"):
                parse(text.splitlines()[0])
        with self.assertRaisesRegex(results.Problem, "'nan'.*layer norm"):
            tables.kernels(support.KERNELS.replace("| 2.21 |", "| nan |"))
        with self.assertRaisesRegex(results.Problem, "'0.00'.*layer norm"):
            tables.kernels(support.KERNELS.replace("| 2.21 |", "| 0.00 |"))
        with self.assertRaisesRegex(results.Problem, "6 cells under 9 headings"):
            tables.collectives(support.COLLECTIVES.replace("| 50.0 (0.4, 4.0) | 18.5 (1.4, 10.4) | 5.0 (4.0, 40.0) ", ""))


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
