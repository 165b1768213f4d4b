#include "distributed/comm/shm_transport.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "core/error.hpp"
#include "distributed/comm/copy_bytes.hpp"

namespace shardtune {
namespace {

constexpr std::int64_t kLine = 64;
// Up to this many bytes from all ranks together every rank sums everything: one round instead of two.
constexpr std::int64_t kAtOnceBytes = 64 << 10;
// Smaller parts are copied rather than read in place, which takes a second round.
constexpr std::int64_t kMinInPlaceBytes = 4 << 10;
// Reduced into this rank's buffer and copied to the others' while it is in the first cache.
constexpr std::int64_t kInPlaceBlockBytes = 16 << 10;

std::int64_t up_to_lines(std::int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

std::size_t index(int rank) { return static_cast<std::size_t>(rank); }

// What of a part of `bytes` bytes lies in the step that begins at `begin`.
std::int64_t in_step(std::int64_t bytes, std::int64_t begin, std::int64_t step) {
  return std::clamp(bytes - begin, std::int64_t{0}, step);
}

std::int64_t header_bytes(int size) {
  return kLine + up_to_lines(size * static_cast<std::int64_t>(sizeof(std::int64_t)));
}

}  // namespace

// A part: the counter, and for even and odd rounds a header, counts and a slot.
std::int64_t ShmTransport::part_bytes(int size, std::int64_t slot_bytes) {
  return static_cast<std::int64_t>(sizeof(SharedCounter)) + 2 * (header_bytes(size) + up_to_lines(slot_bytes));
}

ShmTransport::ShmTransport(std::unique_ptr<Transport> messages, const LayerOptions& options, Setup setup)
    : LayeredTransport(std::move(messages), options, /*is_one_node=*/true),
      segment_(std::move(setup.segment)),
      slot_bytes_(setup.slot_bytes),
      peers_(std::move(setup.peers)),
      addresses_(index(size())) {}

std::byte* ShmTransport::parity_area(int rank) const noexcept {
  const std::int64_t parity = round_ % 2;
  return segment_->part(rank) + sizeof(SharedCounter) + parity * (header_bytes(size()) + up_to_lines(slot_bytes_));
}

std::int64_t* ShmTransport::counts(int rank) const noexcept {
  return reinterpret_cast<std::int64_t*>(parity_area(rank) + kLine);
}

std::byte* ShmTransport::slot(int rank) const noexcept { return parity_area(rank) + header_bytes(size()); }

// Of a slot that is shared out to the ranks.
std::int64_t ShmTransport::step_per_rank() const noexcept { return slot_bytes_ / size() / kLine * kLine; }

void ShmTransport::begin_round(const Call& call) {
  ++round_;
  header(rank()) = {call.operation, call.bytes, call.place};
  std::copy(call.counts.begin(), call.counts.end(), counts(rank()));
}

void ShmTransport::meet(Operation operation) {
  counter(rank()).publish(round_);
  for_other_ranks([&](int other) { peers_.wait(counter(other), round_, other, name_of(operation)); });
}

ShmTransport::Source ShmTransport::enter(const Call& call) {
  meet(call.operation);
  std::int64_t number = Place::kNowhere;
  bool is_staged = true;
  bool is_one_buffer = true;
  for (int r = 0; r < size(); ++r) {
    const Header& other = header(r);
    if (other.operation != call.operation || other.bytes != call.bytes) fail_different();
    const std::int64_t buffer = other.place.buffer;
    if (buffer == Place::kNowhere) continue;
    if (number == Place::kNowhere) number = buffer;
    if (buffer != number) is_one_buffer = false;
    if (buffer != Place::kSlot) is_staged = false;
  }
  if (is_staged) return Source::slots;
  if (!is_one_buffer) return Source::mixed;
  const auto buffer =
      std::find_if(buffers_.begin(), buffers_.end(), [&](const Buffer& b) { return b.number == number; });
  for (int r = 0; r < size(); ++r) addresses_[index(r)] = buffer->segment->part(r) + header(r).place.offset;
  return Source::buffers;
}

ShmTransport::Place ShmTransport::locate(const std::byte* data, std::int64_t bytes) const {
  if (bytes == 0) return {Place::kNowhere, 0};
  for (const Buffer& buffer : buffers_) {
    const std::byte* begin = buffer.segment->part(rank());
    if (data >= begin && data + bytes <= begin + buffer.segment->part_bytes()) return {buffer.number, data - begin};
  }
  return {};
}

template <class Take>
void ShmTransport::for_other_ranks(Take take) const {
  for (int step = 1; step < size(); ++step) take((rank() + step) % size());
}

void ShmTransport::run(const Call& call, const Steps& steps) {
  begin_round(call);
  if (call.place.buffer == Place::kSlot) steps.stage(0);
  const Source source = enter(call);
  if (source == Source::buffers) {
    steps.direct();
    begin_round(call);
    meet(call.operation);  // now nobody reads this rank's buffer any more
    return;
  }
  if (source == Source::mixed) {  // a later round, with everybody's data in slots
    begin_round(call);
    steps.stage(0);
    meet(call.operation);
  }
  const std::int64_t longest = steps.longest();
  for (std::int64_t begin = 0;;) {
    steps.consume(begin);
    begin += call.step;
    if (begin >= longest) return;
    begin_round(call);
    steps.stage(begin);
    meet(call.operation);
  }
}

void ShmTransport::barrier() {
  const Call call{Operation::barrier, 0, {Place::kNowhere, 0}, 1};
  begin_round(call);
  (void)enter(call);
}

void ShmTransport::all_gather(const std::byte* send, std::byte* receive, Counts bytes) {
  const std::vector<std::int64_t> at = offsets_of(bytes);
  std::byte* own = receive + at[index(rank())];
  const std::int64_t own_bytes = bytes[index(rank())];
  Place place;
  if (at.back() >= kMinInPlaceBytes) {
    place = locate(send, own_bytes);
    if (place.buffer == Place::kSlot) place = locate(own, own_bytes);
  }
  if (place.buffer != Place::kSlot) copy_bytes(own, send, own_bytes);
  const Call call{Operation::all_gather, at.back(), place, slot_bytes_};
  Steps steps;
  steps.stage = [&](std::int64_t begin) {
    copy_bytes(slot(rank()), send + begin, in_step(own_bytes, begin, call.step));
    copy_bytes(own + begin, send + begin, in_step(own_bytes, begin, call.step));  // while it is in the cache
  };
  steps.longest = [&] { return *std::max_element(bytes.begin(), bytes.end()); };
  steps.consume = [&](std::int64_t begin) {
    for_other_ranks([&](int r) {
      copy_bytes(receive + at[index(r)] + begin, slot(r), in_step(bytes[index(r)], begin, call.step));
    });
  };
  steps.direct = [&] {
    for_other_ranks([&](int r) { copy_bytes(receive + at[index(r)], in_buffer(r), bytes[index(r)]); });
  };
  run(call, steps);
}

void ShmTransport::broadcast(std::byte* data, std::int64_t bytes, int root) {
  const bool is_root = rank() == root;
  const Place place = is_root ? (bytes >= kMinInPlaceBytes ? locate(data, bytes) : Place{}) : Place{Place::kNowhere, 0};
  const Call call{Operation::broadcast, bytes * size() + root, place, slot_bytes_};
  Steps steps;
  steps.stage = [&](std::int64_t begin) {
    if (is_root) copy_bytes(slot(root), data + begin, in_step(bytes, begin, call.step));
  };
  steps.longest = [&] { return bytes; };
  steps.consume = [&](std::int64_t begin) {
    if (!is_root) copy_bytes(data + begin, slot(root), in_step(bytes, begin, call.step));
  };
  steps.direct = [&] {
    if (!is_root) copy_bytes(data, in_buffer(root), bytes);
  };
  run(call, steps);
}

void ShmTransport::exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) {
  const std::vector<std::int64_t> from = offsets_of(send_bytes);
  const std::vector<std::int64_t> to = offsets_of(receive_bytes);
  copy_bytes(receive + to[index(rank())], send + from[index(rank())], send_bytes[index(rank())]);
  const bool is_small = from.back() > 0 && from.back() < kMinInPlaceBytes;
  const Call call{Operation::exchange, 0, is_small ? Place{} : locate(send, from.back()), step_per_rank(), send_bytes};
  std::vector<std::vector<std::int64_t>> sent;  // by every rank, to every rank
  const auto take_counts = [&] {
    for (int r = 0; r < size(); ++r) {
      sent.emplace_back(counts(r), counts(r) + size());
      if (sent.back()[index(rank())] == receive_bytes[index(r)]) continue;
      fail(ErrorKind::comm, fmt::format("rank {} sends {} bytes to rank {}, which expects {}", r,
                                        sent.back()[index(rank())], rank(), receive_bytes[index(r)]));
    }
  };
  Steps steps;
  steps.stage = [&](std::int64_t begin) {
    for_other_ranks([&](int r) {
      copy_bytes(slot(rank()) + r * call.step, send + from[index(r)] + begin,
                 in_step(send_bytes[index(r)], begin, call.step));
    });
  };
  steps.longest = [&] {
    take_counts();
    std::int64_t longest = 0;
    for (const auto& row : sent) longest = std::max(longest, *std::max_element(row.begin(), row.end()));
    return longest;
  };
  steps.consume = [&](std::int64_t begin) {
    for_other_ranks([&](int r) {
      copy_bytes(receive + to[index(r)] + begin, slot(r) + rank() * call.step,
                 in_step(receive_bytes[index(r)], begin, call.step));
    });
  };
  steps.direct = [&] {
    take_counts();
    for_other_ranks([&](int r) {
      copy_bytes(receive + to[index(r)], in_buffer(r) + offsets_of(sent[index(r)])[index(rank())],
                 receive_bytes[index(r)]);
    });
  };
  run(call, steps);
}

// Out of the slots every rank takes everybody's share of its part; out of buffers the same without the copies.
void ShmTransport::reduce_scatter(const std::byte* in, Counts numels, std::byte* out, const Reduction& reduction) {
  const std::vector<std::int64_t> at = offsets_of(numels);
  const std::int64_t element = reduction.in_bytes();
  const std::int64_t own_numel = numels[index(rank())];
  const std::byte* own = in + at[index(rank())] * element;
  const std::int64_t total = at.back() * element;
  const Call call{Operation::reduce_scatter, total, total >= kMinInPlaceBytes ? locate(in, total) : Place{},
                  step_per_rank()};
  std::vector<const std::byte*> pieces(index(size()));
  Steps steps;
  steps.stage = [&](std::int64_t begin) {
    for_other_ranks([&](int r) {
      copy_bytes(slot(rank()) + r * call.step, in + at[index(r)] * element + begin,
                 in_step(numels[index(r)] * element, begin, call.step));
    });
  };
  steps.longest = [&] { return *std::max_element(numels.begin(), numels.end()) * element; };
  steps.consume = [&](std::int64_t begin) {
    for_other_ranks([&](int r) { pieces[index(r)] = slot(r) + rank() * call.step; });
    pieces[index(rank())] = own + begin;
    reduce_pieces(pieces, in_step(own_numel * element, begin, call.step) / element, reduction,
                  out + begin / element * reduction.out_bytes());
  };
  steps.direct = [&] {
    for (int r = 0; r < size(); ++r) pieces[index(r)] = in_buffer(r) + (own - in);
    reduce_pieces(pieces, own_numel, reduction, out);
  };
  run(call, steps);
}

void ShmTransport::all_reduce(std::byte* data, std::int64_t numel, const Reduction& reduction) {
  const std::int64_t bytes = numel * reduction.in_bytes();
  const Place place = bytes >= kMinInPlaceBytes ? locate(data, bytes) : Place{};
  // Of two ranks each moves as many bytes either way, and waits half as often at once. bf16 costs more to sum than to
  // move.
  const bool is_at_once = bytes * size() <= kAtOnceBytes || (size() == 2 && reduction.dtype != at::kBFloat16);
  Steps steps = is_at_once ? all_reduce_at_once(data, bytes, reduction) : all_reduce_by_slices(data, bytes, reduction);
  steps.longest = [&] { return bytes; };
  steps.direct = [&] { all_reduce_in_buffers(numel, reduction); };
  const std::int64_t step = is_at_once ? slot_bytes_ : step_per_rank() * size();
  run({Operation::all_reduce, bytes, place, step}, steps);
}

// Every rank sums everything.
ShmTransport::Steps ShmTransport::all_reduce_at_once(std::byte* data, std::int64_t bytes, const Reduction& reduction) {
  Steps steps;
  steps.stage = [=, this](std::int64_t begin) {
    copy_bytes(slot(rank()), data + begin, in_step(bytes, begin, slot_bytes_));
  };
  steps.consume = [=, this](std::int64_t begin) {
    std::vector<const std::byte*> pieces(index(size()));
    for_other_ranks([&](int r) { pieces[index(r)] = slot(r); });
    pieces[index(rank())] = data + begin;
    reduce_pieces(pieces, in_step(bytes, begin, slot_bytes_) / reduction.in_bytes(), reduction, data + begin);
  };
  return steps;
}

// Every step is cut into a slice for each rank, summed there and handed round in a second round.
ShmTransport::Steps ShmTransport::all_reduce_by_slices(std::byte* data, std::int64_t bytes,
                                                       const Reduction& reduction) {
  const std::int64_t step = step_per_rank();
  // What is left is shared out evenly in the last step.
  const auto slice_at = [=, this](std::int64_t begin) {
    return std::min(step, up_to_lines((bytes - begin + size() - 1) / size()));
  };
  const auto in_slice = [=](std::int64_t begin, int r) {
    const std::int64_t slice = slice_at(begin);
    return in_step(bytes, begin + r * slice, slice);
  };
  Steps steps;
  steps.stage = [=, this](std::int64_t begin) {
    for_other_ranks(
        [&](int r) { copy_bytes(slot(rank()) + r * step, data + begin + r * slice_at(begin), in_slice(begin, r)); });
  };
  steps.consume = [=, this](std::int64_t begin) {
    const std::int64_t slice = slice_at(begin);
    std::byte* own = data + begin + rank() * slice;
    const std::int64_t own_bytes = in_slice(begin, rank());
    std::vector<const std::byte*> pieces(index(size()));
    for_other_ranks([&](int r) { pieces[index(r)] = slot(r) + rank() * step; });
    pieces[index(rank())] = own;
    reduce_pieces(pieces, own_bytes / reduction.in_bytes(), reduction, own);
    begin_round({Operation::all_reduce, bytes, {}, step});
    copy_bytes(slot(rank()), own, own_bytes);
    meet(Operation::all_reduce);
    for_other_ranks([&](int r) { copy_bytes(data + begin + r * slice, slot(r), in_slice(begin, r)); });
  };
  return steps;
}

// Every rank sums its slice of all buffers and writes it into all of them.
void ShmTransport::all_reduce_in_buffers(std::int64_t numel, const Reduction& reduction) {
  const std::int64_t element = reduction.in_bytes();
  const std::vector<std::int64_t> slices = even_slices(numel, size());
  const std::int64_t begin = offsets_of(slices)[index(rank())] * element;
  const std::int64_t bytes = slices[index(rank())] * element;
  std::vector<const std::byte*> pieces(index(size()));
  for (std::int64_t done = 0; done < bytes; done += kInPlaceBlockBytes) {
    const std::int64_t count = in_step(bytes, done, kInPlaceBlockBytes);
    for (int r = 0; r < size(); ++r) pieces[index(r)] = in_buffer(r) + begin + done;
    std::byte* own = in_buffer(rank()) + begin + done;
    reduce_pieces(pieces, count / element, reduction, own);
    for_other_ranks([&](int r) { copy_bytes(in_buffer(r) + begin + done, own, count); });
  }
}

const char* ShmTransport::name_of(Operation operation) {
  static constexpr const char* kNames[] = {"all_to_all", "all_gather", "broadcast",
                                           "barrier",    "all_reduce", "reduce_scatter"};
  const auto number = static_cast<std::size_t>(operation) - 1;
  return number < std::size(kNames) ? kNames[number] : "something else";
}

void PeerWait::wait(SharedCounter& counter, std::uint32_t value, int other, const char* operation) const {
  if (counter.wait_for(value, policy)) return;
  fail(ErrorKind::comm,
       fmt::format("{}: rank {} of {} has waited {:g} s for rank {} (process {}), which does not come: it hangs, takes "
                   "longer than that, or calls something else; SHARDTUNE_COMM_TIMEOUT sets the seconds",
                   operation, rank, process_of_rank.size(), std::chrono::duration<double>(policy.timeout).count(),
                   other, process_of_rank[index(other)]));
}

void ShmTransport::fail_different() const {
  std::string message = "the ranks call different collectives:";
  for (int r = 0; r < size(); ++r) {
    message +=
        fmt::format("{} rank {} {} [{} bytes]", r > 0 ? "," : "", r, name_of(header(r).operation), header(r).bytes);
  }
  fail(ErrorKind::comm, message);
}

}  // namespace shardtune
