#include "checkpoint/offline_writer.hpp"

#include <algorithm>
#include <system_error>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include "checkpoint/checkpoint_commit.hpp"
#include "checkpoint/checkpoint_directory.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/output_lock.hpp"
#include "checkpoint/piece_source.hpp"
#include "core/error.hpp"
#include "core/file.hpp"

namespace shardtune {
namespace {

// One shard's slices in the order of the file.
class OfflineSource : public PieceSource {
 public:
  OfflineSource(const OfflineCheckpoint& what, int shard, const ReadElements& read) : read_(read) {
    for (const OfflineTensor& tensor : what.tensors) {
      std::int64_t numel = 1;
      for (const std::int64_t extent : tensor.shape) numel *= extent;
      const std::int64_t begin =
          numel / what.num_shards * shard + std::min<std::int64_t>(shard, numel % what.num_shards);
      const std::int64_t size = numel / what.num_shards + (shard < numel % what.num_shards ? 1 : 0);
      // A tensor of the device "meta" has a size and no memory.
      view_.slices.push_back({tensor.name, tensor.field, tensor.shape, begin,
                              at::empty({size}, at::TensorOptions(at::kMeta).dtype(dtype_of(tensor.dtype)))});
    }
    view_.run = what.run;
  }

  const StateView& view() const override { return view_; }

  std::optional<Piece> take(void* into, const Copied& copied) override {
    while (slice_ < view_.slices.size() && done_ == view_.slices[slice_].data.numel()) ++slice_, done_ = 0;
    if (slice_ == view_.slices.size()) return std::nullopt;
    const StateSlice& slice = view_.slices[slice_];
    const std::size_t width = slice.data.element_size();
    const std::int64_t size = std::min(static_cast<std::int64_t>(kPieceBytes / width), slice.data.numel() - done_);
    read_(slice_, slice.offset + done_, at::from_blob(into, {size}, slice.data.scalar_type()));
    const Piece piece{slice_, static_cast<std::uint64_t>(done_) * width, static_cast<std::size_t>(size) * width};
    done_ += size;
    copied(piece, 0, piece.size);
    return piece;
  }

 private:
  const ReadElements& read_;
  StateView view_;
  std::size_t slice_ = 0;
  std::int64_t done_ = 0;  // elements of slice_ that were taken
};

}  // namespace

std::filesystem::path write_checkpoint(const std::filesystem::path& output_dir, const std::string& purpose,
                                       const OfflineCheckpoint& what, const ReadElements& read) {
  check_internal(what.num_shards > 0, "write_checkpoint needs a shard");
  const std::filesystem::path partial = partial_path(output_dir, what.step),
                              final_dir = checkpoint_path(output_dir, what.step);
  make_directories_durably(output_dir);
  const OutputLock lock(output_dir, purpose, 0);
  if (std::filesystem::exists(final_dir))
    fail(ErrorKind::config, fmt::format("{} exists already; choose another output directory", final_dir.string()));
  const auto no_phase = [](const char*) {};
  make_partial(output_dir, partial);
  try {
    std::vector<std::string> shards;
    for (int shard = 0; shard < what.num_shards; ++shard) {
      OfflineSource source(what, shard, read);
      ShardWriter writer(partial, {what.step, shard, what.num_shards}, no_phase);
      const std::vector<std::uint64_t> positions = writer.lay_out(source.view());
      shards.push_back(describe_shard(writer.seal(writer.write(source, positions)), source.view()));
    }
    const std::vector<ManifestFile> side_files = write_side_files(partial, what.side_files);
    commit_checkpoint({output_dir, what.step, what.run, side_files, shards, what.num_shards}, no_phase);
    const std::vector<CheckpointInfo> all = list_checkpoints(output_dir);
    if (std::none_of(all.begin(), all.end(),
                     [&](const auto& info) { return info.is_committed && info.step > what.step; }))
      write_latest(output_dir, what.step);
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove_all(partial, ignored);
    throw;
  }
  return final_dir;
}

}  // namespace shardtune
