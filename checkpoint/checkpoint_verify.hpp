#pragma once
// Full verification of one file of a checkpoint; verify_checkpoint (checkpoint_store.hpp) covers all of them.
#include <filesystem>
#include <string>

#include "checkpoint/manifest.hpp"

namespace shardtune {

// Reads every byte of the file and of its block table. Empty = good, else what is wrong and where. Never throws for
// what the file is; thread-safe.
std::string verify_file(const std::filesystem::path& checkpoint_dir, const ManifestFile& file);

}  // namespace shardtune
