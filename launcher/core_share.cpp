#include "launcher/core_share.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <utility>

#include <sched.h>
#include <unistd.h>

namespace shardtune {
namespace {

int number_in(const std::string& file, int otherwise) {
  int number = otherwise;
  std::ifstream(file) >> number;
  return number;
}

// Of a process; empty where the system does not tell.
std::vector<Cpu> cpus_of(pid_t process) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  std::vector<Cpu> cpus;
  if (::sched_getaffinity(process, sizeof mask, &mask) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    cpus.push_back({number_in(topology + "physical_package_id", 0), number_in(topology + "core_id", cpu), cpu});
  }
  return cpus;
}

std::size_t count_cores(const std::vector<Cpu>& cpus) {
  std::set<std::pair<int, int>> cores;
  for (const Cpu& cpu : cpus) cores.emplace(cpu.package, cpu.core);
  return cores.size();
}

// Open MPI forwards what the user has said of mapping and binding; each of these decides where ranks run.
bool has_own_binding() {
  for (const char* name : {"OMPI_MCA_hwloc_base_binding_policy", "OMPI_MCA_hwloc_base_cpu_set", "OMPI_MCA_hwloc_base_cpu_list",
                           "OMPI_MCA_rmaps_base_mapping_policy", "OMPI_MCA_rmaps_rank_file_path"})
    if (std::getenv(name) != nullptr) return true;
  return false;
}

}  // namespace

std::vector<int> share_of_cores(std::vector<Cpu> cpus, int place, int num_places) {
  std::sort(cpus.begin(), cpus.end());
  std::vector<std::vector<int>> cores;
  for (std::size_t i = 0; i < cpus.size(); ++i) {
    if (i == 0 || cpus[i].package != cpus[i - 1].package || cpus[i].core != cpus[i - 1].core) cores.emplace_back();
    cores.back().push_back(cpus[i].number);
  }
  const int num_cores = static_cast<int>(cores.size());
  std::vector<int> share;
  if (place < 0 || place >= num_places || num_cores < num_places) return share;
  for (int core = place * num_cores / num_places; core < (place + 1) * num_cores / num_places; ++core)
    share.insert(share.end(), cores[static_cast<std::size_t>(core)].begin(), cores[static_cast<std::size_t>(core)].end());
  return share;
}

void widen_default_binding() {
  const char* place = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  const char* places = std::getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
  if (std::getenv("OMPI_MCA_orte_bound_at_launch") == nullptr || place == nullptr || places == nullptr || has_own_binding()) return;
  // More than two ranks have a socket each, or share one: that is fine.
  if (count_cores(cpus_of(0)) != 1) return;
  // The launcher's daemon on this machine may use what the job may. A script between it and this program is bound itself.
  const std::vector<int> share = share_of_cores(cpus_of(::getppid()), std::atoi(place), std::atoi(places));
  if (share.empty()) return;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  for (const int cpu : share) CPU_SET(cpu, &mask);
  (void)::sched_setaffinity(0, sizeof mask, &mask);
}

}  // namespace shardtune
