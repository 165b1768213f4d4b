// predict and score as commands: one line per input row, whatever the rows' labels and lengths.
#include <cmath>
#include <fstream>
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using namespace testing_support;

class Inference : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fresh_directory(testing::UnitTest::GetInstance()->current_test_info()->name());
    input_ = directory_ / "input.jsonl";
  }
  void TearDown() override { fs::remove_all(directory_); }

  void write_input(const std::vector<nlohmann::json>& rows) {
    std::ofstream out(input_);
    for (const auto& row : rows) out << row.dump() << '\n';
  }
  // A model with random weights reads the input; its lines, parsed.
  std::vector<nlohmann::json> lines_of(const std::string& command, TinyFamily family, const std::string& launch = "") {
    const RunOptions options = make_tiny_run(directory_, family);
    const fs::path output = directory_ / "output.jsonl";
    const CommandResult result =
        run_command(fmt::format("{} {} {} --config_name {} --task {} --input {} --output {} --num_threads 1 "
                                "--per_device_eval_batch_size 2",
                                launch, shardtune_binary(), command, options.model.config_name, options.model.task,
                                input_.string(), output.string()));
    EXPECT_EQ(result.exit_code, 0) << result.output;
    messages_ = result.output;
    std::vector<nlohmann::json> lines;
    std::ifstream in(output);
    for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
  std::size_t num_messages(const std::string& words) const {
    std::size_t count = 0;
    for (std::size_t at = 0; (at = messages_.find(words, at)) != std::string::npos; ++at) ++count;
    return count;
  }

  fs::path directory_, input_;
  std::string messages_;
};

TEST_F(Inference, PredictDoesNotReadLabels) {
  write_input({{{"text", "w1 w2"}, {"label", "a class the model does not know"}}, {{"text", "w3"}, {"label", 7}}});
  const auto lines = lines_of("predict", TinyFamily::bert);
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines[1].at("index"), 1);
  EXPECT_EQ(num_messages("unknown label"), 0U);
}

TEST_F(Inference, ScoreGoesWithoutLabelsWhereTheModelDoesNotKnowThemAndSaysSoOnce) {
  write_input({{{"text", "w1 w2"}, {"label", "LABEL_0"}},
               {{"text", "w3"}, {"label", "strange"}},
               {{"text", "w4"}, {"label", "stranger"}}});
  const auto lines = lines_of("score", TinyFamily::bert, mpirun_command(2));
  ASSERT_EQ(lines.size(), 3U);
  for (const auto& line : lines) {
    EXPECT_TRUE(line.contains("logits"));
    EXPECT_FALSE(line.contains("loss"));
  }
  EXPECT_EQ(num_messages("unknown label 'strange'"), 1U) << messages_;
  EXPECT_EQ(num_messages("unknown label"), 1U) << messages_;
}

TEST_F(Inference, ScoreOfACausalModelNumbersTheRowsOfTheInput) {
  const std::vector<std::vector<int>> rows{{5, 6, 7}, {8}, {9, 10}, {11}, {12, 13, 14, 15}};
  write_input({{{"text", "w1 w2 w3"}},
               {{"text", "w4"}},
               {{"text", "w5 w6"}},
               {{"input_ids", {11}}},
               {{"text", "w8 w9 w10 w11"}}});
  for (const std::string& launch : {std::string(), mpirun_command(2)}) {
    const auto lines = lines_of("score", TinyFamily::llama, launch);
    ASSERT_EQ(lines.size(), rows.size()) << messages_;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(lines[i].at("index"), i);
      EXPECT_EQ(lines[i].at("input_ids"), rows[i]);
      EXPECT_EQ(lines[i].at("token_logprobs").size(), rows[i].size() - 1);
      if (rows[i].size() == 1)
        EXPECT_EQ(lines[i].at("loss"), 0.0);
      else
        EXPECT_GT(lines[i].at("loss"), 0.0);
    }
  }
}

TEST_F(Inference, ScoreRefusesARowOfACausalModelThatItCannotTakeWhole) {
  const RunOptions options = make_tiny_run(directory_, TinyFamily::llama);
  std::string text = "w1";
  for (int i = 0; i < 40; ++i) text += " w2";
  write_input({{{"text", "w1 w2"}}, {{"text", text}}});
  const CommandResult result = run_command(fmt::format("{} score --config_name {} --task causal-lm --input {}",
                                                       shardtune_binary(), options.model.config_name, input_.string()));
  EXPECT_EQ(result.exit_code, 3) << result.output;
  for (const char* words : {"input.jsonl:2", "41 tokens", "40"})
    EXPECT_NE(result.output.find(words), std::string::npos) << result.output;
}

// The loss is linear in the factor; the other metrics do not know of it.
TEST_F(Inference, EvaluateSmoothsItsLossAsHuggingFaceDoes) {
  write_input(
      {{{"text", "w1 w2"}, {"label", 0}}, {{"text", "w3 w4 w5"}, {"label", 1}}, {{"text", "w6 w7"}, {"label", 1}}});
  for (const TinyFamily family : {TinyFamily::bert, TinyFamily::llama}) {
    std::map<int, nlohmann::json> metrics;  // by percent
    for (const int percent : {0, 20, 60}) {
      const auto lines = lines_of(fmt::format("evaluate --label_smoothing_factor 0.{:02}", percent), family);
      ASSERT_EQ(lines.size(), 1U);
      metrics[percent] = lines[0];
    }
    const auto loss = [&](int percent) { return metrics[percent].at("eval_loss").get<double>(); };
    EXPECT_GT(std::abs(loss(20) - loss(0)), 1e-6);
    EXPECT_NEAR(loss(60) - loss(0), 3 * (loss(20) - loss(0)), 1e-6 * loss(0));
    if (family == TinyFamily::bert) {
      EXPECT_EQ(metrics[60].at("eval_f1"), metrics[0].at("eval_f1"));
    } else {
      EXPECT_NEAR(metrics[60].at("eval_perplexity").get<double>(), std::exp(loss(60)), 1e-6 * std::exp(loss(60)));
    }
  }
}

}  // namespace
}  // namespace shardtune
