#pragma once
// Private to kernels/: from a dtype known at run time to a type.
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "core/error.hpp"

namespace shardtune {

// Calls body with a value of the C++ type of fp32, bf16 or fp16. Error{internal} for any other.
template <class Body>
void with_element_type(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat: return body(float{});
    case at::kBFloat16: return body(c10::BFloat16{});
    case at::kHalf: return body(c10::Half{});
    default: fail(ErrorKind::internal, "kernels take fp32, bf16 and fp16 tensors");
  }
}

}  // namespace shardtune
