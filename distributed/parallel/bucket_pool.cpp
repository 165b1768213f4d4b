#include "distributed/parallel/bucket_pool.hpp"

#include <algorithm>
#include <memory>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>

namespace shardtune {

std::int64_t BucketPool::numel_per_rank(at::ScalarType dtype) const noexcept {
  constexpr std::int64_t kLineBytes = 64;
  const auto element = static_cast<std::int64_t>(c10::elementSize(dtype));
  return std::max(size_.bucket_bytes / ranks_.size() / kLineBytes, std::int64_t{1}) * kLineBytes / element;
}

at::Tensor BucketPool::take() {
  if (!free_.empty()) {
    at::Tensor bucket = std::move(free_.front());
    free_.pop_front();
    return bucket;
  }
  ++num_made_;
  at::Tensor bucket = ranks_.make_buffer(bucket_bytes(), at::kByte);
  counter_.add(static_cast<std::int64_t>(bucket.nbytes()));
  return bucket;
}

void BucketStream::drop() noexcept {
  next_chunk_ = num_chunks_;
  while (!flights_.empty()) {
    flights_.front().work = Work();  // an assignment waits like the destructor
    pool_.give_back(std::move(flights_.front().bucket));
    flights_.pop_front();
  }
}

void BucketStream::start_some() {
  while (next_chunk_ < num_chunks_ && static_cast<int>(flights_.size()) < pool_.max_in_flight()) start_next();
}

void BucketStream::start_all() {
  while (next_chunk_ < num_chunks_) {
    if (static_cast<int>(flights_.size()) == pool_.max_in_flight()) finish_first();
    start_next();
  }
}

void BucketStream::finish() {
  start_all();
  while (!flights_.empty()) finish_first();
}

void BucketStream::start_next() {
  const at::NoGradGuard no_grad;
  flights_.push_back({pool_.take(), {}});
  flights_.back().work = steps_.start(next_chunk_++, flights_.back().bucket);
}

void BucketStream::finish_first() {
  const at::NoGradGuard no_grad;
  Flight& first = flights_.front();
  first.work.wait();
  steps_.finish(next_chunk_ - static_cast<std::int64_t>(flights_.size()), first.bucket);
  pool_.give_back(std::move(first.bucket));
  flights_.pop_front();
}

std::unique_ptr<BucketStream> all_reduce_stream(Communicator& ranks, BucketPool& pool, Pieces from, Pieces into,
                                                at::ScalarType dtype) {
  const std::int64_t numel = num_elements(into);
  const std::int64_t per_chunk = pool.numel_per_rank(dtype) * ranks.size();
  const std::int64_t chunks = num_chunks({numel}, per_chunk);
  const auto of_chunk = [=](std::int64_t chunk, const at::Tensor& bucket) {
    return bucket.view(dtype).narrow(0, 0, counts_of_chunk({numel}, chunk, per_chunk).front());
  };
  BucketStream::Steps steps;
  steps.start = [=, &ranks, parts = std::move(from)](std::int64_t chunk, const at::Tensor& bucket) mutable {
    const at::Tensor place = of_chunk(chunk, bucket);
    if (parts.empty()) {
      place.zero_();
    } else {
      copy_out(parts, chunk * per_chunk, place);
    }
    if (chunk + 1 == chunks) parts.clear();
    return ranks.all_reduce(place, ReduceOp::sum);
  };
  steps.finish = [=, results = std::move(into)](std::int64_t chunk, const at::Tensor& bucket) {
    copy_in(results, chunk * per_chunk, of_chunk(chunk, bucket));
  };
  return std::make_unique<BucketStream>(pool, chunks, std::move(steps));
}

}  // namespace shardtune
