#pragma once
// Which cores a rank computes on. Needs none of the program's libraries: the front program calls it before anything
// else is loaded.
#include <compare>
#include <vector>

namespace shardtune {

struct Cpu {
  int package = 0;  // the socket
  int core = 0;     // within the package; hardware threads of one core have the same
  int number = 0;   // the system's
  auto operator<=>(const Cpu&) const = default;
};

// The numbers of the CPUs of rank `place` of `num_places`: whole cores, neighbours together, the same number of cores for
// all but for one; empty where there are fewer cores than places.
std::vector<int> share_of_cores(const std::vector<Cpu>& cpus, int place, int num_places);

// Open MPI binds the ranks of a job of one or two to a core each unless it is told how, whatever the machine has; a
// rank of many threads is then many times as slow. Where nobody has asked for that binding, this process gets its share
// of the launcher's cores instead. Linux; does nothing when in doubt.
void widen_default_binding();

}  // namespace shardtune
