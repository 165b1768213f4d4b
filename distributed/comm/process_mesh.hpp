#pragma once
// Named axes of ranks, each with its sub-communicator. A size-1 axis is a Self communicator.
#include <memory>
#include <string>
#include <vector>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

class ProcessMesh {
 public:
  struct Axis {
    std::string name;  // "dp_replicate", "dp_shard"
    int size;
  };
  // Collective over `world`. The product of sizes must equal world.size() (Error{config} naming axes and sizes).
  // The last axis varies fastest over ranks. `world` must outlive the mesh.
  ProcessMesh(Communicator& world, std::vector<Axis> axes);

  Communicator& world() const noexcept { return world_; }
  Communicator& axis(const std::string& name) const;  // Error{internal} for an unknown name
  int axis_size(const std::string& name) const;

 private:
  Communicator& world_;
  std::vector<Axis> axes_;
  std::vector<std::unique_ptr<Communicator>> communicators_;  // one per axis
};

}  // namespace shardtune
