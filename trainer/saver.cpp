#include "trainer/saver.hpp"

#include <fmt/format.h>

#include "core/error.hpp"
#include "core/log.hpp"

namespace shardtune {

Saver::Saver(CheckpointStore& store, SavePolicy policy, MakeView make_view)
    : store_(store), policy_(policy), make_view_(std::move(make_view)) {}

bool Saver::save(const RunState& state, bool is_required) {
  if (policy_.skips_on_overlap && !is_required && store_.is_saving()) {
    log::warn("checkpoint-{} is left out because the save before it is still under way (--on_save_overlap skip)", state.step);
    return false;
  }
  finish();
  held_up_seconds_ = 0;
  begin_ = last_progress_ = std::chrono::steady_clock::now();
  std::vector<std::int64_t> always_kept;
  is_best_ = state.best_step == state.step;
  // Nothing is deleted unless this save is committed. Then it is the best itself, or the best may never have been
  // saved.
  if (state.best_step >= 0) always_kept.push_back(state.best_step);
  if (saved_best_step_ >= 0 && !is_best_) always_kept.push_back(saved_best_step_);
  StateView view = make_view_(state);  // what fails here fails on one rank alone, so the run cannot go on
  attempt([&] {
    has_failed_ = false;
    store_.begin_save(state.step, std::move(view), {policy_.keep, always_kept});
  });
  if (!policy_.in_background) finish();
  return true;
}

bool Saver::poll_working() {
  constexpr double kMib = 1048576.0;
  constexpr std::chrono::seconds kInterval(10);
  if (const auto now = std::chrono::steady_clock::now(); store_.is_saving() && now - last_progress_ >= kInterval) {
    last_progress_ = now;
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    const auto [taken, all] = store_.progress();
    const double mib = static_cast<double>(taken) / kMib;
    if (taken < all)
      log::info("saving: {:.1f} of {:.1f} MiB of rank 0 written after {:.0f} s ({:.0f} MiB/s)", mib, static_cast<double>(all) / kMib,
                seconds, mib / seconds);
    else
      log::info("saving: the {:.1f} MiB of rank 0 are written, being read back and committed after {:.0f} s", mib, seconds);
  }
  return store_.is_working();
}

void Saver::advance() {
  if (!store_.is_saving()) return;
  attempt([&] {
    if (const auto saved = store_.advance_save()) report(*saved);
  });
}

void Saver::finish() {
  if (!store_.is_saving()) return;
  attempt([&] { report(store_.finish_save()); });
}

// The failure is the same on all ranks, and so is what they make of it.
void Saver::attempt(const std::function<void()>& step) {
  const auto start = std::chrono::steady_clock::now();
  try {
    step();
  } catch (const Error& e) {
    if (policy_.stops_on_error || e.kind() == ErrorKind::comm || e.kind() == ErrorKind::internal) throw;
    has_failed_ = true;
    log::error("{}; older checkpoints are untouched, training goes on and the next save is tried (--on_save_error stop ends "
               "the run instead)",
               e.what());
  }
  held_up_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Saver::report(const SaveReport& saved) {
  if (is_best_) saved_best_step_ = saved.step;
  constexpr double kMib = 1048576.0;
  const double mib = static_cast<double>(saved.bytes) / kMib;
  const std::string drained = saved.drain_seconds > 0 ? fmt::format(", drained in {:.2f} s", saved.drain_seconds) : "";
  log::info("checkpoint-{} committed: {:.1f} MiB in {:.2f} s (written in {:.2f} s, {:.0f} MiB/s{}); training was held up for {:.0f} ms, "
            "copied {:.1f} MiB in {:.0f} ms, held at most {:.1f} MiB of copies",
            saved.step, mib, saved.seconds, saved.write_seconds, mib / saved.write_seconds, drained,
            1e3 * (held_up_seconds_ + saved.cost.wait_seconds), static_cast<double>(saved.cost.copied_bytes) / kMib,
            1e3 * saved.cost.copy_seconds, static_cast<double>(saved.cost.most_staged_bytes) / kMib);
}

}  // namespace shardtune
