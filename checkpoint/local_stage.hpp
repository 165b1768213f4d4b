#pragma once
// Node-local staging: a checkpoint is first written to a fast disk of each node, then drained to the output directory
// in the background. Only the drained one is committed; but a local one that is whole survives the death of its job,
// and the next start on the same nodes drains it.
//
//   LOCAL_DIR/shardtune-<hash of the output directory>/<shard file name>/checkpoint-<step>[.partial]/
// holds one file of the checkpoint with its block table (the first also the side files) and, once it is whole, the
// checkpoint's manifest. Ranks of one node share nothing but the top.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/manifest.hpp"

namespace shardtune {

class LocalStage {
 public:
  // Makes the directory. Error{io} when it cannot be made or written to.
  LocalStage(const std::filesystem::path& local_dir, const std::filesystem::path& output_dir);

  // Where FILE of a save is written, by all ranks that share it. Pure.
  std::filesystem::path partial(const std::string& file, std::int64_t step) const;
  // The following are for the owner of FILE. An empty partial directory; what is left of saves before `step` that
  // need no drain any more (steps up to `committed_step`, and other partials) is removed first.
  void begin(const std::string& file, std::int64_t step, std::int64_t committed_step) const;
  // The partial directory is whole and durable, and older ones are of no use any more.
  void complete(const std::string& file, std::int64_t step, const std::string& manifest_text) const;
  // What complete() left. Read-only from then on.
  std::filesystem::path complete_path(const std::string& file, std::int64_t step) const;
  void remove(const std::string& file, std::int64_t step) const noexcept;

  // What this node holds of a whole local checkpoint.
  struct Copy {
    std::int64_t step = 0;
    std::string manifest_text;
    std::vector<std::filesystem::path> files;  // those of the manifest that lie here
  };
  std::vector<Copy> find() const;
  void clear() const noexcept;  // everything of this output directory on this node

 private:
  std::filesystem::path root_;
};

// FILE of `from` and its block table, if it has one, in `to`: durable, read back, with the manifest's size and digest.
// Error{io} naming both when they do not fit. `keep_going` is called between pieces; it throws to end the work.
void drain_file(
    const std::filesystem::path& from, const ManifestFile& file, const std::filesystem::path& to,
    const std::function<void()>& keep_going = [] {});

}  // namespace shardtune
