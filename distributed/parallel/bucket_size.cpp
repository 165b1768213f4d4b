#include "distributed/parallel/bucket_size.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <optional>
#include <system_error>
#include <vector>

#include <ATen/ops/zeros.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"
#include "core/json.hpp"
#include "core/log.hpp"
#include "distributed/parallel/tree_exchange.hpp"

namespace shardtune {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr std::int64_t kMiB = 1 << 20;
constexpr std::array<std::int64_t, 4> kCandidates = {1 * kMiB, 2 * kMiB, 4 * kMiB, 8 * kMiB};
static_assert(kCandidates.back() == kDefaultBucketBytes);
// A unit's gradient: as large as those of common models, and two buckets of the largest size.
constexpr std::int64_t kUnitBytes = 2 * kCandidates.back();
constexpr double kMaxSeconds = 0.1;
// Smaller buckets take less memory, so larger ones must be better by more than what measurements differ by.
constexpr double kMargin = 1.05;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::int64_t broadcast_from_first(Communicator& world, std::int64_t value) {
  at::Tensor word = at::zeros({1}, at::kLong);
  word.mutable_data_ptr<std::int64_t>()[0] = value;
  world.broadcast(word, 0).wait();
  return word.const_data_ptr<std::int64_t>()[0];
}

// Sums of one unit's gradient over all ranks as a training step makes them, in buckets of different sizes, all of them
// pieces of one buffer. Collective.
class Trial {
 public:
  Trial(Communicator& world, bool is_all_reduce)
      : world_(world),
        is_all_reduce_(is_all_reduce),
        gradient_(at::zeros({kUnitBytes / 4}, at::kFloat)),
        memory_(world.make_buffer(kUnitBytes, at::kByte)),
        nodes_{.of_ranks = {}, .num_leaves = world.size(), .dtype = at::kFloat} {
    for (int rank = 0; rank < world.size(); ++rank) nodes_.of_ranks.emplace_back(TreeNode{0, rank});
  }

  // Until the last rank is done.
  double seconds(std::int64_t bucket_bytes, std::int64_t unit_bytes) {
    ByteCounter counter;
    BucketPool pool(world_, counter);
    pool.set_size({bucket_bytes, static_cast<int>(std::max(kUnitBytes / bucket_bytes, std::int64_t{2}))});
    for (std::int64_t at = 0; at + pool.bucket_bytes() <= memory_.numel(); at += pool.bucket_bytes())
      pool.give_back(memory_.narrow(0, at, pool.bucket_bytes()));
    world_.barrier();
    const auto start = Clock::now();
    is_all_reduce_ ? all_reduce(pool, unit_bytes / 4) : reduce_to_owners(pool, unit_bytes / 4);
    world_.barrier();
    return seconds_since(start);
  }

 private:
  void reduce_to_owners(BucketPool& pool, std::int64_t numel) {
    const ReductionAxis axis{world_, pool, std::vector<std::int64_t>(nodes_.of_ranks.size(), numel / world_.size())};
    std::vector<Pieces> parts;
    for (std::size_t rank = 0; rank < axis.counts.size(); ++rank)
      parts.push_back({gradient_.narrow(0, static_cast<std::int64_t>(rank) * axis.counts[rank], axis.counts[rank])});
    TreeExchange(axis, nodes_, std::move(parts)).finish();
  }

  void all_reduce(BucketPool& pool, std::int64_t numel) {
    const Pieces gradient = {gradient_.narrow(0, 0, numel)};
    all_reduce_stream(world_, pool, gradient, gradient, at::kFloat)->finish();
  }

  Communicator& world_;
  bool is_all_reduce_;
  at::Tensor gradient_;
  at::Tensor memory_;
  TreeExchange::Nodes nodes_;
};

// The best candidate on rank 0, who also decides when it has been enough.
BucketSizeChoice measure(Communicator& world, bool is_all_reduce) {
  const auto start = Clock::now();
  Trial trial(world, is_all_reduce);
  (void)trial.seconds(kMiB, kMiB);  // touches the memory
  const double estimate = trial.seconds(kMiB, kMiB) * kUnitBytes / kMiB * kCandidates.size();
  if (broadcast_from_first(world, estimate > kMaxSeconds ? 1 : 0) != 0)
    return {kDefaultBucketBytes, "measuring would take too long"};
  std::array<double, kCandidates.size()> best{};
  best.fill(std::numeric_limits<double>::infinity());
  // The first round warms up.
  for (int round = 0; round < 2 || broadcast_from_first(world, seconds_since(start) < kMaxSeconds ? 1 : 0) != 0;
       ++round) {
    for (std::size_t i = 0; i < best.size(); ++i) {
      const double seconds = trial.seconds(kCandidates[i], kUnitBytes);
      if (round > 0) best[i] = std::min(best[i], seconds);
    }
  }
  const double least = *std::min_element(best.begin(), best.end());
  const auto chosen =
      std::find_if(best.begin(), best.end(), [&](double seconds) { return seconds <= kMargin * least; });
  const std::int64_t bytes = broadcast_from_first(world, kCandidates[static_cast<std::size_t>(chosen - best.begin())]);
  return {bytes, fmt::format("measured in {:.2f} s", seconds_since(start))};
}

nlohmann::json to_json(const BucketSizeKey& key) {
  return {{"host", key.host},
          {"version", key.version},
          {"num_ranks", key.num_ranks},
          {"ranks_per_node", key.ranks_per_node},
          {"is_all_reduce", key.is_all_reduce},
          {"transport", key.transport}};
}

std::optional<std::int64_t> read_kept(const BucketSizeKey& key, const fs::path& file) {
  std::error_code error;
  if (!fs::exists(file, error)) return std::nullopt;
  try {
    const nlohmann::json kept = read_json_file(file, {.max_bytes = 64 << 10, .max_depth = 4});
    const auto bytes = json_get<std::int64_t>(kept, "bucket_bytes", file.string());
    const bool is_candidate = std::find(kCandidates.begin(), kCandidates.end(), bytes) != kCandidates.end();
    if (is_candidate && kept.contains("key") && kept.at("key") == to_json(key)) return bytes;
    log::debug("{} holds no bucket size for this job; it is replaced", file.string());
  } catch (const Error& broken) {
    log::debug("{}; it is replaced", broken.what());
  }
  return std::nullopt;
}

// As a whole or not at all; jobs that start at the same time replace each other's.
bool keep(const BucketSizeKey& key, const fs::path& file, std::int64_t bytes) {
  const fs::path temporary = fmt::format("{}.{}", file.string(), ::getpid());
  try {
    std::error_code error;
    fs::create_directories(file.parent_path(), error);
    const UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (!fd) return false;
    write_all(fd.get(), nlohmann::json{{"key", to_json(key)}, {"bucket_bytes", bytes}}.dump(2) + "\n", temporary);
    rename_path(temporary, file);
    return true;
  } catch (const Error& problem) {
    log::debug("the bucket size is not kept: {}", problem.what());
    std::error_code ignored;
    fs::remove(temporary, ignored);
    return false;
  }
}

}  // namespace

fs::path bucket_size_file(const BucketSizeKey& key, const fs::path& directory) {
  return directory / fmt::format("bucket_size.{}.json", to_hex(hash_bytes(to_json(key).dump())));
}

fs::path user_cache_directory() {
  // An empty or relative XDG_CACHE_HOME is to be ignored (XDG Base Directory Specification).
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && fs::path(cache).is_absolute()) return fs::path(cache) / "shardtune";
  const char* home = std::getenv("HOME");
  if (home != nullptr && fs::path(home).is_absolute()) return fs::path(home) / ".cache" / "shardtune";
  return {};
}

BucketSizeChoice choose_bucket_bytes(Communicator& world, const BucketSizeKey& key, const fs::path& directory) {
  if (world.size() == 1) return {kDefaultBucketBytes, "a rank alone needs none"};
  const bool is_keeper = world.rank() == 0 && !directory.empty();
  const fs::path file = is_keeper ? bucket_size_file(key, directory) : fs::path();
  const std::int64_t kept = broadcast_from_first(world, is_keeper ? read_kept(key, file).value_or(0) : 0);
  if (kept != 0) return {kept, fmt::format("as measured before, {}", file.string())};
  BucketSizeChoice choice = measure(world, key.is_all_reduce);
  if (is_keeper && keep(key, file, choice.bytes)) choice.reason += fmt::format(", kept in {}", file.string());
  return choice;
}

}  // namespace shardtune
