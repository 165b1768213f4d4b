// Embedding: rows exactly, gradients as the fp32 sum in token order, the shared gradient of tied weights.
#include "kernels/embedding.hpp"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/rng.hpp"
#include "kernels/cross_entropy.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

at::Tensor random_ids(std::uint64_t key, std::int64_t count, std::int64_t rows) {
  PhiloxStream random(key);
  at::Tensor ids = at::empty({count}, at::kLong);
  for (std::int64_t i = 0; i < count; ++i)
    ids.mutable_data_ptr<std::int64_t>()[i] =
        static_cast<std::int64_t>(random.next_below(static_cast<std::uint64_t>(rows)));
  return ids;
}

// The definition: rows added to `start` one after the other in fp32.
at::Tensor add_rows(at::Tensor start, const at::Tensor& ids, const at::Tensor& grad, std::int64_t zero_row) {
  for (std::int64_t t = 0; t < ids.numel(); ++t)
    if (ids[t].item<std::int64_t>() != zero_row) start[ids[t].item<std::int64_t>()].add_(grad[t].to(at::kFloat));
  return start;
}

TEST(Embedding, RowsAndGradientsAreExact) {
  struct Case {
    std::int64_t tokens, rows, width;
  };
  for (const Case& c : {Case{0, 3, 4}, {1, 1, 1}, {9, 4, 17}, {200, 7, 33}, {50, 100, 48}, {30, 5, 1003}})
    for (const at::ScalarType dtype : kDtypes)
      for (const std::int64_t zero_row : {std::int64_t{-1}, c.rows - 1}) {
        const at::Tensor table = leaf(random_tensor(1, {c.rows, c.width}, dtype)),
                         ids = random_ids(2, c.tokens, c.rows);
        const at::Tensor out = embedding_lookup(ids, table, zero_row);
        const std::string what = fmt::format("{} ids of {} rows of {}", c.tokens, c.rows, c.width);
        expect_same_bits(out, embedding_reference(ids, table.detach(), zero_row), what);
        const at::Tensor seed = random_tensor(3, {c.tokens, c.width}, dtype);
        const at::Tensor grad = gradients(out, seed, {table})[0];
        expect_same_bits(grad, add_rows(at::zeros({c.rows, c.width}), ids, seed, zero_row).to(dtype),
                         what + " gradient");
      }
}

TEST(Embedding, GradientAgreesWithAtens) {
  const at::Tensor ids = random_ids(2, 300, 11), given = random_tensor(1, {11, 21}), seed = random_tensor(3, {300, 21});
  const at::Tensor own = leaf(given), other = double_leaf(given);
  const at::Tensor grad = gradients(embedding_lookup(ids, own, 4), seed, {own})[0];
  const at::Tensor wanted = gradients(embedding_reference(ids, other, 4), exact(seed), {other})[0];
  const at::Tensor terms = at::zeros({11, 21}, at::kDouble).index_add_(0, ids, magnitude(seed));
  expect_within(grad, wanted, 300 * kUnit * terms, "gradient");
  EXPECT_EQ(grad[4].abs().sum().item<float>(), 0);
}

TEST(Embedding, ThreadCountChangesNoBit) {
  const at::Tensor ids = random_ids(2, 3000, 50), given = random_tensor(1, {50, 2000}),
                   seed = random_tensor(3, {3000, 2000});
  const auto compute = [&] {
    const at::Tensor table = leaf(given), out = embedding_lookup(ids, table);
    return std::vector<at::Tensor>{out, gradients(out, seed, {table})[0]};
  };
  expect_same_bits_for_any_thread_count(compute, "embedding");
}

TEST(Embedding, IdsOutsideTheTableAreRefusedByPosition) {
  for (const std::int64_t bad : {-1, 7}) {
    try {
      embedding_lookup(at::tensor({3, 0, static_cast<int>(bad)}, at::kLong), at::zeros({7, 2}));
      FAIL() << "accepted " << bad;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::data);
      EXPECT_NE(std::string(error.what()).find(fmt::format("id {} at position 2", bad)), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("7 rows"), std::string::npos);
    }
  }
}

// Table -> rows -> head with the same table: the gradient is the head's with the rows added, in one buffer.
TEST(Embedding, TiedHeadAndTableShareOneGradient) {
  constexpr std::int64_t kTokens = 40, kRows = 3000, kWidth = 24;
  const at::Tensor given = random_tensor(1, {kRows, kWidth}), ids = random_ids(2, kTokens, kRows);
  const at::Tensor labels = random_ids(3, kTokens, kRows);
  const at::Tensor table = leaf(given);
  const auto tied = std::make_shared<TiedGradient>();
  const at::Tensor loss = linear_cross_entropy_sum(embedding_lookup(ids, table, 5, tied), table, labels,
                                                   {.label_smoothing = 0.1, .tied = tied});
  const std::int64_t peak = peak_bytes_of([&] { loss.backward(); });
  EXPECT_LT(peak, kRows * kWidth * 4) << "the forward pass's buffer is handed on, not copied";
  EXPECT_FALSE(tied->weight_grad.defined());

  const at::Tensor rows = leaf(embedding_reference(ids, given, 5)), head = leaf(given);
  linear_cross_entropy_sum(rows, head, labels, {.label_smoothing = 0.1}).backward();
  expect_same_bits(table.grad(), add_rows(head.grad().clone(), ids, rows.grad(), 5), "gradient");
}

}  // namespace
}  // namespace shardtune::testing
