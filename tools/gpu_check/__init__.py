"""Checks fastmae on this machine's GPU in six to eight minutes: what is right, and how fast (`make gpu-check`)."""
