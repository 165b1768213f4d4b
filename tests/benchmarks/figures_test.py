"""Statistics, files and verdicts of benchmarks/results.py and benchmarks/regression.py."""
import json
import math
import unittest

import support
import regression
import results
import step_cost
from support import figure


class Statistics(unittest.TestCase):
    def test_medians_and_the_ratio_of_medians_with_the_spread_of_pairs(self):
        made = results.make_figure("c", "n", "ms", [[10, 12], [20, 30]], peer=[[40, 44], [50, 50]], beside="p", is_times_as_fast=True)
        self.assertEqual((made.value, made.low, made.high, made.count), (16, 10, 30, 4))
        self.assertEqual((made.ratio, made.ratio_low, made.ratio_high), (47 / 16, 2.0, 42 / 11))

    def test_a_share_divides_the_other_way(self):
        made = results.make_figure("c", "n", "MiB", [[30]], peer=[[60]], beside="p", more_is_better=False, aim=0.45)
        self.assertEqual(made.ratio, 0.5)
        self.assertTrue(made.has_missed)
        self.assertFalse(made.is_behind)

    def test_the_ratio_of_medians_lies_within_its_spread(self):
        made = results.make_figure("c", "n", "ms", [[1, 1, 9], [9, 1, 1, 1, 1]], peer=[[2], [3]], beside="p")
        self.assertLessEqual(made.ratio_low, made.ratio)
        self.assertLessEqual(made.ratio, made.ratio_high)

    def test_nothing_measured_and_unequal_repeats_are_refused(self):
        for own, peer in (([], None), ([[]], None), ([[1], [2]], [[1]]), ([[1], [2]], [[1], []])):
            with self.assertRaises(results.Problem):
                results.make_figure("c", "n", "ms", own, peer=peer)

    def test_the_line_of_least_relative_errors(self):
        intercept, slope = step_cost.fitted_line([(1, 5.0), (2, 7.0), (100, 203.0)])
        self.assertAlmostEqual(intercept, 3.0)
        self.assertAlmostEqual(slope, 2.0)
        # A short step that is off counts as much as a long one that is off by the same share.
        low, high = (step_cost.fitted_line([(1, 1.0 * a), (10, 10.0), (100, 100.0 * b)]) for a, b in ((1.1, 1), (1, 1.1)))
        self.assertGreater(low[0], 0.05)
        self.assertLess(high[0], 0)

    def test_an_aim_without_a_peer_is_one_of_the_value(self):
        self.assertTrue(figure(ratio=None, value=95.0, aim=100, more_is_better=True).has_missed)
        self.assertFalse(figure(ratio=None, value=95.0, aim=100, more_is_better=False).has_missed)
        self.assertTrue(figure(ratio=None, value=math.nan, aim=1, more_is_better=False).has_missed)

    def test_runs_are_merged_by_name_and_peer(self):
        runs = [[figure(ratio=r, value=v, low=v - 1, high=v + 1), figure("other", ratio=None)] for r, v in ((1, 10), (3, 50), (2, 20))]
        merged = {f.name: f for f in results.merge(runs)}
        speed = merged["speed"]
        self.assertEqual((speed.value, speed.low, speed.high, speed.count), (20, 9, 51, 15))
        self.assertEqual((speed.ratio, speed.ratio_low, speed.ratio_high), (2, 0.95, 3.05))
        self.assertIsNone(merged["other"].ratio)


class Files(support.Folder):
    def test_round_trip(self):
        figures = [figure(aim=1.5), figure("memory", ratio=0.25, more_is_better=False), figure("loss", ratio=None, unit="")]
        loaded = results.load_result(support.write_result(self.folder, figures))
        self.assertEqual(loaded.figures, figures)
        self.assertEqual(loaded.record["machine"]["huge_pages"], "madvise")

    def test_rounding_keeps_a_value_within_its_spread(self):
        made = [results.make_figure("c", "n", "ms", [[1 / 3, 2 / 3, 1 / 3 + 1e-9]], peer=[[1 / 7]], beside="p")]
        results.write_json(self.folder / "f.json", {"format": results.FORMAT, "figures": results.as_records(made)})
        self.assertEqual(results.load(self.folder / "f.json")[1][0].value, 0.333333)

    def expect_problem(self, change, *words):
        """A result file changed by `change(record)` is refused with a message that has all of the words, its path among them."""
        record = support.record([figure(), figure("other")])
        change(record)
        path = self.folder / "avx2-4" / "training.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
        with self.assertRaises(results.Problem) as caught:
            results.load_result(path)
        for word in (str(path), "benchmarks/run", *words):
            self.assertIn(word, str(caught.exception))

    def test_damage_is_named_with_file_field_and_value(self):
        first = "figures[0]"
        self.expect_problem(lambda r: r["figures"][0].pop("value"), first, "'value'")
        self.expect_problem(lambda r: r["figures"][0].update(value="fast"), first, "'value'", '"fast"')
        self.expect_problem(lambda r: r["figures"][0].update(value=True), first, "'value'", "true")
        self.expect_problem(lambda r: r["figures"][0].update(ratio=math.nan), first, "'ratio'", "NaN")
        self.expect_problem(lambda r: r["figures"][0].update(low=105.0), first, "'value'", "100.0", "105.0")
        self.expect_problem(lambda r: r["figures"][0].update(ratio=7.0), first, "'ratio'", "7.0")
        self.expect_problem(lambda r: r["figures"][0].update(speed=1), first, "'speed'")
        self.expect_problem(lambda r: r["figures"][1].pop("ratio_low"), "figures[1]", "'ratio_low'")
        self.expect_problem(lambda r: r["figures"][1].pop("beside"), "figures[1]", "'beside'")
        self.expect_problem(lambda r: r["figures"].append(3), "figures[2]", "3")
        self.expect_problem(lambda r: r["figures"].append(r["figures"][0]), "'speed'", "2 times")
        self.expect_problem(lambda r: r.update(format=9), "'format'", "9")
        self.expect_problem(lambda r: r.pop("is_idle"), "'is_idle'")
        self.expect_problem(lambda r: r.update(case="startup"), "'case'", "startup")
        self.expect_problem(lambda r: r["machine"].update(type="amx-2"), "'machine.type'", "amx-2")

    def test_half_a_file_and_no_file_are_named(self):
        path = support.write_result(self.folder, [figure()])
        path.write_text(path.read_text()[:100])
        for broken in (path, self.folder / "none.json"):
            with self.assertRaises(results.Problem) as caught:
                results.load(broken)
            self.assertIn(str(broken), str(caught.exception))


class Regression(unittest.TestCase):
    def verdict(self, old, new, **more):
        return regression.verdict(figure(ratio=old, spread=0.1, **more), figure(ratio=new, spread=0.1, **more))

    def test_where_more_is_better(self):
        self.assertEqual(self.verdict(2.0, 1.55), "worse")   # up to 1.65, under 0.9 x 1.9
        self.assertEqual(self.verdict(2.0, 1.65), "same")    # up to 1.75
        self.assertEqual(self.verdict(2.0, 2.45), "better")  # from 2.35, above 1.1 x 2.1
        self.assertEqual(self.verdict(2.0, 2.40), "same")

    def test_where_less_is_better(self):
        self.assertEqual(self.verdict(2.0, 1.55, more_is_better=False), "better")
        self.assertEqual(self.verdict(2.0, 2.45, more_is_better=False), "worse")
        self.assertEqual(self.verdict(2.0, 2.40, more_is_better=False), "same")

    def test_times_alone_are_never_compared(self):
        rows, unmeasured = regression.compare([figure(ratio=None, value=100.0), figure("gone")],
                                              [figure(ratio=None, value=91.0), figure("new", ratio=0.1)])
        self.assertEqual([what for _, _, what in rows], ["not compared", "not compared"])
        self.assertEqual(unmeasured, [("gone", "a peer")])

    def test_the_table_begins_with_what_is_worse(self):
        rows, _ = regression.compare([figure("a"), figure("b")], [figure("a"), figure("b", ratio=1.0)])
        first = regression.table(rows).splitlines()[0]
        self.assertTrue(first.startswith("worse") and "training: b, beside a peer" in first and "2 (1.95 to 2.05)" in first, first)


if __name__ == "__main__":
    unittest.main()
