#pragma once
// Locks between the programs that use one output directory. They are flock(2) locks: the kernel releases them when
// their holder ends, however it ends, so a crash leaves none behind. Where a file system has no such locks, a warning
// says so.
#include <filesystem>
#include <optional>
#include <string>

#include "core/file.hpp"

namespace shardtune {

// One writer per output directory: a training job (its rank 0) or a tool that changes it. Held while the object lives.
class OutputLock {
 public:
  OutputLock() = default;  // holds nothing
  // Waits up to `patience_seconds` (the ranks of a killed job need a moment to end), then Error{config} naming the
  // holder. `purpose` tells others who we are ("train", "checkpoint prune"). The directory must exist.
  OutputLock(const std::filesystem::path& output_dir, const std::string& purpose, double patience_seconds = 10);

 private:
  UniqueFd fd_;
};

// Readers of a checkpoint share a lock on its manifest; who wants to delete it needs the lock alone.
UniqueFd lock_for_reading(const std::filesystem::path& checkpoint_dir);  // blocks for moments only; null without locks
// Nothing while the checkpoint is being read. Else what keeps readers out until it is destroyed: hold it until the
// checkpoint is gone. Null without locks.
std::optional<UniqueFd> lock_for_deleting(const std::filesystem::path& checkpoint_dir);

}  // namespace shardtune
