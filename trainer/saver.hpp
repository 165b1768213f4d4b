#pragma once
// When and how a run saves: in the background or not, and what a failed save means for the run.
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint_store.hpp"
#include "trainer/run_state.hpp"

namespace shardtune {

struct SavePolicy {
  bool in_background = true;
  bool skips_on_overlap = false;  // a save that is due while one is under way is left out, else it waits
  bool stops_on_error = false;  // else the failure is reported, training goes on and the next save is tried
  int keep = 0;                 // save_total_limit; 0 = all
};

// One object per rank; functions are collective unless they say otherwise.
class Saver {
 public:
  // What is saved of the run now. The slices are views of live tensors: whoever changes one of them during training
  // calls store.preserve() before.
  using MakeView = std::function<StateView(const RunState&)>;

  Saver(CheckpointStore& store, SavePolicy policy, MakeView make_view);

  // Starts a save and returns when it is committed unless it runs in the background. With one under way it waits for
  // that or, unless `is_required`, does nothing, as the policy says. False when nothing was done.
  bool save(const RunState& state, bool is_required);
  // This rank is still writing. Local; its maximum over the ranks travels in the control word of each step. A save that
  // takes long says how far it is, every ten seconds.
  bool poll_working();
  // With the control word that says that no rank is working: takes the save, if any, to its next stage.
  void advance();
  // Waits until no save is under way.
  void finish();

  bool has_failed() const noexcept { return has_failed_; }  // the last save did; the same on all ranks

  // The step of the last best model that was committed, -1 = none: it stays when saving a better one fails. A resumed
  // run sets it.
  std::int64_t saved_best_step() const noexcept { return saved_best_step_; }
  void set_saved_best_step(std::int64_t step) noexcept { saved_best_step_ = step; }

 private:
  void attempt(const std::function<void()>& step);
  void report(const SaveReport& saved);

  CheckpointStore& store_;
  SavePolicy policy_;
  MakeView make_view_;
  bool has_failed_ = false;
  bool is_best_ = false;  // the save under way
  std::int64_t saved_best_step_ = -1;
  double held_up_seconds_ = 0;  // training, by the save under way
  std::chrono::steady_clock::time_point begin_, last_progress_;  // of the save under way, of what the log says of it
};

}  // namespace shardtune
