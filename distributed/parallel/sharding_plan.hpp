#pragma once
// A parallel strategy is a row in a table (the idea of ZeRO's stages and FSDP's HYBRID_SHARD as one scheme).
#include <span>
#include <string>
#include <string_view>

namespace shardtune {

enum class MeshAxis { self, world, node, across_nodes };

struct ShardingPlan {
  std::string_view name;         // "ddp", "zero1", "zero2", "zero3", "hsdp"
  MeshAxis shard_axis;           // master weights and optimizer state are cut over this axis
  MeshAxis replicate_axis;       // gradients are also summed over this axis
  bool reshard_after_forward;    // compute copies are freed between uses
  bool reduce_every_microbatch;  // gradients leave the rank after every micro-batch, as shard-sized partial sums
  bool is_available;             // false: in the table, refused by name until it is implemented
};

std::span<const ShardingPlan> sharding_plans();
// Error{config} for an unknown name (nearest suggested) or one that is not available yet.
const ShardingPlan& find_sharding_plan(std::string_view name);

}  // namespace shardtune
