#pragma once
// What a call that must fail says.
#include <string>

#include <gtest/gtest.h>

#include "core/error.hpp"

namespace shardtune::testing_support {

// The message of the Error of this kind that `call` throws; anything else is a failure of the test.
template <class Call>
std::string error_of(ErrorKind kind, Call&& call) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

}  // namespace shardtune::testing_support
