#pragma once
// How large the buckets of bucket_pool.hpp should be: measured once on the ranks of a job, then remembered.
#include <cstdint>
#include <filesystem>
#include <string>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

// What the best size depends on. Kept sizes of other settings are not used.
struct BucketSizeKey {
  std::string host;     // of rank 0
  std::string version;  // of the program
  int num_ranks = 1;
  int ranks_per_node = 1;  // on rank 0's host
  // What training does most: an all_reduce of whole gradients (ddp), or reductions to their owners.
  bool is_all_reduce = false;
  std::string transport = "auto";  // SHARDTUNE_COMM
};

struct BucketSizeChoice {
  std::int64_t bytes;
  std::string reason;  // in a few words, for the log
};

// Collective; only speed depends on the result, which is the same on every rank: rank 0 decides. Reads what an earlier
// job with the same key has left in `directory`; without such a file it measures for about a tenth of a second, and
// leaves one. It measures the key's operation over all ranks (also for hsdp, which reduces over groups of them). Files
// that are broken, of another key or out of range are ignored and replaced; where `directory` (empty: none) can be
// neither read nor written, every job measures. Only rank 0 touches files.
BucketSizeChoice choose_bucket_bytes(Communicator& world, const BucketSizeKey& key,
                                     const std::filesystem::path& directory);

// The file in `directory` that belongs to a key.
std::filesystem::path bucket_size_file(const BucketSizeKey& key, const std::filesystem::path& directory);

// $XDG_CACHE_HOME/shardtune, else $HOME/.cache/shardtune; empty where neither variable is set.
std::filesystem::path user_cache_directory();

}  // namespace shardtune
