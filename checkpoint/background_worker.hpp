#pragma once
// One long-lived thread that does one job at a time. The thread starts with the first job.
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace shardtune {

class BackgroundWorker {
 public:
  BackgroundWorker() = default;
  ~BackgroundWorker();  // waits for the running job
  BackgroundWorker(const BackgroundWorker&) = delete;
  BackgroundWorker& operator=(const BackgroundWorker&) = delete;

  // All of these are for one owner thread. start(): no job may be running or uncollected; std::system_error when there is
  // no thread to be had, and then there is no job.
  void start(std::function<void()> job);
  bool is_running() const;
  void wait();     // until the job has ended; returns at once without one
  void collect();  // waits, and rethrows what the job threw

 private:
  void loop();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> job_;  // set while it waits or runs
  std::exception_ptr error_;
  bool must_end_ = false;
  std::thread thread_;
};

}  // namespace shardtune
