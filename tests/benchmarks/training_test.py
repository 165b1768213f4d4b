"""The cases and peers of benchmarks/training.py: what can be known without running one."""
import unittest

import support  # makes the modules of benchmarks/ importable
import training_cases
from training_cases import CASES, PEERS


class Tensor:
    """As much of one as useful_tokens() asks for."""

    def __init__(self, *rows):
        self.rows = rows

    def sum(self):
        return sum(map(sum, self.rows))

    def numel(self):
        return sum(map(len, self.rows))


class Cases(unittest.TestCase):
    def test_every_peer_and_aim_of_a_case_is_one_that_there_is(self):
        for name, case in CASES.items():
            self.assertLessEqual(set(case.peers), set(PEERS), name)
            self.assertLessEqual({*case.aims, *case.memory, *case.parts} - {training_cases.BEST}, set(case.peers), name)
            self.assertEqual([peer for peer, parts in case.parts.items() if case.batch % parts and not PEERS[peer].packs], [], name)

    def test_alpaca_is_judged_by_the_best_of_its_peers(self):
        self.assertEqual(CASES["alpaca"].aims, {training_cases.BEST: 2})
        self.assertEqual(CASES["alpaca"].peers, ("grouping", "packing", "default"))

    def test_peers_are_chosen_in_the_order_of_the_case(self):
        case = CASES["alpaca"]
        self.assertEqual(training_cases.chosen_peers(case, None), ["grouping", "packing", "default"])
        self.assertEqual(training_cases.chosen_peers(case, ["packing", "tuned", "default"]), ["packing", "default"])
        self.assertEqual(training_cases.chosen_peers(case, []), [])

    def test_losses_compare_only_where_steps_have_the_same_rows(self):
        def same(case):
            return [name for name in CASES[case].peers if PEERS[name].has_steps_of(CASES[case])]
        self.assertEqual(same("gpt2"), ["default", "tuned", "compile"])
        self.assertEqual(same("alpaca"), ["default"])
        self.assertEqual(same("minilm"), ["default"])

    def test_steps_that_compile_do_not_count(self):
        self.assertEqual(training_cases.uncounted_steps(CASES["gpt2"], PEERS["tuned"], 5), 2)
        self.assertEqual(training_cases.uncounted_steps(CASES["gpt2"], PEERS["compile"], 5), 3)
        self.assertEqual(training_cases.uncounted_steps(CASES["minilm"], PEERS["compile"], 15), 15)


class Figures(unittest.TestCase):
    def test_padding_is_not_useful(self):
        padded = {"input_ids": Tensor([5, 6, 7], [8, 0, 0]), "attention_mask": Tensor([1, 1, 1], [1, 0, 0])}
        self.assertEqual(training_cases.useful_tokens(padded), 4)
        self.assertEqual(training_cases.useful_tokens({"input_ids": Tensor([5, 6, 7, 8])}), 4)

    def test_rates_are_of_steps_of_one_size_and_of_the_pass_where_sizes_differ(self):
        self.assertEqual(training_cases.rates(CASES["gpt2"], [100, 100], [1, 4]), [100, 25])
        self.assertEqual(training_cases.rates(CASES["alpaca"], [100, 300], [1, 4]), [80])
        with self.assertRaises(ValueError):
            training_cases.rates(CASES["gpt2"], [100, 100], [1])

    def test_the_best_peer_has_the_highest_median_not_the_highest_rate(self):
        measured = {"default": [[100], [100], [100]], "grouping": [[250], [260], [240]], "packing": [[200], [900], [210]]}
        self.assertEqual(training_cases.best_peer(measured), "grouping")


class Alpaca(unittest.TestCase):
    def test_an_input_is_announced_where_there_is_one(self):
        row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
        text = training_cases.alpaca_text(row)
        self.assertIn("paired with an input", text)
        self.assertTrue(text.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3"), text)
        text = training_cases.alpaca_text(row | {"input": ""})
        self.assertNotIn("nput", text)
        self.assertTrue(text.endswith("\n\n### Instruction:\nAdd.\n\n### Response:\n3"), text)


if __name__ == "__main__":
    unittest.main()
