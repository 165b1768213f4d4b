#pragma once
// What every Communicator promises, checked on every rank: the one suite that all backends must pass.
// Each function is collective and throws (or fails a GoogleTest expectation) on the rank that sees something wrong.
#include "distributed/comm/communicator.hpp"

namespace shardtune::conformance {

// Values depend on (rank, index) alone, differ in magnitude and do not sum exactly, so that any other order of summation
// shows in the bits.
at::Tensor make_input(int rank, std::int64_t numel, at::ScalarType dtype);
// The reduction of make_input over `num_ranks` ranks, computed by recursion over the tree, independently of the library.
at::Tensor expected_reduction(int num_ranks, std::int64_t numel, at::ScalarType dtype, ReduceOp op);

void all_reduce_gives_the_bits_of_the_tree(Communicator& communicator);
void all_reduce_of_nan_is_nan(Communicator& communicator);
void all_gather_concatenates_uneven_parts(Communicator& communicator);
void all_gather_works_in_place(Communicator& communicator);
void reduce_scatter_gives_the_bits_of_the_tree(Communicator& communicator);
void all_to_all_delivers_uneven_parts(Communicator& communicator);
void broadcast_copies_the_root(Communicator& communicator);
void empty_tensors_pass(Communicator& communicator);
void unwaited_operations_run_in_order(Communicator& communicator);
void split_orders_by_key_and_works(Communicator& communicator);
void bad_arguments_are_refused_before_anything_is_sent(Communicator& communicator);

// All of the above.
void run_all(Communicator& communicator);

}  // namespace shardtune::conformance
