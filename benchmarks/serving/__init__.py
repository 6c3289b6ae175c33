"""What `benchmarks.server` measures, one part a file, over a real server process and a load of its own."""
