#pragma once
// A parallel strategy is a row in a table (the idea of ZeRO's stages and FSDP's HYBRID_SHARD as one scheme).
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace shardtune {

enum class MeshAxis { self, world, node, across_nodes };

struct ShardingPlan {
  std::string_view name;         // "ddp", "zero1", "zero2", "zero3", "hsdp"
  MeshAxis shard_axis;           // master weights and optimizer state are cut over this axis
  MeshAxis replicate_axis;       // gradients are also summed over this axis, masters are the same along it
  bool reshard_after_forward;    // compute copies are freed between a unit's forward and its backward
  bool reshard_after_backward;   // compute copies exist only within a micro-batch (of the root: within a step)
  bool reduce_every_microbatch;  // gradients leave the rank after every micro-batch, as shard-sized partial sums

  // True: a rank without a micro-batch in a round still runs one, because its collectives are the others'.
  bool runs_every_round() const noexcept { return reshard_after_backward || reduce_every_microbatch; }
};

// What a user asks for. Names are those of the table.
struct PlanRequest {
  std::string name = "ddp";
  std::optional<bool> reshard_after_forward =
      {};                   // zero3 and hsdp only; false keeps weights until the backward is done
  int hsdp_shard_size = 0;  // hsdp only: ranks that share one copy; 0 = the ranks of a node
};

std::span<const ShardingPlan> sharding_plans();
// Error{config} for an unknown name, with the nearest suggested.
const ShardingPlan& find_sharding_plan(std::string_view name);
// The row, adapted. Error{config} for a setting that the plan cannot honour.
ShardingPlan resolve_sharding_plan(const PlanRequest& request);

// Hugging Face's --fsdp ("full_shard auto_wrap", ...) as a request. auto_wrap, and its transformer layer classes, are
// how models are always cut here, so it is accepted and changes nothing. Error{config} for what has no counterpart.
PlanRequest plan_from_fsdp(std::string_view fsdp);

}  // namespace shardtune
