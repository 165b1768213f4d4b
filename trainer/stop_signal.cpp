#include "trainer/stop_signal.hpp"

#include <csignal>
#include <initializer_list>

#include <unistd.h>

namespace shardtune {
namespace {

// The one thing a signal handler may touch.
volatile std::sig_atomic_t g_stop_requests = 0;

extern "C" void request_stop(int signal_number) {
  if (signal_number == SIGINT && g_stop_requests > 0) _exit(128 + SIGINT);
  g_stop_requests = g_stop_requests + 1;
}

}  // namespace

void install_stop_handlers() {
  struct sigaction action {};
  action.sa_handler = request_stop;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;  // a save in progress must not see EINTR
  for (const int signal_number : {SIGTERM, SIGINT, SIGUSR1}) sigaction(signal_number, &action, nullptr);
  std::signal(SIGXFSZ, SIG_IGN);
}

void remove_stop_handlers() noexcept {
  for (const int signal_number : {SIGTERM, SIGINT, SIGUSR1}) std::signal(signal_number, SIG_DFL);
}

bool stop_requested() noexcept { return g_stop_requests > 0; }

}  // namespace shardtune
