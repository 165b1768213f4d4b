// A process that saves checkpoint after checkpoint until it is killed or fails; driven by the fault tests.
//   save_loop DIR NUM_RANKS FIRST_STEP LAST_STEP SCALE [FILE_LIMIT_BYTES [retry]]
//   save_loop DIR NUM_RANKS FIRST_STEP LAST_STEP SCALE continue [KEEP [none|zstd [LOCAL_DIR]]]
// Every phase of a save is one line on standard output, "<phase> <step>", written at once.
// FILE_LIMIT_BYTES limits the size of any file (also of redirected standard error), which makes writes fail as a full
// disk does. With `continue` a failed save is one line on standard error and the loop goes on, as training does. With
// `retry` the limit is lifted after a failure and the same step saved again in the same process. Exit codes are those
// of shardtune::exit_code.
#include <csignal>
#include <cstdio>
#include <string>

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/test_state.hpp"

int main(int argc, char** argv) {
  using namespace shardtune;
  if (argc < 6) return 2;
  const std::string dir = argv[1];
  const int num_ranks = std::stoi(argv[2]);
  const std::int64_t first = std::stoll(argv[3]), last = std::stoll(argv[4]);
  const auto tensors = test_tensors(std::stoll(argv[5]));
  const bool goes_on = argc > 6 && std::string(argv[6]) == "continue";
  const int keep = goes_on ? (argc > 7 ? std::stoi(argv[7]) : 0) : 2;
  if (argc > 6 && !goes_on) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{std::stoul(argv[6]), RLIM_INFINITY};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 2;
  }
  set_save_phase_hook([](const char* phase, std::int64_t step) {
    const std::string line = fmt::format("{} {}\n", phase, step);
    if (::write(STDOUT_FILENO, line.data(), line.size()) < 0) ::_exit(70);
  });
  const auto save_all = [&](Communicator& comm) {
    CheckpointStore store(dir, comm, std::size_t{1} << 30, 1, goes_on && argc > 9 ? argv[9] : "");
    store.set_compression(goes_on && argc > 8 && std::string(argv[8]) == "zstd");
    if (first > 0) store.prepare_resume(first - 1, "loop");
    for (std::int64_t step = first; step <= last; ++step) {
      try {
        store.save(step, expected_state(tensors, step, comm.rank(), comm.size()), {.keep = keep});
      } catch (const Error& e) {
        if (!goes_on || e.kind() == ErrorKind::comm || e.kind() == ErrorKind::internal) throw;
        if (comm.rank() == 0) std::fprintf(stderr, "%s\n", e.what());
      }
    }
  };
  try {
    run_thread_ranks(num_ranks, save_all);
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    if (argc > 7 && !goes_on) {
      const rlimit unlimited{RLIM_INFINITY, RLIM_INFINITY};
      if (::setrlimit(RLIMIT_FSIZE, &unlimited) != 0) return 2;
      run_thread_ranks(num_ranks, save_all);
    }
    return exit_code(e.kind());
  }
  return 0;
}
