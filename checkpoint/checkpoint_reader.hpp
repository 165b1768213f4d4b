#pragma once
// Reads tensors out of one committed checkpoint without a communicator and without HDF5: positions come from the
// manifest, bytes by verified block reads. At most eight files are open; memory: the manifest and 1 MiB for each of them
// (4 MiB where it is compressed). Not thread-safe.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <list>
#include <string>
#include <variant>
#include <vector>

#include <ATen/core/Tensor.h>

#include "checkpoint/block_table.hpp"
#include "checkpoint/compressed_file.hpp"
#include "checkpoint/manifest.hpp"

namespace shardtune {

class CheckpointReader {
 public:
  // A part of a stored tensor and the contiguous CPU tensor it goes to, fp32 or bf16, converted (to nearest even)
  // where it is stored in the other: elements [offset, offset + into.numel()).
  struct Request {
    const ManifestTensor* tensor = nullptr;  // of this reader's manifest
    std::int64_t offset = 0;
    at::Tensor into;
  };

  explicit CheckpointReader(const std::filesystem::path& checkpoint_dir);
  CheckpointReader(std::filesystem::path checkpoint_dir, Manifest manifest);

  const Manifest& manifest() const noexcept { return manifest_; }
  // Error{data} when there is no such tensor.
  const ManifestTensor& tensor(const std::string& name, const std::string& field) const;
  // Ordered by position in the files, so that every block is read about once. Error{data} for damaged or missing files.
  void read(const std::vector<Request>& requests);
  // The whole tensor in order, at most 1 MiB at a time; the piece's memory is reused after `use` returns.
  using PieceUser = std::function<void(std::int64_t offset, const at::Tensor& piece)>;
  void read_in_pieces(const ManifestTensor& tensor, const PieceUser& use);
  std::uint64_t bytes_read() const;
  std::size_t num_open() const noexcept { return open_.size(); }

 private:
  using File = std::variant<VerifiedFile, CompressedFile>;
  struct OpenFile {
    std::size_t index;
    File file;
  };
  File& open(std::size_t file);

  std::filesystem::path directory_;
  UniqueFd lock_;  // keeps retention from deleting what is being read
  Manifest manifest_;
  std::list<OpenFile> open_;  // the last used first
  std::uint64_t closed_bytes_read_ = 0;
};

}  // namespace shardtune
