// Each case runs in a child of its own: what it sets holds for a whole process.
#include "core/huge_pages.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>

#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace shardtune {
namespace {

int exit_code_of(const std::function<int()>& run) {
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(run());
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool are_huge_pages_forbidden() { return ::prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1; }

// KiB of the heap that are in huge pages.
long huge_heap() {
  std::ifstream maps("/proc/self/smaps");
  bool is_heap = false;
  long sum = 0;
  for (std::string line; std::getline(maps, line);) {
    const std::string first = line.substr(0, line.find(' '));
    if (first.find('-') != std::string::npos) is_heap = line.ends_with("[heap]");
    if (is_heap && first == "AnonHugePages:") sum += std::atol(line.c_str() + first.size());
  }
  return sum;
}

// Memory of the heap itself, with huge pages asked for as the program's malloc does, and touched.
char* touched_heap(std::size_t size) {
  ::mallopt(M_MMAP_MAX, 0);
  auto* const memory = static_cast<char*>(std::aligned_alloc(2 << 20, size));
  ::madvise(memory, size, MADV_HUGEPAGE);
  for (std::size_t i = 0; i < size; ++i) memory[i] = static_cast<char>(i * 7);
  return memory;
}

bool is_as_written(const char* memory, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i)
    if (memory[i] != static_cast<char>(i * 7)) return false;
  return true;
}

constexpr std::size_t kSize = 32 << 20;

bool can_have_huge_pages() {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE
  return exit_code_of([] {
           char* memory = touched_heap(kSize);
           return huge_heap() > 0 && ::madvise(memory, 2 << 20, kCollapse) == 0 ? 0 : 1;
         }) == 0;
}

TEST(HugePages, ComeOnceTheFirstStepIsDoneAndKeepWhatIsInMemory) {
  if (!can_have_huge_pages()) GTEST_SKIP() << "this system gives no huge pages, or not at once";
  EXPECT_EQ(exit_code_of([] {
              postpone_huge_pages();
              if (!are_huge_pages_forbidden()) return 1;
              const char* memory = touched_heap(kSize);
              if (huge_heap() != 0) return 2;
              if (!adopt_huge_pages() || adopt_huge_pages()) return 6;
              if (are_huge_pages_forbidden()) return 3;
              if (huge_heap() < static_cast<long>(kSize / 2048))
                return 4;  // half of them: a kernel may lack some at the moment
              return is_as_written(memory, kSize) ? 0 : 5;
            }),
            0);
}

TEST(HugePages, WhoHasForbiddenThemKeepsThat) {
  EXPECT_EQ(exit_code_of([] {
              if (::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0) return 1;
              postpone_huge_pages();
              return !adopt_huge_pages() && are_huge_pages_forbidden() ? 0 : 2;
            }),
            0);
}

TEST(HugePages, ThePostponementOutlivesExec) {
  if (!can_have_huge_pages()) GTEST_SKIP() << "this system gives no huge pages, or not at once";
  EXPECT_EQ(
      exit_code_of([] {
        postpone_huge_pages();
        ::execl("/bin/sh", "sh", "-c",
                "grep -q 'THP_enabled:[[:space:]]*0' /proc/self/status && test \"$SHARDTUNE_HUGE_PAGES_POSTPONED\" = 1",
                nullptr);
        return 1;
      }),
      0);
}

}  // namespace
}  // namespace shardtune
