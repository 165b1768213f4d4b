#include "distributed/parallel/sharding_plan.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

using enum MeshAxis;

constexpr std::array<ShardingPlan, 5> kPlans{{
    {.name = "ddp",
     .shard_axis = self,
     .replicate_axis = world,
     .reshard_after_forward = false,
     .reshard_after_backward = false,
     .reduce_every_microbatch = false},
    {.name = "zero1",
     .shard_axis = world,
     .replicate_axis = self,
     .reshard_after_forward = false,
     .reshard_after_backward = false,
     .reduce_every_microbatch = false},
    {.name = "zero2",
     .shard_axis = world,
     .replicate_axis = self,
     .reshard_after_forward = false,
     .reshard_after_backward = false,
     .reduce_every_microbatch = true},
    {.name = "zero3",
     .shard_axis = world,
     .replicate_axis = self,
     .reshard_after_forward = true,
     .reshard_after_backward = true,
     .reduce_every_microbatch = true},
    {.name = "hsdp",
     .shard_axis = node,
     .replicate_axis = across_nodes,
     .reshard_after_forward = true,
     .reshard_after_backward = true,
     .reduce_every_microbatch = true},
}};

// Levenshtein distance; names are a handful of characters.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, substituted}));
    }
  }
  return row.back();
}

std::vector<std::string> words_of(std::string_view text) {
  std::vector<std::string> words(1);
  for (const char c : text) {
    if (c == ' ' || c == ',') {
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  std::erase(words, "");
  return words;
}

}  // namespace

std::span<const ShardingPlan> sharding_plans() { return kPlans; }

const ShardingPlan& find_sharding_plan(std::string_view name) {
  const auto found = std::find_if(kPlans.begin(), kPlans.end(), [&](const ShardingPlan& p) { return p.name == name; });
  if (found == kPlans.end()) {
    const auto nearest = std::min_element(kPlans.begin(), kPlans.end(), [&](const auto& a, const auto& b) {
      return edit_distance(a.name, name) < edit_distance(b.name, name);
    });
    fail(ErrorKind::config, fmt::format("unknown sharding plan '{}'; did you mean '{}'? Plans: ddp, zero1, zero2, "
                                        "zero3, hsdp",
                                        name, nearest->name));
  }
  return *found;
}

ShardingPlan resolve_sharding_plan(const PlanRequest& request) {
  ShardingPlan plan = find_sharding_plan(request.name);
  if (request.hsdp_shard_size != 0 && plan.shard_axis != node) {
    fail(ErrorKind::config, fmt::format("--hsdp_shard_size = {} needs --sharding hsdp, but the plan is {}; choose hsdp "
                                        "or leave the option out",
                                        request.hsdp_shard_size, plan.name));
  }
  if (!request.reshard_after_forward) return plan;
  if (!plan.reshard_after_backward) {
    fail(ErrorKind::config, fmt::format("--reshard_after_forward = {}: {} never frees weights; use zero3 or hsdp, or "
                                        "leave the option out",
                                        *request.reshard_after_forward, plan.name));
  }
  plan.reshard_after_forward = *request.reshard_after_forward;
  return plan;
}

PlanRequest plan_from_fsdp(std::string_view fsdp) {
  struct Row {
    std::string_view word;
    PlanRequest request;
  };
  // shard_grad_op and hybrid_shard_zero2 keep the weights between forward and backward and shard them otherwise.
  const std::array<Row, 5> rows{{{"full_shard", {.name = "zero3"}},
                                 {"shard_grad_op", {.name = "zero3", .reshard_after_forward = false}},
                                 {"no_shard", {.name = "ddp"}},
                                 {"hybrid_shard", {.name = "hsdp"}},
                                 {"hybrid_shard_zero2", {.name = "hsdp", .reshard_after_forward = false}}}};
  const Row* chosen = nullptr;
  for (const std::string& word : words_of(fsdp)) {
    if (word == "auto_wrap") continue;
    if (word == "offload") {
      fail(ErrorKind::config, fmt::format("--fsdp = '{}': offload is not supported; leave it out, zero3 with "
                                          "--gradient_checkpointing needs the least memory",
                                          fsdp));
    }
    const auto* const row = std::find_if(rows.begin(), rows.end(), [&](const Row& r) { return r.word == word; });
    if (row == rows.end()) {
      fail(ErrorKind::config, fmt::format("--fsdp = '{}': '{}' is unknown; use full_shard, shard_grad_op, no_shard, "
                                          "hybrid_shard or hybrid_shard_zero2, with or without auto_wrap",
                                          fsdp, word));
    }
    if (chosen != nullptr && chosen != row) {
      fail(ErrorKind::config, fmt::format("--fsdp = '{}': {} and {} contradict each other; give one strategy", fsdp,
                                          chosen->word, row->word));
    }
    chosen = row;
  }
  if (chosen == nullptr) {
    fail(ErrorKind::config, fmt::format("--fsdp = '{}' names no strategy; use full_shard, shard_grad_op, no_shard, "
                                        "hybrid_shard or hybrid_shard_zero2",
                                        fsdp));
  }
  return chosen->request;
}

}  // namespace shardtune
