#pragma once
// Which units keep their activations for the backward pass and which are computed again. Never changes a bit of the
// result, and no collective depends on it: each rank may decide for itself.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace shardtune {

// full: only the inputs of a unit are kept. selective: also what its kernels keep, see kernels/recompute_context.hpp.
enum class RecomputeMode { none, full, selective };

struct RecomputeOptions {
  RecomputeMode mode = RecomputeMode::none;
  std::int64_t every = 1;         // units 0, every, 2 * every, ... are recomputed, the others are not
  std::int64_t budget_bytes = 0;  // > 0: keep as much as fits, unit by unit; mode and every have no say
};

// Not thread-safe.
class RecomputePolicy {
 public:
  explicit RecomputePolicy(const RecomputeOptions& options);

  void begin_micro_batch() noexcept { used_bytes_ = 0; }
  // May be asked before the sizes are known: whether the unit's kernels might have to keep something.
  bool may_be_selective() const noexcept {
    return options_.mode == RecomputeMode::selective || options_.budget_bytes > 0;
  }
  // Once per unit and micro-batch, in execution order. input_bytes: of the unit's inputs, to which activations are in
  // proportion. Error{internal} for a budget without the counter of core/memory.hpp, which it measures with.
  RecomputeMode choose(std::size_t unit, std::int64_t input_bytes);
  // With a budget every unit is recomputed selectively until this has been told of it: what its activations take when
  // they are kept, and what its kernels keep.
  bool wants_measurement(std::size_t unit) const noexcept;
  void measured(std::size_t unit, std::int64_t input_bytes, std::int64_t all_bytes, std::int64_t selective_bytes);

 private:
  struct Sizes {  // per byte of input; negative: not known
    double all = -1.0;
    double selective = 0.0;
  };
  Sizes& sizes(std::size_t unit);

  RecomputeOptions options_;
  std::vector<Sizes> sizes_;
  double used_bytes_ = 0.0;
};

}  // namespace shardtune
