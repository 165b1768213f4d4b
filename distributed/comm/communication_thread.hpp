#pragma once
// The thread of a process that communicates while the others compute. Internal to distributed/comm.
#include <functional>
#include <memory>
#include <thread>

#include "distributed/comm/transport.hpp"

namespace shardtune {

// Executes operations in the order of submission, one at a time, and sleeps while there are none. A caller that waits
// for an operation which has not begun yet executes what is due up to it, in place of the thread: nothing can be hidden
// then, and two changes of thread are saved. So MPI is called by one thread at a time (MPI_THREAD_SERIALIZED). After an
// operation has failed, every later one fails with Error{comm} without being started: the ranks are out of step.
// submit() is thread-safe.
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
  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace shardtune
