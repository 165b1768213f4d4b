// Every system call that a save changes files with fails once, in every way: the save fails with one clear message or
// not at all, older checkpoints stay whole, and the next save works. SHARDTUNE_FAULT_STRIDE takes every n-th call only
// (1, of the longer ways 5).
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
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

// How a save goes to the disk; all that it changes lies below `root`.
struct Way {
  fs::path root;
  int ranks_per_file = 1;
  bool is_compressed = false, is_local = false;
  bool has_abandoned = false;  // a checkpoint of the step that is saved is there, of a run that was resumed further back

  fs::path out() const { return root / "out"; }
  std::unique_ptr<CheckpointStore> store(Communicator& comm) const {
    auto store = std::make_unique<CheckpointStore>(out(), comm, std::size_t{1} << 30, ranks_per_file,
                                                   is_local ? root / "local" : fs::path());
    store->set_compression(is_compressed);
    return store;
  }
};

// Empty, or what every one of the two ranks said of the failed save.
std::string save(const Way& way, std::int64_t step) {
  std::mutex mutex;
  std::multiset<std::string> said;
  run_thread_ranks(2, [&](Communicator& comm) {
    const auto store = way.store(comm);
    std::string mine;
    try {
      store->save(step, expected_state(kTensors, step, comm.rank(), comm.size()));
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

// What a job that starts now takes: what is committed, or what lies whole on the local disk and is drained then.
std::int64_t resume(const Way& way) {
  std::int64_t step = 0;
  run_thread_ranks(2, [&](Communicator& comm) {
    const auto store = way.store(comm);
    StateView view = blank_state(kTensors, comm.rank(), comm.size());
    const auto found = store->load(store->newest_usable(), view).at("step").get<std::int64_t>();
    EXPECT_EQ(difference(view, kTensors, found, comm.rank(), comm.size()), "");
    if (comm.rank() == 0) step = found;
  });
  return step;
}

// What must not be missed: whoever goes on after one of these fails has a checkpoint that may not be there after a loss
// of power. Writes are cut short or interrupted without harm; after a sync nobody relies on what close() says; where names
// cannot be exchanged they are changed one after the other.
bool must_be_reported(const std::string& call, int error) {
  if (call == "write" || call == "pwrite") return error != 0 && error != EINTR;
  return error != 0 && !call.empty() && call != "close" && call != "renameat2" && call != "unlink" && call != "unlinkat" && call != "rmdir" && call != "remove";
}

std::string failed_so_far() {
  char failed[4096];
  shim_function<IoShimFailed>("io_shim_failed")(failed, sizeof(failed));
  return failed;
}

constexpr const char* kMark = "of the abandoned run";

void make_abandoned(const Way& way) {
  ASSERT_EQ(save(way, 2), "");
  std::ofstream(way.out() / "checkpoint-2" / kMark) << "x";
}

// It stands aside, whole, when the save has worked, else where it was.
void expect_abandoned(const Way& way, bool has_moved) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(way.out()))
    if (entry.is_directory() && fs::exists(entry.path() / kMark)) found.push_back(entry.path());
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].filename(), has_moved ? "checkpoint-2.rejected-test-run" : "checkpoint-2");
  EXPECT_TRUE(verify_checkpoint(found[0]).empty());
  fs::remove_all(found[0]);
}

// Checkpoint 1 is there, the save of checkpoint 2 meets the fault at its k-th call, 3 is saved after it. Returns false
// when the save has fewer calls.
bool try_fault(const Way& way, const Fault& fault, long k, std::map<std::string, std::map<std::string, int>>& ends) {
  const fs::path out = way.out();
  if (way.has_abandoned) make_abandoned(way);
  std::string swallowed;  // what had failed when the save committed all the same
  set_save_phase_hook([&](const char* phase, std::int64_t) {
    if (std::string_view(phase) == "directory_renamed") swallowed = failed_so_far();
  });
  shim_function<IoShimArm>("io_shim_arm")(way.root.c_str(), k, fault.error);
  const std::string said = save(way, 2);
  char failed[4096];
  const long num_calls = shim_function<IoShimDisarm>("io_shim_disarm")(failed, sizeof(failed));
  set_save_phase_hook(nullptr);
  const std::string injected = failed;
  SCOPED_TRACE(fmt::format("{} at call {}: {}", fault.name, k, injected));
  if (injected.empty()) {
    EXPECT_EQ(said, "");
  }
  EXPECT_FALSE(must_be_reported(swallowed.substr(0, swallowed.find(' ')), fault.error)) << "committed in silence";
  if (way.has_abandoned) expect_abandoned(way, said.empty());
  if (!said.empty()) {
    EXPECT_TRUE(said.starts_with("saving checkpoint-2 failed on rank ")) << said;
    EXPECT_NE(said.find(std::strerror(fault.error)), std::string::npos) << said;
    if (fault.error == ENOSPC || fault.error == EDQUOT) {
      EXPECT_NE(said.find("free some space"), std::string::npos) << said;
    }
  }
  expect_whole(out, said.empty() ? std::vector<std::int64_t>{1, 2} : std::vector<std::int64_t>{1});
  // Half of the time the job dies of it instead and is started again.
  bool has_second = said.empty();
  if (way.is_local && k % 2 == 0) has_second = resume(way) == 2;
  EXPECT_TRUE(has_second || !said.empty());
  EXPECT_EQ(save(way, 3), "");
  expect_whole(out, has_second ? std::vector<std::int64_t>{1, 2, 3} : std::vector<std::int64_t>{1, 3});
  if (!injected.empty()) ++ends[injected.substr(0, injected.find(' '))][said.empty() ? "went on" : "save failed"];
  fs::remove_all(out / "checkpoint-2");
  fs::remove_all(out / "checkpoint-3");
  return num_calls >= k;
}

void try_every_call(const std::function<void(Way&)>& choose, long default_stride = 1) {
  const char* wanted = std::getenv("SHARDTUNE_FAULT_STRIDE");
  const long stride = wanted != nullptr ? std::atol(wanted) : default_stride;
  TempDir dir;
  Way way{.root = dir.path()};
  choose(way);
  ASSERT_EQ(save(way, 1), "");
  std::map<std::string, std::map<std::string, int>> ends;  // call -> how the save ended
  for (const Fault& fault : kFaults)
    for (long k = 1; try_fault(way, fault, k, ends); k += stride)
      if (testing::Test::HasFailure()) return;
  int num_faults = 0;
  for (const auto& [call, counts] : ends)
    for (const auto& [end, count] : counts)
      std::printf("  %-10s %-12s %d\n", call.c_str(), end.c_str(), count), num_faults += count;
  std::printf("  %d faults\n", num_faults);
  EXPECT_GT(num_faults * stride, 300);
  for (const char* call : {"open", "pwrite", "write", "fsync", "rename", "ftruncate", "mkdir"})
    EXPECT_TRUE(stride > 1 || ends.contains(call)) << call;
  EXPECT_GT(ends["pwrite"]["went on"], 0);  // a write that is cut short or interrupted is continued
  EXPECT_GT(ends["fsync"]["save failed"], 0);
  EXPECT_TRUE(stride > 1 || ends.contains("close"));
  EXPECT_TRUE(stride > 1 || !way.has_abandoned || ends.contains("renameat2"));
}

TEST(IoFaults, EveryCallOfASaveMayFailOnce) {
  try_every_call([](Way&) {});
}
TEST(IoFaults, EveryCallOfASaveIntoOneSharedFileMayFailOnce) {
  try_every_call([](Way& way) { way.ranks_per_file = 2; });
}
TEST(IoFaults, EveryCallOfASaveOverAnAbandonedCheckpointMayFailOnce) {
  try_every_call([](Way& way) { way.has_abandoned = true; }, 3);
}
TEST(IoFaults, EveryCallOfACompressedSaveMayFailOnce) {
  try_every_call([](Way& way) { way.is_compressed = true; }, 5);
}
TEST(IoFaults, EveryCallOfASaveThroughALocalDiskMayFailOnce) {
  try_every_call([](Way& way) { way.is_local = true; }, 5);
}
TEST(IoFaults, EveryCallOfACompressedSharedSaveThroughALocalDiskMayFailOnce) {
  try_every_call([](Way& way) { way.ranks_per_file = 2, way.is_compressed = true, way.is_local = true; }, 5);
}

}  // namespace
}  // namespace shardtune
