#include "tests/checkpoint/test_state.hpp"

#include <cstring>

#include <ATen/ops/zeros.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/hash.hpp"
#include "core/rng.hpp"
#include "distributed/comm/thread_group.hpp"

namespace shardtune {
namespace {

// First element of piece `piece` of `num_pieces`: uneven, and empty pieces where there are few elements.
std::int64_t boundary(std::int64_t numel, int piece, int num_pieces) {
  if (piece <= 0) return 0;
  if (piece >= num_pieces) return numel;
  return (numel * piece / num_pieces + piece) > numel ? numel : numel * piece / num_pieces + piece;
}

void fill(StateSlice& slice, std::int64_t step) {
  const std::uint64_t key = mix_key(static_cast<std::uint64_t>(step), hash_bytes(slice.name), hash_bytes(slice.field));
  auto* bytes = static_cast<char*>(slice.data.data_ptr());
  for (std::int64_t i = 0; i < slice.data.numel(); ++i) {
    const auto bits = static_cast<std::uint32_t>(mix_key(key, static_cast<std::uint64_t>(slice.offset + i)));
    std::memcpy(bytes + i * 4, &bits, 4);
  }
}

}  // namespace

std::int64_t TestTensor::numel() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::vector<TestTensor> test_tensors(std::int64_t scale) {
  return {{"embeddings.word.weight", {101 * scale, 7}},
          {"layer.0.weight", {13, 11 * scale}},
          {"layer.0.bias", {13}},
          {"scalar", {}},
          {"nothing", {0, 4}},
          {"tiny", {2}},
          {"odd/name%", {3}},
          {"layer.1.weight", {17 * scale, 3}}};
}

StateView blank_state(const std::vector<TestTensor>& tensors, int rank, int num_ranks) {
  StateView view;
  for (const TestTensor& tensor : tensors)
    for (const char* field : {"value", "exp_avg", "exp_avg_sq"}) {
      if (&tensor == &tensors[0] && std::string_view(field) != "value") continue;
      const std::int64_t begin = boundary(tensor.numel(), rank, num_ranks);
      const std::int64_t end = boundary(tensor.numel(), rank + 1, num_ranks);
      view.slices.push_back({tensor.name, field, tensor.shape, begin, at::zeros({end - begin}, at::kFloat)});
    }
  return view;
}

StateView expected_state(const std::vector<TestTensor>& tensors, std::int64_t step, int rank, int num_ranks) {
  StateView view = blank_state(tensors, rank, num_ranks);
  for (StateSlice& slice : view.slices) fill(slice, step);
  view.run = {{"step", step},
              {"run_id", "test-run"},
              {"learning_rate", 0.1 * static_cast<double>(step)},
              {"cursor", {1, 2, step}}};
  view.side_files = {
      {"config.json", "{\"model_type\": \"bert\"}\n"}, {"tokenizer.json", std::string(5000, 't')}, {"empty.txt", ""}};
  return view;
}

std::string difference(const StateView& found, const std::vector<TestTensor>& tensors, std::int64_t step, int rank,
                       int num_ranks) {
  const StateView wanted = expected_state(tensors, step, rank, num_ranks);
  if (found.slices.size() != wanted.slices.size()) return "another number of slices";
  for (std::size_t i = 0; i < wanted.slices.size(); ++i) {
    const at::Tensor &a = found.slices[i].data, &b = wanted.slices[i].data;
    if (a.numel() != b.numel() || (a.numel() > 0 && std::memcmp(a.data_ptr(), b.data_ptr(), b.nbytes()) != 0))
      return wanted.slices[i].name + " " + wanted.slices[i].field;
  }
  return "";
}

void save_test_state(const std::filesystem::path& dir, std::int64_t step, int num_ranks,
                     const std::vector<TestTensor>& tensors, int ranks_per_file) {
  constexpr std::size_t kStagingBytes = std::size_t{1} << 30;
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    CheckpointStore(dir, comm, kStagingBytes, ranks_per_file).save(step, expected_state(tensors, step, comm.rank(), comm.size()));
  });
}

std::vector<std::int64_t> committed_steps(const std::filesystem::path& dir) {
  std::vector<std::int64_t> steps;
  for (const CheckpointInfo& info : list_checkpoints(dir))
    if (info.is_committed) steps.push_back(info.step);
  return steps;
}

}  // namespace shardtune
