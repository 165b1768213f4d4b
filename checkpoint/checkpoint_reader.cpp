#include "checkpoint/checkpoint_reader.hpp"

#include <algorithm>
#include <tuple>
#include <utility>

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include "checkpoint/output_lock.hpp"
#include "checkpoint/state_view.hpp"
#include "core/error.hpp"

namespace shardtune {
namespace {

// A checkpoint of a thousand ranks has a thousand files. What is read in the order of the files needs one of them;
// tensors that are cut over many are read piece by piece from each in turn.
constexpr std::size_t kMostOpen = 8;

template <class File>
std::uint64_t bytes_read_of(const File& file) {
  return std::visit([](const auto& one) { return one.bytes_read(); }, file);
}

}  // namespace

CheckpointReader::CheckpointReader(const std::filesystem::path& checkpoint_dir)
    : CheckpointReader(checkpoint_dir, read_manifest(checkpoint_dir)) {}

CheckpointReader::CheckpointReader(std::filesystem::path checkpoint_dir, Manifest manifest)
    : directory_(std::move(checkpoint_dir)), lock_(lock_for_reading(directory_)), manifest_(std::move(manifest)) {}

const ManifestTensor& CheckpointReader::tensor(const std::string& name, const std::string& field) const {
  const ManifestTensor* found = manifest_.find(name, field);
  if (found == nullptr)
    fail(ErrorKind::data,
         fmt::format("{} holds no '{}' of tensor '{}'; it is a checkpoint of another model or optimizer",
                     directory_.string(), field, name));
  return *found;
}

CheckpointReader::File& CheckpointReader::open(std::size_t file) {
  const auto it = std::find_if(open_.begin(), open_.end(), [&](const OpenFile& open) { return open.index == file; });
  if (it != open_.end()) {
    open_.splice(open_.begin(), open_, it);
    return it->file;
  }
  if (open_.size() == kMostOpen) {
    closed_bytes_read_ += bytes_read_of(open_.back().file);
    open_.pop_back();
  }
  const ManifestFile& entry = manifest_.files.at(file);
  const std::filesystem::path path = directory_ / entry.name;
  VerifiedFile verified(path, entry.size, entry.digest);
  if (entry.raw_size == 0)
    open_.push_front({file, std::move(verified)});
  else
    open_.push_front({file, CompressedFile(path, std::move(verified), entry.raw_size)});
  return open_.front().file;
}

void CheckpointReader::read(const std::vector<Request>& requests) {
  struct Piece {
    std::size_t file;
    std::uint64_t begin;
    std::size_t size;
    char* into;
  };
  std::vector<Piece> pieces;
  std::vector<std::pair<at::Tensor, at::Tensor>> to_convert;  // into, from
  for (const Request& request : requests) {
    check_internal(request.into.is_contiguous() && request.into.device().is_cpu(),
                   "a loaded slice must be a contiguous tensor on the CPU");
    const std::int64_t begin = request.offset, end = request.offset + request.into.numel();
    check_internal(begin >= 0 && end <= request.tensor->numel(), "a requested slice lies outside of its tensor");
    at::Tensor target = request.into;
    if (request.tensor->dtype != dtype_name(target.scalar_type())) {
      target = at::empty({target.numel()}, dtype_of(request.tensor->dtype));
      to_convert.emplace_back(request.into, target);
    }
    auto* out = static_cast<char*>(target.data_ptr());
    const auto width = static_cast<std::int64_t>(request.tensor->element_bytes());
    const auto& slices = request.tensor->slices;
    auto it = std::upper_bound(slices.begin(), slices.end(), begin, [](std::int64_t at, const ManifestSlice& slice) {
      return at < slice.offset + slice.numel;
    });
    for (; it != slices.end() && it->offset < end; ++it) {
      const std::int64_t from = std::max(begin, it->offset), to = std::min(end, it->offset + it->numel);
      if (from >= to) continue;
      pieces.push_back({it->file, it->byte_offset + static_cast<std::uint64_t>((from - it->offset) * width),
                        static_cast<std::size_t>((to - from) * width), out + (from - begin) * width});
    }
  }
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return std::tie(a.file, a.begin) < std::tie(b.file, b.begin); });
  for (const Piece& piece : pieces)
    std::visit([&](auto& file) { file.read(piece.begin, piece.size, piece.into); }, open(piece.file));
  for (auto& [into, from] : to_convert) into.copy_(from);
}

void CheckpointReader::read_in_pieces(const ManifestTensor& tensor, const PieceUser& use) {
  constexpr std::int64_t kPieceNumel = 1 << 18;
  const std::int64_t numel = tensor.numel();
  const at::Tensor buffer = at::empty({std::min(numel, kPieceNumel)}, at::kFloat);
  for (std::int64_t begin = 0; begin < numel; begin += kPieceNumel) {
    const at::Tensor piece = buffer.narrow(0, 0, std::min(kPieceNumel, numel - begin));
    read({{&tensor, begin, piece}});
    use(begin, piece);
  }
}

std::uint64_t CheckpointReader::bytes_read() const {
  std::uint64_t total = closed_bytes_read_;
  for (const OpenFile& open : open_) total += bytes_read_of(open.file);
  return total;
}

}  // namespace shardtune
