#include "tests/comm/conformance.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/rng.hpp"

namespace shardtune::conformance {
namespace {

using Counts = std::vector<std::int64_t>;

constexpr at::ScalarType kSummable[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kLong};
// Small ones take one round of messages, large ones are cut into slices; none divides by 2, 3 or 4.
constexpr std::int64_t kSizes[] = {1, 7, 1021, 50021};

std::int64_t sum(const Counts& counts) {
  std::int64_t total = 0;
  for (const auto count : counts) total += count;
  return total;
}

std::int64_t offset_of(const Counts& counts, int rank) { return sum({counts.begin(), counts.begin() + rank}); }

// Uneven, with a zero on rank 1 (and nobody else), total not a multiple of anything.
Counts uneven_counts(int size, std::int64_t unit) {
  Counts counts;
  for (int r = 0; r < size; ++r) counts.push_back(r == 1 ? 0 : unit * (r + 1) + 3);
  return counts;
}

void expect_same_bits(const at::Tensor& actual, const at::Tensor& expected, const std::string& what) {
  ASSERT_EQ(actual.scalar_type(), expected.scalar_type()) << what;
  ASSERT_EQ(actual.numel(), expected.numel()) << what;
  if (actual.nbytes() == 0) return;
  EXPECT_EQ(std::memcmp(actual.const_data_ptr(), expected.const_data_ptr(), actual.nbytes()), 0) << what;
}

std::string describe(const Communicator& communicator, at::ScalarType dtype, std::int64_t numel) {
  return "rank " + std::to_string(communicator.rank()) + " of " + std::to_string(communicator.size()) + ", " +
         c10::toString(dtype) + ", " + std::to_string(numel) + " elements";
}

at::Tensor combine(const at::Tensor& left, const at::Tensor& right, ReduceOp op) {
  if (op == ReduceOp::sum) return left + right;
  return op == ReduceOp::max ? at::maximum(left, right) : at::minimum(left, right);
}

// The subtree over ranks [begin, begin + 2^level) that exist.
at::Tensor subtree(const std::vector<at::Tensor>& leaves, std::size_t begin, std::size_t width, ReduceOp op) {
  if (width == 1) return leaves[begin];
  const std::size_t middle = begin + width / 2;
  const at::Tensor left = subtree(leaves, begin, width / 2, op);
  return middle < leaves.size() ? combine(left, subtree(leaves, middle, width / 2, op), op) : left;
}

template <class Function>
void expect_internal_error(const char* what, Function function) {
  try {
    function();
    ADD_FAILURE() << what << " was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::internal) << what << ": " << error.what();
  }
}

}  // namespace

at::Tensor make_input(int rank, std::int64_t numel, at::ScalarType dtype) {
  at::Tensor values = at::empty({numel}, at::kDouble);
  auto* data = values.mutable_data_ptr<double>();
  for (std::int64_t i = 0; i < numel; ++i) {
    const auto words = philox4x32(77, static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(rank));
    const double mantissa = static_cast<double>(words[0]) / 4294967296.0 - 0.5;
    data[i] = std::ldexp(mantissa, static_cast<int>(words[1] % 24));
  }
  return values.to(dtype);
}

at::Tensor expected_reduction(int num_ranks, std::int64_t numel, at::ScalarType dtype, ReduceOp op) {
  std::vector<at::Tensor> leaves;
  for (int r = 0; r < num_ranks; ++r) {
    at::Tensor leaf = make_input(r, numel, dtype);
    leaves.push_back(dtype == at::kBFloat16 ? leaf.to(at::kFloat) : leaf);
  }
  std::size_t width = 1;
  while (width < leaves.size()) width *= 2;
  return subtree(leaves, 0, width, op).to(dtype);
}

void all_reduce_gives_the_bits_of_the_tree(Communicator& communicator) {
  for (const auto dtype : kSummable) {
    for (const auto numel : kSizes) {
      for (const auto op : {ReduceOp::sum, ReduceOp::max, ReduceOp::min}) {
        const at::Tensor tensor = make_input(communicator.rank(), numel, dtype);
        communicator.all_reduce(tensor, op).wait();
        expect_same_bits(tensor, expected_reduction(communicator.size(), numel, dtype, op),
                         "all_reduce " + std::to_string(static_cast<int>(op)) + ", " +
                             describe(communicator, dtype, numel));
      }
    }
  }
  const at::Tensor flags = at::full({3}, communicator.rank() + 1, at::kByte);
  communicator.all_reduce(flags, ReduceOp::max).wait();
  expect_same_bits(flags, at::full({3}, communicator.size(), at::kByte), "all_reduce max of uint8");
}

void all_reduce_of_nan_is_nan(Communicator& communicator) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    for (const auto op : {ReduceOp::sum, ReduceOp::max, ReduceOp::min}) {
      const at::Tensor tensor = make_input(communicator.rank(), 5, dtype);
      if (communicator.rank() == communicator.size() - 1) tensor[2] = std::numeric_limits<double>::quiet_NaN();
      communicator.all_reduce(tensor, op).wait();
      EXPECT_EQ(at::isnan(tensor).sum().item<std::int64_t>(), 1);
      EXPECT_TRUE(at::isnan(tensor[2]).item<bool>());
    }
  }
}

void all_gather_concatenates_uneven_parts(Communicator& communicator) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kLong, at::kByte}) {
    for (const std::int64_t unit : {1, 5003}) {
      const Counts counts = uneven_counts(communicator.size(), unit);
      std::vector<at::Tensor> parts;
      for (int r = 0; r < communicator.size(); ++r) {
        parts.push_back(make_input(r, counts[static_cast<std::size_t>(r)], at::kLong).to(dtype));
      }
      const at::Tensor out = at::empty({sum(counts)}, dtype);
      communicator.all_gather(out, parts[static_cast<std::size_t>(communicator.rank())].clone(), counts).wait();
      expect_same_bits(out, at::cat(parts), "all_gather, " + describe(communicator, dtype, sum(counts)));
    }
  }
}

void all_gather_works_in_place(Communicator& communicator) {
  for (const std::int64_t unit : {2, 9001}) {
    const Counts counts = uneven_counts(communicator.size(), unit);
    const at::Tensor out = at::zeros({sum(counts)}, at::kFloat);
    const auto own = counts[static_cast<std::size_t>(communicator.rank())];
    const at::Tensor in = out.narrow(0, offset_of(counts, communicator.rank()), own);
    in.copy_(make_input(communicator.rank(), own, at::kFloat));
    communicator.all_gather(out, in, counts).wait();
    for (int r = 0; r < communicator.size(); ++r) {
      const auto count = counts[static_cast<std::size_t>(r)];
      expect_same_bits(out.narrow(0, offset_of(counts, r), count), make_input(r, count, at::kFloat), "all_gather in place");
    }
  }
}

void reduce_scatter_gives_the_bits_of_the_tree(Communicator& communicator) {
  for (const auto dtype : kSummable) {
    for (const std::int64_t unit : {1, 4999}) {
      const Counts counts = uneven_counts(communicator.size(), unit);
      const std::int64_t numel = sum(counts);
      const auto own = counts[static_cast<std::size_t>(communicator.rank())];
      const at::Tensor out = at::empty({own}, dtype);
      const at::Tensor in = make_input(communicator.rank(), numel, dtype);
      communicator.reduce_scatter(out, in, counts).wait();
      const at::Tensor all = expected_reduction(communicator.size(), numel, dtype, ReduceOp::sum);
      expect_same_bits(out, all.narrow(0, offset_of(counts, communicator.rank()), own),
                       "reduce_scatter, " + describe(communicator, dtype, numel));
      expect_same_bits(in, make_input(communicator.rank(), numel, dtype), "the input of reduce_scatter");
    }
  }
}

void all_to_all_delivers_uneven_parts(Communicator& communicator) {
  const int size = communicator.size();
  const int rank = communicator.rank();
  for (const std::int64_t unit : {1, 3001}) {
    // From rank a to rank b: nothing when (a + 2 b) % 4 == 2.
    const auto count = [&](int from, int to) { return (from + 2 * to) % 4 == 2 ? 0 : unit * (from + 1) + to; };
    const auto value = [&](int from, int to) { return at::full({count(from, to)}, 100 * from + to, at::kLong); };
    Counts in_counts, out_counts;
    std::vector<at::Tensor> in, expected;
    for (int r = 0; r < size; ++r) {
      in_counts.push_back(count(rank, r));
      out_counts.push_back(count(r, rank));
      in.push_back(value(rank, r));
      expected.push_back(value(r, rank));
    }
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kLong, at::kByte}) {
      const at::Tensor out = at::empty({sum(out_counts)}, dtype);
      communicator.all_to_all(out, out_counts, at::cat(in).to(dtype), in_counts).wait();
      expect_same_bits(out, at::cat(expected).to(dtype), "all_to_all, " + describe(communicator, dtype, out.numel()));
    }
  }
}

void broadcast_copies_the_root(Communicator& communicator) {
  for (int root = 0; root < communicator.size(); ++root) {
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kLong, at::kByte}) {
      const at::Tensor expected = make_input(root, 1237, at::kLong).to(dtype);
      const at::Tensor tensor = communicator.rank() == root ? expected.clone() : at::zeros({1237}, dtype);
      communicator.broadcast(tensor, root).wait();
      expect_same_bits(tensor, expected, "broadcast, " + describe(communicator, dtype, 1237));
    }
  }
}

void empty_tensors_pass(Communicator& communicator) {
  const Counts zeros(static_cast<std::size_t>(communicator.size()), 0);
  const auto empty = [] { return at::empty({0}, at::kFloat); };
  communicator.all_reduce(empty(), ReduceOp::sum).wait();
  communicator.all_gather(empty(), empty(), zeros).wait();
  communicator.reduce_scatter(empty(), empty(), zeros).wait();
  communicator.all_to_all(empty(), zeros, empty(), zeros).wait();
  communicator.broadcast(empty(), communicator.size() - 1).wait();
  communicator.barrier();
  const at::Tensor one = at::ones({1}, at::kLong);  // the group is still in step
  communicator.all_reduce(one, ReduceOp::sum).wait();
  EXPECT_EQ(one.item<std::int64_t>(), communicator.size());
}

void unwaited_operations_run_in_order(Communicator& communicator) {
  const int size = communicator.size();
  const Counts counts = uneven_counts(size, 11);
  const auto own = counts[static_cast<std::size_t>(communicator.rank())];
  const at::Tensor tensor = make_input(communicator.rank(), sum(counts), at::kFloat);
  const at::Tensor part = at::empty({own}, at::kFloat);
  const at::Tensor gathered = at::zeros({sum(counts)}, at::kFloat);
  const at::Tensor count = at::ones({1}, at::kLong);
  {
    // Each operation takes the result of the one before; only the last is waited for, the others when they go.
    Work first = communicator.reduce_scatter(part, tensor, counts);
    Work second = communicator.all_gather(gathered, part, counts);
    Work third = communicator.all_reduce(count, ReduceOp::sum);
    Work fourth = communicator.all_reduce(count, ReduceOp::sum);
    Work fifth = communicator.broadcast(gathered, size - 1);
    fifth.wait();
    EXPECT_EQ(count.item<std::int64_t>(), size * size);
    first = std::move(second);
  }
  expect_same_bits(gathered, expected_reduction(size, sum(counts), at::kFloat, ReduceOp::sum), "mixed sequence");
  std::vector<Work> works;
  std::vector<at::Tensor> tensors;
  for (int i = 0; i < 50; ++i) {
    tensors.push_back(make_input(communicator.rank(), 100 + i, at::kFloat));
    works.push_back(communicator.all_reduce(tensors.back(), ReduceOp::sum));
  }
  for (std::size_t i = works.size(); i-- > 0;) works[i].wait();
  for (int i = 0; i < 50; ++i) {
    expect_same_bits(tensors[static_cast<std::size_t>(i)],
                     expected_reduction(size, 100 + i, at::kFloat, ReduceOp::sum), "fifty in flight");
  }
}

void split_orders_by_key_and_works(Communicator& communicator) {
  const int size = communicator.size();
  const int rank = communicator.rank();
  const auto reversed = communicator.split(0, size - rank);
  EXPECT_EQ(reversed->size(), size);
  EXPECT_EQ(reversed->rank(), size - 1 - rank);
  const at::Tensor from_last = at::full({1}, rank, at::kLong);
  reversed->broadcast(from_last, 0).wait();
  EXPECT_EQ(from_last.item<std::int64_t>(), size - 1);

  const auto parity = communicator.split(rank % 2, 0);  // equal keys: order of the parent
  EXPECT_EQ(parity->rank(), rank / 2);
  const at::Tensor tensor = make_input(parity->rank(), 30011, at::kFloat);
  parity->all_reduce(tensor, ReduceOp::sum).wait();
  expect_same_bits(tensor, expected_reduction(parity->size(), 30011, at::kFloat, ReduceOp::sum), "all_reduce in a part");
  const auto alone = parity->split(parity->rank(), 0);  // a part of a part
  EXPECT_EQ(alone->size(), 1);
  alone->barrier();
  communicator.barrier();  // the parent still works, after and between its parts
  parity->barrier();
}

void shared_memory_is_common_to_all_ranks(Communicator& communicator) {
  const int size = communicator.size();
  const std::int64_t numel = 5000;
  at::Tensor shared = communicator.make_shared(size * numel, at::kLong);
  const at::Tensor num_defined = at::full({1}, shared.defined() ? 1 : 0, at::kLong);
  communicator.all_reduce(num_defined, ReduceOp::sum).wait();
  const auto num = num_defined.item<std::int64_t>();
  ASSERT_TRUE(num == 0 || num == size) << num;  // a backend has it or has not
  if (!shared.defined()) return;
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(shared.const_data_ptr()) % 64, 0U);
  for (int round = 0; round < 3; ++round) {
    shared.narrow(0, communicator.rank() * numel, numel).fill_(100 * round + communicator.rank());
    const at::Tensor word = at::zeros({1}, at::kLong);
    communicator.all_reduce(word, ReduceOp::max).wait();
    for (int rank = 0; rank < size; ++rank) {
      EXPECT_TRUE(at::equal(shared.narrow(0, rank * numel, numel), at::full({numel}, 100 * round + rank, at::kLong)));
    }
    communicator.barrier();  // everybody has read
  }
}

// Also beside collectives under way, and by a rank that says nothing for a while.
void a_progress_board_tells_of_what_was_written(Communicator& communicator) {
  const int size = communicator.size();
  const at::Tensor shared = communicator.make_shared(2 * size, at::kLong);
  const std::unique_ptr<ProgressBoard> board = communicator.make_progress_board();
  ASSERT_EQ(shared.defined(), board != nullptr);
  if (!board) return;
  board->wait_for_all(0);
  for (std::int64_t step = 1; step <= 20; ++step) {
    if (communicator.rank() == step % size) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const at::Tensor half = shared.narrow(0, step % 2 * size, size);  // a rank may be one step ahead
    half[communicator.rank()].fill_(step);
    const at::Tensor sum = at::full({1}, step, at::kLong);
    Work under_way = communicator.all_reduce(sum, ReduceOp::sum);
    board->publish(2 * step);
    board->wait_for_all(2 * step - 1);  // need not have been published as such
    EXPECT_TRUE(at::equal(half, at::full({size}, step, at::kLong)));
    under_way.wait();
    EXPECT_EQ(sum.item<std::int64_t>(), size * step);
  }
  communicator.barrier();
}

void bad_arguments_are_refused_before_anything_is_sent(Communicator& communicator) {
  const auto size = static_cast<std::size_t>(communicator.size());
  const Counts ones(size, 1);
  const auto total = static_cast<std::int64_t>(size);
  const at::Tensor one = at::zeros({1}, at::kFloat);
  const at::Tensor all = at::zeros({total}, at::kFloat);
  const auto sum_op = ReduceOp::sum;
  expect_internal_error("undefined", [&] { communicator.all_reduce(at::Tensor(), sum_op).wait(); });
  expect_internal_error("strided", [&] { communicator.all_reduce(at::zeros({3, 4}).t(), sum_op).wait(); });
  expect_internal_error("fp16", [&] { communicator.all_reduce(at::zeros({3}, at::kHalf), sum_op).wait(); });
  expect_internal_error("sum of uint8", [&] { communicator.all_reduce(at::zeros({3}, at::kByte), sum_op).wait(); });
  expect_internal_error("missing count", [&] { communicator.all_gather(all, one, Counts(size + 1, 1)).wait(); });
  expect_internal_error("long out", [&] { communicator.all_gather(at::zeros({total + 1}), one, ones).wait(); });
  expect_internal_error("long in", [&] { communicator.all_gather(all, at::zeros({2}), ones).wait(); });
  expect_internal_error("other dtype", [&] { communicator.all_gather(all, one.to(at::kLong), ones).wait(); });
  expect_internal_error("negative count", [&] { communicator.reduce_scatter(one, all, Counts(size, -1)).wait(); });
  expect_internal_error("short in", [&] { communicator.reduce_scatter(one, at::zeros({total + 2}), ones).wait(); });
  expect_internal_error("aliased", [&] { communicator.all_to_all(all, ones, all, ones).wait(); });
  expect_internal_error("root", [&] { communicator.broadcast(one, communicator.size()).wait(); });
  expect_internal_error("fp16", [&] { communicator.make_shared(3, at::kHalf); });
  expect_internal_error("colour", [&] { communicator.split(-1, 0); });
  communicator.barrier();  // the group is still in step
}

void run_all(Communicator& communicator) {
  all_reduce_gives_the_bits_of_the_tree(communicator);
  all_reduce_of_nan_is_nan(communicator);
  all_gather_concatenates_uneven_parts(communicator);
  all_gather_works_in_place(communicator);
  reduce_scatter_gives_the_bits_of_the_tree(communicator);
  all_to_all_delivers_uneven_parts(communicator);
  broadcast_copies_the_root(communicator);
  empty_tensors_pass(communicator);
  unwaited_operations_run_in_order(communicator);
  split_orders_by_key_and_works(communicator);
  shared_memory_is_common_to_all_ranks(communicator);
  a_progress_board_tells_of_what_was_written(communicator);
  bad_arguments_are_refused_before_anything_is_sent(communicator);
}

}  // namespace shardtune::conformance
