"""Load generator for any OpenAI-compatible server: named workloads, latencies, throughput."""
