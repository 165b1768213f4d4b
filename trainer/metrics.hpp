#pragma once
// Evaluation metrics with the definitions of scikit-learn. Pure functions.
#include <cstdint>
#include <vector>

namespace shardtune {

// Share of equal entries; 0 for no entries.
double accuracy(const std::vector<std::int64_t>& predicted, const std::vector<std::int64_t>& expected);

// f1_score(average="macro", zero_division=0): the mean of F1 over the classes that occur in either list.
double macro_f1(const std::vector<std::int64_t>& predicted, const std::vector<std::int64_t>& expected);

}  // namespace shardtune
