// Descriptions and statistics of checkpoints, against figures computed apart from them.
#include <cmath>
#include <fstream>
#include <limits>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/inspect.hpp"
#include "core/error.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"

namespace shardtune {
namespace {

void save_at(const std::filesystem::path& dir, int num_ranks) {
  const auto tensors = test_tensors();
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    CheckpointStore(dir, comm).save(7, expected_state(tensors, 7, comm.rank(), comm.size()));
  });
}

// One tensor "x" with these elements, cut over two ranks.
void save_values(const std::filesystem::path& dir, const at::Tensor& values) {
  run_thread_ranks(2, [&](Communicator& comm) {
    const std::int64_t middle = values.numel() / 3;
    const std::int64_t begin = comm.rank() == 0 ? 0 : middle, end = comm.rank() == 0 ? middle : values.numel();
    StateView view;
    view.slices.push_back({"x", "value", {values.numel()}, begin, values.narrow(0, begin, end - begin).clone()});
    view.run = nlohmann::json::object();
    CheckpointStore(dir, comm).save(1, view);
  });
}

TEST(DescribeCheckpoint, ListsFilesTensorsSlicesAndTheRun) {
  TempDir dir;
  save_at(dir.path(), 3);
  const nlohmann::json seen = describe_checkpoint(dir / "checkpoint-7");
  EXPECT_EQ(seen["step"], 7);
  EXPECT_EQ(seen["num_ranks"], 3);
  EXPECT_EQ(seen["format_version"], 1);
  EXPECT_EQ(seen["run"]["run_id"], "test-run");
  ASSERT_EQ(seen["files"].size(), 3u + 3);
  std::uint64_t bytes = 0;
  for (const auto& file : seen["files"]) {
    const std::string name = file["name"];
    EXPECT_EQ(file["bytes"], std::filesystem::file_size(dir / "checkpoint-7" / name));
    EXPECT_EQ(file["block_table"], name.ends_with(".h5"));
    bytes += file["bytes"].get<std::uint64_t>();
  }
  EXPECT_EQ(seen["bytes"], bytes);
  const auto tensors = test_tensors();
  ASSERT_EQ(seen["tensors"].size(), tensors.size());
  std::int64_t parameters = 0;
  for (const TestTensor& tensor : tensors) {
    parameters += tensor.numel();
    const auto found = std::find_if(seen["tensors"].begin(), seen["tensors"].end(),
                                    [&](const auto& item) { return item["name"] == tensor.name; });
    ASSERT_NE(found, seen["tensors"].end()) << tensor.name;
    EXPECT_EQ((*found)["shape"], nlohmann::json(tensor.shape));
    EXPECT_EQ((*found)["fields"].size(), &tensor == &tensors[0] ? 1u : 3u);
    std::int64_t covered = 0;
    for (const auto& slice : (*found)["fields"]["value"]["slices"]) {
      EXPECT_EQ(slice["offset"], covered);
      covered += slice["numel"].get<std::int64_t>();
    }
    EXPECT_EQ(covered, tensor.numel());
  }
  EXPECT_EQ(seen["parameters"], parameters);
}

TEST(TensorStatistics, AgreeWithDoublePrecisionOverSeveralPieces) {
  TempDir dir;
  at::manual_seed(3);
  // A mean that is large beside the spread: naive sums of squares would lose the spread.
  const at::Tensor values = at::randn({700'001}, at::kFloat) * 0.01 + 1000.0;
  save_values(dir.path(), values);
  const TensorStatistics seen = tensor_statistics(dir / "checkpoint-1", "x", "value");
  const at::Tensor exact = values.to(at::kDouble);
  EXPECT_EQ(seen.numel, 700'001);
  EXPECT_EQ(seen.num_finite(), 700'001);
  EXPECT_EQ(seen.min, exact.min().item<double>());
  EXPECT_EQ(seen.max, exact.max().item<double>());
  EXPECT_NEAR(seen.mean, exact.mean().item<double>(), 1e-9);
  EXPECT_NEAR(seen.std, exact.std(false).item<double>(), 1e-9);
  EXPECT_NEAR(seen.l2, exact.norm().item<double>(), 1e-6);
}

TEST(TensorStatistics, NanAndInfAreCountedAndLeftOut) {
  TempDir dir;
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  save_values(dir.path(), at::tensor({nan, 3.0F, -inf, -1.0F, inf, inf, nan}));
  const nlohmann::json seen = describe_tensor(dir / "checkpoint-1", "x")["fields"]["value"];
  EXPECT_EQ(seen, nlohmann::json({{"numel", 7},
                                  {"num_nan", 2},
                                  {"num_inf", 3},
                                  {"min", -1.0},
                                  {"max", 3.0},
                                  {"mean", 1.0},
                                  {"std", 2.0},
                                  {"l2", std::sqrt(10.0)}}));
}

TEST(TensorStatistics, OfNothingFiniteAreNull) {
  TempDir dir;
  save_values(dir / "nan", at::full({5}, std::numeric_limits<float>::quiet_NaN()));
  save_values(dir / "empty", at::empty({0}, at::kFloat));
  for (const char* name : {"nan", "empty"}) {
    const nlohmann::json seen = describe_tensor(dir / name / "checkpoint-1", "x")["fields"]["value"];
    for (const char* key : {"min", "max", "mean", "std", "l2"}) EXPECT_TRUE(seen[key].is_null()) << name << ' ' << key;
  }
}

TEST(TensorStatistics, UnknownNamesAndDamageAreErrors) {
  TempDir dir;
  save_at(dir.path(), 2);
  const auto message_of = [&](const std::string& name) {
    try {
      describe_tensor(dir / "checkpoint-7", name);
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::data);
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(message_of("layer.0").find("did you mean layer.0.bias, layer.0.weight"), std::string::npos)
      << message_of("layer.0");
  EXPECT_NE(message_of("bert.layer.9.bias").find("layer.0.bias"), std::string::npos);
  EXPECT_EQ(message_of("layer.1.weight"), "");
  std::ofstream(dir / "checkpoint-7/shard-00001-of-00002.h5", std::ios::in | std::ios::out).seekp(4000) << "damage";
  EXPECT_NE(message_of("layer.1.weight").find("shard-00001-of-00002.h5 is damaged"), std::string::npos);
}

}  // namespace
}  // namespace shardtune
