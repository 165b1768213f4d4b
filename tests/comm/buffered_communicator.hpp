#pragma once
// Puts the tensors of every operation into memory from make_buffer(), to run the conformance suite over it.
#include <memory>

#include "distributed/comm/communicator.hpp"

namespace shardtune::conformance {

// Collective. `uses_buffers` may differ between ranks: operations whose tensors lie in a buffer on some ranks only must
// work as well. `inner` must outlive it. Tensors of up to 2 MiB; others, and refused ones, are handed through.
std::unique_ptr<Communicator> make_buffered_communicator(Communicator& inner, bool uses_buffers);

}  // namespace shardtune::conformance
