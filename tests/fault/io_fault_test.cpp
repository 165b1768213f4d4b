// Every system call that a save changes files with fails once, in every way: the save fails with one clear message or
// not at all, older checkpoints stay whole, and the next save works. SHARDTUNE_FAULT_STRIDE takes every n-th call only
// (1).
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include <dlfcn.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"
#include "tests/fault/io_record.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;

struct Fault {
  const char* name;
  int error;  // 0: a short write
};
constexpr Fault kFaults[] = {{"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EINTR", EINTR}, {"EDQUOT", EDQUOT}, {"short", 0}};

const std::vector<TestTensor> kTensors = test_tensors(1);

template <class Function>
Function* shim_function(const char* name) {
  auto* function = reinterpret_cast<Function*>(::dlsym(RTLD_DEFAULT, name));
  if (function == nullptr) throw std::runtime_error("run this test with LD_PRELOAD=io_shim.so, as ctest does");
  return function;
}

// Empty, or what every one of the two ranks said of the failed save.
std::string save(const fs::path& out, std::int64_t step, int ranks_per_file) {
  std::mutex mutex;
  std::multiset<std::string> said;
  run_thread_ranks(2, [&](Communicator& comm) {
    CheckpointStore store(out, comm, std::size_t{1} << 30, ranks_per_file);
    std::string mine;
    try {
      store.save(step, expected_state(kTensors, step, comm.rank(), comm.size()));
    } catch (const Error& e) {
      if (e.kind() == ErrorKind::comm || e.kind() == ErrorKind::internal) throw;
      mine = e.what();
    }
    const std::lock_guard lock(mutex);
    said.insert(mine);
  });
  EXPECT_EQ(said.count(*said.begin()), 2u);
  return *said.begin();
}

void expect_whole(const fs::path& out, const std::vector<std::int64_t>& steps) {
  const auto comm = make_self_communicator();
  std::vector<std::int64_t> seen;
  for (const CheckpointInfo& info : list_checkpoints(out)) {
    seen.insert(seen.begin(), info.step);
    EXPECT_EQ(info.problem, "");
    EXPECT_TRUE(verify_checkpoint(info.directory).empty());
    StateView view = blank_state(kTensors, 0, 1);
    CheckpointStore(out, *comm).load(info.directory, view);
    EXPECT_EQ(difference(view, kTensors, info.step, 0, 1), "");
  }
  EXPECT_EQ(seen, steps);
  for (const auto& entry : fs::recursive_directory_iterator(out)) {
    EXPECT_NE(entry.path().extension(), ".partial") << entry.path();
    if (entry.path().parent_path() != out) {
      EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
    }
  }
}

// Checkpoint 1 is there, the save of checkpoint 2 meets the fault at its k-th call, 3 is saved after it. Returns false
// when the save has fewer calls.
bool try_fault(const fs::path& out, const Fault& fault, long k, int ranks_per_file,
               std::map<std::string, std::map<std::string, int>>& ends) {
  shim_function<IoShimArm>("io_shim_arm")(out.c_str(), k, fault.error);
  const std::string said = save(out, 2, ranks_per_file);
  char failed[4096];
  const long num_calls = shim_function<IoShimDisarm>("io_shim_disarm")(failed, sizeof(failed));
  const std::string injected = failed;
  SCOPED_TRACE(fmt::format("{} at call {}: {}", fault.name, k, injected));
  if (injected.empty()) {
    EXPECT_EQ(said, "");
  }
  if (!said.empty()) {
    EXPECT_TRUE(said.starts_with("saving checkpoint-2 failed on rank ")) << said;
    EXPECT_NE(said.find(std::strerror(fault.error)), std::string::npos) << said;
  }
  expect_whole(out, said.empty() ? std::vector<std::int64_t>{1, 2} : std::vector<std::int64_t>{1});
  EXPECT_EQ(save(out, 3, ranks_per_file), "");
  expect_whole(out, said.empty() ? std::vector<std::int64_t>{1, 2, 3} : std::vector<std::int64_t>{1, 3});
  if (!injected.empty()) ++ends[injected.substr(0, injected.find(' '))][said.empty() ? "went on" : "save failed"];
  fs::remove_all(out / "checkpoint-2");
  fs::remove_all(out / "checkpoint-3");
  return num_calls >= k;
}

void try_every_call(int ranks_per_file) {
  const char* wanted = std::getenv("SHARDTUNE_FAULT_STRIDE");
  const long stride = wanted != nullptr ? std::atol(wanted) : 1;
  TempDir dir;
  const fs::path out = dir / "out";
  ASSERT_EQ(save(out, 1, ranks_per_file), "");
  std::map<std::string, std::map<std::string, int>> ends;  // call -> how the save ended
  for (const Fault& fault : kFaults)
    for (long k = 1; try_fault(out, fault, k, ranks_per_file, ends); k += stride)
      if (testing::Test::HasFailure()) return;
  int num_faults = 0;
  for (const auto& [call, counts] : ends)
    for (const auto& [end, count] : counts)
      std::printf("  %-10s %-12s %d\n", call.c_str(), end.c_str(), count), num_faults += count;
  std::printf("  %d faults\n", num_faults);
  EXPECT_GT(num_faults * stride, 300);
  for (const char* call : {"open", "pwrite", "write", "fsync", "rename", "ftruncate", "mkdir"})
    EXPECT_TRUE(ends.contains(call)) << call;
  EXPECT_GT(ends["pwrite"]["went on"], 0);  // a write that is cut short or interrupted is continued
  EXPECT_GT(ends["fsync"]["save failed"], 0);
}

TEST(IoFaults, EveryCallOfASaveMayFailOnce) { try_every_call(1); }
TEST(IoFaults, EveryCallOfASaveIntoOneSharedFileMayFailOnce) { try_every_call(2); }

}  // namespace
}  // namespace shardtune
