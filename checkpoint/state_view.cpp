#include "checkpoint/state_view.hpp"

#include "core/error.hpp"

namespace shardtune {

const char* dtype_name(c10::ScalarType dtype) {
  check_internal(dtype == at::kFloat || dtype == at::kBFloat16, "a checkpoint holds fp32 and bf16 only");
  return dtype == at::kFloat ? "float32" : "bfloat16";
}

c10::ScalarType dtype_of(const std::string& name) {
  check_internal(name == "float32" || name == "bfloat16", "a checkpoint holds fp32 and bf16 only");
  return name == "float32" ? at::kFloat : at::kBFloat16;
}

}  // namespace shardtune
