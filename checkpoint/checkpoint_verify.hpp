#pragma once
// Full verification of one file of a checkpoint; verify_checkpoint (checkpoint_store.hpp) covers all of them.
#include <filesystem>
#include <string>

#include "checkpoint/manifest.hpp"

namespace shardtune {

struct Verdict {
  std::string problem;         // empty = good, else what is wrong and where
  bool is_unreadable = false;  // the system refused to read it: nobody knows whether it is damaged
};
// Reads every byte of the file and of its block table. Never throws for what the file is; thread-safe.
Verdict verify_file(const std::filesystem::path& checkpoint_dir, const ManifestFile& file);

}  // namespace shardtune
