#!/usr/bin/env python3
"""Counts GoogleTest cases in ctest's JUnit file and judges skips; the last line is `N passed, N failed, N skipped`.

One ctest entry may hold many cases, and an mpirun entry prints them once per reporting rank: a case failed when it failed on
any rank. An entry that failed without a failed case (crash, timeout) counts as one failure, an entry that is no GoogleTest
program as one case. A skip is expected only while SHARDTUNE_TEST_DATA is unset and the reason names it.
"""
import os
import re
import sys
import xml.etree.ElementTree as ElementTree

CASE = re.compile(r"\[ (RUN     |      OK| SKIPPED| FAILED ) \] ([\w/]+\.[\w/]+)")


def judge(entry, data_is_set):
    """Returns ({case: verdict}, [complaint]) of one ctest entry."""
    name = entry.get("name")
    output = entry.findtext("system-out") or ""
    verdicts, complaints, begun = {}, [], {}
    rank = {"passed": 0, "skipped": 1, "failed": 2}
    for match in CASE.finditer(output):
        mark, case = match.group(1).strip(), match.group(2)
        if mark == "RUN":
            begun[case] = match.end()
            continue
        verdict = {"OK": "passed", "SKIPPED": "skipped", "FAILED": "failed"}[mark]
        if verdict == "skipped" and case in begun and verdicts.get(case) != "skipped":
            reason = output[begun[case]:match.start()]
            if data_is_set or "SHARDTUNE_TEST_DATA" not in reason:
                complaints.append(f"unexpected skip: {name}: {case}: {' '.join(reason.split())}")
        if rank[verdict] >= rank.get(verdicts.get(case), -1):
            verdicts[case] = verdict
    for case in begun:
        verdicts.setdefault(case, "failed")  # began and never ended
    entry_failed = entry.find("failure") is not None or entry.get("status") == "fail"
    entry_skipped = entry.find("skipped") is not None or entry.get("status") in ("notrun", "disabled")
    if entry_skipped:
        verdicts[name] = "skipped"
        complaints.append(f"unexpected skip: {name} did not run")
    elif entry_failed and "failed" not in verdicts.values():
        verdicts[name] = "failed"
    elif not verdicts:
        verdicts[name] = "passed"
    return verdicts, complaints


def main():
    entries = list(ElementTree.parse(sys.argv[1]).getroot().iter("testcase"))
    data_is_set = bool(os.environ.get("SHARDTUNE_TEST_DATA"))
    totals, complaints = {"passed": 0, "failed": 0, "skipped": 0}, []
    for entry in entries:
        verdicts, found = judge(entry, data_is_set)
        complaints += found
        for case, verdict in verdicts.items():
            totals[verdict] += 1
            if verdict == "failed":
                print(f"failed: {entry.get('name')}: {case}")
    for line in complaints:
        print(line)
    print(f"{totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped")
    return 0 if totals["passed"] and not totals["failed"] and not complaints else 1


if __name__ == "__main__":
    sys.exit(main())
