"""benchmarks/run as a user calls it, with made-up programs in place of the built ones; the report and its plots."""
import importlib.machinery
import importlib.util
import os
import pathlib
import subprocess
import unittest
import xml.etree.ElementTree as ElementTree

import support
import machine
import plots
import report
import results
from support import figure


class Run(support.Folder):
    def program(self, output, code=0):
        """A benchmark_optimizer that prints this."""
        path = self.folder / "build" / "benchmark_optimizer"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {code}\n")
        path.chmod(0o755)

    def run_suite(self, *arguments, idle=("--not-idle",), **variables):
        command = [support.BENCHMARKS / "run", *arguments, *idle, "--build", self.folder / "build", "--folder", self.folder / "files",
                   "--results", self.folder / "results", "--docs", self.folder / "docs"]
        environment = {name: value for name, value in os.environ.items() if name != "SHARDTUNE_ISA"} | variables
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)

    def expect(self, result, code, *words):
        self.assertEqual(result.returncode, code, result.stdout + result.stderr)
        for word in words:
            self.assertIn(word, result.stdout + result.stderr)

    def test_measures_records_reports_and_compares(self):
        self.program(support.OPTIMIZER)
        optimizer = ("--case", "optimizer", "--quick")
        self.expect(self.run_suite(*optimizer), 0, "2 figures written")
        path = self.folder / "results" / machine.describe()["type"] / "optimizer.json"
        result = results.load_result(path)
        self.assertEqual([(f.ratio, f.count) for f in result.figures], [(1.05, 3), (0.75, 3)])
        self.assertTrue(result.record["is_quick"])
        self.assertNotIn("register_gigaflops", result.record["before"])
        for private in (str(self.folder), os.uname().nodename):
            self.assertNotIn(private, path.read_text())
        self.assertEqual(list((self.folder / "files").iterdir()), [])

        self.expect(self.run_suite("--report"), 0, "benchmarks.md")
        self.assertIn("| AdamW fp32 | 42 GB/s | 3 | the best plain loop | 1.05 | at least 0.7 | met |",
                      (self.folder / "docs" / "benchmarks.md").read_text())

        before = path.read_text()
        self.expect(self.run_suite("--compare", *optimizer), 0, "0 of 2 figures are worse")
        self.program(support.OPTIMIZER.replace("0.66    42.00", "0.90    30.00"))
        self.expect(self.run_suite("--compare", *optimizer), 1, "1 of 2 figures are worse", "worse ", "AdamW fp32")
        self.program(support.OPTIMIZER.replace("0.66    42.00", "0.30    90.00"))
        self.expect(self.run_suite("--compare", *optimizer), 0, "better ")
        self.assertEqual(path.read_text(), before)  # comparing records nothing

        full = before.replace('"is_quick": true', '"is_quick": false').replace('"is_idle": false', '"is_idle": true')
        path.write_text(full)
        self.expect(self.run_suite(*optimizer), 2, str(path), "--quick would replace")
        self.expect(self.run_suite("--case", "optimizer"), 2, "--not-idle would replace")
        self.assertEqual(path.read_text(), full)

        path.write_text(before.replace('"count": 3', '"count": "three"', 1))
        self.expect(self.run_suite("--compare", *optimizer), 2, str(path), "figures[0]", "'count'", '"three"')
        self.expect(self.run_suite("--report"), 2, str(path), "'count'")

    def test_the_cores_limits_stand_beside_a_case_where_their_program_is_built(self):
        self.program(support.OPTIMIZER)
        kernels = self.folder / "build" / "benchmark_kernels"
        sample = pathlib.Path(__file__).with_name("kernels.json")
        kernels.write_text(f"#!/bin/sh\nfor argument; do case $argument in --benchmark_out=*) cp {sample} ${{argument#*=}};; esac; done\n")
        kernels.chmod(0o755)
        self.expect(self.run_suite("--case", "optimizer", "--quick"), 0)
        record = results.load_result(self.folder / "results" / machine.describe()["type"] / "optimizer.json").record
        greatest = max(entry["FLOP/s"] for entry in support.KERNELS["benchmarks"] if entry["run_name"].startswith("peak/amx_bf16/registers"))
        for when in ("before", "after"):
            self.assertEqual(record[when]["register_gigaflops"], {"amx_bf16": round(greatest / 1e9, 1)})
            self.assertGreater(record[when]["memory_gigabytes_per_second"], 1)
        kernels.write_text("#!/bin/sh\necho no such option >&2\nexit 3\n")
        self.expect(self.run_suite("--case", "optimizer", "--quick"), 2, "benchmark_kernels", "exit code 3", "no such option")

    def test_nothing_recorded_on_this_type_of_machine_is_code_2(self):
        self.program(support.OPTIMIZER)
        self.expect(self.run_suite("--compare", "--case", "optimizer"), 2, machine.describe()["type"], "record it first")
        self.expect(self.run_suite("--report"), 2, "no results")

    def test_what_is_missing_is_named_before_anything_runs(self):
        self.program(support.OPTIMIZER)
        self.expect(self.run_suite("--case", "optimizer", "optimiser"), 2, "'optimiser'", "--list")
        self.expect(self.run_suite("--case", "optimizer", "kernels"), 2, "benchmark_kernels", "--build", "-DSHARDTUNE_BENCHMARKS=ON")
        self.expect(self.run_suite("--case", "optimizer", SHARDTUNE_ISA="avx2"), 2, "SHARDTUNE_ISA is 'avx2'", "unset it")
        self.assertFalse((self.folder / "results").exists())

    def test_a_program_that_fails_or_prints_something_else_records_nothing(self):
        self.program(support.OPTIMIZER, code=9)
        self.expect(self.run_suite("--case", "optimizer", "--quick"), 2, "exit code 9")
        self.program("Segmentation fault\n")
        self.expect(self.run_suite("--case", "optimizer", "--quick"), 2, "no table row")
        self.assertFalse((self.folder / "results").exists())

    def test_a_machine_that_is_not_idle_is_code_3(self):
        self.program(support.OPTIMIZER)
        busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in machine.cores()]
        try:
            self.expect(self.run_suite("--case", "optimizer", "--quick", idle=()), 3, "not idle", "--not-idle")
        finally:
            for process in busy:
                process.kill()
                process.wait()
        self.assertFalse((self.folder / "results").exists())

    def test_a_driver_that_takes_too_long_is_ended_with_all_it_has_started(self):
        loader = importlib.machinery.SourceFileLoader("benchmarks_run", str(support.BENCHMARKS / "run"))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        loader.exec_module(module)
        started = self.folder / "started"
        with self.assertRaisesRegex(results.Problem, "sleeper: not done after 0.02 minutes"):
            # The pipe closes, and the call returns, only when the grandchild is dead as well.
            module.run_once("sleeper", ["sh", "-c", f"touch {started}; sleep 3600; true"], 0.02, dict(os.environ))
        self.assertTrue(started.exists())

    def test_list_needs_nothing(self):
        self.expect(self.run_suite("--list"), 0, "training", "collectives")


class Report(support.Folder):
    FIGURES = [figure("fast enough", ratio=2.0, aim=1.7), figure("a | bar & <tag>", ratio=1.2, aim=1.7), figure("slower", ratio=0.8),
               figure("hardly slower", ratio=0.98), figure("hardly missed", ratio=1.67, aim=1.7), figure("lean", ratio=0.4, aim=0.45, more_is_better=False),
               figure("dear but allowed", ratio=1.04, spread=0.01, aim=1.05, more_is_better=False),
               figure("loss", ratio=None, unit="", value=0.03, low=0.03, high=0.03, count=1, aim=0.02, more_is_better=False),
               figure("as it comes", ratio=None)]

    def render(self):
        written = report.write(self.folder / "results", self.folder / "docs", {"training": "whole cases", "startup": "first steps"})
        return (self.folder / "docs" / "benchmarks.md").read_text(), written

    def test_tables_and_what_lost(self):
        support.write_result(self.folder / "results", self.FIGURES)
        support.write_result(self.folder / "results", [figure()], case="startup", kind="amx-2")
        text, _ = self.render()
        lost, _, rest = text.partition("## What lost")[2].partition("## amx-2")
        self.assertIn("6 of 10 figures", lost)
        for name, why in (("a \\| bar & <tag>", "aim missed"), ("slower", "behind its peer"), ("loss", "aim missed"),
                          ("hardly slower", "behind its peer, within the spread"), ("hardly missed", "aim missed, within the spread"), ("dear but allowed", "behind its peer, aim met")):
            self.assertTrue(any(f"| {name} |" in line and line.endswith(f"| {why} |") for line in lost.splitlines()), (name, lost))
        for heading in ("### startup", "## avx2-4", "### training", "Limits before: all cores multiply in registers amx_bf16 3000, avx2_fp32 150 GFLOP/s, read and write 18.5 GB/s"):
            self.assertIn(heading, rest)
        self.assertIn("| lean | 100 (90 to 110) tokens/s | 5 | a peer | 0.4 (0.35 to 0.45) | at most 0.45 | met |", rest)
        self.assertNotIn("not idle", text)

    def test_results_of_a_busy_machine_say_so(self):
        path = support.write_result(self.folder / "results", self.FIGURES)
        path.write_text(path.read_text().replace('"is_idle": true', '"is_idle": false'))
        self.assertIn("The machine was not idle", self.render()[0])

    def test_plots_are_well_formed_with_a_bar_for_each_ratio(self):
        support.write_result(self.folder / "results", self.FIGURES)
        text, written = self.render()
        plot = self.folder / "docs" / "plots" / "avx2-4-training.svg"
        self.assertIn(plot, written)
        self.assertIn("](plots/avx2-4-training.svg)", text)
        root = ElementTree.parse(plot).getroot()
        space = "{http://www.w3.org/2000/svg}"
        self.assertEqual(root.tag, f"{space}svg")
        labels = [element.text for element in root.iter(f"{space}text")]
        self.assertIn("a | bar & <tag>, beside a peer", labels)
        bars = [element for element in root.iter(f"{space}rect") if element.get("height") != "9"]  # 9: the legend's
        self.assertEqual(len(bars), 7)
        self.assertEqual([bar.get("fill") for bar in bars[:3]], [plots.COLOURS[s] for s in ("aim met", "aim missed", "behind")])
        for bar in bars:
            self.assertGreaterEqual(float(bar.get("x")), plots.LABELS)
            self.assertLessEqual(float(bar.get("x")) + float(bar.get("width")), plots.LABELS + plots.BARS + 1)

    def test_of_too_many_ratios_the_lowest_are_plotted(self):
        figures = [figure(f"f{i}", ratio=1.0 + i, spread=0) for i in range(plots.MOST_ROWS + 5)]
        self.assertEqual(plots.plotted(figures[::-1]), figures[::-1][5:])
        support.write_result(self.folder / "results", figures)
        self.assertIn(f"The plot shows the {plots.MOST_ROWS} lowest ratios", self.render()[0])

    def test_ratios_of_zero_and_far_apart_can_be_drawn(self):
        text = plots.bar_plot("t", [figure(ratio=0.0, spread=0, more_is_better=False), figure(ratio=500.0, spread=1, aim=1000)])
        ElementTree.fromstring(text)

    def test_a_case_that_is_no_more_is_refused(self):
        support.write_result(self.folder / "results", [figure()], case="gone")
        with self.assertRaisesRegex(results.Problem, "'gone'"):
            self.render()


if __name__ == "__main__":
    unittest.main()
