// The program that users start. It settles what libraries read while they are loaded, then becomes the real program
// (libexec/shardtune beside it). It links nothing but libc, so it costs a millisecond.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include <sched.h>
#include <unistd.h>

namespace {

// Omni-Path, InfiniPath, InfiniBand and EFA, Slingshot: whatever is not Ethernet or shared memory.
bool has_fabric() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/dev", error)) {
    const std::string name = entry.path().filename().string();
    for (const char* device : {"hfi1", "ipath", "infiniband", "cxi"})
      if (name.starts_with(device)) return true;
  }
  return static_cast<bool>(error);
}

// How OpenMP threads wait for work. libgomp's default, spinning for milliseconds, takes the core from whoever has work (a second
// rank, a compiler): nine times slower measured. Going to sleep at once costs a fifth of a step of a small model, which has hundreds
// of waits. So: a short spin, half a millisecond at most, where the threads of all ranks on this node fit its cores; sleep elsewhere.
// libgomp reads this in its initialiser, before main() of whoever links it. A user's own choice stays.
void settle_waiting() {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  const int own_cores = ::sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask) : 0;
  const auto number = [](const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::strtol(text, nullptr, 10);
  };
  // Without OMP_NUM_THREADS the program shares the cores out: its threads fit.
  const long ranks = number("OMPI_COMM_WORLD_LOCAL_SIZE", 1), threads = number("OMP_NUM_THREADS", 1);
  const bool fits = threads <= own_cores && ranks * threads <= ::sysconf(_SC_NPROCESSORS_ONLN);
  if (fits)
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
  settle_waiting();
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
