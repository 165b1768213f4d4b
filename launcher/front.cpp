// The program that users start. It settles what libraries read while they are loaded, then becomes the real program
// (libexec/shardtune beside it). It links nothing but libc, so it costs a millisecond.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

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
  // OpenMP threads that wait for work spin by default. With anything else on the same cores (a second rank, the data loader, the
  // communication thread, a compiler) a spinning thread holds the core that the working one needs: nine times slower measured.
  // libgomp reads this in its initialiser, before main() of whoever links it. A user's own choice stays.
  if (std::getenv("GOMP_SPINCOUNT") == nullptr) ::setenv("OMP_WAIT_POLICY", "passive", 0);
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
