// Pretrained files into the engine: the two names of a tied weight.
#include "trainer/weights.hpp"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.hpp"
#include "checkpoint/tools.hpp"
#include "core/error.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/support/tiny_run.hpp"
#include "trainer/model_source.hpp"

namespace shardtune {
namespace {

namespace fs = std::filesystem;

constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kHead = "lm_head.weight";

std::unique_ptr<Model> make_tied_llama() {
  nlohmann::json config = nlohmann::json::parse(R"({"model_type": "llama", "vocab_size": 31, "hidden_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20, "tie_word_embeddings": true})");
  return make_model({.config = &config, .origin = "test", .task = Task::causal_lm, .labels = {}, .dropout = {}});
}

at::Tensor table(float first) { return at::arange(31 * 12).to(at::kFloat) + first; }

// All weights of the model as `values`, its table under each of `names` with its own first value.
void write_file(const fs::path& directory, const std::vector<std::pair<std::string, float>>& names) {
  const auto model = make_tied_llama();
  std::vector<SafetensorsWriter::Item> items;
  for (const Unit* unit : model->units())
    for (const Parameter* p : unit->parameters)
      if (p->name != kEmbedding) items.push_back({p->name, "F32", p->shape});
  const std::size_t others = items.size();
  for (const auto& [name, first] : names) items.push_back({name, "F32", {31, 12}});
  SafetensorsWriter writer(directory / "model.safetensors", items);
  for (std::size_t i = 0; i < others; ++i) {
    std::int64_t numel = 1;
    for (const std::int64_t size : items[i].shape) numel *= size;
    writer.write(at::ones({numel}));
  }
  for (const auto& [name, first] : names) writer.write(table(first));
  writer.commit();
}

// Loads at two ranks and returns the table put together.
at::Tensor load(const fs::path& directory) {
  at::Tensor whole = at::zeros({31 * 12});
  run_thread_ranks(2, [&](Communicator& world) {
    const auto model = make_tied_llama();
    ParallelEngine engine(model->units(), world, {.plan = find_sharding_plan("zero3")});
    const WeightReport report = load_pretrained(directory, *model, engine, 1);
    EXPECT_TRUE(report.unexpected.empty() && report.newly_initialized.empty());
    for (const ShardedParameter* p : engine.parameters()) {
      if (p->parameter->name != kEmbedding) continue;
      const at::Tensor slice = p->slice_of(p->master);
      whole.narrow(0, p->slice_offset(), slice.numel()).copy_(slice);
    }
  });
  return whole;
}

TEST(Weights, TiedWeightIsTakenUnderEitherNameOrBoth) {
  const fs::path directory = testing_support::fresh_directory("tied_weights");
  for (const std::vector<std::pair<std::string, float>>& names :
       std::vector<std::vector<std::pair<std::string, float>>>{
           {{kEmbedding, 2}}, {{kHead, 2}}, {{kHead, 2}, {kEmbedding, 2}}}) {
    write_file(directory, names);
    EXPECT_TRUE(at::equal(load(directory), table(2))) << names[0].first << " " << names.size();
  }
  fs::remove_all(directory);
}

TEST(Weights, TiedWeightStoredTwiceWithDifferentValuesIsRefused) {
  const fs::path directory = testing_support::fresh_directory("untied_weights");
  write_file(directory, {{kHead, 2}, {kEmbedding, 3}});
  try {
    load(directory);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::data);
    for (const char* text : {kEmbedding, kHead, "tie_word_embeddings"})
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
  fs::remove_all(directory);
}

// A base model in old names: no prefix, gamma and beta, no classifier; a pretraining head that this task does not use.
std::unique_ptr<Model> write_base_bert(const RunOptions& options, const fs::path& directory) {
  ModelSource source = find_model_source(options.model);
  auto model = build_model(source, options.model, {"a", "b"});
  fs::create_directories(directory);
  fs::copy_file(source.config_file, directory / "config.json");
  std::vector<SafetensorsWriter::Item> items;
  for (const Unit* unit : model->units())
    for (const Parameter* p : unit->parameters) {
      std::string name = p->name.substr(p->name.find('.') + 1);
      if (p->name.starts_with("classifier.")) continue;
      if (name.ends_with("LayerNorm.weight")) name = name.substr(0, name.size() - 6) + "gamma";
      if (name.ends_with("LayerNorm.bias")) name = name.substr(0, name.size() - 4) + "beta";
      items.push_back({name, "F32", p->shape});
    }
  items.push_back({"cls.predictions.bias", "F32", {54}});
  SafetensorsWriter writer(directory / "model.safetensors", items);
  for (const auto& item : items) writer.write(at::randn(item.shape).flatten());
  writer.commit();
  return model;
}

TEST(Weights, AnImportedBaseModelLoadsLikeTheDirectoryItCameFrom) {
  const fs::path directory = testing_support::fresh_directory("imported_base");
  RunOptions options = testing_support::make_tiny_run(directory, testing_support::TinyFamily::bert);
  const auto model = write_base_bert(options, directory / "base");
  const nlohmann::json imported = import_model(directory / "base", directory / "imported");
  options.model.model_name_or_path = imported.at("checkpoint").get<std::string>();
  const ModelSource source = find_model_source(options.model);
  EXPECT_TRUE(source.checkpoint_dir.empty());
  run_thread_ranks(2, [&](Communicator& world) {
    ModelSource own = source;
    const auto from_file = build_model(own, options.model, {"a", "b"}),
               from_import = build_model(own, options.model, {"a", "b"});
    ParallelEngine a(from_file->units(), world, {.plan = find_sharding_plan("zero3")});
    ParallelEngine b(from_import->units(), world, {.plan = find_sharding_plan("zero3")});
    const WeightReport expected = load_pretrained(directory / "base", *from_file, a, 1);
    const WeightReport report = load_pretrained(source.weights_dir, *from_import, b, 1);
    EXPECT_EQ(report.newly_initialized, (std::vector<std::string>{"classifier.bias", "classifier.weight"}));
    EXPECT_EQ(report.newly_initialized, expected.newly_initialized);
    EXPECT_EQ(report.unexpected, std::vector<std::string>{"cls.predictions.bias"});
    for (std::size_t i = 0; i < a.parameters().size(); ++i)
      EXPECT_TRUE(at::equal(a.parameters()[i]->master, b.parameters()[i]->master))
          << a.parameters()[i]->parameter->name;
  });
  fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
