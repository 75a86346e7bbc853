"""temporary"""
import os, resource
def usable_cores() -> int: return len(os.sched_getaffinity(0))
def peak_memory_bytes() -> int:
    return max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))*1024
