// config.json of every architecture: either it is refused or a model can be described by it.
#include <nlohmann/json.hpp>

#include "core/json.hpp"
#include "models/model.hpp"
#include "tests/fuzz/fuzz_support.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  using namespace shardtune;
  for (const Task task : {Task::text_classification, Task::causal_lm}) {
    fuzz::accepts([&] {
      nlohmann::json config = parse_json(fuzz::as_text(bytes, size), "config.json");
      const std::unique_ptr<Model> model =
          make_model({.config = &config, .origin = "config.json", .task = task, .labels = {}, .dropout = {}});
      fuzz::require(!model->units().empty() && model->max_positions() > 0);
      for (const Unit* unit : model->units())
        for (const Parameter* parameter : unit->parameters)
          for (const std::int64_t extent : parameter->shape) fuzz::require(extent > 0);
      // What it exports is a configuration of the same model.
      nlohmann::json exported = model->config_json();
      make_model({.config = &exported, .origin = "exported", .task = task, .labels = {}, .dropout = {}});
    });
  }
  return 0;
}
