#pragma once
// The training loop. It takes finished parts by reference and owns only the order of things.
// run() is collective; every rank calls it with parts built from the same configuration.
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include <nlohmann/json.hpp>

#include "data/loader.hpp"
#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/parallel_engine.hpp"
#include "models/model.hpp"
#include "trainer/observer.hpp"
#include "trainer/optimizer.hpp"
#include "trainer/run_state.hpp"
#include "trainer/saver.hpp"
#include "trainer/schedule.hpp"

namespace shardtune {

// When something is due, in optimizer steps. Hugging Face's epoch strategies include the end of a last, incomplete epoch.
struct StepInterval {
  std::int64_t every = 0;  // 0 = never
  bool and_last = false;   // also after max_steps
};

struct TrainerSettings {
  std::int64_t max_steps = 0, steps_per_epoch = 1;
  StepInterval logging{.every = 500}, eval, save{.and_last = true};
  bool logging_first_step = false, eval_on_start = false;
  bool log_memory = false;
  double max_grad_norm = 1.0;
  double label_smoothing = 0.0;
  std::uint64_t seed = 42;
  bool load_best_model_at_end = false;   // track the best evaluation
  std::string metric_for_best_model = "eval_loss";
  bool greater_is_better = false;
};

struct TrainerParts {
  Model& model;
  ParallelEngine& engine;
  Optimizer& optimizer;
  const LearningRateSchedule& schedule;
  StepLoader& loader;
  Communicator& world;
  std::vector<std::unique_ptr<Observer>>& observers;  // used on rank 0 only
  std::function<nlohmann::json()> evaluate;           // collective; may be empty
  Saver& saver;
  std::function<bool()> stop_requested;               // this rank got a stop signal
};

enum class TrainOutcome { finished, stopped_by_signal };

class Trainer {
 public:
  Trainer(TrainerParts parts, TrainerSettings settings, RunState& state);
  // Errors name the step.
  TrainOutcome run();

 private:
  TrainOutcome run_steps();
  struct StepResult {
    double loss = 0, grad_norm = 0, learning_rate = 0, seconds = 0;
    std::int64_t tokens = 0, samples = 0;
  };
  StepResult train_step(const StepBatches& batches);
  // fp16: whether this step's gradients are to be dropped. Error{numeric} for what is not finite otherwise.
  bool has_overflowed(const StepResult& result) const;
  void forward_backward(const StepBatches& batches, std::vector<double>& losses);
  struct ControlWord {
    bool must_stop = false, is_any_saving = false;
  };
  ControlWord share_control_word();
  void take_huge_pages();
  void save_now(bool is_required);
  void after_step(const StepResult& result);
  void log_step(const StepResult& result);
  void log_memory();
  // Whether the evaluation was the best so far, where load_best_model_at_end asks for that.
  bool evaluate_and_compare();
  nlohmann::json evaluate_and_publish();
  void publish(nlohmann::json record);
  double epoch() const;
  bool is_due(const StepInterval& interval) const;

  TrainerParts parts_;
  TrainerSettings settings_;
  RunState& state_;
  std::int64_t first_step_ = 0, saved_step_ = -1;
  std::int64_t activation_bytes_ = 0, page_faults_ = 0;
  std::int64_t process_tokens_ = 0, process_samples_ = 0;
  double start_seconds_ = 0;
};

}  // namespace shardtune
