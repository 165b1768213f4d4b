#pragma once
// A made-up training state whose every element is a pure function of (step, tensor, field, index), so that any rank of
// any later job knows what it must find. Bit patterns are arbitrary: NaNs with payloads and denormals are among them.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "checkpoint/state_view.hpp"

namespace shardtune {

struct TestTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::int64_t numel() const;
};

// Sizes that do not divide: scalars, tensors smaller than the number of ranks, an empty one. `scale` stretches the
// larger ones.
std::vector<TestTensor> test_tensors(std::int64_t scale = 1);

// This rank's part: every tensor cut into `num_ranks` pieces of uneven size, some of them empty.
// The fields are value, exp_avg and exp_avg_sq; the first tensor is frozen and has a value only.
StateView expected_state(const std::vector<TestTensor>& tensors, std::int64_t step, int rank, int num_ranks);
// The same cut, filled with zeros: to load into.
StateView blank_state(const std::vector<TestTensor>& tensors, int rank, int num_ranks);
// Empty when all slices have the bits of expected_state, else which differs.
std::string difference(const StateView& found, const std::vector<TestTensor>& tensors, std::int64_t step, int rank,
                       int num_ranks);

// checkpoint-<step> in `dir`, saved by so many threads; ranks_per_file as CheckpointStore takes it.
void save_test_state(const std::filesystem::path& dir, std::int64_t step, int num_ranks,
                     const std::vector<TestTensor>& tensors = test_tensors(), int ranks_per_file = 0);
std::vector<std::int64_t> committed_steps(const std::filesystem::path& dir);  // newest first

}  // namespace shardtune
