#pragma once
// Who tells the user when a job fails: what several ranks run into alike is said once.
#include <filesystem>
#include <string_view>

namespace shardtune {

// The directory that the launcher made for this job on this machine and removes with it (PMIx; Open MPI's mpirun and
// srun --mpi=pmix set it); empty where there is none.
std::filesystem::path job_directory();

// True for the first caller with this text of all processes that share `job_directory`, and for everyone where nothing
// can be written there: a message said twice is better than none. Never throws.
bool claim_failure_report(const std::filesystem::path& job_directory, std::string_view text) noexcept;

}  // namespace shardtune
