#pragma once
// The one list of every option of the program.
#include "launcher/command_line.hpp"
#include "launcher/option_table.hpp"

namespace shardtune {

// Rows bound to the fields of `invocation`, which outlives the table.
OptionTable make_option_table(Invocation& invocation);

}  // namespace shardtune
