#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.hpp"
#include "core/error.hpp"
#include "core/file.hpp"

namespace shardtune {
namespace {

constexpr std::uint64_t kChunkBytes = 8U << 20;  // reads end at multiples of this, so that stripes are read whole
constexpr std::uint64_t kConvertedBytes = 1U << 20;
constexpr std::int64_t kLeastNumbers = 64 << 10;  // that a thread reads

struct FloatType {
  at::ScalarType type;
  std::int64_t bytes;
};

FloatType float_type(const SafetensorsEntry& entry) {
  if (entry.dtype == "F32") return {at::kFloat, 4};
  if (entry.dtype == "BF16") return {at::kBFloat16, 2};
  if (entry.dtype == "F16") return {at::kHalf, 2};
  if (entry.dtype == "F64") return {at::kDouble, 8};
  fail(ErrorKind::data, fmt::format("{}: a tensor of dtype {} cannot be used as a weight; F32, BF16, F16 and F64 can",
                                    entry.file.string(), entry.dtype));
}

// Reads numbers `begin` to `end` of the file's tensor, of `type`, to `out`.
void read_numbers(int fd, const SafetensorsEntry& entry, FloatType type, std::int64_t begin, std::int64_t end,
                  float* out) {
  const bool is_direct = type.type == at::kFloat;
  std::uint64_t at = entry.begin + static_cast<std::uint64_t>(begin * type.bytes);
  const std::uint64_t last = entry.begin + static_cast<std::uint64_t>(end * type.bytes);
  // What is converted passes through a buffer, which every thread has.
  const std::uint64_t chunk = is_direct ? kChunkBytes : kConvertedBytes;
  std::vector<char> buffer(is_direct ? 0 : std::min(chunk, last - at));
  while (at < last) {
    const std::uint64_t boundary = std::min(last, (at / chunk + 1) * chunk);
    const auto num =
        std::max<std::int64_t>(1, static_cast<std::int64_t>(boundary - at) / type.bytes);  // whole elements
    const auto bytes = static_cast<std::uint64_t>(num * type.bytes);
    pread_exactly(fd, is_direct ? reinterpret_cast<char*>(out) : buffer.data(), bytes, at, entry.file);
    if (!is_direct) {
      // ATen's conversions are vectorised and round to nearest even.
      at::from_blob(out, {num}, at::kFloat).copy_(at::from_blob(buffer.data(), {num}, type.type));
    }
    out += num;
    at += bytes;
  }
}

}  // namespace

void read_safetensors_slice(const SafetensorsEntry& entry, std::int64_t offset, at::Tensor into) {
  check_internal(into.scalar_type() == at::kFloat && into.is_contiguous() && into.device().is_cpu(),
                 "read_safetensors_slice needs a contiguous fp32 tensor on the CPU");
  const FloatType type = float_type(entry);
  const std::int64_t count = into.numel();
  check_internal(offset >= 0 && count <= entry.numel() - offset, "read_safetensors_slice: slice outside of the tensor");
  if (count == 0) return;
  const UniqueFd fd = open_for_reading(entry.file);
  auto* out = static_cast<float*>(into.data_ptr());
  // What lies in the page cache costs a core copying and touching new memory, what does not a wait for each read.
  at::parallel_for(0, count, kLeastNumbers, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;  // each thread has a mode of its own
    read_numbers(fd.get(), entry, type, offset + begin, offset + end, out + begin);
  });
}

struct SafetensorsWriter::Impl {
  std::filesystem::path file, temporary;
  std::vector<Item> items;
  UniqueFd fd;
  std::string buffer;
  std::size_t current = 0;     // item being written
  std::int64_t remaining = 0;  // its elements still to come
  bool is_committed = false;

  static std::int64_t numel(const Item& item) {
    std::int64_t product = 1;
    for (const std::int64_t extent : item.shape) product *= extent;
    return product;
  }
  void skip_finished_items() {
    while (current < items.size() && remaining == 0)
      if (++current < items.size()) remaining = numel(items[current]);
  }
  void flush() {
    write_all(fd.get(), buffer, temporary);
    buffer.clear();
  }
  void append(const void* bytes, std::size_t size) {
    if (size >= kChunkBytes) {
      flush();
      write_all(fd.get(), {static_cast<const char*>(bytes), size}, temporary);
      return;
    }
    buffer.append(static_cast<const char*>(bytes), size);
    if (buffer.size() >= kChunkBytes) flush();
  }
};

SafetensorsWriter::SafetensorsWriter(std::filesystem::path file, std::vector<Item> items)
    : impl_(std::make_unique<Impl>()) {
  Impl& impl = *impl_;
  std::string text = R"({"__metadata__":{"format":"pt"})";
  std::set<std::string> names;
  std::uint64_t at = 0;
  for (const Item& item : items) {
    check_internal(item.dtype == "F32" || item.dtype == "BF16", "SafetensorsWriter writes F32 and BF16");
    check_internal(names.insert(item.name).second, "SafetensorsWriter: a tensor name appears twice");
    const std::uint64_t end = at + static_cast<std::uint64_t>(Impl::numel(item)) * (item.dtype == "F32" ? 4 : 2);
    text += fmt::format(R"(,{}:{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})", nlohmann::json(item.name).dump(),
                        item.dtype, nlohmann::json(item.shape).dump(), at, end);
    at = end;
  }
  text += '}';
  text.append((8 - text.size() % 8) % 8, ' ');
  impl.file = std::move(file);
  impl.temporary = impl.file.string() + ".tmp";
  impl.items = std::move(items);
  impl.fd = UniqueFd(::open(impl.temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!impl.fd) fail_writing("create", impl.temporary, errno);
  const std::uint64_t header_bytes = text.size();
  impl.append(&header_bytes, 8);
  impl.append(text.data(), text.size());
  if (!impl.items.empty()) impl.remaining = Impl::numel(impl.items[0]);
  impl.skip_finished_items();
}

SafetensorsWriter::~SafetensorsWriter() {
  if (!impl_->is_committed) ::unlink(impl_->temporary.c_str());
}

void SafetensorsWriter::write(const at::Tensor& flat) {
  Impl& impl = *impl_;
  const at::Tensor data = flat.detach().contiguous().view({-1});
  check_internal(data.scalar_type() == at::kFloat && data.device().is_cpu(),
                 "SafetensorsWriter::write takes fp32 on the CPU");
  for (std::int64_t done = 0; done < data.numel();) {
    check_internal(impl.current < impl.items.size(), "SafetensorsWriter::write: more elements than announced");
    // At most one chunk at a time, so that a conversion never doubles the memory of a large tensor.
    const std::int64_t num = std::min({data.numel() - done, impl.remaining, static_cast<std::int64_t>(kChunkBytes)});
    at::Tensor piece = data.narrow(0, done, num);
    if (impl.items[impl.current].dtype == "BF16") piece = piece.to(at::kBFloat16);
    impl.append(piece.data_ptr(), piece.nbytes());
    done += num;
    impl.remaining -= num;
    impl.skip_finished_items();
  }
}

void SafetensorsWriter::commit() {
  Impl& impl = *impl_;
  check_internal(impl.current == impl.items.size(), "SafetensorsWriter::commit: tensors are missing");
  impl.flush();
  const auto check = [&](int result, const char* action) {
    if (result != 0) fail_writing(action, impl.temporary, errno);
  };
  check(::fsync(impl.fd.get()), "sync");
  check(::close(impl.fd.release()), "close");
  rename_path(impl.temporary, impl.file);
  impl.is_committed = true;
  fsync_parent(impl.file);
}

}  // namespace shardtune
