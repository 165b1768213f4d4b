#include "tests/support/tiny_run.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/rng.hpp"

namespace shardtune::testing_support {
namespace fs = std::filesystem;
namespace {

constexpr int kNumWords = 50;

void write_json(const fs::path& file, const nlohmann::json& json) { std::ofstream(file) << json.dump(1); }

void write_tokenizer(const fs::path& directory, TinyFamily family) {
  nlohmann::json vocab{{"[PAD]", 0}, {"[UNK]", 1}, {"[CLS]", 2}, {"[SEP]", 3}};
  for (int i = 0; i < kNumWords; ++i) vocab[fmt::format("w{}", i)] = 4 + i;
  nlohmann::json added = nlohmann::json::array();
  for (const char* token : {"[PAD]", "[UNK]", "[CLS]", "[SEP]"})
    added.push_back({{"id", vocab[token]}, {"content", token}, {"single_word", false}, {"lstrip", false},
                     {"rstrip", false}, {"normalized", false}, {"special", true}});
  nlohmann::json post = nullptr;
  if (family != TinyFamily::llama)
    post = {{"type", "BertProcessing"}, {"sep", {"[SEP]", 3}}, {"cls", {"[CLS]", 2}}};
  write_json(directory / "tokenizer.json",
             {{"version", "1.0"},
              {"truncation", nullptr},
              {"padding", nullptr},
              {"added_tokens", added},
              {"normalizer", {{"type", "BertNormalizer"}, {"clean_text", true}, {"handle_chinese_chars", true},
                              {"strip_accents", nullptr}, {"lowercase", true}}},
              {"pre_tokenizer", {{"type", "BertPreTokenizer"}}},
              {"post_processor", post},
              {"decoder", {{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}}},
              {"model", {{"type", "WordPiece"}, {"unk_token", "[UNK]"}, {"continuing_subword_prefix", "##"},
                         {"max_input_chars_per_word", 100}, {"vocab", vocab}}}});
}

nlohmann::json model_config(TinyFamily family) {
  const int vocab = 4 + kNumWords;
  if (family == TinyFamily::bert)
    return {{"architectures", {"BertForSequenceClassification"}}, {"model_type", "bert"}, {"vocab_size", vocab},
            {"hidden_size", 24}, {"num_hidden_layers", 3}, {"num_attention_heads", 3}, {"intermediate_size", 40},
            {"max_position_embeddings", 40}, {"hidden_dropout_prob", 0.1}, {"attention_probs_dropout_prob", 0.1}};
  if (family == TinyFamily::minilm)
    return {{"architectures", {"BertForSequenceClassification"}}, {"model_type", "bert"}, {"vocab_size", vocab},
            {"hidden_size", 384}, {"num_hidden_layers", 6}, {"num_attention_heads", 12}, {"intermediate_size", 1536},
            {"max_position_embeddings", 512}, {"hidden_dropout_prob", 0.1}, {"attention_probs_dropout_prob", 0.1}};
  return {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", vocab},
          {"hidden_size", 32}, {"num_hidden_layers", 3}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
          {"intermediate_size", 44}, {"max_position_embeddings", 40}, {"rms_norm_eps", 1e-5},
          {"tie_word_embeddings", true}, {"attention_dropout", 0.1}};
}

// The label follows from which word is most frequent, so there is something to learn.
void write_rows(const fs::path& file, int num_rows, std::uint64_t key) {
  PhiloxStream random(key);
  std::ofstream out(file);
  for (int row = 0; row < num_rows; ++row) {
    const int label = static_cast<int>(random.next_below(3));
    std::string text;
    const int length = 3 + static_cast<int>(random.next_below(14));
    for (int i = 0; i < length; ++i) {
      const bool is_hint = random.next_below(3) == 0;
      text += fmt::format("{}w{}", i > 0 ? " " : "", is_hint ? 40 + label : static_cast<int>(random.next_below(kNumWords)));
    }
    out << nlohmann::json{{"text", text}, {"label", fmt::format("class{}", label)}}.dump() << '\n';
  }
}

}  // namespace

RunOptions make_tiny_run(const fs::path& directory, TinyFamily family) {
  const fs::path model = directory / "model";
  fs::create_directories(model);
  write_tokenizer(model, family);
  write_json(model / "config.json", model_config(family));
  write_rows(directory / "train.jsonl", 61, 1);
  write_rows(directory / "validation.jsonl", 17, 2);
  RunOptions options;
  options.model.config_name = model.string();
  options.model.task = family == TinyFamily::llama ? "causal-lm" : "text-classification";
  options.data.train_file = (directory / "train.jsonl").string();
  options.data.validation_file = (directory / "validation.jsonl").string();
  options.train.output_dir = (directory / "out").string();
  options.train.per_device_train_batch_size = 4;
  options.train.global_batch_size = 4;
  options.train.learning_rate = 1e-3;
  options.train.max_steps = 10;
  options.train.logging_steps = 1;
  options.train.save_strategy = Interval::no;
  options.train.disable_tqdm = true;
  options.train.log_level = "error";
  return options;
}

std::string sha256_of(const fs::path& file) {
  const CommandResult result = run_command(fmt::format("sha256sum '{}'", file.string()));
  if (result.exit_code != 0 || result.output.size() < 64) throw std::runtime_error("sha256sum failed: " + result.output);
  return result.output.substr(0, 64);
}

fs::path fresh_directory(const std::string& name) {
  const fs::path directory = fs::temp_directory_path() / fmt::format("shardtune_test_{}_{}", name, ::getpid());
  fs::remove_all(directory);
  fs::create_directories(directory);
  return directory;
}

CommandResult run_command(const std::string& command) {
  const auto start = std::chrono::steady_clock::now();
  CommandResult result;
  FILE* pipe = ::popen(("{ " + command + "; } 2>&1").c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("popen failed");
  char buffer[4096];
  for (std::size_t n = 0; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) result.output.append(buffer, n);
  const int status = ::pclose(pipe);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

std::string shardtune_binary() {
  const char* path = std::getenv("SHARDTUNE_BINARY");
  if (path == nullptr) throw std::runtime_error("SHARDTUNE_BINARY is not set; run the test through ctest");
  return path;
}

std::string mpirun_command(int num_ranks) {
  return fmt::format("mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 -n {}", num_ranks);
}

}  // namespace shardtune::testing_support
