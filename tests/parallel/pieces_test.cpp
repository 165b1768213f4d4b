// Block layout, canonical tree, round schedule, plan table, decay groups, norms: the parts that need no second rank.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/rng.hpp"
#include "distributed/comm/thread_group.hpp"
#include "distributed/parallel/block_layout.hpp"
#include "distributed/parallel/gradient_norm.hpp"
#include "distributed/parallel/packed_pieces.hpp"
#include "distributed/parallel/rank_grid.hpp"
#include "distributed/parallel/round_schedule.hpp"
#include "distributed/parallel/sharding_plan.hpp"
#include "distributed/parallel/tree_accumulator.hpp"
#include "kernels/sum_of_squares.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune {
namespace {

using testing_support::error_of;

at::Tensor random_tensor(std::uint64_t key, std::int64_t numel) {
  PhiloxStream random(key);
  at::Tensor tensor = at::empty({numel}, at::kFloat);
  for (std::int64_t i = 0; i < numel; ++i)
    tensor.mutable_data_ptr<float>()[i] = static_cast<float>(random.next_normal());
  return tensor;
}

TEST(BlockLayout, SlicesCoverEveryElementOnceAndStartOnBlocks) {
  for (const std::int64_t numel : {0, 1, 255, 256, 257, 4040, 100'003, 1 << 20, (1 << 20) + 1, 11'720'448}) {
    for (const int ranks : {1, 2, 3, 5, 8, 64}) {
      const BlockLayout layout(numel, ranks);
      EXPECT_LE(layout.num_blocks(), 4096);
      std::int64_t next = 0;
      std::int64_t blocks = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        EXPECT_EQ(layout.begin(rank), next);
        EXPECT_TRUE(layout.begin(rank) % 256 == 0 || layout.size(rank) == 0);
        next += layout.size(rank);
        blocks += layout.num_blocks_of(rank);
      }
      EXPECT_EQ(next, numel);
      EXPECT_EQ(blocks, layout.num_blocks());
    }
  }
}

TEST(BlockLayout, BlockSizeDependsOnTheParameterAlone) {
  EXPECT_EQ(block_numel(1), 256);
  EXPECT_EQ(block_numel(1 << 20), 256);
  EXPECT_EQ(block_numel((1 << 20) + 1), 512);
  EXPECT_EQ(block_numel(11'720'448), 4096);
}

at::Tensor recursive_sum(const std::vector<at::Tensor>& leaves, std::size_t begin, std::size_t width) {
  if (width == 1) return leaves[begin];
  const at::Tensor left = recursive_sum(leaves, begin, width / 2);
  return begin + width / 2 < leaves.size() ? left + recursive_sum(leaves, begin + width / 2, width / 2) : left;
}

TEST(TreeAccumulator, AnyOrderOfArrivalGivesTheBitsOfTheRecursiveTree) {
  PhiloxStream random(1);
  for (const std::int64_t leaves : {1, 2, 3, 5, 6, 7, 8, 13, 16, 21}) {
    std::vector<at::Tensor> values;
    for (std::int64_t i = 0; i < leaves; ++i) values.push_back(random_tensor(100 + static_cast<std::uint64_t>(i), 37));
    std::size_t width = 1;
    while (width < values.size()) width *= 2;
    const at::Tensor wanted = recursive_sum(values, 0, width).clone();
    for (int trial = 0; trial < 10; ++trial) {
      std::vector<std::int64_t> order;
      for (std::int64_t i = 0; i < leaves; ++i) {
        order.insert(order.begin() + static_cast<std::ptrdiff_t>(random.next_below(order.size() + 1)), i);
      }
      TreeAccumulator tree(leaves);
      for (const std::int64_t i : order) {
        EXPECT_FALSE(tree.is_complete());
        tree.add({0, i}, {values[static_cast<std::size_t>(i)].clone()});
      }
      ASSERT_TRUE(tree.is_complete());
      EXPECT_TRUE(at::equal(tree.take_root().front(), wanted)) << leaves << " leaves";
    }
  }
}

TEST(TreeAccumulator, ASubrangeLeavesExactlyItsCoveringNodes) {
  for (std::int64_t leaves = 1; leaves <= 17; ++leaves) {
    for (std::int64_t begin = 0; begin <= leaves; ++begin) {
      for (std::int64_t end = begin; end <= leaves; ++end) {
        TreeAccumulator tree(leaves);
        for (std::int64_t i = begin; i < end; ++i) tree.add({0, i}, {at::ones({1})});
        std::vector<TreeNode> held;
        for (const auto& [node, tensor] : tree.take_nodes()) held.push_back(node);
        EXPECT_EQ(held, covering_nodes(begin, end, leaves)) << begin << " " << end << " of " << leaves;
      }
    }
  }
}

TEST(TreeAccumulator, LeavesInOrderHoldLogarithmicallyManyPartials) {
  TreeAccumulator tree(1000);
  std::int64_t peak = 0;
  for (std::int64_t i = 0; i < 1000; ++i) {
    tree.add({0, i}, {at::ones({1})});
    peak = std::max(peak, tree.num_bytes() / 4);
  }
  EXPECT_EQ(tree.take_root().front().item<float>(), 1000.0F);
  EXPECT_LE(peak, 10);
}

TEST(TreeAccumulator, AddsPieceByPieceAndInPlace) {
  TreeAccumulator tree(2);
  const at::Tensor left = at::ones({3});
  tree.add({0, 1}, {at::full({3}, 2.0F), at::full({2}, 5.0F)});
  EXPECT_EQ(tree.num_bytes(), 20);
  tree.add({0, 0}, {left, at::ones({2})});
  const Pieces root = tree.take_root();
  EXPECT_TRUE(root[0].is_same(left));
  EXPECT_TRUE(at::equal(root[0], at::full({3}, 3.0F)));
  EXPECT_TRUE(at::equal(root[1], at::full({2}, 6.0F)));
}

TEST(TreeAccumulator, RefusesWhatIsNoPartOfTheTree) {
  TreeAccumulator tree(5);
  EXPECT_THROW(tree.add({0, 5}, {at::ones({1})}), Error);
  EXPECT_THROW(tree.add({4, 0}, {at::ones({1})}), Error);
  EXPECT_THROW(tree.add({0, -1}, {at::ones({1})}), Error);
  tree.add({0, 2}, {at::ones({1})});
  EXPECT_THROW(tree.add({0, 2}, {at::ones({1})}), Error);
  EXPECT_THROW(tree.take_root(), Error);
}

TEST(RoundSchedule, EveryMicroBatchIsDealtOnceUnderEveryPlanAndGrid) {
  int num_checked = 0;
  for (const ShardingPlan& plan : sharding_plans()) {
    for (const int shards : {1, 2, 3, 4, 7}) {
      for (const int replicas : {1, 2, 3}) {
        for (const std::int64_t v : {1, 2, 3, 5, 7, 8, 12}) {
          const RoundSchedule schedule(plan, {shards, replicas}, v);
          const int ranks = shards * replicas;
          EXPECT_EQ(schedule.num_rounds(), (v + ranks - 1) / ranks);
          std::multiset<std::int64_t> dealt;
          for (int rank = 0; rank < ranks; ++rank) {
            const auto [begin, end] = schedule.range_of_replica(rank % replicas);
            for (std::int64_t round = 0; round < schedule.num_rounds(); ++round) {
              const std::int64_t index = schedule.micro_batch(rank, round);
              if (index < 0) continue;
              EXPECT_TRUE(begin <= index && index < end);
              dealt.insert(index);
            }
          }
          EXPECT_EQ(dealt.size(), static_cast<std::size_t>(v));
          for (std::int64_t i = 0; i < v; ++i) EXPECT_EQ(dealt.count(i), 1U);
          ++num_checked;
        }
      }
    }
  }
  EXPECT_EQ(num_checked, 5 * 5 * 3 * 7);
}

std::string message_of_plan(const char* name) {
  return error_of(ErrorKind::config, [&] { find_sharding_plan(name); });
}

TEST(ShardingPlan, TableHoldsFiveRows) {
  EXPECT_EQ(sharding_plans().size(), 5U);
  for (const char* name : {"ddp", "zero1", "zero2", "zero3", "hsdp"}) EXPECT_EQ(find_sharding_plan(name).name, name);
}

TEST(ShardingPlan, SettingsThatThePlanCannotHonourAreRefusedByName) {
  EXPECT_FALSE(resolve_sharding_plan({.name = "zero3", .reshard_after_forward = false}).reshard_after_forward);
  EXPECT_TRUE(resolve_sharding_plan({.name = "hsdp", .hsdp_shard_size = 4}).reshard_after_forward);
  EXPECT_NE(error_of(ErrorKind::config, [] {
              resolve_sharding_plan({.name = "zero2", .reshard_after_forward = false});
            }).find("--reshard_after_forward = false: zero2 never frees"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::config, [] {
              resolve_sharding_plan({.name = "zero3", .hsdp_shard_size = 4});
            }).find("--hsdp_shard_size = 4 needs --sharding hsdp"),
            std::string::npos);
}

TEST(ShardingPlan, SpellingsOfHuggingFaceAreMappedOrRefusedByName) {
  const auto check = [](const char* fsdp, const char* name, std::optional<bool> reshard) {
    const PlanRequest request = plan_from_fsdp(fsdp);
    EXPECT_EQ(request.name, name) << fsdp;
    EXPECT_EQ(request.reshard_after_forward, reshard) << fsdp;
    resolve_sharding_plan(request);
  };
  check("full_shard auto_wrap", "zero3", {});
  check("auto_wrap,full_shard", "zero3", {});
  check("full_shard", "zero3", {});
  check("shard_grad_op auto_wrap", "zero3", false);
  check("no_shard", "ddp", {});
  check("hybrid_shard auto_wrap", "hsdp", {});
  check("hybrid_shard_zero2", "hsdp", false);
  const auto message = [](const char* fsdp) { return error_of(ErrorKind::config, [&] { plan_from_fsdp(fsdp); }); };
  EXPECT_NE(message("full_shard offload").find("offload is not supported"), std::string::npos);
  EXPECT_NE(message("full_shard shard_grad_op").find("contradict"), std::string::npos);
  EXPECT_NE(message("auto_wrap").find("names no strategy"), std::string::npos);
  EXPECT_NE(message("").find("names no strategy"), std::string::npos);
  EXPECT_NE(message("zero3").find("'zero3' is unknown"), std::string::npos);
}

TEST(RankGrid, ReplicasOfAShardAreNeighboursAndShardsStayOnTheNode) {
  run_thread_ranks(6, [](Communicator& world) {
    const RankGrid grid(world, find_sharding_plan("hsdp"), 3);
    EXPECT_EQ(grid.num_shards(), 3);
    EXPECT_EQ(grid.num_replicas(), 2);
    EXPECT_EQ(grid.shard(), world.rank() % 3);
    EXPECT_EQ(grid.replica(), world.rank() / 3);
    EXPECT_EQ(grid.world().rank(), grid.shard() * 2 + grid.replica());
  });
  EXPECT_NE(error_of(ErrorKind::config, [] {
              run_thread_ranks(6, [](Communicator& world) { RankGrid(world, find_sharding_plan("hsdp"), 4); });
            }).find("--hsdp_shard_size = 4 does not divide the 6 ranks"),
            std::string::npos);
}

TEST(RankGrid, TheRanksOfANodeAreCountedOrRefused) {
  const auto size_with = [](const std::vector<std::string>& hosts) {
    std::atomic<int> size = 0;
    run_thread_ranks(static_cast<int>(hosts.size()), [&](Communicator& world) {
      size = ranks_per_node(world, hosts[static_cast<std::size_t>(world.rank())]);
    });
    return size.load();
  };
  EXPECT_EQ(size_with({"a", "a", "b", "b", "c", "c"}), 2);
  EXPECT_EQ(size_with({"a", "a", "a"}), 3);
  EXPECT_EQ(size_with({"a", "b"}), 1);
  EXPECT_NE(error_of(ErrorKind::config, [&] { size_with({"a", "a", "b"}); }).find("rank 2 of host b"), std::string::npos);
  EXPECT_NE(error_of(ErrorKind::config, [&] { size_with({"a", "b", "a", "b"}); }).find("rank 1 of host b"), std::string::npos);
}

TEST(ShardingPlan, UnknownNamesSuggestTheNearest) {
  EXPECT_NE(message_of_plan("zero-3").find("did you mean 'zero3'"), std::string::npos);
  EXPECT_NE(message_of_plan("dpp").find("did you mean 'ddp'"), std::string::npos);
  EXPECT_NE(message_of_plan("fsdp").find("did you mean"), std::string::npos);
}

TEST(WeightDecay, FollowsTheRuleOfHuggingFace) {
  const auto decays = [](const char* name, bool is_norm = false) {
    Parameter parameter;
    parameter.name = name;
    parameter.is_norm = is_norm;
    return has_weight_decay(parameter);
  };
  EXPECT_TRUE(decays("bert.encoder.layer.0.output.dense.weight"));
  EXPECT_FALSE(decays("bert.encoder.layer.0.output.dense.bias"));
  EXPECT_FALSE(decays("bert.encoder.layer.0.output.LayerNorm.weight"));
  EXPECT_FALSE(decays("model.layers.0.input_layernorm.weight"));
  EXPECT_FALSE(decays("model.norm.weight"));
  EXPECT_FALSE(decays("norm.weight"));
  EXPECT_FALSE(decays("model.layers.0.self_attn.q_norm.weight"));
  EXPECT_FALSE(decays("model.ln_f.weight", /*is_norm=*/true));
  EXPECT_TRUE(decays("model.normalizer.weight"));
  EXPECT_TRUE(decays("model.abnorm.weight"));
  EXPECT_TRUE(decays("score.weight"));
}

TEST(GradientNorm, SumsOfSquaresAreExactToDoubleRounding) {
  const at::Tensor values = random_tensor(5, 1003);
  const double wanted = values.to(at::kDouble).square().sum().item<double>();
  EXPECT_NEAR(sum_of_squares(values.const_data_ptr<float>(), values.numel()), wanted, 1e-12 * wanted);
  EXPECT_EQ(sum_of_squares(nullptr, 0), 0.0);
}

TEST(GradientNorm, SquaresAreAddedInEightInterleavedSums) {
  const at::Tensor tensor = random_tensor(6, 1003);
  const auto* values = tensor.const_data_ptr<float>();
  for (const std::int64_t count : {1, 7, 8, 9, 256, 1003}) {
    double sums[8] = {};
    for (std::int64_t i = 0; i < count; ++i) sums[i % 8] += double{values[i]} * double{values[i]};
    const double left = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    EXPECT_EQ(sum_of_squares(values, count), left + ((sums[4] + sums[5]) + (sums[6] + sums[7]))) << count;
  }
}

// Parameters of one block, of many and of none on this rank; more elements than one thread takes.
TEST(GradientNorm, HasTheSameBitsForAnyNumberOfThreads) {
  const int threads_before = at::get_num_threads();
  double wanted = 0.0;
  for (const int ranks : {1, 3}) {
    for (const int threads : {1, 2, 3}) {
      run_thread_ranks(ranks, [&](Communicator& world) {
        at::set_num_threads(threads);
        const RankGrid grid(world, find_sharding_plan("zero1"), 0);
        std::deque<Parameter> sources;
        std::deque<ShardedParameter> parameters;
        std::vector<ShardedParameter*> pointers;
        for (const std::int64_t numel : {3, 700001, 256, 1200000, 5}) {
          sources.emplace_back().shape = {numel};
          ShardedParameter& p = parameters.emplace_back(sources.back(), grid);
          p.master_offset = p.slice_offset();
          p.gradient =
              random_tensor(static_cast<std::uint64_t>(numel), numel).narrow(0, p.slice_offset(), p.slice_numel());
          pointers.push_back(&p);
        }
        const double norm = gradient_norm(world, pointers);
        if (world.rank() != 0) return;
        if (wanted == 0.0) wanted = norm;
        EXPECT_EQ(norm, wanted) << ranks << " ranks, " << threads << " threads";
      });
    }
  }
  EXPECT_NEAR(wanted, std::sqrt(1900265.0), 0.01 * wanted);
  at::set_num_threads(threads_before);
}

TEST(GradientNorm, TreeSumIsPairwise) {
  EXPECT_EQ(tree_sum({}), 0.0);
  EXPECT_EQ(tree_sum({3.0}), 3.0);
  // 1e16 swallows a lone 1: ((1e16 + 1) + (1 + 1)) + 1 in pairs, not from left to right.
  EXPECT_EQ(tree_sum({1e16, 1.0, 1.0, 1.0, 1.0}), ((1e16 + 1.0) + (1.0 + 1.0)) + 1.0);
  EXPECT_NE(tree_sum({1e16, 1.0, 1.0, 1.0, 1.0}), 1e16);
}

TEST(GradientNorm, ClipFactorIsThatOfTorch) {
  EXPECT_EQ(clip_factor(0.5, 1.0), 1.0);
  EXPECT_DOUBLE_EQ(clip_factor(4.0, 1.0), 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(clip_factor(4.0, 0.0), 1.0);
}

TEST(PackedPieces, AreCopiedAsIfTheyWereOneTensor) {
  const at::Tensor whole = at::arange(20, at::kFloat);
  const Pieces pieces = {whole.narrow(0, 0, 7), whole.narrow(0, 7, 0), whole.narrow(0, 7, 1), whole.narrow(0, 8, 12)};
  EXPECT_EQ(num_elements(pieces), 20);
  for (std::int64_t begin = 0; begin <= 20; ++begin) {
    for (std::int64_t end = begin; end <= 20; ++end) {
      const at::Tensor out = at::full({end - begin}, -1.0F);
      copy_out(pieces, begin, out);
      EXPECT_TRUE(at::equal(out, at::arange(begin, end, at::kFloat)));
    }
  }
  copy_in(pieces, 5, at::full({4}, -1, at::kBFloat16));
  EXPECT_EQ(whole.lt(0).nonzero().numel(), 4);
  EXPECT_EQ(whole.narrow(0, 5, 4).sum().item<float>(), -4.0F);
}

TEST(PackedPieces, ChunksCoverEveryRanksPartOnce) {
  const std::vector<std::int64_t> counts = {10, 0, 3, 7};
  std::vector<std::int64_t> total(4, 0);
  ASSERT_EQ(num_chunks(counts, 4), 3);
  for (std::int64_t chunk = 0; chunk < 3; ++chunk) {
    const std::vector<std::int64_t> in_chunk = counts_of_chunk(counts, chunk, 4);
    for (std::size_t rank = 0; rank < 4; ++rank) {
      EXPECT_LE(in_chunk[rank], 4);
      total[rank] += in_chunk[rank];
    }
  }
  EXPECT_EQ(total, counts);
  EXPECT_EQ(num_chunks({0, 0}, 4), 1);
}

}  // namespace
}  // namespace shardtune
