// The program: parse, start MPI, run a subcommand, and end the whole job honestly when anything fails.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <thread>

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include "core/allocator.hpp"
#include "core/error.hpp"
#include "core/log.hpp"
#include "core/memory.hpp"
#include "distributed/comm/exchange.hpp"
#include "distributed/comm/mpi.hpp"
#include "kernels/instruction_set.hpp"
#include "launcher/command_line.hpp"
#include "launcher/failure_report.hpp"
#include "launcher/offline_commands.hpp"
#include "trainer/commands.hpp"
#include "trainer/stop_signal.hpp"

namespace shardtune {
namespace {

struct Failure {
  int code;
  std::string text;  // "(kind): message"
};

// For use inside a catch block.
Failure describe_current_exception() {
  try {
    throw;
  } catch (const Error& e) {
    std::string text = fmt::format("({}): {}", to_string(e.kind()), e.what());
    if (e.kind() == ErrorKind::internal) text += fmt::format(" [{}:{}; please report this]", e.where().file_name(), e.where().line());
    return {exit_code(e.kind()), text};
  } catch (const std::filesystem::filesystem_error& e) {  // a question about a file that the system would not answer
    return {exit_code(ErrorKind::io), fmt::format("(input/output): {}", e.what())};
  } catch (const std::bad_alloc&) {
    return {exit_code(ErrorKind::internal), "(internal): out of memory; use more ranks with --sharding zero3, smaller batches or --gradient_checkpointing"};
  } catch (const c10::Error& e) {
    return {exit_code(ErrorKind::internal), fmt::format("(internal): {} [please report this]", e.what_without_backtrace())};
  } catch (const std::exception& e) {
    return {exit_code(ErrorKind::internal), fmt::format("(internal): {} [please report this]", e.what())};
  } catch (...) {
    return {exit_code(ErrorKind::internal), "(internal): an exception of unknown type [please report this]"};
  }
}

// One write, so that lines of several processes do not mix.
void print_failure(const std::string& who, const Failure& failure) {
  const std::string line = fmt::format("shardtune: error {}{}\n", failure.text, who);
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, line.data(), line.size());
}

// What many ranks run into alike must be said once. Those of one machine claim the message; other machines hear of it
// by the abort, which ends them while they wait. Rank 0 comes first: its message is the one that people expect.
std::chrono::milliseconds turn_to_speak(int rank) {
  return std::chrono::milliseconds(rank == 0 ? 0 : std::min(700 + 20 * rank, 10'000));
}

int end_job(MpiEnvironment& mpi) {
  const Failure failure = describe_current_exception();
  if (mpi.size() == 1) {
    print_failure("", failure);
    return failure.code;
  }
  remove_stop_handlers();  // another rank's abort reaches this one as SIGTERM
  std::this_thread::sleep_for(turn_to_speak(mpi.rank()));
  // Whoever has said the same aborts the job; should that fail, this rank speaks after all.
  if (!claim_failure_report(job_directory(), failure.text)) std::this_thread::sleep_for(std::chrono::seconds(10));
  print_failure(fmt::format(" [rank {} on {}]", mpi.rank(), mpi.host()), failure);
  mpi.abort(failure.code);
}

// Cores this rank may use, divided among the ranks of its host that may use the very same ones.
int fitting_threads(Communicator& world, const std::string& host) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return 1;
  std::string own = host + ":";
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &mask)) own += fmt::format("{},", cpu);
  const auto all = all_gather_strings(world, own);
  return std::max(1, CPU_COUNT(&mask) / static_cast<int>(std::count(all.begin(), all.end(), own)));
}

void set_threads(const Invocation& invocation, Communicator& world, const std::string& host) {
  const int fitting = fitting_threads(world, host), option = static_cast<int>(invocation.run.train.num_threads);
  // LibTorch takes the variable, too, but no more than MKL thinks fit. A list is of nested regions, which there are
  // none of.
  const char* const variable = std::getenv("OMP_NUM_THREADS");
  const long wanted = option > 0 || variable == nullptr ? option : std::strtol(variable, nullptr, 10);
  if (wanted > kMostThreads)
    fail(ErrorKind::config, fmt::format("OMP_NUM_THREADS = {}: at most {} are possible", variable, kMostThreads));
  at::set_num_threads(wanted > 0 ? static_cast<int>(wanted) : fitting);
  if (wanted > fitting)
    log::warn(
        "{} = {}: a rank has {} of its host's cores to itself, so its threads wait for each other; leave it out, or "
        "start with --bind-to none where Open MPI binds ranks to fewer cores than they should have",
        option > 0 ? "--num_threads" : "OMP_NUM_THREADS", wanted, fitting);
}

log::Level parse_level(const std::string& name) {
  if (name == "debug") return log::Level::debug;
  if (name == "warn") return log::Level::warn;
  return name == "error" ? log::Level::error : log::Level::info;
}

int run_command(const Invocation& invocation, Communicator& world) {
  if (invocation.command == "train") return run_train(invocation.run, world);
  if (invocation.command == "evaluate") return run_evaluate(invocation.run, invocation.inference, world);
  if (invocation.command == "predict") return run_predict(invocation.run, invocation.inference, world);
  return run_score(invocation.run, invocation.inference, world);
}

void log_peak_memory(Communicator& world) {
  std::vector<std::int64_t> peaks;
  for (const std::string& peak : all_gather_strings(world, std::to_string(peak_resident_bytes() >> 20)))
    peaks.push_back(std::stoll(peak));
  const auto most = std::max_element(peaks.begin(), peaks.end());
  log::info("peak memory of a rank: {} MiB{}", *most,
            peaks.size() > 1 ? fmt::format(", on rank {}", most - peaks.begin()) : std::string());
}

int run_on_ranks(const Invocation& invocation, MpiEnvironment& mpi) {
  log::set_level(parse_level(invocation.run.train.log_level));
  // Only training ends in an orderly way by itself; the signals keep their usual meaning for the rest.
  if (invocation.command == "train") install_stop_handlers();
  const auto world = mpi.world();
  set_threads(invocation, *world, mpi.host());
  const int code = run_command(invocation, *world);
  log_peak_memory(*world);
  return code;
}

// The parts that need no other rank.
int run_alone(const Invocation& invocation) {
  if (invocation.wants_version) std::cout << "shardtune " << SHARDTUNE_VERSION << '\n';
  else if (invocation.wants_help) std::cout << help_text(invocation.command);
  else if (invocation.wants_config) std::cout << config_text(invocation) << fmt::format("# instructions of the kernels: {} (environment variable SHARDTUNE_ISA)\n", name_of(instruction_set()));
  else return invocation.command == "tokenize" ? run_tokenize(invocation) : run_checkpoint(invocation);
  return 0;
}

bool is_for_one_process(const std::vector<std::string>& arguments) {
  if (arguments.empty()) return true;
  const std::string& first = arguments.front();
  return first == "tokenize" || first == "checkpoint" || first == "--help" || first == "-h" || first == "help" || first == "--version";
}

int run(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (is_for_one_process(arguments)) {
    try {
      return run_alone(parse_command_line(arguments));
    } catch (...) {
      const Failure failure = describe_current_exception();
      print_failure("", failure);
      return failure.code;
    }
  }
  tune_allocator();
  install_tensor_memory_counter();
  MpiEnvironment mpi(&argc, &argv);
  log::setup(mpi.rank(), mpi.size(), log::Level::info);
  try {
    const Invocation invocation = parse_command_line(arguments);
    if (invocation.wants_help || invocation.wants_version || invocation.wants_config) return mpi.rank() == 0 ? run_alone(invocation) : 0;
    return run_on_ranks(invocation, mpi);
  } catch (...) {
    return end_job(mpi);
  }
}

int run_to_the_end(int argc, char** argv) {
  try {
    const int code = run(argc, argv);
    const bool is_written = static_cast<bool>(std::cout.flush()) && std::fflush(stdout) == 0;
    if (code == 0 && !is_written)
      fail(ErrorKind::io,
           "standard output cannot be written: its file system is full, or nobody reads it; what was printed is not "
           "complete");
    return code;
  } catch (...) {  // MPI itself did not start
    const Failure failure = describe_current_exception();
    print_failure("", failure);
    return failure.code;
  }
}

}  // namespace
}  // namespace shardtune

int main(int argc, char** argv) {
  const int code = shardtune::run_to_the_end(argc, argv);
#ifdef SHARDTUNE_ENDS_AT_ONCE
  // All of ours has ended. Taking apart LibTorch's tables of operators, which nobody needs any more, takes 0.1 s.
  std::_Exit(code);
#endif
  return code;
}
