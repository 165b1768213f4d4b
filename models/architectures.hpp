#pragma once
// The factories behind the registry: one file per architecture, Mistral and Qwen2 in Llama's. Private to models/.
#include <memory>

#include "models/model.hpp"

namespace shardtune {

std::unique_ptr<Model> make_bert(const ModelRequest& request);
std::unique_ptr<Model> make_gpt2(const ModelRequest& request);
std::unique_ptr<Model> make_llama(const ModelRequest& request);
std::unique_ptr<Model> make_mistral(const ModelRequest& request);
std::unique_ptr<Model> make_qwen2(const ModelRequest& request);

}  // namespace shardtune
