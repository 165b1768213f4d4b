// Bucket sizes: measured once, kept, and the same on all ranks.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/file.hpp"
#include "distributed/comm/thread_group.hpp"
#include "distributed/parallel/bucket_pool.hpp"
#include "distributed/parallel/bucket_size.hpp"
#include "tests/parallel/wrapping_communicator.hpp"

namespace shardtune {
namespace {

namespace fs = std::filesystem;

class BucketSize : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fs::path(testing::TempDir()) / "bucket_size";
    fs::remove_all(directory_);
  }
  void TearDown() override { fs::remove_all(directory_); }

  // What every rank gets; ranks other than 0 are given a directory that must not matter.
  BucketSizeChoice choose(int num_ranks, const fs::path& directory) {
    std::vector<BucketSizeChoice> choices(static_cast<std::size_t>(num_ranks));
    run_thread_ranks(num_ranks, [&](Communicator& world) {
      choices[static_cast<std::size_t>(world.rank())] =
          choose_bucket_bytes(world, key_of(num_ranks), world.rank() == 0 ? directory : fs::path("/nowhere"));
    });
    for (const BucketSizeChoice& choice : choices) EXPECT_EQ(choice.bytes, choices.front().bytes);
    return choices.front();
  }
  static BucketSizeKey key_of(int num_ranks) {
    return {.host = "a", .version = "1", .num_ranks = num_ranks, .ranks_per_node = num_ranks};
  }
  fs::path file_of(int num_ranks) const { return bucket_size_file(key_of(num_ranks), directory_); }
  void write_kept(int num_ranks, std::int64_t bytes) {
    nlohmann::json kept = nlohmann::json::parse(read_file(file_of(num_ranks)));
    kept["bucket_bytes"] = bytes;
    write(num_ranks, kept.dump());
  }
  void write(int num_ranks, const std::string& text) { std::ofstream(file_of(num_ranks)) << text; }

  fs::path directory_;
};

bool is_candidate(std::int64_t bytes) {
  const std::vector<std::int64_t> mib = {1, 2, 4, 8};
  return std::any_of(mib.begin(), mib.end(), [&](std::int64_t m) { return bytes == m << 20; });
}

TEST_F(BucketSize, IsMeasuredOnceAndThenRead) {
  for (const int num_ranks : {2, 3}) {
    const BucketSizeChoice measured = choose(num_ranks, directory_);
    EXPECT_TRUE(is_candidate(measured.bytes)) << measured.bytes;
    EXPECT_NE(measured.reason.find("kept in " + file_of(num_ranks).string()), std::string::npos) << measured.reason;
    for (const std::int64_t bytes : {std::int64_t{1} << 20, std::int64_t{8} << 20}) {
      write_kept(num_ranks, bytes);
      const BucketSizeChoice read = choose(num_ranks, directory_);
      EXPECT_EQ(read.bytes, bytes);
      EXPECT_NE(read.reason.find("as measured before"), std::string::npos) << read.reason;
    }
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(directory_), fs::directory_iterator()), 2) << "files left behind";
}

// What moves more than a word is what training moves.
TEST_F(BucketSize, IsMeasuredByTheOperationOfThePlan) {
  for (const bool is_all_reduce : {false, true}) {
    std::vector<std::int64_t> num_calls(2);
    run_thread_ranks(2, [&](Communicator& inner) {
      toy::CommunicatorHooks hooks;
      std::int64_t& mine = num_calls[static_cast<std::size_t>(inner.rank())];
      hooks.before = [&](const std::string& operation, const at::Tensor& sent) {
        const bool is_expected = operation == (is_all_reduce ? "all_reduce" : "reduce_scatter");
        if (is_expected && sent.numel() > 1000) ++mine;
        if (!is_expected) {
          EXPECT_LE(sent.numel(), 1) << operation;
        }
      };
      toy::WrappingCommunicator world(inner, hooks);
      BucketSizeKey key = key_of(2);
      key.is_all_reduce = is_all_reduce;
      EXPECT_TRUE(is_candidate(choose_bucket_bytes(world, key, {}).bytes));
    });
    EXPECT_GT(num_calls[0], 1);
    EXPECT_EQ(num_calls[1], num_calls[0]);
  }
}

TEST_F(BucketSize, IsMeasuredAgainWhereTheFileIsNoGood) {
  (void)choose(2, directory_);
  const std::string good = read_file(file_of(2));
  nlohmann::json other_version = nlohmann::json::parse(good);
  other_version["key"]["version"] = "2";
  nlohmann::json no_key = nlohmann::json::parse(good);
  no_key.erase("key");
  nlohmann::json text = nlohmann::json::parse(good);
  text["bucket_bytes"] = "many";
  nlohmann::json huge = nlohmann::json::parse(good);
  huge["bucket_bytes"] = std::int64_t{1} << 60;
  nlohmann::json zero = nlohmann::json::parse(good);
  zero["bucket_bytes"] = 0;
  for (const std::string& bad :
       {std::string(), std::string("\0\xff", 2), good.substr(0, good.size() / 2), std::string("[]"),
        std::string("null"), other_version.dump(), no_key.dump(), text.dump(), huge.dump(), zero.dump()}) {
    write(2, bad);
    const BucketSizeChoice choice = choose(2, directory_);
    EXPECT_NE(choice.reason.find("kept in"), std::string::npos) << bad << ": " << choice.reason;
    EXPECT_TRUE(is_candidate(choice.bytes)) << bad;
    EXPECT_EQ(nlohmann::json::parse(read_file(file_of(2))).at("bucket_bytes"), choice.bytes) << bad;
  }
}

TEST_F(BucketSize, IsMeasuredEveryTimeWhereNothingCanBeKept) {
  std::ofstream(directory_) << "a file where the directory should be";
  for (const fs::path& directory : {directory_, fs::path()}) {
    const BucketSizeChoice choice = choose(2, directory);
    EXPECT_TRUE(is_candidate(choice.bytes));
    EXPECT_NE(choice.reason.find("measur"), std::string::npos) << choice.reason;
    EXPECT_EQ(choice.reason.find("kept"), std::string::npos) << choice.reason;
  }
}

TEST_F(BucketSize, OfARankAloneIsTheDefault) {
  EXPECT_EQ(choose(1, directory_).bytes, kDefaultBucketBytes);
  EXPECT_FALSE(fs::exists(directory_));
}

TEST_F(BucketSize, OfEveryKeyHasAFileOfItsOwn) {
  const BucketSizeKey key = key_of(2);
  std::vector<fs::path> files;
  for (const BucketSizeKey& other :
       {key, BucketSizeKey{"b/../c", key.version, 2, 2}, BucketSizeKey{key.host, "2", 2, 2},
        BucketSizeKey{key.host, key.version, 4, 2}, BucketSizeKey{key.host, key.version, 2, 1},
        BucketSizeKey{key.host, key.version, 2, 2, true}, BucketSizeKey{key.host, key.version, 2, 2, false, "mpi"}}) {
    files.push_back(bucket_size_file(other, directory_));
    EXPECT_EQ(files.back().parent_path(), directory_);
  }
  std::sort(files.begin(), files.end());
  EXPECT_EQ(std::adjacent_find(files.begin(), files.end()), files.end());
}

TEST(UserCacheDirectory, FollowsTheEnvironment) {
  const char* before = std::getenv("XDG_CACHE_HOME");
  const std::string kept = before != nullptr ? before : "";
  ::setenv("XDG_CACHE_HOME", "/caches", 1);
  EXPECT_EQ(user_cache_directory(), "/caches/shardtune");
  ::setenv("XDG_CACHE_HOME", "relative", 1);
  EXPECT_EQ(user_cache_directory(), fs::path(std::getenv("HOME")) / ".cache" / "shardtune");
  ::unsetenv("XDG_CACHE_HOME");
  EXPECT_EQ(user_cache_directory(), fs::path(std::getenv("HOME")) / ".cache" / "shardtune");
  if (before != nullptr) ::setenv("XDG_CACHE_HOME", kept.c_str(), 1);
}

}  // namespace
}  // namespace shardtune
