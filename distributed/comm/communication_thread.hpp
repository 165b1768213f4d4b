#pragma once
// The one thread of a process that calls MPI after start-up. Internal to distributed/comm.
#include <functional>
#include <memory>
#include <thread>

#include "distributed/comm/transport.hpp"

namespace shardtune {

// Executes operations in the order of submission and sleeps while there are none. After an operation has failed, every
// later one fails with Error{comm} without being started: the ranks are out of step. submit() is thread-safe.
class CommunicationThread final : public Executor {
 public:
  CommunicationThread();
  // Finishes what was submitted and joins. While an exception is in flight it leaves the thread to itself instead:
  // peers may never enter the operation it is in, and only MpiEnvironment::abort() ends that.
  ~CommunicationThread() override;
  CommunicationThread(const CommunicationThread&) = delete;
  CommunicationThread& operator=(const CommunicationThread&) = delete;

  Work submit(std::function<void()> operation) override;
  void dispose(std::shared_ptr<Transport> transport) noexcept override;

 private:
  struct State;
  static void run(State& state);

  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace shardtune
