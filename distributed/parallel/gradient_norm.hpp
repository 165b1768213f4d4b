#pragma once
// The global L2 norm of the gradients with the same bits for any number of ranks: squares are summed in double inside
// the blocks of block_layout.hpp in a fixed order, over the blocks of a parameter in a fixed binary tree, and over the
// parameters in order.
#include <cstdint>
#include <span>
#include <vector>

#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/sharded_parameter.hpp"

namespace shardtune {

// Pairwise: neighbours are added until one value is left; an odd last one moves up. 0 for no values.
double tree_sum(std::vector<double> values) noexcept;

// Collective; all ranks get the same bits. Every parameter must have its gradient (ShardedParameter::gradient).
// Infinite or NaN when a gradient is. Blocks are shared out over ATen's threads.
double gradient_norm(Communicator& world, std::span<ShardedParameter* const> parameters);

// torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)); max_norm <= 0 means no clipping (factor 1).
// Not meant for a norm that is not finite.
double clip_factor(double norm, double max_norm) noexcept;

}  // namespace shardtune
