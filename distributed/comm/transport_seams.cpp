#include "distributed/comm/transport_seams.hpp"

#include <utility>

#include "core/error.hpp"
#include "distributed/comm/mpi_transport.hpp"
#include "distributed/comm/transport_communicator.hpp"

namespace shardtune {
namespace {

// The same ranks once more, by messages alone.
std::unique_ptr<Transport> duplicate_messages(Transport& transport) {
  auto* const layered = dynamic_cast<LayeredTransport*>(&transport);
  return (layered != nullptr ? layered->messages() : transport).split(0, transport.rank());
}

std::unique_ptr<Communicator> split_by(Communicator& communicator, const TransportCommunicator::Split& split) {
  if (communicator.size() == 1) return make_self_communicator();
  auto* const group = dynamic_cast<TransportCommunicator*>(&communicator);
  check_internal(group != nullptr, "not a communicator with a transport");
  return group->split_by(split);
}

}  // namespace

std::unique_ptr<Communicator> split_with_chunk_limit(Communicator& communicator, std::int64_t max_bytes_per_call) {
  return split_by(communicator, [max_bytes_per_call](Transport& transport) {
    auto messages = duplicate_messages(transport);
    limit_bytes_per_call(*messages, max_bytes_per_call);
    return messages;
  });
}

std::unique_ptr<Communicator> split_layered(Communicator& communicator, const LayerOptions& options) {
  return split_by(communicator, [&options](Transport& transport) {
    return make_layered_transport(duplicate_messages(transport), options);
  });
}

Transport* transport_of(const Communicator& communicator) {
  const auto* const group = dynamic_cast<const TransportCommunicator*>(&communicator);
  return group != nullptr ? &group->transport() : nullptr;
}

std::string describe_transport(const Communicator& communicator) {
  const Transport* const transport = transport_of(communicator);
  return transport != nullptr ? transport->describe() : "self";
}

}  // namespace shardtune
