#pragma once
// The names inside an output directory and the atomic moves between them. For rank 0 only; Error{io} on failure.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace shardtune {

std::filesystem::path checkpoint_path(const std::filesystem::path& output_dir, std::int64_t step);
std::filesystem::path partial_path(const std::filesystem::path& output_dir, std::int64_t step);

// partial -> final, durably. What stood at `final_dir` (left by an abandoned run) becomes *.rejected-<run id>, without
// a moment in which neither is there where the file system can exchange names.
void publish_checkpoint(const std::filesystem::path& partial, const std::filesystem::path& final_dir,
                        const std::string& run_id);
void reject_checkpoint(const std::filesystem::path& checkpoint_dir, const std::string& run_id);
// Writes the file `latest`, a hint for people and scripts; no reader here trusts it.
void write_latest(const std::filesystem::path& output_dir, std::int64_t step);
// Removes the oldest committed checkpoints until `keep` are left (0 = all stay); `step` and protected ones stay.
// One that is being read stays until the next time. A checkpoint disappears by one rename to *.deleting.
void prune_checkpoints(const std::filesystem::path& output_dir, std::int64_t step, int keep,
                       const std::vector<std::int64_t>& protected_steps);
// Removes *.partial and *.deleting that a killed run left behind; returns their paths.
std::vector<std::filesystem::path> remove_stale_directories(const std::filesystem::path& output_dir);

}  // namespace shardtune
