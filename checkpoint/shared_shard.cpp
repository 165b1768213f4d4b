#include "checkpoint/shared_shard.hpp"

#include <algorithm>
#include <cstring>

#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/host.hpp"
#include "distributed/comm/exchange.hpp"

namespace shardtune {
namespace {

template <class T>
std::string pack(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <class T>
void unpack(std::string_view bytes, std::vector<T>& into) {
  check_internal(bytes.size() % sizeof(T) == 0, "unpack: a part of a value");
  const std::size_t old = into.size();
  into.resize(old + bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(into.data() + old, bytes.data(), bytes.size());
}

}  // namespace

std::string describe_slices(const StateView& view) {
  nlohmann::json slices = nlohmann::json::array();
  for (const StateSlice& slice : view.slices)
    slices.push_back({slice.name, slice.field, slice.global_shape, slice.offset, slice.data.numel(),
                      dtype_name(slice.data.scalar_type())});
  return slices.dump();
}

StateView join_slices(const std::vector<std::string>& descriptions, const nlohmann::json& run) {
  StateView view;
  view.run = run;
  for (const std::string& description : descriptions)
    for (const nlohmann::json& slice : nlohmann::json::parse(description))
      view.slices.push_back({slice[0], slice[1], slice[2].get<std::vector<std::int64_t>>(), slice[3],
                             at::empty({slice[4].get<std::int64_t>()},
                                       at::TensorOptions(at::kMeta).dtype(dtype_of(slice[5].get<std::string>())))});
  return view;
}

std::string pack_positions(const std::vector<std::uint64_t>& positions) { return pack(positions); }

std::vector<std::uint64_t> unpack_positions(std::string_view bytes) {
  std::vector<std::uint64_t> positions;
  unpack(bytes, positions);
  return positions;
}

std::string pack_parts(const std::vector<WrittenPart>& parts) { return pack(parts); }

void unpack_parts(std::string_view bytes, std::vector<WrittenPart>& into) { unpack(bytes, into); }

int choose_ranks_per_file(const std::vector<std::string>& hosts, int max_files) {
  const std::size_t num_ranks = hosts.size();
  const auto stays_on_hosts = [&](std::size_t ranks_per_file) {
    for (std::size_t rank = 0; rank < num_ranks; ++rank)
      if (hosts[rank] != hosts[rank - rank % ranks_per_file]) return false;
    return true;
  };
  std::size_t most_on_a_host = 0;
  for (std::size_t rank = 0, first = 0; rank < num_ranks; ++rank) {
    if (hosts[rank] != hosts[first]) first = rank;
    most_on_a_host = std::max(most_on_a_host, rank - first + 1);
  }
  std::size_t chosen = 1;
  const auto is_enough = [&] { return (num_ranks + chosen - 1) / chosen <= static_cast<std::size_t>(max_files); };
  for (std::size_t next = 2; next <= most_on_a_host && !is_enough(); ++next)
    if (stays_on_hosts(next)) chosen = next;
  return static_cast<int>(chosen);
}

int agree_ranks_per_file(Communicator& communicator, int wanted) {
  if (wanted > 0) return wanted;
  return communicator.size() <= kMaxFiles ? 1 : choose_ranks_per_file(all_gather_strings(communicator, host_name()));
}

std::unique_ptr<Communicator> split_by_file(Communicator& communicator, int ranks_per_file) {
  check_internal(ranks_per_file > 0, "split_by_file: at least one rank writes a file");
  if (ranks_per_file == 1) return nullptr;
  const std::vector<std::string> hosts = all_gather_strings(communicator, host_name());
  for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
    const std::size_t owner = rank - rank % static_cast<std::size_t>(ranks_per_file);
    if (hosts[rank] != hosts[owner])
      fail(ErrorKind::config,
           fmt::format("--ranks_per_file = {}: ranks {} ({}) and {} ({}) would share a file; ranks of one file must "
                       "run on one host, so use a number that divides the ranks of every host",
                       ranks_per_file, owner, hosts[owner], rank, hosts[rank]));
  }
  return communicator.split(communicator.rank() / ranks_per_file, communicator.rank());
}

}  // namespace shardtune
