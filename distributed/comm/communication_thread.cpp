#include "distributed/comm/communication_thread.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "core/error.hpp"

namespace shardtune {

struct CommunicationThread::State {
  struct Task {
    std::function<void()> operation;
    bool is_done = false;
    std::exception_ptr error;
  };

  std::mutex mutex;
  std::condition_variable work_is_due;   // the thread waits here
  std::condition_variable task_is_done;  // callers wait here
  std::deque<std::shared_ptr<Task>> queue;
  bool is_busy = false;  // an operation is being executed
  bool is_stopping = false;
  std::string failure;  // empty while all is well

  std::shared_ptr<Task> push(std::function<void()> operation);
  void execute_next(std::unique_lock<std::mutex>& lock);
  void run();
  void wait_for(Task& task);
};

std::shared_ptr<CommunicationThread::State::Task> CommunicationThread::State::push(std::function<void()> operation) {
  auto task = std::make_shared<Task>();
  task->operation = std::move(operation);
  {
    const std::lock_guard lock(mutex);
    queue.push_back(task);
  }
  work_is_due.notify_one();
  return task;
}

// Nothing is being executed and there is something to execute.
void CommunicationThread::State::execute_next(std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Task> task = std::move(queue.front());
  queue.pop_front();
  is_busy = true;
  lock.unlock();
  std::exception_ptr error;
  std::string what;
  try {
    // Only whoever is busy writes it.
    if (!failure.empty()) fail(ErrorKind::comm, "an earlier operation has failed: " + failure);
    task->operation();
  } catch (const std::exception& e) {
    error = std::current_exception();
    what = e.what();
  }
  // Before the waiter goes on: whoever waits may rely on being the only owner of its tensors again.
  task->operation = nullptr;
  lock.lock();
  if (failure.empty()) failure = what;
  is_busy = false;
  task->error = error;
  task->is_done = true;
  task_is_done.notify_all();
}

void CommunicationThread::State::run() {
  std::unique_lock lock(mutex);
  for (;;) {
    work_is_due.wait(lock, [&] { return !is_busy && (is_stopping || !queue.empty()); });
    if (queue.empty()) return;
    execute_next(lock);
  }
}

void CommunicationThread::State::wait_for(Task& task) {
  std::unique_lock lock(mutex);
  while (!task.is_done) {
    if (!is_busy) {  // then the task is in the queue
      execute_next(lock);
    } else {
      task_is_done.wait(lock);
    }
  }
  if (!queue.empty() || is_stopping) work_is_due.notify_one();
  if (task.error) std::rethrow_exception(task.error);
}

CommunicationThread::CommunicationThread() : state_(std::make_shared<State>()) {
  thread_ = std::thread([state = state_] { state->run(); });
}

CommunicationThread::~CommunicationThread() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_stopping = true;
  }
  state_->work_is_due.notify_one();
  if (std::uncaught_exceptions() > 0) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

Work CommunicationThread::submit(std::function<void()> operation) {
  auto task = state_->push(std::move(operation));
  // The state: a Work may outlive this object.
  return Work([state = state_, task = std::move(task)] { state->wait_for(*task); });
}

void CommunicationThread::dispose(std::shared_ptr<Transport> transport) noexcept {
  // Should an earlier operation have failed, this one is not started but destroyed, which does the same.
  (void)state_->push([owned = std::move(transport)]() mutable { owned.reset(); });
}

}  // namespace shardtune
