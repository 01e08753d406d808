"""Train and evaluate networks, compressed or dense: tasks, the loop, exact resume.

``loop.train`` trains a network in memory, ``finetune`` works from file to file, ``evaluate`` scores a
network.
"""
