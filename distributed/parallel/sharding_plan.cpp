#include "distributed/parallel/sharding_plan.hpp"

#include <algorithm>
#include <array>
#include <numeric>
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
     .reduce_every_microbatch = false,
     .is_available = true},
    {.name = "zero1",
     .shard_axis = world,
     .replicate_axis = self,
     .reshard_after_forward = false,
     .reduce_every_microbatch = false,
     .is_available = false},
    {.name = "zero2",
     .shard_axis = world,
     .replicate_axis = self,
     .reshard_after_forward = false,
     .reduce_every_microbatch = true,
     .is_available = false},
    {.name = "zero3",
     .shard_axis = world,
     .replicate_axis = self,
     .reshard_after_forward = true,
     .reduce_every_microbatch = true,
     .is_available = true},
    {.name = "hsdp",
     .shard_axis = node,
     .replicate_axis = across_nodes,
     .reshard_after_forward = true,
     .reduce_every_microbatch = true,
     .is_available = false},
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
  if (!found->is_available) {
    fail(ErrorKind::config,
         fmt::format("sharding plan '{}' arrives with a later version; use ddp or zero3", found->name));
  }
  return *found;
}

}  // namespace shardtune
