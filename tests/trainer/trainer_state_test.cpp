// trainer_state.json after a run with evaluation: Hugging Face's TrainerState.load_from_json passes each key to a
// dataclass, so a key it does not have ends it, and steps that are no integers break the comparisons made with them.
#include <fstream>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using namespace testing_support;

nlohmann::json state_of(const RunOptions& options, int step) {
  std::ifstream file(fs::path(options.train.output_dir) / fmt::format("checkpoint-{}", step) / "trainer_state.json");
  return nlohmann::json::parse(file);
}

class TrainerState : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fresh_directory("trainer_state");
    options_ = make_tiny_run(directory_, TinyFamily::bert);
    options_.train.global_batch_size = 0;  // 4 examples x 2 ranks: 8 steps of an epoch of 61 rows
    options_.train.max_steps = 8;
    options_.train.logging_steps = 2;
    options_.train.eval_strategy = options_.train.save_strategy = Interval::steps;
    options_.train.eval_steps = options_.train.save_steps = 4;
    options_.train.load_best_model_at_end = true;
    options_.train.metric_for_best_model = "accuracy";
  }
  void TearDown() override { fs::remove_all(directory_); }

  fs::path directory_;
  RunOptions options_;
};

TEST_F(TrainerState, HasTheFieldsOfHuggingFaceWithTheirTypes) {
  train_on_threads(options_, 2);
  const nlohmann::json state = state_of(options_, 8);
  const std::set<std::string> integers{"best_global_step", "eval_steps", "global_step",
                                       "logging_steps",    "max_steps",  "num_input_tokens_seen",
                                       "num_train_epochs", "save_steps", "train_batch_size"};
  const std::set<std::string> others{"best_metric",
                                     "best_model_checkpoint",
                                     "epoch",
                                     "is_hyper_param_search",
                                     "is_local_process_zero",
                                     "is_world_process_zero",
                                     "log_history",
                                     "stateful_callbacks",
                                     "total_flos",
                                     "trial_name",
                                     "trial_params"};
  for (const std::string& key : integers)
    EXPECT_TRUE(state.at(key).is_number_integer()) << key << " = " << state.at(key);
  for (const std::string& key : others) EXPECT_TRUE(state.contains(key)) << key;
  EXPECT_EQ(state.size(), integers.size() + others.size()) << state;
  EXPECT_EQ(state.at("global_step"), 8);
  EXPECT_EQ(state.at("max_steps"), 8);
  EXPECT_EQ(state.at("num_train_epochs"), 1) << "what max_steps comes to, not the option";
  EXPECT_EQ(state.at("logging_steps"), 2);
  EXPECT_EQ(state.at("eval_steps"), 4);
  EXPECT_EQ(state.at("save_steps"), 4);
  EXPECT_EQ(state.at("train_batch_size"), 4);
  EXPECT_DOUBLE_EQ(state.at("epoch").get<double>(), 1.0);
  EXPECT_TRUE(state.at("is_world_process_zero").get<bool>());
  EXPECT_TRUE(state.at("stateful_callbacks").is_object());
  EXPECT_EQ(state_of(options_, 4).at("global_step"), 4);
}

TEST_F(TrainerState, NamesTheBestOfTheEvaluationsInItsHistory) {
  train_on_threads(options_, 2);
  const nlohmann::json state = state_of(options_, 8);
  std::vector<int> logged, evaluated;
  double best = -1;
  int best_step = 0;
  for (const nlohmann::json& record : state.at("log_history")) {
    const int step = record.at("step").get<int>();
    EXPECT_DOUBLE_EQ(record.at("epoch").get<double>(), step / 8.0);
    if (!record.contains("eval_accuracy")) {
      for (const char* key : {"loss", "grad_norm", "learning_rate"}) EXPECT_TRUE(record.at(key).is_number()) << key;
      logged.push_back(step);
      continue;
    }
    EXPECT_TRUE(record.at("eval_loss").is_number());
    evaluated.push_back(step);
    if (record.at("eval_accuracy") > best) best = record.at("eval_accuracy"), best_step = step;
  }
  EXPECT_EQ(logged, (std::vector<int>{2, 4, 6, 8}));
  EXPECT_EQ(evaluated, (std::vector<int>{4, 8}));
  EXPECT_EQ(state.at("best_metric"), best);
  EXPECT_EQ(state.at("best_global_step"), best_step);
  const fs::path best_checkpoint = state.at("best_model_checkpoint").get<std::string>();
  EXPECT_EQ(best_checkpoint, fs::path(options_.train.output_dir) / fmt::format("checkpoint-{}", best_step));
  EXPECT_TRUE(fs::exists(best_checkpoint / "manifest.json"));
}

TEST_F(TrainerState, SharesOfAllStepsAreWrittenAsSteps) {
  options_.train.logging_steps = 0.25;
  options_.train.eval_steps = options_.train.save_steps = 0.5;
  train_on_threads(options_, 2);
  const nlohmann::json state = state_of(options_, 8);
  EXPECT_EQ(state.at("logging_steps"), 2);
  EXPECT_EQ(state.at("eval_steps"), 4);
  EXPECT_EQ(state.at("save_steps"), 4);
}

TEST_F(TrainerState, WithoutEvaluationThereIsNoBest) {
  options_.train.eval_strategy = Interval::no;
  options_.train.load_best_model_at_end = false;
  options_.data.validation_file.clear();
  train_on_threads(options_, 1);
  const nlohmann::json state = state_of(options_, 8);
  for (const char* key : {"best_metric", "best_global_step", "best_model_checkpoint"})
    EXPECT_TRUE(state.at(key).is_null()) << key;
}

}  // namespace
}  // namespace shardtune
