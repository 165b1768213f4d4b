#pragma once
// Read-only listeners of a run. Called on rank 0 only, from the training thread, in the order they were added.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace shardtune {

// Where the run stands after an optimizer step; rates cover the time since this process started training.
struct Progress {
  std::int64_t step = 0, max_steps = 0;      // steps done, steps in all
  double epoch = 0;
  double loss = 0;                           // of the last logged interval
  double seconds = 0, remaining_seconds = 0;
  double samples_per_second = 0, tokens_per_second = 0;
};

class Observer {
 public:
  virtual ~Observer() = default;
  virtual void on_step(const Progress& progress) = 0;
  // A logged step or an evaluation: the object that metrics.jsonl gets (docs/formats.md).
  virtual void on_record(const nlohmann::json& record) = 0;
};

// OUTPUT_DIR/metrics.jsonl. When resuming, records of steps after `resumed_step` are dropped first, so that the file of
// an interrupted run reads like that of an undisturbed one.
std::unique_ptr<Observer> make_metrics_writer(const std::filesystem::path& output_dir, std::int64_t resumed_step);

// A bar redrawn in place on a terminal; elsewhere one plain line a record.
std::unique_ptr<Observer> make_progress_display(bool is_terminal);

// One JSON line with numbers as %.9g and non-finite numbers as null.
std::string format_json_line(const nlohmann::json& record);

}  // namespace shardtune
