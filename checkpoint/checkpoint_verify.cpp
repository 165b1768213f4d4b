#include "checkpoint/checkpoint_verify.hpp"

#include <fmt/format.h>

#include "checkpoint/block_table.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/output_lock.hpp"
#include "core/error.hpp"
#include "core/file.hpp"

namespace shardtune {
namespace {

// The first block whose hash differs, for the message; empty when the stored table cannot be had.
std::string damaged_range(const BlockTable& actual, const BlockTable& stored) {
  for (std::size_t block = 0; block < std::min(actual.hashes.size(), stored.hashes.size()); ++block)
    if (actual.hashes[block] != stored.hashes[block])
      return fmt::format(" between bytes {} and {}", block * kBlockBytes, (block + 1) * kBlockBytes);
  return "";
}

}  // namespace

Verdict verify_file(const std::filesystem::path& checkpoint_dir, const ManifestFile& file) {
  const std::filesystem::path path = checkpoint_dir / file.name;
  try {
    const BlockTable actual = hash_file(path);
    BlockTable stored = actual;
    if (file.has_block_table) {
      const std::filesystem::path table = block_table_path(path);
      const std::string bytes = read_file(table);
      stored = parse_block_table(bytes, table);
      if (stored.digest() != file.digest) return {fmt::format("{} belongs to another checkpoint", table.string())};
    }
    if (actual.file_bytes != file.size)
      return {fmt::format("{} has {} bytes instead of {}", path.string(), actual.file_bytes, file.size)};
    if (actual.digest() != file.digest)
      return {fmt::format("{} is damaged{}", path.string(), damaged_range(actual, stored))};
    return {};
  } catch (const Error& e) {
    return {e.what(), e.kind() == ErrorKind::io};
  }
}

std::vector<std::string> verify_checkpoint(const std::filesystem::path& checkpoint_dir) {
  std::vector<std::string> problems;
  const UniqueFd lock = lock_for_reading(checkpoint_dir);  // retention must not delete what is found damaged for that
  try {
    for (const ManifestFile& file : read_manifest(checkpoint_dir).files)
      if (Verdict verdict = verify_file(checkpoint_dir, file); !verdict.problem.empty())
        problems.push_back(std::move(verdict.problem));
  } catch (const Error& e) {
    problems.emplace_back(e.what());
  }
  return problems;
}

void check_side_files(const std::filesystem::path& checkpoint_dir) {
  if (!std::filesystem::exists(checkpoint_dir / "manifest.json")) return;
  for (const ManifestFile& file : read_manifest(checkpoint_dir).files) {
    if (file.has_block_table) continue;
    const Verdict verdict = verify_file(checkpoint_dir, file);
    if (verdict.is_unreadable) fail(ErrorKind::io, verdict.problem);
    if (!verdict.problem.empty()) fail(ErrorKind::data, verdict.problem + "; use another checkpoint");
  }
}

nlohmann::json read_checkpoint_run_state(const std::filesystem::path& checkpoint_dir) {
  return read_manifest(checkpoint_dir).run;
}

}  // namespace shardtune
