// How elements are stored: bf16 as it is, compressed, converted where a reader wants another type; in how many files.
#include <cstdlib>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/shared_shard.hpp"
#include "checkpoint/tools.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"

namespace shardtune {
namespace {

const std::vector<TestTensor> kTensors = test_tensors();

// Empty when the right bits were loaded, else what the lowest rank says.
std::string load_at(const std::filesystem::path& checkpoint, std::int64_t step, int num_ranks) {
  std::string said;
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    std::string mine;
    try {
      StateView view = blank_state(kTensors, comm.rank(), comm.size());
      CheckpointStore(checkpoint.parent_path(), comm).load(checkpoint, view);
      mine = difference(view, kTensors, step, comm.rank(), comm.size());
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::data) << e.what();
      mine = e.what();
    }
    if (comm.rank() == 0) said = mine;
  });
  return said;
}

void save_compressed(const std::filesystem::path& dir, int num_ranks) {
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    CheckpointStore store(dir, comm);
    store.set_compression(true);
    store.save(7, expected_state(kTensors, 7, comm.rank(), comm.size()));
  });
}

// One tensor, cut evenly, with moments of the given type: no NaNs, whose conversion is nobody's promise.
StateView moments_view(at::ScalarType moments, int rank, int num_ranks, bool is_blank) {
  const std::int64_t numel = 300'007, begin = numel * rank / num_ranks, end = numel * (rank + 1) / num_ranks;
  const at::Tensor values = at::sin(at::arange(begin, end).to(at::kFloat) * 0.37F) * 1e-3F;
  StateView view;
  for (const char* field : {"value", "exp_avg", "exp_avg_sq"}) {
    const at::Tensor data = (is_blank ? at::zeros_like(values) : values + static_cast<float>(field[3] == '_'))
                                .to(std::string_view(field) == "value" ? at::kFloat : moments);
    view.slices.push_back({"w", field, {numel}, begin, data.contiguous()});
  }
  view.run = {{"step", 1}};
  return view;
}

TEST(CheckpointStore, Bf16MomentsAreStoredAsTheyAreAndConvertedWhereTheReaderWantsOthers) {
  for (const at::ScalarType stored : {at::kBFloat16, at::kFloat}) {
    TempDir dir;
    for (const int ranks_per_file : {1, 2})
      run_thread_ranks(3, [&](Communicator& comm) {
        CheckpointStore(dir / fmt::format("{}", ranks_per_file), comm, std::size_t{1} << 20, ranks_per_file)
            .save(1, moments_view(stored, comm.rank(), comm.size(), false));
      });
    reshard_checkpoint(dir / "1/checkpoint-1", dir / "resharded", 4);
    for (const char* name : {"1", "2", "resharded"}) {
      const auto checkpoint = dir / name / "checkpoint-1";
      EXPECT_TRUE(verify_checkpoint(checkpoint).empty());
      const Manifest manifest = read_manifest(checkpoint);
      EXPECT_EQ(manifest.version, stored == at::kFloat ? 1 : 2);
      EXPECT_EQ(manifest.find("w", "value")->dtype, "float32");
      EXPECT_EQ(manifest.find("w", "exp_avg_sq")->dtype, dtype_name(stored));
      std::uint64_t bytes = 0;
      for (const ManifestFile& file : manifest.files) bytes += file.size;
      EXPECT_LT(bytes, 300'007U * (stored == at::kFloat ? 12 : 8) + 400'000);
      for (const at::ScalarType wanted : {at::kBFloat16, at::kFloat})
        run_thread_ranks(2, [&](Communicator& comm) {
          StateView view = moments_view(wanted, comm.rank(), comm.size(), true);
          CheckpointStore(checkpoint.parent_path(), comm).load(checkpoint, view);
          const StateView original = moments_view(stored, comm.rank(), comm.size(), false);
          for (std::size_t i = 0; i < 3; ++i)
            EXPECT_TRUE(at::equal(view.slices[i].data, original.slices[i].data.to(view.slices[i].data.scalar_type())))
                << name << " " << view.slices[i].field;
        });
    }
  }
}

// Numbers that bf16 holds exactly.
StateView golden_view(int rank, int num_ranks, bool is_blank) {
  const std::int64_t numel = 1003, begin = numel * rank / num_ranks, end = numel * (rank + 1) / num_ranks;
  const at::Tensor numbers = at::arange(begin, end) * 37;
  StateView view;
  for (const char* field : {"value", "exp_avg", "exp_avg_sq"}) {
    const bool is_value = std::string_view(field) == "value";
    const at::Tensor data = (numbers % (is_value ? 1009 : 251) + (field[3] == '_' ? 1 : 0)).to(at::kFloat) / 1024;
    view.slices.push_back({"w",
                           field,
                           {17, 59},
                           begin,
                           (is_blank ? at::zeros_like(data) : data).to(is_value ? at::kFloat : at::kBFloat16)});
  }
  view.run = {{"step", 2}, {"run_id", "golden"}};
  return view;
}

// What version 2 added: moments in bf16 and compressed shards. SHARDTUNE_MAKE_GOLDEN=DIR writes it there instead.
TEST(CheckpointStore, TheGoldenCheckpointOfVersion2Loads) {
  if (const char* target = std::getenv("SHARDTUNE_MAKE_GOLDEN"))
    run_thread_ranks(2, [&](Communicator& comm) {
      CheckpointStore store(target, comm);
      store.set_compression(true);
      store.save(2, golden_view(comm.rank(), comm.size(), false));
    });
  const std::filesystem::path golden =
      std::filesystem::path(std::getenv("SHARDTUNE_SOURCE_DIR")) / "tests/golden/checkpoint_v2";
  EXPECT_TRUE(verify_checkpoint(golden).empty());
  EXPECT_EQ(read_manifest(golden).version, 2);
  for (const int num_ranks : {1, 3})
    run_thread_ranks(num_ranks, [&](Communicator& comm) {
      StateView view = golden_view(comm.rank(), comm.size(), true);
      CheckpointStore(golden.parent_path(), comm).load(golden, view);
      const StateView expected = golden_view(comm.rank(), comm.size(), false);
      for (std::size_t i = 0; i < expected.slices.size(); ++i)
        EXPECT_TRUE(at::equal(view.slices[i].data, expected.slices[i].data)) << expected.slices[i].field;
    });
}

TEST(RanksPerFile, OneUpToTheMostFilesThenTheFewestOfOneHost) {
  const auto hosts = [](int num_hosts, int ranks_per_host) {
    std::vector<std::string> names;
    for (int rank = 0; rank < num_hosts * ranks_per_host; ++rank)
      names.push_back(fmt::format("node-{}", rank / ranks_per_host));
    return names;
  };
  EXPECT_EQ(choose_ranks_per_file({"alone"}), 1);
  EXPECT_EQ(choose_ranks_per_file(hosts(32, 8)), 1);
  EXPECT_EQ(choose_ranks_per_file(hosts(33, 8)), 2);
  EXPECT_EQ(choose_ranks_per_file(hosts(128, 8)), 4);
  EXPECT_EQ(choose_ranks_per_file(hosts(100, 6)), 3);   // 300 files of 2 are too many
  EXPECT_EQ(choose_ranks_per_file(hosts(100, 7)), 7);   // nothing else divides 7
  EXPECT_EQ(choose_ranks_per_file(hosts(1000, 8)), 8);  // 1000 files are the fewest that stay on their hosts
  EXPECT_EQ(choose_ranks_per_file({"a", "b", "a", "b"}, 2), 1);
  EXPECT_EQ(choose_ranks_per_file({"a", "a", "b"}, 2), 2);  // the last file may have fewer ranks
}

// Compression changes nothing but the files; damage is found as in any other file.
TEST(CheckpointStore, CompressedShardsHoldTheSameState) {
  TempDir dir;
  for (const int ranks_per_file : {1, 2})
    for (const bool has_local : {false, true}) {
      const auto out = dir / fmt::format("{}_{}", ranks_per_file, has_local);
      const auto local = has_local ? dir / "local" : std::filesystem::path();
      std::uint64_t sizes[2] = {};
      for (const bool is_on : {false, true})
        run_thread_ranks(3, [&](Communicator& comm) {
          CheckpointStore store(out, comm, std::size_t{1} << 20, ranks_per_file, local);
          store.set_compression(is_on);
          const SaveReport report =
              store.save(is_on ? 2 : 1, moments_view(at::kBFloat16, comm.rank(), comm.size(), false));
          if (comm.rank() == 0) sizes[is_on] = report.bytes;
        });
      EXPECT_LT(sizes[1], sizes[0]);
      const auto checkpoint = out / "checkpoint-2";
      EXPECT_TRUE(verify_checkpoint(checkpoint).empty());
      EXPECT_TRUE(diff_checkpoints(out / "checkpoint-1", checkpoint)["tensors"].empty());
      EXPECT_FALSE(std::filesystem::exists(checkpoint / "shard-00000-of-00003.h5"));
      for (const auto& entry : std::filesystem::directory_iterator(checkpoint))
        EXPECT_EQ(entry.path().string().find(".tmp"), std::string::npos) << entry.path();
      // What it is made from again is the file that would have been written without compression.
      const auto plain = reshard_checkpoint(checkpoint, dir / fmt::format("plain_{}_{}", ranks_per_file, has_local), 2);
      EXPECT_TRUE(diff_checkpoints(out / "checkpoint-1", plain)["tensors"].empty());
    }
  save_compressed(dir / "flips", 3);
  const auto checkpoint = dir / "flips/checkpoint-7", shard = checkpoint / "shard-00001-of-00003.h5.sz";
  EXPECT_EQ(load_at(checkpoint, 7, 2), "");
  const std::string whole = read_file(shard);
  for (std::size_t i = 0; i < 400; ++i) {
    std::string bytes = whole;
    bytes[(i * 7919) % bytes.size()] ^= static_cast<char>(1 << i % 8);
    write_file_durably(shard, bytes);
    EXPECT_NE(load_at(checkpoint, 7, 1).find("shard-00001"), std::string::npos) << i;
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{15}, whole.size() / 2, whole.size() - 1}) {
    write_file_durably(shard, whole.substr(0, size));
    EXPECT_NE(load_at(checkpoint, 7, 1).find("shard-00001"), std::string::npos) << size;
  }
}

}  // namespace
}  // namespace shardtune
