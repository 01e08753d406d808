"""Training and measuring networks, compressed or dense: tasks, the loop, exact resume, evaluation.

``loop.train`` trains a network in memory; ``finetune`` goes from file to file; ``evaluate`` measures.
"""
