// The cores of a rank where Open MPI's default would have given it one.
#include "launcher/core_share.hpp"

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

namespace shardtune {
namespace {

// Two sockets of `cores` cores; hardware threads of a core are far apart in the system's numbers, as on most servers.
std::vector<Cpu> machine(int cores, int threads) {
  std::vector<Cpu> cpus;
  for (int number = 0; number < 2 * cores * threads; ++number)
    cpus.push_back({number % (2 * cores) / cores, number % cores, number});
  return cpus;
}

TEST(CoreShare, OneRankHasAll) {
  EXPECT_EQ(share_of_cores(machine(2, 1), 0, 1), (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(share_of_cores(machine(2, 2), 0, 1).size(), 8U);
}

TEST(CoreShare, RanksHaveWholeCoresAndASocketEachWherePossible) {
  EXPECT_EQ(share_of_cores(machine(2, 2), 0, 2), (std::vector<int>{0, 4, 1, 5}));
  EXPECT_EQ(share_of_cores(machine(2, 2), 1, 2), (std::vector<int>{2, 6, 3, 7}));
}

TEST(CoreShare, EveryCoreHasOneOwner) {
  for (const int ranks : {1, 2, 3, 5, 12}) {
    std::vector<int> all;
    for (int rank = 0; rank < ranks; ++rank) {
      const auto share = share_of_cores(machine(6, 2), rank, ranks);
      EXPECT_GE(share.size(), 2U * (12U / static_cast<unsigned>(ranks)));
      all.insert(all.end(), share.begin(), share.end());
    }
    std::sort(all.begin(), all.end());
    ASSERT_EQ(all.size(), 24U) << ranks;
    for (int cpu = 0; cpu < 24; ++cpu) EXPECT_EQ(all[static_cast<std::size_t>(cpu)], cpu);
  }
}

TEST(CoreShare, WithoutACoreForEachNobodyMoves) {
  EXPECT_TRUE(share_of_cores(machine(1, 2), 0, 3).empty());
  EXPECT_TRUE(share_of_cores({}, 0, 1).empty());
  EXPECT_TRUE(share_of_cores(machine(2, 1), 2, 2).empty());
  EXPECT_TRUE(share_of_cores(machine(2, 1), -1, 2).empty());
}

}  // namespace
}  // namespace shardtune
