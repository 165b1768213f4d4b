#include "trainer/metrics.hpp"

#include <map>

#include "core/error.hpp"

namespace shardtune {

double accuracy(const std::vector<std::int64_t>& predicted, const std::vector<std::int64_t>& expected) {
  check_internal(predicted.size() == expected.size(), "accuracy: lists of different length");
  if (predicted.empty()) return 0;
  std::size_t equal = 0;
  for (std::size_t i = 0; i < predicted.size(); ++i) equal += predicted[i] == expected[i] ? 1 : 0;
  return static_cast<double>(equal) / static_cast<double>(predicted.size());
}

double macro_f1(const std::vector<std::int64_t>& predicted, const std::vector<std::int64_t>& expected) {
  check_internal(predicted.size() == expected.size(), "macro_f1: lists of different length");
  struct Counts {
    double hits = 0, predicted = 0, expected = 0;
  };
  std::map<std::int64_t, Counts> classes;
  for (std::size_t i = 0; i < predicted.size(); ++i) {
    classes[predicted[i]].predicted += 1;
    classes[expected[i]].expected += 1;
    if (predicted[i] == expected[i]) classes[expected[i]].hits += 1;
  }
  if (classes.empty()) return 0;
  double sum = 0;
  for (const auto& [label, counts] : classes) sum += 2 * counts.hits / (counts.predicted + counts.expected);
  return sum / static_cast<double>(classes.size());
}

}  // namespace shardtune
