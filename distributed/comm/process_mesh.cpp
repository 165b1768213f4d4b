#include "distributed/comm/process_mesh.hpp"

#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune {

ProcessMesh::ProcessMesh(Communicator& world, std::vector<Axis> axes) : world_(world), axes_(std::move(axes)) {
  std::int64_t product = 1;
  std::string text;
  for (const Axis& axis : axes_) {
    if (axis.size < 1) fail(ErrorKind::config, fmt::format("mesh axis {} has size {}", axis.name, axis.size));
    for (const Axis& other : axes_) {
      if (&other != &axis && other.name == axis.name) {
        fail(ErrorKind::config, fmt::format("mesh axis {} is named twice", axis.name));
      }
    }
    product *= axis.size;
    text += fmt::format("{}{} {}", text.empty() ? "" : " x ", axis.name, axis.size);
  }
  if (product != world.size()) {
    fail(ErrorKind::config, fmt::format("the mesh {} needs {} ranks but the job has {}; choose axis sizes whose product is "
                                        "the number of ranks", text.empty() ? "without axes" : text, product, world.size()));
  }
  int stride = world.size();
  for (const Axis& axis : axes_) {
    stride /= axis.size;
    if (axis.size == 1) {
      communicators_.push_back(make_self_communicator());
      continue;
    }
    // Ranks that differ in this axis only form a group: the rank with its coordinate on the axis set to 0 names it.
    const int coordinate = world.rank() / stride % axis.size;
    communicators_.push_back(world.split(world.rank() - coordinate * stride, coordinate));
  }
}

Communicator& ProcessMesh::axis(const std::string& name) const {
  for (std::size_t i = 0; i < axes_.size(); ++i) {
    if (axes_[i].name == name) return *communicators_[i];
  }
  fail(ErrorKind::internal, fmt::format("the mesh has no axis {}", name));
}

int ProcessMesh::axis_size(const std::string& name) const { return axis(name).size(); }

}  // namespace shardtune
