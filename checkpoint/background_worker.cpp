#include "checkpoint/background_worker.hpp"

#include <utility>

#include <pthread.h>

#include "core/error.hpp"

namespace shardtune {

BackgroundWorker::~BackgroundWorker() {
  {
    const std::lock_guard lock(mutex_);
    must_end_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void BackgroundWorker::start(std::function<void()> job) {
  // First: when the system has no thread left this throws, and nobody may wait for a job that will never run.
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  {
    const std::lock_guard lock(mutex_);
    check_internal(!job_ && !error_, "BackgroundWorker::start: the last job has not been collected");
    job_ = std::move(job);
  }
  changed_.notify_all();
}

bool BackgroundWorker::is_running() const {
  const std::lock_guard lock(mutex_);
  return static_cast<bool>(job_);
}

void BackgroundWorker::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !job_; });
}

void BackgroundWorker::collect() {
  wait();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void BackgroundWorker::loop() {
  pthread_setname_np(pthread_self(), "checkpoint");
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return job_ || must_end_; });
    if (!job_) return;
    lock.unlock();
    std::exception_ptr error;
    try {
      job_();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    error_ = error;
    job_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace shardtune
