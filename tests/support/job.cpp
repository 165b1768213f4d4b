#include "tests/support/job.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <stdexcept>
#include <thread>

#include <fmt/format.h>

namespace shardtune::testing_support {
namespace {

std::vector<pid_t> children_of(pid_t process) {
  std::vector<pid_t> found;
  // Each thread of a process lists the children it started.
  std::error_code error;
  for (auto thread = std::filesystem::directory_iterator(fmt::format("/proc/{}/task", process), error);
       !error && thread != std::filesystem::directory_iterator(); thread.increment(error)) {
    std::ifstream children(thread->path() / "children");
    for (pid_t child = 0; children >> child;) found.push_back(child);
  }
  return found;
}

}  // namespace

Job::Job(const std::string& command, const std::filesystem::path& log) {
  pid_ = ::fork();
  if (pid_ == 0) {
    ::setpgid(0, 0);
    const int fd = ::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    ::dup2(fd, STDOUT_FILENO);
    ::dup2(fd, STDERR_FILENO);
    ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    ::_exit(127);
  }
}

Job::~Job() {
  if (exit_code_) return;
  ::kill(-pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

std::optional<int> Job::wait(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  while (!exit_code_) {
    int status = 0;
    if (::waitpid(pid_, &status, WNOHANG) == pid_)
      exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    else if (Clock::now() >= deadline) break;
    else std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return exit_code_;
}

std::vector<pid_t> Job::children(const std::string& program) const {
  std::vector<pid_t> found;
  for (const pid_t child : children_of(pid_)) {
    std::string name;
    std::ifstream(fmt::format("/proc/{}/comm", child)) >> name;
    if (name == program) found.push_back(child);
  }
  return found;
}

bool Job::kill_all() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  // What is killed may have started another process a moment before.
  for (auto found = descendants(::getpid()); !found.empty(); found = descendants(::getpid())) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    for (const pid_t process : found) ::kill(process, SIGKILL);
    wait(0);
    for (const pid_t process : found)
      if (process != pid_) ::waitpid(process, nullptr, WNOHANG);  // fails for those that are not ours yet
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

void adopt_orphans() {
  if (::prctl(PR_SET_CHILD_SUBREAPER, 1) != 0) throw std::runtime_error("prctl(PR_SET_CHILD_SUBREAPER) failed");
}

std::vector<pid_t> descendants(pid_t process) {
  std::vector<pid_t> found = children_of(process);
  for (std::size_t i = 0; i < found.size(); ++i)
    for (const pid_t child : children_of(found[i])) found.push_back(child);
  return found;
}

void reap_orphans() {
  while (::waitpid(-1, nullptr, WNOHANG) > 0) {
  }
}

}  // namespace shardtune::testing_support
