"""The process and its machine: process groups, signals, devices, installed packages, formatting."""
