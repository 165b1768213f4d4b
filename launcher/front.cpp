// The program that users start. It settles what libraries read while they are loaded, then becomes the real program
// (libexec/shardtune beside it). It links none of the libraries of that, so it costs a millisecond.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

#include <sched.h>
#include <unistd.h>

#include "core/huge_pages.hpp"
#include "launcher/core_share.hpp"

namespace {

// Omni-Path, InfiniPath, InfiniBand and EFA, Slingshot: whatever is not Ethernet or shared memory.
bool has_fabric() {
  std::error_code error;
  for (std::filesystem::directory_iterator entry("/dev", error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    for (const char* device : {"hfi1", "ipath", "infiniband", "cxi"})
      if (name.starts_with(device)) return true;
  }
  return static_cast<bool>(error);
}

long number_of(const char* text, long otherwise) {
  return text == nullptr ? otherwise : std::strtol(text, nullptr, 10);
}

// Whether `text` begins with the name of the option num_threads, which may be written with dashes.
bool is_num_threads(std::string_view text) {
  constexpr std::string_view name = "num_threads";
  return text.size() >= name.size() && std::equal(name.begin(), name.end(), text.begin(),
                                                  [](char a, char b) { return a == b || (a == '_' && b == '-'); });
}

// What a --config file, of lines or JSON, says of it; 0 for nothing. The program reads it properly and refuses what is
// wrong.
long threads_of_config(const std::filesystem::path& path) {
  constexpr std::uintmax_t kMostBytes = 1 << 20;  // the program takes no more
  std::error_code error;
  // A pipe can be read but once.
  if (!std::filesystem::is_regular_file(path, error) || std::filesystem::file_size(path, error) > kMostBytes) return 0;
  const bool has_comments = path.extension() != ".json";
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const std::size_t comment = line.starts_with('#') ? 0 : std::min(line.find(" #"), line.find("\t#"));
    if (has_comments) line.resize(std::min(comment, line.size()));
    for (std::size_t at = line.find("num"); at != std::string::npos; at = line.find("num", at + 1)) {
      if (at > 0 && std::string_view(" \t\"'{,").find(line[at - 1]) == std::string_view::npos) continue;
      const std::size_t value = line.find_first_not_of(" \t\"'=:", at + std::strlen("num_threads"));
      if (is_num_threads(std::string_view(line).substr(at)) && value != std::string::npos)
        return number_of(line.c_str() + value, 0);
    }
  }
  return 0;
}

// Threads of each rank that the user has asked for; 0 where the program will share out the cores, so that they fit. The
// command line wins over the file; where they name no number, the variable counts.
long wanted_threads(char** argv) {
  std::optional<long> given;
  long configured = 0;
  for (char** argument = argv; *argument != nullptr; ++argument) {
    std::string_view text = *argument;
    if (!text.starts_with("--")) continue;
    text.remove_prefix(2);
    const std::size_t equals = text.find('=');
    const char* const value = equals == std::string_view::npos ? argument[1] : *argument + 2 + equals + 1;
    const std::string_view name = text.substr(0, equals);
    if (is_num_threads(name) && name.size() == std::strlen("num_threads")) given = number_of(value, 0);
    if (name == "config" && value != nullptr) configured = threads_of_config(value);
  }
  const long wanted = given.value_or(configured);
  return wanted > 0 ? wanted : number_of(std::getenv("OMP_NUM_THREADS"), 0);
}

// How OpenMP threads wait for work. libgomp's default, spinning for milliseconds, takes the core from whoever has work
// (a second rank, a compiler): nine times slower measured. Going to sleep at once costs a fifth of a step of a small
// model, which has hundreds of waits. So: a short spin, half a millisecond at most, where the threads of all ranks on
// these cores fit them; sleep elsewhere. libgomp reads this in its initialiser, before main() of whoever links it. A
// user's own choice stays. `threads` as wanted_threads() has it.
void settle_waiting(long threads) {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  const long cores = ::sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask) : 0,
             online = ::sysconf(_SC_NPROCESSORS_ONLN);
  // Ranks on these cores: all of the node's or, where mpirun has bound them, those whose share of the node this is.
  long ranks = number_of(std::getenv("OMPI_COMM_WORLD_LOCAL_SIZE"), 1);
  if (std::getenv("OMPI_MCA_orte_bound_at_launch") != nullptr)
    ranks = std::max(1L, (ranks * cores + online - 1) / online);
  if (threads <= 1 || ranks * threads <= cores)
    ::setenv("GOMP_SPINCOUNT", "10000", 0);
  else
    ::setenv("OMP_WAIT_POLICY", "passive", 0);
}

// Where the system leaves huge pages to those who ask (most distributions), malloc asks. With pages of 4 KiB a matrix product
// waits for address translation: on a virtual machine it is 1.5 to 2 times as fast with huge ones. glibc 2.35 and later read
// this while they start; others ignore it. A user's own choice stays.
void ask_for_huge_pages() {
  const char* set = std::getenv("GLIBC_TUNABLES");
  std::string tunables = set == nullptr ? "" : set;
  if (tunables.find("glibc.malloc.hugetlb") != std::string::npos) return;
  if (!tunables.empty()) tunables += ':';
  ::setenv("GLIBC_TUNABLES", (tunables + "glibc.malloc.hugetlb=1").c_str(), 1);
  if (shardtune::is_free_memory_returned()) shardtune::postpone_huge_pages();
}

// The sums of MKL's fp32 products, where long ones are shared among threads, depend on how many there are, and so on
// how many ranks share the machine. Its strict mode does not; no product measured is slower in it. Only for Intel's
// processors: to MKL others are reproducible with their oldest instructions alone. A user's own choice stays.
void ask_for_same_sums() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel") && __builtin_cpu_supports("avx2")) ::setenv("MKL_CBWR", "AUTO,STRICT", 0);
#endif
}

}  // namespace

int main(int /*argc*/, char** argv) {
  const long threads = wanted_threads(argv);
  if (threads != 1) shardtune::widen_default_binding();  // a single thread is best where it is
  settle_waiting(threads);
  // Open MPI's modules for Omni-Path and InfiniPath wait 0.1 s each for a device at every start, and libfabric loads them too.
  // Without any fabric they have nothing to do. This replaces a value from Open MPI's own files, so it must name ofi as well
  // (Debian's file excludes it).
  if (!has_fabric()) ::setenv("OMPI_MCA_mtl", "^psm,psm2,ofi", 0);
  ask_for_huge_pages();
  ask_for_same_sums();
  std::error_code error;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::string program = (self.parent_path() / "libexec" / "shardtune").string();
  ::execv(program.c_str(), argv);
  std::perror(("shardtune: error (I/O): cannot start " + program + ", which belongs to this installation").c_str());
  return 4;
}
