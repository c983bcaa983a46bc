"""What a command runs on: device, processes, DataLoader workers, log and progress, and files that appear whole."""
