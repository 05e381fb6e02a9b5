"""What the benchmarks share: memory cgroups, measured processes, real prompts, the peers."""
