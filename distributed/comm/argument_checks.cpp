#include "distributed/comm/argument_checks.hpp"

#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

bool is_communicated(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kLong:
    case at::kByte: return true;
    default: return false;
  }
}

void check_tensor(const char* operation, const char* name, const at::Tensor& tensor) {
  const auto refuse = [&](const std::string& what) {
    fail(ErrorKind::internal, fmt::format("{}: tensor '{}' {}", operation, name, what));
  };
  if (!tensor.defined()) refuse("is undefined");
  if (!tensor.device().is_cpu()) refuse(fmt::format("is on {}, this backend needs the CPU", tensor.device().str()));
  if (!tensor.is_contiguous()) refuse("is not contiguous");
  if (is_communicated(tensor.scalar_type())) return;
  refuse(fmt::format("is of dtype {}; fp32, fp64, bf16, int64 and uint8 are communicated",
                     c10::toString(tensor.scalar_type())));
}

void check_pair(const char* operation, const at::Tensor& out, const at::Tensor& in) {
  check_tensor(operation, "out", out);
  check_tensor(operation, "in", in);
  if (out.scalar_type() != in.scalar_type()) {
    fail(ErrorKind::internal, fmt::format("{}: 'out' is {} but 'in' is {}", operation, c10::toString(out.scalar_type()),
                                          c10::toString(in.scalar_type())));
  }
}

void check_summable(const char* operation, const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kByte) {
    fail(ErrorKind::internal, fmt::format("{}: uint8 tensors are not summed; use int64", operation));
  }
}

// The tensor holds the sum of counts.
void check_counts(const char* operation, const char* name, const at::Tensor& tensor, Communicator::Counts counts,
                  int size) {
  if (counts.size() != static_cast<std::size_t>(size)) {
    fail(ErrorKind::internal, fmt::format("{}: {} counts for {} ranks", operation, counts.size(), size));
  }
  std::int64_t sum = 0;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    if (counts[r] < 0) fail(ErrorKind::internal, fmt::format("{}: count {} of rank {}", operation, counts[r], r));
    sum += counts[r];
  }
  if (sum != tensor.numel()) {
    fail(ErrorKind::internal,
         fmt::format("{}: '{}' has {} elements, the counts add up to {}", operation, name, tensor.numel(), sum));
  }
}

// The tensor holds this rank's count.
void check_part(const char* operation, const char* name, const at::Tensor& tensor, std::int64_t count, int rank) {
  if (tensor.numel() != count) {
    fail(ErrorKind::internal, fmt::format("{}: '{}' has {} elements, the count of this rank ({}) is {}", operation, name,
                                          tensor.numel(), rank, count));
  }
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const auto* a_begin = static_cast<const char*>(a.const_data_ptr());
  const auto* b_begin = static_cast<const char*>(b.const_data_ptr());
  return a_begin < b_begin + b.nbytes() && b_begin < a_begin + a.nbytes();
}

}  // namespace

const char* to_string(ReduceOp op) noexcept {
  switch (op) {
    case ReduceOp::sum: return "sum";
    case ReduceOp::max: return "max";
    case ReduceOp::min: return "min";
  }
  return "unknown";
}

void check_all_reduce(const at::Tensor& tensor, ReduceOp op) {
  check_tensor("all_reduce", "tensor", tensor);
  if (op == ReduceOp::sum) check_summable("all_reduce", tensor);
}

void check_all_gather(const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts, int rank, int size) {
  check_pair("all_gather", out, in);
  check_counts("all_gather", "out", out, counts, size);
  check_part("all_gather", "in", in, counts[static_cast<std::size_t>(rank)], rank);
  if (!overlap(out, in)) return;
  std::int64_t offset = 0;
  for (int r = 0; r < rank; ++r) offset += counts[static_cast<std::size_t>(r)];
  const auto* place = static_cast<const char*>(out.const_data_ptr()) + offset * static_cast<std::int64_t>(out.element_size());
  if (in.const_data_ptr() != place) {
    fail(ErrorKind::internal, "all_gather: 'in' overlaps 'out' but is not this rank's place in it");
  }
}

void check_reduce_scatter(const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts, int rank, int size) {
  check_pair("reduce_scatter", out, in);
  check_summable("reduce_scatter", in);
  check_counts("reduce_scatter", "in", in, counts, size);
  check_part("reduce_scatter", "out", out, counts[static_cast<std::size_t>(rank)], rank);
}

void check_all_to_all(const AllToAllArguments& arguments, int rank, int size) {
  const auto& [out, out_counts, in, in_counts] = arguments;
  check_pair("all_to_all", out, in);
  check_counts("all_to_all", "out", out, out_counts, size);
  check_counts("all_to_all", "in", in, in_counts, size);
  const auto self = static_cast<std::size_t>(rank);
  if (out_counts[self] != in_counts[self]) {
    fail(ErrorKind::internal, fmt::format("all_to_all: rank {} sends itself {} elements but expects {}", rank,
                                          in_counts[self], out_counts[self]));
  }
  if (overlap(out, in)) fail(ErrorKind::internal, "all_to_all: 'out' and 'in' overlap");
}

void check_broadcast(const at::Tensor& tensor, int root, int size) {
  check_tensor("broadcast", "tensor", tensor);
  if (root < 0 || root >= size) fail(ErrorKind::internal, fmt::format("broadcast: root {} of {} ranks", root, size));
}

void check_make_buffer(std::int64_t numel, at::ScalarType dtype) {
  if (numel < 0 || !is_communicated(dtype)) {
    fail(ErrorKind::internal, fmt::format("make_buffer: {} elements of {}; fp32, fp64, bf16, int64 and uint8 are "
                                          "communicated",
                                          numel, c10::toString(dtype)));
  }
}

void check_split(int color) {
  if (color < 0) fail(ErrorKind::internal, fmt::format("split: colour {} is negative", color));
}

}  // namespace shardtune
