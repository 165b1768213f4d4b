#include "checkpoint/checkpoint_directory.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <optional>
#include <system_error>

#include <fcntl.h>
#include <fmt/format.h>

#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/output_lock.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/log.hpp"

namespace shardtune {
namespace {

constexpr std::string_view kPrefix = "checkpoint-";

// The step of "checkpoint-<step>"; nothing for other names, leading zeros and signs included.
std::optional<std::int64_t> step_of(std::string_view name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  if (error != std::errc() || end != name.data() + name.size() || name[0] == '-' || (name[0] == '0' && name.size() > 1))
    return std::nullopt;
  return step;
}

void remove_tree(const std::filesystem::path& directory) {
  std::error_code error;
  std::filesystem::remove_all(directory, error);
  if (error) fail(ErrorKind::io, fmt::format("cannot remove {}: {}", directory.string(), error.message()));
}

std::vector<std::filesystem::path> entries_of(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> entries;
  std::error_code error;
  for (auto it = std::filesystem::directory_iterator(directory, error);
       !error && it != std::filesystem::directory_iterator(); it.increment(error))
    entries.push_back(it->path());
  if (error && error != std::errc::no_such_file_or_directory)
    fail(ErrorKind::io, fmt::format("cannot list {}: {}", directory.string(), error.message()));
  std::sort(entries.begin(), entries.end());
  return entries;
}

}  // namespace

std::filesystem::path checkpoint_path(const std::filesystem::path& output_dir, std::int64_t step) {
  return output_dir / fmt::format("{}{}", kPrefix, step);
}

std::filesystem::path partial_path(const std::filesystem::path& output_dir, std::int64_t step) {
  return output_dir / fmt::format("{}{}.partial", kPrefix, step);
}

void reject_checkpoint(const std::filesystem::path& checkpoint_dir, const std::string& run_id) {
  std::string id = run_id.empty() ? "unknown" : run_id;
  for (char& c : id)
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '_') c = '_';
  // Checkpoints carry their step in their name up to the first dot, so any of these is invisible to every reader.
  const std::filesystem::path base = checkpoint_dir.parent_path() / checkpoint_dir.filename().stem();
  std::string target = fmt::format("{}.rejected-{}", base.string(), id);
  for (int n = 2; std::filesystem::exists(target); ++n) target = fmt::format("{}.rejected-{}.{}", base.string(), id, n);
  rename_path(checkpoint_dir, target);
  log::warn("{} moved to {}", checkpoint_dir.filename().string(), std::filesystem::path(target).filename().string());
}

void publish_checkpoint(const std::filesystem::path& partial, const std::filesystem::path& final_dir,
                        const std::string& run_id) {
  if (std::filesystem::exists(final_dir)) {
    if (::renameat2(AT_FDCWD, partial.c_str(), AT_FDCWD, final_dir.c_str(), RENAME_EXCHANGE) == 0) {
      try {
        fsync_path(final_dir.parent_path());
        reject_checkpoint(partial, run_id);
      } catch (const Error&) {
        // Not committed. The caller deletes the partial directory, which must not be the one that stood here.
        ::renameat2(AT_FDCWD, partial.c_str(), AT_FDCWD, final_dir.c_str(), RENAME_EXCHANGE);
        throw;
      }
      return;
    }
    reject_checkpoint(final_dir, run_id);  // NFS and some others cannot exchange
  }
  rename_path(partial, final_dir);
  try {
    fsync_path(final_dir.parent_path());
  } catch (const Error&) {
    ::rename(final_dir.c_str(), partial.c_str());  // not durable, so not committed
    throw;
  }
}

void write_latest(const std::filesystem::path& output_dir, std::int64_t step) {
  write_file_durably(output_dir / "latest", fmt::format("{}{}\n", kPrefix, step));
}

void prune_checkpoints(const std::filesystem::path& output_dir, std::int64_t step, int keep,
                       const std::vector<std::int64_t>& protected_steps) {
  if (keep <= 0) return;
  // Nothing is deleted unless the new manifest can be read back from the disk.
  read_manifest(checkpoint_path(output_dir, step));
  std::vector<CheckpointInfo> committed = list_checkpoints(output_dir);
  std::erase_if(committed, [](const CheckpointInfo& info) { return !info.is_committed; });
  std::reverse(committed.begin(), committed.end());  // oldest first
  auto surplus = static_cast<std::int64_t>(committed.size()) - keep;
  for (const CheckpointInfo& info : committed) {
    if (surplus <= 0) break;
    if (info.step == step ||
        std::find(protected_steps.begin(), protected_steps.end(), info.step) != protected_steps.end())
      continue;
    const std::optional<UniqueFd> lock = lock_for_deleting(info.directory);
    if (!lock) {
      log::info("{} is being read and stays for now", info.directory.string());
      continue;
    }
    const std::filesystem::path doomed = info.directory.string() + ".deleting";
    remove_tree(doomed);
    rename_path(info.directory, doomed);
    fsync_path(output_dir);
    remove_tree(doomed);
    --surplus;
  }
}

std::vector<std::filesystem::path> remove_stale_directories(const std::filesystem::path& output_dir) {
  std::vector<std::filesystem::path> removed;
  for (const std::filesystem::path& entry : entries_of(output_dir)) {
    const std::string extension = entry.extension().string();
    if (step_of(entry.stem().string()) && (extension == ".partial" || extension == ".deleting")) {
      remove_tree(entry);
      log::info("removed {}, left behind by an interrupted run", entry.string());
      removed.push_back(entry);
    }
  }
  return removed;
}

std::filesystem::path absolute_checkpoint(const std::filesystem::path& checkpoint_dir) {
  std::filesystem::path path = std::filesystem::absolute(checkpoint_dir).lexically_normal();
  return path.has_filename() ? path : path.parent_path();
}

std::vector<CheckpointInfo> list_checkpoints(const std::filesystem::path& output_dir) {
  std::vector<CheckpointInfo> found;
  for (const std::filesystem::path& entry : entries_of(output_dir)) {
    const std::optional<std::int64_t> step = step_of(entry.filename().string());
    if (!step || !std::filesystem::is_directory(entry)) continue;
    CheckpointInfo info{.step = *step, .directory = entry, .is_committed = false, .problem = ""};
    try {
      const Manifest manifest = read_manifest(entry);
      if (manifest.step != *step)
        fail(ErrorKind::data, fmt::format("{}: the manifest is of step {}", entry.string(), manifest.step));
      info.is_committed = true;
    } catch (const Error& e) {
      info.problem = e.what();
      info.is_unreadable = e.kind() == ErrorKind::io;
    }
    found.push_back(std::move(info));
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.step > b.step; });
  return found;
}

}  // namespace shardtune
