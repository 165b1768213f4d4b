#pragma once
// What the ranks that write one file together tell each other.
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/shard_writer.hpp"
#include "checkpoint/state_view.hpp"
#include "distributed/comm/communicator.hpp"

namespace shardtune {

// Names, shapes and ranges of a rank's slices, without elements, as text and back.
std::string describe_slices(const StateView& view);
// The slices of all ranks, in rank order; their tensors have sizes but no memory (device "meta").
StateView join_slices(const std::vector<std::string>& descriptions, const nlohmann::json& run);

std::string pack_positions(const std::vector<std::uint64_t>& positions);
std::vector<std::uint64_t> unpack_positions(std::string_view bytes);
std::string pack_parts(const std::vector<WrittenPart>& parts);
void unpack_parts(std::string_view bytes, std::vector<WrittenPart>& into);  // appends

// How many consecutive ranks write one file when nobody says, given the host of each rank. One each, up to `max_files`:
// then nobody waits for others between the stages of a save and each reads its own file back, all at once. Beyond that
// the metadata of so many files costs a parallel file system more, so the fewest ranks of one host that keep to it, or
// as many of one host as go together.
inline constexpr int kMaxFiles = 256;
int choose_ranks_per_file(const std::vector<std::string>& hosts, int max_files = kMaxFiles);

// Collective. `wanted`, or for 0 what choose_ranks_per_file says; equal on all ranks.
int agree_ranks_per_file(Communicator& communicator, int wanted);

// Collective. The ranks [f k, (f + 1) k) of `communicator` share a file; null for k = 1. Error{config} on every rank
// when ranks of one file run on different hosts: pages that two hosts change at once would be lost on network file
// systems.
std::unique_ptr<Communicator> split_by_file(Communicator& communicator, int ranks_per_file);

}  // namespace shardtune
