#pragma once
// Huge pages that are not at hand: a run starts without them and takes them once its first step is done.
//
// A virtual machine that returns free memory to its host (virtio's balloon, free page reporting) waits for the host at
// the first touch of each piece of it: 5 ms for a huge page measured, where one at hand takes a quarter of one. Small
// pages mostly come from pieces too small to be returned. So there a process is up to a second faster to its first
// result without huge ones; but its products are slower all its life.
// Needs none of the program's libraries: the front program decides before they are loaded. Linux; elsewhere nothing
// happens.

namespace shardtune {

// Whether this is a machine that returns free memory to its host.
bool is_free_memory_returned();

// From now on this process, and what it becomes by exec, gets small pages, until it calls adopt_huge_pages(). Does
// nothing where small pages could not be made huge ones later (before Linux 6.1), or huge ones are forbidden anyway.
// Whether it has done something.
bool postpone_huge_pages();

// Ends what postpone_huge_pages() began and makes the heap's small pages huge ones, which copies them: once; for
// whoever has not postponed nothing. Call it when memory is used as it will be. Whether there was something to do. From
// any thread; others go on, but wait where they use what is being copied.
bool adopt_huge_pages();

}  // namespace shardtune
