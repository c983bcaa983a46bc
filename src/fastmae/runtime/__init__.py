"""The machine: device, processes, launch, worker processes, progress, files that appear whole."""
