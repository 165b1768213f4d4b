#include "launcher/core_share.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <string>

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

// The numbers of each core's CPUs, neighbours next to each other.
std::vector<std::vector<int>> cores_of(std::vector<Cpu> cpus) {
  std::sort(cpus.begin(), cpus.end());
  std::vector<std::vector<int>> cores;
  for (std::size_t i = 0; i < cpus.size(); ++i) {
    if (i == 0 || cpus[i].package != cpus[i - 1].package || cpus[i].core != cpus[i - 1].core) cores.emplace_back();
    cores.back().push_back(cpus[i].number);
  }
  return cores;
}

// Open MPI forwards what the user has said of binding; each of these decides where ranks run.
bool has_own_binding() {
  for (const char* name : {"hwloc_base_binding_policy", "hwloc_base_bind_to_core", "hwloc_base_bind_to_socket",
                           "hwloc_base_cpu_set", "hwloc_base_cpu_list", "hwloc_base_slot_list", "rmaps_rank_file_path",
                           "orte_rankfile", "rmaps_base_cpus_per_rank", "rmaps_base_cpus_per_proc"})
    if (std::getenv((std::string("OMPI_MCA_") + name).c_str()) != nullptr) return true;
  // A mapping to nodes or slots says nothing of cores; one to smaller things does, and so does a number of cores a
  // rank.
  const char* set = std::getenv("OMPI_MCA_rmaps_base_mapping_policy");
  std::string mapping = set == nullptr ? "" : set;
  for (char& c : mapping) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  const std::string object = mapping.substr(0, mapping.find(':'));
  const bool is_coarse = object.empty() || object == "node" || object == "slot";
  return !is_coarse || mapping.find("pe=") != std::string::npos;
}

bool is_within_core(const std::vector<Cpu>& cpus, const std::vector<int>& core) {
  return !cpus.empty() && std::all_of(cpus.begin(), cpus.end(), [&](const Cpu& cpu) {
    return std::find(core.begin(), core.end(), cpu.number) != core.end();
  });
}

}  // namespace

std::vector<int> share_of_cores(const std::vector<Cpu>& cpus, int place, int num_places) {
  const auto cores = cores_of(cpus);
  const int num_cores = static_cast<int>(cores.size());
  std::vector<int> share;
  if (place < 0 || place >= num_places || num_cores < num_places) return share;
  for (int core = place * num_cores / num_places; core < (place + 1) * num_cores / num_places; ++core) {
    const std::vector<int>& threads = cores[static_cast<std::size_t>(core)];
    share.insert(share.end(), threads.begin(), threads.end());
  }
  return share;
}

void widen_default_binding() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  const char* ranks = std::getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
  const bool is_bound = std::getenv("OMPI_MCA_orte_bound_at_launch") != nullptr;
  if (!is_bound || rank == nullptr || ranks == nullptr || has_own_binding()) return;
  // The launcher's daemon on this machine may use what the job may. A script between it and this program is bound itself.
  const std::vector<Cpu> cpus = cpus_of(::getppid());
  const int place = std::atoi(rank), num_cores = static_cast<int>(cores_of(cpus).size());
  // The default for a job of one or two ranks is core number `place`; anything else is somebody's wish (taskset), or
  // the NUMA node that a rank of a larger job has.
  if (!is_within_core(cpus_of(0), share_of_cores(cpus, place, num_cores))) return;
  const std::vector<int> share = share_of_cores(cpus, place, std::atoi(ranks));
  if (share.empty()) return;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  for (const int cpu : share) CPU_SET(cpu, &mask);
  static_cast<void>(::sched_setaffinity(0, sizeof mask, &mask));  // without it all is as Open MPI has it
}

}  // namespace shardtune
