#include "distributed/comm/communication_thread.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <mutex>
#include <string>
#include <utility>

#include "core/error.hpp"

namespace shardtune {

struct CommunicationThread::State {
  struct Task {
    std::function<void()> operation;
    std::promise<void> done;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Task> queue;
  bool is_stopping = false;
  std::string failure;  // the thread's own; empty while all is well
};

CommunicationThread::CommunicationThread() : state_(std::make_shared<State>()) {
  thread_ = std::thread([state = state_] { run(*state); });
}

CommunicationThread::~CommunicationThread() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_stopping = true;
  }
  state_->changed.notify_one();
  if (std::uncaught_exceptions() > 0) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

Work CommunicationThread::submit(std::function<void()> operation) {
  State::Task task;
  task.operation = std::move(operation);
  // std::function wants copyable captures; the future is not.
  auto done = std::make_shared<std::future<void>>(task.done.get_future());
  {
    const std::lock_guard lock(state_->mutex);
    state_->queue.push_back(std::move(task));
  }
  state_->changed.notify_one();
  return Work([done = std::move(done)] { done->get(); });
}

void CommunicationThread::dispose(std::shared_ptr<Transport> transport) noexcept {
  State::Task task;
  // Should an earlier operation have failed, this one is not started but destroyed, which does the same.
  task.operation = [owned = std::move(transport)]() mutable { owned.reset(); };
  {
    const std::lock_guard lock(state_->mutex);
    state_->queue.push_back(std::move(task));
  }
  state_->changed.notify_one();
}

void CommunicationThread::run(State& state) {
  for (;;) {
    State::Task task;
    {
      std::unique_lock lock(state.mutex);
      state.changed.wait(lock, [&] { return state.is_stopping || !state.queue.empty(); });
      if (state.queue.empty()) return;
      task = std::move(state.queue.front());
      state.queue.pop_front();
    }
    std::exception_ptr error;
    try {
      if (!state.failure.empty()) fail(ErrorKind::comm, "an earlier operation has failed: " + state.failure);
      task.operation();
    } catch (const std::exception& e) {
      error = std::current_exception();
      if (state.failure.empty()) state.failure = e.what();
    }
    // Before the waiter goes on: whoever waits may rely on being the only owner of its tensors again.
    task.operation = nullptr;
    if (error) {
      task.done.set_exception(error);
    } else {
      task.done.set_value();
    }
  }
}

}  // namespace shardtune
