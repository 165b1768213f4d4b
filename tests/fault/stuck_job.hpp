#pragma once
// A job that does not end: what it hangs in, for whoever looks for the cause later.
#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

namespace shardtune::testing_support {

// Into the new directory `into`: story.txt; job.log, a copy of `log`; ps.txt, all threads of the machine;
// process-<pid>.txt, what the kernel says of each thread; gdb-<pid>.txt, its stacks, where gdb is installed. Takes up
// to 20 s a process.
void keep_evidence(const std::filesystem::path& into, const std::vector<pid_t>& processes, const std::string& story,
                   const std::filesystem::path& log);

}  // namespace shardtune::testing_support
