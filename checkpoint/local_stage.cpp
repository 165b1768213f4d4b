#include "checkpoint/local_stage.hpp"

#include <algorithm>
#include <map>
#include <system_error>

#include <fmt/format.h>
#include <unistd.h>

#include "checkpoint/block_table.hpp"
#include "checkpoint/checkpoint_directory.hpp"
#include "checkpoint/direct_file.hpp"
#include "checkpoint/piece_source.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

void remove_quietly(const fs::path& path) noexcept {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

// The directories in `directory`; none when it cannot be read.
std::vector<fs::path> directories_in(const fs::path& directory) {
  std::vector<fs::path> found;
  std::error_code error;
  for (auto it = fs::directory_iterator(directory, error); !error && it != fs::directory_iterator();
       it.increment(error))
    if (it->is_directory(error)) found.push_back(it->path());
  std::sort(found.begin(), found.end());
  return found;
}

void copy_durably(const fs::path& from, const fs::path& to, std::uint64_t size,
                  const std::function<void()>& keep_going) {
  const UniqueFd source = open_for_reading(from);
  DirectFile target(to);
  const AlignedBuffer buffer = make_aligned_buffer(PieceSource::kPieceBytes);
  for (std::uint64_t at = 0; at < size; at += PieceSource::kPieceBytes) {
    const std::size_t piece = std::min<std::uint64_t>(PieceSource::kPieceBytes, size - at);
    pread_exactly(source.get(), buffer.get(), piece, at, from);
    target.write(buffer.get(), piece, at);
    keep_going();
  }
  target.sync();
}

}  // namespace

LocalStage::LocalStage(const fs::path& local_dir, const fs::path& output_dir)
    : root_(local_dir /
            fmt::format("shardtune-{}", to_hex(hash_bytes(fs::weakly_canonical(fs::absolute(output_dir)).string())))) {
  try {
    make_directories_durably(root_);
  } catch (const Error& e) {
    fail(e.kind(), fmt::format("--checkpoint_local_dir = {}: {}", local_dir.string(), e.what()));
  }
  if (::access(root_.c_str(), W_OK) != 0)
    fail(ErrorKind::io, fmt::format("--checkpoint_local_dir = {}: not writable by this user; choose another directory",
                                    local_dir.string()));
}

fs::path LocalStage::partial(const std::string& file, std::int64_t step) const {
  return partial_path(root_ / file, step);
}

fs::path LocalStage::complete_path(const std::string& file, std::int64_t step) const {
  return checkpoint_path(root_ / file, step);
}

void LocalStage::begin(const std::string& file, std::int64_t step, std::int64_t committed_step) const {
  for (const fs::path& old : directories_in(root_ / file)) {
    const bool is_whole = fs::exists(old / "manifest.json") && old.extension().empty();
    if (!is_whole || old == complete_path(file, committed_step)) remove_quietly(old);
  }
  const fs::path directory = partial(file, step);
  make_directories_durably(directory.parent_path());
  std::error_code error;
  fs::create_directory(directory, error);
  if (error) fail_writing("create", directory, error.value());
}

void LocalStage::complete(const std::string& file, std::int64_t step, const std::string& manifest_text) const {
  const fs::path directory = partial(file, step), whole = complete_path(file, step);
  write_file_durably(directory / "manifest.json", manifest_text);
  remove_quietly(whole);  // of an abandoned run that reached the same step
  rename_path(directory, whole);
  fsync_path(whole.parent_path());
  for (const fs::path& old : directories_in(root_ / file))
    if (old != whole) remove_quietly(old);
}

void LocalStage::remove(const std::string& file, std::int64_t step) const noexcept {
  remove_quietly(complete_path(file, step));
  std::error_code ignored;
  fs::remove(root_ / file, ignored);  // unless another one is in it
}

std::vector<LocalStage::Copy> LocalStage::find() const {
  std::map<std::string, Copy> by_manifest;
  for (const fs::path& file : directories_in(root_))
    for (const fs::path& directory : directories_in(file)) {
      if (!directory.extension().empty()) continue;  // .partial
      try {
        const Manifest manifest = read_manifest(directory);
        if (directory != checkpoint_path(file, manifest.step)) continue;
        Copy& copy = by_manifest[read_file(directory / "manifest.json")];
        copy.step = manifest.step;
        for (const ManifestFile& wanted : manifest.files)
          if (fs::exists(directory / wanted.name)) copy.files.push_back(directory / wanted.name);
      } catch (const Error&) {
        // A damaged manifest makes no checkpoint.
      }
    }
  std::vector<Copy> copies;
  for (auto& [text, copy] : by_manifest) {
    copy.manifest_text = text;
    copies.push_back(std::move(copy));
  }
  return copies;
}

void LocalStage::clear() const noexcept {
  for (const fs::path& file : directories_in(root_)) remove_quietly(file);
}

void drain_file(const fs::path& from, const ManifestFile& file, const fs::path& to,
                const std::function<void()>& keep_going) {
  const fs::path source = from / file.name, target = to / file.name, temporary = target.string() + ".tmp";
  copy_durably(source, temporary, file.size, keep_going);
  const BlockTable table = hash_file(temporary, [&](std::uint64_t, std::string_view, std::uint64_t) { keep_going(); });
  if (table.file_bytes != file.size || table.digest() != file.digest)
    fail(ErrorKind::io, fmt::format("{} does not hold what was written to {}; check the disks of both",
                                    temporary.string(), source.string()));
  rename_path(temporary, target);
  fsync_path(to);
  if (file.has_block_table) write_file_durably(block_table_path(target), table.serialize());
}

}  // namespace shardtune
